"""What all normalisations share: y = (x - mean) / sqrt(var + eps) over D elements, and its gradient.

    dx = (g - mean(g) - y mean(g y)) / sqrt(var + eps)

The gradient loses two directions: that of ones and that of y (Ioffe & Szegedy 2015; Xu et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments

# -- estimates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The elements that share one mean and variance.

    axes: along which the moments' arrays are averaged; fixed, shared, local: how many independent values each part of
    the variance has among those elements (a part that is the same for all of them has 1).
    """

    axes: tuple[int, ...]
    fixed: int
    shared: int
    local: int


def group(x: Moments, shape: tuple[int, ...], axes: tuple[int, ...], examples: int = 1) -> Group:
    """The elements along `axes`, which span `examples` examples: units differ independently; what is shared also from
    example to example, what is fixed also from position to position, what is local in every respect."""
    size = math.prod(shape[a] for a in axes)
    sizes = np.broadcast_shapes(x.mean.shape, x.fixed.shape, x.shared.shape, x.local.shape)
    units = math.prod(sizes[a] for a in axes)
    return Group(axes, max(1, size // examples), min(size, units * examples), size)


@dataclass(frozen=True)
class Standardized:
    """Moments of y, and E[1 / (var + eps)] (arrays of size 1 along the group's axes)."""

    y: Moments
    rate: Array


def _average(array: Array, axes: tuple[int, ...]) -> Array:
    return array.mean(axis=axes, keepdims=True)


def _centred(part: Array, axes: tuple[int, ...], count: int) -> Array:
    """Variance of v_i - mean(v) for independent v_i: (1 - 2/n) v_i + mean(v)/n."""
    return part * (1 - 2 / count) + _average(part, axes) / count


def standardize(x: Moments, over: Group, eps: float, *, centre: bool = True) -> Standardized:
    """Moments after standardisation: the second moment over the group is exactly var / (var + eps).

    The sampled variance is taken at its mean; the mean of its inverse, which the gradient feels, is that of a scaled
    chi-square with the same mean and variance, nu / (nu - 2) larger.
    """
    axes = over.axes
    mean, fixed, shared, local = np.broadcast_arrays(x.mean, x.fixed, x.shared, x.local)
    if centre:
        mean = mean - _average(mean, axes)
        fixed, shared, local = (
            np.maximum(_centred(v, axes, n), 0)
            for v, n in ((fixed, over.fixed), (shared, over.shared), (local, over.local))
        )
    var = _average(mean**2 + fixed + shared + local, axes)
    noise = sum(_average(2 * v**2 + 4 * v * mean**2, axes) / n for v, n in ((shared, over.shared), (local, over.local)))
    freedom = np.where(noise > 0, 2 * var**2 / np.where(noise > 0, noise, 1.0), np.inf)
    inverse = 1 / np.maximum(var + eps, 1e-300)
    with np.errstate(invalid="ignore"):
        excess = np.where(freedom > 1e6, 1.0, freedom / np.maximum(freedom - 2, 0.5 * freedom))
    scale = np.sqrt(inverse)
    return Standardized(Moments(mean, fixed, shared, local).scaled(scale), inverse * excess)


def project(g: Gradient, s: Standardized, over: Group, *, centre: bool = True) -> Gradient:
    """Second moment of (g - mean(g) - y mean(g y)) / sqrt(var + eps), g independent of y.

    The coefficient m = mean(g y) has E[m^2] = mean(q_local y^2) / n_local + mean(q_shared ybar^2) / n_shared, ybar
    being y's mean over positions.
    """
    y, axes = s.y, over.axes
    coherent, second, _ = np.broadcast_arrays(y.mean**2 + y.shared, y.second, g.shared)
    positions = max(1.0, over.local / over.shared)
    bar = coherent + (second - coherent) / positions
    own, common_part = _average(g.local * second, axes) / over.local, _average(g.shared * bar, axes) / over.shared
    m2 = own + common_part
    local = _centred(g.local, axes, over.local) if centre else g.local
    shared = _centred(g.shared, axes, over.shared) if centre else g.shared
    total = shared + local - 2 * (g.local * second / over.local + g.shared * bar / over.shared) + second * m2
    if centre and over.shared == 1:
        kept = np.zeros_like(total)
    else:
        same = (
            m2 if positions > 1 else common_part
        )  # of statistics per position only g's shared part is the same at all
        kept = np.clip(shared - 2 * g.shared * coherent / over.shared + coherent * same, 0, None)
    total = np.maximum(total, 0)
    kept = np.minimum(kept, total)
    return Gradient(kept * s.rate, (total - kept) * s.rate)


def weighted(g: Gradient, gamma: Array, axes: tuple[int, ...]) -> Gradient:
    """g times a known factor per unit. What is the same all along an axis stays so only by the factor's mean."""
    blind = tuple(a for a in axes if gamma.shape[a] > 1 and g.shared.shape[a] == 1)
    same = _average(gamma, blind) ** 2
    rest = _average(gamma**2, blind) - same
    return Gradient(g.shared * same, g.local * gamma**2 + g.shared * rest)


# -- the gradient as operators -----------------------------------------------------------------------------------------


def standardized(
    b: Backward, x: ir.Value, axes: Sequence[int], eps: float, *, centre: bool = True
) -> tuple[ir.Value, ir.Value]:
    """y and 1/sqrt(var + eps) (size 1 along `axes`).

    Over known trailing axes in float32 in one pass: LayerNormalization without weights gives both.
    """
    shape = x.shape
    last = [shape[a] for a in axes] if shape is not None else [None]
    trailing = shape is not None and list(axes) == list(range(len(shape) - len(axes), len(shape)))
    if centre and trailing and x.dtype == ir.DataType.FLOAT and all(isinstance(d, int) for d in last):
        ones = b.constant(np.ones(last), np.float32)
        y, _, rate = b.ops("LayerNormalization", x, ones, outputs=3, axis=-len(axes), epsilon=eps)
        return y, rate
    over = b.constant(list(axes))
    if centre:
        x = b.op("Sub", x, b.op("ReduceMean", x, over, keepdims=1))
    var = b.op("ReduceMean", b.op("Mul", x, x), over, keepdims=1)
    rate = b.op("Reciprocal", b.op("Sqrt", b.op("Add", var, b.scalar(eps, x))))
    return b.op("Mul", x, rate), rate


def projected(
    b: Backward,
    g: ir.Value,
    gy: ir.Value,
    y: ir.Value,
    rate: ir.Value,
    axes: Sequence[int],
    *,
    centre: bool = True,
) -> ir.Value:
    """(g - mean(g) - y mean(g y)) rate, gy being g y."""
    over = b.constant(list(axes))
    d = b.op("Sub", g, b.op("Mul", y, b.op("ReduceMean", gy, over, keepdims=1)))
    if centre:
        d = b.op("Sub", d, b.op("ReduceMean", g, over, keepdims=1))
    return b.op("Mul", d, rate)


def elements(b: Backward, x: ir.Value, statistic: ir.Value) -> ir.Value:
    """How many elements share one statistic, as a number in its type (the sizes of both known when it runs)."""
    large, small = (b.op("Size", v, dtype=ir.DataType.INT64) for v in (x, statistic))
    some = b.op("Max", small, b.constant(1))  # of a batch without examples there is none
    return b.op("CastLike", b.op("Div", large, some), statistic, dtype=statistic.dtype)
