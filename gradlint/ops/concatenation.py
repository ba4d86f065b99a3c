"""Concat and Split.

Along an axis that the moments resolve (channels) pieces keep their own. Along one of positions (tokens, pixels) every
part is a run of like positions: a class token stays apart from the patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.shape import LARGEST, averaged, lifted, move_bound, parts, resolution, rest
from gradlint.runs import entries, positional, settled, side_by_side, stored
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
INT64 = ir.DataType.INT64


def along(value: ir.Value, axis: int) -> tuple[int, int | None]:
    """(axis counted from the front, its size or None); the axis stays negative where the rank is not known."""
    if value.shape is None:
        return axis, None
    axis %= len(value.shape)
    size = value.shape[axis]
    return axis, size if isinstance(size, int) else None


def size_of(b: Backward, value: ir.Value, axis: int) -> ir.Value:
    """The size of one axis as an int64 vector of length 1."""
    axis, size = along(value, axis)
    if size is not None:
        return b.constant([size])
    return b.op("Shape", value, dtype=INT64, start=axis, end=None if axis == -1 else axis + 1)


def resized(a: Array, axis: int, size: int) -> Array:
    """The array resolved along `axis`."""
    return np.broadcast_to(a, (*a.shape[:axis], size, *a.shape[axis + 1 :]))


def weighted(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.sum(np.stack(np.broadcast_arrays(*arrays)) * np.reshape(weights, (-1,) + (1,) * arrays[0].ndim), axis=0)


def joined(arrays: Sequence[Array], sizes: Sequence[int], axis: int) -> Array:
    """Arrays side by side along `axis`; a single one where none differs there."""
    if all(a.shape[axis] == 1 for a in arrays) and all(np.array_equal(a, arrays[0]) for a in arrays):
        return arrays[0]
    full = [resized(a, axis, n) for a, n in zip(arrays, sizes, strict=True)]
    other = np.broadcast_shapes(*((*a.shape[:axis], 1, *a.shape[axis + 1 :]) for a in full))
    return np.concatenate([np.broadcast_to(a, (*other[:axis], a.shape[axis], *other[axis + 1 :])) for a in full], axis)


def mixed(xs: Sequence[Moments], sizes: Sequence[int], axis: int) -> Moments:
    """Moments over the positions of several parts: their average by size, the spread of the means as `fixed`."""
    share = [n / sum(sizes) for n in sizes]
    flat = [x.map(lambda a: a.mean(axis=axis, keepdims=True)) for x in xs]
    mean = weighted([x.mean for x in flat], share)
    second = weighted([(x.mean**2).mean(axis=axis, keepdims=True) for x in xs], share)
    fixed, shared, local = (weighted([p[k] for p in map(parts, flat)], share) for k in (1, 2, 3))
    return Moments(mean, fixed + np.maximum(second - mean**2, 0), shared, local)


# -- Concat ------------------------------------------------------------------------------------------------------------


def _unresolved(xs: Sequence[Moments], axis: int) -> bool:
    """Is `axis` one of positions for all inputs that vary, while another axis is resolved?"""
    sizes = [resolution(*parts(x)) for x in xs]
    others = any(n > 1 for s in sizes for k, n in enumerate(s) if k != axis)
    return others and all(positional(axis, *parts(x)) for x in xs)


def _alike(ctx: Context, x: Moments, shape: tuple[int, ...], value: ir.Value | None) -> Moments:
    """A constant that was copied for every example (a class token) is described once."""
    copied = not ctx.varies(value) and shape[0] == ctx.batch and np.ptp(x.mean, axis=0).max(initial=0) == 0
    return averaged(x, (0,)) if copied else x


def concat_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Channels side by side; positions as groups, one per part or those it has (averaged where there are too many)."""
    pairs = zip(xs, node.inputs, strict=True)
    known = [(x, d, v) for x, v in pairs if x is not None and (d := dims(v)) is not None]
    if len(known) < len(xs) or not known:
        return (None,)
    rank = len(known[0][1])
    axis = attribute(node, "axis", 0) % rank
    ms = [_alike(ctx, x.map(lambda a: lifted(a, rank)), d, v) for x, d, v in known]
    sizes = [d[axis] for _, d, _ in known]
    moving = [m for m, (_, d, v) in zip(ms, known, strict=True) if ctx.varies(v)]
    if moving and _unresolved(moving, axis) and sum(sizes) > 0:
        ms = [m if ctx.varies(v) else averaged(m, (axis,)) for m, (_, _, v) in zip(ms, known, strict=True)]
        if sum(stored(*parts(m)) for m in ms) > LARGEST:
            return (mixed(ms, sizes, axis),)
        return (Moments(*(side_by_side(arrays, sizes, axis) for arrays in zip(*map(parts, ms), strict=True))),)
    return (Moments(*(joined(arrays, sizes, axis) for arrays in zip(*map(parts, ms), strict=True))),)


def concat_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    known = [(x, d) for x, v in zip(xs, node.inputs, strict=True) if x is not None and (d := dims(v)) is not None]
    if len(known) < len(xs) or not known:
        return (None,)
    rank = len(known[0][1])
    axis = attribute(node, "axis", 0) % rank
    boxes, sizes = [x.map(lambda a: lifted(a, rank)) for x, _ in known], [d[axis] for _, d in known]
    return (Range(joined([x.lo for x in boxes], sizes, axis), joined([x.hi for x in boxes], sizes, axis)),)


def concat_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each part's own piece; to a constant, of the batch loss: a copy per example has 1/B of it."""
    g, shapes = gs[0], [dims(v) for v in node.inputs]
    if g is None or any(s is None for s in shapes):
        return (None,) * len(node.inputs)
    rank = len(shapes[0] or ())
    axis = attribute(node, "axis", 0) % rank
    g = g.map(lambda a: lifted(a, rank))
    found: list[Gradient | None] = []
    start = 0
    for value, shape in zip(node.inputs, shapes, strict=True):
        assert shape is not None
        part = g.map(lambda a, k=start, n=shape[axis]: piece(a, axis, slice(k, k + n)))  # type: ignore[misc]
        copies = ctx.varies(node.outputs[0]) and not ctx.varies(value) and shape[0] == ctx.batch
        found.append(part.scaled(1 / ctx.batch) if copies else part)
        start += shape[axis]
    return found


def piece(a: Array, axis: int, where: slice) -> Array:
    return a if a.shape[axis] == 1 else settled(a[(slice(None),) * axis + (where,)], axis)


def concat_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (1.0,) * len(node.inputs)


def concat_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Split; where a single piece is wanted, a Slice of it."""
    g, axis = gs[0], attribute(node, "axis", 0)
    assert g is not None
    wanted = [k for k, v in enumerate(node.inputs) if b.wanted(v)]
    sizes = [along(v, axis)[1] if v is not None else None for v in node.inputs]
    if len(wanted) == 1 and all(n is not None for n in sizes):
        k = wanted[0]
        start = sum(n for n in sizes[:k] if n is not None)
        stop = start + (sizes[k] or 0)
        part = b.op("Slice", g, b.constant([start]), b.constant([stop]), b.constant([axis]))
        return tuple(part if i == k else None for i in range(len(sizes)))
    if len(node.inputs) == 1:
        return (g,)
    each = [size_of(b, v, axis) for v in node.inputs if v is not None]
    lengths = b.constant(sizes) if all(n is not None for n in sizes) else b.op("Concat", *each, axis=0)
    pieces = b.ops("Split", g, lengths, outputs=len(sizes), axis=axis)
    return tuple(p if k in wanted else None for k, p in enumerate(pieces))


row(
    "Concat",
    moments=concat_moments,
    range=concat_range,
    pullback=concat_pullback,
    bound=concat_bound,
    vjp=concat_vjp,
)


# -- Split -------------------------------------------------------------------------------------------------------------


def _cuts(node: ir.Node) -> tuple[int, list[slice]] | None:
    """The axis that Split cuts, and where each output lies along it."""
    shapes = [dims(v) for v in node.outputs]
    if any(s is None for s in shapes):
        return None
    axis = attribute(node, "axis", 0) % len(shapes[0] or ())
    sizes = [s[axis] for s in shapes if s is not None]
    ends = list(itertools.accumulate(sizes))
    return axis, [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]


def split_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    cuts, rank = _cuts(node), len(node.outputs[0].shape or ())
    if xs[0] is None or cuts is None:
        return (None,) * len(node.outputs)
    x = xs[0].map(lambda a: lifted(a, rank))
    return [x.map(lambda a, c=cut: piece(a, cuts[0], c)) for cut in cuts[1]]  # type: ignore[misc]


def split_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    cuts, rank = _cuts(node), len(node.outputs[0].shape or ())
    if xs[0] is None or cuts is None:
        return (None,) * len(node.outputs)
    x = xs[0].map(lambda a: lifted(a, rank))
    return [x.map(lambda a, c=cut: piece(a, cuts[0], c)) for cut in cuts[1]]  # type: ignore[misc]


def split_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    cuts, shape = _cuts(node), dims(node.inputs[0])
    if cuts is None or shape is None:
        return (None, *rest(node))
    total: Gradient | None = None
    for g, cut in zip(gs, cuts[1], strict=True):
        if g is not None:
            back = placed(g.map(lambda a: lifted(a, len(shape))), xs[0], cuts[0], cut, shape[cuts[0]])
            total = back if total is None else total + back
    return (total, *rest(node))


def placed(g: Gradient, x: Moments | None, axis: int, where: slice, size: int) -> Gradient:
    """Gradient of an axis of which only `where` was taken.

    Exact where x or g resolves the axis, or tells groups of its positions apart, and for a single position (a class
    token, the last step): it keeps all there is. Else the m positions taken of n are assumed to lie anywhere: what is
    the same at each of them reaches m^2 / n^2 of the pairs.
    """
    start, stop, step = where.indices(size)
    m, n = len(range(start, stop, step)), size
    if m == n:
        return g
    arrays = [a for a in (g.shared, g.local, *(parts(x) if x is not None else ())) if a.ndim > axis]
    if (m == 1 or max(a.shape[axis] for a in arrays) > 1) and step == 1 and positional(axis, *arrays):
        zero = np.zeros((1,) * g.shared.ndim)
        return g.map(lambda a: side_by_side((zero, a, zero), (start, m, n - stop), axis))
    if max(a.shape[axis] for a in arrays) > 1:
        return g.map(lambda a: _filled(a, axis, where, n, m))
    shared = g.shared * ((m / n) ** 2 if m > 1 else 0.0)
    return Gradient(shared, g.total * (m / n) - shared)


def _filled(a: Array, axis: int, where: slice, n: int, m: int) -> Array:
    every = np.zeros((1,) * axis + (m,) + (1,) * (a.ndim - 1 - axis))
    (a, _), wrap = entries(a, every)
    out = np.zeros((*a.shape[:axis], n, *a.shape[axis + 1 :]))
    out[(slice(None),) * axis + (where,)] = a
    return cast(Array, wrap(out))


def split_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Concat; outputs without a gradient are blocks of zeros."""
    like = next(g for g in gs if g is not None)
    zero = b.scalar(0.0, like)
    pieces = [b.op("Expand", zero, b.shape(y)) if g is None else g for g, y in zip(gs, node.outputs, strict=True)]
    return (b.op("Concat", *pieces, axis=attribute(node, "axis", 0)), *rest(node))


row("Split", moments=split_moments, range=split_range, pullback=split_pullback, bound=move_bound, vjp=split_vjp)
