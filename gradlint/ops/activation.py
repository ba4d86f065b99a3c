"""Activation functions: all that is known about each stands in its row. z is the input, y the output, g the gradient of y."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array
from gradlint.transfer import elementwise

Values = Sequence[ir.Value | None]


def sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * z))


# -- Relu ----------------------------------------------------------------------------------------------------------------


def relu_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g [z > 0]; by the sign of y, so that z need not be kept."""
    y, g = node.outputs[0], gs[0]
    assert g is not None
    positive = b.op("Greater", y, b.scalar(0.0, y), dtype=ir.DataType.BOOL)
    return (b.op("Where", positive, g, b.scalar(0.0, g), dtype=g.dtype),)


elementwise(
    "Relu",
    lambda node: (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    relu_vjp,
    kinked=True,
    slope=lambda node, lo, hi: (hi > 0).astype(float),
)


# -- Sigmoid -------------------------------------------------------------------------------------------------------------


def sigmoid_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g y (1 - y)."""
    y, g = node.outputs[0], gs[0]
    return (b.op("Mul", g, b.op("Mul", y, b.op("Sub", b.scalar(1.0, y), y))),)


elementwise(
    "Sigmoid",
    lambda node: (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    sigmoid_vjp,
    critical=lambda node: (0.0,),
)
