"""What several operators compute together: activations and normalisations that exporters write out in primitives.

SiLU comes as Sigmoid and Mul, GELU as Div, Erf, Add and Mul, Mish as Softplus, Tanh and Mul, RMSNorm as Pow,
ReduceMean, Add, Sqrt, Reciprocal and Mul.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from gradlint.graph import MOVES, constant_array, is_float, op

NORMALISATIONS = frozenset(
    {
        "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
        "LpNormalization", "MeanVarianceNormalization", "LRN", "com.microsoft:SkipLayerNormalization",
        "com.microsoft:SkipSimplifiedLayerNormalization", "com.microsoft:SimplifiedLayerNormalization",
    }
)  # fmt: skip

_CORES = frozenset({"Sigmoid", "HardSigmoid", "Clip", "Erf", "Tanh"})
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Softplus", "Exp", "Log"})
_NAMES = {"Swish": "Silu", "BiasGelu": "Gelu", "FastGelu": "Gelu", "QuickGelu": "Gelu"}
_LONGEST = 12  # nodes between an activation's input and its core


@dataclass(frozen=True)
class Composition:
    """An activation made of several nodes: `output` = f(`source`), f called `name`."""

    name: str
    source: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def activation_name(node: ir.Node, composed: dict[ir.Node, Composition]) -> str:
    """The function an activation node computes, or has a part in."""
    return composed[node].name if node in composed else _NAMES.get(node.op_type, node.op_type)


def compositions(graph: ir.Graph) -> dict[ir.Node, Composition]:
    """Every node that is part of a composed activation, with that activation."""
    found: dict[ir.Node, Composition] = {}
    for node in graph:
        whole = _self_gated(node) if op(node) in _CORES else _softsign(node) if op(node) == "Div" else None
        for part in whole.nodes if whole is not None else ():
            found.setdefault(part, whole)  # type: ignore[arg-type]
    return found


def scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds."""
    if value is None or value.const_value is None or value.const_value.size != 1 or not is_float(value):
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def rescaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) where the node computes c x for a constant number c."""
    if op(node) not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    a, b = node.inputs
    if (c := scalar(b)) is not None and a is not None:
        return a, (c if op(node) == "Mul" else 1 / c if c else math.inf)
    c = scalar(a)
    return None if op(node) == "Div" or c is None or b is None else (b, c)


def _single_use(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _self_gated(core: ir.Node) -> Composition | None:
    """z s(g(z)) around the squashing function s, with constants added and multiplied on the way."""
    value, path, factor = core.outputs[0], [core], 1.0
    while (node := _single_use(value)) is not None and len(path) < 5:
        others = [v for v in node.inputs if v is not value]
        path.append(node)
        value_ = node.outputs[0]
        scaled = rescaled(node)
        if scaled is not None:
            factor *= scaled[1]
        elif op(node) == "Mul" and len(others) == 1:
            return _closed(core, others[0], path, factor)
        elif op(node) not in ("Add", "Sub") or any(scalar(v) is None for v in others):
            return None
        value = value_
    return None


def _closed(core: ir.Node, other: ir.Value | None, path: list[ir.Node], factor: float) -> Composition | None:
    """The composition, if the core's input is a function of what the product multiplies it with."""
    source, outer = other, []
    for _ in range(3):
        between = None if source is None else _between(core.inputs[0], source)
        if between is not None:
            break
        producer = source.producer() if source is not None else None
        scaled = None if producer is None else rescaled(producer)
        if producer is None or scaled is None:
            return None
        source, factor = scaled[0], factor * scaled[1]
        outer.append(producer)
    if between is None or source is None:
        return None
    name = _name(core, between)
    if name is None:
        return None
    output, rest = path[-1].outputs[0], []
    expected = {"Gelu": 0.5 if op(core) != "Sigmoid" else 1.0, "HardSwish": 1 / 6 if op(core) == "Clip" else 1.0}
    follower = _single_use(output)
    scaled = None if follower is None else rescaled(follower)
    if (
        follower is not None
        and scaled is not None
        and math.isclose(factor * scaled[1], expected.get(name, 1.0), rel_tol=0.01)
    ):
        output, rest = follower.outputs[0], [follower]
    return Composition(name, source, output, (*between, *outer, *path, *rest))


def _between(value: ir.Value | None, source: ir.Value, depth: int = _LONGEST) -> list[ir.Node] | None:
    """The elementwise nodes that compute `value` from `source` and constants alone; None where there is more to it."""
    if value is source:
        return []
    node = value.producer() if value is not None else None
    if node is None or op(node) not in _ELEMENTWISE or depth == 0:
        return None
    found: dict[ir.Node, None] = {}
    for v in node.inputs:
        if scalar(v) is None:
            before = _between(v, source, depth - 1)
            if before is None:
                return None
            found.update(dict.fromkeys(before))
    return [*found, node]


def _name(core: ir.Node, between: list[ir.Node]) -> str | None:
    kinds = [op(n) for n in between]
    if op(core) == "Sigmoid":
        scaled = rescaled(between[0]) if len(between) == 1 else None
        return "Gelu" if scaled is not None and math.isclose(scaled[1], 1.702, rel_tol=0.01) else "Silu"
    if op(core) == "HardSigmoid":
        return "HardSwish"
    if op(core) == "Clip":
        ends = [scalar(v) for v in core.inputs[1:3]]
        return "HardSwish" if ends == [0.0, 6.0] and kinds == ["Add"] else None
    if op(core) == "Erf":
        return "Gelu"
    if "Softplus" in kinds or "Log" in kinds:
        return "Mish"
    return "Gelu" if "Pow" in kinds or kinds.count("Mul") >= 3 else None


def _softsign(node: ir.Node) -> Composition | None:
    """z / (1 + |z|)."""
    source, below = node.inputs[0], node.inputs[1].producer() if node.inputs[1] is not None else None
    if source is None or below is None or op(below) != "Add" or 1.0 not in (scalar(v) for v in below.inputs):
        return None
    size = next((p for v in below.inputs if v is not None and (p := v.producer()) is not None), None)
    if size is None or op(size) != "Abs" or size.inputs[0] is not source:
        return None
    return Composition("Softsign", source, node.outputs[0], (size, below, node))


# -- normalisations ----------------------------------------------------------------------------------------------------


def normalisations(graph: ir.Graph) -> set[ir.Node]:
    """Nodes whose output has a scale of its own: normalisation operators, and x / sqrt(mean of x^2) written out."""
    return {n for n in graph if op(n) in NORMALISATIONS or divides_by_deviation(n)}


def divides_by_deviation(node: ir.Node) -> bool:
    """Is the node the last of a normalisation written out, x / sqrt(mean of x^2)?"""
    if op(node) not in ("Mul", "Div") or len(node.inputs) != 2:
        return False
    divisors = [node.inputs[1]] if op(node) == "Div" else [r for v in node.inputs if (r := _inverted(v)) is not None]
    return any(_deviation(v) for v in divisors)


def _inverted(value: ir.Value | None) -> ir.Value | None:
    """x where the value is 1 / x (times gamma, as jax writes it), or where it is (x')^(-1/2) (then that node's own
    output)."""
    value = behind(value)
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if op(node) == "Reciprocal" or (op(node) == "Div" and scalar(node.inputs[0]) is not None):
        return node.inputs[0] if op(node) == "Reciprocal" else node.inputs[1]
    return value if op(node) == "Pow" and scalar(node.inputs[1]) == -0.5 else None


def _deviation(value: ir.Value | None) -> bool:
    """Is the value a root of a mean of squares (with an epsilon), or an L2 norm?"""
    seen_root = False
    for _ in range(8):
        value = behind(value)
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if op(node) == "ReduceL2" or (
            seen_root and op(node) in ("ReduceMean", "ReduceSum", "ReduceSumSquare", "GlobalAveragePool")
        ):
            return True
        if op(node) in ("Sqrt", "Pow"):
            seen_root = True
        elif op(node) not in ("Add", "Sub", "Max", "Clip", "Expand", "Mul", "Div"):
            return False
        value = next((v for v in node.inputs if v is not None and v.const_value is None), None)
    return False


# -- walks -------------------------------------------------------------------------------------------------------------


def scales_or_shifts(node: ir.Node, index: int) -> bool:
    """Does the node only move the elements of its input `index`, or add or multiply a constant to them?"""
    if op(node) in MOVES:
        return index == 0 or op(node) == "Concat"
    if op(node) not in ("Add", "Sub", "Mul", "Div") or (op(node) == "Div" and index == 1):
        return False
    return all(_stored(v) for k, v in enumerate(node.inputs) if k != index)


def _stored(value: ir.Value | None) -> bool:
    """An initializer, or one that is only moved (a gamma reshaped to (1, C, 1, 1))."""
    for _ in range(4):
        if value is None or value.const_value is not None:
            return True
        node = value.producer()
        if node is None or op(node) not in MOVES:
            return False
        value = node.inputs[0]
    return False


def onward(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that compute with a value, seen through moves and constants added or multiplied, in graph order."""
    pending, seen = [value], {value}
    while pending:
        for use in pending.pop(0).uses():
            if scales_or_shifts(use.node, use.idx):
                fresh = [o for o in use.node.outputs if o not in seen]
                seen.update(fresh)
                pending.extend(fresh)
            else:
                yield use.node, use.idx


def behind(value: ir.Value | None) -> ir.Value | None:
    """The value that a value is made of by moves, and by constants added or multiplied."""
    while value is not None and (node := value.producer()) is not None:
        moving = [k for k, v in enumerate(node.inputs) if not _stored(v)]
        if len(moving) != 1 or not scales_or_shifts(node, moving[0]):
            break
        value = node.inputs[moving[0]]
    return value


def array_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer a value is, seen through moves."""
    for _ in range(8):
        if value is None or constant_array(value) is not None:
            return value
        node = value.producer()
        if node is None or op(node) not in MOVES:
            return None
        value = node.inputs[0]
    return None
