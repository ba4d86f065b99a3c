"""Copies and blocks: Tile, DepthToSpace, SpaceToDepth, Col2Im."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.concatenation import INT64, size_of
from gradlint.ops.shape import (
    Shape,
    averaged,
    copies_bound,
    lifted,
    move_bound,
    parts,
    positions,
    reshape_like,
    resolution,
)
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]

# -- Tile --------------------------------------------------------------------------------------------------------------


def _repeats(node: ir.Node) -> tuple[Shape, Shape] | None:
    """The input's shape and how often each axis is repeated."""
    src, dst = dims(node.inputs[0]), dims(node.outputs[0])
    if src is None or dst is None or 0 in src:
        return None
    return src, tuple(m // n for n, m in zip(src, dst, strict=True))


def _tiled(a: Array, node: ir.Node, src: Shape, times: Shape) -> Array:
    a = lifted(a, len(src))
    return np.tile(a, [r if n > 1 else 1 for r, n in zip(times, a.shape, strict=True)])


def tile_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Units are repeated; along an axis of size 1 copies are the same everywhere, as Expand's are."""
    sizes = _repeats(node)
    if xs[0] is None or sizes is None:
        return (None,)
    src, times = sizes
    x = xs[0].map(lambda a: _tiled(a, node, src, times))
    if any(r > 1 and n == 1 for r, n in zip(times, src, strict=True)) and not positions(
        resolution(*parts(xs[0])), src, ctx.batch
    ):
        x = Moments(x.mean, x.fixed, x.shared + x.local, np.zeros_like(x.local))
    return (x,)


def tile_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    sizes = _repeats(node)
    return (None if xs[0] is None or sizes is None else xs[0].map(lambda a: _tiled(a, node, *sizes)),)


def tile_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """The sum over copies."""
    sizes, g = _repeats(node), gs[0]
    if g is None or sizes is None:
        return (None, None)
    src, times = sizes
    for axis, (n, r) in enumerate(zip(src, times, strict=True)):
        split = [(1, 1) if m == 1 else (r, n) for m in (g.shared.shape[axis], g.local.shape[axis])]
        folded = [
            a.reshape((*a.shape[:axis], *pair, *a.shape[axis + 1 :])).sum(axis=axis) * (r if pair == (1, 1) else 1)
            for a, pair in zip((g.shared, g.local), split, strict=True)
        ]
        g = Gradient(folded[0] * (r if split[0] == (1, 1) else 1), folded[1])
    return (g, None)


def tile_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Each axis split into (copies, size), summed over the copies."""
    x, repeats, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert repeats is not None
    assert g is not None
    times = constant_array(repeats)
    rank = len(x.shape) if x.shape is not None else (dims(repeats) or (None,))[0]
    if rank is None:
        raise Unsupported("an input of unknown rank")
    axes = [k for k in range(rank) if times is None or times[k] != 1]
    pairs = [b.op("Unsqueeze", v, b.constant([1])) for v in (repeats, b.shape(x))]
    both = b.op("Reshape", b.op("Concat", *pairs, axis=1), b.constant([-1]))
    wide = b.op("Reshape", g, both, allowzero=1)
    return (reshape_like(b, b.sum_over(wide, [2 * k for k in axes]), x), None)


row("Tile", moments=tile_moments, range=tile_range, pullback=tile_pullback, bound=copies_bound, vjp=tile_vjp)


# -- DepthToSpace, SpaceToDepth ----------------------------------------------------------------------------------------


def _by_block(a: Array, node: ir.Node) -> tuple[Array, int]:
    """Channels as (groups of block^2, channels of the smaller count) where resolved, and the axis of the groups."""
    block = attribute(node, "blocksize") ** 2
    if a.shape[1] == 1:
        return a[:, None], 1
    if attribute(node, "mode", "DCR") == "CRD":
        return a.reshape(a.shape[0], -1, block, *a.shape[2:]), 2
    return a.reshape(a.shape[0], block, -1, *a.shape[2:]), 1


def _level(a: Array) -> Array:
    """Averaged over height and width."""
    return a.mean(axis=(2, 3), keepdims=True)


def _to_space(x: Moments, node: ir.Node) -> Moments:
    """Channels become positions: their mean, the spread of their means as `fixed`.

    1 / block^2 of the pairs of positions lie in the same channel, so this much of `shared` stays.
    """
    x = averaged(x, (2, 3))

    def mean(a: Array) -> Array:
        wide, axis = _by_block(a, node)
        return wide.mean(axis=axis)

    y = x.map(mean)
    shared = y.shared / attribute(node, "blocksize") ** 2
    fixed = y.fixed + mean(x.mean**2) - y.mean**2
    return Moments(y.mean, fixed, shared, y.local + y.shared - shared)


def _to_depth(a: Array, node: ir.Node) -> Array:
    block = attribute(node, "blocksize") ** 2
    if a.shape[1] == 1:
        return a
    return np.repeat(a, block, axis=1) if attribute(node, "mode", "DCR") == "CRD" else np.tile(a, (1, block, 1, 1))


def to_space_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    return (None if xs[0] is None else _to_space(xs[0], node),)


def to_space_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    return (None if gs[0] is None else gs[0].map(lambda a: _to_depth(_level(a), node)),)


def to_depth_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    return (None if xs[0] is None else averaged(xs[0], (2, 3)).map(lambda a: _to_depth(a, node)),)


def to_depth_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    if gs[0] is None:
        return (None,)

    def mean(a: Array) -> Array:
        wide, axis = _by_block(_level(a), node)
        return wide.mean(axis=axis)

    return (gs[0].map(mean),)


def blocked_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """One interval for all elements."""
    if xs[0] is None:
        return (None,)
    return (Range(np.full((1,) * 4, xs[0].lo.min()), np.full((1,) * 4, xs[0].hi.max())),)


def to_space_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """SpaceToDepth; it orders channels as DCR does, so CRD swaps (block^2, C) after it."""
    y, g, block = node.outputs[0], gs[0], attribute(node, "blocksize")
    assert g is not None
    d = b.op("SpaceToDepth", g, blocksize=block)
    if attribute(node, "mode", "DCR") == "DCR":
        return (d,)
    channels = size_of(b, y, 1)
    wide = b.op("Reshape", d, b.op("Concat", b.constant([0, block**2]), channels, b.constant([-1]), axis=0))
    x = node.inputs[0]
    assert x is not None
    return (reshape_like(b, b.op("Transpose", wide, perm=[0, 2, 1, 3]), x),)


def to_depth_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    return (b.op("DepthToSpace", gs[0], blocksize=attribute(node, "blocksize"), mode=attribute(node, "mode", "DCR")),)


row(
    "DepthToSpace",
    moments=to_space_moments,
    range=blocked_range,
    pullback=to_space_pullback,
    bound=move_bound,
    vjp=to_space_vjp,
)
row(
    "SpaceToDepth",
    moments=to_depth_moments,
    range=blocked_range,
    pullback=to_depth_pullback,
    bound=move_bound,
    vjp=to_depth_vjp,
)


# -- Col2Im ------------------------------------------------------------------------------------------------------------


def _overlap(ctx: Context, node: ir.Node) -> tuple[int, Array, float] | None:
    """(elements of a block, blocks that meet in each pixel, the share of the blocks' elements inside the image)."""
    dst, block = dims(node.outputs[0]), ctx.array(node.inputs[2])
    if dst is None or block is None:
        return None
    space = len(block)
    strides, dilations = (attribute(node, k) or [1] * space for k in ("strides", "dilations"))
    pads = attribute(node, "pads") or [0] * 2 * space
    counts, share = np.ones(()), 1.0
    for k, (n, size) in enumerate(zip(dst[2:], (int(s) for s in block), strict=True)):
        offsets = np.arange(size) * dilations[k]
        starts = np.arange(0, n + pads[k] + pads[k + space] - offsets[-1], strides[k]) - pads[k]
        spots = np.add.outer(starts, offsets)
        inside = spots[(spots >= 0) & (spots < n)]
        counts = np.multiply.outer(counts, np.bincount(inside, minlength=n))
        share *= inside.size / spots.size
    return int(np.prod(block)), counts, share


def _by_channel(a: Array, size: int, rank: int) -> Array:
    """(1, C * block, 1) averaged over the block: (1, C, 1, 1)."""
    a = a.mean(axis=2, keepdims=True)
    if a.shape[1] > 1:
        a = a.reshape(a.shape[0], -1, size).mean(axis=2, keepdims=True)
    return a.reshape(*a.shape[:2], *(1,) * (rank - 2))


def col2im_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Blocks add up as independent; how many meet differs by pixel: the average, with the spread as `fixed`."""
    overlap, rank = _overlap(ctx, node), len(node.outputs[0].shape or ())
    if xs[0] is None or overlap is None:
        return (None,)
    size, counts, _ = overlap
    x = xs[0].map(lambda a: _by_channel(a, size, rank))
    times = float(counts.mean())
    fixed = x.fixed * times + x.mean**2 * float(counts.var())
    return (Moments(x.mean * times, fixed, x.shared * times, x.local * times),)


def col2im_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each element shows one pixel, or lies in the padding."""
    overlap = _overlap(ctx, node)
    if gs[0] is None or overlap is None:
        return (None, None, None)
    size, _, share = overlap
    g = gs[0].map(lambda a: a.mean(axis=tuple(range(2, a.ndim)), keepdims=True).reshape(*a.shape[:2], 1))
    return (g.map(lambda a: np.repeat(a, size, axis=1) if a.shape[1] > 1 else a).scaled(share), None, None)


def col2im_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Blocks cut out of the image: a convolution of each channel with one unit kernel per element of the block."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    block = constant_array(node.inputs[2])
    if block is None or y.shape is None:
        raise Unsupported("a block shape that depends on the input")
    size = int(np.prod(block))
    settings = {k: attribute(node, k) for k in ("strides", "pads", "dilations")}
    image = b.op("Concat", b.constant([-1, 1]), b.op("Shape", g, dtype=INT64, start=2), axis=0)
    kernel = b.constant(np.eye(size).reshape(size, 1, *block), g.dtype.numpy() if g.dtype is not None else np.float32)
    blocks = b.op("Conv", b.op("Reshape", g, image), kernel, **settings)
    return (reshape_like(b, blocks, x), None, None)


row("Col2Im", moments=col2im_moments, pullback=col2im_pullback, vjp=col2im_vjp)
