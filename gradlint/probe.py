"""The probe: run the backward model on a batch and measure the exact gradients. Only reductions leave the session."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from gradlint import memory
from gradlint.alignment import alignment, gram_of_inputs
from gradlint.backward import Backward
from gradlint.data import Arrays, Data
from gradlint.exceptions import DataError
from gradlint.figures import ACTIVATION, coherence, difference, statistics
from gradlint.graph import FLOATS, REORDERS, batch_size, dims, is_float, op
from gradlint.histograms import Histogram, View, Wanted, measure
from gradlint.losses import seeds_of
from gradlint.ops.batch_normalization import to_train_mode
from gradlint.options import Loss
from gradlint.reverse import Cut, backward, named_output
from gradlint.session import SCALE, part, run, runtime_errors, session_of
from gradlint.taps import (
    Taps,
    batch_axis,
    tap_activation,
    tap_attention,
    tap_gram,
    tap_positions,
    tap_seed,
    tap_value,
    tap_weight,
)
from gradlint.transfer import ELEMENTWISE

_SCRATCH = 2 << 20  # bytes a run needs beside what the backward pass reads


@dataclass(frozen=True)
class Skipped:
    """Why the probe did not run, and what to give so that it does. rejected: the model ran, and refused its input."""

    reason: str
    remedy: str = ""
    rejected: bool = False


@dataclass(frozen=True)
class Probe:
    """Measured statistics, in the units of the report.

    values: by value name: mean, std, signal, grad_rms, grad_norm, and of activations slope, saturated, dead, ..;
    weights: by initializer name: grad_rms, grad_mean_abs, zero_share; steps: |dL/dh_t| per time step by node name;
    cotangent: norm of the loss's gradient at the outputs, RMS over examples; alignment: of the last features with the
    inputs (`gradlint.alignment`); position_signal: of the last features (`gradlint.positions`); coherence: of the
    examples' gradients at the outputs (`figures.coherence`; 1 under the linear loss, whose targets are independent);
    whole: data_mean, data_std, data_low, data_high over the float inputs; classes and initial_loss under cross-entropy;
    histograms: where asked for, by kind (`input` of an activation by its name, `gradient` by initializer, `logits` and
    `entropy` by the softmax's output) and name.
    """

    values: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Mapping[str, float]]
    steps: Mapping[str, np.ndarray]
    cotangent: float
    examples: int
    cuts: tuple[Cut, ...]
    measured: frozenset[str]
    alignment: float | None = None
    position_signal: float | None = None
    coherence: float = 1.0
    whole: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[tuple[str, str], Histogram] = field(default_factory=dict)
    build_s: float = 0.0
    run_s: float = 0.0
    histograms_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """What to measure: values by name, weights by initializer name, activation nodes by name.

    units: the axis of units by activation name; features: the value the last layer reads; told_apart: its axes of
    positions with an output each; attentions: the softmax's
    output by name, and its logits before masks; pictured: weights whose gradients' histograms are wanted, with those
    of all activations and attentions (None: no histograms).
    """

    values: Sequence[str]
    weights: Sequence[str]
    activations: Sequence[str]
    units: Mapping[str, int] = field(default_factory=dict)
    features: str | None = None
    told_apart: tuple[int, ...] = ()
    attentions: Mapping[str, str] = field(default_factory=dict)
    pictured: Sequence[str] | None = None


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def probe(
    model: ir.Model,
    data: Data,
    request: Request,
    *,
    loss: Loss,
    mode: str,
    seed: int,
    threads: int,
) -> Probe | Skipped:
    """Differentiate a copy of the canonical model, run it on `data`, reduce.

    data.inputs holds an array for every input. Raises DataError for targets that don't fit; a model that onnxruntime
    can't run is a `Skipped`, not an error.
    """
    started = time.perf_counter()
    graph = model.graph.clone()
    if not any(is_float(o) for o in graph.outputs):
        return Skipped("no output is a float, so no loss has a gradient", "export the model up to its logits")
    _to_float32(graph)
    if mode == "train":
        to_train_mode(graph)
    batch, chunks = _chunks(graph, data)
    values = {
        str(v.name): v for v in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    }
    try:
        _learn_shapes(model, graph, data.inputs, threads)
    except runtime_errors() as error:
        return Skipped(f"the model rejects the data: {_first_line(error)}", _input_hint(graph, data), rejected=True)
    scale = ir.Value(name=SCALE, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(scale)
    emitter = Backward(mode, set(), prefix="loss")
    seeds, feeds, losses = seeds_of(emitter, graph, data, loss, seed, scale, batch, chunks)
    emitter.emit(graph)
    wanted = [values[n] for n in (*request.weights, *request.values) if n in values and is_float(values[n])]
    forward = len(graph)
    b, grads, cuts = backward(graph, seeds, wanted, mode=mode)
    kept, passes = _kept(list(graph), forward), len(graph)
    taps = Taps(b)
    for name in request.values:
        if name in values:
            tap_value(taps, name, values[name], grads.get(values[name]), batch)
    for name in request.weights:
        if (g := grads.get(values[name])) is not None:
            tap_weight(taps, name, values[name], g, whole=chunks > 1)
    nodes = {n.name: n for n in graph}
    for name in request.activations:
        node = nodes.get(name)
        if node is not None and op(node) in ELEMENTWISE and is_float(node.inputs[0]):
            tap_activation(taps, name, node, request.units.get(name, 1))
    for (node, kind), value in b.byproducts.items():
        taps.add(kind, str(node.name), value)
    for name, logits in request.attentions.items():
        if name in values and logits in values:
            tap_attention(taps, name, values[name], values[logits])
    if request.features in values and chunks == 1:
        tap_gram(taps, values[request.features], batch)
    if request.features in values and request.told_apart:
        tap_positions(taps, values[request.features], request.told_apart)
    for k, value in enumerate(losses):
        taps.add("loss", str(k), value)
    for output, cotangent in seeds.items():
        tap_seed(taps, str(output.name), cotangent, batch_axis(dims(output) or (), batch))
    b.emit(graph)
    _reduce_early(graph, passes)
    to_count = _to_count(request, values, nodes, grads)
    counted = graph.clone() if to_count else None  # before the taps take the names of values
    graph.outputs.clear()
    taken: set[ir.Value] = set(graph.inputs)
    graph.outputs.extend(named_output(graph, v, f"tap.{k}", taken) for k, v in enumerate(taps.distinct()))
    try:
        with memory.at_hand(kept * 5 // 6 + _SCRATCH):  # the rest fits into what loading frees
            session = session_of(model, graph, threads)
    except runtime_errors() as error:
        return Skipped(f"onnxruntime can't load the model: {_first_line(error)}", _remedy(error))
    built = time.perf_counter()
    try:
        sums = run(session, taps, feeds, chunks)
    except runtime_errors() as error:
        return Skipped(f"the model rejects the data: {_first_line(error)}", _input_hint(graph, data), rejected=True)
    ran = time.perf_counter()
    del session
    histograms = _histograms(model, counted, to_count, feeds, threads) if counted is not None else {}
    ended = time.perf_counter()
    examples = batch * chunks
    found = statistics(taps, sums, values, examples if loss != "linear" else 1, batch, chunks)
    measured = frozenset(str(n.name) for n in b.reached)
    likeness = None
    if ("gram", "features") in sums:
        likeness = alignment(gram_of_inputs(data.inputs.values(), batch), sums["gram", "features"])
    apart = None
    if ("energy", "features") in sums:
        apart = difference(float(sums["apart", "features"]), float(sums["energy", "features"]))
    whole = _input_figures(data.inputs) | _initial_loss(sums, seeds)
    times = (built - started, ran - built, ended - ran)
    agreement = 1.0 if loss == "linear" else coherence(sums, examples)
    return Probe(*found, examples, cuts, measured, likeness, apart, agreement, whole, histograms, *times)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _to_float32(graph: ir.Graph) -> None:
    """Half and double precision run in float32: onnxruntime's CPU kernels are whole only there."""
    other = FLOATS - {ir.DataType.FLOAT}
    for owner in (graph, *graph.subgraphs()):
        for value in owner.initializers.values():
            if value.dtype in other and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                value.dtype = ir.DataType.FLOAT
        for value in [*owner.inputs, *(o for n in owner for o in n.outputs)]:
            if value.dtype in other:
                value.dtype = ir.DataType.FLOAT
        for node in owner:
            if op(node) == "Cast" and ir.DataType(node.attributes["to"].as_int()) in other:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def _chunks(graph: ir.Graph, data: Data) -> tuple[int, int]:
    """Examples per run, and runs: data longer than a fixed batch axis is run in parts."""
    chunks = 1
    for value in graph.inputs:
        shape, array = dims(value), data.inputs[str(value.name)]
        if shape is None or not shape:
            continue
        for axis, (want, have) in enumerate(zip(shape, array.shape, strict=True)):
            if have == want:
                continue
            if axis > 1 or want == 0 or have % want:
                raise DataError(f"{data.origin}: input {value.name!r} must have shape {shape}, got {array.shape}")
            if chunks not in (1, have // want):
                raise DataError(f"{data.origin}: inputs hold different numbers of examples (input {value.name!r})")
            chunks = have // want
    return batch_size(graph), chunks


def _learn_shapes(model: ir.Model, graph: ir.Graph, feeds: Arrays, threads: int) -> None:
    """Run the forward pass once where the graph does not tell the shape of an output."""
    unknown = [o for o in graph.outputs if is_float(o) and dims(o) is None]
    if unknown:
        session = session_of(model, graph.clone(), threads)
        feed = {i.name: part(feeds[i.name], 0, i.shape) for i in session.get_inputs()}
        for output, array in zip(unknown, session.run([o.name for o in unknown], feed), strict=True):
            output.shape = ir.Shape(array.shape)


def _kept(nodes: Sequence[ir.Node], forward: int) -> int:
    """Bytes of what the backward pass reads of the forward one, whose nodes are the first `forward`: of values that
    don't get mappings of their own."""
    made = {o for n in nodes[:forward] for o in n.outputs}
    found: set[ir.Value] = set()
    for value in {v for n in nodes[forward:] for v in n.inputs if v in made and v is not None}:
        while (node := value.producer()) is not None and op(node) in REORDERS - {"Transpose"} and node.inputs[0]:
            value = node.inputs[0]  # the same memory
        found.add(value)
    sizes = [math.prod(shape) * 4 for v in found if (shape := dims(v)) is not None and v in made]
    return sum(n for n in sizes if n < memory.LARGE)


def _reduce_early(graph: ir.Graph, passes: int) -> None:
    """Move every node behind the first `passes` to where its inputs are there: what it reads is free the sooner."""
    nodes = list(graph)
    place = {node: k for k, node in enumerate(nodes[:passes])}
    for node in nodes[passes:]:
        made = (v.producer() for v in node.inputs if v is not None)
        place[node] = max((place[n] for n in made if n is not None), default=0)
    graph.remove(nodes)
    graph.extend(sorted(nodes, key=place.__getitem__))


def _to_count(
    request: Request,
    values: Mapping[str, ir.Value],
    nodes: Mapping[str | None, ir.Node],
    grads: Mapping[ir.Value, ir.Value],
) -> dict[tuple[str, str], Wanted]:
    """What histograms are made of, by kind and name: whatever of it has a known shape; nothing where none are asked
    for."""
    found: dict[tuple[str, str], Wanted] = {}
    if request.pictured is None:
        return found

    def add(kind: str, name: str, value: ir.Value | None, shape: tuple[int, ...] | None, view: View = "plain") -> None:
        # A value that nothing computes is an input of the graph, or a weight: no picture of an activation.
        if value is not None and value.producer() is not None and shape is not None and math.prod(shape) > 1:
            found[kind, name] = Wanted(str(value.name), shape, view)

    for name in request.activations:
        node = nodes.get(name)
        if node is not None and op(node) in ELEMENTWISE and is_float(node.inputs[0]):
            add("input", name, node.inputs[0], dims(node.inputs[0]))
    for name in request.pictured:
        add("gradient", name, grads.get(values[name]), dims(values[name]), "log")
    for name, logits in request.attentions.items():
        if name in values and logits in values:
            add("logits", name, values[logits], dims(values[logits]), "centered")
            add("entropy", name, values[name], dims(values[name]), "entropy")
    return found


def _histograms(
    model: ir.Model, graph: ir.Graph, wanted: Mapping[tuple[str, str], Wanted], feeds: Arrays, threads: int
) -> dict[tuple[str, str], Histogram]:
    """Counted in a run of its own, which the figures of the report don't wait for; none where it can't be run."""
    try:
        found = measure(model, graph, list(wanted.values()), feeds, threads)
    except runtime_errors():
        return {}
    return {key: histogram for key, histogram in zip(wanted, found, strict=True) if histogram is not None}


def activation_figures(found: Probe, node: str) -> Mapping[str, float]:
    """Slope, saturated, dead and flat share of an activation node, by its name."""
    return found.values.get(node + ACTIVATION, {})


def _input_figures(inputs: Arrays) -> dict[str, float]:
    """Mean, standard deviation and extremes over all elements of the float inputs that vary."""
    floats = [a.reshape(-1).astype(np.float64) for a in inputs.values() if a.dtype.kind == "f" and np.ptp(a) > 0]
    if not floats:
        return {}
    x = np.concatenate(floats)
    found = {"mean": x.mean(), "std": x.std(), "low": x.min(), "high": x.max()}
    return {f"data_{name}": float(figure) for name, figure in found.items()}


def _initial_loss(sums: Mapping[tuple[str, str], np.ndarray], seeds: Mapping[ir.Value, ir.Value]) -> dict[str, float]:
    """The cross-entropy of the first output that has a target, and its number of classes."""
    shape = dims(next(iter(seeds))) if ("loss", "0") in sums else None
    return {"initial_loss": float(sums["loss", "0"]), "classes": float(shape[-1])} if shape else {}


# -- words -------------------------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    """onnxruntime's message without its prefixes, in one line."""
    text = str(error).strip().splitlines()[0]
    return text.split(" : ", 3)[-1][:200]


def _remedy(error: Exception) -> str:
    kernel = "NOT_IMPLEMENTED" in str(error) or "not a registered function" in str(error)
    return "the estimate stands; export with standard ONNX operators to measure" if kernel else ""


def _input_hint(graph: ir.Graph, data: Data) -> str:
    """What to pass for the inputs that had to be made up."""
    own = [v for v in graph.inputs if not str(v.name).startswith("gradlint.")]
    scalars = [str(v.name) for v in own if not is_float(v) and math.prod(dims(v) or ()) == 1]
    given = [f"--input {n}=..." for n in scalars]
    return (
        "give real inputs with --data FILE.npz"
        + (f", or {' '.join(given)}" if given else "")
        + ", or sizes with --input-shape"
    )
