"""Activations that gate their own input, y = z s(z): Swish, Mish, Gelu and their hard, fast and biased forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.activation import Values, beyond, ends_of, sigmoid, softplus, where
from gradlint.quadrature import density, erf
from gradlint.transfer import (
    BOUND,
    Context,
    Elementwise,
    Pair,
    apply_moments,
    apply_pullback,
    elementwise,
    extremes,
    row,
    summed,
)

# -- HardSwish, Swish, Mish --------------------------------------------------------------------------------------------


def _hard_swish(z: Array) -> Array:
    return np.where(z > 3, z, np.where(z < -3, 0.0, np.clip(z, -3, 3) * (np.clip(z, -3, 3) + 3) / 6))


def _hard_swish_slope(z: Array) -> Array:
    return np.where(z > 3, 1.0, np.where(z < -3, 0.0, np.clip(z, -3, 3) / 3 + 0.5))


def hard_swish_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g (z / 3 + 1/2) for |z| < 3, g above, 0 below."""
    z, _, g = ends_of(b, node, gs)
    slope = b.op("Add", b.op("Mul", z, b.scalar(1 / 3, z)), b.scalar(0.5, z))
    slope = where(b, beyond(b, z, 3.0), b.scalar(1.0, z), slope)
    return (b.op("Mul", g, where(b, beyond(b, z, -3.0), slope, b.scalar(0.0, z))),)


elementwise(
    "HardSwish",
    lambda node: (_hard_swish, _hard_swish_slope),
    hard_swish_vjp,
    kinked=True,
    critical=lambda node: (-3.0, -1.5, 3.0),
)


def _swish(alpha: float) -> Pair:
    def f(z: Array) -> Array:
        gate = sigmoid(alpha * z)
        return np.where(gate > 0, z, 0.0) * gate

    def df(z: Array) -> Array:
        gate, bounded = sigmoid(alpha * z), np.clip(alpha * z, -700, 700)
        return gate * (1 + bounded * sigmoid(-bounded))

    return f, df


def _swish_turns(alpha: float) -> Sequence[float]:
    """Where f' is 0 (alpha z = -1.2784645) and where it is steepest (2.3993573): roots of f' and of f''."""
    return (-1.2784645427610738 / alpha, 2.3993572805154416 / alpha, -2.3993572805154416 / alpha) if alpha else ()


def _swish_vjp(b: Backward, z: ir.Value, g: ir.Value, alpha: float) -> ir.Value:
    """g s (1 + alpha z (1 - s)), s = sigmoid(alpha z)."""
    scaled = z if alpha == 1 else b.op("Mul", z, b.scalar(alpha, z))
    gate = b.op("Sigmoid", scaled)
    slope = b.op("Mul", scaled, b.op("Sub", b.scalar(1.0, z), gate))
    return b.op("Mul", b.op("Mul", g, gate), b.op("Add", slope, b.scalar(1.0, z)))


def swish_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    z, _, g = ends_of(b, node, gs)
    return (_swish_vjp(b, z, g, _swish_alpha(node)),)


def _swish_alpha(node: ir.Node) -> float:
    return attribute(node, "alpha", 1.702 if node.domain else 1.0)


for _op in ("Swish", "com.microsoft:QuickGelu"):
    elementwise(
        _op,
        lambda node: _swish(_swish_alpha(node)),
        swish_vjp,
        critical=lambda node: _swish_turns(_swish_alpha(node)),
    )


def _mish(z: Array) -> Array:
    gate = np.tanh(softplus(z))
    return np.where(gate > 0, z, 0.0) * gate


def _mish_slope(z: Array) -> Array:
    z = np.clip(z, -700, 700)
    t = np.tanh(softplus(z))
    return t + z * (1 - t**2) * sigmoid(z)


def mish_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g (t + z (1 - t^2) sigmoid(z)), t = tanh(softplus(z))."""
    z, _, g = ends_of(b, node, gs)
    t = b.op("Tanh", b.op("Softplus", z))
    rest = b.op("Mul", b.op("Mul", z, b.op("Sigmoid", z)), b.op("Sub", b.scalar(1.0, z), b.op("Mul", t, t)))
    return (b.op("Mul", g, b.op("Add", t, rest)),)


elementwise(
    "Mish",
    lambda node: (_mish, _mish_slope),
    mish_vjp,
    critical=lambda node: (-1.1924319, 1.4905863, -2.2559849),
)


# -- Gelu --------------------------------------------------------------------------------------------------------------

_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu(z: Array) -> Array:
    share = 0.5 * (1 + erf(z * math.sqrt(0.5)))
    return np.where(share > 0, z, 0.0) * share


def _gelu_slope(z: Array) -> Array:
    return 0.5 * (1 + erf(z * math.sqrt(0.5))) + np.clip(z, -40, 40) * density(z)


def _gelu_tanh(z: Array) -> Array:
    share = 0.5 * (1 + np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3)))
    return np.where(share > 0, z, 0.0) * share


def _gelu_tanh_slope(z: Array) -> Array:
    z = np.clip(z, -40, 40)
    t = np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * z**2)


def gelu_functions(node: ir.Node) -> Pair:
    if attribute(node, "approximate", "none") == "tanh" or node.op_type == "FastGelu":
        return _gelu_tanh, _gelu_tanh_slope
    return _gelu, _gelu_slope


def gelu_turns(node: ir.Node) -> Sequence[float]:
    """Minimum of f, and where f' is steepest (z = +-sqrt(2) for the exact form)."""
    return (-0.7517916, math.sqrt(2), -math.sqrt(2), -0.7524614, 1.4185512, -1.4185512)


def gelu_gradient(b: Backward, node: ir.Node, z: ir.Value, g: ir.Value) -> ir.Value:
    """g (Phi(z) + z phi(z)), with a = z / sqrt(2): g (1/2 + erf(a) / 2 + a exp(-a^2) / sqrt(pi)); or its tanh form."""
    half, one = b.scalar(0.5, z), b.scalar(1.0, z)
    if gelu_functions(node)[0] is _gelu_tanh:
        square = b.op("Mul", z, z)
        cube = b.op("Add", b.op("Mul", square, b.scalar(_TANH_SCALE * _TANH_CUBE, z)), b.scalar(_TANH_SCALE, z))
        t = b.op("Tanh", b.op("Mul", z, cube))
        inner = b.op("Add", b.op("Mul", square, b.scalar(3 * _TANH_SCALE * _TANH_CUBE, z)), b.scalar(_TANH_SCALE, z))
        bend = b.op("Mul", b.op("Mul", z, inner), b.op("Sub", one, t))
        slope = b.op("Mul", b.op("Add", t, one), b.op("Add", bend, one))
        return b.op("Mul", g, b.op("Mul", slope, half))
    a = b.op("Mul", z, b.scalar(math.sqrt(0.5), z))
    bell = b.op("Exp", b.op("Sub", b.scalar(-0.5 * math.log(math.pi), z), b.op("Mul", a, a)))  # exp(-a^2) / sqrt(pi)
    bend = b.op("Mul", a, bell)
    share = b.op("Add", b.op("Mul", b.op("Erf", a), half), half)
    return b.op("Mul", g, b.op("Add", share, bend))


def gelu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    z, _, g = ends_of(b, node, gs)
    return (gelu_gradient(b, node, z, g),)


for _op in ("Gelu", "com.microsoft:Gelu"):
    elementwise(_op, gelu_functions, gelu_vjp, critical=gelu_turns)


# -- Gelu of input + bias ----------------------------------------------------------------------------------------------


def _shift(ctx: Context, node: ir.Node) -> Array:
    """The bias along the last axis; zero where there is none."""
    array = ctx.array(node.inputs[1]) if len(node.inputs) > 1 else None
    return np.zeros(1) if array is None else array.astype(np.float64)


def biased_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    if xs[0] is None:
        return (None,)
    return (apply_moments(gelu_functions(node)[0], xs[0].scaled(1.0, _shift(ctx, node)), kinked=False),)


def biased_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    x, g = xs[0], gs[0]
    if x is None or g is None:
        return (None,) * len(node.inputs)
    dz = apply_pullback(gelu_functions(node)[1], x.scaled(1.0, _shift(ctx, node)), g, kinked=False)
    target = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    bias = () if target is None else (summed(ctx, dz, node.outputs[0], target, constant=True),)
    if x.mean.shape[-1] == 1:
        dz = dz.map(lambda a: a.mean(axis=-1, keepdims=True))
    return dz, *bias


def biased_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    if xs[0] is None:
        return (None,)
    bias = _shift(ctx, node)
    lo, hi = np.broadcast_arrays(xs[0].lo + bias, xs[0].hi + bias)
    rule = Elementwise(gelu_functions, critical=gelu_turns)
    return (Range(*extremes(rule, node, gelu_functions(node)[0], lo, hi)),)


def biased_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return BOUND["Gelu"](ctx, node, (None,), ys)


def biased_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    z, _, g = ends_of(b, node, gs)
    bias = node.inputs[1] if len(node.inputs) > 1 else None
    if bias is None:
        return (gelu_gradient(b, node, z, g),)
    dz = gelu_gradient(b, node, b.op("Add", z, bias), g)
    return dz, b.unbroadcast(dz, bias, z) if b.wanted(bias) else None


for _op in ("com.microsoft:BiasGelu", "com.microsoft:FastGelu"):
    row(
        _op,
        moments=biased_moments,
        range=biased_range,
        pullback=biased_pullback,
        bound=biased_bound,
        vjp=biased_vjp,
    )
