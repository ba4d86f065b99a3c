"""Normalisation within an example: Layer, RMS, Instance and Group normalisation, plain or fused with a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.standardization import elements, group, project, projected, standardize, standardized, weighted
from gradlint.transfer import Context, product, row, summed

Values = Sequence[ir.Value | None]


# -- over the last axes: LayerNormalization, RMSNormalization ------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Which inputs an operator of this kind has, by index.

    addends: summed first (the fused operators' skip and bias); scale, bias: applied last; total: the output that hands
    out the sum. centre: is the mean taken away?
    """

    centre: bool
    scale: int = 1
    bias: int | None = 2
    addends: tuple[int, ...] = ()
    total: int | None = None
    epsilon: float = 1e-5


def _at(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _last_axes(node: ir.Node) -> tuple[int, ...]:
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    rank = len(x.shape)
    return tuple(range(attribute(node, "axis", -1) % rank, rank))


def _sum_of(form: Form, xs: Sequence[Moments | None], node: ir.Node) -> Moments | None:
    """The sum of the addends' moments, taken as independent."""
    total = xs[0]
    for k in form.addends:
        if _at(node, k) is None:
            continue
        other = xs[k]
        if total is None or other is None:
            return None
        other = other.map(lambda a: a.reshape((1,) * (total.mean.ndim - a.ndim) + a.shape))  # noqa: B023
        total = Moments(
            total.mean + other.mean, total.fixed + other.fixed, total.shared + other.shared, total.local + other.local
        )
    return total


def _last_rows(form: Form) -> dict[str, Any]:
    """The five rows of y = gamma (x - mean) / sqrt(var + eps) + beta over the last axes."""

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        """Units keep their own means and variances relative to the row's; the row has second moment 1."""
        x, gamma, shape = _sum_of(form, xs, node), ctx.array(_at(node, form.scale)), dims(node.inputs[0])
        if x is None or gamma is None or shape is None:
            return (None,) * len(node.outputs)
        beta = 0.0 if _at(node, form.bias) is None else ctx.array(_at(node, form.bias))
        over = group(x, shape, _last_axes(node))
        s = standardize(x, over, attribute(node, "epsilon", form.epsilon), centre=form.centre)
        y = None if beta is None else s.y.scaled(gamma.astype(np.float64), beta)
        return [y if k == 0 else x if k == form.total else None for k in range(len(node.outputs))]

    def pullback(
        ctx: Context,
        node: ir.Node,
        xs: Sequence[Moments | None],
        ys: Sequence[Moments | None],
        gs: Sequence[Gradient | None],
    ) -> Sequence[Gradient | None]:
        x, gamma, shape, g = _sum_of(form, xs, node), ctx.array(_at(node, form.scale)), dims(node.inputs[0]), gs[0]
        found: list[Gradient | None] = [None] * len(node.inputs)
        through = None if form.total is None or form.total >= len(gs) else gs[form.total]
        if x is None or gamma is None or shape is None or (g is None and through is None):
            return found
        axes, y = _last_axes(node), node.outputs[0]
        dx = through
        if g is not None:
            over = group(x, shape, axes)
            s = standardize(x, over, attribute(node, "epsilon", form.epsilon), centre=form.centre)
            factor = gamma.astype(np.float64).reshape((1,) * (len(shape) - gamma.ndim) + gamma.shape)
            back = project(weighted(g, factor, axes), s, over, centre=form.centre)
            dx = back if dx is None else dx + back
            found[form.scale] = summed(ctx, product(g, s.y), y, gamma.shape, constant=True)
            if form.bias is not None and (bias := dims(_at(node, form.bias))) is not None:
                found[form.bias] = summed(ctx, g, y, bias, constant=True)
        found[0] = dx
        for k in form.addends:
            small = dims(_at(node, k))
            if small is not None and dx is not None:
                found[k] = summed(ctx, dx, y, small, constant=not ctx.varies(node.inputs[k]))
        return found

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        """|y| <= |gamma| sqrt(D) + |beta|: no element is larger than the norm of its row."""
        x = node.inputs[0]
        assert x is not None
        return (_unit_range(ctx, node, form, dims(x), _last_axes(node)),)

    def bound(
        ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
    ) -> Sequence[float | None]:
        """Towards what is normalised: max |gamma| / sqrt(eps), which the projections only lower."""
        most = _steepest(ctx, node, form)
        inputs = (0, *form.addends)
        plain = form.total is None or len(node.outputs) <= form.total
        return [most if k in inputs and plain else None for k in range(len(node.inputs))]

    def vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
        return _last_vjp(b, node, gs, form)

    return {"moments": moments, "pullback": pullback, "range": range_, "bound": bound, "vjp": vjp}


def _unit_range(
    ctx: Context, node: ir.Node, form: Form, shape: tuple[int, ...] | None, axes: tuple[int, ...]
) -> Range | None:
    gamma, beta = ctx.array(_at(node, form.scale)), ctx.array(_at(node, form.bias))
    if shape is None or gamma is None or (beta is None and _at(node, form.bias) is not None):
        return None
    one = (1,) * len(shape)
    reach = np.abs(gamma.astype(np.float64)) * math.sqrt(math.prod(shape[a] for a in axes)) * (1 + 1e-5) * np.ones(one)
    centre = np.zeros(one) if beta is None else beta.astype(np.float64)
    return Range(centre - reach, centre + reach)


def _steepest(ctx: Context, node: ir.Node, form: Form) -> float | None:
    gamma, eps = ctx.array(_at(node, form.scale)), attribute(node, "epsilon", form.epsilon)
    return None if gamma is None or eps <= 0 else float(np.abs(gamma).max()) / math.sqrt(eps)


def _last_vjp(b: Backward, node: ir.Node, gs: Values, form: Form) -> Values:
    """dx = rate (g gamma - mean(g gamma) - xhat mean(g gamma xhat)); dgamma = sum of g xhat; dbeta = sum of g.

    Mean and 1/sqrt(var + eps), where they are outputs, add their own: 1/D and -xhat rate^2 / D.
    """
    x, scale, bias = node.inputs[0], _at(node, form.scale), _at(node, form.bias)
    found: list[ir.Value | None] = [None] * len(node.inputs)
    assert x is not None
    assert scale is not None
    g, through = gs[0], gs[form.total] if form.total is not None and form.total < len(gs) else None
    axes, addends = _last_axes(node), [v for k in form.addends if (v := _at(node, k)) is not None]
    wants = b.wanted(x) or any(b.wanted(v) for v in addends)
    total, shape = x, x.shape
    for addend in addends:
        total = b.op("Add", total, addend)
        total.shape = shape
    y, rate = standardized(b, total, axes, attribute(node, "epsilon", form.epsilon), centre=form.centre)
    dx = through
    if g is not None:
        p = b.op("Mul", g, y) if wants or b.wanted(scale) else None
        if wants and p is not None:
            back = projected(b, b.op("Mul", g, scale), b.op("Mul", p, scale), y, rate, axes, centre=form.centre)
            dx = back if dx is None else b.op("Add", dx, back)
        if b.wanted(scale) and p is not None:
            found[form.scale] = b.unbroadcast(p, scale, node.outputs[0])
        if bias is not None and b.wanted(bias):
            assert form.bias is not None
            found[form.bias] = b.unbroadcast(g, bias, node.outputs[0])
    if wants and form.total is None:
        dx = _statistics_vjp(b, gs, dx, y, rate, axes)
    found[0] = dx
    for k in form.addends:
        v = _at(node, k)
        if v is not None and b.wanted(v) and dx is not None:
            found[k] = b.unbroadcast(dx, v, node.outputs[0])
    return found


def _statistics_vjp(
    b: Backward, gs: Values, dx: ir.Value | None, y: ir.Value, rate: ir.Value, axes: Sequence[int]
) -> ir.Value | None:
    """What the gradients of LayerNormalization's outputs Mean and InvStdDev add."""
    gm, gr = (*gs[1:], None, None)[:2]
    for g in (gm, gr):
        if g is None:
            continue
        share = b.op("Div", g, elements(b, y, rate))
        if g is gm:
            term = b.op("Expand", share, b.op("Shape", y, dtype=ir.DataType.INT64))
        else:
            term = b.op("Neg", b.op("Mul", y, b.op("Mul", share, b.op("Mul", rate, rate))))
        dx = term if dx is None else b.op("Add", dx, term)
    return dx


LAYER = Form(centre=True)
RMS = Form(centre=False, bias=None)
SKIP_LAYER = Form(centre=True, scale=2, bias=3, addends=(1, 4), total=3, epsilon=1e-12)
SKIP_RMS = Form(centre=False, scale=2, bias=None, addends=(1, 3), total=3, epsilon=1e-12)
for _op, _form in (
    ("LayerNormalization", LAYER),
    ("RMSNormalization", RMS),
    ("SimplifiedLayerNormalization", RMS),
    ("com.microsoft:SkipLayerNormalization", SKIP_LAYER),
    ("com.microsoft:SkipSimplifiedLayerNormalization", SKIP_RMS),
):
    row(_op, **_last_rows(_form))


# -- over positions and groups of channels: InstanceNormalization, GroupNormalization -----------------------------------


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


def group_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """max |gamma| / sqrt(eps)."""
    return (_steepest(ctx, node, LAYER), None, None)


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
    row(_op, moments=group_moments, range=group_range, pullback=group_pullback, bound=group_bound, vjp=group_vjp)
