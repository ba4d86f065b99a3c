"""GatherND: positions over several axes at once (adaptive pooling and index lists in exported models)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.concatenation import INT64, size_of
from gradlint.ops.indexing import extremes, scattered
from gradlint.ops.shape import averaged, lifted, reshape_like
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]


def _indexed(node: ir.Node) -> tuple[tuple[int, ...], int, int, int] | None:
    """(shape of the data, batch axes, axes indexed, axes of the output in their place)."""
    shape, picked = dims(node.inputs[0]), dims(node.inputs[1])
    if shape is None or picked is None or 0 in shape:
        return None
    batch = attribute(node, "batch_dims", 0)
    return shape, batch, picked[-1], len(picked) - 1 - batch


def nd_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Any position of the axes indexed: described by their average."""
    found = _indexed(node)
    if xs[0] is None or found is None:
        return (None,)
    shape, batch, count, places = found
    x = averaged(xs[0].map(lambda a: lifted(a, len(shape))), range(batch, batch + count))
    return (x.map(lambda a: a.reshape((*a.shape[:batch], *(1,) * places, *a.shape[batch + count :]))),)


def nd_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    return (None if xs[0] is None else extremes(xs[0], len(node.outputs[0].shape or ())),)


def _counts(ctx: Context, node: ir.Node, shape: tuple[int, ...], batch: int) -> Array | None:
    """How often constant indices select each position; None where they vary."""
    ids = ctx.array(node.inputs[1])
    if ids is None:
        return None
    indexed = shape[batch : batch + ids.shape[-1]]
    flat = np.ravel_multi_index(tuple((ids % indexed).reshape(-1, ids.shape[-1]).T), indexed)
    return np.bincount(flat, minlength=math.prod(indexed)) / math.prod(shape[:batch])


def nd_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each position sums the gradients of the places that selected it: m of them, by the indices where constant.

    The sum over all places, which is what is the same everywhere, is kept: m^2 of the shared part on average.
    """
    found = _indexed(node)
    if gs[0] is None or found is None:
        return (None, None)
    shape, batch, count, places = found
    rank = batch + places + len(shape) - batch - count
    spots = tuple(range(batch, batch + places))
    counts = _counts(ctx, node, shape, batch)
    out = dims(node.outputs[0]) or ()
    mean = math.prod(out[k] for k in spots) / math.prod(shape[batch : batch + count])
    square = mean**2 if counts is None else float(np.mean(counts**2))
    shared, local = (
        (a := lifted(g, rank).mean(axis=spots)).reshape((*a.shape[:batch], *(1,) * count, *a.shape[batch:]))
        for g in (gs[0].shared, gs[0].local)
    )
    kept = shared * mean**2
    return (Gradient(kept, shared * square - kept + local * mean), None)


def nd_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    found, picked = _indexed(node), dims(node.inputs[1])
    if found is None or picked is None:
        return (None, None)
    return (math.sqrt(math.prod(picked[found[1] : -1])), None)


def nd_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, index, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert index is not None
    assert g is not None
    return (added_at(b, g, x, index, attribute(node, "batch_dims", 0)), None)


def added_at(b: Backward, g: ir.Value, x: ir.Value, index: ir.Value, batch: int = 0) -> ir.Value:
    """Zeros shaped like x plus g at the positions `index` (..., k), repeated ones added; x's first axes as one."""
    last = index.shape[-1] if index.shape is not None else None
    if not isinstance(last, int) or index.shape is None:
        raise Unsupported("indices of unknown rank")
    spots = len(index.shape) - 1
    parts_: list[ir.Value] = [_coordinate(b, index, x, k, spots) for k in range(batch)]
    parts_ += [b.op("Gather", index, b.constant([k]), axis=-1) for k in range(last)]
    flat: ir.Value | None = None
    for k, part in enumerate(parts_):
        size = size_of(b, x, k)
        part = b.op("Mod", part, size)
        flat = part if flat is None else b.op("Add", b.op("Mul", flat, size), part)
    assert flat is not None
    depth = batch + last
    known = dims(x)
    if known is not None:
        rows, width = math.prod(known[:depth]), math.prod(known[depth:])
        shape, line = b.constant([rows, width]), b.constant([-1, width])
    else:
        lead, tail = (b.op("Shape", x, dtype=INT64, start=s, end=e) for s, e in ((0, depth), (depth, None)))
        wide = b.op("ReduceProd", tail, keepdims=1)
        shape = b.op("Concat", b.op("ReduceProd", lead, keepdims=1), wide, axis=0)
        line = b.op("Concat", b.constant([-1]), wide, axis=0)
    column = b.op("Reshape", flat, b.constant([-1, 1]))
    return reshape_like(b, scattered(b, b.op("Reshape", g, line), shape, column, 0), x)


def _coordinate(b: Backward, index: ir.Value, x: ir.Value, axis: int, spots: int) -> ir.Value:
    """The position along one batch axis, for every place of the index: (..., 1)."""
    count = b.op("Squeeze", size_of(b, x, axis), b.constant([0]))
    steps = b.op("Range", b.constant(0), count, b.constant(1))
    line = b.op("Reshape", steps, b.constant([-1 if k == axis else 1 for k in range(spots + 1)]))
    places = b.op("Shape", index, dtype=INT64, start=0, end=spots)
    return b.op("Expand", line, b.op("Concat", places, b.constant([1]), axis=0))


row("GatherND", moments=nd_moments, range=nd_range, pullback=nd_pullback, bound=nd_bound, vjp=nd_vjp)
