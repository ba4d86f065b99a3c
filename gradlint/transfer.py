"""The five tables, one per analysis, and the helpers that derive rows for them.

A row is a function; `gradlint/ops/*.py` own the rows, everything about an operator together. Signatures (xs, ys: one entry
per input or output, None where nothing is known; each returns one entry per output or, going backward, per input):

    moments(ctx, node, xs: Moments...)                     -> Moments of the outputs
    range(ctx, node, xs: Range...)                         -> Range of the outputs
    pullback(ctx, node, xs: Moments..., ys: Moments..., gs: Gradient...) -> Gradient of the inputs
    bound(ctx, node, xs: Range..., ys: Range...)           -> Lipschitz constant (operator norm) towards each input
    vjp(b, node, gs: ir.Value...)                          -> ir.Value of each input's gradient (b: `backward.Backward`)

None as an answer means "not known" (moments, range, bound) or "no gradient" (pullback, vjp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import dims

Function = Callable[[Array], Array]


@dataclass(frozen=True)
class Context:
    """What a row may ask: the examples per batch, the mode, constants, and whether a value depends on the model's inputs."""

    batch: int
    mode: str
    array: Callable[[ir.Value | None], np.ndarray | None]
    varies: Callable[[ir.Value | None], bool]


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

_HERMITE_ORDER = 6


def _normal_nodes(count: int) -> tuple[Array, Array]:
    """Nodes and weights with E[h(u)] = sum w h(u), u ~ N(0, 1) (Gauss-Hermite): for smooth h."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    return x, w / w.sum()


def _normal_grid(count: int) -> tuple[Array, Array]:
    """The same by a fine grid of equal cells over 8 standard deviations: for h with kinks and steps."""
    edges = np.linspace(-8.0, 8.0, count + 1)
    mass = np.diff([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
    return (edges[1:] + edges[:-1]) / 2, mass / mass.sum()


def _hermite(x: Array) -> Array:
    """Normalised Hermite polynomials He_k / sqrt(k!) at x, k = 0 .. order, shape (order + 1, len(x))."""
    rows = [np.ones_like(x), x]
    for k in range(2, _HERMITE_ORDER + 1):
        rows.append((x * rows[-1] - math.sqrt(k - 1) * rows[-2]) / math.sqrt(k))
    return np.stack(rows)


_SMOOTH = _normal_nodes(21)
_KINKED = _normal_grid(160)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """E[h(z)^2] and the squared Hermite coefficients of h for z ~ N(mean, var): coefficients[k] belongs to order k."""

    mean: Array
    second: Array
    coefficients: Array

    def correlated(self, rho: Array) -> Array:
        """E[h(z1) h(z2)] where z1, z2 have correlation rho (Mehler): sum of c_k^2 rho^k, the tail taken at the last order."""
        squares = self.coefficients
        powers = np.stack([rho**k for k in range(len(squares))])
        tail = np.maximum(self.second - squares.sum(axis=0), 0.0)
        return (squares * powers).sum(axis=0) + tail * rho ** len(squares)


def spectrum(h: Function, mean: Array, var: Array, *, kinked: bool) -> Spectrum:
    """Hermite spectrum of h under z ~ N(mean, var), per unit. Assumes the pre-activation is normal."""
    u, w = _KINKED if kinked else _SMOOTH
    mean, var = np.broadcast_arrays(mean, var)
    z = mean[..., None] + np.sqrt(var)[..., None] * u
    with np.errstate(over="ignore", invalid="ignore"):
        values = h(z)
        first = values @ w
        second = np.square(values) @ w
        coefficients = np.moveaxis(values @ (w * _hermite(u)).T, -1, 0)
    return Spectrum(first, np.maximum(second, first**2), coefficients**2)


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def apply_moments(f: Function, x: Moments, *, kinked: bool) -> Moments:
    """Moments of f(z), z ~ N(mean, var): covariances over positions and over examples by Mehler's formula."""
    s = spectrum(f, x.mean, x.var, kinked=kinked)
    square = s.mean**2
    var = s.second - square
    fixed = np.clip(s.correlated(_ratio(x.fixed, x.var)) - square, 0, var)
    shared = np.clip(s.correlated(_ratio(x.shared, x.var)) - square, 0, var - fixed)
    return Moments(s.mean, fixed, shared, var - fixed - shared)


def apply_pullback(df: Function, x: Moments, g: Gradient, *, kinked: bool) -> Gradient:
    """Second moment of g * f'(z); g and z taken as independent, slopes correlated over positions as z is."""
    s = spectrum(df, x.mean, x.var, kinked=kinked)
    shared = g.shared * np.minimum(s.correlated(_ratio(x.shared, x.var)), s.second)
    return Gradient(shared, g.total * s.second - shared)


Pair = tuple[Function, Function]


def elementwise(
    op: str,
    functions: Callable[[ir.Node], Pair],
    vjp: VjpRow,
    *,
    kinked: bool = False,
    critical: Callable[[ir.Node], Sequence[float]] = lambda node: (),
    slope: Callable[[ir.Node, Array, Array], Array | None] | None = None,
) -> None:
    """All five rows of a function of one input.

    functions(node) -> (f, f'); moments and pullback by quadrature. The range is that of f at the ends of the interval and
    at its critical points inside it (`critical`: where f' is 0 or jumps; between them f is monotone). slope(node, lo, hi)
    is an upper bound of |f'| over [lo, hi]; without it |f'| at the ends and critical points must bound it.
    """

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        return (None if xs[0] is None else apply_moments(functions(node)[0], xs[0], kinked=kinked),)

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
        return (apply_pullback(functions(node)[1], xs[0], gs[0], kinked=kinked), *none)

    def extremes(node: ir.Node, h: Function, lo: Array, hi: Array) -> tuple[Array, Array]:
        ends = np.stack([h(lo), h(hi), *(h(np.clip(np.full_like(lo, c), lo, hi)) for c in critical(node))])
        return ends.min(axis=0), ends.max(axis=0)

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        if xs[0] is None:
            return (None,)
        with np.errstate(all="ignore"):
            lo, hi = extremes(node, functions(node)[0], *np.broadcast_arrays(xs[0].lo, xs[0].hi))
        return (None if np.isnan(lo).any() or np.isnan(hi).any() else Range(lo, hi),)

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        none: tuple[float | None, ...] = (None,) * (len(node.inputs) - 1)
        lo, hi = (np.array(-np.inf), np.array(np.inf)) if xs[0] is None else np.broadcast_arrays(xs[0].lo, xs[0].hi)
        with np.errstate(all="ignore"):
            if slope is not None:
                steepest = slope(node, lo, hi)
            else:
                low, high = extremes(node, functions(node)[1], lo, hi)
                steepest = np.maximum(np.abs(low), np.abs(high))
        if steepest is None or not np.isfinite(steepest).all():
            return (None, *none)
        return (float(np.max(steepest)), *none)

    row(op, moments=moments, range=range_, pullback=pullback, bound=bound, vjp=vjp)


# -- operators that only move elements ---------------------------------------------------------------------------------

Move = Callable[[ir.Node, Array], Array]


def passthrough(op: str, move: Move, back: Move, vjp: VjpRow) -> None:
    """An operator whose output holds the elements of input 0 in another arrangement, each once.

    move(node, array) arranges an array that broadcasts against the input so that it broadcasts against the output; back is
    its inverse. The norm of the gradient is kept: the bound is 1.
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


def product(g: Gradient, x: Moments) -> Gradient:
    """Second moment of g * x at each position (g, x independent).

    The same at every position where both are: g's shared part times x's mean or shared part.
    """
    shared = g.shared * (x.mean**2 + x.shared)
    return Gradient(shared, g.shared * (x.fixed + x.local) + g.local * x.second)


def summed(ctx: Context, g: Gradient, value: ir.Value, small: tuple[int, ...], *, constant: bool) -> Gradient:
    """Second moment of a gradient shaped like `value`, summed down to the shape `small` that was broadcast to it.

    Over n positions a shared part adds coherently (n^2), a local part incoherently (n); units add incoherently. What goes
    into a `constant` (a weight) is also summed over the examples, which the loss's 1/sqrt(B) undoes.
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
    shared, local = np.broadcast_arrays(g.shared, g.local)
    units = tuple(a for a in axes if shared.shape[a] > 1)
    positions = float(math.prod(shape[a] for a in axes if shared.shape[a] == 1))
    if constant and ctx.varies(value):
        positions = max(1.0, positions / ctx.batch)
    total = (shared * positions**2 + local * positions).sum(axis=units, keepdims=True)
    return Gradient(trim(np.zeros_like(total)), trim(total))
