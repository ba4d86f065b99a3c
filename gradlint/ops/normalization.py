"""Normalisation within an example: Layer, RMS, Instance and Group normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.standardization import elements, group, project, projected, standardize, standardized, weighted
from gradlint.transfer import Context, product, row, summed

Values = Sequence[ir.Value | None]


# -- over the last axes: LayerNormalization, RMSNormalization ----------------------------------------------------------


def _last_axes(node: ir.Node) -> tuple[int, ...]:
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    rank = len(x.shape)
    return tuple(range(attribute(node, "axis", -1) % rank, rank))


def _centres(node: ir.Node) -> bool:
    """Is the mean taken away?"""
    return node.op_type != "RMSNormalization"


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def last_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Units keep their own means and variances relative to the row's; the row has second moment 1."""
    none = (None,) * (len(node.outputs) - 1)
    x, gamma, shape, beta = xs[0], ctx.array(node.inputs[1]), dims(node.inputs[0]), _bias(node)
    shift = 0.0 if beta is None else ctx.array(beta)
    if x is None or gamma is None or shape is None or shift is None:
        return (None, *none)
    over = group(x, shape, _last_axes(node))
    s = standardize(x, over, attribute(node, "epsilon", 1e-5), centre=_centres(node))
    return (s.y.scaled(gamma.astype(np.float64), shift), *none)


def last_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    x, gamma, shape, g = xs[0], ctx.array(node.inputs[1]), dims(node.inputs[0]), gs[0]
    if x is None or gamma is None or shape is None or g is None:
        return (None,) * len(node.inputs)
    axes, y = _last_axes(node), node.outputs[0]
    over = group(x, shape, axes)
    s = standardize(x, over, attribute(node, "epsilon", 1e-5), centre=_centres(node))
    factor = gamma.astype(np.float64).reshape((1,) * (len(shape) - gamma.ndim) + gamma.shape)
    dx = project(weighted(g, factor, axes), s, over, centre=_centres(node))
    dgamma = summed(ctx, product(g, s.y, along=1.0), y, gamma.shape, constant=True)
    bias = dims(_bias(node))
    return (dx, dgamma, None if bias is None else summed(ctx, g, y, bias, constant=True))


def last_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """|y| <= |gamma| sqrt(D) + |beta|: no element is larger than the norm of its row."""
    shape, gamma, beta = dims(node.inputs[0]), ctx.array(node.inputs[1]), ctx.array(_bias(node))
    if shape is None or gamma is None or (beta is None and _bias(node) is not None):
        return (None,)
    size = math.prod(shape[a] for a in _last_axes(node))
    reach = np.abs(gamma.astype(np.float64)) * math.sqrt(size) * (1 + 1e-5) * np.ones((1,) * len(shape))
    centre = np.zeros_like(reach) if beta is None else beta.astype(np.float64)
    return (Range(centre - reach, centre + reach),)


def steepest(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """max |gamma| / sqrt(eps), which the projections only lower."""
    gamma, eps = ctx.array(node.inputs[1]), attribute(node, "epsilon", 1e-5)
    none = (None,) * (len(node.inputs) - 1)
    return (None if gamma is None or eps <= 0 else float(np.abs(gamma).max()) / math.sqrt(eps), *none)


def last_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = rate (g gamma - mean(g gamma) - xhat mean(g gamma xhat)); dgamma = sum of g xhat; dbeta = sum of g."""
    x, scale, g = node.inputs[0], node.inputs[1], gs[0]
    bias = _bias(node)
    assert x is not None
    assert scale is not None
    axes, dx, dscale = _last_axes(node), None, None
    y, rate = standardized(b, x, axes, attribute(node, "epsilon", 1e-5), centre=_centres(node))
    if g is not None and (b.wanted(x) or b.wanted(scale)):
        p = b.op("Mul", g, y)
        if b.wanted(x):
            dx = projected(b, b.op("Mul", g, scale), b.op("Mul", p, scale), y, rate, axes, centre=_centres(node))
        dscale = b.unbroadcast(p, scale, node.outputs[0]) if b.wanted(scale) else None
    dbias = None
    if g is not None and bias is not None and b.wanted(bias):
        dbias = b.unbroadcast(g, bias, node.outputs[0])
    return _statistics_vjp(b, gs, dx, y, rate) if b.wanted(x) else None, dscale, dbias


def _statistics_vjp(b: Backward, gs: Values, dx: ir.Value | None, y: ir.Value, rate: ir.Value) -> ir.Value | None:
    """What the gradients of the outputs Mean (1/D at every element) and InvStdDev (-xhat rate^2 / D) add."""
    for k, g in enumerate(gs[1:3]):
        if g is None:
            continue
        share = b.op("Div", g, elements(b, y, rate))
        if k == 0:
            term = b.op("Expand", share, b.op("Shape", y, dtype=ir.DataType.INT64))
        else:
            term = b.op("Neg", b.op("Mul", y, b.op("Mul", share, b.op("Mul", rate, rate))))
        dx = term if dx is None else b.op("Add", dx, term)
    return dx


for _op in ("LayerNormalization", "RMSNormalization"):
    row(_op, moments=last_moments, range=last_range, pullback=last_pullback, bound=steepest, vjp=last_vjp)


# -- over positions and groups of channels: InstanceNormalization, GroupNormalization ----------------------------------


def _groups(node: ir.Node) -> int | None:
    """How many groups of channels; None: one per channel."""
    return int(attribute(node, "num_groups", 1)) if node.op_type == "GroupNormalization" else None


def _split(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The value's shape with the channels split into (groups, channels per group)."""
    groups = _groups(node) or shape[1]
    return (shape[0], groups, shape[1] // groups, *shape[2:])


def _split_array(array: Array, split: tuple[int, ...]) -> Array:
    """An array that broadcasts against the value, in split form."""
    return array.reshape((array.shape[0], *(split[1:3] if array.shape[1] > 1 else (1, 1)), *array.shape[2:]))


def _merged_array(array: Array, split: tuple[int, ...]) -> Array:
    if array.shape[1] * array.shape[2] > 1:
        array = np.broadcast_to(array, (array.shape[0], *split[1:3], *array.shape[3:]))
    return array.reshape((array.shape[0], array.shape[1] * array.shape[2], *array.shape[3:]))


def _per_channel(ctx: Context, node: ir.Node, index: int) -> Array | None:
    array, shape = ctx.array(node.inputs[index]), dims(node.inputs[0])
    if array is None or shape is None:
        return None
    return array.astype(np.float64).reshape((1, -1, *(1,) * (len(shape) - 2)))


def group_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """What is the same at every position of an example goes as far as the whole group shares it: with one channel per
    group (InstanceNormalization) nothing of it is left."""
    x, shape, gamma, beta = xs[0], dims(node.inputs[0]), _per_channel(ctx, node, 1), _per_channel(ctx, node, 2)
    if x is None or shape is None or gamma is None or beta is None:
        return (None,)
    split = _split(node, shape)
    x = x.map(lambda a: _split_array(a, split))
    axes = tuple(range(2, len(split)))
    s = standardize(x, group(x, split, axes), attribute(node, "epsilon", 1e-5))
    return (s.y.map(lambda a: _merged_array(a, split)).scaled(gamma, beta),)


def group_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    x, shape, gamma, g = xs[0], dims(node.inputs[0]), _per_channel(ctx, node, 1), gs[0]
    if x is None or shape is None or gamma is None or g is None:
        return (None, None, None)
    split = _split(node, shape)
    x, back = x.map(lambda a: _split_array(a, split)), g.map(lambda a: _split_array(a, split))
    axes = tuple(range(2, len(split)))
    over = group(x, split, axes)
    s = standardize(x, over, attribute(node, "epsilon", 1e-5))
    dx = project(weighted(back, _split_array(gamma, split), axes), s, over).map(lambda a: _merged_array(a, split))
    xhat, y = s.y.map(lambda a: _merged_array(a, split)), node.outputs[0]
    small = tuple(n if k == 1 else 1 for k, n in enumerate(shape))
    dgamma, dbeta = (
        summed(ctx, q, y, small, constant=True).map(lambda a: a.reshape(-1)) for q in (product(g, xhat), g)
    )
    return (dx, dgamma, dbeta)


def group_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """|y| <= |gamma| sqrt(D) + |beta| with D elements in a group."""
    shape, gamma, beta = dims(node.inputs[0]), _per_channel(ctx, node, 1), _per_channel(ctx, node, 2)
    if shape is None or gamma is None or beta is None:
        return (None,)
    reach = np.abs(gamma) * math.sqrt(math.prod(_split(node, shape)[2:])) * (1 + 1e-5)
    return (Range(beta - reach, beta + reach),)


def group_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """As LayerNormalization, over the rows of (N, groups, elements of a group); gamma and beta per channel."""
    x, scale, bias = node.inputs
    g = gs[0]
    assert x is not None
    assert x.shape is not None
    assert scale is not None
    assert g is not None
    rank, shape = len(x.shape), dims(x)
    rest = [0, *range(2, rank)]
    rows = b.constant([0, _groups(node) or 0, -1])
    grouped = b.op("Reshape", x, rows)
    if shape is not None:
        split = _split(node, shape)
        grouped.shape = ir.Shape([*split[:2], math.prod(split[2:])])
    y, rate = standardized(b, grouped, (2,), attribute(node, "epsilon", 1e-5))
    p = b.op("Mul", g, b.op("Reshape", y, b.shape(x)))
    dx = None
    if b.wanted(x):
        column = b.op("Reshape", scale, b.constant([-1] + [1] * (rank - 2)))
        gg, gy = (b.op("Reshape", b.op("Mul", v, column), rows) for v in (g, p))
        dx = b.op("Reshape", projected(b, gg, gy, y, rate, (2,)), b.shape(x))
    return (
        dx,
        b.sum_over(p, rest) if b.wanted(scale) else None,
        b.sum_over(g, rest) if b.wanted(bias) else None,
    )


for _op in ("InstanceNormalization", "GroupNormalization"):
    row(_op, moments=group_moments, range=group_range, pullback=group_pullback, bound=steepest, vjp=group_vjp)
