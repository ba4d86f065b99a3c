"""Sums, means, extremes and norms over axes.

A reduction over D elements meets three kinds of variance: a shared part adds coherently over positions (D^2), parts
that are fixed or local, and different units, add incoherently (D). See `gradlint.domain` for the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.standardization import elements
from gradlint.transfer import Context, Function, apply_moments, apply_pullback, ratio, row

Values = Sequence[ir.Value | None]


@dataclass(frozen=True)
class Reduction:
    """One reduction as the static rows see it: the input's shape, the axes summed over, how the output is arranged.

    batched: axis 0 holds the examples.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    keepdims: bool
    batched: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def examples(self) -> int:
        """How many examples are reduced together."""
        return self.shape[0] if self.batched and 0 in self.axes else 1

    def units(self, array: Array) -> int:
        """How many of the reduced elements the array tells apart."""
        return math.prod(array.shape[a] for a in self.axes)

    def drop(self, array: Array) -> Array:
        """A reduced array (size 1 along the axes) in the output's rank."""
        return array if self.keepdims else array.reshape([n for a, n in enumerate(array.shape) if a not in self.axes])

    def lift(self, array: Array) -> Array:
        """An array of the output in the input's rank."""
        return array if self.keepdims else np.expand_dims(array, self.axes)

    def alone(self, array: Array) -> bool:
        """Does no position remain in the output: is everything that varies over examples `shared` there?"""
        rest = [a for a in range(int(self.batched), len(self.shape)) if a not in self.axes]
        return all(array.shape[a] == self.shape[a] for a in rest)


def reduction(ctx: Context, node: ir.Node) -> Reduction | None:
    """None where the shape or the axes are not known, or nothing is reduced."""
    shape = dims(node.inputs[0])
    given = reduced_axes(node)
    if shape is None or given is None or math.prod(shape) == 0:
        return None
    axes = tuple(sorted(a % len(shape) for a in given))
    batched = len(shape) > 0 and shape[0] == ctx.batch and ctx.varies(node.inputs[0])
    return Reduction(shape, axes, bool(attribute(node, "keepdims", 1)), batched)


def reduced_axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes as they stand (none given: all of them, or none with noop_with_empty_axes); None where not constant."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    given = constant_array(value)
    if value is not None and given is None:
        return None
    if given is not None and given.size:
        return tuple(int(a) for a in given.ravel())
    x = node.inputs[0]
    assert x is not None
    if attribute(node, "noop_with_empty_axes", 0):
        return ()
    return None if x.shape is None else tuple(range(len(x.shape)))


# -- what all of them share --------------------------------------------------------------------------------------------


def sum_moments(r: Reduction, x: Moments) -> Moments:
    """Moments of the sum: coherent for the shared part over positions, incoherent over units and for the rest."""
    size = r.size
    mean, fixed, shared, local = np.broadcast_arrays(x.mean, x.fixed, x.shared, x.local)

    def average(array: Array) -> Array:
        return array.mean(axis=r.axes, keepdims=True)

    coherent = size**2 / (r.units(shared) * r.examples)
    y = Moments(size * average(mean), size * average(fixed), coherent * average(shared), size * average(local))
    if r.alone(mean):
        y = Moments(y.mean, y.fixed, y.shared + y.local, 0 * y.local)
    return y.map(r.drop)


def spread(r: Reduction, g: Gradient) -> Gradient:
    """The gradient of a sum: every element gets all of it, so it is the same at every reduced position."""
    g = g.map(r.lift)
    shared, local = np.broadcast_arrays(g.shared, g.local)
    return Gradient(shared + local, 0 * local) if r.alone(shared) else Gradient(shared, local)


def sum_range(r: Reduction, x: Range) -> Range:
    size = r.size

    def total(a: Array) -> Array:
        return r.drop(size * a.mean(axis=r.axes, keepdims=True))

    slack = 1e-6 * total(np.maximum(np.abs(x.lo), np.abs(x.hi)))  # float32 arithmetic of the model itself
    return Range(total(x.lo) - slack, total(x.hi) + slack)


def unreduced(b: Backward, node: ir.Node, v: ir.Value) -> ir.Value:
    """A value shaped like the output, with the reduced axes back as size 1, so that it broadcasts against the input."""
    if attribute(node, "keepdims", 1):
        return v
    axes = reduced_axes(node)
    if axes is not None:
        return b.op("Unsqueeze", v, b.constant(axes)) if axes else v
    given = node.inputs[1] if len(node.inputs) > 1 else None
    return v if given is None else b.op("Unsqueeze", v, given)  # all axes of an unknown rank: a scalar broadcasts


# -- f(sum of h(x)): every reduction but the extremes and the product --------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """h: what is summed, with its derivative and its range over an interval."""

    h: Function
    dh: Function
    ends: Callable[[Array, Array], tuple[Array, Array]]
    kinked: bool = False


def _absolute_ends(lo: Array, hi: Array) -> tuple[Array, Array]:
    low = np.where((lo <= 0) & (hi >= 0), 0.0, np.minimum(np.abs(lo), np.abs(hi)))
    return low, np.maximum(np.abs(lo), np.abs(hi))


def _square_ends(lo: Array, hi: Array) -> tuple[Array, Array]:
    low, high = _absolute_ends(lo, hi)
    return low**2, high**2


PLAIN = Terms(lambda z: z, np.ones_like, lambda lo, hi: (lo, hi))
ABSOLUTE = Terms(np.abs, np.sign, _absolute_ends, kinked=True)
SQUARE = Terms(np.square, lambda z: 2 * z, _square_ends)
EXPONENTIAL = Terms(np.exp, np.exp, lambda lo, hi: (np.exp(lo), np.exp(hi)))


@dataclass(frozen=True)
class Outer:
    """f, applied to the sum s of n terms: moments of f(s), E[f'(s)^2] (next to h'), f itself for intervals."""

    moments: Callable[[Moments, int], Moments | None]
    slope: Callable[[Moments, int], Array]
    f: Callable[[Array, int], Array]


def _log_moments(s: Moments, n: int) -> Moments | None:
    """Moments of log s, s taken as log-normal: variance log(1 + V / M^2), mean log M minus half of it."""
    if np.any(s.mean <= 0):
        return None
    relative = s.var / s.mean**2
    var = np.log1p(relative)
    shrink = ratio(var, s.var)
    return Moments(np.log(s.mean) - var / 2, s.fixed * shrink, s.shared * shrink, s.local * shrink)


def _root_moments(s: Moments, n: int) -> Moments:
    return apply_moments(lambda z: np.sqrt(np.maximum(z, 0)), s, kinked=True)


IDENTITY = Outer(lambda s, n: s, lambda s, n: np.ones_like(s.mean), lambda s, n: s)
AVERAGE = Outer(lambda s, n: s.scaled(1 / n), lambda s, n: np.full_like(s.mean, 1 / n**2), lambda s, n: s / n)
# x^2 / s sums to one: E[4 x^2 / (4 s)] = E[x^2] / E[s]
ROOT = Outer(_root_moments, lambda s, n: 0.25 / np.maximum(s.mean, 1e-300), lambda s, n: np.sqrt(np.maximum(s, 0)))
# softmax weights e^x / s: E[e^2x / s^2] taken as E[e^2x] / E[s^2], a tenth too low for five elements
LOG_OF_EXP = Outer(_log_moments, lambda s, n: 1 / s.second, lambda s, n: np.log(np.maximum(s, 1e-300)))
# E[s^-2] of a log-normal s
LOG = Outer(_log_moments, lambda s, n: (1 + s.var / s.mean**2) ** 3 / s.mean**2, lambda s, n: np.log(s))


def _reduces(
    op: str,
    terms: Terms,
    outer: Outer,
    gradient: Callable[[Backward, ir.Node, ir.Value], ir.Value],
    norm: Callable[[int, float], float | None],
) -> None:
    """All five rows of y = f(sum of h(x)).

    gradient(b, node, g): the gradient of x, given that of y; norm(n, largest |x|): the largest norm of dy/dx.
    """

    def shift_of(x: Moments) -> float:
        """exp of large numbers overflows: log-sum-exp moves with its argument, so a common shift comes out again."""
        return float(x.mean.max()) if terms is EXPONENTIAL else 0.0

    def summed_terms(r: Reduction, x: Moments) -> Moments:
        z = x if terms is PLAIN else apply_moments(terms.h, x.scaled(1.0, -shift_of(x)), kinked=terms.kinked)
        return sum_moments(r, z)

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        r, x = reduction(ctx, node), xs[0]
        if r is None or x is None:
            return (None,)
        y = outer.moments(summed_terms(r, x), r.size)
        return (None if y is None else y.scaled(1.0, shift_of(x)),)

    def pullback(
        ctx: Context,
        node: ir.Node,
        xs: Sequence[Moments | None],
        ys: Sequence[Moments | None],
        gs: Sequence[Gradient | None],
    ) -> Sequence[Gradient | None]:
        none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
        r, x, g = reduction(ctx, node), xs[0], gs[0]
        if r is None or x is None or g is None:
            return (None, *none)
        back = spread(r, g.scaled(outer.slope(summed_terms(r, x), r.size)))
        if terms is PLAIN:
            return (back, *none)
        return (apply_pullback(terms.dh, x.scaled(1.0, -shift_of(x)), back, kinked=terms.kinked), *none)

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        r, x = reduction(ctx, node), xs[0]
        if r is None or x is None:
            return (None,)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            s = sum_range(r, Range(*terms.ends(*np.broadcast_arrays(x.lo, x.hi))))
            lo, hi = outer.f(s.lo, r.size), outer.f(s.hi, r.size)
        return (None if np.isnan(lo).any() or np.isnan(hi).any() else Range(lo, hi),)

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        r, x = reduction(ctx, node), xs[0]
        largest = math.inf if x is None else float(max(np.abs(x.lo).max(), np.abs(x.hi).max()))
        most = None if r is None else norm(r.size, largest)
        return (most if most is not None and math.isfinite(most) else None, *(None,) * (len(node.inputs) - 1))

    def vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
        g = gs[0]
        return (None if g is None else gradient(b, node, g),)

    row(op, moments=moments, range=range_, pullback=pullback, bound=bound, vjp=vjp)


def _ends_of(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x = node.inputs[0]
    assert x is not None
    return x, node.outputs[0]


def spread_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g at every reduced element."""
    x, _ = _ends_of(node)
    return b.op("Expand", unreduced(b, node, g), b.shape(x))


def _mean_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g / n."""
    x, y = _ends_of(node)
    shape, axes = dims(x), reduced_axes(node)
    if shape is not None and axes is not None:
        n = b.scalar(1 / max(1, math.prod(shape[a] for a in axes)), g)
        return spread_vjp(b, node, b.op("Mul", g, n))
    return spread_vjp(b, node, b.op("Div", g, elements(b, x, y)))


def _absolute_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g sign x."""
    return b.op("Mul", b.op("Sign", node.inputs[0]), unreduced(b, node, g))


def _square_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = 2 g x."""
    return b.op("Mul", node.inputs[0], unreduced(b, node, b.op("Mul", g, b.scalar(2.0, g))))


def _norm_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g x / y; 0 where the norm is 0."""
    x, y = _ends_of(node)
    zero = b.op("Equal", y, b.scalar(0.0, y), dtype=ir.DataType.BOOL)
    rate = b.op("Where", zero, b.scalar(0.0, y), b.op("Div", g, y), dtype=g.dtype)
    return b.op("Mul", x, unreduced(b, node, rate))


def _log_sum_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g / s with s = exp y."""
    return spread_vjp(b, node, b.op("Div", g, b.op("Exp", node.outputs[0])))


def _log_sum_exp_vjp(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """dx = g exp(x - y): softmax weights."""
    x, y = _ends_of(node)
    return b.op("Mul", b.op("Exp", b.op("Sub", x, unreduced(b, node, y))), unreduced(b, node, g))


_reduces("ReduceSum", PLAIN, IDENTITY, spread_vjp, lambda n, largest: math.sqrt(n))
_reduces("ReduceMean", PLAIN, AVERAGE, _mean_vjp, lambda n, largest: 1 / math.sqrt(n))
_reduces("ReduceL1", ABSOLUTE, IDENTITY, _absolute_vjp, lambda n, largest: math.sqrt(n))
_reduces("ReduceL2", SQUARE, ROOT, _norm_vjp, lambda n, largest: 1.0)
_reduces("ReduceSumSquare", SQUARE, IDENTITY, _square_vjp, lambda n, largest: 2 * math.sqrt(n) * largest)
_reduces("ReduceLogSum", PLAIN, LOG, _log_sum_vjp, lambda n, largest: None)
_reduces("ReduceLogSumExp", EXPONENTIAL, LOG_OF_EXP, _log_sum_exp_vjp, lambda n, largest: 1.0)


# -- ReduceProd --------------------------------------------------------------------------------------------------------


def _product_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Independent factors: the mean is the product of means, the second moment that of second moments, all local."""
    r, x = reduction(ctx, node), xs[0]
    if r is None or x is None:
        return (None,)

    def power(a: Array) -> Array:
        a = np.broadcast_to(a, np.broadcast(x.mean, x.var).shape)
        return r.drop(a.prod(axis=r.axes, keepdims=True) ** (r.size / r.units(a)))

    mean, second = power(x.mean), power(x.second)
    rest = np.maximum(second - mean**2, 0)
    only = r.alone(np.broadcast_to(x.mean, np.broadcast(x.mean, x.var).shape))
    return (Moments(mean, 0 * rest, rest * only, rest * (not only)),)


def _product_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """E[dx^2] = q times the second moments of the other factors."""
    none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
    r, x, y, g = reduction(ctx, node), xs[0], ys[0], gs[0]
    if r is None or x is None or y is None or g is None:
        return (None, *none)
    others = r.lift(y.second) / np.maximum(x.second, 1e-300)
    total = spread(r, g).total * others
    return (Gradient(0 * total, total), *none)


def _product_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx_i = g times the product of the other factors: y / x_i, or, for the one zero among them, their own product."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    noop = attribute(node, "noop_with_empty_axes", 0)
    zero, one = b.scalar(0.0, x), b.scalar(1.0, x)
    is_zero = b.op("Equal", x, zero, dtype=ir.DataType.BOOL)
    safe = b.op("Where", is_zero, one, x, dtype=x.dtype)
    rest = b.op("ReduceProd", safe, axes, keepdims=1, noop_with_empty_axes=noop)
    flags = b.op("Where", is_zero, one, zero, dtype=x.dtype)
    zeros = b.op("ReduceSum", flags, axes, keepdims=1, noop_with_empty_axes=noop)
    # the zeros among the *other* factors decide
    alone = b.op("Equal", b.op("Sub", zeros, flags), zero, dtype=ir.DataType.BOOL)
    others = b.op("Where", alone, b.op("Div", rest, safe), zero, dtype=x.dtype)
    return (b.op("Mul", others, unreduced(b, node, g)),)


row("ReduceProd", moments=_product_moments, pullback=_product_pullback, vjp=_product_vjp)
