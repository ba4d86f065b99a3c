"""Operators that pick one of several inputs element by element: Min, Max, Where, and the remainder Mod."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.broadcasting import boxes, fan
from gradlint.composition import DUAL, Dual
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import dims, is_float
from gradlint.ops.arithmetic import MASKED, Values, arithmetic, moments_row, pullback_row
from gradlint.quadrature import above, density
from gradlint.transfer import Context, ratio, row

FAR = 1e100  # a mean beyond it is as good as infinite; its square is still a number

# -- Max, Min ----------------------------------------------------------------------------------------------------------


def _larger(a: Moments, b: Moments) -> tuple[Moments, Array]:
    """Moments of max(a, b), both normal and independent, and P(a > b) (Clark 1961).

    The parts keep the share they have in the operand that is picked. A constant may be infinite (no limit).
    """
    u, v = (np.clip(x.mean, -FAR, FAR) for x in (a, b))
    spread = np.sqrt(np.maximum(a.var + b.var, 1e-300))
    t = np.clip((u - v) / spread, -38.0, 38.0)
    p, phi = above(-t), density(t)
    mean = u * p + v * (1 - p) + spread * phi
    second = (u**2 + a.var) * p + (v**2 + b.var) * (1 - p) + (u + v) * spread * phi
    var = np.maximum(second - mean**2, 0.0)
    whole = a.var * p**2 + b.var * (1 - p) ** 2

    def part(u: Array, v: Array) -> Array:
        mixed = u * p**2 + v * (1 - p) ** 2
        return var * ratio(mixed, whole)

    fixed, shared = part(a.fixed, b.fixed), part(a.shared, b.shared)
    return Moments(mean, fixed, shared, np.maximum(var - fixed - shared, 0.0)), p


def _largest(xs: Sequence[Moments], sign: float) -> Moments:
    """The largest (sign 1) or smallest of several, pair by pair."""
    best = xs[0].scaled(sign)
    for x in xs[1:]:
        best, _ = _larger(best, x.scaled(sign))
    return best.scaled(sign)


def _shares(xs: Sequence[Moments], sign: float) -> list[Array]:
    """For each operand the probability of being picked: of lying beyond the extreme of the others."""
    if len(xs) == 1:
        return [np.ones((1,) * xs[0].mean.ndim)]
    rest = [_largest([*xs[:k], *xs[k + 1 :]], sign) for k in range(len(xs))]
    return [_larger(x.scaled(sign), r.scaled(sign))[1] for x, r in zip(xs, rest, strict=True)]


def picked(g: Gradient, p: Array) -> Gradient:
    """The gradient where an operand is picked, with probability p, independently at every position."""
    shared = g.shared * p**2
    return Gradient(shared, g.total * p - shared)


def extreme_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g goes to the operand that is picked, in equal parts where several are equal."""
    y, g = node.outputs[0], gs[0]
    assert g is not None
    hits = [
        b.op("Cast", b.op("Equal", v, y, dtype=ir.DataType.BOOL), to=int(y.dtype or 1), dtype=y.dtype)
        for v in node.inputs
    ]
    part = g if len(hits) == 1 else b.op("Div", g, b.op("Sum", *hits))
    return tuple(
        b.unbroadcast(b.op("Mul", part, hit), v, y) if v is not None and b.wanted(v) else None
        for v, hit in zip(node.inputs, hits, strict=True)
    )


def _extreme(name: str, sign: float, pick: Callable[..., Array]) -> None:
    def dual(xs: Sequence[Dual]) -> Dual:
        value, slope = xs[0]
        for v, d in xs[1:]:
            slope = np.where(sign * v > sign * value, d, slope)
            value = pick(value, v)
        return value, slope

    def interval(node: ir.Node, xs: Sequence[Range]) -> Range:
        lo, hi = xs[0].lo, xs[0].hi
        for x in xs[1:]:
            lo, hi = pick(lo, x.lo), pick(hi, x.hi)
        return Range(lo, hi)

    arithmetic(
        name,
        dual,
        lambda node, xs: _largest(xs, sign),
        lambda node, xs, g: [picked(g, p) for p in _shares(xs, sign)],
        interval,
        lambda node, xs, k: 1.0,
        extreme_vjp,
        curved=lambda ctx, node: True,
        kinked=True,
    )


_extreme("Max", 1.0, np.maximum)
_extreme("Min", -1.0, np.minimum)


# -- Mod ---------------------------------------------------------------------------------------------------------------


def _mod_dual(xs: Sequence[Dual]) -> Dual:
    (u, du), (v, dv) = xs
    return np.fmod(u, v), du - np.trunc(u / v) * dv


def _mod_forward(node: ir.Node, xs: Sequence[Moments]) -> Moments:
    """As if spread evenly over [-|b|, |b|] where a is much larger than b, a itself where it is much smaller."""
    a, b = xs
    second = np.minimum(a.second, b.second / 3)
    return a.scaled(np.sqrt(np.divide(second, a.second, out=np.ones_like(second), where=a.second > 0)))


def _mod_back(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    """da = g; db = -g trunc(a / b), its second moment about that of a / b."""
    a, b = xs
    return g, Gradient(0 * g.shared, g.total * a.second / np.maximum(b.second, 1e-300))


def _mod_interval(node: ir.Node, xs: Sequence[Range]) -> Range:
    most = np.maximum(np.abs(xs[1].lo), np.abs(xs[1].hi))
    return Range(np.where(xs[0].lo < 0, -most, 0.0), np.where(xs[0].hi > 0, most, 0.0))


def mod_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Of floats, y = a - b trunc(a / b): da = g, db = -g trunc(a / b). Of integers none."""
    (u, v), y, g = node.inputs, node.outputs[0], gs[0]
    if not is_float(y):
        return None, None
    assert g is not None
    du = b.unbroadcast(g, u, y) if u is not None and b.wanted(u) else None
    dv = None
    if v is not None and b.wanted(v):
        turns = b.op("Div", b.op("Sub", y, u), v)
        dv = b.unbroadcast(b.op("Mul", g, b.op("Round", turns)), v, y)
    return du, dv


arithmetic(
    "Mod",
    _mod_dual,
    _mod_forward,
    _mod_back,
    _mod_interval,
    lambda node, xs, k: 1.0 if k == 0 else None,
    mod_vjp,
    curved=lambda ctx, node: not ctx.varies(node.inputs[1]),
    kinked=True,
)


# -- Where -------------------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
}


def _compared(compare: Callable[[Array, Array], Array]) -> Callable[[Sequence[Dual]], Dual]:
    def dual(xs: Sequence[Dual]) -> Dual:
        value = compare(xs[0][0], xs[1][0]).astype(float)
        return value, 0 * value

    return dual


for _op, _compare in _COMPARISONS.items():
    DUAL[_op] = _compared(_compare), True


def _where_dual(xs: Sequence[Dual]) -> Dual:
    yes = xs[0][0] != 0
    return np.where(yes, xs[1][0], xs[2][0]), np.where(yes, xs[1][1], xs[2][1])


def _condition(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """The inputs with the condition as a share: its mean where it is constant, else one half.

    Beside a constant that stands for minus infinity (a mask) the other input is taken to be picked always.
    """
    masks = [_is_mask(ctx, v) for v in node.inputs]
    share = 1.0 if masks[2] else 0.0 if masks[1] else 0.5
    known = not ctx.varies(node.inputs[0]) and share == 0.5
    condition = dims(node.inputs[0])
    if known or condition is None:
        return xs
    return (Moments.constant(np.full((1,) * len(condition), share)), *xs[1:])


def _is_mask(ctx: Context, value: ir.Value | None) -> bool:
    array = None if ctx.varies(value) else ctx.array(value)
    return array is not None and array.dtype.kind == "f" and array.size > 0 and bool(np.all(array <= MASKED))


def _where_forward(node: ir.Node, xs: Sequence[Moments]) -> Moments:
    """p a + (1 - p) b; where the condition differs over positions, so does which mean is there: fixed."""
    p, a, b = xs[0].mean, xs[1], xs[2]
    q = 1 - p
    mean = np.where(p == 0, 0.0, p * a.mean) + np.where(q == 0, 0.0, q * b.mean)
    a, b = (Moments(np.where(s == 0, 0.0, x.mean), x.fixed, x.shared, x.local) for s, x in ((p, a), (q, b)))
    shared = a.shared * p**2 + b.shared * q**2
    fixed = a.fixed * p + b.fixed * q + p * q * (a.mean - b.mean) ** 2
    local = a.local * p + b.local * q + a.shared * p * q + b.shared * p * q
    return Moments(mean, fixed, shared, local)


def _where_back(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    p = xs[0].mean
    return g.scaled(0.0), picked(g, p), picked(g, 1 - p)


_where_moments = moments_row(_where_forward, lambda ctx, node: False)
_where_pullback = pullback_row(_where_back, lambda ctx, node: False)


def where_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    return _where_moments(ctx, node, _condition(ctx, node, xs))


def where_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    return (None, *_where_pullback(ctx, node, _condition(ctx, node, xs), ys, gs)[1:])


def where_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """The union of both intervals."""
    condition = dims(node.inputs[0]) or ()
    either = Range(np.zeros((1,) * len(condition)), np.ones((1,) * len(condition)))
    given = boxes(ctx, node, (either, *xs[1:]))
    if given is None:
        return (None,)
    return (Range(np.minimum(given[1].lo, given[2].lo), np.maximum(given[1].hi, given[2].hi)),)


def where_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (None, fan(node, 1), fan(node, 2))


def where_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g goes to the input that is picked."""
    (condition, u, v), y, g = node.inputs, node.outputs[0], gs[0]
    assert g is not None
    zero = b.scalar(0.0, g)
    du = dv = None
    if u is not None and b.wanted(u):
        du = b.unbroadcast(b.op("Where", condition, g, zero, dtype=g.dtype), u, y)
    if v is not None and b.wanted(v):
        dv = b.unbroadcast(b.op("Where", condition, zero, g, dtype=g.dtype), v, y)
    return None, du, dv


DUAL["Where"] = _where_dual, True
row(
    "Where",
    moments=where_moments,
    range=where_range,
    pullback=where_pullback,
    bound=where_bound,
    vjp=where_vjp,
)
