"""Matrix products: y = x W, with x (.., K) and W (K, N), and products of two activations.

Moments: mean' = mean W, var' = var W^2, backward q' = q (W^2)^T, with the actual weights: elements of x taken as
uncorrelated (mean-field; Poole et al. 2016, Schoenholz et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import dims
from gradlint.ops.attention_products import (
    contract,
    heads_apart,
    kinship,
    logits,
    logits_pullback,
    makes_logits,
    mixes,
    mixture,
    mixture_pullback,
    swap,
)
from gradlint.runs import entries, positional
from gradlint.transfer import Context, over_tokens, product, row, summed

Values = Sequence[ir.Value | None]
_BLOCK = 1 << 18  # elements of a weight worked on at a time: 1 MB in float32
_ROW = 1 << 12  # of which next to each other
_SMALL, _NARROW = 512, 256  # rows and columns of a matrix whose norm is calculated exactly; the fewer of both


def times(v: Array, w: np.ndarray, power: int = 1) -> Array:
    """v @ w**power over the last axis of v, in blocks of rows: no second copy of a large matrix."""
    if v.shape[-1] != w.shape[-2]:
        v = np.broadcast_to(v, (*v.shape[:-1], w.shape[-2]))
    if w.ndim > 2 or w.size <= _BLOCK:
        return np.matmul(v, (w if power == 1 else np.square(w, dtype=np.float32)).astype(v.dtype, copy=False))
    (v, _), wrap = entries(v, w[:, 0])
    return cast(Array, wrap(_streamed(v, w, power)))


def _streamed(v: Array, w: np.ndarray, power: int) -> Array:
    """v @ w**power in blocks that fit the cache, in the order w lies in memory; single precision within a block."""
    size = float(np.abs(v).max())
    total = np.zeros((*v.shape[:-1], w.shape[-1]))
    if size == 0.0:
        return total
    scaled = (v / size).astype(np.float32)  # second moments of vanishing gradients are below float32
    flipped = bool(w.flags.f_contiguous)
    stored = w.T if flipped else w
    step = max(1, _BLOCK // min(stored.shape[1], _ROW))
    for i in range(0, stored.shape[0], step):
        for j in range(0, stored.shape[1], _ROW):
            block = stored[i : i + step, j : j + _ROW].astype(np.float32, copy=False)
            block = block if power == 1 else np.square(block)
            if flipped:
                total[..., i : i + step] += scaled[..., j : j + _ROW] @ block.T
            else:
                total[..., j : j + _ROW] += scaled[..., i : i + step] @ block
    return total * size


def _squares(parts: Sequence[Array], w: np.ndarray) -> list[Array]:
    """Each part times w squared; all of them in one pass over w, none for what is zero."""
    live = [k for k, part in enumerate(parts) if part.any()]
    found = [np.zeros((1,) * max(part.ndim for part in parts)) for _ in parts]
    if w.ndim > 2:
        for k in live:
            found[k] = times(parts[k], w, 2)
    elif live:
        together = np.stack(np.broadcast_arrays(*(parts[k] for k in live)))
        for k, part in zip(live, times(together, w, 2), strict=True):
            found[k] = part
    return found


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
    return Moments(times(x.mean, w), *_squares((x.fixed, x.shared, x.local), w))


def operator_norm(w: np.ndarray) -> float:
    """An upper bound of the largest singular value of a matrix (the largest over a stack of them).

    min of the Frobenius norm and sqrt(norm_1 norm_inf); up to 2^22 elements also the square root of the Gram matrix's
    Frobenius norm, (sum of sigma^4)^(1/4) (Delattre et al. 2023, one step). The exact value for a small matrix and a
    narrow one: the root of the Gram matrix's largest eigenvalue, a sixth of the time of singular values.
    """
    if w.ndim == 2 and (max(w.shape) <= _SMALL or (min(w.shape) <= _NARROW and w.size <= 1 << 20)):
        top = float(np.max(np.abs(w), initial=0.0))
        if not 0.0 < top < math.inf:
            return top if top == 0.0 else math.inf
        unit = w.astype(np.float64) / top
        gram = unit @ unit.T if w.shape[0] <= w.shape[1] else unit.T @ unit
        return top * math.sqrt(float(np.linalg.eigvalsh(gram)[-1])) * (1 + 1e-9)
    a = np.abs(w)
    across, down = (a.sum(axis=k, dtype=np.float64).max(axis=-1) for k in (-1, -2))
    norms = np.sqrt(across * down)
    if w.ndim == 2 and w.size <= 1 << 22 and np.isfinite(norms):
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        squares = np.linalg.norm(gram.astype(np.float64))
    else:
        squares = np.einsum("...ij,...ij->...i", w, w).sum(axis=-1, dtype=np.float64)
    return float(np.max(np.fmin(norms, np.sqrt(squares) * (1 + 1e-4))))  # float32 products


def interval(x: Range, w: np.ndarray) -> Range:
    """x W over a box: the centre goes through W, the radius through |W|."""
    centre, radius = (x.lo + x.hi) / 2, (x.hi - x.lo) / 2
    mid, reach = times(centre, w), times(radius, np.abs(w))
    slack = 1e-6 * (np.abs(mid) + reach)  # float32 arithmetic of the model itself
    return Range(mid - reach - slack, mid + reach + slack)


def weight_gradient(ctx: Context, node: ir.Node, x: Moments, g: Gradient, shape: tuple[int, ...]) -> Gradient:
    """E[dW_kn^2], averaged over k: the sum over positions of x_k g_n."""
    average = Moments(*(a.mean(axis=-1, keepdims=True) for a in (x.mean**2, x.fixed, x.shared, x.local)))
    average = Moments(np.sqrt(average.mean), average.fixed, average.shared, average.local)
    g = over_tokens(g, average)
    return summed(ctx, product(g, average), node.outputs[0], (*(1,) * (len(shape) - 1), shape[-1]), constant=True)


# -- two activations ---------------------------------------------------------------------------------------------------


def over_positions(a: Moments, b: Moments) -> bool:
    """Does a @ b sum over positions, leaving only units (channels with channels: cross-covariance attention)?"""
    inner = positional(-1, a.mean, a.var) and positional(-2, b.mean, b.var)
    return inner and not positional(-2, a.var) and not positional(-1, b.var)


def between_units(a: Moments, b: Moments) -> bool:
    """Does a @ b mix units, at every position alike: a without positions, b with units before positions?"""
    return positional(-1, b.mean, b.var) and not positional(-2, b.var) and not positional(-1, a.mean)


def multiply(a: Moments, b: Moments, width: int) -> Moments:
    """Moments of a @ b, all elements independent: Var = sum E[a^2] E[b^2] - E[a]^2 E[b]^2.

    What of both is fixed or shared stays so only as far as both are; the cross terms are local. In a sum over n
    positions what both share adds coherently (n^2), and as no position is left all is shared.
    """

    def dot(u: Array, v: Array) -> Array:
        return contract(u, v, width)

    mean = dot(a.mean, b.mean)
    if over_positions(a, b):
        u, v = a.mean**2 + a.shared, b.mean**2 + b.shared
        coherent = dot(np.sqrt(u), np.sqrt(v)) ** 2
        total = coherent + dot(a.second, b.second) - dot(u, v) - mean**2
        return Moments(mean, 0 * mean, np.maximum(total, 0), 0 * mean)
    square = dot(a.mean**2, b.mean**2)
    total = np.maximum(dot(a.second, b.second) - square, 0)
    fixed = dot(a.fixed, b.mean**2 + b.fixed) + dot(a.mean**2, b.fixed)
    shared = dot(a.shared, b.mean**2 + b.shared) + dot(a.mean**2, b.shared)
    return Moments(mean, fixed, shared, np.maximum(total - fixed - shared, 0))


def _towards(g: Gradient, other: Moments, width: int) -> Gradient:
    """Gradient of one operand: the sum over `width` of g times the other; coherent where both are alike all along."""
    along = other.mean**2 + other.shared
    if positional(-1, g.shared) and positional(-2, along):
        coherent = contract(np.sqrt(g.shared), np.sqrt(along), width) ** 2
    else:
        coherent = contract(g.shared, along, width)
    rest = contract(g.shared, other.fixed + other.local, width)
    return Gradient(coherent + rest, contract(g.local, other.second, width))


# -- MatMul ------------------------------------------------------------------------------------------------------------


def _reduce_stack(ctx: Context, g: Gradient, node: ir.Node, index: int) -> Gradient:
    """Sum over the leading axes along which an operand was broadcast."""
    target, out = dims(node.inputs[index]), dims(node.outputs[0])
    if target is None or out is None:
        return g
    missing = len(out) - len(target)
    own = (1,) * missing + target
    stack = tuple(k for k, (n, m) in enumerate(zip(out[:-2], own, strict=False)) if m == 1 and n > 1)
    if not missing and not stack:
        return g
    times_ = math.prod(out[k] for k in stack if max(g.shared.shape[k], g.local.shape[k]) == 1)

    def trim(a: Array) -> Array:
        a = a.sum(axis=stack, keepdims=True) * times_
        return a.reshape(a.shape[missing:])

    shared, local = np.broadcast_arrays(g.shared, g.local)
    return Gradient(trim(shared), trim(local))


def matmul_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    a, b = xs
    shape_a, shape_b = dims(node.inputs[0]), dims(node.inputs[1])
    if shape_a is None or shape_b is None or min(len(shape_a), len(shape_b)) < 2:
        return (None,)
    if a is not None and not ctx.varies(node.inputs[1]) and (w := ctx.array(node.inputs[1])) is not None:
        return (project(a, w, shape_a[-1]),)
    if b is not None and not ctx.varies(node.inputs[0]) and (w := ctx.array(node.inputs[0])) is not None:
        return (project(b.map(swap), swap(w), shape_b[-2]).map(swap),)
    if a is None or b is None:
        return (None,)
    if makes_logits(node) and not over_positions(a, b):
        return (logits(a, b, shape_a[-1]),)
    if mixes(node) and not between_units(a, b):
        return (mixture(a, b.map(lambda part: heads_apart(part, shape_b)), shape_a[-1]),)
    return (multiply(a, b, shape_a[-1]),)


def matmul_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    (a, b), g = xs, gs[0]
    shape_a, shape_b = dims(node.inputs[0]), dims(node.inputs[1])
    if g is None or shape_a is None or shape_b is None or min(len(shape_a), len(shape_b)) < 2:
        return (None, None)
    if a is not None and not ctx.varies(node.inputs[1]) and (w := ctx.array(node.inputs[1])) is not None:
        return back(g, a, swap(w)), weight_gradient(ctx, node, a, g, shape_b)
    if b is not None and not ctx.varies(node.inputs[0]) and (w := ctx.array(node.inputs[0])) is not None:
        dw = weight_gradient(ctx, node, b.map(swap), g.map(swap), (shape_a[-1], shape_a[-2]))
        return dw.map(swap), back(g.map(swap), b.map(swap), w).map(swap)
    if a is None or b is None:
        return (None, None)
    if makes_logits(node) and not over_positions(a, b):
        kin = kinship(ctx, node, ys[0]) if ys[0] is not None else 1.0
        da, db = (d.scaled(kin) for d in logits_pullback(g, a, b, shape_a[-2], shape_b[-1]))
    elif mixes(node) and not between_units(a, b):
        g = g.map(lambda part: heads_apart(part, dims(node.outputs[0]) or part.shape))
        da, db = mixture_pullback(g, a, b, shape_a[-2], shape_b[-1])
    else:
        if over_positions(a, b):  # no position is left in the product: its gradient is the same for all
            g = Gradient(g.total, 0 * g.local)
        da = _towards(g, b.map(swap), shape_b[-1])
        db = _towards(g.map(swap), a, shape_a[-2]).map(swap)
    return _reduce_stack(ctx, da, node, 0), _reduce_stack(ctx, db, node, 1)


def back(g: Gradient, x: Moments, wt: np.ndarray) -> Gradient:
    """g W^T; kept per position where x is described so (W mixed positions)."""
    if g.local.shape[-1] == 1 and wt.shape[-2] > 1:
        energy = float(np.square(wt, dtype=np.float64).sum(axis=-2).mean())
        sums = wt.astype(np.float64).sum(axis=-2)
        return Gradient(g.shared * float(sums.mean()) ** 2, g.local * energy + g.shared * float(sums.var()))
    return Gradient(*_squares((g.shared, g.local), wt))


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
    if target.shape is not None and len(target.shape) == 1:
        return b.op("Reshape", b.sum_over(d, range(lead)), b.shape(target))
    if target.shape is None or y.shape is None:
        return b.unbroadcast_at_run(d, target)
    own = [1] * (rank - len(target.shape)) + list(target.shape.dims[:-2])
    stack = list(zip(own, y.shape.dims[:lead], strict=True))
    if any(not isinstance(m, int) and m != n for m, n in stack):
        return b.unbroadcast_at_run(d, target)
    axes = [a for a, (m, n) in enumerate(stack) if m == 1 and n != 1]
    if not axes and len(target.shape) == rank:
        return d
    return b.op("Reshape", b.sum_over(d, axes), b.shape(target))


row(
    "MatMul",
    moments=matmul_moments,
    range=matmul_range,
    pullback=matmul_pullback,
    bound=matmul_bound,
    vjp=matmul_vjp,
)
