"""Normalisation by a norm or by neighbours, without weights: LpNormalization, LRN, MeanVarianceNormalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.standardization import Group, Standardized, group, project, projected, standardize, standardized
from gradlint.transfer import Context, apply_moments, row

Values = Sequence[ir.Value | None]


# -- MeanVarianceNormalization -----------------------------------------------------------------------------------------

_MVN_EPS = 1e-18  # the operator adds 1e-9 to the standard deviation


def _mvn_axes(node: ir.Node) -> tuple[int, ...]:
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    return tuple(sorted(a % len(x.shape) for a in attribute(node, "axes", (0, 2, 3))))


def _mvn(ctx: Context, node: ir.Node, x: Moments | None) -> tuple[Standardized, Group] | None:
    shape = dims(node.inputs[0])
    if x is None or shape is None:
        return None
    axes = _mvn_axes(node)
    over = group(x, shape, axes, min(ctx.batch, shape[0]) if 0 in axes else 1)
    return standardize(x, over, _MVN_EPS), over


def mvn_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    found = _mvn(ctx, node, xs[0])
    return (None if found is None else found[0].y,)


def mvn_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    found, g = _mvn(ctx, node, xs[0]), gs[0]
    return (None if found is None or g is None else project(g, *found),)


def mvn_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """|y| <= sqrt(D)."""
    shape = dims(node.inputs[0])
    if shape is None:
        return (None,)
    reach = np.full((1,) * len(shape), math.sqrt(math.prod(shape[a] for a in _mvn_axes(node))) * (1 + 1e-5))
    return (Range(-reach, reach),)


def mvn_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    axes = _mvn_axes(node)
    y, rate = standardized(b, x, axes, _MVN_EPS)
    return (projected(b, g, b.op("Mul", g, y), y, rate, axes),)


row("MeanVarianceNormalization", moments=mvn_moments, range=mvn_range, pullback=mvn_pullback, vjp=mvn_vjp)


# -- LpNormalization ---------------------------------------------------------------------------------------------------


def _lp(node: ir.Node) -> tuple[int, int]:
    """The axis and p."""
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    return attribute(node, "axis", -1) % len(x.shape), attribute(node, "p", 2)


def _size_of_norm(node: ir.Node, x: Moments | None) -> tuple[int, Array] | None:
    """D, and the square of the norm: D E[x^2], or (D E|x|)^2 for p = 1."""
    shape = dims(node.inputs[0])
    if x is None or shape is None:
        return None
    axis, p = _lp(node)
    size = shape[axis]
    if p == 2:
        return size, size * np.broadcast_to(x.second, np.broadcast(x.mean, x.var).shape).mean(axis=axis, keepdims=True)
    return size, (size * apply_moments(np.abs, x, kinked=True).mean.mean(axis=axis, keepdims=True)) ** 2


def lp_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """x over its norm, which is taken at its mean (its fluctuation falls as 1/D)."""
    found, x = _size_of_norm(node, xs[0]), xs[0]
    if found is None or x is None:
        return (None,)
    return (x.scaled(1 / np.sqrt(np.maximum(found[1], 1e-300))),)


def lp_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """p = 2: as without a mean to take away, the direction of y is lost. p = 1: dx = (g - sign x sum(g y)) / |x|_1."""
    found, x, g, shape = _size_of_norm(node, xs[0]), xs[0], gs[0], dims(node.inputs[0])
    if found is None or x is None or g is None or shape is None:
        return (None,)
    (axis, p), (size, square) = _lp(node), found
    if p == 2:
        over = group(x, shape, (axis,))
        return (project(g.scaled(1 / size), standardize(x, over, 0.0, centre=False), over, centre=False),)
    y = x.scaled(1 / np.sqrt(square))
    common = np.broadcast_shapes(g.shared.shape, y.mean.shape)
    level = np.abs(apply_moments(np.abs, y, kinked=True).mean)
    along = np.broadcast_to(g.total * y.second, common).mean(axis=axis, keepdims=True) * size
    total = np.maximum(g.total * (1 - 2 * level) + along, 0) / square
    kept = np.minimum(g.shared / square, total)
    return (Gradient(kept, total - kept),)


def lp_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    one = np.full((1,) * len(dims(node.inputs[0]) or (1,)), 1 + 1e-5)
    return (Range(-one, one),)


def lp_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = (g - u sum(g y)) / |x|_p with u = y for p = 2, sign x for p = 1; 0 where the norm is 0."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    axis, p = _lp(node)
    axes = b.constant([axis])
    norm = b.op("ReduceL2" if p == 2 else "ReduceL1", x, axes, keepdims=1)
    along = b.op("ReduceSum", b.op("Mul", g, y), axes, keepdims=1)
    lost = b.op("Mul", y if p == 2 else b.op("Sign", x), along)
    zero = b.op("Equal", norm, b.scalar(0.0, norm), dtype=ir.DataType.BOOL)
    rate = b.op("Where", zero, b.scalar(0.0, norm), b.op("Reciprocal", norm), dtype=norm.dtype)
    return (b.op("Mul", b.op("Sub", g, lost), rate),)


row("LpNormalization", moments=lp_moments, range=lp_range, pullback=lp_pullback, vjp=lp_vjp)


# -- LRN ---------------------------------------------------------------------------------------------------------------


def _lrn(node: ir.Node) -> tuple[int, float, float, float]:
    """size, alpha / size, beta, bias."""
    size = attribute(node, "size")
    return size, attribute(node, "alpha", 1e-4) / size, attribute(node, "beta", 0.75), attribute(node, "bias", 1.0)


def _window(a: Array, size: int, channels: int) -> Array:
    """Sum over the window of channels around each (axis 1), clipped at the ends."""
    a = np.broadcast_to(a, (a.shape[0], channels, *a.shape[2:]))
    before = (size - 1) // 2
    padded = np.pad(a, [(0, 0), (before, size - 1 - before), *[(0, 0)] * (a.ndim - 2)])
    return np.stack([padded[:, k : k + channels] for k in range(size)]).sum(axis=0)


def _lrn_level(node: ir.Node, x: Moments | None) -> Array | None:
    """The mean of s = bias + alpha / size * sum of x^2 over the window."""
    shape = dims(node.inputs[0])
    if x is None or shape is None:
        return None
    size, rate, _, bias = _lrn(node)
    return bias + rate * _window(x.second, size, shape[1])


def lrn_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """x s^-beta with s at its mean: alpha is small where the operator is used."""
    level, x = _lrn_level(node, xs[0]), xs[0]
    return (None if level is None or x is None else x.scaled(level ** -_lrn(node)[2]),)


def lrn_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """The direct path g s^-beta; what comes through s is left out (a share of order alpha beta / bias)."""
    level, g = _lrn_level(node, xs[0]), gs[0]
    return (None if level is None or g is None else g.scaled(level ** (-2 * _lrn(node)[2])),)


def lrn_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """s >= bias, so |y| <= |x| bias^-beta."""
    _, rate, beta, bias = _lrn(node)
    if xs[0] is None or bias <= 0 or rate < 0 or beta < 0:
        return (None,)
    most = bias**-beta * (1 + 1e-5)
    return (Range(np.minimum(xs[0].lo * most, 0), np.maximum(xs[0].hi * most, 0)),)


def _window_sum(b: Backward, v: ir.Value, x: ir.Value, size: int, *, back: bool) -> ir.Value:
    """Sum over the window of channels (its mirror image for the way back): pooling with the channels as rows."""
    before = (size - 1) // 2
    after = size - 1 - before
    pads = [after, 0, before, 0] if back else [before, 0, after, 0]
    rows = b.op("Unsqueeze", b.op("Reshape", v, b.constant([0, 0, -1])), b.constant([1]))
    mean = b.op("AveragePool", rows, kernel_shape=[size, 1], pads=pads, strides=[1, 1], count_include_pad=1)
    return b.op("Mul", b.op("Reshape", mean, b.shape(x)), b.scalar(float(size), v))


def lrn_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = g s^-beta - 2 alpha beta / size x sum over the windows that hold x of g y / s."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    size, rate, beta, bias = _lrn(node)
    s = b.op("Mul", _window_sum(b, b.op("Mul", x, x), x, size, back=False), b.scalar(rate, x))
    s = b.op("Add", s, b.scalar(bias, x))
    direct = b.op("Mul", g, b.op("Pow", s, b.scalar(-beta, x)))
    through = _window_sum(b, b.op("Div", b.op("Mul", g, y), s), x, size, back=True)
    return (b.op("Sub", direct, b.op("Mul", b.op("Mul", x, through), b.scalar(2 * rate * beta, x))),)


row("LRN", moments=lrn_moments, range=lrn_range, pullback=lrn_pullback, vjp=lrn_vjp)
