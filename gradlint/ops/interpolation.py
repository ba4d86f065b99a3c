"""Resize: interpolation, separable over axes; along an axis it is a matrix (out, in), built from its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.separable import (
    Maps,
    adjoint,
    separable_bound,
    separable_moments,
    separable_pullback,
    separable_range,
)
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]

_SETTINGS = (
    "antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "extrapolation_value", "mode",
    "nearest_mode",
)  # fmt: skip


# -- one axis ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """How one axis is resized: from `size` to `out` elements; crop: the region of interest, as shares of the axis."""

    size: int
    out: int
    scale: float
    crop: tuple[float, float] = (0.0, 1.0)


def source(axis: Axis, mode: str) -> Array:
    """The coordinate in the input of each output position (coordinate_transformation_mode)."""
    x, n, m = np.arange(axis.out, dtype=np.float64), axis.size, axis.out
    if mode == "asymmetric":
        return x / axis.scale
    if mode == "align_corners":
        return x * (n - 1) / (m - 1) if m > 1 else x * 0.0
    if mode == "tf_crop_and_resize":
        start, end = axis.crop
        if m > 1:
            return start * (n - 1) + x * (end - start) * (n - 1) / (m - 1)
        return x * 0.0 + 0.5 * (start + end) * (n - 1)
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / axis.scale
    if mode == "pytorch_half_pixel" and m == 1:
        return x * 0.0
    half = (x + 0.5) / axis.scale - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = m / (axis.scale * n)
        return n / 2 * (1 - adjustment) + half
    return half


def _triangle(t: Array) -> Array:
    return np.maximum(1 - np.abs(t), 0.0)


def _cubic(t: Array, a: float) -> Array:
    """Keys' kernel (1981)."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def matrix(node: ir.Node, axis: Axis) -> Array:
    """(out, in): the weight of each input element in each output element."""
    mode = attribute(node, "mode", "nearest")
    transformation = attribute(node, "coordinate_transformation_mode", "half_pixel")
    x = source(axis, transformation)
    found = np.zeros((axis.out, axis.size))
    if mode == "nearest":
        index = np.clip(_rounded(x, attribute(node, "nearest_mode", "round_prefer_floor")), 0, axis.size - 1)
        found[np.arange(axis.out), index] = 1.0
    else:
        _spread(found, node, mode, x, axis)
    if transformation == "tf_crop_and_resize":
        found[(x < 0) | (x > axis.size - 1)] = 0.0  # the extrapolation value, a constant
    return found


def _rounded(x: Array, mode: str) -> np.ndarray:
    rounded = {
        "round_prefer_floor": np.ceil(x - 0.5),
        "round_prefer_ceil": np.floor(x + 0.5),
        "floor": np.floor(x),
        "ceil": np.ceil(x),
    }[mode]
    return rounded.astype(np.int64)


def _spread(found: Array, node: ir.Node, mode: str, x: Array, axis: Axis) -> None:
    """Weights of the neighbours of x: what falls outside goes to the edge, or (exclude_outside) to the others.

    antialias widens the kernel by 1 / scale where the axis shrinks.
    """
    antialias = bool(attribute(node, "antialias", 0)) and axis.scale < 1
    squeeze = axis.scale if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / squeeze) + 1
    taps = np.floor(x)[:, None] + np.arange(-reach, reach + 1)
    distance = squeeze * (taps - x[:, None])
    weights = _triangle(distance) if mode == "linear" else _cubic(distance, attribute(node, "cubic_coeff_a", -0.75))
    outside = (taps < 0) | (taps > axis.size - 1)
    if attribute(node, "exclude_outside", 0):
        weights = np.where(outside, 0.0, weights)
    weights = weights / weights.sum(axis=1, keepdims=True)
    index = np.clip(taps, 0, axis.size - 1).astype(np.int64)
    np.add.at(found, (np.broadcast_to(np.arange(axis.out)[:, None], index.shape), index), weights)


# -- a node ------------------------------------------------------------------------------------------------------------


def _input(node: ir.Node, k: int) -> ir.Value | None:
    """An input that is given: exporters write an empty tensor for one that is not."""
    value = node.inputs[k] if k < len(node.inputs) else None
    return None if value is None or dims(value) == (0,) else value


def resized_axes(node: ir.Node, rank: int) -> list[int]:
    given = attribute(node, "axes", None)
    return list(range(rank)) if given is None else [a % rank for a in given]


def axes(node: ir.Node) -> dict[int, Axis] | None:
    """The axes that are resized, or None where their sizes or the settings are not known before it runs."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return None
    rank = len(x.shape)
    along = resized_axes(node, rank)
    roi, scales, sizes = (constant_array(_input(node, k)) for k in (1, 2, 3))
    if scales is None and sizes is None:
        return None
    found: dict[int, Axis] = {}
    for k, a in enumerate(along):
        n, m = x.shape[a], y.shape[a]
        if scales is not None and scales[k] == 1 and n == m and roi is None:
            continue  # as it is, whatever its size
        if not isinstance(n, int) or not isinstance(m, int) or n == 0:
            return None
        found[a] = Axis(n, m, float(scales[k]) if scales is not None else m / n)
        if roi is not None and attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
            found[a] = replace(found[a], crop=(float(roi[k]), float(roi[len(along) + k])))
    if sizes is not None and attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        choose = min if attribute(node, "keep_aspect_ratio_policy") == "not_larger" else max
        scale = choose(float(sizes[k]) / found[a].size for k, a in enumerate(along))
        found = {a: replace(axis, scale=scale) for a, axis in found.items()}
    return found


def maps(node: ir.Node) -> Maps | None:
    """The matrices of a Resize; axes that stay as they are have none."""
    found = axes(node)
    if found is None:
        return None
    built = {a: matrix(node, axis) for a, axis in found.items()}
    return {a: w for a, w in built.items() if not np.array_equal(w, np.eye(len(w)))}


# -- rows --------------------------------------------------------------------------------------------------------------


def _rest(node: ir.Node) -> tuple[None, ...]:
    return (None,) * (len(node.inputs) - 1)


def resize_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Through the matrices; the extrapolation value of tf_crop_and_resize is left out."""
    x, found = xs[0], maps(node)
    return (None if x is None or found is None else separable_moments(found, x),)


def resize_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    g, found = gs[0], maps(node)
    return (None if g is None or found is None else separable_pullback(found, g), *_rest(node))


def resize_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    x, found = xs[0], maps(node)
    if x is None or found is None:
        return (None,)
    y = separable_range(found, x)
    if attribute(node, "coordinate_transformation_mode", "") != "tf_crop_and_resize":
        return (y,)
    outside = attribute(node, "extrapolation_value", 0.0)
    return (Range(np.minimum(y.lo, outside), np.maximum(y.hi, outside)),)


def resize_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    found = maps(node)
    return (None if found is None else separable_bound(found), *_rest(node))


def resize_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The transposed matrices; where sizes are symbolic they are had by resizing an identity when it runs."""
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    found = maps(node)
    if found is not None and y.shape is not None:
        shape = tuple(n if isinstance(n, int) else None for n in y.shape.dims)
        if all(shape[k] is not None for k in range(min(found, default=len(shape)) + 1, len(shape))):
            return (adjoint(b, g, found, shape), *_rest(node))
    return (_at_run(b, node, x, y, g), *_rest(node))


def _at_run(b: Backward, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    if x.shape is None or y.shape is None or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Unsupported
    rank = len(x.shape)
    along = resized_axes(node, rank)
    scales = constant_array(_input(node, 2))
    for k, axis in enumerate(along):
        if (scales is not None and scales[k] == 1) or (scales is None and x.shape[axis] == y.shape[axis]):
            continue
        weights = _resized_identity(b, node, x, y, axis, None if scales is None else float(scales[k]))
        if axis == rank - 2:
            g = b.op("MatMul", weights, g)
            continue
        perm = [*(a for a in range(rank) if a != axis), axis]
        turned = g if axis == rank - 1 else b.op("Transpose", g, perm=perm)
        turned = b.op("MatMul", turned, b.op("Transpose", weights, perm=[1, 0]))
        g = turned if axis == rank - 1 else b.op("Transpose", turned, perm=[int(p) for p in np.argsort(perm)])
    return g


def _resized_identity(b: Backward, node: ir.Node, x: ir.Value, y: ir.Value, axis: int, scale: float | None) -> ir.Value:
    """A_a^T (in, out)."""
    size, out = (b.op("Shape", v, start=axis, end=axis + 1, dtype=ir.DataType.INT64) for v in (x, y))
    assert x.dtype is not None
    zero = ir.tensor(np.zeros(1, x.dtype.numpy()), name="zero")
    square = b.op("Concat", size, size, axis=0)
    identity = b.op("EyeLike", b.op("ConstantOfShape", square, value=zero, dtype=x.dtype))
    image = b.op("Unsqueeze", identity, b.constant([0, 1]))
    settings: dict[str, Any] = {k: attribute(node, k) for k in _SETTINGS if k in node.attributes}
    if scale is not None:
        resized = b.op("Resize", image, None, b.constant([1, 1, 1, scale], np.float32), **settings)
    else:
        sizes = b.op("Concat", b.constant([1, 1]), size, out, axis=0)
        resized = b.op("Resize", image, None, None, sizes, **settings)
    return b.op("Squeeze", resized, b.constant([0, 1]))


row(
    "Resize",
    moments=resize_moments,
    range=resize_range,
    pullback=resize_pullback,
    bound=resize_bound,
    vjp=resize_vjp,
)
