"""Gemm: y = alpha op(A) op(B) + beta C, op being the identity or the transpose; B is the weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.attention_products import swap
from gradlint.ops.linear import back, interval, operator_norm, project, weight_gradient
from gradlint.transfer import Context, row, summed

Values = Sequence[ir.Value | None]


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
    dx = back(g, x, w.T)
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
