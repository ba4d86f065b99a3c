"""The static estimate: moments forward, second moments of the gradient backward, from the file alone.

Two sweeps over the canonical graph through the tables of `transfer`. Nothing is executed; weights are read where a row
asks for them. The linear loss with standard normal targets is assumed: the second moment of every output's gradient is
1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

import gradlint.ops  # noqa: F401  (fills the tables)
from gradlint.constants import evaluator, varying
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import dims, is_float, op
from gradlint.load import release
from gradlint.subgraphs import captured
from gradlint.transfer import BLOCKED, BOUND, MOMENTS, PULLBACK, RANGE, Context

_SMALL = 1 << 18  # elements: constants up to this size are described element by element, larger ones by rows that ask
_FEW = 1 << 14  # elements: larger constants are forgotten once both sweeps are done
_BOUND_LIMIT = 1e6


@dataclass(frozen=True)
class Estimate:
    """What the file alone tells.

    moments, gradients: per value; edges: what each (node, input) sends back, as a squared norm per example; unmodelled:
    nodes whose operator has no row, behind: nodes whose estimate rests on one; profiles: norms of the gradient of the
    states of a Loop or Scan before each step, and behind it.
    """

    batch: int
    moments: Mapping[ir.Value, Moments]
    gradients: Mapping[ir.Value, Gradient]
    edges: Mapping[tuple[ir.Node, int], float] = field(default_factory=dict)
    unmodelled: tuple[ir.Node, ...] = ()
    behind: frozenset[ir.Node] = frozenset()
    varies: frozenset[ir.Value] = frozenset()
    profiles: Mapping[ir.Node, Array] = field(default_factory=dict)

    def elements(self, value: ir.Value) -> float:
        """Elements per example (of a constant: all)."""
        size = float(math.prod(dims(value) or (1,)))
        return max(1.0, size / self.batch) if value in self.varies else size

    def grad_rms(self, value: ir.Value) -> float | None:
        g = self.gradients.get(value)
        return None if g is None else math.sqrt(float(np.mean(g.total)))

    def grad_norm(self, value: ir.Value) -> float | None:
        rms = self.grad_rms(value)
        return None if rms is None else rms * math.sqrt(self.elements(value))


@dataclass(frozen=True)
class Proof:
    """What holds for every input in range: `ranges` per value, `bounds` on the gradient's norm per value."""

    ranges: Mapping[ir.Value, Range] = field(default_factory=dict)
    bounds: Mapping[ir.Value, float] = field(default_factory=dict)


def context(graph: ir.Graph, *, batch: int, mode: str) -> Context:
    varies = varying(graph)
    array = evaluator(graph, varies)
    return Context(batch, mode, array, lambda v: v is not None and v in varies)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what explodes overflows here as it would in training
def estimate(
    graph: ir.Graph, *, batch: int, mode: str = "train", inputs: Mapping[str, Moments] | None = None
) -> Estimate:
    """Both sweeps over a canonical graph with bound dimensions.

    inputs: moments of graph inputs by name (default: standard normal floats). Never fails for a missing row: moments
    pass through, and the node is listed.
    """
    ctx = context(graph, batch=batch, mode=mode)
    varies = frozenset(v for n in graph.all_nodes() for v in n.outputs if ctx.varies(v)) | frozenset(graph.inputs)
    moments, gradients = ctx.moments, ctx.gradients
    unmodelled: list[ir.Node] = []
    behind: set[ir.Node] = set()

    def forward(part: ir.Graph) -> None:
        listed, rest = _forward(ctx, part, moments)
        unmodelled.extend(listed)
        behind.update(rest)

    def pull(part: ir.Graph, seeds: Mapping[ir.Value, Gradient]) -> dict[ir.Value, Gradient]:
        found = dict(seeds)
        _backward(ctx, part, moments, found)
        return found

    ctx = replace(ctx, forward=forward, backward=pull)
    for value in graph.inputs:
        given = (inputs or {}).get(str(value.name))
        rank = len(value.shape) if value.shape is not None else 0
        if given is not None:
            moments[value] = given
        elif is_float(value):
            moments[value] = Moments.normal(rank)
    forward(graph)
    for output in graph.outputs:
        if is_float(output):
            one = np.ones((1,) * len(output.shape or ()))
            gradients[output] = Gradient(0 * one, one)
    edges = _backward(ctx, graph, moments, gradients)
    kept = {v: x for v, x in moments.items() if v in varies or x.mean.size <= _FEW}
    told = (tuple(dict.fromkeys(unmodelled)), frozenset(behind))
    return Estimate(batch, kept, gradients, edges, *told, varies, ctx.profiles)


def _known(ctx: Context, moments: dict[ir.Value, Moments], value: ir.Value | None) -> Moments | None:
    """A value's moments; those of a constant of moderate size are its elements."""
    if value is None or value in moments:
        return moments.get(value) if value is not None else None
    size = math.prod(dims(value) or (0,))
    if ctx.varies(value) or not is_float(value) or size > _SMALL:
        return None
    array = ctx.array(value)
    if array is None:
        return None
    moments[value] = Moments.constant(array.astype(np.float64))
    return moments[value]


def _forward(ctx: Context, graph: ir.Graph, moments: dict[ir.Value, Moments]) -> tuple[list[ir.Node], set[ir.Node]]:
    unmodelled: list[ir.Node] = []
    behind: set[ir.Node] = set()
    for node in graph:
        if any(v.producer() in behind for v in node.inputs if v is not None):
            behind.add(node)
        floats = [o for o in node.outputs if is_float(o)]
        if not floats or not any(ctx.varies(o) for o in floats):
            continue
        xs = [_known(ctx, moments, v) for v in node.inputs]
        rule = MOMENTS.get(op(node))
        ys = rule(ctx, node, xs) if rule is not None else ()
        for k, output in enumerate(node.outputs):
            found = ys[k] if k < len(ys) else None
            if found is None and is_float(output) and (output.uses() or output.is_graph_output()):
                found = _through(output, xs)
                if node not in behind or rule is None:
                    unmodelled.append(node)
                behind.add(node)
            if found is not None:
                moments[output] = _finite(found)
        _release(node)
    return list(dict.fromkeys(unmodelled)), behind


def _through(output: ir.Value, xs: list[Moments | None]) -> Moments | None:
    """Moments for an output nothing is known about: those of the first known input, averaged; none without a rank."""
    if output.shape is None:
        return None
    rank = len(output.shape)
    first = next((x for x in xs if x is not None), None)
    if first is None:
        return Moments.normal(rank)
    return Moments.normal(rank, float(np.mean(first.mean)), float(np.mean(first.var)))


def _release(node: ir.Node) -> None:
    """Give back the memory-mapped pages of the weights a row has read."""
    for value in node.inputs:
        if value is not None:
            release(value.const_value)


_Spread = TypeVar("_Spread", Moments, Gradient)


def _finite(x: _Spread) -> _Spread:
    """Overflow stays representable: a variance beyond 1e300 is 1e300."""
    if all(np.isfinite(part).all() for name in x.__slots__ if (part := getattr(x, name)) is not None):
        return x
    return x.map(lambda a: np.nan_to_num(a, nan=0.0, posinf=1e300, neginf=-1e300))


def _backward(
    ctx: Context, graph: ir.Graph, moments: dict[ir.Value, Moments], gradients: dict[ir.Value, Gradient]
) -> dict[tuple[ir.Node, int], float]:
    """Complete `gradients`, which holds those of the outputs; returns what every edge sends back."""
    edges: dict[tuple[ir.Node, int], float] = {}
    for node in reversed(list(graph)):
        gs = [gradients.get(o) for o in node.outputs]
        if all(g is None for g in gs) or not any(is_float(v) for v in (*node.inputs, *captured(node))):
            continue
        xs = [_known(ctx, moments, v) for v in node.inputs]
        ys = [moments.get(o) for o in node.outputs]
        rule = PULLBACK.get(op(node))
        back = (
            rule(ctx, node, xs, ys, gs) if rule is not None else [_back_through(ctx, node, v, gs) for v in node.inputs]
        )
        for k, (value, g) in enumerate(zip(node.inputs, back, strict=False)):
            if value is not None and g is not None and is_float(value):
                g = _finite(g)
                gradients[value] = gradients[value] + g if value in gradients else g
                size = math.prod(dims(value) or (1,)) / (ctx.batch if ctx.varies(value) else 1)
                edges[node, k] = float(np.mean(g.total)) * max(1.0, size)
        _release(node)
    return edges


def _back_through(ctx: Context, node: ir.Node, value: ir.Value | None, gs: list[Gradient | None]) -> Gradient | None:
    """Without a row the gradient's norm is taken to pass unchanged to every float input that varies."""
    out, into = dims(node.outputs[0]), dims(value)
    if value is None or value.shape is None or not is_float(value) or op(node) in BLOCKED or not ctx.varies(value):
        return None
    scale = math.prod(out) / max(1, math.prod(into)) if out and into else 1.0
    total = sum(float(np.mean(g.total)) for g in gs if g is not None) * scale
    one = np.ones((1,) * len(value.shape))
    return Gradient(0 * one, total * one)


# -- what can be proved ------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def prove(graph: ir.Graph, ranges: Mapping[str, Range], *, batch: int, mode: str) -> Proof:
    """Interval ranges forward, products of operator norms backward.

    ranges: the declared range of each graph input. A bound counts per unit of the cotangent's norm at the outputs, and
    only where one is known and below 1e6; BatchNormalization by batch statistics has no range (it depends on the
    batch).
    """
    ctx = context(graph, batch=batch, mode=mode)
    found: dict[ir.Value, Range] = {v: ranges[str(v.name)] for v in graph.inputs if str(v.name) in ranges}
    for node in graph:
        rule = RANGE.get(op(node))
        if rule is None or not any(ctx.varies(o) for o in node.outputs):
            continue
        for output, known in zip(
            node.outputs, rule(ctx, node, [_interval(ctx, found, v) for v in node.inputs]), strict=False
        ):
            if known is not None and np.isfinite(known.lo).all() and np.isfinite(known.hi).all():
                found[output] = known
        _release(node)
    return Proof(found, _bounds(ctx, graph, found))


def _interval(ctx: Context, found: dict[ir.Value, Range], value: ir.Value | None) -> Range | None:
    if value is None or value in found or ctx.varies(value):
        return found.get(value) if value is not None else None
    if math.prod(dims(value) or (0,)) > _SMALL or (array := ctx.array(value)) is None or array.dtype == np.bool_:
        return None
    found[value] = Range(array.astype(np.float64), array.astype(np.float64))
    return found[value]


def _bounds(ctx: Context, graph: ir.Graph, found: dict[ir.Value, Range]) -> dict[ir.Value, float]:
    bounds: dict[ir.Value, float] = {o: 1.0 for o in graph.outputs if is_float(o)}
    unknown: set[ir.Value] = set()
    for node in reversed(list(graph)):
        live = [o for o in node.outputs if o in bounds or o in unknown]
        if not live:
            continue
        above = None if any(o in unknown for o in live) else math.hypot(*(bounds[o] for o in live))
        rule = None if above is None else BOUND.get(op(node))  # a norm nobody can use is not computed
        factors: Sequence[float | None] = ()
        if rule is not None:
            xs, ys = [_interval(ctx, found, v) for v in node.inputs], [found.get(o) for o in node.outputs]
            factors = rule(ctx, node, xs, ys)
        for k, value in enumerate(node.inputs):
            if value is None or not is_float(value) or not ctx.varies(value) or op(node) in BLOCKED:
                continue
            factor = factors[k] if k < len(factors) else None
            if above is None or factor is None or not math.isfinite(above * factor):
                unknown.add(value)
            else:
                bounds[value] = bounds.get(value, 0.0) + above * factor
        _release(node)
    return {v: b * (1 + 1e-5) for v, b in bounds.items() if v not in unknown and b <= _BOUND_LIMIT}
