"""Recurrences and what they do to the gradient over time: operators, and chains that an exporter has unrolled.

Proved: |dL/dh_1| <= (max |f'| sigma_max(R))^(T-1) |dL/dh_T| for a loss on the last step (Pascanu et al. 2013).
Estimated and measured: from the gradient's norm at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.fact_table import Fact, Subject
from gradlint.graph import attribute, constant_array, dims, is_float, leads_to, module, op, source
from gradlint.iteration_facts import iteration_facts, spectral_radius
from gradlint.ops.linear import operator_norm
from gradlint.patterns import compositions, normalisations
from gradlint.results import Evidence
from gradlint.structure import next_activation
from gradlint.subgraphs import captured

CELLS = ("RNN", "LSTM", "GRU")
_SLOPES = {"Tanh": 1.0, "Relu": 1.0, "Sigmoid": 0.25, "HardSigmoid": 0.2, "Softsign": 1.0, "Softplus": 1.0}
_UNKNOWN_LENGTH = 100  # steps assumed where the model doesn't say
_LEAST_UNROLLED = 4

Array = Callable[[ir.Value | None], np.ndarray | None]
Profiles = Mapping[Evidence, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Unrolled:
    """The same matrix applied again and again to the state made of its own result: the nodes that apply it, first step
    first. It is square, or three or four gates side by side."""

    nodes: tuple[ir.Node, ...]
    index: int


def recurrent_subjects(
    parts: Anatomy,
    array: Array,
    profiles: Profiles,
    norms: Mapping[Evidence, Mapping[str, float]],
    assumed: frozenset[str] = frozenset(),
) -> list[Subject]:
    """One subject per recurrent operator, recurrence in a Loop or Scan, and unrolled chain, in graph order.

    array: constants by value. profiles: |dL/dh_t| over steps (the first step first) by operator name; norms: gradient
    norms by value name, for unrolled chains. assumed: graph inputs whose length was not given (see `unknown_lengths`).
    """
    order = {n: k for k, n in enumerate(parts.graph)}
    subjects = []

    def curves_of(node: ir.Node) -> dict[Evidence, np.ndarray]:
        return {kind: found[str(node.name)] for kind, found in profiles.items() if str(node.name) in found}

    for node in parts.graph:
        if op(node) in CELLS:
            facts = _operator_facts(node, array, _depends([node.inputs[0]], assumed))
            subjects.append(_subject(node, order[node], facts, curves_of(node), _reads_last_only(node)))
        elif op(node) in ("Loop", "Scan") and (found := iteration_facts(node, parts.weighted, array)) is not None:
            if _depends([*node.inputs, *captured(node)], assumed):
                found |= {"steps": _UNKNOWN_LENGTH, "steps_assumed": True}
            subjects.append(_subject(node, order[node], found, curves_of(node), False))
    for chain in unrolled(parts):
        facts = _unrolled_facts(chain, parts, array)
        curves = {}
        for kind, known in norms.items():
            names = [str(n.outputs[0].name) for n in chain.nodes]
            if all(name in known for name in names):
                curves[kind] = np.array([known[name] for name in names])
        subjects.append(_subject(chain.nodes[0], order[chain.nodes[-1]], facts, curves, True))
    return sorted(subjects, key=lambda s: s.order)


def _subject(
    node: ir.Node, order: int, facts: dict[str, Fact], curves: Mapping[Evidence, np.ndarray], last_only: bool
) -> Subject:
    facts = {"op_type": op(node), "module": module(node), **facts}
    evidence: dict[str, Evidence] = {}
    decades: dict[Evidence, float | None] = {"proved": _proved_decades(facts) if last_only else None}
    steps = facts.get("steps")
    for kind, curve in curves.items():
        decades[kind] = time_decades(curve, int(steps) if facts["steps_assumed"] and isinstance(steps, int) else None)
    for kind, figure in decades.items():
        if figure is not None:
            facts[f"{kind}_time_decades"] = facts["time_decades"] = figure
            evidence["time_decades"] = kind
    return Subject("recurrent", str(node.name), None, order, facts, evidence, (), source(node))


def time_decades(curve: np.ndarray, steps: int | None = None) -> float | None:
    """log10 of the gradient's norm at the first step over that at the last, from its norm at each step.

    The last fifth of the steps is left out, and the rate of the others extended over it: what a head reads directly
    stands out over what has come through the recurrence, however well that carries it. `steps`: extend to so many.
    Zeros at the start (underflow) are extended from the rest. None: fewer than three steps, or no gradient at all.
    """
    curve = np.asarray(curve, np.float64)
    if curve.size < 3 or not np.any(curve > 0):
        return None
    if not np.isfinite(curve).all():
        return math.inf
    end = curve.size - 1 - max(1, curve.size // 5) if curve.size > 4 else curve.size - 1
    alive = np.flatnonzero(curve > 0)
    first = int(alive[0])
    if first >= end:
        return -math.inf
    end = int(alive[alive <= end][-1])
    if end == first:
        return -math.inf
    return float(np.log10(curve[first] / curve[end])) / (end - first) * ((steps or curve.size) - 1)


def unknown_lengths(graph: ir.Graph, given: frozenset[str] = frozenset()) -> frozenset[str]:
    """Inputs with an unknown size besides that of the batch: call before dimensions are bound. given: inputs and
    dimensions, by name, whose sizes the caller knows.

    The batch is the first axis; where the first is of known size, or holds the time steps of a recurrent operator, the
    second.
    """
    found = set()
    for value in graph.inputs:
        if value.name in given:
            continue
        shape = list(value.shape) if value.shape is not None else [None]
        unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        unknown = [a for a in unknown if getattr(shape[a], "value", None) not in given]
        batch = 1 if 0 not in unknown or _time_first(value) else 0
        if any(axis != batch for axis in unknown):
            found.add(str(value.name))
    return frozenset(found)


def _time_first(value: ir.Value) -> bool:
    """Does a recurrent operator read the value with time along its first axis?"""
    return any(op(u.node) in CELLS and u.idx == 0 and not attribute(u.node, "layout", 0) for u in value.uses())


def _depends(reads: Sequence[ir.Value | None], names: frozenset[str]) -> bool:
    """Does what a node reads come from one of the graph inputs in `names`?"""
    pending, seen = list(reads), set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input() and value.name in names:
            return True
        producer = value.producer()
        pending.extend(producer.inputs if producer is not None else ())
    return False


# -- operators ---------------------------------------------------------------------------------------------------------


def _operator_facts(node: ir.Node, array: Array, assumed: bool) -> dict[str, Fact]:
    kind, hidden = op(node), attribute(node, "hidden_size")
    shape = dims(node.inputs[0])
    steps = None if shape is None else shape[1 if attribute(node, "layout", 0) else 0]
    recurrent = array(node.inputs[2])
    bias = array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    facts: dict[str, Fact] = {
        "cell": kind,
        "steps": _UNKNOWN_LENGTH if assumed else steps,
        "steps_assumed": assumed,
        "hidden_size": hidden or (None if recurrent is None else recurrent.shape[-1]),
    }
    if recurrent is not None and np.isfinite(recurrent).all():
        facts["recurrent_norm"] = max(operator_norm(r) for r in recurrent)
        own = recurrent[:, -recurrent.shape[-1] :]  # of gated cells the block of the candidate state, which comes last
        radii = [r for r in map(spectral_radius, own) if r is not None]
        facts["recurrent_radius"] = max(radii, default=None)
    facts["max_slope"] = _cell_slope(node)
    size = int(facts["hidden_size"] or 0)
    if kind == "LSTM":
        facts |= _gate("forget", bias, 2, 4, size)
    if kind == "GRU":
        facts |= _gate("update", bias, 0, 3, size)
    return facts


def _gate(name: str, bias: np.ndarray | None, place: int, gates: int, size: int) -> dict[str, Fact]:
    """Mean of Wb + Rb of one gate, and what it keeps per step. Gate orders: LSTM i, o, f, c; GRU z, r, h."""
    if bias is None:
        mean = 0.0
    elif bias.shape[-1] == 2 * gates * size:
        both = bias.astype(np.float64).reshape(-1, 2, gates, size)[:, :, place]
        mean = float(both.sum(axis=1).mean())
    else:
        return {}
    return {f"{name}_bias": mean, f"{name}_gate": 1 / (1 + math.exp(-max(-700.0, min(700.0, mean))))}


def _cell_slope(node: ir.Node) -> float | None:
    """The largest slope of the activation of the state; absent where it has parameters of its own."""
    names = attribute(node, "activations")
    if not names:
        return 1.0  # Tanh
    step = {"RNN": 1, "GRU": 2, "LSTM": 3}[op(node)]
    own = list(names)[0::step] if step == 1 else list(names)[1::step]
    slopes = [_SLOPES.get(str(name).capitalize() if str(name).islower() else str(name)) for name in own]
    return None if None in slopes or attribute(node, "activation_alpha") else max(s for s in slopes if s is not None)


def _reads_last_only(node: ir.Node) -> bool:
    """Is nothing but the state after the last step read (Y_h, or the last element of Y)?"""
    if attribute(node, "direction", "forward") != "forward" or node.outputs[0].is_graph_output():
        return False
    pending = [(node.outputs[0], 1 if attribute(node, "layout", 0) else 0)]
    while pending:
        value, axis = pending.pop()
        if value.is_graph_output():
            return False
        length = (dims(value) or ())[axis] if dims(value) else None
        for use in value.uses():
            if (
                op(use.node) == "Gather"
                and use.idx == 0
                and attribute(use.node, "axis", 0) % len(dims(value) or (1,)) == axis
            ):
                index = constant_array(use.node.inputs[1])
                if index is None or not np.all((index == -1) | (index == (length or 0) - 1)):
                    return False
            elif op(use.node) in ("Squeeze", "Transpose"):
                moved = _axis_after(use.node, axis)
                if moved is None:
                    return False
                pending.append((use.node.outputs[0], moved))
            else:
                return False
    return True


def _axis_after(node: ir.Node, axis: int) -> int | None:
    """Where an axis of the input lies in the output of a Squeeze or Transpose."""
    if op(node) == "Transpose":
        perm = attribute(node, "perm")
        return None if perm is None else list(perm).index(axis)
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    rank = len(dims(node.inputs[0]) or ())
    if axes is None:
        return None
    gone = {int(a) % rank for a in np.atleast_1d(axes)}
    return None if axis in gone else axis - sum(a < axis for a in gone)


def _proved_decades(facts: Mapping[str, Fact]) -> float | None:
    """(T - 1) log10(max |f'| sigma_max(R)), where that is a decay at all."""
    if facts.get("cell") not in ("RNN", "unrolled"):
        return None
    norm, slope, steps = (facts.get(name) for name in ("recurrent_norm", "max_slope", "steps"))
    if not isinstance(norm, float) or not isinstance(slope, float) or not isinstance(steps, int):
        return None
    if norm * slope == 0:
        return -math.inf
    bound = (steps - 1) * math.log10(norm * slope)
    return bound if bound < 0 else None


# -- chains ------------------------------------------------------------------------------------------------------------


def unrolled(parts: Anatomy) -> list[Unrolled]:
    """Matrices of one, three or four square blocks that at least four MatMul or Gemm nodes of one chain apply, with no
    skip from step to step."""
    users: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for use in parts.uses:
        shape = dims(use.layer.inputs[use.index])
        if op(use.layer) in ("MatMul", "Gemm") and use.index == 1 and _blocks(shape):
            users.setdefault((use.value, use.index), []).append(use.layer)
    found = []
    for (_, index), nodes in users.items():
        if len(nodes) >= _LEAST_UNROLLED:
            chain = _series(parts.graph, nodes)
            if len(chain) >= _LEAST_UNROLLED:
                found.append(Unrolled(chain, index))
    return found


def _blocks(shape: tuple[int, ...] | None) -> int:
    """Square blocks that a recurrent matrix consists of: one, or one per gate of a GRU or LSTM cell; 0 for others."""
    if shape is None or len(shape) < 2 or not min(shape[-2:]):
        return 0
    blocks, rest = divmod(max(shape[-2:]), min(shape[-2:]))
    return blocks if rest == 0 and blocks in (1, 3, 4) else 0


def _series(graph: ir.Graph, nodes: list[ir.Node]) -> tuple[ir.Node, ...]:
    """The longest chain among `nodes`, each behind the one before; empty where a sum leads around one of them on the
    way to a later one (then weights are shared between layers, as in ALBERT: that is no recurrence)."""
    bit = {n: 1 << k for k, n in enumerate(nodes)}
    before: dict[ir.Value, int] = {}
    depth: dict[ir.Node, int] = {}
    sums: list[tuple[ir.Node, int, int]] = []
    for node in graph:
        reads = [before.get(v, 0) for v in node.inputs if v is not None and is_float(v)]
        whole = 0
        for r in reads:
            whole |= r
        if op(node) in ("Add", "Sum") and len([r for r in reads if r]) > 1:
            common = whole
            for r in reads:
                common &= r or whole
            sums.append((node, common, whole))
        if node in bit:
            depth[node] = 1 + max((depth[n] for n in nodes if n in depth and whole & bit[n]), default=0)
            whole |= bit[node]
        before.update(dict.fromkeys(node.outputs, whole))
    later = {n for n, common, whole in sums if common != whole}
    if later and any(leads_to(n, set(nodes)) for n in later):
        return ()
    chain = {d: n for n, d in reversed(depth.items())}
    return tuple(chain[d] for d in sorted(chain)) if len(chain) > 1 else ()


def _unrolled_facts(chain: Unrolled, parts: Anatomy, array: Array) -> dict[str, Fact]:
    node = chain.nodes[0]
    matrix = array(node.inputs[chain.index])
    name = next_activation(node.outputs[0], compositions(parts.graph), normalisations(parts.graph)).name
    facts: dict[str, Fact] = {
        "cell": "unrolled",
        "steps": len(chain.nodes),
        "steps_assumed": False,
        "max_slope": 1.0 if name == "Identity" else _SLOPES.get(name),
    }
    if matrix is not None:
        facts["hidden_size"] = min(matrix.shape)
    if matrix is not None and matrix.shape[0] == matrix.shape[1] and np.isfinite(matrix).all():
        facts |= {
            "recurrent_norm": operator_norm(matrix),
            "recurrent_radius": spectral_radius(matrix),
        }
    return facts
