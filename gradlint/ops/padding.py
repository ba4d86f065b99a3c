"""What surrounds, masks or reorders along an axis: Pad, CenterCropPad, Trilu, ReverseSequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.concatenation import INT64, along, resized, size_of
from gradlint.ops.indexing import scattered
from gradlint.ops.shape import LARGEST, averaged, lifted, move_bound, parts, resolution, rest
from gradlint.ops.slicing import reversed_along
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
Pads = dict[int, tuple[int, int]]
_IGNORED = 1e4  # padding beyond this (minus infinity ahead of a MaxPool) is there to be ignored

# -- Pad ---------------------------------------------------------------------------------------------------------------


def _pads(node: ir.Node, rank: int, given: np.ndarray | None, axes: np.ndarray | None) -> Pads | None:
    """How much is added (negative: removed) before and after each axis, where it is anything."""
    if given is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    on = [int(a) % rank for a in axes] if axes is not None else list(range(rank))
    found = {a: (int(given[k]), int(given[k + len(on)])) for k, a in enumerate(on)}
    return {a: p for a, p in sorted(found.items()) if p != (0, 0)}


def source(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """The index of the input element that each output element along an axis shows (-1: the constant)."""
    inner = np.arange(max(0, -before), size - max(0, -after))
    width = (max(0, before), max(0, after))
    if mode == "constant":
        return np.pad(inner, width, constant_values=-1)
    return np.pad(inner, width, mode=mode)  # type: ignore[call-overload]


def _setting(ctx: Context, node: ir.Node, k: int) -> np.ndarray | None:
    return ctx.array(node.inputs[k]) if len(node.inputs) > k and node.inputs[k] is not None else None


def _sources(ctx: Context, node: ir.Node) -> dict[int, np.ndarray] | None:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    pads = _pads(node, len(shape), _setting(ctx, node, 1), _setting(ctx, node, 3))
    mode = attribute(node, "mode", "constant")
    return None if pads is None else {a: source(shape[a], *p, mode) for a, p in pads.items()}


def _level(ctx: Context, node: ir.Node) -> float:
    value = _setting(ctx, node, 2)
    return 0.0 if value is None or value.size == 0 else float(value.reshape(-1)[0])


def _shown(a: Array, axis: int, indices: np.ndarray, fill: float) -> Array:
    """Along a resolved axis: the elements shown, `fill` where there is none."""
    taken = np.take(a, np.maximum(indices, 0), axis)
    outside = (indices < 0).reshape((-1,) + (1,) * (a.ndim - axis - 1))
    return np.where(outside, fill, taken)


def padded(x: Moments, axis: int, indices: np.ndarray, level: float) -> Moments:
    """Moments along one padded axis; of positions the share p that shows the input keeps its variance.

    A pair of positions shares what both show with probability p^2; the rest of the variance is local.
    """
    if abs(level) > _IGNORED:
        return x
    size = resolution(*parts(x))[axis]
    if size > 1:
        mean, *others = (
            _shown(resized(a, axis, size), axis, indices, level if k == 0 else 0.0) for k, a in enumerate(parts(x))
        )
        return Moments(mean, *others)
    p = float(np.mean(indices >= 0)) if indices.size else 1.0
    mean = p * x.mean + (1 - p) * level
    fixed = p * x.fixed + p * (1 - p) * (x.mean - level) ** 2
    shared = p * p * x.shared
    return Moments(mean, fixed, shared, p * (x.shared + x.local) - shared)


def pad_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    sources = _sources(ctx, node)
    if xs[0] is None or sources is None:
        return (None,)
    x = xs[0].map(lambda a: lifted(a, len(node.outputs[0].shape or ())))
    for axis, indices in sources.items():
        x = padded(x, axis, indices, _level(ctx, node))
    return (x,)


def pad_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """The input's and the constant's together."""
    sources = _sources(ctx, node)
    if xs[0] is None or sources is None or (len(node.inputs) > 2 and ctx.varies(node.inputs[2])):
        return (None,)
    box = xs[0].map(lambda a: lifted(a, len(node.outputs[0].shape or ())))
    level = _level(ctx, node)
    for axis, indices in sources.items():
        lo, hi = box.lo.min(axis=axis, keepdims=True), box.hi.max(axis=axis, keepdims=True)
        box = Range(np.minimum(lo, level), np.maximum(hi, level)) if (indices < 0).any() else Range(lo, hi)
    return (box,)


def spread_back(g: Gradient, x: Moments | None, axis: int, indices: np.ndarray, size: int) -> Gradient:
    """Each element sums the gradients of the places that show it: m of them (1 or 0 for constant padding)."""
    counts = np.bincount(indices[indices >= 0], minlength=size).astype(np.float64)
    sizes = [a.shape[axis] for a in (g.shared, g.local, *(parts(x) if x is not None else ())) if a.ndim > axis]
    if max(sizes) > 1:

        def back(a: Array) -> Array:
            full = np.broadcast_to(a, (*a.shape[:axis], len(indices), *a.shape[axis + 1 :]))
            out = np.zeros((*a.shape[:axis], size, *a.shape[axis + 1 :]))
            inside = indices >= 0
            np.add.at(np.moveaxis(out, axis, 0), indices[inside], np.moveaxis(full, axis, 0)[inside])
            return out

        return g.map(back)
    mean, square = float(counts.mean()), float((counts**2).mean())
    return Gradient(g.shared * mean**2, g.shared * (square - mean**2) + g.local * mean)


def pad_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    sources, shape = _sources(ctx, node), dims(node.inputs[0])
    if gs[0] is None or sources is None or shape is None:
        return (None, *rest(node))
    g = gs[0].map(lambda a: lifted(a, len(shape)))
    x = None if xs[0] is None else xs[0].map(lambda a: lifted(a, len(shape)))
    for axis, indices in sources.items():
        g = spread_back(g, x, axis, indices, shape[axis])
    return (g, *rest(node))


def pad_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """sqrt of how often one element is shown at most."""
    sources = _sources(ctx, node)
    if sources is None:
        return (None, *rest(node))
    most = math.prod(max(1, int(np.bincount(s[s >= 0]).max(initial=0))) for s in sources.values())
    return (math.sqrt(most), *rest(node))


def pad_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Constant: pads taken away again. Else each run of neighbours that a pad shows is added where it came from."""
    x, pads, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert pads is not None
    assert g is not None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    value = node.inputs[2] if len(node.inputs) > 2 else None
    mode = attribute(node, "mode", "constant")
    rank = len(x.shape) if x.shape is not None else 0
    known = _pads(node, rank, constant_array(pads), constant_array(axes)) if rank else None
    if mode == "constant":
        dx = _unpadded(b, g, pads, axes, known)
        if value is None or not b.wanted(value):
            return (dx, *rest(node))
        total, inside = (b.op("ReduceSum", v, keepdims=0) for v in (g, dx))
        return (dx, None, b.op("Reshape", b.op("Sub", total, inside), b.shape(value)), None)[: len(node.inputs)]
    if known is None:
        raise Unsupported("pads that depend on the input")
    for axis, (before, after) in known.items():
        size = along(x, axis)[1]
        if size is not None:
            g = _folded(b, g, axis, source(size, before, after, mode), size)
        else:
            g = _folded_at_run(b, g, x, axis, rank, (before, after), mode)
    return (g, *rest(node))


def _unpadded(b: Backward, g: ir.Value, pads: ir.Value, axes: ir.Value | None, known: Pads | None) -> ir.Value:
    if known is None or any(min(p) < 0 for p in known.values()):
        return b.op("Pad", g, b.op("Neg", pads), None, axes)
    if not known:
        return g
    ends = [-after if after else np.iinfo(np.int64).max for _, after in known.values()]
    starts = [before for before, _ in known.values()]
    return b.op("Slice", g, b.constant(starts), b.constant(ends), b.constant(list(known)))


def _runs(indices: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, stop, step) of the stretches along which an index map goes on by a constant step of 1, -1 or 0."""
    found: list[tuple[int, int, int]] = []
    start = 0
    while start < len(indices):
        stop = start + 1
        step = int(indices[stop] - indices[start]) if stop < len(indices) else 1
        step = step if abs(step) <= 1 else 1
        while stop < len(indices) and indices[stop] - indices[stop - 1] == step:
            stop += 1
        found.append((start, stop, step))
        start = stop
    return found


def _folded(b: Backward, g: ir.Value, axis: int, indices: np.ndarray, size: int) -> ir.Value:
    """The sum, over the stretches of a padded axis, of each one's gradient put back where its elements came from."""
    total: ir.Value | None = None
    for start, stop, step in _runs(indices):
        part = b.op("Slice", g, b.constant([start]), b.constant([stop]), b.constant([axis]))
        low, high = sorted((int(indices[start]), int(indices[stop - 1])))
        if step == 0:
            part = b.sum_over(part, [axis], keepdims=True)
        elif step < 0:
            part = reversed_along(b, part, axis)
        if low or high < size - 1:
            part = b.op("Pad", part, b.constant([low, size - 1 - high]), None, b.constant([axis]))
        total = part if total is None else b.op("Add", total, part)
    assert total is not None
    return total


def _folded_at_run(
    b: Backward, g: ir.Value, x: ir.Value, axis: int, rank: int, pads: tuple[int, int], mode: str
) -> ir.Value:
    """The same for a size met when it runs: rows scattered by the padded index map."""
    size = size_of(b, x, axis)
    count = b.op("Squeeze", size, b.constant([0]))
    zero, one = b.constant(0), b.constant(1)
    indices = b.op("Pad", b.op("Range", zero, count, one), b.constant(list(pads)), None, None, mode=mode)
    sizes = [size if k == axis else b.op("Shape", g, dtype=INT64, start=k, end=k + 1) for k in range(rank)]
    column = b.op("Reshape", indices, b.constant([-1 if k == axis else 1 for k in range(rank)]))
    return scattered(b, g, b.op("Concat", *sizes, axis=0), column, axis)


row("Pad", moments=pad_moments, range=pad_range, pullback=pad_pullback, bound=pad_bound, vjp=pad_vjp)


# -- CenterCropPad -----------------------------------------------------------------------------------------------------


def _centred(node: ir.Node) -> dict[int, np.ndarray] | None:
    """The index map of each axis: half of the difference is cut or added in front, rounded down."""
    src, dst = dims(node.inputs[0]), dims(node.outputs[0])
    if src is None or dst is None:
        return None
    changed = {a: (n, m) for a, (n, m) in enumerate(zip(src, dst, strict=True)) if n != m}
    front = {a: -((n - m) // 2) if n > m else (m - n) // 2 for a, (n, m) in changed.items()}
    return {a: source(n, front[a], m - n - front[a], "constant") for a, (n, m) in changed.items()}


def crop_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, sources = xs[0], _centred(node)
    if x is None or sources is None:
        return (None,)
    for axis, indices in sources.items():
        x = padded(x, axis, indices, 0.0)
    return (x,)


def crop_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    if xs[0] is None:
        return (None,)
    one = np.ones((1,) * len(node.outputs[0].shape or ()))
    return (Range(one * min(0.0, xs[0].lo.min()), one * max(0.0, xs[0].hi.max())),)


def crop_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    g, sources, shape = gs[0], _centred(node), dims(node.inputs[0])
    if g is None or sources is None or shape is None:
        return (None, None)
    for axis, indices in sources.items():
        g = spread_back(g, xs[0], axis, indices, shape[axis])
    return (g, None)


def crop_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The same again, back to the input's size: what was cut gets zeros, what was added is cut."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    axes = attribute(node, "axes")
    shape = b.shape(x) if axes is None else b.op("Concat", *(size_of(b, x, a) for a in axes), axis=0)
    return (b.op("CenterCropPad", g, shape, axes=axes), None)


row(
    "CenterCropPad",
    moments=crop_moments,
    range=crop_range,
    pullback=crop_pullback,
    bound=move_bound,
    vjp=crop_vjp,
)


# -- Trilu -------------------------------------------------------------------------------------------------------------


def _triangle(ctx: Context, node: ir.Node) -> Array | None:
    """1 where the triangle keeps an element; None where its diagonal depends on the input or it is large."""
    shape = dims(node.inputs[0])
    k = _setting(ctx, node, 1) if len(node.inputs) > 1 and node.inputs[1] is not None else np.array(0)
    if shape is None or k is None or shape[-1] * shape[-2] > LARGEST:
        return None
    ones = np.ones(shape[-2:])
    kept = np.triu(ones, int(k)) if attribute(node, "upper", 1) else np.tril(ones, int(k))
    return lifted(kept, len(shape))


def trilu_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    kept = _triangle(ctx, node)
    return (None if xs[0] is None or kept is None else xs[0].map(lambda a: a * kept),)


def trilu_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    kept = _triangle(ctx, node)
    return (None if xs[0] is None or kept is None else xs[0].map(lambda a: a * kept),)


def trilu_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    kept = _triangle(ctx, node)
    return (None if gs[0] is None or kept is None else gs[0].map(lambda a: a * kept), *rest(node))


def trilu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    k = node.inputs[1] if len(node.inputs) > 1 else None
    return (b.op("Trilu", gs[0], k, upper=attribute(node, "upper", 1)), *rest(node))


row("Trilu", moments=trilu_moments, range=trilu_range, pullback=trilu_pullback, bound=move_bound, vjp=trilu_vjp)


# -- ReverseSequence ---------------------------------------------------------------------------------------------------


def reverse_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Any element of the time axis may stand at any place: the axis is described by its average."""
    return (None if xs[0] is None else averaged(xs[0], (attribute(node, "time_axis", 0),)),)


def reverse_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    axis = attribute(node, "time_axis", 0)
    if xs[0] is None:
        return (None,)
    return (Range(xs[0].lo.min(axis=axis, keepdims=True), xs[0].hi.max(axis=axis, keepdims=True)),)


def reverse_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    axis = attribute(node, "time_axis", 0)
    return (None if gs[0] is None else gs[0].map(lambda a: a.mean(axis=axis, keepdims=True)), None)


def reverse_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Its own inverse."""
    axes = {k: attribute(node, k, d) for k, d in (("batch_axis", 1), ("time_axis", 0))}
    return (b.op("ReverseSequence", gs[0], node.inputs[1], **axes), None)


row(
    "ReverseSequence",
    moments=reverse_moments,
    range=reverse_range,
    pullback=reverse_pullback,
    bound=move_bound,
    vjp=reverse_vjp,
)
