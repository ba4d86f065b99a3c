"""Matrix products: y = x W, with x (.., K) and W (K, N), and products of two activations.

Moments: mean' = mean W, var' = var W^2, backward q' = q (W^2)^T, with the actual weights: elements of x taken as
uncorrelated (mean-field; Poole et al. 2016, Schoenholz et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.attention_products import (
    contract,
    logits,
    logits_pullback,
    makes_logits,
    mixes,
    mixture,
    mixture_pullback,
    swap,
)
from gradlint.transfer import Context, product, row, summed

Values = Sequence[ir.Value | None]
_BLOCK = 1 << 24  # elements of a weight squared at a time: 64 MB in float32


def times(v: Array, w: np.ndarray, power: int = 1) -> Array:
    """v @ w**power over the last axis of v, in blocks of rows: no second copy of a large matrix."""
    if v.shape[-1] != w.shape[-2]:
        v = np.broadcast_to(v, (*v.shape[:-1], w.shape[-2]))
    if w.ndim > 2 or w.size <= _BLOCK:
        return np.matmul(v, (w if power == 1 else np.square(w, dtype=np.float32)).astype(v.dtype, copy=False))
    total = np.zeros((*v.shape[:-1], w.shape[-1]))
    rows = max(1, _BLOCK // w.shape[-1])
    for k in range(0, w.shape[-2], rows):
        block = w[k : k + rows].astype(np.float32, copy=False)
        total += v[..., k : k + rows].astype(np.float32) @ (block if power == 1 else np.square(block))
    return total


def project(x: Moments, w: np.ndarray, width: int) -> Moments:
    """Moments of x W, `width` being the size of x's last axis.

    Where that axis is one of positions (the arrays do not resolve it, but resolve another), W mixes positions: a shared
    part goes through the sums of W's columns, and the outcome is described by its average over the new positions.
    """
    if x.mean.shape[-1] == 1 and width > 1 and x.mean.size > 1:
        sums, energy = w.astype(np.float64).sum(axis=-2), np.square(w, dtype=np.float64).sum(axis=-2)
        level, spread = float(sums.mean()), float(sums.var())
        total = x.shared * float(np.mean(sums**2)) + (x.local + x.fixed) * float(energy.mean())
        shared = np.minimum(x.shared * level**2, total)
        fixed = x.mean**2 * spread + x.fixed * float(energy.mean())
        return Moments(x.mean * level, fixed, shared, np.maximum(total - shared - x.fixed * float(energy.mean()), 0))
    return Moments(times(x.mean, w), times(x.fixed, w, 2), times(x.shared, w, 2), times(x.local, w, 2))


def operator_norm(w: np.ndarray) -> float:
    """An upper bound of the largest singular value of a matrix (the largest over a stack of them).

    min of the Frobenius norm and sqrt(norm_1 norm_inf); for small matrices the exact value.
    """
    a = np.abs(w.astype(np.float64)) if w.size <= _BLOCK else np.abs(w)
    if max(w.shape[-2:]) <= 512 and w.ndim == 2:
        return float(np.linalg.norm(w.astype(np.float64), 2)) * (1 + 1e-9)
    frobenius = np.sqrt(np.square(a).sum(axis=(-2, -1)))
    return float(np.max(np.minimum(frobenius, np.sqrt(a.sum(axis=-2).max(axis=-1) * a.sum(axis=-1).max(axis=-1)))))


def interval(x: Range, w: np.ndarray) -> Range:
    """x W over a box: the centre goes through W, the radius through |W|."""
    centre, radius = (x.lo + x.hi) / 2, (x.hi - x.lo) / 2
    mid, reach = times(centre, w), times(radius, np.abs(w))
    slack = 1e-6 * (np.abs(mid) + reach)  # float32 arithmetic of the model itself
    return Range(mid - reach - slack, mid + reach + slack)


def weight_gradient(ctx: Context, node: ir.Node, x: Moments, g: Gradient, shape: tuple[int, ...]) -> Gradient:
    """E[dW_kn^2], averaged over k: the sum over positions of x_k g_n."""
    average = x.map(lambda a: a.mean(axis=-1, keepdims=True))
    return summed(ctx, product(g, average), node.outputs[0], (*(1,) * (len(shape) - 1), shape[-1]), constant=True)


# -- two activations ---------------------------------------------------------------------------------------------------


def multiply(a: Moments, b: Moments, width: int) -> Moments:
    """Moments of a @ b, all elements independent: Var = sum E[a^2] E[b^2] - E[a]^2 E[b]^2.

    What of both is fixed or shared stays so only as far as both are; the cross terms are local.
    """

    def dot(u: Array, v: Array) -> Array:
        return contract(u, v, width)

    mean, square = dot(a.mean, b.mean), dot(a.mean**2, b.mean**2)
    total = np.maximum(dot(a.second, b.second) - square, 0)
    fixed = dot(a.fixed, b.mean**2 + b.fixed) + dot(a.mean**2, b.fixed)
    shared = dot(a.shared, b.mean**2 + b.shared) + dot(a.mean**2, b.shared)
    return Moments(mean, fixed, shared, np.maximum(total - fixed - shared, 0))


def _towards(g: Gradient, other: Moments, width: int) -> Gradient:
    """Gradient of one operand: the sum over `width` of g times the other; coherent where both are the same all along."""
    along = other.mean**2 + other.shared
    coherent = contract(g.shared, along, width)
    if g.shared.shape[-1] == 1 and other.mean.shape[-2] == 1:
        coherent = coherent * width
    rest = contract(g.shared, other.fixed + other.local, width)
    return Gradient(coherent + rest, contract(g.local, other.second, width))


# -- MatMul --------------------------------------------------------------------------------------------------------------


def _reduce_stack(ctx: Context, g: Gradient, node: ir.Node, index: int) -> Gradient:
    """Sum over the leading axes along which an operand was broadcast."""
    target, out = dims(node.inputs[index]), dims(node.outputs[0])
    if target is None or out is None:
        return g
    missing = len(out) - len(target)
    own = (1,) * missing + target
    stack = tuple(k for k, (n, m) in enumerate(zip(out[:-2], own, strict=False)) if m == 1 and n > 1)
    times_ = math.prod(out[k] for k in stack if max(g.shared.shape[k], g.local.shape[k]) == 1)

    def trim(a: Array) -> Array:
        a = a.sum(axis=stack, keepdims=True) * times_
        return a.reshape(a.shape[missing:])

    shared, local = np.broadcast_arrays(g.shared, g.local)
    return Gradient(trim(shared), trim(local))


def matmul_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    a, b = xs
    shape_a, shape_b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or shape_a is None or shape_b is None or min(len(shape_a), len(shape_b)) < 2:
        return (None,)
    if not ctx.varies(node.inputs[1]) and (w := ctx.array(node.inputs[1])) is not None:
        return (project(a, w, shape_a[-1]),)
    if not ctx.varies(node.inputs[0]) and (w := ctx.array(node.inputs[0])) is not None:
        return (project(b.map(swap), swap(w), shape_b[-2]).map(swap),)
    if makes_logits(node):
        return (logits(a, b, shape_a[-1]),)
    return (mixture(a, b, shape_a[-1]) if mixes(node) else multiply(a, b, shape_a[-1]),)


def matmul_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    (a, b), g = xs, gs[0]
    shape_a, shape_b = dims(node.inputs[0]), dims(node.inputs[1])
    if a is None or b is None or g is None or shape_a is None or shape_b is None or min(len(shape_a), len(shape_b)) < 2:
        return (None, None)
    if not ctx.varies(node.inputs[1]) and (w := ctx.array(node.inputs[1])) is not None:
        return _back(g, a, swap(w)), weight_gradient(ctx, node, a, g, shape_b)
    if not ctx.varies(node.inputs[0]) and (w := ctx.array(node.inputs[0])) is not None:
        dw = weight_gradient(ctx, node, b.map(swap), g.map(swap), (shape_a[-1], shape_a[-2]))
        return dw.map(swap), _back(g.map(swap), b.map(swap), w).map(swap)
    if makes_logits(node):
        da, db = logits_pullback(g, a, b, shape_a[-2], shape_b[-1])
    elif mixes(node):
        da, db = mixture_pullback(g, a, b, shape_a[-2], shape_b[-1])
    else:
        da = _towards(g, b.map(swap), shape_b[-1])
        db = _towards(g.map(swap), a, shape_a[-2]).map(swap)
    return _reduce_stack(ctx, da, node, 0), _reduce_stack(ctx, db, node, 1)


def _back(g: Gradient, x: Moments, wt: np.ndarray) -> Gradient:
    """g W^T; kept per position where x is described so (W mixed positions)."""
    if g.local.shape[-1] == 1 and wt.shape[-2] > 1:
        energy = float(np.square(wt, dtype=np.float64).sum(axis=-2).mean())
        sums = wt.astype(np.float64).sum(axis=-2)
        return Gradient(g.shared * float(sums.mean()) ** 2, g.local * energy + g.shared * float(sums.var()))
    return Gradient(times(g.shared, wt, 2), times(g.local, wt, 2))


def matmul_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    for k in (0, 1):
        w = None if ctx.varies(node.inputs[1 - k]) else ctx.array(node.inputs[1 - k])
        x = xs[k]
        if w is not None and x is not None and w.ndim >= 2:
            if k == 0:
                return (interval(x, w),)
            return (interval(x.map(swap), swap(w)).map(swap),)
    return (None,)


def matmul_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """Towards an activation: the norm of the matrix. Towards a weight there is none (it grows with the input)."""
    norms: list[float | None] = [None, None]
    for k in (0, 1):
        w = None if ctx.varies(node.inputs[1 - k]) else ctx.array(node.inputs[1 - k])
        if w is not None and w.ndim >= 2 and ctx.varies(node.inputs[k]):
            norms[k] = operator_norm(w)
    return norms


def transposed(b: Backward, v: ir.Value) -> ir.Value:
    """The last two axes swapped."""
    rank = len(v.shape) if v.shape is not None else 2
    return b.op("Transpose", v, perm=[*range(rank - 2), rank - 1, rank - 2])


def rows(b: Backward, v: ir.Value, width: ir.Value, axis: int = -1) -> ir.Value:
    """v as a matrix of rows as long as the axis `axis` of `width`."""
    if v.shape is not None and len(v.shape) == 2:
        return v
    size = width.shape[axis] if width.shape is not None else None
    if isinstance(size, int):
        return b.op("Reshape", v, b.constant([-1, size]))
    one = b.op("Gather", b.shape(width), b.constant([axis]))
    return b.op("Reshape", v, b.op("Concat", b.constant([-1]), one, axis=0))


def matmul_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dA = G B^T, dB = A^T G; a matrix shared by a stack takes one product over all its rows."""
    x, w = node.inputs
    g, y = gs[0], node.outputs[0]
    assert x is not None
    assert w is not None
    assert g is not None
    rank_x, rank_w = (len(v.shape) if v.shape is not None else 0 for v in (x, w))
    if rank_w == 2 and rank_x >= 2:
        g2 = rows(b, g, y) if rank_x > 2 else g
        dx = dw = None
        if b.wanted(x):
            dx = b.op("Gemm", g2, w, transB=1)
            dx = b.op("Reshape", dx, b.shape(x)) if rank_x > 2 else dx
        if b.wanted(w):
            dw = b.op("Gemm", rows(b, x, w, 0) if rank_x > 2 else x, g2, transA=1)
        return dx, dw
    if rank_x == 1:
        x = _ranked(b.op("Unsqueeze", x, b.constant([0])), 2)
        g = b.op("Unsqueeze", g, b.constant([-2 if rank_w > 1 else 0]))
    if rank_w == 1:
        w = _ranked(b.op("Unsqueeze", w, b.constant([1])), 2)
        g = b.op("Unsqueeze", g, b.constant([-1]))
    dx = b.op("MatMul", g, transposed(b, w)) if b.wanted(node.inputs[0]) else None
    dw = b.op("MatMul", transposed(b, x), g) if b.wanted(node.inputs[1]) else None
    return tuple(_fold_stack(b, d, v, y, max(rank_x, rank_w)) for d, v in zip((dx, dw), node.inputs, strict=True))


def _ranked(v: ir.Value, rank: int) -> ir.Value:
    v.shape = ir.Shape([None] * rank)
    return v


def _fold_stack(b: Backward, d: ir.Value | None, target: ir.Value | None, y: ir.Value, rank: int) -> ir.Value | None:
    """Sum a product's gradient over the leading axes its operand was broadcast along, and drop axes it was given."""
    if d is None or target is None:
        return None
    lead = max(0, rank - 2)
    shape = dims(target)
    out = dims(y)
    if shape is not None and out is not None and len(shape) >= 2:
        own = (1,) * (lead - len(shape) + 2) + shape[:-2]
        axes = [a for a, (n, m) in enumerate(zip(out[:lead], own, strict=True)) if m == 1 and n != 1]
        if not axes:
            return d
        return b.op("Reshape", b.sum_over(d, axes), b.shape(target))
    missing = rank - (len(target.shape) if target.shape is not None else rank)
    if len(target.shape or ()) == 1:
        missing = rank - 2
    summed_ = b.sum_over(d, list(range(max(0, missing))))
    return b.op("Reshape", summed_, b.shape(target))


row(
    "MatMul",
    moments=matmul_moments,
    range=matmul_range,
    pullback=matmul_pullback,
    bound=matmul_bound,
    vjp=matmul_vjp,
)


# -- Gemm ----------------------------------------------------------------------------------------------------------------


def _gemm_parts(ctx: Context, node: ir.Node) -> tuple[np.ndarray | None, bool]:
    """alpha * op(B) where B is constant, and whether A comes transposed."""
    w = None if ctx.varies(node.inputs[1]) else ctx.array(node.inputs[1])
    if w is None:
        return None, bool(attribute(node, "transA", 0))
    w = w.T if attribute(node, "transB", 0) else w
    alpha = attribute(node, "alpha", 1.0)
    return (w if alpha == 1.0 else w * np.asarray(alpha, w.dtype)), bool(attribute(node, "transA", 0))


def _bias(ctx: Context, node: ir.Node) -> Array | None:
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is None:
        return np.zeros((1, 1))
    array = ctx.array(c)
    return None if array is None else attribute(node, "beta", 1.0) * np.atleast_2d(array).astype(np.float64)


def gemm_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    w, flipped = _gemm_parts(ctx, node)
    bias = _bias(ctx, node)
    x = xs[0]
    if x is None or w is None or bias is None:
        return (None,)
    y = project(x.map(swap) if flipped else x, w, w.shape[-2])
    return (Moments(y.mean + bias, y.fixed, y.shared, y.local),)


def gemm_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    w, flipped = _gemm_parts(ctx, node)
    x, g = xs[0], gs[0]
    shape = dims(node.inputs[1])
    if x is None or g is None or w is None or shape is None:
        return (None,) * len(node.inputs)
    x = x.map(swap) if flipped else x
    dx = _back(g, x, w.T)
    dw = weight_gradient(ctx, node, x, g, w.shape).scaled(attribute(node, "alpha", 1.0) ** 2)
    found: list[Gradient | None] = [
        dx.map(swap) if flipped else dx,
        dw.map(swap) if attribute(node, "transB", 0) else dw,
    ]
    if len(node.inputs) > 2:
        c = dims(node.inputs[2])
        beta = attribute(node, "beta", 1.0)
        found.append(None if c is None else summed(ctx, g, node.outputs[0], c, constant=True).scaled(beta**2))
    return found


def gemm_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    w, flipped = _gemm_parts(ctx, node)
    bias, x = _bias(ctx, node), xs[0]
    if x is None or w is None or bias is None:
        return (None,)
    y = interval(x.map(swap) if flipped else x, w)
    return (Range(y.lo + bias, y.hi + bias),)


def gemm_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    w, _ = _gemm_parts(ctx, node)
    return (None if w is None else operator_norm(w), *(None,) * (len(node.inputs) - 1))


def gemm_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """y = alpha op(A) op(B) + beta C: dA = alpha G op(B)^T, dB = alpha op(A)^T G, dC = beta G summed; op undone."""
    x, w = node.inputs[:2]
    g = gs[0]
    assert g is not None
    flip_x, flip_w = attribute(node, "transA", 0), attribute(node, "transB", 0)
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    scale = {} if alpha == 1.0 else {"alpha": alpha}
    dx = dw = None
    if b.wanted(x):
        dx = (
            b.op("Gemm", w, g, transA=flip_w, transB=1, **scale)
            if flip_x
            else b.op("Gemm", g, w, transB=1 - flip_w, **scale)
        )
    if b.wanted(w):
        dw = (
            b.op("Gemm", g, x, transA=1, transB=flip_x, **scale)
            if flip_w
            else b.op("Gemm", x, g, transA=1 - flip_x, **scale)
        )
    if len(node.inputs) < 3 or not b.wanted(node.inputs[2]):
        return dx, dw
    c = node.inputs[2]
    assert c is not None
    dc = b.unbroadcast(g, c, node.outputs[0])
    return dx, dw, dc if beta == 1.0 else b.op("Mul", dc, b.scalar(beta, dc))


row("Gemm", moments=gemm_moments, range=gemm_range, pullback=gemm_pullback, bound=gemm_bound, vjp=gemm_vjp)
