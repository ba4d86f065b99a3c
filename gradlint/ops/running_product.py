"""CumProd."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Gradient, Moments, mean_over
from gradlint.graph import attribute, dims
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]


def cumprod_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx_k = sum over i from k on of g_i y_i / x_k, the running sum from the other end.

    Exact at zeros too: products beyond the first zero are 0 whatever the rest is, so only it and what comes before it
    get a gradient; with a 1 in its place y_i / x_k is what the others multiply to.
    """
    x, axis, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert g is not None
    exclusive, reverse = attribute(node, "exclusive", 0), attribute(node, "reverse", 0)
    zero, one = b.scalar(0.0, x), b.scalar(1.0, x)
    null = b.op("Equal", x, zero, dtype=ir.DataType.BOOL)
    count = b.op("CumSum", b.op("Where", null, one, zero, dtype=x.dtype), axis, reverse=reverse)
    first = b.op("And", null, b.op("Equal", count, one, dtype=ir.DataType.BOOL))
    before = b.op("Equal", count, zero, dtype=ir.DataType.BOOL)
    flags = {"exclusive": exclusive, "reverse": 1 - reverse}
    through = b.op("CumSum", b.op("Mul", g, node.outputs[0]), axis, **flags)
    filled = b.op("Where", first, one, x, dtype=x.dtype)
    product = b.op("CumProd", filled, axis, exclusive=exclusive, reverse=reverse)
    at_zero = b.op("CumSum", b.op("Mul", g, product), axis, **flags)
    whole = b.op("Div", through, b.op("Where", null, one, x, dtype=x.dtype))
    rest = b.op("Where", first, at_zero, zero, dtype=x.dtype)
    return b.op("Where", before, whole, rest, dtype=x.dtype), None


def _length(ctx: Context, node: ir.Node) -> tuple[int, int] | None:
    """Axis and its size; None where not known."""
    shape, axis = dims(node.inputs[0]), ctx.array(node.inputs[1])
    if shape is None or axis is None:
        return None
    index = int(axis.reshape(-1)[0]) % len(shape)
    return index, shape[index]


def cumprod_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Products of 1, 2 .. n independent factors, averaged over the axis: E[y] = mu^t, E[y^2] = (E[x^2])^t."""
    x, known, shape = xs[0], _length(ctx, node), dims(node.inputs[0])
    if x is None or known is None or shape is None:
        return (None,)
    axis, size = known
    first = 0 if attribute(node, "exclusive", 0) else 1
    mean, second = (mean_over(a, shape, (axis,)) for a in (x.mean, x.second))
    with np.errstate(over="ignore"):
        means = np.stack([mean**t for t in range(first, first + size)])
        squares = np.stack([second**t for t in range(first, first + size)])
    average = means.mean(axis=0)
    fixed = np.square(means).mean(axis=0) - average**2
    local = np.maximum(squares.mean(axis=0) - np.square(means).mean(axis=0), 0)
    return (Moments(average, fixed, 0 * local, local),)


def cumprod_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """A factor of a product of t gets the gradient times the t - 1 others: q s^(t-1), averaged over the factors."""
    x, g, known, shape = xs[0], gs[0], _length(ctx, node), dims(node.inputs[0])
    if x is None or g is None or known is None or shape is None:
        return None, None
    axis, size = known
    first = 0 if attribute(node, "exclusive", 0) else 1
    second, q = mean_over(x.second, shape, (axis,)), mean_over(g.total, shape, (axis,))
    with np.errstate(over="ignore"):
        total = sum((t * second ** (t - 1) for t in range(max(first, 1), first + size)), 0 * second) * q / size
    return Gradient(0 * total, total), None


row("CumProd", moments=cumprod_moments, pullback=cumprod_pullback, vjp=cumprod_vjp)
