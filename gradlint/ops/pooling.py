"""Pooling over windows: of the maximum, the mean, the p-norm; and MaxUnpool.

Maxima of n elements are described by the order statistics of a normal distribution; behind a Relu by those of the
normal that was rectified, since the maximum commutes with Relu. Neighbouring elements are taken as uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.convolution import collapsed, collapsed_gradient
from gradlint.ops.convolution_gradient import Geometry, geometry, input_gradient, layout
from gradlint.ops.separable import (
    Maps,
    adjoint,
    separable_bound,
    separable_moments,
    separable_pullback,
    separable_range,
)
from gradlint.quadrature import above, density, pieces
from gradlint.transfer import Context, apply_moments, row

Values = Sequence[ir.Value | None]


# -- windows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Sizes of a pooling with static shapes."""

    sizes: tuple[int, ...]
    outs: tuple[int, ...]
    kernel: tuple[int, ...]
    at: Geometry

    def inside(self, axis: int) -> Array:
        """(out, in): 1 where a window reads a position."""
        starts = np.arange(self.outs[axis]) * self.at.strides[axis] - self.at.begin[axis]
        found = np.zeros((self.outs[axis], self.sizes[axis]))
        for tap in range(self.kernel[axis]):
            reads = starts + tap * self.at.dilations[axis]
            valid = (reads >= 0) & (reads < self.sizes[axis])
            found[np.flatnonzero(valid), reads[valid]] = 1.0
        return found

    def divisor(self, axis: int, padding: bool) -> Array:
        """Elements each window counts, (out, 1): those inside, or also those in the padding (not beyond it)."""
        if not padding:
            return np.maximum(self.inside(axis).sum(axis=1, keepdims=True), 1.0)
        starts = np.arange(self.outs[axis])[:, None] * self.at.strides[axis] - self.at.begin[axis]
        reads = starts + np.arange(self.kernel[axis]) * self.at.dilations[axis]
        return np.maximum((reads < self.sizes[axis] + self.at.end[axis]).sum(axis=1, keepdims=True), 1.0)

    @property
    def sums(self) -> Maps:
        """Summing over each window."""
        return {2 + k: self.inside(k) for k in range(len(self.kernel))}

    def means(self, padding: bool) -> Maps:
        """Averaging over each window, with or without its padding."""
        return {2 + k: self.inside(k) / self.divisor(k, padding) for k in range(len(self.kernel))}

    @property
    def count(self) -> float:
        """Elements in a window, the mean over windows."""
        return math.prod(float(a.sum(axis=1).mean()) for a in self.sums.values())

    @property
    def ratio(self) -> float:
        """Windows per element."""
        return math.prod(self.outs) / math.prod(self.sizes)

    @property
    def copies(self) -> int:
        """The most windows that read one element."""
        return math.prod(int(a.sum(axis=0).max()) for a in self.sums.values())


def windows(node: ir.Node) -> Windows | None:
    """The windows of a pooling (of a global one: all there is), or None where sizes are symbolic."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return None
    sizes, outs = ([n for n in v.shape.dims[2:] if isinstance(n, int)] for v in (x, y))  # type: ignore[union-attr]
    rank = len(x.shape) - 2
    if len(sizes) < rank or len(outs) < rank or 0 in sizes or 0 in outs:
        return None
    kernel = tuple(sizes) if node.op_type.startswith("Global") else tuple(attribute(node, "kernel_shape", ()))
    return Windows(tuple(sizes), tuple(outs), kernel, geometry(node, rank))


def pooled_shape(node: ir.Node) -> tuple[int | None, ...]:
    """The output's sizes, where known."""
    shape = node.outputs[0].shape
    return () if shape is None else tuple(n if isinstance(n, int) else None for n in shape.dims)


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
    t = np.interp(
        np.divide(x.mean**2, x.second, out=np.zeros_like(x.mean), where=x.second > 0), _FIRST**2 / _SECOND, _T
    )
    std = x.mean / np.interp(t, _T, _FIRST)
    scale = np.divide(std**2, x.var, out=np.zeros_like(std), where=x.var > 0)
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
    the Relu's own row can't know: the factor is applied here.
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
    return (back,)


def _same_choice(w: Windows) -> float:
    """Windows, itself among them, that are expected to choose the same element as a window does."""
    shifts: Array = np.ones(1)
    for kernel, stride, dilation, out in zip(w.kernel, w.at.strides, w.at.dilations, w.outs, strict=True):
        reach = min(((kernel - 1) * dilation) // stride, out - 1)
        taps = np.arange(kernel) * dilation
        common = [np.intersect1d(taps, taps + k * stride).size for k in range(-reach, reach + 1)]
        shifts = np.outer(shifts, common).reshape(-1)
    n = math.prod(w.kernel)
    return float(np.sum(shifts / (2 * n - shifts)))


def max_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    x = xs[0]
    if x is None:
        return (None,)
    axes = tuple(range(2, x.lo.ndim))
    return (Range(x.lo.min(axis=axes, keepdims=True), x.hi.max(axis=axes, keepdims=True)),)


def max_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """An element gets the gradients of at most `copies` windows, a window's goes to one element."""
    w = windows(node)
    return (None if w is None else math.sqrt(w.copies),)


# -- MaxPool -----------------------------------------------------------------------------------------------------------


def _attributes(node: ir.Node) -> dict[str, Any]:
    names = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "auto_pad")
    return {name: attribute(node, name) for name in names if name in node.attributes}


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
        indices = b.ops("MaxPool", x, outputs=2, **_attributes(node))[1]
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


row("MaxPool", moments=max_moments, range=max_range, pullback=max_pullback, bound=max_bound, vjp=max_vjp)


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


row("GlobalMaxPool", moments=max_moments, range=max_range, pullback=max_pullback, bound=max_bound, vjp=global_max_vjp)


# -- AveragePool -------------------------------------------------------------------------------------------------------


def _means(node: ir.Node) -> Maps | None:
    w = windows(node)
    return None if w is None else w.means(bool(attribute(node, "count_include_pad", 0)))


def average_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, maps = xs[0], _means(node)
    return (None if x is None or maps is None else separable_moments(maps, x),)


def average_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    g, maps = gs[0], _means(node)
    return (None if g is None or maps is None else separable_pullback(maps, g),)


def average_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    x, maps = xs[0], _means(node)
    return (None if x is None or maps is None else separable_range(maps, x),)


def average_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    maps = _means(node)
    return (None if maps is None else separable_bound(maps),)


def summed_back(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """The adjoint of summing over windows, applied to g."""
    x, w = node.inputs[0], windows(node)
    assert x is not None
    if w is not None:
        return adjoint(b, g, w.sums, pooled_shape(node))
    if x.shape is None:
        raise Unsupported
    rank, y = len(x.shape) - 2, node.outputs[0]
    assert g.dtype is not None
    ones = b.constant(np.ones((1, 1, *attribute(node, "kernel_shape", ()))), g.dtype.numpy())
    planes = b.op("Reshape", g, layout(b, -1, 1, (y, 2, None)))
    back = input_gradient(b, planes, y, ones, x, geometry(node, rank))
    return b.op("Reshape", back, b.shape(x))


def average_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """g over the number of elements each window counts, sent to all it reads."""
    x, g, w = node.inputs[0], gs[0], windows(node)
    assert x is not None
    assert g is not None
    if w is not None:
        return (adjoint(b, g, w.means(bool(attribute(node, "count_include_pad", 0))), pooled_shape(node)),)
    one = b.op("Expand", b.scalar(1.0, g), layout(b, 1, 1, (x, 2, None)))
    inside = b.op("LpPool", one, p=1, **_attributes(node))
    share = b.op("AveragePool", one, count_include_pad=attribute(node, "count_include_pad", 0), **_attributes(node))
    return (summed_back(b, node, b.op("Mul", g, b.op("Div", share, inside))),)


row(
    "AveragePool",
    moments=average_moments,
    range=average_range,
    pullback=average_pullback,
    bound=average_bound,
    vjp=average_vjp,
)


# -- GlobalAveragePool -------------------------------------------------------------------------------------------------


def _positions(node: ir.Node) -> int | None:
    shape = dims(node.inputs[0])
    return None if shape is None else math.prod(shape[2:])


def global_average_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """The shared part is kept, n local ones average out; what only varies over positions is gone."""
    x, n = xs[0], _positions(node)
    if x is None or not n:
        return (None,)
    x = collapsed(x)
    return (Moments(x.mean, np.zeros_like(x.fixed), x.shared, x.local / n),)


def global_average_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Every position gets the same g / n."""
    g, n = gs[0], _positions(node)
    if g is None or not n:
        return (None,)
    return (Gradient(g.total / n**2, np.zeros_like(g.total)),)


def global_average_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    n = _positions(node)
    return (1 / math.sqrt(n) if n else None,)


def global_average_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    n = _positions(node)
    if n is not None:
        return (b.op("Expand", b.op("Mul", g, b.scalar(1 / n, g)), b.shape(x)),)
    elements, pooled = (b.op("Size", v, dtype=ir.DataType.INT64) for v in (x, y))
    count = b.op("Cast", b.op("Div", elements, pooled), to=g.dtype, dtype=g.dtype)
    return (b.op("Expand", b.op("Div", g, count), b.shape(x)),)


row(
    "GlobalAveragePool",
    moments=global_average_moments,
    range=max_range,
    pullback=global_average_pullback,
    bound=global_average_bound,
    vjp=global_average_vjp,
)
