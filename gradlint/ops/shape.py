"""Operators that rearrange, retype or stretch: Identity, Cast, Reshape, Transpose, Expand.

Moments follow the axes: groups of input axes are matched with groups of output axes of equal size. Arrays that do not
resolve a group stay so (windows of positions are positions); arrays that resolve all of it are reshaped; where they
resolve some of its axes (the channels of (C, H, W) flattened into C*H*W features) the group is resolved element by
element, or averaged where that would take more than 2^18 numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims, is_float, op
from gradlint.runs import groups
from gradlint.transfer import Context, blocks, over_tokens, passthrough, row, summed

Values = Sequence[ir.Value | None]
Shape = tuple[int, ...]
LARGEST = 1 << 18  # numbers in an array that describes a value

# -- arrays that broadcast against a value -----------------------------------------------------------------------------


def lifted(a: Array, rank: int) -> Array:
    """The array with as many axes as the value it describes."""
    return a.reshape((1,) * (rank - a.ndim) + a.shape)


def rest(node: ir.Node) -> tuple[None, ...]:
    """No answer for every input but the first."""
    return (None,) * (len(node.inputs) - 1)


def resolution(*arrays: Array) -> Shape:
    """The sizes of several arrays that describe one value, together."""
    return np.broadcast_shapes(*(a.shape for a in arrays))


def parts(x: Moments) -> tuple[Array, Array, Array, Array]:
    return x.mean, x.fixed, x.shared, x.local


def averaged(x: Moments, axes: Sequence[int]) -> Moments:
    """Moments no longer resolved along `axes`: the spread of the means becomes `fixed`."""
    along = tuple(axes)
    if all(a.shape[k] == 1 for a in parts(x) for k in along):
        return x
    y = x.map(lambda a: a.mean(axis=along, keepdims=True))
    return dataclasses.replace(y, fixed=y.fixed + (x.mean**2).mean(axis=along, keepdims=True) - y.mean**2)


def averaged_gradient(g: Gradient, axes: Sequence[int], others: int = 1) -> Gradient:
    """The gradient no longer resolved along `axes`; what differed along them is local.

    others: the positions m along the remaining axes. The k values along `axes` are taken as independent; `shared` keeps
    what the sum over all k m positions needs: k m^2 s + k m l = (k m)^2 s' + k m l' with s' + l' = s + l, so that
    s' = s (m - 1) / (k m - 1).
    """
    along = tuple(k for k in axes if g.shared.shape[k] > 1 or g.local.shape[k] > 1)
    if not along:
        return g
    count = math.prod(resolution(g.shared, g.local)[k] for k in along)
    shared, local = (a.mean(axis=along, keepdims=True) for a in (g.shared, g.local))
    kept = shared * ((others - 1) / (count * others - 1))
    balanced = None if g.balanced is None else g.balanced.mean(axis=along, keepdims=True)
    return Gradient(kept, shared + local - kept, balanced)


def spread(box: Range, axes: Sequence[int]) -> Range:
    """The union of the intervals along `axes`."""
    return Range(box.lo.min(axis=tuple(axes), keepdims=True), box.hi.max(axis=tuple(axes), keepdims=True))


# -- groups of axes ----------------------------------------------------------------------------------------------------


def regroup(a: Array, src: Shape, dst: Shape) -> Array:
    """An array that broadcasts against `src` rearranged for `dst` (row-major), no group left partly resolved."""
    full, out = [1] * len(src), [1] * len(dst)
    for left, right in groups(src, dst):
        if any(a.shape[k] > 1 for k in left):
            for k in left:
                full[k] = src[k]
            for k in right:
                out[k] = dst[k]
    return np.broadcast_to(a, full).reshape(out)


def costly(sizes: Shape, src: Shape, dst: Shape) -> list[int]:
    """The axes to average first because resolving their group whole would take too many numbers."""
    mixed = [left for left, _ in groups(src, dst) if len({sizes[k] > 1 for k in left}) == 2]
    size = math.prod(sizes)
    found: list[int] = []
    for left in mixed:
        grown = size * math.prod(src[k] for k in left if sizes[k] == 1)
        if grown > LARGEST:
            found += left
        else:
            size = grown
    return found


def positions(sizes: Shape, shape: Shape, batch: int) -> list[int]:
    """The axes of a value that its arrays do not resolve, the examples' aside."""
    pairs = enumerate(zip(sizes, shape, strict=True))
    return [k for k, (n, m) in pairs if n == 1 and m > 1 and (k > 0 or m != batch)]


def _sizes(node: ir.Node) -> tuple[Shape, Shape] | None:
    src, dst = dims(node.inputs[0]), dims(node.outputs[0])
    return None if src is None or dst is None or 0 in src or 0 in dst else (src, dst)


def reshaped(ctx: Context, x: Moments, src: Shape, dst: Shape, *, varies: bool) -> Moments:
    """Moments of a value of shape `src` seen in the shape `dst`.

    Where positions have become units and none is left, `shared` can no longer be told from `local` and joins it.
    Examples are alike: their axis is never resolved.
    """
    x = x.map(lambda a: lifted(a, len(src)))
    x = averaged(x, costly(resolution(*parts(x)), src, dst))
    had = positions(resolution(*parts(x)), src, ctx.batch)
    y = x.map(lambda a: regroup(a, src, dst))
    if varies and dst and dst[0] == ctx.batch:
        y = averaged(y, (0,))
    if had and not positions(resolution(*parts(y)), dst, ctx.batch):
        y = Moments(y.mean, y.fixed, np.zeros_like(y.shared), y.shared + y.local)
    return y


def reshaped_back(ctx: Context, x: Moments | None, g: Gradient, src: Shape, dst: Shape, *, varies: bool) -> Gradient:
    """Gradient of a value of shape `src` from that of its view in the shape `dst`.

    Where a group was rearranged, axes that x does not resolve are positions: the gradient is averaged over them again.
    """
    g = g.map(lambda a: lifted(a, len(dst)))
    g = averaged_gradient(g, costly(resolution(g.shared, g.local), dst, src))
    back = g.map(lambda a: regroup(a, dst, src))
    if x is not None:
        sizes = resolution(*(lifted(a, len(src)) for a in parts(x)))
        moved = [k for left, right in groups(src, dst) if len(left) > 1 or len(right) > 1 for k in left]
        others = positions(resolution(back.shared, back.local), src, ctx.batch)
        back = averaged_gradient(back, [k for k in moved if sizes[k] == 1], math.prod(src[k] for k in others))
    return back.map(lambda a: a.mean(axis=0, keepdims=True)) if varies and src and src[0] == ctx.batch else back


# -- Identity, Dropout, Cast -------------------------------------------------------------------------------------------


def identity_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    return (gs[0], *rest(node))


passthrough("Identity", lambda node, a: a, lambda node, a: a, identity_vjp)
passthrough("Dropout", lambda node, a: a, lambda node, a: a, identity_vjp)


def cast_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Floats keep theirs; bytes are taken as uniform pixels, other integers and booleans as masks of ones."""
    x = node.inputs[0]
    if x is None or is_float(x):
        return (xs[0],)
    rank = len(x.shape) if x.shape is not None else 0
    if x.dtype == ir.DataType.UINT8:
        return (Moments.normal(rank, 127.5, (256**2 - 1) / 12),)
    return (Moments.normal(rank, 1.0, 0.0),)


def cast_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Between floats that of the input; of booleans and bytes that of their type."""
    x, y = node.inputs[0], node.outputs[0]
    known = {ir.DataType.BOOL: (0.0, 1.0), ir.DataType.UINT8: (0.0, 255.0)}
    if x is not None and x.dtype in known:
        rank = len(x.shape) if x.shape is not None else 0
        return (Range(*(np.full((1,) * rank, end) for end in known[x.dtype])),)
    return (xs[0] if is_float(x) and is_float(y) else None,)


def cast_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    return (gs[0] if is_float(node.inputs[0]) and is_float(node.outputs[0]) else None, *rest(node))


def cast_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (1.0, *rest(node))


def cast_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """From float to float the gradient is cast back; through integers there is none."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert g is not None
    assert x is not None
    if x.dtype is None or not is_float(x) or not (is_float(y) or y.dtype is None):
        return (None, *rest(node))
    return (g if x.dtype == y.dtype else b.op("Cast", g, dtype=x.dtype, to=int(x.dtype)), *rest(node))


for _op in ("Cast", "CastLike"):
    row(_op, moments=cast_moments, range=cast_range, pullback=cast_pullback, bound=cast_bound, vjp=cast_vjp)


# -- Reshape, Flatten, Squeeze, Unsqueeze ------------------------------------------------------------------------------


def reshape_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    sizes = _sizes(node)
    if xs[0] is None or sizes is None:
        return (None,)
    return (reshaped(ctx, xs[0], *sizes, varies=ctx.varies(node.outputs[0])),)


def reshape_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    sizes = _sizes(node)
    if xs[0] is None or sizes is None:
        return (None,)
    src, dst = sizes
    box = xs[0].map(lambda a: lifted(a, len(src)))
    box = spread(box, costly(resolution(box.lo, box.hi), src, dst))
    return (box.map(lambda a: regroup(a, src, dst)),)


def reshape_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    sizes = _sizes(node)
    if gs[0] is None or sizes is None:
        return (None, *rest(node))
    x = node.inputs[0]
    varies = ctx.varies(x)
    copies = x is not None and (before := x.producer()) is not None and op(before) == "Expand"
    known = xs[0] if varies and not copies else None  # the gradient differs from copy to copy (heads that share keys)
    g, y = gs[0], ys[0]
    if known is not None and y is not None and max(resolution(*parts(y))) > 1:
        moved = [k for left, right in groups(*sizes) if len(left) > 1 or len(right) > 1 for k in right]
        g = over_tokens(g, y, moved)
    return (reshaped_back(ctx, known, g, *sizes, varies=varies), *rest(node))


def move_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """Each element is kept once: the norm of the gradient is."""
    return (1.0, *rest(node))


def reshape_like(b: Backward, g: ir.Value, x: ir.Value) -> ir.Value:
    """g in the shape of x; a size 0 stands for itself."""
    known = dims(x)
    empty = known is None or 0 in known
    return b.op("Reshape", g, b.shape(x), allowzero=1 if empty else None)


def reshape_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    return (reshape_like(b, g, x), *rest(node))


for _op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
    row(_op, moments=reshape_moments, range=reshape_range, pullback=reshape_pullback, bound=move_bound, vjp=reshape_vjp)


# -- Transpose ---------------------------------------------------------------------------------------------------------


def permutation(node: ir.Node) -> list[int] | None:
    """Transpose's permutation; the axes reversed where none is given."""
    perm, x = attribute(node, "perm"), node.inputs[0]
    if perm is not None:
        return list(perm)
    return None if x is None or x.shape is None else list(reversed(range(len(x.shape))))


def _permuted(node: ir.Node, a: Array) -> Array:
    perm = permutation(node) or []
    return lifted(a, len(perm)).transpose(perm)


def _permuted_back(node: ir.Node, a: Array) -> Array:
    perm = permutation(node) or []
    return lifted(a, len(perm)).transpose(np.argsort(perm))


def transpose_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    perm = attribute(node, "perm")
    return (b.op("Transpose", gs[0], perm=None if perm is None else [int(k) for k in np.argsort(perm)]),)


passthrough("Transpose", _permuted, _permuted_back, transpose_vjp)


# -- Expand ------------------------------------------------------------------------------------------------------------


def expand_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Along a new axis a value is the same everywhere: what was local becomes shared, if it had no positions before."""
    src, dst = dims(node.inputs[0]), dims(node.outputs[0])
    if xs[0] is None or src is None or dst is None:
        return (None,)
    own = (1,) * (len(dst) - len(src)) + src
    x = xs[0].map(lambda a: lifted(a, len(dst)))
    if positions(own, dst, ctx.batch) and not positions(resolution(*parts(x)), own, ctx.batch):
        x = Moments(x.mean, x.fixed, x.shared + x.local, np.zeros_like(x.local))
    return (x,)


def expand_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    y = node.outputs[0]
    return (None if xs[0] is None or y.shape is None else xs[0].map(lambda a: lifted(a, len(y.shape or ()))),)


def over_copies(ctx: Context, node: ir.Node, g: Gradient, small: Shape) -> Gradient:
    """The sum over copies of the input; those of a constant along the batch axis, one per example, add incoherently."""
    y, dst = node.outputs[0], dims(node.outputs[0]) or (1,)
    g = g.map(lambda a: lifted(a, len(dst)))
    examples = dst[0] == ctx.batch and (len(small) < len(dst) or small[0] == 1)
    if examples and not ctx.varies(y):
        g = Gradient(g.shared / ctx.batch, g.local)
    return summed(ctx, g, y, small, constant=not ctx.varies(node.inputs[0]))


def expand_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    small = dims(node.inputs[0])
    return (None if gs[0] is None or small is None else over_copies(ctx, node, gs[0], small), None)


def copies_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """n copies: sqrt(n)."""
    src, dst = dims(node.inputs[0]), dims(node.outputs[0])
    return (None if src is None or dst is None or 0 in src else math.sqrt(math.prod(dst) / math.prod(src)), *rest(node))


def expand_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    return b.unbroadcast(g, x, node.outputs[0]), None


row(
    "Expand",
    moments=expand_moments,
    range=expand_range,
    pullback=expand_pullback,
    bound=copies_bound,
    vjp=expand_vjp,
)


# -- no gradient -------------------------------------------------------------------------------------------------------


def constant_of_shape_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    value = attribute(node, "value")
    level = float(value.numpy().reshape(-1)[0]) if value is not None else 0.0
    return (Moments.normal(len(node.outputs[0].shape or ()), level, 0.0),)


def random_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Normal draws by their mean and scale, uniform ones by their ends."""
    rank = len(node.outputs[0].shape or ())
    if op(node).startswith("RandomNormal"):
        return (Moments.normal(rank, attribute(node, "mean", 0.0), attribute(node, "scale", 1.0) ** 2),)
    low, high = attribute(node, "low", 0.0), attribute(node, "high", 1.0)
    return (Moments.normal(rank, (low + high) / 2, (high - low) ** 2 / 12),)


_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
blocks("Shape", "Size", "ConstantOfShape", "Range", "EyeLike", "Bernoulli", "Multinomial", *_RANDOM)
row("ConstantOfShape", moments=constant_of_shape_moments)
for _op in _RANDOM:
    row(_op, moments=random_moments)
