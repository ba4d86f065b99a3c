"""Operators that join, cut and pad: Concat, Split, Slice, Pad, Trilu, CenterCropPad, ReverseSequence.

Along an axis that the moments resolve (channels) pieces keep their own; along one they do not (tokens, pixels) the parts
are averaged by their share, the spread of their means going into `fixed`. The gradient of one piece (a class token, the
last step) is spread evenly over the axis it was cut from: the sum over positions, which weights see, is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.shape import lifted, move_bound, parts, resolution, rest
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
    """Is `axis` one of positions: resolved by none of the inputs that vary, while another axis is?"""
    sizes = [resolution(*parts(x)) for x in xs]
    return all(s[axis] == 1 for s in sizes) and any(max(s) > 1 for s in sizes)


def concat_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Channels side by side; tokens (a class token before patches) averaged."""
    known = [(x, d, v) for x, v in zip(xs, node.inputs, strict=True) if x is not None and (d := dims(v)) is not None]
    if len(known) < len(xs) or not known:
        return (None,)
    rank = len(known[0][1])
    axis = attribute(node, "axis", 0) % rank
    ms = [x.map(lambda a: lifted(a, rank)) for x, _, _ in known]
    sizes = [d[axis] for _, d, _ in known]
    moving = [m for m, (_, d, v) in zip(ms, known, strict=True) if ctx.varies(v)]
    if moving and _unresolved(moving, axis) and sum(sizes) > 0:
        return (mixed(ms, sizes, axis),)
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
    """Each part's own piece."""
    g, shapes = gs[0], [dims(v) for v in node.inputs]
    if g is None or any(s is None for s in shapes):
        return (None,) * len(node.inputs)
    rank = len(shapes[0] or ())
    axis = attribute(node, "axis", 0) % rank
    g = g.map(lambda a: lifted(a, rank))
    found: list[Gradient | None] = []
    start = 0
    for shape in shapes:
        assert shape is not None
        found.append(g.map(lambda a, k=start, n=shape[axis]: _piece(a, axis, slice(k, k + n))))  # type: ignore[misc]
        start += shape[axis]
    return found


def _piece(a: Array, axis: int, where: slice) -> Array:
    return a if a.shape[axis] == 1 else a[(slice(None),) * axis + (where,)]


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
        piece = b.op("Slice", g, b.constant([start]), b.constant([stop]), b.constant([axis]))
        return tuple(piece if i == k else None for i in range(len(sizes)))
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
    return [x.map(lambda a, c=cut: _piece(a, cuts[0], c)) for cut in cuts[1]]  # type: ignore[misc]


def split_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    cuts, rank = _cuts(node), len(node.outputs[0].shape or ())
    if xs[0] is None or cuts is None:
        return (None,) * len(node.outputs)
    x = xs[0].map(lambda a: lifted(a, rank))
    return [x.map(lambda a, c=cut: _piece(a, cuts[0], c)) for cut in cuts[1]]  # type: ignore[misc]


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

    Exact where x or g resolves the axis. Else the m positions taken of n are taken to lie anywhere: the part that is the
    same at each of them reaches m^2 / n^2 of the pairs; of a single position everything is local.
    """
    m, n = len(range(*where.indices(size))), size
    if m == n:
        return g
    sizes = [a.shape[axis] for a in (g.shared, g.local, *(parts(x) if x is not None else ())) if a.ndim > axis]
    if max(sizes) > 1:
        return g.map(lambda a: _filled(a, axis, where, n, m))
    shared = g.shared * ((m / n) ** 2 if m > 1 else 0.0)
    return Gradient(shared, g.total * (m / n) - shared)


def _filled(a: Array, axis: int, where: slice, n: int, m: int) -> Array:
    out = np.zeros((*a.shape[:axis], n, *a.shape[axis + 1 :]))
    out[(slice(None),) * axis + (where,)] = resized(a, axis, m) if a.shape[axis] == 1 else a
    return out


def split_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Concat; outputs without a gradient are blocks of zeros."""
    like = next(g for g in gs if g is not None)
    zero = b.scalar(0.0, like)
    pieces = [b.op("Expand", zero, b.shape(y)) if g is None else g for g, y in zip(gs, node.outputs, strict=True)]
    return (b.op("Concat", *pieces, axis=attribute(node, "axis", 0)), *rest(node))


row("Split", moments=split_moments, range=split_range, pullback=split_pullback, bound=move_bound, vjp=split_vjp)


# -- Slice -------------------------------------------------------------------------------------------------------------

Cuts = list[tuple[int, slice | None]]


def slice_cuts(ctx: Context, node: ir.Node) -> Cuts | None:
    """(axis, where) for each axis that Slice cuts; where is None if it depends on the input."""
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    starts, ends, axes, steps = (ctx.array(node.inputs[k]) if len(node.inputs) > k else None for k in (1, 2, 3, 4))
    count = (dims(node.inputs[1]) or (len(shape),))[0]
    if axes is None:
        axes = np.arange(count)
    if starts is None or ends is None:
        return [(int(a) % len(shape), None) for a in axes]
    steps = np.ones(count, np.int64) if steps is None else steps
    cuts: Cuts = []
    for a, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = shape[int(a)]
        if step > 0:
            first, last = np.clip((start + n if start < 0 else start, end + n if end < 0 else end), 0, n)
            where = slice(int(first), int(max(first, last)), int(step))
        else:
            first, last = (min(k + n if k < 0 else k, n - 1) for k in (start, end))
            where = slice(max(int(first), 0), None if last < 0 else int(last), int(step))
        cuts.append((int(a) % len(shape), where))
    return cuts


def _cut(a: Array, cuts: Cuts) -> Array:
    for axis, where in cuts:
        a = a.mean(axis=axis, keepdims=True) if where is None else _piece(a, axis, where)
    return a


def slice_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    cuts, rank = slice_cuts(ctx, node), len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    if xs[0] is None or cuts is None:
        return (None,)
    return (xs[0].map(lambda a: _cut(lifted(a, rank), cuts)),)


def slice_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    cuts, rank = slice_cuts(ctx, node), len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    if xs[0] is None or cuts is None:
        return (None,)
    loose = [axis for axis, where in cuts if where is None]
    exact = [(axis, where) for axis, where in cuts if where is not None]
    lo, hi = (_cut(lifted(a, rank), exact) for a in (xs[0].lo, xs[0].hi))
    return (Range(lo.min(axis=tuple(loose), keepdims=True), hi.max(axis=tuple(loose), keepdims=True)),)


def slice_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    cuts, shape, small = slice_cuts(ctx, node), dims(node.inputs[0]), dims(node.outputs[0])
    if gs[0] is None or cuts is None or shape is None or small is None:
        return (None, *rest(node))
    g = gs[0].map(lambda a: lifted(a, len(shape)))
    x = None if xs[0] is None else xs[0].map(lambda a: lifted(a, len(shape)))
    for axis, where in cuts:
        if where is None:
            g = g.map(lambda a, k=axis: a.mean(axis=k, keepdims=True))  # type: ignore[misc]
            g = placed(g, None, axis, slice(0, small[axis]), shape[axis])
        else:
            g = placed(g, x, axis, where, shape[axis])
    return (g, *rest(node))


def slice_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Zeros put back around what was taken and, for a step other than 1, between (negative steps reverse first)."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    starts = node.inputs[1]
    given = [constant_array(v) if v is not None else None for v in (*node.inputs[3:5], None, None)]
    rank = len(x.shape) if x.shape is not None else None
    count = (dims(starts) or (rank,))[0]
    axes = range(count or 0) if len(node.inputs) < 4 or node.inputs[3] is None else given[0]
    steps = [1] * (count or 0) if len(node.inputs) < 5 or node.inputs[4] is None else given[1]
    if axes is None or steps is None or starts is None or (rank is None and not len(axes)):
        return (None, *rest(node))
    axes = [int(a) % rank if rank is not None else int(a) for a in axes]
    for axis, step in zip(axes, (int(s) for s in steps), strict=True):
        if step < 0:
            g = reversed_along(b, g, axis)
        if abs(step) > 1:
            g = _spaced(b, g, axis, abs(step))
    return (_surrounded(b, g, x, y, starts, axes, [int(s) for s in steps]), *rest(node))


def reversed_along(b: Backward, g: ir.Value, axis: int) -> ir.Value:
    lowest = b.constant([np.iinfo(np.int64).min])
    return b.op("Slice", g, b.constant([-1]), lowest, b.constant([axis]), b.constant([-1]))


def _spaced(b: Backward, g: ir.Value, axis: int, step: int) -> ir.Value:
    """step - 1 zeros after every element along `axis`."""
    wide = b.op("Unsqueeze", g, b.constant([axis + 1 if axis >= 0 else axis]))
    wide = b.op("Pad", wide, b.constant([0, step - 1]), None, b.constant([axis + 1 if axis >= 0 else -1]))
    before = b.op("Shape", g, dtype=INT64, start=0, end=axis) if axis else b.constant([])
    after = b.op("Shape", g, dtype=INT64, start=axis + 1) if axis != -1 else b.constant([])
    return b.op("Reshape", wide, b.op("Concat", before, b.constant([-1]), after, axis=0))


def _surrounded(
    b: Backward, g: ir.Value, x: ir.Value, y: ir.Value, starts: ir.Value, axes: list[int], steps: list[int]
) -> ir.Value:
    """Pad g, spaced out already, to the size of x: where y began and what is left (negative where a step overhangs)."""
    first = constant_array(starts)
    sizes = [(along(x, a)[1], along(y, a)[1]) for a in axes]
    if first is not None and all(n is not None and m is not None for n, m in sizes):
        low, high = [], []
        for start, (n, m), step in zip((int(s) for s in first), sizes, steps, strict=True):
            assert n is not None
            assert m is not None
            start = min(max(start + n if start < 0 else start, 0), n if step > 0 else n - 1)
            low.append(start if step > 0 else start + (m - 1) * step)
            high.append(n - low[-1] - m * abs(step))
        pads = b.constant(low + high)
        if not any(low + high):
            return g
    else:
        full, kept = (b.op("Concat", *(size_of(b, v, a) for a in axes), axis=0) for v in (x, y))
        zero, stride = b.constant([0]), b.constant(steps)
        negative = b.op("Less", starts, zero, dtype=ir.DataType.BOOL)
        begin = b.op("Where", negative, b.op("Add", starts, full), starts, dtype=INT64)
        last = b.op("Add", full, b.constant([0 if s > 0 else -1 for s in steps]))
        begin = b.op("Min", b.op("Max", begin, zero), last)
        back = b.op("Mul", b.op("Sub", kept, b.constant([1])), b.op("Min", stride, zero))
        begin = b.op("Add", begin, back)
        end = b.op("Sub", b.op("Sub", full, begin), b.op("Mul", kept, b.op("Abs", stride)))
        pads = b.op("Concat", begin, end, axis=0)
    return b.op("Pad", g, pads, None, b.constant(axes))


row("Slice", moments=slice_moments, range=slice_range, pullback=slice_pullback, bound=move_bound, vjp=slice_vjp)
