"""The five tables, one per analysis, and the helpers that derive rows for them.

A row is a function; `gradlint/ops/*.py` own the rows, everything about an operator together. Signatures (xs, ys: one
entry per input or output, None where nothing is known; each returns one per output or, going backward, per input):

    moments(ctx, node, xs: Moments...)                     -> Moments of the outputs
    range(ctx, node, xs: Range...)                         -> Range of the outputs
    pullback(ctx, node, xs: Moments..., ys: Moments..., gs: Gradient...) -> Gradient of the inputs
    bound(ctx, node, xs: Range..., ys: Range...)           -> Lipschitz constant (operator norm) towards each input
    vjp(b, node, gs: ir.Value...)                          -> ir.Value of each input's gradient (b: `backward.Backward`)

None as an answer means "not known" (moments, range, bound) or "no gradient" (pullback, vjp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import dims
from gradlint.quadrature import Function, Piecewise, Spectrum, halves, spectrum, third_moments
from gradlint.runs import grouped


@dataclass(frozen=True)
class Context:
    """What a row may ask: the examples per batch, the mode, constants, and whether a value depends on the inputs.

    moments: what the forward sweep has found so far; corrections: kept by `composition` for nodes already looked at.
    For nodes with bodies: forward(body) finds the moments inside from those of the body's inputs; backward(body, seeds)
    the gradients of what the body computes and reads; what it reads from outside gets its own added to `gradients`;
    profiles: norms of the gradient of a Loop's or Scan's states before each step, and behind it.
    """

    batch: int
    mode: str
    array: Callable[[ir.Value | None], np.ndarray | None]
    varies: Callable[[ir.Value | None], bool]
    moments: dict[ir.Value, Moments] = field(default_factory=dict)
    corrections: dict[ir.Node, Array | None] = field(default_factory=dict)
    gradients: dict[ir.Value, Gradient] = field(default_factory=dict)
    profiles: dict[ir.Node, Array] = field(default_factory=dict)
    forward: Callable[[ir.Graph], None] | None = None
    backward: Callable[[ir.Graph, Mapping[ir.Value, Gradient]], dict[ir.Value, Gradient]] | None = None


MomentsRow = Callable[[Context, ir.Node, Sequence[Moments | None]], Sequence[Moments | None]]
RangeRow = Callable[[Context, ir.Node, Sequence[Range | None]], Sequence[Range | None]]
PullbackRow = Callable[
    [Context, ir.Node, Sequence[Moments | None], Sequence[Moments | None], Sequence[Gradient | None]],
    Sequence[Gradient | None],
]
BoundRow = Callable[[Context, ir.Node, Sequence[Range | None], Sequence[Range | None]], Sequence[float | None]]
VjpRow = Callable[[Backward, ir.Node, Sequence[ir.Value | None]], Sequence[ir.Value | None]]

MOMENTS: dict[str, MomentsRow] = {}
RANGE: dict[str, RangeRow] = {}
PULLBACK: dict[str, PullbackRow] = {}
BOUND: dict[str, BoundRow] = {}
VJP: dict[str, VjpRow] = {}
TABLES: dict[str, dict[str, Any]] = {
    "moments": MOMENTS,
    "range": RANGE,
    "pullback": PULLBACK,
    "bound": BOUND,
    "vjp": VJP,
}

# Operators declared to have no gradient (not merely without a row).
BLOCKED: set[str] = set()


def row(
    op: str,
    *,
    moments: MomentsRow | None = None,
    range: RangeRow | None = None,
    pullback: PullbackRow | None = None,
    bound: BoundRow | None = None,
    vjp: VjpRow | None = None,
) -> None:
    """Enter an operator's rows; a second row for the same operator and table raises."""
    given = {"moments": moments, "range": range, "pullback": pullback, "bound": bound, "vjp": vjp}
    for name, function in given.items():
        if function is None:
            continue
        if op in TABLES[name]:
            raise ValueError(f"{op} already has a {name} row")
        TABLES[name][op] = function


def blocks(*ops: str) -> None:
    """Operators without a gradient by nature: rounding, comparison, selection of indices, integers, shapes."""

    def nothing(*args: Any) -> tuple[None, ...]:
        return (None,) * len(args[1].inputs)

    for op in ops:
        row(op, pullback=nothing, bound=nothing, vjp=nothing)
        BLOCKED.add(op)


# -- elementwise functions of one input --------------------------------------------------------------------------------

Pair = tuple[Function, Function]


@dataclass(frozen=True)
class Elementwise:
    """What is known about a function of one input.

    functions(node) -> (f, f'); kinked: f or f' jumps; critical(node): where f' is 0 or jumps and where |f'| has maxima;
    slope(node, lo, hi): an upper bound of |f'| over an interval, where that of its ends and critical points isn't one;
    positive: defined for z > 0 only, so z is taken as log-normal instead of normal.
    """

    functions: Callable[[ir.Node], Pair]
    kinked: bool = False
    critical: Callable[[ir.Node], Sequence[float]] = lambda node: ()
    slope: Callable[[ir.Node, Array, Array], Array | None] | None = None
    positive: bool = False


# Every function of one input, by operator: the rows, composed functions and slopes all read this one definition.
ELEMENTWISE: dict[str, Elementwise] = {}


def ratio(part: Array, whole: Array) -> Array:
    """part / whole, 0 where there is no whole."""
    return part / np.where(whole > 0, whole, np.inf)


def apply_moments(
    f: Function, x: Moments, *, kinked: bool, kinks: Sequence[float] = (), per_unit: bool = False
) -> Moments:
    """Moments of f(z), z ~ N(mean, var): covariances over positions and over examples by Mehler's formula."""
    s = spectrum(f, x.mean, x.var, kinked=kinked, kinks=kinks, per_unit=per_unit)
    s, skew = _skewed(f, x, s)
    square = s.mean**2
    var = s.second - square
    fixed = np.clip(s.correlated(ratio(x.fixed, x.var)) - square, 0, var) if x.fixed.any() else np.zeros_like(var)
    shared = s.correlated(ratio(x.shared, x.var)) - square if x.shared.any() else np.zeros_like(var)
    shared = np.clip(shared, 0, var - fixed)
    return Moments(s.mean, fixed, shared, var - fixed - shared, skew)


def _skewed(f: Function, x: Moments, s: Spectrum) -> tuple[Spectrum, Array | None]:
    """The spectrum under x's own skewness, and what f makes of that; piecewise linear f only, which rectify.

    The shape of the spectrum from order 1 on is kept, its size is as the variance's.
    """
    if not _plain(f):
        return s, None
    mean, second, skew = third_moments(f, x.mean, x.var, x.skew)
    if x.skew is None:
        return s, skew
    share = ratio(second - mean**2, s.second - s.mean**2)
    return Spectrum(mean, second, np.stack([mean**2, *(c * share for c in s.coefficients[1:])])), skew


def apply_pullback(
    df: Function, x: Moments, g: Gradient, *, kinked: bool, kinks: Sequence[float] = (), per_unit: bool = False
) -> Gradient:
    """Second moment of g * f'(z); g and z taken as independent, slopes correlated over positions as z is.

    E[f'(z) z] of g's shared part goes along with z, and what went along with f(z) still does, as far as it passes;
    their signs are taken as equal (activations are steeper above than below).
    """
    s = spectrum(df, x.mean, x.var, kinked=kinked, kinks=kinks, per_unit=per_unit)
    s, _ = _skewed(df, x, s)
    total, upper = g.total * s.second, None
    if _plain(df):
        lower, upper = halves(df, x.mean, x.var, x.skew)
        above = g.total if g.upper is None else g.upper
        upper = above * upper
        total = (np.maximum(2 * g.total - above, 0) * lower + upper) / 2
    shared = np.zeros_like(s.second)
    if g.shared.any():
        shared = np.minimum(g.shared * np.minimum(s.correlated(ratio(x.shared, x.var)), s.second), total)
    aligned = np.sqrt(g.shared * s.coefficients[1]) + (0 if g.aligned is None else np.sqrt(g.aligned * s.second))
    return Gradient(shared, total - shared, aligned=np.minimum(np.square(aligned), total), upper=upper)


def _plain(f: Function) -> TypeGuard[Piecewise]:
    """Is f piecewise linear, and the same for every unit?"""
    return isinstance(f, Piecewise) and not any(np.ndim(level) for level in (*f.breaks, *f.slopes, *f.offsets))


def logarithmic(x: Moments) -> Moments:
    """Moments of ln z for z log-normal with the given ones; |mean| at least half a standard deviation is assumed."""
    level = np.maximum(np.maximum(np.abs(x.mean), 0.5 * np.sqrt(x.var)), 1e-150)
    spread = np.log1p(x.var / level**2)
    part = ratio(spread, x.var)
    return Moments(np.log(level) - spread / 2, x.fixed * part, x.shared * part, x.local * part)


def derivative(op: str, node: ir.Node) -> tuple[Function, Function, float | None]:
    """f, f' and sup |f'| (None: unbounded) of an operator in ELEMENTWISE."""
    rule = ELEMENTWISE[op]
    f, df = rule.functions(node)
    return f, df, _finite_max(steepest(rule, node, np.array(-np.inf), np.array(np.inf)))


def _finite_max(slope: Array | None) -> float | None:
    return None if slope is None or not np.isfinite(slope).all() else float(np.max(slope))


def extremes(rule: Elementwise, node: ir.Node, h: Function, lo: Array, hi: Array) -> tuple[Array, Array]:
    """Smallest and largest value of f or f' over [lo, hi], from its ends and critical points."""
    lo, hi = np.asarray(lo, float), np.asarray(hi, float)
    if isinstance(h, Piecewise):
        low, high = np.array(np.inf), np.array(-np.inf)
        for a, b, there in h.over(lo, hi):
            low = np.minimum(low, np.where(there, np.fmin(a, b), np.inf))
            high = np.maximum(high, np.where(there, np.fmax(a, b), -np.inf))
        return low, high
    points = np.stack([lo, hi, *(np.clip(c, lo, hi) for c in rule.critical(node))])
    values = np.stack([h(p) for p in points])
    return values.min(axis=0), values.max(axis=0)


def steepest(rule: Elementwise, node: ir.Node, lo: Array, hi: Array) -> Array | None:
    """An upper bound of |f'| over [lo, hi]; None or infinite where there is none."""
    with np.errstate(all="ignore"):
        if rule.slope is not None:
            return rule.slope(node, lo, hi)
        low, high = extremes(rule, node, rule.functions(node)[1], lo, hi)
        return np.maximum(np.abs(low), np.abs(high))


def elementwise(
    op: str,
    functions: Callable[[ir.Node], Pair],
    vjp: VjpRow,
    *,
    kinked: bool = False,
    critical: Callable[[ir.Node], Sequence[float]] = lambda node: (),
    slope: Callable[[ir.Node, Array, Array], Array | None] | None = None,
    positive: bool = False,
    others: Callable[[Context, ir.Node, Moments, Gradient], Sequence[Gradient | None]] | None = None,
    exact: Callable[[ir.Node], Pair] | None = None,
) -> None:
    """All five rows of a function of one input (parameters as in `Elementwise`; others: gradients of further inputs).

    exact: (f, f') for range and bound, where `functions` averages over positions.
    Moments and pullback by quadrature, in closed form where `functions` gives a `Piecewise`. The range is that of f at
    the ends of the interval and at its critical points inside it; between them f is monotone.
    """
    rule = ELEMENTWISE[op] = Elementwise(functions, kinked, critical, slope, positive)
    sharp = rule if exact is None else replace(rule, functions=exact)

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        return (None if xs[0] is None else _apply(rule, node, xs[0], functions(node)[0]),)

    def pullback(
        ctx: Context,
        node: ir.Node,
        xs: Sequence[Moments | None],
        ys: Sequence[Moments | None],
        gs: Sequence[Gradient | None],
    ) -> Sequence[Gradient | None]:
        none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
        if xs[0] is None or gs[0] is None:
            return (gs[0], *none)
        rest = none if others is None else others(ctx, node, xs[0], gs[0])
        return (pull(rule, node, xs[0], gs[0]), *rest)

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        if xs[0] is None:
            return (None,)
        with np.errstate(all="ignore"):
            lo, hi = extremes(sharp, node, sharp.functions(node)[0], *np.broadcast_arrays(xs[0].lo, xs[0].hi))
        return (None if np.isnan(lo).any() or np.isnan(hi).any() else Range(lo, hi),)

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        none: tuple[float | None, ...] = (None,) * (len(node.inputs) - 1)
        lo, hi = (np.array(-np.inf), np.array(np.inf)) if xs[0] is None else np.broadcast_arrays(xs[0].lo, xs[0].hi)
        return (_finite_max(steepest(sharp, node, lo, hi)), *none)

    row(op, moments=moments, range=range_, pullback=pullback, bound=bound, vjp=vjp)


def _apply(rule: Elementwise, node: ir.Node, x: Moments, f: Function) -> Moments:
    if rule.positive:
        return apply_moments(lambda u: f(np.exp(u)), logarithmic(x), kinked=False)
    return apply_moments(f, x, kinked=rule.kinked, kinks=rule.critical(node) if rule.kinked else ())


def pull(rule: Elementwise, node: ir.Node, x: Moments, g: Gradient) -> Gradient:
    """The gradient of a function's input from that of its output."""
    df = rule.functions(node)[1]
    if rule.positive:
        return apply_pullback(lambda u: df(np.exp(u)), logarithmic(x), g, kinked=False)
    return apply_pullback(df, x, g, kinked=rule.kinked, kinks=rule.critical(node) if rule.kinked else ())


# -- operators that only move elements ---------------------------------------------------------------------------------

Move = Callable[[ir.Node, Array], Array]


def passthrough(op: str, move: Move, back: Move, vjp: VjpRow) -> None:
    """An operator whose output holds the elements of input 0 in another arrangement, each once.

    move(node, array) arranges an array that broadcasts against the input so that it broadcasts against the output; back
    is its inverse. The norm of the gradient is kept: the bound is 1.
    """

    def rest(node: ir.Node) -> tuple[None, ...]:
        return (None,) * (len(node.inputs) - 1)

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        return (None if xs[0] is None else xs[0].map(lambda a: move(node, a)),)

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        return (None if xs[0] is None else xs[0].map(lambda a: move(node, a)),)

    def pullback(
        ctx: Context,
        node: ir.Node,
        xs: Sequence[Moments | None],
        ys: Sequence[Moments | None],
        gs: Sequence[Gradient | None],
    ) -> Sequence[Gradient | None]:
        return (None if gs[0] is None else gs[0].map(lambda a: back(node, a)), *rest(node))

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        return (1.0, *rest(node))

    row(op, moments=moments, range=range_, pullback=pullback, bound=bound, vjp=vjp)


# -- products and sums over positions ----------------------------------------------------------------------------------


def product(g: Gradient, x: Moments, along: Array | float = 0.0) -> Gradient:
    """Second moment of g * x at each position (g, x independent but for what goes along with x).

    The same at every position where both are: g's shared part times x's mean or shared part; so is balanced what g's
    balanced part makes of these, and what g's aligned part makes of x, `along` being the squared correlation of x with
    the value g belongs to.
    """
    common = x.mean**2 + x.shared
    balanced = None if g.balanced is None else g.balanced * common
    shared, local = g.shared * common, g.shared * (x.fixed + x.local) + g.local * x.second
    if g.aligned is not None and np.any(along):
        extra = np.minimum(g.aligned * along * (x.fixed + x.local), local)
        shared, local = shared + extra, local - extra
    return Gradient(shared, local, balanced)


def over_tokens(g: Gradient, x: Moments, among: Sequence[int] | None = None) -> Gradient:
    """g averaged over the tokens it tells apart where x does not: the shared part keeps its coherence.

    among: the axes that may be tokens (default: all but the last).
    """
    sizes = np.broadcast_shapes(x.mean.shape, x.second.shape)
    axes = tuple(a for a in (range(len(sizes) - 1) if among is None else among) if sizes[a] == 1)
    axes = tuple(a for a in axes if max(g.shared.shape[a], g.local.shape[a]) > 1)
    if not axes:
        return g
    shared, local = np.broadcast_arrays(g.shared, g.local)
    same = np.sqrt(shared).mean(axis=axes, keepdims=True) ** 2
    return Gradient(same, local.mean(axis=axes, keepdims=True) + shared.mean(axis=axes, keepdims=True) - same)


def summed(ctx: Context, g: Gradient, value: ir.Value, small: tuple[int, ...], *, constant: bool) -> Gradient:
    """Second moment of a gradient shaped like `value`, summed down to the shape `small` that was broadcast to it.

    Over n positions, or groups of them, a shared part adds coherently (n^2), a local part incoherently (n), a balanced
    part to zero; units add incoherently. What goes into a `constant` (a weight) is also summed over the examples, which
    the loss's 1/sqrt(B) undoes. Where positions remain, what was the same at all of them still is.
    """
    shape = dims(value)
    if shape is None:
        return g
    rank = len(small)
    small = (1,) * (len(shape) - rank) + small
    axes = [a for a, (n, m) in enumerate(zip(shape, small, strict=True)) if m == 1 and n > 1]

    def trim(a: Array) -> Array:
        return a.reshape(a.shape[a.ndim - rank :])

    if not axes:
        return g.map(trim)
    x = ctx.moments.get(value)
    if x is not None and x.mean.ndim == g.shared.ndim and all(small[a] == 1 for a in range(len(small) - 1)):
        g = over_tokens(g, x)
    shared, local = np.broadcast_arrays(g.shared, g.local)
    units = tuple(a for a in axes if shared.shape[a] > 1)
    positions = float(math.prod(shape[a] for a in axes if shared.shape[a] == 1))
    if constant and ctx.varies(value):
        positions = max(1.0, positions / ctx.batch)
    tokens = tuple(a for a in units if a in grouped(shared))
    same = np.sqrt(shared).sum(axis=tokens, keepdims=True) ** 2 * positions**2
    same = same.sum(axis=tuple(a for a in units if a not in tokens), keepdims=True)
    left = any(n > 1 and m == 1 for n, m in list(zip(small, same.shape, strict=True))[1:])
    if g.balanced is not None and not left:
        local = np.maximum(local - g.balanced, 0)
    rest = (local * positions).sum(axis=units, keepdims=True)
    if constant or not left:  # no positions remain along which it could be the same
        same, rest = np.zeros_like(rest), same + rest
    return Gradient(trim(same), trim(rest))
