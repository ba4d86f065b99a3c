"""Activation functions: all that is known about each stands in its row. z is the input, y the output, g its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array
from gradlint.graph import attribute, constant_array
from gradlint.quadrature import density, erf, pieces
from gradlint.transfer import Pair, elementwise

Values = Sequence[ir.Value | None]
SELU_ALPHA, SELU_GAMMA = 1.6732632423543772, 1.0507009873554805


def sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * z))


def softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def _where(b: Backward, condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    return b.op("Where", condition, yes, no, dtype=yes.dtype)


def _beyond(b: Backward, v: ir.Value, threshold: float, compare: str = "Greater") -> ir.Value:
    return b.op(compare, v, b.scalar(threshold, v), dtype=ir.DataType.BOOL)


def _ends(b: Backward, node: ir.Node, gs: Values) -> tuple[ir.Value, ir.Value, ir.Value]:
    """z, y, g of a function of one input."""
    z, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert z is not None
    assert g is not None
    return z, y, g


# -- Relu --------------------------------------------------------------------------------------------------------------


def relu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g [z > 0]; by the sign of y, so that z need not be kept."""
    _, y, g = _ends(b, node, gs)
    return (_where(b, _beyond(b, y, 0.0), g, b.scalar(0.0, g)),)


elementwise("Relu", lambda node: pieces((0.0,), (0.0, 1.0), (0.0, 0.0)), relu_vjp)


# -- LeakyRelu ---------------------------------------------------------------------------------------------------------


def leaky_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where z > 0, alpha g elsewhere; the sign of y tells that of z where alpha > 0."""
    z, y, g = _ends(b, node, gs)
    alpha = attribute(node, "alpha", 0.01)
    positive = _beyond(b, y if alpha > 0 else z, 0.0)
    return (b.op("Mul", g, _where(b, positive, b.scalar(1.0, g), b.scalar(alpha, g))),)


elementwise("LeakyRelu", lambda node: pieces((0.0,), (attribute(node, "alpha", 0.01), 1.0), (0.0, 0.0)), leaky_vjp)


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
    z, y, g = _ends(b, node, gs)
    below = b.op("Add", y, b.scalar(scale * depth, y))
    below = below if width == 1 else b.op("Mul", below, b.scalar(1 / width, y))
    return (b.op("Mul", g, _where(b, _beyond(b, z, 0.0), b.scalar(scale, g), below)),)


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
    _, y, g = _ends(b, node, gs)
    return (b.op("Mul", g, b.op("Mul", y, b.op("Sub", b.scalar(1.0, y), y))),)


elementwise(
    "Sigmoid",
    lambda node: (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    sigmoid_vjp,
    critical=lambda node: (0.0,),
)


def tanh_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g (1 - y^2)."""
    _, y, g = _ends(b, node, gs)
    return (b.op("Mul", g, b.op("Sub", b.scalar(1.0, y), b.op("Mul", y, y))),)


elementwise("Tanh", lambda node: (np.tanh, lambda z: 1 - np.tanh(z) ** 2), tanh_vjp, critical=lambda node: (0.0,))


def _bell(z: Array) -> Array:
    """exp(-z^2)."""
    return np.exp(-np.square(np.clip(z, -27.0, 27.0)))


def erf_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g 2 / sqrt(pi) exp(-z^2)."""
    z, _, g = _ends(b, node, gs)
    bell = b.op("Exp", b.op("Neg", b.op("Mul", z, z)))
    return (b.op("Mul", g, b.op("Mul", bell, b.scalar(2 / math.sqrt(math.pi), z))),)


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
    _, y, g = _ends(b, node, gs)
    inside = _inside(b, y, b.scalar(0.0, y), b.scalar(1.0, y))
    assert inside is not None
    return (b.op("Mul", g, _where(b, inside, b.scalar(attribute(node, "alpha", 0.2), g), b.scalar(0.0, g))),)


elementwise("HardSigmoid", lambda node: _clipped(0.0, 1.0, *_hard_sigmoid(node)), hard_sigmoid_vjp)


def _limits(node: ir.Node) -> tuple[float, float]:
    found = [-math.inf, math.inf]
    for k, value in enumerate(node.inputs[1:3]):
        array = constant_array(value)
        if array is not None:
            found[k] = float(array.reshape(-1)[0])
    return found[0], found[1]


def clip_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g where min < y < max (nothing flows at the limits); the limits are settings."""
    _, y, g = _ends(b, node, gs)
    lo, hi = (node.inputs[k] if k < len(node.inputs) else None for k in (1, 2))
    inside = _inside(b, y, lo, hi)
    dz = g if inside is None else _where(b, inside, g, b.scalar(0.0, g))
    return (dz, *(None,) * (len(node.inputs) - 1))


elementwise("Clip", lambda node: _clipped(*_limits(node)), clip_vjp)


# -- ThresholdedRelu, Shrink -------------------------------------------------------------------------------------------


def thresholded_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g [z > alpha]."""
    z, _, g = _ends(b, node, gs)
    return (_where(b, _beyond(b, z, attribute(node, "alpha", 1.0)), g, b.scalar(0.0, g)),)


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
    z, _, g = _ends(b, node, gs)
    return (_where(b, _beyond(b, b.op("Abs", z), attribute(node, "lambd", 0.5)), g, b.scalar(0.0, g)),)


elementwise("Shrink", _shrink, shrink_vjp)


# -- Softplus, Softsign ------------------------------------------------------------------------------------------------


def softplus_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g sigmoid(z)."""
    z, _, g = _ends(b, node, gs)
    return (b.op("Mul", g, b.op("Sigmoid", z)),)


elementwise("Softplus", lambda node: (softplus, sigmoid), softplus_vjp)


def _softsign(z: Array) -> Array:
    return np.sign(z) * (1 - 1 / (1 + np.abs(z)))


def softsign_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g / (1 + |z|)^2 = g (1 - |y|)^2."""
    _, y, g = _ends(b, node, gs)
    rest = b.op("Sub", b.scalar(1.0, y), b.op("Abs", y))
    return (b.op("Mul", g, b.op("Mul", rest, rest)),)


elementwise(
    "Softsign",
    lambda node: (_softsign, lambda z: 1 / (1 + np.abs(z)) ** 2),
    softsign_vjp,
    kinked=True,
    critical=lambda node: (0.0,),
)


# -- HardSwish, Swish, Mish --------------------------------------------------------------------------------------------


def _hard_swish(z: Array) -> Array:
    return np.where(z > 3, z, np.where(z < -3, 0.0, np.clip(z, -3, 3) * (np.clip(z, -3, 3) + 3) / 6))


def _hard_swish_slope(z: Array) -> Array:
    return np.where(z > 3, 1.0, np.where(z < -3, 0.0, np.clip(z, -3, 3) / 3 + 0.5))


def hard_swish_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g (z / 3 + 1/2) for |z| < 3, g above, 0 below."""
    z, _, g = _ends(b, node, gs)
    slope = b.op("Add", b.op("Mul", z, b.scalar(1 / 3, z)), b.scalar(0.5, z))
    slope = _where(b, _beyond(b, z, 3.0), b.scalar(1.0, z), slope)
    return (b.op("Mul", g, _where(b, _beyond(b, z, -3.0), slope, b.scalar(0.0, z))),)


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
    z, _, g = _ends(b, node, gs)
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
    z, _, g = _ends(b, node, gs)
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
    bell = b.op("Exp", b.op("Neg", b.op("Mul", a, a)))
    bend = b.op("Mul", b.op("Mul", a, bell), b.scalar(1 / math.sqrt(math.pi), z))
    share = b.op("Add", b.op("Mul", b.op("Erf", a), half), half)
    return b.op("Mul", g, b.op("Add", share, bend))


def gelu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    z, _, g = _ends(b, node, gs)
    return (gelu_gradient(b, node, z, g),)


for _op in ("Gelu", "com.microsoft:Gelu"):
    elementwise(_op, gelu_functions, gelu_vjp, critical=gelu_turns)
