"""Elementary functions of one input, and operators without a gradient. z: the input, y: the output, g: y's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Moments, Range
from gradlint.ops.activation import Values, ends_of
from gradlint.quadrature import pieces
from gradlint.transfer import Context, apply_moments, blocks, elementwise, row

Emit = Callable[[Backward, ir.Value, ir.Value], ir.Value]  # b, z, y -> the slope


def _by_slope(slope: Emit) -> Callable[[Backward, ir.Node, Values], Values]:
    """dz = g f'(z)."""

    def vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
        z, y, g = ends_of(b, node, gs)
        return (b.op("Mul", g, slope(b, z, y)),)

    return vjp


def _one_plus(b: Backward, z: ir.Value, sign: int) -> ir.Value:
    """1 + z^2 or 1 - z^2."""
    return b.op("Add" if sign > 0 else "Sub", b.scalar(1.0, z), b.op("Mul", z, z))


# -- signs, roots, exponentials ----------------------------------------------------------------------------------------


def neg_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    return (b.op("Neg", gs[0]),)


elementwise("Neg", lambda node: pieces((), (-1.0,), (0.0,)), neg_vjp)
elementwise("Abs", lambda node: pieces((0.0,), (-1.0, 1.0), (0.0, 0.0)), _by_slope(lambda b, z, y: b.op("Sign", z)))


def exp_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g y."""
    return (b.op("Mul", gs[0], node.outputs[0]),)


elementwise("Exp", lambda node: (np.exp, np.exp), exp_vjp)


def _pole(bounded: Callable[[Array], Array]) -> Callable[[ir.Node, Array, Array], Array | None]:
    """|f'| falls with z > 0 and has a pole at 0."""
    return lambda node, lo, hi: None if np.any(lo <= 0) else bounded(lo)


def log_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g / z."""
    return (b.op("Div", gs[0], node.inputs[0]),)


elementwise("Log", lambda node: (np.log, np.reciprocal), log_vjp, slope=_pole(np.reciprocal), positive=True)


def sqrt_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g / (2 y)."""
    y = node.outputs[0]
    return (b.op("Div", gs[0], b.op("Add", y, y)),)


elementwise(
    "Sqrt",
    lambda node: (np.sqrt, lambda z: 0.5 / np.sqrt(z)),
    sqrt_vjp,
    slope=_pole(lambda z: 0.5 / np.sqrt(z)),
    positive=True,
)


def reciprocal_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = -g y^2."""
    y = node.outputs[0]
    return (b.op("Neg", b.op("Mul", gs[0], b.op("Mul", y, y))),)


def _no_pole(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    return None if np.any((lo <= 0) & (hi >= 0)) else 1 / np.minimum(np.abs(lo), np.abs(hi)) ** 2


elementwise(
    "Reciprocal",
    lambda node: (lambda z: 1 / z, lambda z: -1 / z**2),
    reciprocal_vjp,
    critical=lambda node: (0.0,),  # f is infinite there: no range
    slope=_no_pole,
    positive=True,
)


# -- trigonometric and hyperbolic --------------------------------------------------------------------------------------


def _turns(first: float) -> Callable[[ir.Node], Sequence[float]]:
    """first + k pi, for |k| <= 64: beyond the range is [-1, 1] anyway."""
    return lambda node: tuple(first + k * math.pi for k in range(-64, 65))


def _one(node: ir.Node, lo: Array, hi: Array) -> Array:
    return np.ones(1)


elementwise(
    "Sin",
    lambda node: (np.sin, np.cos),
    _by_slope(lambda b, z, y: b.op("Cos", z)),
    critical=_turns(math.pi / 2),
    slope=_one,
)
elementwise(
    "Cos",
    lambda node: (np.cos, lambda z: -np.sin(z)),
    _by_slope(lambda b, z, y: b.op("Neg", b.op("Sin", z))),
    critical=_turns(0.0),
    slope=_one,
)


def _tan_slope(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    branch = np.floor(lo / math.pi + 0.5) != np.floor(hi / math.pi + 0.5)
    return None if branch.any() else 1 + np.maximum(np.tan(lo) ** 2, np.tan(hi) ** 2)


elementwise(
    "Tan",
    lambda node: (np.tan, lambda z: 1 + np.tan(z) ** 2),
    _by_slope(lambda b, z, y: _one_plus(b, y, 1)),
    critical=_turns(math.pi / 2),  # poles: f is huge there
    slope=_tan_slope,
)


def _inside_one(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    """For slopes that grow towards |z| = 1 and have a pole there."""
    return None if np.any(np.maximum(np.abs(lo), np.abs(hi)) >= 1) else np.maximum(np.abs(lo), np.abs(hi))


def _arc_slope(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    most = _inside_one(node, lo, hi)
    return None if most is None else 1 / np.sqrt(1 - most**2)


def _unit(z: Array) -> Array:
    """Kept inside (-1, 1), where the function is defined: a normal reaches beyond."""
    return np.clip(z, -0.95, 0.95)


elementwise(
    "Asin",
    lambda node: (lambda z: np.arcsin(np.clip(z, -1, 1)), lambda z: 1 / np.sqrt(1 - _unit(z) ** 2)),
    _by_slope(lambda b, z, y: b.op("Reciprocal", b.op("Sqrt", _one_plus(b, z, -1)))),
    slope=_arc_slope,
)
elementwise(
    "Acos",
    lambda node: (lambda z: np.arccos(np.clip(z, -1, 1)), lambda z: -1 / np.sqrt(1 - _unit(z) ** 2)),
    _by_slope(lambda b, z, y: b.op("Neg", b.op("Reciprocal", b.op("Sqrt", _one_plus(b, z, -1))))),
    slope=_arc_slope,
)
elementwise(
    "Atan",
    lambda node: (np.arctan, lambda z: 1 / (1 + z**2)),
    _by_slope(lambda b, z, y: b.op("Reciprocal", _one_plus(b, z, 1))),
    critical=lambda node: (0.0,),
)
elementwise(
    "Sinh",
    lambda node: (np.sinh, np.cosh),
    _by_slope(lambda b, z, y: b.op("Cosh", z)),
)
elementwise(
    "Cosh",
    lambda node: (np.cosh, np.sinh),
    _by_slope(lambda b, z, y: b.op("Sinh", z)),
    critical=lambda node: (0.0,),
)
elementwise(
    "Asinh",
    lambda node: (np.arcsinh, lambda z: 1 / np.sqrt(1 + z**2)),
    _by_slope(lambda b, z, y: b.op("Reciprocal", b.op("Sqrt", _one_plus(b, z, 1)))),
    critical=lambda node: (0.0,),
)


def _acosh_slope(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    return None if np.any(lo <= 1) else 1 / np.sqrt(lo**2 - 1)


elementwise(
    "Acosh",
    lambda node: (lambda z: np.arccosh(np.maximum(z, 1)), lambda z: 1 / np.sqrt(np.maximum(z, 1 + 1e-3) ** 2 - 1)),
    _by_slope(lambda b, z, y: b.op("Reciprocal", b.op("Sqrt", b.op("Neg", _one_plus(b, z, -1))))),
    slope=_acosh_slope,
)


def _atanh_slope(node: ir.Node, lo: Array, hi: Array) -> Array | None:
    most = _inside_one(node, lo, hi)
    return None if most is None else 1 / (1 - most**2)


elementwise(
    "Atanh",
    lambda node: (lambda z: np.arctanh(_unit(z)), lambda z: 1 / (1 - _unit(z) ** 2)),
    _by_slope(lambda b, z, y: b.op("Reciprocal", _one_plus(b, z, -1))),
    slope=_atanh_slope,
)


# -- steps -------------------------------------------------------------------------------------------------------------


def step(op: str, f: Callable[[Array], Array]) -> None:
    """A monotone function that is flat where it has a derivative: moments and range, no gradient."""

    def moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
        return (None if xs[0] is None else apply_moments(f, xs[0], kinked=True),)

    def range_(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
        return (None if xs[0] is None else xs[0].map(f),)

    row(op, moments=moments, range=range_)
    blocks(op)


step("Sign", np.sign)
step("Floor", np.floor)
step("Ceil", np.ceil)
step("Round", np.rint)

blocks(
    "IsNaN", "IsInf", "And", "Or", "Xor", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
    "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot",
)  # fmt: skip
