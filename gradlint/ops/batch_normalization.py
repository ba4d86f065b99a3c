"""BatchNormalization, by running statistics or by those of the batch.

A node with training_mode = 1 and momentum = 0 hands out the batch's own mean and (biased) variance as outputs 1 and 2:
the backward pass reads them instead of computing them again. `to_train_mode` brings nodes into that form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.standardization import Group, Standardized, elements, group, project, standardize
from gradlint.transfer import Context, product, row, summed

Values = Sequence[ir.Value | None]
OP = "BatchNormalization"


def _count(node: ir.Node) -> int | None:
    """Values per channel."""
    shape = dims(node.inputs[0])
    return None if shape is None or len(shape) < 2 else math.prod(shape) // max(1, shape[1])


def to_train_mode(graph: ir.Graph) -> tuple[str, ...]:
    """Let every BatchNormalization normalise by its batch, in place.

    Returns the names of the nodes left with running statistics because they see fewer than 2 values per channel.
    """
    left = []
    serial = 0
    for node in list(graph.all_nodes()):
        if node.op_type != OP or node.domain not in ("", "ai.onnx"):
            continue
        count = _count(node)
        if count is not None and count < 2:
            node.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
            node.resize_outputs(1)
            left.append(str(node.name))
            continue
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            continue  # an exported training graph whose updated statistics are read: its momentum must stay
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
        node.attributes["momentum"] = ir.AttrFloat32("momentum", 0.0)
        node.resize_outputs(3)
        for k, suffix in ((1, "mean"), (2, "var")):
            output, statistic = node.outputs[k], node.inputs[k + 2]
            assert statistic is not None
            output.name, output.shape, output.type = f"{node.name}.batch_{suffix}", statistic.shape, statistic.type
            node.replace_input_with(k + 2, _own_statistic(node, statistic, suffix, serial))
        serial += 1
    return tuple(left)


def _own_statistic(node: ir.Node, like: ir.Value, suffix: str, serial: int) -> ir.Value:
    """A constant that stands for a running statistic nothing reads (momentum 0).

    onnxruntime writes the batch's statistic over its buffer, and merges equal initializers before that: two layers, or
    a layer's running mean and its bias, would overwrite each other. So each gets numbers no other constant has.
    """
    assert node.graph is not None
    size = dims(like) or (1,)
    array = np.full(size, (1 if suffix == "mean" else 2) * 1e6 + serial, np.float32)
    name = f"{node.name}.batch_{suffix}.buffer"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=like.shape, type=like.type)
    node.graph.register_initializer(value)
    return value


def _trains(node: ir.Node, mode: str) -> bool:
    count = _count(node)
    return bool(attribute(node, "training_mode", 0)) or (mode == "train" and (count is None or count >= 2))


# -- the gradient ------------------------------------------------------------------------------------------------------


def _axes(node: ir.Node) -> list[int]:
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    return [0, *range(2, len(x.shape))]


def batch_statistics(b: Backward, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Mean and biased variance per channel: the node's own outputs where they are the batch's, else in two passes."""
    if attribute(node, "momentum", 0.9) == 0 and len(node.outputs) == 3:
        return node.outputs[1], node.outputs[2]
    axes = b.constant(_axes(node))
    mean = b.op("ReduceMean", node.inputs[0], axes, keepdims=1)
    centred = b.op("Sub", node.inputs[0], mean)
    var = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=0)
    return b.op("ReduceMean", node.inputs[0], axes, keepdims=0), var


def _filled(b: Backward, number: float, like: ir.Value) -> ir.Value:
    """A vector of equal numbers, as long as `like`."""
    shape = dims(like)
    if shape is None:
        return b.op("Expand", b.scalar(number, like), b.shape(like))
    assert like.dtype is not None
    return b.constant(np.full(shape, number), like.dtype.numpy())


def _affine(
    b: Backward, x: ir.Value, scale: ir.Value, shift: ir.Value, mean: ir.Value, var: ir.Value, eps: float
) -> ir.Value:
    """(x - mean) / sqrt(var + eps) * scale + shift per channel: one pass in the operator's own kernel."""
    return b.op(OP, x, scale, shift, mean, var, epsilon=eps)


def batch_normalization_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """By running statistics dx = g gamma rate, dgamma = sum of g xhat, dbeta = sum of g, with rate = 1/sqrt(var + eps).

    By batch statistics over n values per channel
        dx = gamma rate (g - mean(g) - xhat mean(g xhat))
    whose last two terms are one affine map of x per channel.
    """
    x, scale, _, mean, var = node.inputs[:5]
    assert x is not None
    assert scale is not None
    assert mean is not None
    assert var is not None
    g = gs[0]
    if attribute(node, "training_mode", 0):
        return _by_batch(b, node, gs, x, scale, mean, var)
    if g is None:
        return (None,) * 5
    eps = attribute(node, "epsilon", 1e-5)
    zeros = _filled(b, 0.0, scale)
    dx = _affine(b, g, scale, zeros, zeros, var, eps) if b.wanted(x) else None
    wants = [b.wanted(v) for v in node.inputs[1:5]]
    if not any(wants):
        return (dx,)
    total, along = _sums(b, node, g, x, mean, var, wants[0] or wants[3])
    rate = _rate(b, var, eps)
    dmean = b.op("Neg", b.op("Mul", total, b.op("Mul", scale, rate))) if wants[2] else None
    dvar = None
    if wants[3]:
        half = b.op("Mul", b.op("Mul", rate, rate), b.scalar(-0.5, rate))
        dvar = b.op("Mul", b.op("Mul", along, scale), half)
    return dx, along, total, dmean, dvar


def _rate(b: Backward, var: ir.Value, eps: float) -> ir.Value:
    return b.op("Reciprocal", b.op("Sqrt", b.op("Add", var, b.scalar(eps, var))))


def _sums(
    b: Backward, node: ir.Node, g: ir.Value, x: ir.Value, mean: ir.Value, var: ir.Value, both: bool
) -> tuple[ir.Value, ir.Value | None]:
    """Per channel: sum of g, and sum of g xhat = rate (sum of g x - mean sum of g) without a pass for xhat."""
    axes = _axes(node)
    total = b.sum_over(g, axes)
    if not both:
        return total, None
    products = b.sum_over(b.op("Mul", g, x), axes)
    rate = _rate(b, var, attribute(node, "epsilon", 1e-5))
    return total, b.op("Mul", b.op("Sub", products, b.op("Mul", mean, total)), rate)


def _by_batch(
    b: Backward, node: ir.Node, gs: Values, x: ir.Value, scale: ir.Value, mean: ir.Value, var: ir.Value
) -> Values:
    """Where the updated running statistics (outputs 1, 2) have gradients too, those enter the affine map of x."""
    g, gm, gv = (*gs, None, None)[:3]
    eps, momentum = attribute(node, "epsilon", 1e-5), attribute(node, "momentum", 0.9)
    batch_mean, batch_var = batch_statistics(b, node)
    rate = _rate(b, batch_var, eps)
    count = _count(node)
    n = elements(b, x, rate) if count is None else b.scalar(float(count), rate)
    dx = dscale = dbias = None
    slope = shift = _filled(b, 0.0, scale)
    if g is not None:
        dbias, along = _sums(b, node, g, x, batch_mean, batch_var, b.wanted(x) or b.wanted(scale))
        dscale = along
        if along is not None and b.wanted(x):
            gain = b.op("Mul", scale, rate)
            part = b.op("Neg", b.op("Div", gain, n))
            slope, shift = b.op("Mul", part, along), b.op("Mul", part, dbias)
            zeros, ones = _filled(b, 0.0, scale), _filled(b, 1.0, scale)
            dx = _affine(b, g, gain, zeros, zeros, ones, 0.0)
    if gm is not None:
        shift = b.op("Add", shift, b.op("Mul", gm, b.op("Div", b.scalar(1 - momentum, gm), n)))
    if gv is not None:
        shifted = b.op("Mul", gv, b.op("Div", b.scalar(2 * (1 - momentum), gv), n))
        slope = b.op("Add", slope, b.op("Div", shifted, rate))
    if b.wanted(x):
        rest = _affine(b, x, slope, shift, batch_mean, batch_var, eps)
        dx = rest if dx is None else b.op("Add", dx, rest)
    carried = [None if v is None else b.op("Mul", v, b.scalar(momentum, v)) for v in (gm, gv)]
    return (dx, dscale, dbias, *carried)


# -- estimates ---------------------------------------------------------------------------------------------------------


def _channel(ctx: Context, node: ir.Node, index: int) -> Array | None:
    """A per-channel vector, shaped to broadcast against x."""
    array, shape = ctx.array(node.inputs[index]), dims(node.inputs[0])
    if array is None or shape is None:
        return None
    return array.astype(np.float64).reshape([-1 if k == 1 else 1 for k in range(len(shape))])


def _batch_group(ctx: Context, node: ir.Node, x: Moments) -> Group | None:
    """One channel over the whole batch."""
    shape = dims(node.inputs[0])
    return None if shape is None else group(x, shape, tuple(_axes(node)), min(ctx.batch, shape[0]))


def _standard(ctx: Context, node: ir.Node, x: Moments | None) -> tuple[Standardized, Group | None] | None:
    """xhat; the group is None where running statistics are used."""
    eps = attribute(node, "epsilon", 1e-5)
    if x is None:
        return None
    if _trains(node, ctx.mode):
        over = _batch_group(ctx, node, x)
        return None if over is None else (standardize(x, over, eps), over)
    mean, var = _channel(ctx, node, 3), _channel(ctx, node, 4)
    if mean is None or var is None:
        return None
    x, rate = _as_recorded(node, x, mean, var), 1 / (var + eps)
    return Standardized(x.scaled(np.sqrt(rate), -mean * np.sqrt(rate)), rate), None


_DISAGREEMENT = 4.0  # between a recorded and an estimated variance of the same data


def _as_recorded(node: ir.Node, x: Moments, mean: Array, var: Array) -> Moments:
    """Moments of x, by running statistics where these are records of it: mean and variance per channel are theirs.

    They say nothing while no batch has been seen (0 and 1), or of other data (a model's own inputs are as assumed; a
    variance several times larger or smaller is no error of the estimate).
    """
    source = node.inputs[0]
    given = source is None or source.is_graph_input()
    fresh = not mean.any() and bool((var == 1).all())
    seen = float(np.mean(np.square(x.mean - mean) + x.var)) / max(float(np.mean(var)), 1e-300)
    if fresh or x.var.min() <= 0 or given or not 1 / _DISAGREEMENT < seen < _DISAGREEMENT:
        return x
    scale = np.sqrt(np.maximum(var, 0) / x.var)
    return x.scaled(scale, mean - x.mean * scale)


def batch_normalization_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """By running statistics an affine map; by batch statistics mean beta and variance gamma^2 per channel."""
    none = (None,) * (len(node.outputs) - 1)
    found, scale, bias = _standard(ctx, node, xs[0]), _channel(ctx, node, 1), _channel(ctx, node, 2)
    if found is None or scale is None or bias is None:
        return (None, *none)
    return (found[0].y.scaled(scale, bias), *_statistics_moments(xs[0], found[1])[: len(none)])


def _statistics_moments(x: Moments | None, over: Group | None) -> tuple[Moments | None, Moments | None]:
    """Mean and biased variance of a batch; of the former also its variance over batches."""
    if x is None or over is None:
        return None, None

    def average(array: Array) -> Array:
        return array.mean(axis=over.axes, keepdims=True)

    mean, second = average(x.mean), average(x.second)
    noise = average(x.shared) / over.shared + average(x.local) / over.local
    var = second - mean**2 - noise
    zero = np.zeros(1)
    return Moments(mean.ravel(), zero, noise.ravel(), zero), Moments.constant(var.ravel())


def batch_normalization_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """q gamma^2 / (var + eps); by batch statistics without the two directions. A gradient that is the same at every
    position (behind global pooling) loses its mean over the examples, 1/B of it."""
    found, scale, g = _standard(ctx, node, xs[0]), _channel(ctx, node, 1), gs[0]
    shape = dims(node.inputs[0])
    if found is None or scale is None or g is None or shape is None:
        return (None,) * len(node.inputs)
    s, over = found
    weighted = g.scaled(scale**2)
    if weighted.upper is not None:
        weighted = replace(weighted, upper=np.where(scale < 0, 2 * weighted.total - weighted.upper, weighted.upper))
    dx = weighted.scaled(s.rate) if over is None else project(weighted, s, over)
    small = tuple(n if k == 1 else 1 for k, n in enumerate(shape))
    y = node.outputs[0]

    def per_channel(q: Gradient) -> Gradient:
        return summed(ctx, q, y, small, constant=True).map(lambda a: a.reshape(-1))

    return (dx, per_channel(product(g, s.y, along=1.0)), per_channel(g), None, None)


def _gain(ctx: Context, node: ir.Node) -> tuple[Array, Array] | None:
    """Running statistics as one affine map: factor and shift per channel."""
    if _trains(node, ctx.mode):
        return None
    found = [_channel(ctx, node, k) for k in range(1, 5)]
    scale, bias, mean, var = found
    if scale is None or bias is None or mean is None or var is None:
        return None
    factor = scale / np.sqrt(var + attribute(node, "epsilon", 1e-5))
    return factor, bias - mean * factor


def batch_normalization_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Only by running statistics: what a batch does to one of its elements is bounded by no interval of use."""
    affine, x = _gain(ctx, node), xs[0]
    if affine is None or x is None:
        return (None,)
    factor, shift = affine
    one, other = x.lo * factor + shift, x.hi * factor + shift
    slack = 1e-6 * (np.maximum(np.abs(x.lo), np.abs(x.hi)) * np.abs(factor) + np.abs(shift))
    return (Range(np.minimum(one, other) - slack, np.maximum(one, other) + slack),)


def batch_normalization_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """max |gamma| / sqrt(running_var + eps)."""
    affine = _gain(ctx, node)
    return (None if affine is None else float(np.abs(affine[0]).max()), None, None, None, None)


row(
    OP,
    moments=batch_normalization_moments,
    range=batch_normalization_range,
    pullback=batch_normalization_pullback,
    bound=batch_normalization_bound,
    vjp=batch_normalization_vjp,
)
