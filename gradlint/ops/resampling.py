"""GridSample: the input read at the points of a grid; AffineGrid: the grid of an affine map.

A coordinate c in [-1, 1] is the position x = (c + 1) / 2 * (n - 1), or ((c + 1) n - 1) / 2 without align_corners. The
value there is a sum over taps along each axis of weights, functions of x - floor(x), times elements; padding says which
element a tap outside the map reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.convolution import collapsed, collapsed_gradient
from gradlint.ops.convolution_gradient import layout
from gradlint.quadrature import above
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
_A = -0.75  # Keys' coefficient, fixed by ONNX
_INT = ir.DataType.INT64

# Powers 0 .. 3 of r = x - floor(x), lowest first, of the weight of each tap; taps start at floor(x) + `_FIRST`.
_TAPS: dict[str, list[list[float]]] = {
    "linear": [[1.0, -1.0], [0.0, 1.0]],
    "cubic": [
        [0.0, _A, -2 * _A, _A],
        [1.0, 0.0, -(_A + 3), _A + 2],
        [0.0, -_A, 2 * _A + 3, -(_A + 2)],
        [0.0, 0.0, _A, -_A],
    ],
    "nearest": [[1.0]],
}
_FIRST = {"linear": 0, "cubic": -1, "nearest": 0}


def _mode(node: ir.Node) -> str:
    mode = str(attribute(node, "mode", "linear"))
    return {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)


# -- gradient ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """One tap along one axis: the element it reads, its weight and the weight's derivative, each (N, points)."""

    index: ir.Value
    weight: ir.Value
    slope: ir.Value | None


def _polynomial(b: Backward, r: ir.Value, powers: Sequence[float]) -> ir.Value:
    """Horner's rule."""
    total = b.op("Add", b.op("Mul", r, b.scalar(0.0, r)), b.scalar(powers[-1], r))
    for power in reversed(powers[:-1]):
        total = b.op("Add", b.op("Mul", total, r), b.scalar(power, r))
    return total


def _size(b: Backward, x: ir.Value, axis: int) -> ir.Value:
    """A size as an int64 vector of one element."""
    return layout(b, (x, axis, axis + 1))


def _taps(b: Backward, node: ir.Node, x: ir.Value, c: ir.Value, axis: int) -> list[Tap]:
    """The taps along spatial axis `axis` for the coordinates c, (N, points)."""
    mode, aligned = _mode(node), bool(attribute(node, "align_corners", 0))
    assert c.dtype is not None
    size = _size(b, x, axis)
    n = b.op("Cast", size, to=c.dtype, dtype=c.dtype)
    half, one = b.scalar(0.5, c), b.scalar(1.0, c)
    scale = b.op("Mul", b.op("Sub", n, one) if aligned else n, half)
    position = b.op("Mul", b.op("Add", c, one), scale)
    position = position if aligned else b.op("Sub", position, half)
    floor = b.op("Round" if mode == "nearest" else "Floor", position)
    r = b.op("Sub", position, floor)
    whole = b.op("Cast", floor, to=_INT, dtype=_INT)
    found = []
    for k, powers in enumerate(_TAPS[mode]):
        place = b.op("Add", whole, b.constant([_FIRST[mode] + k]))
        index, inside = _padded(b, node, place, size)
        slopes = [p * power for p, power in enumerate(powers)][1:]
        weight = _polynomial(b, r, powers)
        slope = b.op("Mul", _polynomial(b, r, slopes), scale) if slopes else None
        if inside is not None:
            zero = b.scalar(0.0, weight)
            weight = b.op("Where", inside, weight, zero, dtype=weight.dtype)
            slope = None if slope is None else b.op("Where", inside, slope, zero, dtype=weight.dtype)
        found.append(Tap(index, weight, slope))
    return found


def _padded(b: Backward, node: ir.Node, place: ir.Value, size: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The element a tap at `place` reads, and (padding by zeros) whether it reads one."""
    mode, zero, one = attribute(node, "padding_mode", "zeros"), b.constant([0]), b.constant([1])
    last = b.op("Sub", size, one)
    if mode == "reflection":  # at the outer elements' centres (align_corners) or at their outer edges
        aligned = bool(attribute(node, "align_corners", 0))
        turn = b.op("Max", last, one) if aligned else size
        period = b.op("Mul", turn, b.constant([2]))
        ahead = b.op("Mod", place, period)
        mirrored = b.op("Sub", period if aligned else b.op("Sub", period, one), ahead)
        return b.op("Min", b.op("Min", ahead, mirrored), last), None
    index = b.op("Min", b.op("Max", place, zero), last)
    return index, b.op("Equal", index, place, dtype=ir.DataType.BOOL) if mode == "zeros" else None


def _product(b: Backward, factors: Sequence[ir.Value]) -> ir.Value:
    total = factors[0]
    for factor in factors[1:]:
        total = b.op("Mul", total, factor)
    return total


def grid_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx: g times the weights, added up at the elements read. dgrid: g times the elements, by the weights' slopes."""
    x, grid, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert grid is not None
    assert g is not None
    rank = len(x.shape) - 2 if x.shape is not None else 2
    points = b.op("Reshape", grid, b.constant([0, -1, rank]))
    along = []
    for axis in range(rank):  # the grid's last axis counts from the last spatial axis
        c = b.op("Gather", points, b.constant(rank - 1 - axis), axis=2)
        along.append(_taps(b, node, x, c, 2 + axis))
    flat_g, flat_x = (b.op("Reshape", v, b.constant([0, 0, -1])) for v in (g, x))
    shape = b.op("Shape", flat_g, dtype=_INT)
    dx: ir.Value | None = None
    slopes: list[ir.Value | None] = [None] * rank
    for taps in itertools.product(*along):
        place = taps[0].index
        for axis in range(1, rank):
            place = b.op("Add", b.op("Mul", place, _size(b, x, 2 + axis)), taps[axis].index)
        everywhere = b.op("Expand", b.op("Unsqueeze", place, b.constant([1])), shape)
        if b.wanted(x):
            weight = b.op("Unsqueeze", _product(b, [t.weight for t in taps]), b.constant([1]))
            dx = dx if dx is not None else b.op("Mul", flat_x, b.scalar(0.0, flat_x))
            dx = b.op("ScatterElements", dx, everywhere, b.op("Mul", flat_g, weight), axis=2, reduction="add")
        if b.wanted(grid):
            read = b.op("GatherElements", flat_x, everywhere, axis=2)
            felt = b.sum_over(b.op("Mul", flat_g, read), [1])
            for axis, tap in enumerate(taps):
                if tap.slope is not None:
                    others = [t.weight for k, t in enumerate(taps) if k != axis]
                    term = _product(b, [felt, tap.slope, *others])
                    before = slopes[axis]
                    slopes[axis] = term if before is None else b.op("Add", before, term)
    if dx is not None:
        dx = b.op("Reshape", dx, b.shape(x))
    if not b.wanted(grid):
        return dx, None
    zero = b.op("Mul", grid, b.scalar(0.0, grid))
    parts = [s for s in reversed(slopes) if s is not None]
    if not parts:
        return dx, zero  # the nearest element does not move with the grid
    stacked = b.op("Concat", *(b.op("Unsqueeze", p, b.constant([2])) for p in parts), axis=2)
    return dx, b.op("Reshape", stacked, b.shape(grid))


# -- estimate ----------------------------------------------------------------------------------------------------------


def _energies(mode: str) -> tuple[float, float]:
    """Means over r in [0, 1] of the sum over taps of the weight squared, and of its derivative squared."""
    r = (np.arange(1000) + 0.5) / 1000
    weights = [np.polynomial.polynomial.polyval(r, p) for p in _TAPS[mode]]
    slopes = [np.polynomial.polynomial.polyval(r, np.polynomial.polynomial.polyder(p)) for p in _TAPS[mode]]
    return float(sum(np.mean(w**2) for w in weights)), float(sum(np.mean(s**2) for s in slopes))


def _inside(node: ir.Node, grid: Moments | None, rank: int) -> float:
    """The share of points that read the map: with zero padding those in [-1, 1], coordinates taken as normal."""
    if attribute(node, "padding_mode", "zeros") != "zeros" or grid is None:
        return 1.0
    share = 1.0
    for axis in range(rank):
        mean, var = (np.asarray(np.broadcast_to(a, (*a.shape[:-1], rank))[..., axis]) for a in (grid.mean, grid.var))
        std = np.sqrt(np.maximum(var, 1e-300))
        share *= float(np.mean(above((-1 - mean) / std) - above((1 - mean) / std)))
    return share


def grid_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Points lie anywhere between elements: the mean over that of the weights' squares; points outside read 0."""
    x = xs[0]
    if x is None:
        return (None,)
    rank, x = x.mean.ndim - 2, collapsed(x)
    share, energy = _inside(node, xs[1], rank), _energies(_mode(node))[0] ** rank
    mean = x.mean * share
    second = share * (x.mean**2 + x.shared + (x.local + x.fixed) * energy)
    shared = x.shared * share**2
    return (Moments(mean, np.zeros_like(mean), shared, np.maximum(second - mean**2 - shared, 0.0)),)


def grid_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dx: as forward, points per element; dgrid: over channels, the neighbours' variance times the weights' slopes."""
    x, g = xs[0], gs[0]
    sizes, outs = dims(node.inputs[0]), dims(node.outputs[0])
    if x is None or g is None or sizes is None or outs is None:
        return (None, None)
    rank, x, g = len(sizes) - 2, collapsed(x), collapsed_gradient(g)
    energy, steep = _energies(_mode(node))
    share, density = _inside(node, xs[1], rank), math.prod(outs[2:]) / math.prod(sizes[2:])
    local = (g.shared + g.local) * (density * share * energy**rank)
    level = g.shared * (density * share) ** 2
    dx = Gradient(level, np.maximum(local, 0.0))
    corner = bool(attribute(node, "align_corners", 0))
    felt = float(np.mean(g.total) * np.mean(x.local + x.fixed)) * sizes[1] * steep * energy ** (rank - 1) * share
    per_axis = np.array([felt * ((n - corner) / 2) ** 2 for n in reversed(sizes[2:])])
    dgrid = per_axis.reshape((1,) * (rank + 1) + (rank,))
    return dx, Gradient(np.zeros_like(dgrid), dgrid)


def grid_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """A mean of elements, or 0; cubic weights add up to at most (1 - a) in size per axis with a = -0.75."""
    x = xs[0]
    if x is None:
        return (None,)
    axes = tuple(range(2, x.lo.ndim))
    lo = np.minimum(x.lo.min(axis=axes, keepdims=True), 0.0)
    hi = np.maximum(x.hi.max(axis=axes, keepdims=True), 0.0)
    if _mode(node) != "cubic":
        return (Range(lo * (1 + 1e-5), hi * (1 + 1e-5)),)
    top = np.maximum(-lo, hi) * (1 - _A) ** len(axes) * (1 + 1e-5)
    return (Range(-top, top),)


row("GridSample", moments=grid_moments, range=grid_range, pullback=grid_pullback, vjp=grid_vjp)


# -- AffineGrid --------------------------------------------------------------------------------------------------------


def _coordinates(sizes: Sequence[int], aligned: bool) -> list[Array]:
    """The coordinates along each spatial axis, x first (as in theta's columns)."""
    found = []
    for n in reversed(sizes):
        if aligned:
            found.append(np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1))
        else:
            found.append((2 * np.arange(n) + 1) / n - 1)
    return found


def affine_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dtheta = sum over points of g (x, y, .., 1); the coordinates are the grid of the identity."""
    theta, size, g = node.inputs[0], node.inputs[1], gs[0]
    assert theta is not None
    assert g is not None
    assert g.dtype is not None
    rank = (node.outputs[0].shape.rank() - 2) if node.outputs[0].shape is not None else int(theta.shape[1])  # type: ignore[index, arg-type]
    kind, aligned = g.dtype.numpy(), attribute(node, "align_corners", 0)
    identity = b.constant(np.eye(rank, rank + 1)[None], kind)
    rest = b.op("Slice", size, b.constant([1]), b.constant([rank + 2]), b.constant([0]), dtype=_INT)
    single = b.op("Concat", b.constant([1]), rest, axis=0)
    grid = b.op("AffineGrid", identity, single, align_corners=aligned)
    points = b.op("Pad", b.op("Reshape", grid, b.constant([-1, rank])), b.constant([0, 0, 0, 1]), b.scalar(1.0, g))
    columns = b.op("Transpose", b.op("Reshape", g, b.constant([0, -1, rank])), perm=[0, 2, 1])
    return b.op("MatMul", columns, points), None


def affine_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """grid = A p + t: t is the same at every point, A p varies with the point and averages to 0."""
    x, y, shape = xs[0], dims(node.outputs[0]), dims(node.inputs[0])
    if x is None or y is None or shape is None:
        return (None,)
    rank = shape[1]
    spread = [float(np.mean(c**2)) for c in _coordinates(y[1:-1], bool(attribute(node, "align_corners", 0)))]

    def columns(a: Array) -> tuple[Array, Array]:
        wide = np.broadcast_to(a.mean(axis=0), shape[1:])
        return (wide[:, :rank] * spread).sum(axis=1), wide[:, rank]

    square, _ = columns(x.mean**2)
    moved, shift = columns(x.var)
    (_, mean) = columns(x.mean)
    found = (mean, square, shift, moved)
    return (Moments(*(np.asarray(a).reshape((1,) * (rank + 1) + (rank,)) for a in found)),)


def affine_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Sums over the points: coherent for what is shared (only t feels it, coordinates average to 0), else not."""
    g, y, shape = gs[0], dims(node.outputs[0]), dims(node.inputs[0])
    if g is None or y is None or shape is None:
        return (None, None)
    rank, count = shape[1], math.prod(y[1:-1])
    axes = tuple(range(g.local.ndim - 1))
    coordinates = _coordinates(y[1:-1], bool(attribute(node, "align_corners", 0)))
    squares = np.array([*(float(np.mean(c**2)) for c in coordinates), 1.0])
    means = np.array([*(float(np.mean(c)) for c in coordinates), 1.0])
    shared, local = (np.broadcast_to(a.mean(axis=axes), (rank,))[:, None] for a in (g.shared, g.local))
    total = shared * count**2 * means**2 + local * count * squares
    return Gradient(np.zeros((1, 1, 1)), total[None]), None


def affine_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Coordinates are within [-1, 1]."""
    x, shape = xs[0], dims(node.inputs[0])
    if x is None or shape is None:
        return (None,)
    rank = shape[1]
    lo, hi = (np.broadcast_to(a, (a.shape[0], *shape[1:])) for a in (x.lo.min(axis=0)[None], x.hi.max(axis=0)[None]))
    reach = np.maximum(np.abs(lo), np.abs(hi))[..., :rank].sum(axis=-1)
    low, high = lo[..., rank] - reach, hi[..., rank] + reach
    slack = 1e-5 * (np.abs(low) + np.abs(high))
    target = (1,) * (rank + 1) + (rank,)
    return (Range((low - slack).reshape(target), (high + slack).reshape(target)),)


def affine_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """Every row of theta meets the matrix of points, whose Frobenius norm this is."""
    y = dims(node.outputs[0])
    if y is None:
        return (None, None)
    coordinates = _coordinates(y[1:-1], bool(attribute(node, "align_corners", 0)))
    points = math.prod(y[1:-1])
    return math.sqrt(points * (1 + sum(float(np.mean(c**2)) for c in coordinates))), None


row(
    "AffineGrid",
    moments=affine_moments,
    range=affine_range,
    pullback=affine_pullback,
    bound=affine_bound,
    vjp=affine_vjp,
)
