"""Operators that select by index: Gather and GatherElements.

Indices that depend on the model's input are taken as uniform over the rows they select from; constant ones as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims, padding_row
from gradlint.ops.concatenation import along, piece, placed, size_of
from gradlint.ops.shape import LARGEST, averaged, lifted, parts, resolution
from gradlint.transfer import Context, blocks, row

Values = Sequence[ir.Value | None]
INT64 = ir.DataType.INT64

# -- Gather ------------------------------------------------------------------------------------------------------------


def _inserted(a: Array, axis: int, count: int) -> Array:
    """Axis `axis`, of size 1, replaced by `count` axes of size 1."""
    return a.reshape((*a.shape[:axis], *(1,) * count, *a.shape[axis + 1 :]))


def row_moments(table: np.ndarray, axis: int) -> tuple[Array, Array]:
    """Mean and variance over the rows (along `axis`) per remaining element, for uniform indices."""
    mean = table.mean(axis=axis, keepdims=True, dtype=np.float64)
    second = np.zeros_like(mean)
    step = max(1, (1 << 22) // max(1, table.size // max(1, table.shape[axis])))
    for k in range(0, table.shape[axis], step):
        block = np.take(table, range(k, min(k + step, table.shape[axis])), axis)
        second += np.square(block, dtype=np.float64).sum(axis=axis, keepdims=True)
    return mean, np.maximum(second / table.shape[axis] - mean**2, 0)


def gather_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Rows of a table by varying ids: their own mean and variance. Of an activation: the elements selected."""
    data, index = node.inputs[:2]
    shape, picked = dims(data), dims(index)
    if shape is None or picked is None or data is None or index is None:
        return (None,)
    axis = attribute(node, "axis", 0) % len(shape)
    if not ctx.varies(data):
        table = ctx.array(data)
        if table is None:
            return (None,)
        mean, var = (_inserted(a, axis, len(picked)) for a in row_moments(table, axis))
        return (Moments(mean, np.zeros_like(mean), np.zeros_like(mean), var),)
    if xs[0] is None:
        return (None,)
    x, ids = xs[0].map(lambda a: lifted(a, len(shape))), ctx.array(index)
    sizes = resolution(*parts(x))
    if ids is None or (sizes[axis] > 1 and math.prod(sizes) // sizes[axis] * ids.size > LARGEST):
        x = averaged(x, (axis,))
    return (x.map(lambda a: _taken(a, ids, axis, len(picked))),)


def _taken(a: Array, ids: np.ndarray | None, axis: int, rank: int) -> Array:
    if a.shape[axis] == 1 or ids is None:
        return _inserted(a, axis, rank)
    if ids.size == 1:
        first = int(ids.reshape(-1)[0]) % a.shape[axis]
        return _inserted(piece(a, axis, slice(first, first + 1)), axis, rank)
    return np.take(a, ids, axis)


def gather_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """The range of the rows selected; of any row where the ids vary."""
    data, index = node.inputs[:2]
    shape, picked = dims(data), dims(index)
    if shape is None or picked is None or data is None:
        return (None,)
    axis, ids = attribute(node, "axis", 0) % len(shape), ctx.array(index)
    box = xs[0]
    if box is None and (table := None if ctx.varies(data) else ctx.array(data)) is not None:
        box = Range(*(np.asarray(f(table, axis=axis, keepdims=True), np.float64) for f in (np.min, np.max)))
    if box is None:
        return (None,)
    lo, hi = (lifted(a, len(shape)) for a in (box.lo, box.hi))
    if ids is None:
        lo, hi = lo.min(axis=axis, keepdims=True), hi.max(axis=axis, keepdims=True)
    return (Range(*(_taken(a, ids, axis, len(picked)) for a in (lo, hi))),)


def gather_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each row sums the gradients of the places that selected it: with uniform ids, places / rows of them."""
    data, index = node.inputs[:2]
    shape, picked = dims(data), dims(index)
    if gs[0] is None or shape is None or picked is None or data is None or 0 in shape:
        return (None, None)
    axis, rank = attribute(node, "axis", 0) % len(shape), len(picked)
    g = gs[0].map(lambda a: lifted(a, len(shape) - 1 + rank))
    ids = ctx.array(index)
    if ids is not None:
        return (_by_index(ctx, node, xs[0], g, ids % shape[axis], axis), None)
    spots = tuple(range(axis, axis + rank))
    each = math.prod(picked) / shape[axis] / (1 if ctx.varies(data) else min(ctx.batch, math.prod(picked)))
    flat = Gradient(0 * g.local, g.total).map(lambda a: a.mean(axis=spots).reshape(_without(a.shape, axis, rank)))
    return (flat.scaled(each), None)


def _without(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + count :])


def _by_index(
    ctx: Context, node: ir.Node, x: Moments | None, g: Gradient, ids: np.ndarray, axis: int
) -> Gradient | None:
    """Through constant ids. Repeated ones add up incoherently; ids that form a slice are treated as one."""
    shape = dims(node.inputs[0])
    assert shape is not None
    n, rank = shape[axis], ids.ndim
    flat = ids.reshape(-1)
    x = None if x is None or not ctx.varies(node.inputs[0]) else x.map(lambda a: lifted(a, len(shape)))
    counts = np.bincount(flat, minlength=n)
    if flat.size == 1 and x is not None:
        g = g.map(lambda a: a.reshape(_without(a.shape, axis, rank)))
        return placed(g, x, axis, slice(int(flat[0]), int(flat[0]) + 1), n)
    spots = tuple(range(axis, axis + rank))
    if (
        x is not None
        and resolution(*parts(x))[axis] == 1
        and all(a.shape[k] == 1 for a in (g.shared, g.local) for k in spots)
    ):
        g = g.map(lambda a: a.reshape(_without(a.shape, axis, rank)))
        if counts.max() <= 1:
            return placed(g, x, axis, slice(0, len(flat)), n)
        shared = g.shared * float(counts.mean()) ** 2
        return Gradient(shared, g.shared * float((counts**2).mean()) - shared + g.local * float(counts.mean()))

    def scattered(a: Array) -> Array:
        full = np.broadcast_to(a, (*a.shape[:axis], *ids.shape, *a.shape[axis + rank :]))
        full = full.reshape((*a.shape[:axis], flat.size, *a.shape[axis + rank :]))
        out = np.zeros((*full.shape[:axis], n, *full.shape[axis + 1 :]))
        np.add.at(np.moveaxis(out, axis, 0), flat, np.moveaxis(full, axis, 0))
        return out

    return g.map(scattered)


def gather_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """sqrt of how often one element is selected at most."""
    shape, picked = dims(node.inputs[0]), dims(node.inputs[1])
    if shape is None or picked is None:
        return (None, None)
    ids = ctx.array(node.inputs[1])
    axis = attribute(node, "axis", 0) % len(shape)
    most = math.prod(picked) if ids is None else int(np.bincount(ids.reshape(-1) % shape[axis]).max(initial=0))
    return (math.sqrt(most), None)


def gather_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Constant neighbouring rows are put back by Pad, a permutation by its inverse; others are scattered and added.

    The row that pads (torch's `padding_idx`) has no gradient: training leaves it alone.
    """
    x, index = node.inputs[:2]
    g = gs[0]
    assert x is not None
    assert index is not None
    assert g is not None
    axis, size = along(x, attribute(node, "axis", 0))
    ids = constant_array(index)
    if (padding := padding_row(node)) is not None and axis == 0 and index.dtype is not None:
        pads = b.op("Equal", index, b.constant(padding, index.dtype.numpy()), dtype=ir.DataType.BOOL)
        g = b.op("Where", b.op("Unsqueeze", pads, b.constant([-1])), b.scalar(0.0, g), g, dtype=g.dtype)
    if ids is not None and (run := _run(ids, size)) is not None:
        return (_placed_back(b, g, x, axis, *run, ids.ndim), None)
    if ids is not None and ids.ndim == 1 and size is not None and np.array_equal(np.sort(ids % size), np.arange(size)):
        return (b.op("Gather", g, b.constant(np.argsort(ids % size)), axis=axis), None)
    rank, spots = (len(v.shape) if v.shape is not None else None for v in (x, index))
    if rank is None or spots is None:
        raise Unsupported("inputs of unknown rank")
    if spots == 0:
        g = b.op("Unsqueeze", g, b.constant([axis]))
    elif spots > 1:
        sizes = [b.constant([-1]) if k == axis else size_of(b, x, k) for k in range(rank)]
        known = dims(x)
        shape = b.op("Concat", *sizes, axis=0) if known is None else b.constant([*known[:axis], -1, *known[axis + 1 :]])
        g = b.op("Reshape", g, shape)
    flat = b.op("Reshape", index, b.constant([-1 if k == axis else 1 for k in range(rank)]))
    return (scattered(b, g, b.shape(x), flat, axis), None)


def scattered(b: Backward, g: ir.Value, shape: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """Zeros of `shape` plus g's slices along `axis` at `index` (which broadcasts to g), repeated ones added.

    By ScatterElements: onnxruntime's ScatterND loses updates of repeated indices when it runs on several threads.
    """
    zeros = b.op("Expand", b.scalar(0.0, g), shape)
    wide = b.op("Expand", index, b.op("Shape", g, dtype=INT64))
    return b.op("ScatterElements", zeros, wide, g, axis=axis, reduction="add")


def _run(ids: np.ndarray, size: int | None) -> tuple[int, int] | None:
    """(first, count) where constant ids are consecutive rows, counted from the front where the size is known."""
    if ids.ndim > 1 or ids.size == 0:
        return None
    flat = np.atleast_1d(ids).astype(np.int64)
    if flat.min() < 0:
        if size is None:
            return (int(flat[0]), 1) if flat.size == 1 else None
        flat = flat % size
    return (int(flat[0]), flat.size) if (np.diff(flat) == 1).all() else None


def _placed_back(b: Backward, g: ir.Value, x: ir.Value, axis: int, first: int, count: int, rank: int) -> ir.Value:
    if rank == 0:
        g = b.op("Unsqueeze", g, b.constant([axis]))
    size = along(x, axis)[1]
    if size is not None:
        pads = b.constant([first, size - first - count])
        return g if count == size else b.op("Pad", g, pads, None, b.constant([axis]))
    total = size_of(b, x, axis)
    start = b.constant([first]) if first >= 0 else b.op("Add", total, b.constant([first]))
    end = b.op("Sub", b.op("Sub", total, start), b.constant([count]))
    return b.op("Pad", g, b.op("Concat", start, end, axis=0), None, b.constant([axis]))


row(
    "Gather",
    moments=gather_moments,
    range=gather_range,
    pullback=gather_pullback,
    bound=gather_bound,
    vjp=gather_vjp,
)


# -- GatherElements ----------------------------------------------------------------------------------------------------


def _lead(a: Array, sizes: Sequence[int], axis: int) -> Array:
    """Averaged along `axis`, cut to the index's size along the others."""
    a = a.mean(axis=axis, keepdims=True)
    return a[tuple(slice(0, n) if a.shape[k] > 1 else slice(None) for k, n in enumerate(sizes))]


def elements_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Any element along the axis: described by its average."""
    picked = dims(node.inputs[1])
    if xs[0] is None or picked is None:
        return (None,)
    axis = attribute(node, "axis", 0) % len(picked)
    return (averaged(xs[0].map(lambda a: lifted(a, len(picked))), (axis,)).map(lambda a: _lead(a, picked, axis)),)


def elements_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Between the extremes of all elements."""
    return (None if xs[0] is None else extremes(xs[0], len(node.outputs[0].shape or ())),)


def extremes(box: Range, rank: int) -> Range:
    return Range(np.full((1,) * rank, box.lo.min()), np.full((1,) * rank, box.hi.max()))


def elements_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Indices taken as uniform along the axis: every element gets its share of the places, added incoherently."""
    shape, picked = dims(node.inputs[0]), dims(node.inputs[1])
    if gs[0] is None or shape is None or picked is None or 0 in shape:
        return (None, None)
    axis = attribute(node, "axis", 0) % len(shape)
    total = lifted(gs[0].total, len(shape)).mean(axis=axis, keepdims=True) * (picked[axis] / shape[axis])
    for k, (n, m) in enumerate(zip(shape, picked, strict=True)):
        if k != axis and total.shape[k] > 1:
            total = np.pad(total, [(0, n - m if i == k else 0) for i in range(len(shape))])
        elif k != axis:
            total = total * (m / n)
    return (Gradient(np.zeros_like(total), total), None)


def elements_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """sqrt of how often one element may be selected."""
    picked = dims(node.inputs[1])
    if picked is None:
        return (None, None)
    return (math.sqrt(picked[attribute(node, "axis", 0) % len(picked)]), None)


def elements_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, index = node.inputs[:2]
    assert x is not None
    zeros = b.op("Expand", b.scalar(0.0, x), b.shape(x))
    return (b.op("ScatterElements", zeros, index, gs[0], axis=attribute(node, "axis", 0), reduction="add"), None)


row(
    "GatherElements",
    moments=elements_moments,
    range=elements_range,
    pullback=elements_pullback,
    bound=elements_bound,
    vjp=elements_vjp,
)


# -- no gradient -------------------------------------------------------------------------------------------------------

blocks("NonZero", "Unique", "NonMaxSuppression")
