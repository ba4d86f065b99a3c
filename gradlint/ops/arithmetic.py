"""Broadcasting arithmetic: Add, Sub, Mul, Div, Pow, Sum, Mean. y = a op b, g the gradient of y.

Two activations are taken as independent, unless both are functions of one earlier value (SiLU, GELU, Mish as exporters
write them, x * x): then `composition` gives the moments, and scales what goes back so that what arrives is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.broadcasting import boxes, fan, operands
from gradlint.composition import DUAL, Dual, composed_moments, composed_pullback, correction
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import constant_array, dims
from gradlint.transfer import (
    BoundRow,
    Context,
    MomentsRow,
    PullbackRow,
    RangeRow,
    VjpRow,
    logarithmic,
    product,
    ratio,
    row,
    summed,
)

Values = Sequence[ir.Value | None]
Forward = Callable[[ir.Node, Sequence[Moments]], Moments]
Curved = Callable[[Context, ir.Node], bool]
Back = Callable[[ir.Node, Sequence[Moments], Gradient], Sequence[Gradient]]

MASKED = -1e4  # entries of an added mask below it stand for minus infinity


def moving(ctx: Context, node: ir.Node) -> int:
    """How many inputs depend on the model's inputs."""
    return sum(ctx.varies(v) for v in node.inputs)


def moments_row(forward: Forward, curved: Curved) -> MomentsRow:
    """curved: does the function of one varying input need quadrature (`forward` isn't exact for it)?"""

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        if moving(ctx, node) > 1 or curved(ctx, node):
            y = composed_moments(ctx, node)
            if y is not None:
                return (y,)
        given = operands(ctx, node, xs)
        return (None if given is None else forward(node, given),)

    return moments


def pullback_row(back: Back, curved: Curved) -> PullbackRow:
    """back: the gradient of each input, shaped like the output, inputs taken as independent."""

    def pullback(
        ctx: Context,
        node: ir.Node,
        xs: Sequence[Moments | None],
        ys: Sequence[Moments | None],
        gs: Sequence[Gradient | None],
    ) -> Sequence[Gradient | None]:
        g = gs[0]
        given = None if g is None else operands(ctx, node, xs, np.broadcast_shapes(g.shared.shape, g.local.shape))
        if g is None or given is None:
            return (None,) * len(node.inputs)
        many = moving(ctx, node) > 1
        whole = composed_pullback(ctx, node, g) if moving(ctx, node) == 1 and curved(ctx, node) else None
        factor = correction(ctx, node, lambda one: back(node, given, one)) if many else None
        found = []
        for k, d in enumerate(back(node, given, g)):
            value = node.inputs[k]
            varies, small = ctx.varies(value), dims(value)
            if varies and whole is not None:
                d = whole
            elif varies and factor is not None:
                d = d.scaled(factor)
            found.append(None if small is None else summed(ctx, d, node.outputs[0], small, constant=not varies))
        return found

    return pullback


def range_row(interval: Callable[[ir.Node, Sequence[Range]], Range | None]) -> RangeRow:
    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        given = boxes(ctx, node, xs)
        with np.errstate(all="ignore"):
            y = None if given is None else interval(node, given)
        return (None if y is None or np.isnan(y.lo).any() or np.isnan(y.hi).any() else y,)

    return range_


def bound_row(steepest: Callable[[ir.Node, Sequence[Range], int], Array | float | None]) -> BoundRow:
    """steepest: sup of the partial derivative towards an input, over the box."""

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        given = boxes(ctx, node, xs)
        found: list[float | None] = []
        for k in range(len(node.inputs)):
            copies = fan(node, k)
            with np.errstate(all="ignore"):
                slope = None if given is None else steepest(node, given, k)
            known = copies is not None and slope is not None and bool(np.isfinite(slope).all())
            found.append(float(np.max(slope)) * copies if known else None)  # type: ignore[arg-type,operator]
        return found

    return bound


def arithmetic(
    op: str,
    dual: Callable[[Sequence[Dual]], Dual],
    forward: Forward,
    back: Back,
    interval: Callable[[ir.Node, Sequence[Range]], Range | None],
    steepest: Callable[[ir.Node, Sequence[Range], int], Array | float | None],
    vjp: VjpRow,
    *,
    curved: Curved = lambda ctx, node: False,
    kinked: bool = False,
) -> None:
    """All five rows and the dual-number form of an operator of several inputs (steepest: |dy/dx_k|)."""
    DUAL[op] = dual, kinked
    row(
        op,
        moments=moments_row(forward, curved),
        range=range_row(interval),
        pullback=pullback_row(back, curved),
        bound=bound_row(steepest),
        vjp=vjp,
    )


# -- sums --------------------------------------------------------------------------------------------------------------


def added(xs: Sequence[Moments]) -> Moments:
    """Independent terms: means and variances add. Masked entries (minus infinity) are left out."""
    xs = [Moments(np.where(x.mean <= MASKED, 0.0, x.mean), *_unmasked(x), x.skew) for x in xs]
    total = xs[0]
    for x in xs[1:]:
        skews = [z.skew for z in (total, x) if z.skew is not None]
        parts = (total.fixed + x.fixed, total.shared + x.shared, total.local + x.local)
        total = Moments(total.mean + x.mean, *parts, sum(skews[1:], skews[0]) if skews else None)
    return total


def _unmasked(x: Moments) -> tuple[Array, Array, Array]:
    return np.where(x.fixed >= MASKED**2 / 1e4, 0.0, x.fixed), x.shared, x.local


def _to_each(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    """g; what goes along with the sum goes along with a term as far as they are correlated.

    Squared, that is the term's share of the variance. Where the sum is skewed, its upper half is that of the terms that
    make it so.
    """
    whole = added(xs)
    found = []
    for x in xs:
        d, share = g, ratio(x.var, whole.var)
        if g.aligned is not None:
            d = replace(d, aligned=g.aligned * share)
        if g.upper is not None:
            skew = None if whole.skew is None else x.skew if x.skew is not None else np.zeros(())
            part = np.sqrt(share) if skew is None or whole.skew is None else np.clip(ratio(skew, whole.skew), 0, 1)
            d = replace(d, upper=g.total + (g.upper - g.total) * part)
        found.append(d)
    return found


def _sum_interval(node: ir.Node, xs: Sequence[Range]) -> Range:
    return Range(sum((x.lo for x in xs), np.zeros(())), sum((x.hi for x in xs), np.zeros(())))


def _sum_dual(xs: Sequence[Dual]) -> Dual:
    return sum((v for v, _ in xs), np.zeros(())), sum((d for _, d in xs), np.zeros(()))


def sum_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Every term gets g, summed over the axes it was broadcast along."""
    y, g = node.outputs[0], gs[0]
    assert g is not None
    return tuple(b.unbroadcast(g, v, y) if v is not None and b.wanted(v) else None for v in node.inputs)


for _op in ("Add", "Sum"):
    arithmetic(_op, _sum_dual, lambda node, xs: added(xs), _to_each, _sum_interval, lambda node, xs, k: 1.0, sum_vjp)


def mean_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g / n to each of n terms."""
    g = gs[0]
    assert g is not None
    return sum_vjp(b, node, (b.op("Mul", g, b.scalar(1 / len(node.inputs), g)),))


def _mean_dual(xs: Sequence[Dual]) -> Dual:
    value, slope = _sum_dual(xs)
    return value / len(xs), slope / len(xs)


def _mean_interval(node: ir.Node, xs: Sequence[Range]) -> Range:
    return _sum_interval(node, xs).map(lambda a: a / len(xs))


arithmetic(
    "Mean",
    _mean_dual,
    lambda node, xs: added(xs).scaled(1 / len(xs)),
    lambda node, xs, g: [g.scaled(1 / len(xs) ** 2)] * len(xs),
    _mean_interval,
    lambda node, xs, k: 1 / len(xs),
    mean_vjp,
)


def sub_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """da = g, db = -g."""
    da, db = sum_vjp(b, node, gs)
    return da, None if db is None else b.op("Neg", db)


arithmetic(
    "Sub",
    lambda xs: (xs[0][0] - xs[1][0], xs[0][1] - xs[1][1]),
    lambda node, xs: added([xs[0], xs[1].scaled(-1.0)]),
    _to_each,
    lambda node, xs: Range(xs[0].lo - xs[1].hi, xs[0].hi - xs[1].lo),
    lambda node, xs, k: 1.0,
    sub_vjp,
)


# -- products ----------------------------------------------------------------------------------------------------------


def multiplied(a: Moments, b: Moments) -> Moments:
    """Moments of a * b, independent: E[a^2] E[b^2]; fixed or shared as far as both factors are, the rest local."""
    mean = a.mean * b.mean
    var = np.maximum(a.second * b.second - mean**2, 0.0)
    fixed = a.fixed * (b.mean**2 + b.fixed) + a.mean**2 * b.fixed
    shared = a.shared * (b.mean**2 + b.shared) + a.mean**2 * b.shared
    return Moments(mean, fixed, shared, np.maximum(var - fixed - shared, 0.0))


def _mul_back(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    """g times the other factor. A gate is the same at every position, where x goes along with x * gate."""
    found = []
    local = multiplied(*xs).local
    for x, other in (xs, xs[::-1]):
        d = product(g, other, along=ratio(other.local * (x.mean**2 + x.shared), local))
        aligned = None if g.aligned is None else g.aligned * ratio(x.local * (other.mean**2 + other.shared), local)
        found.append(d if aligned is None else replace(d, aligned=aligned * (other.mean**2 + other.shared)))
    return found


def _mul_interval(node: ir.Node, xs: Sequence[Range]) -> Range:
    a, b = xs
    ends = np.stack(np.broadcast_arrays(a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi))
    low, high = ends.min(axis=0), ends.max(axis=0)
    return Range(np.maximum(low, 0.0), high) if node.inputs[0] is node.inputs[1] else Range(low, high)


def magnitude(x: Range) -> Array:
    return np.maximum(np.abs(x.lo), np.abs(x.hi))


def mul_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """da = g b, db = g a, summed over broadcast axes."""
    (u, v), y, g = node.inputs, node.outputs[0], gs[0]
    du = b.unbroadcast(b.op("Mul", g, v), u, y) if u is not None and b.wanted(u) else None
    dv = b.unbroadcast(b.op("Mul", g, u), v, y) if v is not None and b.wanted(v) else None
    return du, dv


arithmetic(
    "Mul",
    lambda xs: (xs[0][0] * xs[1][0], xs[0][1] * xs[1][0] + xs[0][0] * xs[1][1]),
    lambda node, xs: multiplied(*xs),
    _mul_back,
    _mul_interval,
    lambda node, xs, k: magnitude(xs[1 - k]),
    mul_vjp,
)


# -- quotients ---------------------------------------------------------------------------------------------------------


def powered(x: Moments, exponent: float) -> Moments:
    """Moments of |x|^exponent times the mean's sign, x taken as log-normal (a constant over its positions too)."""
    if not x.var.any():
        with np.errstate(divide="ignore"):
            return Moments.constant(np.sign(x.mean) * np.abs(x.mean) ** exponent)
    u = logarithmic(x).scaled(exponent)
    mean = np.exp(np.minimum(u.mean + u.var / 2, 300.0))

    def covariance(part: Array) -> Array:
        return mean**2 * np.expm1(np.minimum(part, 50.0))

    fixed, shared, total = covariance(u.fixed), covariance(u.shared), covariance(u.var)
    return Moments(np.sign(x.mean) * mean, fixed, shared, np.maximum(total - fixed - shared, 0.0))


def _div_back(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    a, b = xs
    return product(g, powered(b, -1.0)), product(g, multiplied(a, powered(b, -2.0)))


def _div_interval(node: ir.Node, xs: Sequence[Range]) -> Range | None:
    a, b = xs
    if np.any((b.lo <= 0) & (b.hi >= 0)):
        return None
    return _mul_interval(node, (a, Range(1 / b.hi, 1 / b.lo))) if node.inputs[0] is not node.inputs[1] else None


def _div_steepest(node: ir.Node, xs: Sequence[Range], k: int) -> Array | None:
    a, b = xs
    if np.any((b.lo <= 0) & (b.hi >= 0)):
        return None
    least = np.minimum(np.abs(b.lo), np.abs(b.hi))
    return 1 / least if k == 0 else magnitude(a) / least**2


def div_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """da = g / b, db = -g y / b."""
    (u, v), y, g = node.inputs, node.outputs[0], gs[0]
    quotient = b.op("Div", g, v)
    du = b.unbroadcast(quotient, u, y) if u is not None and b.wanted(u) else None
    dv = None
    if v is not None and b.wanted(v):
        dv = b.op("Neg", b.unbroadcast(b.op("Mul", quotient, y), v, y))
    return du, dv


def _div_dual(xs: Sequence[Dual]) -> Dual:
    (u, du), (v, dv) = xs
    return u / v, (du - u / v * dv) / v


arithmetic(
    "Div",
    _div_dual,
    lambda node, xs: multiplied(xs[0], powered(xs[1], -1.0)),
    _div_back,
    _div_interval,
    _div_steepest,
    div_vjp,
)


# -- powers ------------------------------------------------------------------------------------------------------------


def _pow_dual(xs: Sequence[Dual]) -> Dual:
    (u, du), (e, de) = xs
    value = np.power(u, e)
    through_base = np.where(e == 0, 0.0, e * np.power(u, e - 1)) * du
    return value, through_base + (value * np.log(np.maximum(u, 1e-300)) * de if np.any(de) else 0.0)


def _whole(ctx: Context, node: ir.Node) -> bool:
    """Is the exponent constant, whole and positive? Then a may have any sign; else it is taken as log-normal."""
    e = None if ctx.varies(node.inputs[1]) else ctx.array(node.inputs[1])
    return e is not None and bool(np.all((e == np.rint(e)) & (e >= 0)))


def _pow_forward(node: ir.Node, xs: Sequence[Moments]) -> Moments:
    """a log-normal: y = exp(b ln a), the exponent's moments those of a product, taken as normal."""
    u = multiplied(xs[1], logarithmic(xs[0]))
    return _exponential(u)


def _exponential(u: Moments) -> Moments:
    """Moments of exp(u), u normal."""
    mean = np.exp(np.minimum(u.mean + u.var / 2, 300.0))
    fixed, shared, total = (mean**2 * np.expm1(np.minimum(p, 50.0)) for p in (u.fixed, u.shared, u.var))
    return Moments(mean, fixed, shared, np.maximum(total - fixed - shared, 0.0))


def _pow_back(node: ir.Node, xs: Sequence[Moments], g: Gradient) -> Sequence[Gradient]:
    """da = g b a^(b - 1), db = g y ln a; a log-normal, the factors taken as independent."""
    a, e = xs
    log = logarithmic(a)
    slope = multiplied(e, _exponential(multiplied(e.scaled(1.0, -1.0), log)))
    return product(g, slope), product(g, multiplied(_exponential(multiplied(e, log)), log))


def _exponent(xs: Sequence[Range]) -> Array | None:
    """The exponent where it is constant."""
    return xs[1].lo if np.array_equal(xs[1].lo, xs[1].hi) else None


def _pole(base: Range, e: Array) -> bool:
    """Is a^e undefined or unbounded somewhere in the box?"""
    fraction, negative = e != np.rint(e), e < 0
    return bool(np.any(fraction & (base.lo < 0)) or np.any(negative & (base.lo <= 0) & (base.hi >= 0)))


def _pow_interval(node: ir.Node, xs: Sequence[Range]) -> Range | None:
    e, base = _exponent(xs), xs[0]
    if e is None or _pole(base, e):
        return None
    ends = np.stack(np.broadcast_arrays(base.lo**e, base.hi**e, np.clip(0.0, base.lo, base.hi) ** e))
    return Range(ends.min(axis=0), ends.max(axis=0))


def _pow_steepest(node: ir.Node, xs: Sequence[Range], k: int) -> Array | None:
    e, base = _exponent(xs), xs[0]
    if e is None or k == 1 or _pole(base, e) or np.any((e < 1) & (e != 0) & (base.lo <= 0) & (base.hi >= 0)):
        return None
    least, most = np.clip(0.0, base.lo, base.hi), magnitude(base)
    ends = [np.where(e == 0, 0.0, np.abs(e) * np.abs(x) ** (e - 1)) for x in (least, most, base.lo, base.hi)]
    return np.max(np.stack(np.broadcast_arrays(*ends)), axis=0)


def pow_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """da = g b a^(b - 1); db = g y ln a (0 where a <= 0)."""
    (u, e), y, g = node.inputs, node.outputs[0], gs[0]
    assert u is not None
    assert e is not None
    power = constant_array(e)
    known = None if power is None or power.size != 1 else float(power.reshape(-1)[0])
    du = de = None
    if b.wanted(u):
        if known == 2.0:
            slope = b.op("Add", u, u)
        elif known is not None:
            slope = b.op("Mul", b.op("Pow", u, b.scalar(known - 1, u)), b.scalar(known, u))
        else:
            own = e if e.dtype == u.dtype else b.op("Cast", e, to=int(u.dtype or 1), dtype=u.dtype)
            slope = b.op("Mul", own, b.op("Pow", u, b.op("Sub", own, b.scalar(1.0, u))))
        du = b.unbroadcast(b.op("Mul", g, slope), u, y)
    if b.wanted(e):
        positive = b.op("Greater", u, b.scalar(0.0, u), dtype=ir.DataType.BOOL)
        log = b.op("Log", b.op("Where", positive, u, b.scalar(1.0, u), dtype=u.dtype))
        de = b.unbroadcast(b.op("Mul", b.op("Mul", g, y), log), e, y)
    return du, de


arithmetic("Pow", _pow_dual, _pow_forward, _pow_back, _pow_interval, _pow_steepest, pow_vjp, curved=_whole)
