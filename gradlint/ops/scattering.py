"""Operators that write at indices: ScatterElements, ScatterND, TensorScatter, OneHot, Compress.

Moments and pullback are those of a mixture: the share of the elements that are written is known, where they lie is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims, op
from gradlint.ops.concatenation import INT64, along, size_of
from gradlint.ops.gather_nd import added_at
from gradlint.ops.indexing import extremes, scattered
from gradlint.ops.shape import averaged, averaged_gradient, lifted, parts, reshape_like, resolution
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
BOOL = ir.DataType.BOOL

# -- ScatterElements, ScatterND: estimate ------------------------------------------------------------------------------


def _written(node: ir.Node) -> tuple[tuple[int, ...], list[int], float] | None:
    """(shape of the data, axes along which places are chosen, updates per element of the data)."""
    shape, picked, updates = (dims(v) for v in node.inputs[:3])
    if shape is None or picked is None or updates is None or 0 in shape:
        return None
    if op(node) == "ScatterND":
        axes = list(range(picked[-1]))
    else:
        chosen = attribute(node, "axis", 0) % len(shape)
        axes = [k for k, (n, m) in enumerate(zip(shape, picked, strict=True)) if k == chosen or n != m]
    return shape, axes, math.prod(updates) / math.prod(shape)


def _aligned(a: Array, node: ir.Node, rank: int, axes: list[int]) -> Array:
    """An array that describes the updates, for the data's axes: averaged over the places."""
    if op(node) != "ScatterND":
        return lifted(a, rank).mean(axis=tuple(axes), keepdims=True)
    updates = lifted(a, len(node.inputs[2].shape or ())) if node.inputs[2] is not None else a
    kept = rank - len(axes)
    tail = updates.mean(axis=tuple(range(updates.ndim - kept)))
    return lifted(tail, rank)


def scatter_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Replaced: a share p of updates among the data (each place written once). Added: the updates on top.

    Of max, min and mul nothing is known.
    """
    found, reduction = _written(node), attribute(node, "reduction", "none")
    data, updates = xs[0], xs[2]
    if data is None or updates is None or found is None or reduction not in ("none", "add"):
        return (None,)
    shape, axes, share = found
    x = averaged(data.map(lambda a: lifted(a, len(shape))), axes)
    m, *variances = (_aligned(a, node, len(shape), axes) for a in parts(updates))
    if reduction == "add":
        fixed, shared, local = (a + share * v for a, v in zip(parts(x)[1:], variances, strict=True))
        hit = min(share, 1.0)
        return (Moments(x.mean + share * m, fixed + hit * (1 - hit) * m**2, shared, local),)
    p = min(share, 1.0)
    fixed, shared, local = ((1 - p) * a + p * v for a, v in zip(parts(x)[1:], variances, strict=True))
    return (Moments((1 - p) * x.mean + p * m, fixed + p * (1 - p) * (x.mean - m) ** 2, shared, local),)


def scatter_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Replaced, max, min: between the extremes of both; of sums and products nothing is known."""
    data, updates = xs[0], xs[2]
    if data is None or updates is None or attribute(node, "reduction", "none") not in ("none", "max", "min"):
        return (None,)
    both = [extremes(box, len(node.outputs[0].shape or ())) for box in (data, updates)]
    return (Range(np.minimum(both[0].lo, both[1].lo), np.maximum(both[0].hi, both[1].hi)),)


def scatter_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """The data keeps the gradient where it was not replaced, the updates take that of their places."""
    found, reduction = _written(node), attribute(node, "reduction", "none")
    updates = dims(node.inputs[2])
    if gs[0] is None or found is None or updates is None or reduction not in ("none", "add"):
        return (None, None, None)
    shape, axes, share = found
    g = averaged_gradient(gs[0].map(lambda a: lifted(a, len(shape))), axes)
    kept = g if reduction == "add" else g.scaled(1 - min(share, 1.0))

    def placed(a: Array) -> Array:
        return lifted(a.reshape(a.shape[len(axes) :]) if op(node) == "ScatterND" else a, len(updates))

    return (kept, None, g.map(placed))


def scatter_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """1 towards the data; towards updates the same where each place is written once at most (constant indices)."""
    reduction, ids = attribute(node, "reduction", "none"), ctx.array(node.inputs[1])
    if reduction == "mul":
        return (None, None, None)
    shape = dims(node.inputs[0])
    if ids is None or shape is None or op(node) != "ScatterND":
        return (1.0, None, None)
    lines = (ids % shape[: ids.shape[-1]]).reshape(-1, ids.shape[-1])
    most = int(np.unique(lines, axis=0, return_counts=True)[1].max(initial=1))
    return (1.0, None, math.sqrt(most))


# -- ScatterElements, ScatterND: vjp -----------------------------------------------------------------------------------


def _at(b: Backward, node: ir.Node, v: ir.Value) -> ir.Value:
    """The elements of v, shaped like the data, at the places of the updates."""
    if op(node) == "ScatterND":
        return b.op("GatherND", v, node.inputs[1])
    data, index, axis = node.inputs[0], node.inputs[1], attribute(node, "axis", 0)
    assert data is not None
    assert index is not None
    rank = len(index.shape) if index.shape is not None else 0
    axis = axis % rank if rank else axis
    cut = [k for k in range(rank) if k != axis and along(data, k)[1] != along(index, k)[1]]
    if cut:  # the index may be smaller than the data along the other axes
        ends = b.op("Concat", *(size_of(b, index, k) for k in cut), axis=0)
        v = b.op("Slice", v, b.constant([0] * len(cut)), ends, b.constant(cut))
    return b.op("GatherElements", v, index, axis=axis)


def _put(b: Backward, node: ir.Node, v: ir.Value, updates: ir.Value, reduction: str) -> ir.Value:
    axis = None if op(node) == "ScatterND" else attribute(node, "axis", 0)
    return b.op(op(node), v, node.inputs[1], updates, axis=axis, reduction=reduction)


def _summed(b: Backward, node: ir.Node, updates: ir.Value) -> ir.Value:
    """Zeros shaped like the data plus the updates, several at one place added."""
    data, index = node.inputs[:2]
    assert data is not None
    assert index is not None
    if op(node) == "ScatterND":
        return added_at(b, updates, data, index)
    zeros = b.op("Expand", b.scalar(0.0, updates), b.shape(data))
    return _put(b, node, zeros, updates, "add")


def _mask(b: Backward, a: ir.Value, c: ir.Value, like: ir.Value) -> ir.Value:
    """1 where a equals c, else 0, in the type of `like`."""
    equal = b.op("Equal", a, c, dtype=BOOL)
    return b.op("Where", equal, b.scalar(1.0, like), b.scalar(0.0, like), dtype=like.dtype)


def scatter_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Replaced places give the data no gradient; added ones both; max and min share it evenly among equals."""
    data, _, updates = node.inputs[:3]
    g, reduction = gs[0], attribute(node, "reduction", "none")
    assert g is not None
    assert data is not None
    assert updates is not None
    if reduction == "add":
        return (g, None, _at(b, node, g) if b.wanted(updates) else None)
    if reduction == "none":
        zeros = b.op("Expand", b.scalar(0.0, g), b.shape(updates))
        left = _put(b, node, g, zeros, "none") if b.wanted(data) else None
        return (left, None, _at(b, node, g) if b.wanted(updates) else None)
    if reduction == "mul":
        return _product_vjp(b, node, g)
    y = node.outputs[0]
    won, tied = _mask(b, data, y, g), _mask(b, updates, _at(b, node, y), g)
    each = b.op("Div", g, b.op("Add", won, _summed(b, node, tied)))
    return (b.op("Mul", each, won), None, b.op("Mul", _at(b, node, each), tied))


def _product_vjp(b: Backward, node: ir.Node, g: ir.Value) -> Values:
    """y = x prod u: each factor's gradient is g times the product of the others, exact where factors are zero.

    With P the product of the factors other than zero, that of all but one is P over it (P itself where it is zero), and
    zero if another factor is.
    """
    data, _, updates = node.inputs[:3]
    assert data is not None
    assert updates is not None
    zero, one = b.scalar(0.0, g), b.scalar(1.0, g)
    null = _mask(b, updates, zero, g)
    filled = b.op("Add", updates, null)
    ones = b.op("Expand", one, b.shape(data))
    product = _put(b, node, ones, filled, "mul")
    zeros = _summed(b, node, null)
    dx = b.op("Mul", b.op("Mul", g, product), _mask(b, zeros, zero, g))
    others = b.op("Div", _at(b, node, b.op("Mul", b.op("Mul", g, data), product)), filled)
    return (dx, None, b.op("Mul", others, _mask(b, _at(b, node, zeros), null, g)))


for _op in ("ScatterElements", "ScatterND"):
    row(
        _op,
        moments=scatter_moments,
        range=scatter_range,
        pullback=scatter_pullback,
        bound=scatter_bound,
        vjp=scatter_vjp,
    )


# -- TensorScatter -----------------------------------------------------------------------------------------------------


def cache_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Replaced along one axis: a share of updates among the cache."""
    past, update = dims(node.inputs[0]), dims(node.inputs[1])
    if xs[0] is None or xs[1] is None or past is None or update is None:
        return (None,)
    axis = attribute(node, "axis", -2) % len(past)
    p = update[axis] / past[axis]
    x, u = (averaged(v.map(lambda a: lifted(a, len(past))), (axis,)) for v in (xs[0], xs[1]))
    fixed, shared, local = ((1 - p) * a + p * c for a, c in zip(parts(x)[1:], parts(u)[1:], strict=True))
    return (Moments((1 - p) * x.mean + p * u.mean, fixed + p * (1 - p) * (x.mean - u.mean) ** 2, shared, local),)


def cache_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    past, update = dims(node.inputs[0]), dims(node.inputs[1])
    if gs[0] is None or past is None or update is None:
        return (None,) * len(node.inputs)
    axis = attribute(node, "axis", -2) % len(past)
    g = averaged_gradient(gs[0].map(lambda a: lifted(a, len(past))), (axis,))
    return (g.scaled(1 - update[axis] / past[axis]), g, *(None,) * (len(node.inputs) - 2))


def cache_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The update's places are those from `write_indices` on along the axis, of each example its own."""
    past, update, g = node.inputs[0], node.inputs[1], gs[0]
    start = node.inputs[2] if len(node.inputs) > 2 else None
    if past is None or update is None or g is None or update.shape is None:
        raise Unsupported("an update of unknown rank")
    rank = len(update.shape)
    axis = attribute(node, "axis", -2) % rank
    count = b.op("Squeeze", size_of(b, update, axis), b.constant([0]))
    steps = b.op("Range", b.constant(0), count, b.constant(1))
    places = b.op("Reshape", steps, b.constant([-1 if k == axis else 1 for k in range(rank)]))
    if start is not None:
        own = b.op("Reshape", start, b.constant([-1] + [1] * (rank - 1)))
        places = b.op("Add", places, own)
    if attribute(node, "mode", "linear") == "circular":
        places = b.op("Mod", places, size_of(b, past, axis))
    places = b.op("Expand", places, b.shape(update))
    zeros = b.op("Expand", b.scalar(0.0, g), b.shape(update))
    left = b.op("ScatterElements", g, places, zeros, axis=axis)
    return (left, b.op("GatherElements", g, places, axis=axis), *(None,) * (len(node.inputs) - 2))


row("TensorScatter", moments=cache_moments, pullback=cache_pullback, vjp=cache_vjp)


# -- OneHot ------------------------------------------------------------------------------------------------------------


def one_hot_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """On with probability 1 / depth: ids taken as uniform."""
    values, out, picked = ctx.array(node.inputs[2]), dims(node.outputs[0]), dims(node.inputs[0])
    if values is None or out is None or picked is None:
        return (None,)
    off, on = (float(v) for v in values)
    p = math.prod(picked) / max(1, math.prod(out))
    one = np.ones((1,) * len(out))
    return (Moments((off + p * (on - off)) * one, 0 * one, 0 * one, p * (1 - p) * (on - off) ** 2 * one),)


def one_hot_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    return (None if xs[2] is None else extremes(xs[2], len(node.outputs[0].shape or ())),)


def one_hot_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """(off, on): each sums the gradients of its elements, incoherently."""
    out, picked = dims(node.outputs[0]), dims(node.inputs[0])
    if gs[0] is None or out is None or picked is None:
        return (None, None, None)
    on = math.prod(picked)
    counts = np.array([math.prod(out) - on, on], np.float64)
    examples = ctx.batch if ctx.varies(node.outputs[0]) else 1
    total = float(np.mean(gs[0].total)) * np.maximum(counts / examples, 1.0)
    return (None, None, Gradient(0 * total, total))


def one_hot_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """To the values (off, on): the sum over the elements that are on, and over the rest."""
    index, depth, g = node.inputs[0], node.inputs[1], gs[0]
    assert g is not None
    assert g.dtype is not None
    lit = b.op("OneHot", index, depth, b.constant([0, 1], g.dtype.numpy()), axis=attribute(node, "axis", -1))
    lit.dtype = g.dtype
    on = b.op("ReduceSum", b.op("Mul", g, lit), keepdims=0)
    off = b.op("Sub", b.op("ReduceSum", g, keepdims=0), on)
    ends = (b.op("Unsqueeze", v, b.constant([0])) for v in (off, on))
    return (None, None, b.op("Concat", *ends, axis=0))


row("OneHot", moments=one_hot_moments, range=one_hot_range, pullback=one_hot_pullback, vjp=one_hot_vjp)


# -- Compress ----------------------------------------------------------------------------------------------------------


def compress_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Any element along the axis (of all where it flattens): described by its average."""
    axis = attribute(node, "axis")
    if xs[0] is None or node.inputs[0] is None or node.inputs[0].shape is None:
        return (None,)
    x = xs[0].map(lambda a: lifted(a, len(node.inputs[0].shape)))  # type: ignore[union-attr, arg-type]
    if axis is not None:
        return (averaged(x, (axis,)),)
    return (averaged(x, range(len(resolution(*parts(x))))).map(lambda a: a.reshape(1)),)


def compress_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    return (None if xs[0] is None else extremes(xs[0], len(node.outputs[0].shape or ())),)


def compress_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """What was dropped has none; a condition that varies is taken to keep half."""
    shape, out, axis = dims(node.inputs[0]), dims(node.outputs[0]), attribute(node, "axis")
    if gs[0] is None or shape is None:
        return (None, None)
    share = 0.5 if out is None else math.prod(out) / max(1, math.prod(shape))
    total = gs[0].total.mean(axis=axis, keepdims=axis is not None) * share
    total = lifted(np.atleast_1d(total), len(shape))
    return (Gradient(0 * total, total), None)


def compress_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (1.0, None)


def compress_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Slices put back at the places where the condition holds."""
    x, condition, g, axis = node.inputs[0], node.inputs[1], gs[0], attribute(node, "axis")
    assert x is not None
    assert g is not None
    if x.shape is None:
        raise Unsupported("an input of unknown rank")
    rank = len(x.shape)
    places = b.op("NonZero", condition, dtype=INT64)
    if axis is None:
        size = b.op("Reshape", b.op("Size", x, dtype=INT64), b.constant([1]))
        return (reshape_like(b, scattered(b, g, size, b.op("Reshape", places, b.constant([-1])), 0), x), None)
    axis %= rank
    column = b.op("Reshape", places, b.constant([-1 if k == axis else 1 for k in range(rank)]))
    return (scattered(b, g, b.shape(x), column, axis), None)


row(
    "Compress",
    moments=compress_moments,
    range=compress_range,
    pullback=compress_pullback,
    bound=compress_bound,
    vjp=compress_vjp,
)
