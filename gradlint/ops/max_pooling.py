"""Pooling by the maximum, and MaxUnpool.

Maxima of n elements are described by the order statistics of a normal distribution; behind a Relu by those of the
normal that was rectified, since the maximum commutes with Relu. Neighbouring elements are taken as uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.convolution import collapsed, collapsed_gradient
from gradlint.ops.convolution_gradient import geometry
from gradlint.ops.pooling import Windows, window_attributes, window_range, windows
from gradlint.quadrature import above, density, pieces
from gradlint.transfer import Context, apply_moments, ratio, row

Values = Sequence[ir.Value | None]


# -- the maximum of n --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def order_statistics(n: float) -> tuple[float, float]:
    """Mean and variance of the largest of n independent standard normals: density n phi Phi^(n-1)."""
    u = np.linspace(-9.0, 9.0, 3601)
    weight = n * density(u) * (1 - above(u)) ** (n - 1)
    weight /= weight.sum()
    mean = float(u @ weight)
    return mean, float(np.square(u - mean) @ weight)


_T = np.linspace(-6.0, 8.0, 1401)
_FIRST = density(_T) + _T * (1 - above(_T))
_SECOND = (1 + _T**2) * (1 - above(_T)) + _T * density(_T)
_RECTIFIED = pieces((0.0,), (0.0, 1.0), (0.0, 0.0))[0]


def _behind_relu(node: ir.Node) -> bool:
    x = node.inputs[0]
    source = None if x is None else x.producer()
    return source is not None and source.op_type == "Relu"


def _before_relu(x: Moments) -> tuple[Moments, Array]:
    """The normal z with max(z, 0) of mean and second moment as x, and its mean over its standard deviation."""
    t = np.interp(ratio(x.mean**2, x.second), _FIRST**2 / _SECOND, _T)
    std = x.mean / np.interp(t, _T, _FIRST)
    scale = ratio(std**2, x.var)
    return Moments(t * std, x.fixed * scale, x.shared * scale, x.local * scale), t


def _largest(x: Moments, n: float) -> Moments:
    """The maximum of n normals whose shared part is common to all."""
    level, var = order_statistics(n)
    return Moments(x.mean + level * np.sqrt(x.fixed + x.local), x.fixed * var, x.shared, x.local * var)


def max_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, w = xs[0], windows(node)
    if x is None or w is None:
        return (None,) * len(node.outputs)
    x = collapsed(x)
    if _behind_relu(node):
        y = apply_moments(_RECTIFIED, _largest(_before_relu(x)[0], w.count), kinked=True)
    else:
        y = _largest(x, w.count)
    return (y, *(None,) * (len(node.outputs) - 1))


def max_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each window sends its gradient to one of its n elements, any of them alike.

    Two windows that overlap in m of M elements choose the same one with probability m / M; then a shared gradient adds
    coherently. Behind a Relu the chosen element is more often positive than others are, P(max > 0) / P(z > 0), which
    the Relu's own row can't know: the factor is applied here. The chosen elements lie above the mean: what is the same
    for every window goes along with the value.
    """
    x, g, w = xs[0], gs[0], windows(node)
    if g is None or w is None:
        return (None,)
    g = collapsed_gradient(g)
    level = g.shared * w.ratio**2
    total = g.shared * w.ratio * _same_choice(w) + g.local * w.ratio
    back = Gradient(level, np.maximum(total - level, 0.0))
    if x is not None and _behind_relu(node):
        positive = 1 - above(_before_relu(collapsed(x))[1])
        back = back.scaled((1 - (1 - positive) ** w.count) / np.maximum(positive, 1e-12))
    if x is not None and ys[0] is not None:
        x = collapsed(x)
        chosen = ratio(np.square(ys[0].mean - x.mean), x.var)
        back = replace(back, aligned=np.minimum(g.shared * w.ratio**2 * chosen, back.total))
    return (back,)


def _same_choice(w: Windows) -> float:
    """Windows, itself among them, that are expected to choose the same element as a window does."""
    shifts: Array = np.ones(1)
    for kernel, stride, dilation, out in zip(w.kernel, w.at.strides, w.at.dilations, w.outs, strict=True):
        reach = min(((kernel - 1) * dilation) // stride, out - 1)
        taps = {k * dilation for k in range(kernel)}
        common = [len(taps & {t + k * stride for t in taps}) for k in range(-reach, reach + 1)]
        shifts = np.outer(shifts, common).reshape(-1)
    n = math.prod(w.kernel)
    return float(np.sum(shifts / (2 * n - shifts)))


def max_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """An element gets the gradients of at most `copies` windows, a window's goes to one element."""
    w = windows(node)
    return (None if w is None else math.sqrt(w.copies),)


# -- MaxPool -----------------------------------------------------------------------------------------------------------


def max_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g goes to the first maximum of each window, which MaxPool's second output names (in the flattened input).

    Where windows tile the input MaxUnpool puts it there; else it is added up.
    """
    x, g, w = node.inputs[0], gs[0], windows(node)
    assert x is not None
    assert g is not None
    if attribute(node, "storage_order", 0) == 0 and len(node.outputs) > 1:
        indices = node.outputs[1]
    else:
        indices = b.ops("MaxPool", x, outputs=2, **window_attributes(node))[1]
        indices.dtype = ir.DataType.INT64
    if w is not None and not any((*w.at.begin, *w.at.end)) and all(d == 1 for d in w.at.dilations):
        tiles = zip(w.sizes, w.outs, w.kernel, w.at.strides, strict=True)
        if all(n == q * k and s == k for n, q, k, s in tiles):
            kernel = list(w.kernel)
            return (b.op("MaxUnpool", g, indices, kernel_shape=kernel, strides=kernel),)
    flat = b.constant([-1])
    size = b.op("Reshape", b.op("Size", x, dtype=ir.DataType.INT64), flat)
    assert g.dtype is not None
    zeros = b.op("ConstantOfShape", size, dtype=g.dtype, value=ir.tensor(np.zeros(1, g.dtype.numpy()), name="zero"))
    moved = b.op("Reshape", indices, flat)
    summed = b.op("ScatterElements", zeros, moved, b.op("Reshape", g, flat), axis=0, reduction="add", dtype=g.dtype)
    return (b.op("Reshape", summed, b.shape(x)),)


row("MaxPool", moments=max_moments, range=window_range, pullback=max_pullback, bound=max_bound, vjp=max_vjp)


# -- GlobalMaxPool -----------------------------------------------------------------------------------------------------


def global_max_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g goes to the first maximum of each channel."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    flat = b.op("Reshape", x, b.constant([0, 0, -1]))
    first = b.op("ArgMax", flat, axis=2, keepdims=1, dtype=ir.DataType.INT64)
    zero = b.op("Mul", flat, b.scalar(0.0, flat))
    placed = b.op("ScatterElements", zero, first, b.op("Reshape", g, b.constant([0, 0, 1])), axis=2)
    return (b.op("Reshape", placed, b.shape(x)),)


row(
    "GlobalMaxPool", moments=max_moments, range=window_range, pullback=max_pullback, bound=max_bound, vjp=global_max_vjp
)


# -- MaxUnpool ---------------------------------------------------------------------------------------------------------


def _unpooled(node: ir.Node) -> tuple[float, int] | None:
    """Inputs per output element, and how many axes the value has."""
    x, y = dims(node.inputs[0]), dims(node.outputs[0])
    return None if x is None or y is None or 0 in y else (math.prod(x) / math.prod(y), len(y))


def unpool_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """A share of the output is x, in places that differ between examples; the rest is 0."""
    x, found = xs[0], _unpooled(node)
    if x is None or found is None:
        return (None,)
    x, share = collapsed(x), found[0]
    total = x.second * share - (x.mean * share) ** 2
    shared = x.shared * share**2
    return (Moments(x.mean * share, np.zeros_like(total), shared, np.maximum(total - shared, 0.0)),)


def unpool_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    return (None if gs[0] is None else collapsed_gradient(gs[0]), *(None,) * (len(node.inputs) - 1))


def unpool_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    (box,) = window_range(ctx, node, xs)
    return (None if box is None else Range(np.minimum(box.lo, 0.0), np.maximum(box.hi, 0.0)),)


def unpool_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (None,) * len(node.inputs)


def unpool_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx is g at the indices, which count in the size that windows give (an `output_shape` adds zeros at the end)."""
    x, indices, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert g is not None
    sizes = dims(x)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if sizes is None:
            raise Unsupported
        at, kernel = geometry(node, len(sizes) - 2), attribute(node, "kernel_shape", ())
        rows = zip(sizes[2:], kernel, at.strides, at.begin, at.end, strict=True)
        natural = [(n - 1) * s + k - p - e for n, k, s, p, e in rows]
        axes = b.constant(range(2, len(sizes)))
        g = b.op("Slice", g, b.constant([0] * len(natural)), b.constant(natural), axes)
    return (b.op("Gather", b.op("Reshape", g, b.constant([-1])), indices), *(None,) * (len(node.inputs) - 1))


row(
    "MaxUnpool",
    moments=unpool_moments,
    range=unpool_range,
    pullback=unpool_pullback,
    bound=unpool_bound,
    vjp=unpool_vjp,
)
