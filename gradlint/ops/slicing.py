"""Slice: pieces of axes, with any step.

Along an axis that the moments resolve (channels) the piece keeps its own; along one they do not (tokens, pixels) it is
described as the whole. The gradient of one piece (a class token, the last step) is spread evenly over the axis it was
cut from: the sum over positions, which is what weights see, is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import constant_array, dims
from gradlint.ops.concatenation import INT64, along, piece, placed, size_of
from gradlint.ops.shape import lifted, move_bound, rest
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
Cuts = Sequence[tuple[int, slice | None]]


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
    cuts: list[tuple[int, slice | None]] = []
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
        a = a.mean(axis=axis, keepdims=True) if where is None else piece(a, axis, where)
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
        raise Unsupported("axes or steps that depend on the input")
    cut = [int(a) % rank if rank is not None else int(a) for a in axes]
    strides = [int(s) for s in steps]
    for axis, step in zip(cut, strides, strict=True):
        g = reversed_along(b, g, axis) if step < 0 else g
    return (_put_back(b, g, x, y, starts, cut, strides), *rest(node))


def reversed_along(b: Backward, g: ir.Value, axis: int) -> ir.Value:
    lowest = b.constant([np.iinfo(np.int64).min])
    return b.op("Slice", g, b.constant([-1]), lowest, b.constant([axis]), b.constant([-1]))


def _put_back(
    b: Backward, g: ir.Value, x: ir.Value, y: ir.Value, starts: ir.Value, axes: list[int], steps: list[int]
) -> ir.Value:
    """g in the elements of x that y took, each axis from its lowest one up; zeros elsewhere."""
    first = constant_array(starts)
    sizes = [(along(x, a)[1], along(y, a)[1]) for a in axes]
    if first is None or any(n is None or m is None for n, m in sizes):
        for axis, step in zip(axes, steps, strict=True):
            g = _spaced(b, g, axis, abs(step), 0, trim=True) if abs(step) > 1 else g
        return b.op("Pad", g, _pads_at_run(b, x, y, starts, axes, steps), None, b.constant(axes))
    low, high = [], []
    for axis, start, (n, m), step in zip(axes, (int(s) for s in first), sizes, steps, strict=True):
        assert n is not None
        assert m is not None
        if m == 0:  # nothing was taken
            low.append(0)
            high.append(n)
            continue
        begin = min(max(start + n if start < 0 else start, 0), n if step > 0 else n - 1) + (m - 1) * min(step, 0)
        size = m
        if abs(step) > 1:
            before = min(begin, abs(step) - 1)
            begin, size = begin - before, m * abs(step)
            trim = begin + size > n
            g = _spaced(b, g, axis, abs(step), before, trim=trim)
            size -= abs(step) - 1 - before if trim else 0
        low.append(begin)
        high.append(n - begin - size)
    return b.op("Pad", g, b.constant(low + high), None, b.constant(axes)) if any(low + high) else g


def _spaced(b: Backward, g: ir.Value, axis: int, step: int, before: int, *, trim: bool) -> ir.Value:
    """Zeros between the elements along `axis`: `before` ahead of each, the rest behind (`trim`: but for the last)."""
    inner = axis + 1 if axis >= 0 else axis
    after = step - 1 - before
    wide = b.op("Unsqueeze", g, b.constant([inner]))
    wide = b.op("Pad", wide, b.constant([before, after]), None, b.constant([inner]))
    ahead = b.op("Shape", g, dtype=INT64, start=0, end=axis) if axis else b.constant([])
    behind = b.op("Shape", g, dtype=INT64, start=axis + 1) if axis != -1 else b.constant([])
    wide = b.op("Reshape", wide, b.op("Concat", ahead, b.constant([-1]), behind, axis=0))
    return b.op("Slice", wide, b.constant([0]), b.constant([-after]), b.constant([axis])) if trim and after else wide


def _pads_at_run(
    b: Backward, x: ir.Value, y: ir.Value, starts: ir.Value, axes: list[int], steps: list[int]
) -> ir.Value:
    """What lies before and after the elements taken, from the sizes met when it runs."""
    full, kept = (b.op("Concat", *(size_of(b, v, a) for a in axes), axis=0) for v in (x, y))
    zero, one = b.constant([0]), b.constant([1])
    negative = b.op("Less", starts, zero, dtype=ir.DataType.BOOL)
    begin = b.op("Where", negative, b.op("Add", starts, full), starts, dtype=INT64)
    last = b.op("Add", full, b.constant([0 if s > 0 else -1 for s in steps]))
    begin = b.op("Min", b.op("Max", begin, zero), last)
    span = b.op("Mul", b.op("Sub", kept, one), b.constant([abs(s) for s in steps]))
    begin = b.op("Sub", begin, b.op("Mul", span, b.constant([int(s < 0) for s in steps])))
    end = b.op("Sub", b.op("Sub", full, begin), b.op("Add", span, one))
    return b.op("Concat", begin, end, axis=0)


row("Slice", moments=slice_moments, range=slice_range, pullback=slice_pullback, bound=move_bound, vjp=slice_vjp)
