"""Pooling over windows, of the mean and of the p-norm; neighbouring elements are taken as uncorrelated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    if len(sizes) < rank or len(outs) < rank or min((*sizes, *outs)) <= 0:
        return None
    kernel = tuple(sizes) if node.op_type.startswith("Global") else tuple(attribute(node, "kernel_shape", ()))
    return Windows(tuple(sizes), tuple(outs), kernel, geometry(node, rank))


def pooled_shape(node: ir.Node) -> tuple[int | None, ...]:
    """The output's sizes, where known."""
    shape = node.outputs[0].shape
    return () if shape is None else tuple(n if isinstance(n, int) else None for n in shape.dims)


def window_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """No element of the output leaves the range of the input's."""
    x = xs[0]
    if x is None:
        return (None,)
    axes = tuple(range(2, x.lo.ndim))
    return (Range(x.lo.min(axis=axes, keepdims=True), x.hi.max(axis=axes, keepdims=True)),)


def window_attributes(node: ir.Node) -> dict[str, Any]:
    """What a pooling says about its windows, to hand on to another."""
    names = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "auto_pad")
    return {name: attribute(node, name) for name in names if name in node.attributes}


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
    if x.shape is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        raise Unsupported("pads that depend on sizes that are not known")
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
    inside = b.op("LpPool", one, p=1, **window_attributes(node))
    share = b.op(
        "AveragePool", one, count_include_pad=attribute(node, "count_include_pad", 0), **window_attributes(node)
    )
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
    some = b.op("Max", pooled, b.constant(1))  # of a batch without examples there is none
    count = b.op("Cast", b.op("Div", elements, some), to=g.dtype, dtype=g.dtype)
    return (b.op("Expand", b.op("Div", g, count), b.shape(x)),)


row(
    "GlobalAveragePool",
    moments=global_average_moments,
    range=window_range,
    pullback=global_average_pullback,
    bound=global_average_bound,
    vjp=global_average_vjp,
)


# -- LpPool, GlobalLpPool ----------------------------------------------------------------------------------------------


def _power(node: ir.Node) -> float:
    return float(attribute(node, "p", 2))


def norm_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """(sum of |x|^p)^(1/p): the sum of n independent terms taken as normal, then its root."""
    x, w, p = xs[0], windows(node), _power(node)
    if x is None or w is None:
        return (None,)
    terms = apply_moments(lambda z: np.abs(z) ** p, collapsed(x), kinked=True)
    total = separable_moments(w.sums, terms)
    return (apply_moments(lambda s: np.maximum(s, 0.0) ** (1 / p), total, kinked=True),)


def norm_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dx = sign(x) (|x| / y)^(p - 1) g, with E[y^(2p - 2)] as E[y^2]^(p - 1); windows taken as independent."""
    x, y, g, w, p = xs[0], ys[0], gs[0], windows(node), _power(node)
    if x is None or y is None or g is None or w is None:
        return (None,)
    powers = apply_moments(lambda z: np.abs(z) ** (2 * p - 2), collapsed(x), kinked=True).mean
    back = collapsed_gradient(g).total * w.count * w.ratio * powers / np.maximum(y.second, 1e-300) ** (p - 1)
    return (Gradient(np.zeros_like(back), back),)


def norm_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Between 0 and the norm of a window full of the largest magnitude."""
    x, w = xs[0], windows(node)
    if x is None or w is None:
        return (None,)
    axes = tuple(range(2, x.lo.ndim))
    top = np.maximum(np.abs(x.lo), np.abs(x.hi)).max(axis=axes, keepdims=True)
    return (Range(np.zeros_like(top), top * math.prod(w.kernel) ** (1 / _power(node)) * (1 + 1e-5)),)


def norm_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """The p-norm of n numbers changes by at most n^max(0, 1/p - 1/2) times their change in the 2-norm."""
    w = windows(node)
    if w is None:
        return (None,)
    slope = math.prod(w.kernel) ** max(0.0, 1 / _power(node) - 0.5)
    return (math.sqrt(w.copies) * slope,)


def norm_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = sign(x) |x|^(p - 1) times the windows' g y^(1 - p), 0 where y is 0."""
    x, y, g, p = node.inputs[0], node.outputs[0], gs[0], _power(node)
    assert x is not None
    assert g is not None
    if p > 1:
        positive = b.op("Greater", y, b.scalar(0.0, y), dtype=ir.DataType.BOOL)
        safe = b.op("Where", positive, y, b.scalar(1.0, y), dtype=y.dtype)
        g = b.op("Div", g, safe if p == 2 else b.op("Pow", safe, b.scalar(p - 1, y)))
    spread = g if node.op_type.startswith("Global") else summed_back(b, node, g)
    if p == 1:
        slope = b.op("Sign", x)
    elif p == 2:
        slope = x
    else:
        slope = b.op("Mul", b.op("Sign", x), b.op("Pow", b.op("Abs", x), b.scalar(p - 1, x)))
    return (b.op("Mul", slope, spread),)


for _op in ("LpPool", "GlobalLpPool"):
    row(_op, moments=norm_moments, range=norm_range, pullback=norm_pullback, bound=norm_bound, vjp=norm_vjp)
