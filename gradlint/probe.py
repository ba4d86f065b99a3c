"""The probe: run the backward model on a batch and measure the exact gradients.

Only reductions leave the session. Gradients that are too small (or too large) for their squares to be float32 numbers
are measured again with the cotangent scaled by a power of two: the backward pass is linear in it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from gradlint.alignment import alignment, gram_of_inputs
from gradlint.backward import Backward
from gradlint.data import Arrays, Data, labels, linear_targets
from gradlint.exceptions import DataError
from gradlint.graph import FLOATS, dims, is_float, op
from gradlint.ops.activation import FLAT, LOST
from gradlint.ops.batch_normalization import to_train_mode
from gradlint.options import Loss
from gradlint.reverse import Cut, backward
from gradlint.transfer import ELEMENTWISE, VJP, derivative

SCALE = "gradlint.scale"
_SCALES = (0, 60, 100, -60)  # powers of two the cotangent is tried with
_SAFE = (1e-24, 1e30)  # sums of squares that float32 holds with full precision
_SAMPLE = 1 << 16  # elements that shares of an activation or a weight are counted on
_SMALL = 1 << 12  # elements of a gradient that three reductions would cost more than it does


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
    inputs (`gradlint.alignment`); whole: data_mean, data_std, data_low, data_high over the float inputs; classes
    and initial_loss under cross-entropy.
    """

    values: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Mapping[str, float]]
    steps: Mapping[str, np.ndarray]
    cotangent: float
    examples: int
    cuts: tuple[Cut, ...]
    measured: frozenset[str]
    alignment: float | None = None
    whole: Mapping[str, float] = field(default_factory=dict)
    build_s: float = 0.0
    run_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """What to measure: values by name, weights by initializer name, activation nodes by name.

    units: the axis of units by activation name; features: the value the last layer reads; attentions: the softmax's
    output by name, and its logits before masks.
    """

    values: Sequence[str]
    weights: Sequence[str]
    activations: Sequence[str]
    units: Mapping[str, int] = field(default_factory=dict)
    features: str | None = None
    attentions: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Taps:
    """Reductions asked of the session: each becomes one output, named by what it measures."""

    b: Backward
    outputs: dict[tuple[str, str], ir.Value] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)  # per unit of an activation, by its name

    def add(self, kind: str, name: str, value: ir.Value) -> None:
        self.outputs[kind, name] = value


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
    timeout: float | None = None,
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
    except _runtime_errors() as error:
        return Skipped(f"the model rejects the data: {_first_line(error)}", _input_hint(graph, data), rejected=True)
    scale = ir.Value(name=SCALE, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(scale)
    emitter = Backward(mode, set(), prefix="loss")
    seeds, feeds, losses = _seeds(emitter, graph, data, loss, seed, scale, batch, chunks)
    emitter.emit(graph)
    wanted = [values[n] for n in (*request.weights, *request.values) if n in values and is_float(values[n])]
    b, grads, cuts = backward(graph, seeds, wanted, mode=mode)
    taps = _Taps(b)
    for name in request.values:
        if name in values:
            _tap_value(taps, name, values[name], grads.get(values[name]), batch)
    for name in request.weights:
        if (g := grads.get(values[name])) is not None:
            _tap_weight(taps, name, values[name], g, whole=chunks > 1)
    for name in request.activations:
        node = next((n for n in graph if n.name == name), None)
        if node is not None and op(node) in ELEMENTWISE and is_float(node.inputs[0]):
            _tap_activation(taps, name, node, request.units.get(name, 1))
    for (node, kind), value in b.byproducts.items():
        if kind == "hidden":
            axes = list(range(1, len(value.shape) if value.shape is not None else 4))  # (T, D, B, H)
            taps.add("steps", str(node.name), b.op("ReduceSumSquare", value, b.constant(axes), keepdims=0))
    for name, logits in request.attentions.items():
        if name in values and logits in values:
            _tap_attention(taps, name, values[name], values[logits])
    if request.features in values and chunks == 1:
        _tap_gram(taps, values[request.features], batch)
    for k, value in enumerate(losses):
        taps.add("loss", str(k), value)
    for k, cotangent in enumerate(dict.fromkeys(seeds.values())):
        taps.add("seed", str(k), b.op("ReduceSumSquare", cotangent, keepdims=0))
    b.emit(graph)
    graph.outputs.clear()
    _name_outputs(graph, taps)
    try:
        session = _session(model, graph, threads)
    except _runtime_errors() as error:
        return Skipped(f"onnxruntime can't load the model: {_first_line(error)}", _remedy(error))
    built = time.perf_counter()
    try:
        sums = _run(session, taps, feeds, chunks)
    except _runtime_errors() as error:
        return Skipped(f"the model rejects the data: {_first_line(error)}", _input_hint(graph, data), rejected=True)
    ran = time.perf_counter()
    examples = batch * chunks
    found = _statistics(taps, sums, values, examples if loss != "linear" else 1, batch, chunks)
    measured = frozenset(str(n.name) for n in b.reached)
    likeness = None
    if ("gram", "features") in sums:
        likeness = alignment(gram_of_inputs(data.inputs.values(), batch), sums["gram", "features"])
    whole = _input_figures(data.inputs) | _initial_loss(sums, seeds)
    return Probe(*found, examples, cuts, measured, likeness, whole, built - started, ran - built)


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
    batch, chunks = 1, 1
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
    first = next((dims(v) for v in graph.inputs if dims(v)), (1,))
    for value in graph.inputs:
        shape = dims(value)
        if shape and is_float(value):
            first = shape
            break
    batch = first[0] if first else 1
    if len(first or ()) == 3 and any(
        op(u.node) in ("LSTM", "GRU", "RNN") and u.idx == 0 for v in graph.inputs for u in v.uses()
    ):
        batch = first[1] if first else 1  # (T, B, I)
    return max(1, batch), chunks


def _seeds(
    b: Backward, graph: ir.Graph, data: Data, loss: Loss, seed: int, scale: ir.Value, batch: int, chunks: int
) -> tuple[dict[ir.Value, ir.Value], Arrays, list[ir.Value]]:
    """The cotangent of each output under the loss, built in the graph; the arrays to feed (all chunks); and the
    cross-entropy itself, per output that has a target."""
    outputs = [o for o in dict.fromkeys(graph.outputs) if is_float(o)]
    seeds: dict[ir.Value, ir.Value] = {}
    feeds: Arrays = dict(data.inputs)
    if loss == "linear":
        shapes = {str(o.name): _whole(dims(o), chunks) for o in outputs}
        for output, (name, target) in zip(outputs, linear_targets(shapes, data, seed).items(), strict=True):
            feeds[f"gradlint.target.{name}"] = target / np.float32(math.sqrt(batch * chunks))
            seeds[output] = b.op("Mul", _target(graph, name, dims(output) or (), ir.DataType.FLOAT), scale)
        return seeds, feeds, []
    pairs = [
        (o, t)
        for k, o in enumerate(outputs)
        if (t := data.targets.get(str(o.name), data.targets.get("") if k == 0 else None)) is not None
    ]
    if not pairs:
        raise DataError(f"the loss {loss} needs a target: put an array 'target' into --data (or 'target.OUTPUT')")
    losses = []
    for output, given in pairs:
        logits = _logits(output, loss)
        shape = dims(logits) or ()
        whole = _whole(shape, chunks)
        kind = ir.DataType.INT64 if loss == "cross-entropy" else ir.DataType.FLOAT
        feeds[f"gradlint.target.{output.name}"] = labels(given, whole, data.origin, loss=loss)
        wanted = _target(graph, str(output.name), shape[:-1] if loss == "cross-entropy" else shape, kind)
        seeds[logits] = b.op("Mul", _loss_gradient(b, loss, logits, wanted, whole), scale)
        if loss == "cross-entropy":
            losses.append(_cross_entropy(b, logits, wanted, whole))
    return seeds, feeds, losses


def _learn_shapes(model: ir.Model, graph: ir.Graph, feeds: Arrays, threads: int) -> None:
    """Run the forward pass once where the graph does not tell the shape of an output."""
    unknown = [o for o in graph.outputs if is_float(o) and dims(o) is None]
    if unknown:
        session = _session(model, graph.clone(), threads)
        feed = {i.name: _part(feeds[i.name], 0, i.shape) for i in session.get_inputs()}
        for output, array in zip(unknown, session.run([o.name for o in unknown], feed), strict=True):
            output.shape = ir.Shape(array.shape)


def _whole(shape: tuple[int, ...] | None, chunks: int) -> tuple[int, ...]:
    assert shape is not None
    return (shape[0] * chunks, *shape[1:]) if shape else shape


def _target(graph: ir.Graph, name: str, shape: tuple[int, ...], kind: ir.DataType) -> ir.Value:
    value = ir.Value(name=f"gradlint.target.{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))
    graph.inputs.append(value)
    return value


def _logits(output: ir.Value, loss: Loss) -> ir.Value:
    """What the loss acts on: the model is cut before a final Softmax or Sigmoid (never the log of a softmax)."""
    node = output.producer()
    heads = {"cross-entropy": ("Softmax", "LogSoftmax"), "bce": ("Sigmoid",)}.get(loss, ())
    return node.inputs[0] if node is not None and op(node) in heads and node.inputs[0] is not None else output


def _loss_gradient(b: Backward, loss: Loss, y: ir.Value, target: ir.Value, whole: tuple[int, ...]) -> ir.Value:
    """dL/dy: softmax(y) - onehot, sigmoid(y) - t (means over examples), 2 (y - t) (mean over elements)."""
    if loss == "cross-entropy":
        hot = _onehot(b, target, whole)
        return b.op(
            "Div", b.op("Sub", b.op("Softmax", y, axis=-1), hot), b.scalar(float(max(1, math.prod(whole[:-1]))), y)
        )
    count = float(max(1, math.prod(whole)))
    if loss == "bce":
        return b.op("Div", b.op("Sub", b.op("Sigmoid", y), target), b.scalar(count, y))
    return b.op("Mul", b.op("Sub", y, target), b.scalar(2.0 / count, y))


def _onehot(b: Backward, target: ir.Value, whole: tuple[int, ...]) -> ir.Value:
    depth, ends = b.constant([whole[-1]]), b.constant([0.0, 1.0], np.float32)
    return b.op("OneHot", target, depth, ends, dtype=ir.DataType.FLOAT, axis=-1)


def _cross_entropy(b: Backward, y: ir.Value, target: ir.Value, whole: tuple[int, ...]) -> ir.Value:
    """-log softmax(y)[target], the part of this run in the mean over all examples."""
    chosen = b.op("Mul", b.op("LogSoftmax", y, axis=-1), _onehot(b, target, whole))
    return b.op(
        "Div", b.op("Neg", b.op("ReduceSum", chosen, keepdims=0)), b.scalar(float(max(1, math.prod(whole[:-1]))), y)
    )


# -- taps --------------------------------------------------------------------------------------------------------------


def _tap_value(taps: _Taps, name: str, value: ir.Value, g: ir.Value | None, batch: int) -> None:
    b = taps.b
    if g is not None:
        taps.add("grad", name, b.op("ReduceSumSquare", g, keepdims=0))
    shape = dims(value)
    if not is_float(value) or shape is None or value.is_graph_input():
        return
    taps.add("square", name, b.op("ReduceSumSquare", value, keepdims=0))
    axis = batch_axis(shape, batch)
    if axis is None or batch == 1:
        taps.add("mean", name, b.op("ReduceMean", value, keepdims=0))
        return
    if axis == 0:  # a row of ones times a matrix takes a tenth of ReduceMean's time
        rows = b.op("Reshape", value, b.constant([batch, -1]))
        average = b.op("MatMul", b.constant(np.full(batch, 1 / batch), np.float32), rows)
    else:
        average = b.op("ReduceMean", value, b.constant([axis]), keepdims=0)
    if math.prod(shape) <= batch * _SMALL:
        taps.add("average", name, average)
        return
    taps.add("mean", name, b.op("ReduceMean", average, keepdims=0))
    taps.add("common", name, b.op("ReduceSumSquare", average, keepdims=0))


def _tap_attention(taps: _Taps, name: str, weights: ir.Value, logits: ir.Value) -> None:
    """Per query the largest weight, and the mean and mean square of the logits over keys; averaged over queries."""
    b, last = taps.b, taps.b.constant([-1])
    taps.add("peak", name, b.op("ReduceMean", b.op("ReduceMax", weights, last, keepdims=0), keepdims=0))
    center = b.op("ReduceMean", logits, last, keepdims=0)
    taps.add("center", name, b.op("ReduceMean", b.op("Mul", center, center), keepdims=0))
    taps.add("logits", name, b.op("ReduceMean", b.op("Mul", logits, logits), keepdims=0))


def _tap_gram(taps: _Taps, value: ir.Value, batch: int) -> None:
    """Inner products of the examples' values, (B, B)."""
    b, shape = taps.b, dims(value)
    axis = None if shape is None else batch_axis(shape, batch)
    if axis is None or shape is None:
        return
    if axis == 1:
        value = b.op("Transpose", value, perm=[1, 0, *range(2, len(shape))])
    rows = b.op("Reshape", value, b.constant([batch, -1]))
    taps.add("gram", "features", b.op("Gemm", rows, rows, transB=1))


def batch_axis(shape: tuple[int, ...], batch: int) -> int | None:
    """The axis examples lie along: the one of the batch's size, else axis 0 where the batch is folded into it."""
    for axis in (0, 1):
        if axis < len(shape) and shape[axis] == batch:
            return axis
    return 0 if shape and batch > 0 and shape[0] % batch == 0 else None


def _tap_weight(taps: _Taps, name: str, weight: ir.Value, g: ir.Value, *, whole: bool) -> None:
    """Squares and absolute values of all elements, the share of zeros on a sample; a small gradient leaves as it is."""
    b = taps.b
    if whole or math.prod(dims(weight) or ()) <= _SMALL:
        taps.add("whole", name, g)
        return
    rows = b.constant(list(range(1, len(weight.shape or ()))))  # a sum per row: 1e8 squares in one float32 lose digits
    taps.add("wgrad", name, b.op("ReduceSumSquare", g, rows, keepdims=0, noop_with_empty_axes=0))
    taps.add("wabs", name, b.op("ReduceL1", g, rows, keepdims=0, noop_with_empty_axes=0))
    size = math.prod(dims(weight) or ())
    if size > _SAMPLE:
        g = b.op(
            "Slice", b.op("Reshape", g, b.constant([-1])), *(b.constant([k]) for k in (0, size, 0, -(-size // _SAMPLE)))
        )
    zero = b.op("Equal", g, b.scalar(0.0, g), dtype=ir.DataType.BOOL)
    taps.add("wzero", name, b.op("ReduceMean", b.op("Cast", zero, dtype=ir.DataType.FLOAT, to=1), keepdims=0))


def _tap_activation(taps: _Taps, name: str, node: ir.Node, unit_axis: int) -> None:
    """Per unit: mean squared slope, and the shares of saturated and of flat slopes, on a sample of the positions."""
    b, z = taps.b, node.inputs[0]
    shape = dims(z)
    if z is None or not shape:
        return
    axis = unit_axis % len(shape)
    sample = _some_positions(b, z, shape, axis)
    attributes = {k: a.value for k, a in node.attributes.items()}
    sampled = b.op(node.op_type, sample, *node.inputs[1:], domain=node.domain, **attributes).producer()
    assert sampled is not None
    b.needs.add(sample)
    slopes = VJP[op(node)](b, sampled, [b.scalar(1.0, z)])[0]
    if slopes is None:
        return
    seen = dims(sample) or shape
    taps.samples[name] = math.prod(n for a, n in enumerate(seen) if a != axis)
    axes = b.constant([a for a in range(len(shape)) if a != axis])
    taps.add("slope", name, b.op("ReduceMean", b.op("Mul", slopes, slopes), axes, keepdims=0))
    steepest = derivative(op(node), node)[2]
    for kind, threshold in (("saturated", FLAT * (steepest or 0.0)), ("flat", LOST)):
        low = b.op("Less", b.op("Abs", slopes), b.scalar(threshold, z), dtype=ir.DataType.BOOL)
        taps.add(kind, name, b.op("ReduceMean", b.op("Cast", low, dtype=ir.DataType.FLOAT, to=1), axes, keepdims=0))


def _some_positions(b: Backward, z: ir.Value, shape: tuple[int, ...], axis: int) -> ir.Value:
    """z at evenly spaced positions, all examples and units, so that about _SAMPLE elements remain."""
    excess = math.prod(shape) / _SAMPLE
    steps = [1] * len(shape)
    for a in reversed(range(1, len(shape))):
        if a != axis and excess > 1:
            steps[a] = min(shape[a], math.ceil(excess ** (1.0 / max(1, sum(k not in (0, axis) for k in range(a + 1))))))
            excess /= steps[a]
    cut = [a for a, step in enumerate(steps) if step > 1]
    if not cut:
        return z
    starts, ends = b.constant([0] * len(cut)), b.constant([shape[a] for a in cut])
    sample = b.op("Slice", z, starts, ends, b.constant(cut), b.constant([steps[a] for a in cut]))
    sample.shape = ir.Shape([-(-n // step) for n, step in zip(shape, steps, strict=True)])
    return sample


def _name_outputs(graph: ir.Graph, taps: _Taps) -> None:
    """Every tap becomes an output `tap.K` in the order of `taps.outputs`."""
    taken: set[ir.Value] = set(graph.inputs)
    for k, value in enumerate(taps.outputs.values()):
        if value in taken or value.producer() is None:
            node = ir.node("Identity", [value], name=f"tap/{k}")
            node.outputs[0].type = value.type
            graph.append(node)
            value = node.outputs[0]
        taken.add(value)
        value.name = f"tap.{k}"
        graph.outputs.append(value)


# -- the run -----------------------------------------------------------------------------------------------------------


def _onnxruntime() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def _runtime_errors() -> tuple[type[Exception], ...]:
    errors = _onnxruntime().capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "NotImplemented",
        "RuntimeException",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "EPFail",
    )
    return tuple(getattr(errors, n) for n in names if hasattr(errors, n))


def _session(model: ir.Model, graph: ir.Graph, threads: int) -> Any:
    """A session for `graph`; its weights are handed over where they lie, not copied."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    read = {v for n in graph.all_nodes() for v in n.inputs} | set(graph.outputs)
    for name in [n for n, v in graph.initializers.items() if v not in read]:
        del graph.initializers[name]  # onnxruntime refuses a weight handed over for nothing
    arrays: dict[str, np.ndarray] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > 4096:
            arrays[str(value.name)] = np.ascontiguousarray(tensor.numpy())
        elif isinstance(tensor, ir.ExternalTensor):  # small: onnxruntime wants it in the model
            value.const_value = ir.Tensor(np.array(tensor.numpy()), name=value.name)
    proto = _proto(model, graph, arrays)
    held = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays.values()]
    if held:
        options.add_external_initializers(list(arrays), held)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _proto(model: ir.Model, graph: ir.Graph, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with large weights declared external: they come by reference."""
    for name, array in arrays.items():
        value = graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.ExternalTensor(
            "weights", 0, array.nbytes, value.const_value.dtype, shape=ir.Shape(array.shape), name=name
        )
    return ir.to_proto(ir.Model(graph, ir_version=max(10, model.ir_version or 10)))


def _run(session: Any, taps: _Taps, feeds: Arrays, chunks: int) -> dict[tuple[str, str], np.ndarray]:
    """Every tap in float64; squares that left float32's safe range come from a run with scaled cotangent."""
    best: dict[tuple[str, str], np.ndarray] = {}
    doubtful: set[tuple[str, str]] = set()
    for power in _SCALES:
        got = _finished(dict(zip(taps.outputs, _run_once(session, feeds, chunks, power), strict=True)))
        if power == 0:
            best = dict(got)
            doubtful = {key for key in got if key[0] in _DEGREE}
        for key in [k for k in got if k in doubtful and _held(got[k])]:
            best[key] = got[key] * 2.0 ** (-power * _DEGREE[key[0]])
            doubtful.discard(key)
        if not any(_out_of_range(got[k]) for k in doubtful):
            break
    return best


def _finished(got: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Reductions that are completed here: rows of a weight are summed, small averages over examples reduced."""
    for (kind, name), array in list(got.items()):
        if kind in ("wgrad", "wabs"):
            got[kind, name] = array.sum()
        elif kind == "average":
            got["mean", name], got["common", name] = array.mean(), np.square(array).sum()
            del got[kind, name]
    return got


# How a tap grows with the cotangent: squares by its square.
_DEGREE = {"grad": 2, "wgrad": 2, "wabs": 1, "steps": 2, "seed": 2, "whole": 1}


def _held(array: np.ndarray) -> bool:
    """Is every number one that float32 squares hold?"""
    return bool(
        np.isfinite(array).all() and array.size and np.abs(array).min() >= _SAFE[0] and np.abs(array).max() <= _SAFE[1]
    )


def _out_of_range(array: np.ndarray) -> bool:
    """Is there a sign of underflow or overflow? (Exact zeros alone are no sign: many gradients are zero.)"""
    size = np.abs(array)
    return bool((~np.isfinite(array)).any() or ((size > 0) & (size < _SAFE[0])).any() or (size > _SAFE[1]).any())


def _run_once(session: Any, feeds: Arrays, chunks: int, power: int) -> list[np.ndarray]:
    """All outputs, summed over chunks, in float64."""
    total: list[np.ndarray] = []
    shapes = {i.name: i.shape for i in session.get_inputs()}
    for k in range(chunks):
        feed = {n: _part(a, k, shapes[n]) for n, a in feeds.items() if n in shapes}
        if SCALE in shapes:
            feed[SCALE] = np.asarray(2.0**power, np.float32)
        results = [np.asarray(r, np.float64) for r in session.run(None, feed)]
        total = [a + r for a, r in zip(total, results, strict=True)] if total else results
    return total


def _part(array: np.ndarray, k: int, shape: Sequence[int | str]) -> np.ndarray:
    for axis, want in enumerate(shape):
        if isinstance(want, int) and array.shape[axis] != want:
            return np.take(array, range(k * want, (k + 1) * want), axis=axis)
    return array


# -- figures -----------------------------------------------------------------------------------------------------------

Table = dict[str, dict[str, float]]


def _statistics(
    taps: _Taps,
    sums: Mapping[tuple[str, str], np.ndarray],
    values: Mapping[str, ir.Value],
    factor: int,
    batch: int,
    chunks: int,
) -> tuple[Table, Table, dict[str, np.ndarray], float]:
    """The report's figures. factor: squared norm of a per-example gradient over that of the batch loss's."""
    rows: Table = {}
    weights: Table = {}
    steps: dict[str, np.ndarray] = {}
    cotangent = 0.0
    for (kind, name), total in sums.items():
        if kind == "seed":
            cotangent += factor * float(total)
        elif kind == "steps":
            steps[name] = np.sqrt(factor * total)
        elif kind == "grad":
            shape = dims(values[name]) or ()
            each = math.prod(shape) / (batch if batch_axis(shape, batch) is not None else 1)
            norm = math.sqrt(factor * float(total)) if math.isfinite(float(total)) else math.inf
            rows.setdefault(name, {}).update(grad_norm=norm, grad_rms=norm / math.sqrt(max(1.0, each)))
        elif kind == "square":
            rows.setdefault(name, {}).update(_spread(name, sums, math.prod(dims(values[name]) or ()), batch, chunks))
        elif kind == "peak":
            between = float(sums["logits", name] - sums["center", name]) / chunks
            spread = math.sqrt(max(0.0, between)) if math.isfinite(between) else math.inf
            rows.setdefault(name, {}).update(max_probability=float(total) / chunks, logit_std=spread)
        elif kind == "slope":
            rows.setdefault(name + _ACTIVATION, {}).update(_slopes(name, sums, taps, chunks))
        elif kind in ("wgrad", "whole"):
            weights[name] = _weight(kind, name, sums, math.prod(dims(values[name]) or ()))
    return rows, weights, steps, math.sqrt(cotangent)


_ACTIVATION = "\0activation"  # activation figures are kept under the node's name, apart from values


def activation_figures(found: Probe, node: str) -> Mapping[str, float]:
    """Slope, saturated, dead and flat share of an activation node, by its name."""
    return found.values.get(node + _ACTIVATION, {})


def _spread(
    name: str, sums: Mapping[tuple[str, str], np.ndarray], size: int, batch: int, chunks: int
) -> dict[str, float]:
    """Mean, standard deviation and signal; the variance over examples is freed of the bias of a finite batch."""
    square = float(sums["square", name]) / max(1, size * chunks)
    mean = float(sums["mean", name]) / chunks
    found = {
        "output_mean": mean,
        "output_std": math.sqrt(max(0.0, square - mean**2)) if math.isfinite(square) else math.inf,
    }
    common = sums.get(("common", name))
    if common is not None and chunks == 1 and math.isfinite(square):
        between = (square - float(common) * batch / max(1, size)) * batch / (batch - 1)
        found["signal"] = math.sqrt(max(0.0, between) / square) if square > 0 else 0.0
    return found


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


def _slopes(name: str, sums: Mapping[tuple[str, str], np.ndarray], taps: _Taps, chunks: int) -> dict[str, float]:
    slope = sums["slope", name] / chunks
    flat = float((sums["flat", name] / chunks).mean())
    return {
        "slope": math.sqrt(float(slope.mean())),
        "saturated": float((sums["saturated", name] / chunks).mean()),
        "flat": flat,
        "fully_saturated": flat,
        "dead": float((slope == 0).mean()),
        "samples_per_unit": taps.samples[name] * chunks,
    }


def _weight(kind: str, name: str, sums: Mapping[tuple[str, str], np.ndarray], size: int) -> dict[str, float]:
    if kind == "whole":
        g = sums["whole", name]
        return {
            "grad_rms": float(np.sqrt(np.mean(np.square(g)))),
            "grad_mean_abs": float(np.mean(np.abs(g))),
            "zero_share": float(np.mean(g == 0)),
        }
    square = float(sums["wgrad", name])
    return {
        "grad_rms": math.sqrt(square / max(1, size)) if math.isfinite(square) else math.inf,
        "grad_mean_abs": float(sums["wabs", name]) / max(1, size),
        "zero_share": float(sums["wzero", name]),
    }


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
