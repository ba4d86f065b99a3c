"""Activation functions: all that is known about each stands in its row. z is the input, y the output, g that of y."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import attribute, constant_array, dims
from gradlint.quadrature import Piecewise, erf, indicator, pieces, spectrum
from gradlint.transfer import (
    ELEMENTWISE,
    Context,
    Pair,
    apply_moments,
    derivative,
    elementwise,
    logarithmic,
    product,
    summed,
)

Values = Sequence[ir.Value | None]
SELU_ALPHA, SELU_GAMMA = 1.6732632423543772, 1.0507009873554805


def sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * z))


def softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def where(b: Backward, condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    return b.op("Where", condition, yes, no, dtype=yes.dtype)


def gated(b: Backward, g: ir.Value, condition: ir.Value) -> ir.Value:
    """g where the condition holds, 0 elsewhere: by a product, which onnxruntime runs seven times as fast as Where."""
    return b.op("Mul", g, b.op("Cast", condition, to=g.dtype, dtype=g.dtype))


def beyond(b: Backward, v: ir.Value, threshold: float, compare: str = "Greater") -> ir.Value:
    return b.op(compare, v, b.scalar(threshold, v), dtype=ir.DataType.BOOL)


def ends_of(b: Backward, node: ir.Node, gs: Values) -> tuple[ir.Value, ir.Value, ir.Value]:
    """z, y, g of a function of one input."""
    z, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert z is not None
    assert g is not None
    return z, y, g


# -- Relu --------------------------------------------------------------------------------------------------------------


def relu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g [z > 0]; by the sign of y, so that z need not be kept."""
    _, y, g = ends_of(b, node, gs)
    return (gated(b, g, beyond(b, y, 0.0)),)


elementwise("Relu", lambda node: pieces((0.0,), (0.0, 1.0), (0.0, 0.0)), relu_vjp)


# -- LeakyRelu ---------------------------------------------------------------------------------------------------------


def leaky_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where z > 0, alpha g elsewhere; the sign of y tells that of z where alpha > 0."""
    z, y, g = ends_of(b, node, gs)
    alpha = attribute(node, "alpha", 0.01)
    positive = b.op("Cast", beyond(b, y if alpha > 0 else z, 0.0), to=g.dtype, dtype=g.dtype)
    slope = b.op("Add", b.op("Mul", positive, b.scalar(1 - alpha, g)), b.scalar(alpha, g))
    return (b.op("Mul", g, slope),)


elementwise("LeakyRelu", lambda node: pieces((0.0,), (attribute(node, "alpha", 0.01), 1.0), (0.0, 0.0)), leaky_vjp)


def prelu(node: ir.Node, *, average: bool = True) -> Pair:
    """The slope below 0 per unit; `average`: over positions (all axes but the channels') where it differs there."""
    slope = constant_array(node.inputs[1])
    if slope is None:
        return pieces((0.0,), (0.25, 1.0), (0.0, 0.0))  # the usual start
    shape = dims(node.inputs[0]) or ()
    below = slope.astype(np.float64)
    if average and len(shape) > 3 and below.ndim >= 3:
        below = below.mean(axis=tuple(range(below.ndim - len(shape) + 2, below.ndim)), keepdims=True)
    return pieces((0.0,), (below if below.size > 1 else float(below.reshape(-1)[0]), 1.0), (0.0, 0.0))


def prelu_slope(ctx: Context, node: ir.Node, x: Moments, g: Gradient) -> Sequence[Gradient | None]:
    """E[dslope^2]: the sum over positions of g z where z < 0."""
    target = dims(node.inputs[1])
    negative = apply_moments(pieces((0.0,), (1.0, 0.0), (0.0, 0.0))[0], x, kinked=True)
    if target is None:
        return (None,)
    return (summed(ctx, product(g, negative), node.outputs[0], target, constant=not ctx.varies(node.inputs[1])),)


def prelu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where z > 0, slope g elsewhere; dslope = g min(z, 0), summed."""
    z, y, g = ends_of(b, node, gs)
    slope = node.inputs[1]
    assert slope is not None
    positive = beyond(b, z, 0.0)
    dz = where(b, positive, g, b.op("Mul", g, slope)) if b.wanted(z) else None
    if not b.wanted(slope):
        return dz, None
    return dz, b.unbroadcast(b.op("Mul", g, b.op("Min", z, b.scalar(0.0, z))), slope, y)


elementwise("PRelu", prelu, prelu_vjp, others=prelu_slope, exact=lambda node: prelu(node, average=False))


# -- Elu, Selu, Celu ---------------------------------------------------------------------------------------------------


def _exponential_unit(scale: float, depth: float, width: float) -> Pair:
    """scale z for z > 0, scale * depth * (exp(z / width) - 1) below."""

    def f(z: Array) -> Array:
        return scale * np.where(z > 0, z, depth * np.expm1(np.minimum(z, 0) / width))

    def df(z: Array) -> Array:
        return scale * np.where(z > 0, 1.0, depth / width * np.exp(np.minimum(z, 0) / width))

    return f, df


def _exponential_vjp(b: Backward, node: ir.Node, gs: Values, scale: float, depth: float, width: float) -> Values:
    """dz = scale g where z > 0; elsewhere g (y + scale depth) / width."""
    z, y, g = ends_of(b, node, gs)
    below = b.op("Add", y, b.scalar(scale * depth, y))
    below = below if width == 1 else b.op("Mul", below, b.scalar(1 / width, y))
    return (b.op("Mul", g, where(b, beyond(b, z, 0.0), b.scalar(scale, g), below)),)


def _elu(node: ir.Node) -> tuple[float, float, float]:
    return 1.0, attribute(node, "alpha", 1.0), 1.0


def _selu(node: ir.Node) -> tuple[float, float, float]:
    return attribute(node, "gamma", SELU_GAMMA), attribute(node, "alpha", SELU_ALPHA), 1.0


def _celu(node: ir.Node) -> tuple[float, float, float]:
    alpha = attribute(node, "alpha", 1.0)
    return 1.0, alpha, alpha


for _op, _constants in (("Elu", _elu), ("Selu", _selu), ("Celu", _celu)):
    elementwise(
        _op,
        lambda node, constants=_constants: _exponential_unit(*constants(node)),  # type: ignore[misc]
        lambda b, node, gs, constants=_constants: _exponential_vjp(b, node, gs, *constants(node)),  # type: ignore[misc]
        kinked=True,
        critical=lambda node: (0.0, 1e-300),
    )


# -- Sigmoid, Tanh, Erf ------------------------------------------------------------------------------------------------


def sigmoid_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g y (1 - y)."""
    _, y, g = ends_of(b, node, gs)
    return (b.op("Mul", g, b.op("Mul", y, b.op("Sub", b.scalar(1.0, y), y))),)


elementwise(
    "Sigmoid",
    lambda node: (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    sigmoid_vjp,
    critical=lambda node: (0.0,),
)


def tanh_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g (1 - y^2)."""
    _, y, g = ends_of(b, node, gs)
    return (b.op("Mul", g, b.op("Sub", b.scalar(1.0, y), b.op("Mul", y, y))),)


elementwise("Tanh", lambda node: (np.tanh, lambda z: 1 - np.tanh(z) ** 2), tanh_vjp, critical=lambda node: (0.0,))


def _bell(z: Array) -> Array:
    """exp(-z^2)."""
    return np.exp(-np.square(np.clip(z, -27.0, 27.0)))


def erf_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g 2 / sqrt(pi) exp(-z^2)."""
    z, _, g = ends_of(b, node, gs)
    slope = b.op("Exp", b.op("Sub", b.scalar(math.log(2 / math.sqrt(math.pi)), z), b.op("Mul", z, z)))
    return (b.op("Mul", g, slope),)


elementwise(
    "Erf", lambda node: (erf, lambda z: 2 / math.sqrt(math.pi) * _bell(z)), erf_vjp, critical=lambda node: (0.0,)
)


# -- HardSigmoid, Clip -------------------------------------------------------------------------------------------------


def _hard_sigmoid(node: ir.Node) -> tuple[float, float]:
    return attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)


def _clipped(lo: float, hi: float, slope: float = 1.0, offset: float = 0.0) -> Pair:
    """slope z + offset, kept within [lo, hi]; slope 0 is a constant."""
    if slope == 0 or lo >= hi:
        return pieces((), (0.0,), (max(lo, min(hi, offset)) if lo < hi else hi,))
    ends = [(lo, (lo - offset) / slope), (hi, (hi - offset) / slope)]
    ends = sorted((e for e in ends if math.isfinite(e[0])), key=lambda e: e[1])
    breaks = [c for _, c in ends]
    slopes, offsets = [slope], [offset]
    for value, _ in ends:
        first = value == (lo if slope > 0 else hi)
        at = 0 if first else len(slopes)
        slopes.insert(at, 0.0)
        offsets.insert(at, value)
    return pieces(breaks, slopes, offsets)


def _inside(b: Backward, y: ir.Value, lo: ir.Value | None, hi: ir.Value | None) -> ir.Value | None:
    """lo < y < hi."""
    over = None if lo is None else b.op("Greater", y, lo, dtype=ir.DataType.BOOL)
    under = None if hi is None else b.op("Less", y, hi, dtype=ir.DataType.BOOL)
    return b.op("And", over, under, dtype=ir.DataType.BOOL) if over is not None and under is not None else over or under


def hard_sigmoid_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = alpha g where 0 < y < 1."""
    _, y, g = ends_of(b, node, gs)
    inside = _inside(b, y, b.scalar(0.0, y), b.scalar(1.0, y))
    assert inside is not None
    return (b.op("Mul", gated(b, g, inside), b.scalar(attribute(node, "alpha", 0.2), g)),)


elementwise("HardSigmoid", lambda node: _clipped(0.0, 1.0, *_hard_sigmoid(node)), hard_sigmoid_vjp)


def _limits(node: ir.Node) -> tuple[float, float]:
    found = [-math.inf, math.inf]
    for k, value in enumerate(node.inputs[1:3]):
        array = constant_array(value)
        if array is not None:
            found[k] = float(array.reshape(-1)[0])
    return found[0], found[1]


def clip_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where min < y < max (nothing flows at the limits); a limit takes g where it is what comes out."""
    x, y, g = ends_of(b, node, gs)
    lo, hi = (node.inputs[k] if k < len(node.inputs) else None for k in (1, 2))
    inside = _inside(b, y, lo, hi)
    dlo = dhi = None
    if lo is not None and b.wanted(lo):
        below = b.op("Less", x, lo, dtype=ir.DataType.BOOL)
        if hi is not None:  # where min > max, max comes out
            below = b.op("And", below, b.op("LessOrEqual", lo, hi, dtype=ir.DataType.BOOL))
        dlo = b.op("ReduceSum", gated(b, g, below), keepdims=0)
    if hi is not None and b.wanted(hi):
        over = b.op("Greater", x if lo is None else b.op("Max", x, lo), hi, dtype=ir.DataType.BOOL)
        dhi = b.op("ReduceSum", gated(b, g, over), keepdims=0)
    return (g if inside is None else gated(b, g, inside), dlo, dhi)[: len(node.inputs)]


elementwise("Clip", lambda node: _clipped(*_limits(node)), clip_vjp)


# -- ThresholdedRelu, Shrink -------------------------------------------------------------------------------------------


def thresholded_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g [z > alpha]."""
    z, _, g = ends_of(b, node, gs)
    return (gated(b, g, beyond(b, z, attribute(node, "alpha", 1.0))),)


elementwise(
    "ThresholdedRelu",
    lambda node: pieces((attribute(node, "alpha", 1.0),), (0.0, 1.0), (0.0, 0.0)),
    thresholded_vjp,
)


def _shrink(node: ir.Node) -> Pair:
    lambd, bias = attribute(node, "lambd", 0.5), attribute(node, "bias", 0.0)
    return pieces((-lambd, lambd), (1.0, 0.0, 1.0), (bias, 0.0, -bias))


def shrink_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where |z| > lambd."""
    z, _, g = ends_of(b, node, gs)
    return (gated(b, g, beyond(b, b.op("Abs", z), attribute(node, "lambd", 0.5))),)


elementwise("Shrink", _shrink, shrink_vjp)


# -- Softplus, Softsign ------------------------------------------------------------------------------------------------


def softplus_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g sigmoid(z)."""
    z, _, g = ends_of(b, node, gs)
    return (b.op("Mul", g, b.op("Sigmoid", z)),)


elementwise("Softplus", lambda node: (softplus, sigmoid), softplus_vjp)


def _softsign(z: Array) -> Array:
    return np.sign(z) * (1 - 1 / (1 + np.abs(z)))


def softsign_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g / (1 + |z|)^2 = g (1 - |y|)^2."""
    _, y, g = ends_of(b, node, gs)
    rest = b.op("Sub", b.scalar(1.0, y), b.op("Abs", y))
    return (b.op("Mul", g, b.op("Mul", rest, rest)),)


elementwise(
    "Softsign",
    lambda node: (_softsign, lambda z: 1 / (1 + np.abs(z)) ** 2),
    softsign_vjp,
    kinked=True,
    critical=lambda node: (0.0,),
)


# -- how much of a layer is flat ---------------------------------------------------------------------------------------

FLAT = 0.05  # of the largest slope: below it a unit counts as saturated
LOST = 1e-7  # a slope under this is as good as none


def saturated_share(op: str, node: ir.Node, z: Moments) -> Array:
    """P(|f'(z)| < 5 % of sup |f'|) per unit, z ~ N(mean, var) the input's moments; 0 where f' has no bound."""
    top = derivative(op, node)[2]
    if top is None:
        return np.zeros(np.broadcast(z.mean, z.var).shape)
    return _share(op, node, z, "saturated", lambda slope: np.abs(slope) < FLAT * top)


def lost_share(op: str, node: ir.Node, z: Moments) -> Array:
    """P(|f'(z)| < 1e-7) per unit, z ~ N(mean, var) the input's moments: in float32 the slope is gone."""
    return _share(op, node, z, "lost", lambda slope: np.abs(slope) < LOST)


def active_share(op: str, node: ir.Node, z: Moments) -> Array:
    """P(f'(z) != 0) per unit, z ~ N(mean, var) the input's moments."""
    return _share(op, node, z, "active", lambda slope: slope != 0)


_ZONES: dict[tuple[str, ...], Piecewise] = {}  # found once for all nodes of the same function


def _share(op: str, node: ir.Node, z: Moments, kind: str, chosen: Callable[[Array], Any]) -> Array:
    """P(chosen(f'(z))) per unit; `kind` names `chosen`, which is the same for all nodes of one function."""
    rule = ELEMENTWISE[op]
    df = rule.functions(node)[1]
    if rule.positive:
        z = logarithmic(z)
    if isinstance(df, Piecewise):
        flags = Piecewise(df.breaks, df.slopes, tuple(np.asarray(chosen(np.asarray(v)), float) for v in df.offsets))
    else:
        key = (op, kind, *(f"{name}={a.value}" for name, a in sorted(node.attributes.items())))
        if key not in _ZONES or len(node.inputs) > 1:
            _ZONES[key] = indicator(lambda u: chosen(df(np.exp(u) if rule.positive else u)))
        flags = _ZONES[key]
    with np.errstate(all="ignore"):  # far out slopes overflow
        return spectrum(flags, z.mean, z.var, kinked=True).mean
