"""Values that are a function of one earlier value, element by element, though several operators compute them.

z -> z * sigmoid(z) is a product of two values that depend on each other: its moments are those of the composed function
of z, not of a product of independent factors. Here the common ancestor is found, and the function and its derivative
are evaluated along the way from it (forward-mode differentiation with dual numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.broadcasting import align
from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import dims, op
from gradlint.quadrature import Piecewise
from gradlint.transfer import ELEMENTWISE, PULLBACK, Context, apply_moments, apply_pullback, spectrum

Dual = tuple[Array, Array]  # value and derivative
_DEPTH = 24

# How an operator of several inputs acts on dual numbers, and whether it has kinks. The arithmetic rows fill it.
DUAL: dict[str, tuple[Callable[[Sequence[Dual]], Dual], bool]] = {}


def ancestor(ctx: Context, node: ir.Node) -> ir.Value | None:
    """The nearest value of which all varying inputs of `node` are functions, element by element."""
    moving = [v for v in node.inputs if v is not None and ctx.varies(v)]
    return _common(ctx, moving, {}, _DEPTH) if _plain(ctx, node) else None


def _plain(ctx: Context, node: ir.Node) -> bool:
    """No varying input is broadcast."""
    out = dims(node.outputs[0])
    return out is not None and all(dims(v) == out for v in node.inputs if v is not None and ctx.varies(v))


def _lineage(ctx: Context, value: ir.Value, seen: dict[ir.Value, list[ir.Value]], depth: int) -> list[ir.Value]:
    """The value and the values it is a function of, nearest first."""
    if value in seen:
        return seen[value]
    seen[value] = [value]
    node = value.producer()
    if node is None or depth == 0:
        return seen[value]
    parent: ir.Value | None = None
    if op(node) in ELEMENTWISE:
        f = ELEMENTWISE[op(node)].functions(node)[0]
        per_unit = isinstance(f, Piecewise) and any(np.ndim(slope) for slope in f.slopes)
        parent = None if per_unit else node.inputs[0]
    elif op(node) in DUAL and _plain(ctx, node):
        parent = _common(ctx, [v for v in node.inputs if v is not None and ctx.varies(v)], seen, depth - 1)
    if parent is not None and ctx.varies(parent):
        seen[value] = [value, *_lineage(ctx, parent, seen, depth - 1)]
    return seen[value]


def _common(
    ctx: Context, values: Sequence[ir.Value], seen: dict[ir.Value, list[ir.Value]], depth: int
) -> ir.Value | None:
    chains = [_lineage(ctx, v, seen, depth) for v in dict.fromkeys(values)]
    if not chains:
        return None
    return next((v for v in chains[0] if all(v in chain for chain in chains[1:])), None)


def _between(ctx: Context, node: ir.Node, root: ir.Value) -> list[ir.Node]:
    """The nodes on the ways from `root` to `node`, itself last, in the order of computation."""
    found: dict[ir.Node, None] = {}

    def visit(n: ir.Node) -> None:
        for v in n.inputs:
            producer = v.producer() if v is not None and v is not root and ctx.varies(v) else None
            if producer is not None and producer not in found:
                visit(producer)
        found[n] = None

    visit(node)
    return list(found)


@dataclass(frozen=True)
class Composed:
    """A value as a dual function f of z = `root` (arrays with one more axis, of nodes), x being the root's moments.

    per_unit: constants in it differ between units.
    """

    f: Callable[[Array], Dual]
    kinked: bool
    per_unit: bool
    root: ir.Value
    x: Moments

    def value(self, z: Array) -> Array:
        return self.f(z)[0]

    def slope(self, z: Array) -> Array:
        return self.f(z)[1]


def _function(ctx: Context, nodes: Sequence[ir.Node], root: ir.Value, x: Moments) -> Composed:
    """The last node's output as a function of `root`, whose moments are x."""
    reference = np.broadcast_shapes(x.mean.shape, x.var.shape)
    constants: dict[ir.Value, Array] = {}
    kinked = False
    for node in nodes:
        rule = ELEMENTWISE.get(op(node))
        kinked |= DUAL[op(node)][1] if rule is None else rule.kinked or isinstance(rule.functions(node)[0], Piecewise)
        for v in node.inputs if rule is None else ():
            if v is None or ctx.varies(v):
                continue
            array = ctx.array(v)
            if array is not None:
                mean = align(array, reference).mean
                constants[v] = mean.reshape(()) if mean.size == 1 else mean[..., None]

    def evaluate(z: Array) -> Dual:
        known: dict[ir.Value, Dual] = {root: (z, np.ones((1,) * z.ndim))}
        known |= {v: (c, np.zeros((1,) * z.ndim)) for v, c in constants.items()}
        for node in nodes:
            rule = ELEMENTWISE.get(op(node))
            if rule is not None:
                f, df = rule.functions(node)
                u, du = known[node.inputs[0]]  # type: ignore[index]
                known[node.outputs[0]] = f(u), df(u) * du
            else:
                known[node.outputs[0]] = DUAL[op(node)][0]([known[v] for v in node.inputs if v is not None])
        value, slope = known[nodes[-1].outputs[0]]
        return np.nan_to_num(value), np.nan_to_num(slope)

    per_unit = any(c.size > 1 for c in constants.values())
    return Composed(evaluate, kinked, per_unit, root, x)


def _composed(ctx: Context, node: ir.Node) -> Composed | None:
    root = ancestor(ctx, node)
    x = None if root is None else ctx.moments.get(root)
    if root is None or x is None:
        return None
    nodes = _between(ctx, node, root)
    for n in nodes:  # constants too large to be had
        if any(v is not None and not ctx.varies(v) and ctx.array(v) is None for v in n.inputs):
            return None
    return _function(ctx, nodes, root, x)


def composed_moments(ctx: Context, node: ir.Node) -> Moments | None:
    """Moments of a node's output as a function of its inputs' common ancestor; None where they have none."""
    found = _composed(ctx, node)
    if found is None:
        return None
    with np.errstate(all="ignore"):
        return apply_moments(found.value, found.x, kinked=found.kinked, per_unit=found.per_unit)


def composed_pullback(ctx: Context, node: ir.Node, g: Gradient) -> Gradient | None:
    """The gradient of a node's only varying input; None where that isn't known."""
    found = _composed(ctx, node)
    if found is None:
        return None
    with np.errstate(all="ignore"):
        return apply_pullback(found.slope, found.x, g, kinked=found.kinked, per_unit=found.per_unit)


def correction(ctx: Context, node: ir.Node, alone: Callable[[Gradient], Sequence[Gradient | None]]) -> Array | None:
    """By what the gradients that `alone` sends to the varying inputs, taken as independent, must be multiplied.

    So that what arrives at the common ancestor z, through the pullback rows in between, is E[(dy/dz)^2] g^2. None where
    the inputs have no common ancestor.
    """
    if node in ctx.corrections:
        return ctx.corrections[node]
    ctx.corrections[node] = None
    found = _composed(ctx, node)
    if found is None:
        return None
    x = found.x
    one = 0 * x.mean + 1
    with np.errstate(all="ignore"):
        wanted = spectrum(found.slope, x.mean, x.var, kinked=found.kinked, per_unit=found.per_unit).second
        arriving = _arriving(ctx, node, found.root, alone(Gradient(0 * one, one)))
    if arriving is None:
        return None
    total = arriving.total
    ctx.corrections[node] = np.where(total > 0, wanted / np.where(total > 0, total, 1.0), 1.0)
    return ctx.corrections[node]


def _arriving(ctx: Context, node: ir.Node, root: ir.Value, sent: Sequence[Gradient | None]) -> Gradient | None:
    """What the rows between let arrive at `root` when `node` sends `sent` to its inputs."""
    grads: dict[ir.Value, Gradient] = {}

    def add(values: Sequence[ir.Value | None], gs: Sequence[Gradient | None]) -> None:
        for v, g in zip(values, gs, strict=False):
            if v is not None and g is not None and ctx.varies(v):
                grads[v] = grads[v] + g if v in grads else g

    add(node.inputs, sent)
    for n in reversed(_between(ctx, node, root)[:-1]):
        g = grads.get(n.outputs[0])
        if g is not None:
            xs = [None if v is None else ctx.moments.get(v) for v in n.inputs]
            add(n.inputs, PULLBACK[op(n)](ctx, n, xs, [ctx.moments.get(n.outputs[0])], [g]))
    return grads.get(root)
