"""FusedConv of onnxruntime (com.microsoft): activation(Conv(x, W, bias) + z)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Gradient, Moments, Range
from gradlint.graph import attribute
from gradlint.ops.activation import sigmoid
from gradlint.ops.convolution import (
    collapsed,
    collapsed_gradient,
    conv_bound,
    conv_moments,
    conv_pullback,
    conv_range,
    conv_vjp,
)
from gradlint.quadrature import pieces
from gradlint.transfer import Context, Pair, apply_moments, apply_pullback, row

Values = Sequence[ir.Value | None]


def _activation(node: ir.Node) -> tuple[str, tuple[float, ...]]:
    return str(attribute(node, "activation", "")), tuple(attribute(node, "activation_params", ()) or ())


def _functions(node: ir.Node) -> Pair:
    """The activation and its derivative."""
    name, params = _activation(node)
    if name == "Tanh":
        return np.tanh, lambda s: 1 - np.tanh(s) ** 2
    if name == "Sigmoid":
        return sigmoid, lambda s: sigmoid(s) * sigmoid(-s)
    if name == "Relu":
        return pieces((0.0,), (0.0, 1.0), (0.0, 0.0))
    if name == "LeakyRelu":
        return pieces((0.0,), (params[0] if params else 0.01, 1.0), (0.0, 0.0))
    if name == "Clip" and len(params) == 2:
        return pieces(params, (0.0, 1.0, 0.0), (params[0], 0.0, params[1]))
    if name == "HardSigmoid" and len(params) == 2 and params[0] > 0:
        slope, offset = params
        return pieces((-offset / slope, (1 - offset) / slope), (0.0, slope, 0.0), (0.0, offset, 1.0))
    return pieces((), (1.0,), (0.0,))


def _sum_of(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Moments | None:
    """Moments ahead of the activation: z is taken as independent of the convolution."""
    (s,) = conv_moments(ctx, node, xs)
    z = xs[3] if len(xs) > 3 else None
    if s is None or z is None:
        return None if len(node.inputs) > 3 and node.inputs[3] is not None else s
    z = collapsed(z)
    return Moments(s.mean + z.mean, s.fixed + z.fixed, s.shared + z.shared, s.local + z.local)


def fused_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    s = _sum_of(ctx, node, xs)
    return (None if s is None else apply_moments(_functions(node)[0], s, kinked=True),)


def fused_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    s, g = _sum_of(ctx, node, xs), gs[0]
    if s is None or g is None:
        return (None,) * len(node.inputs)
    g = apply_pullback(_functions(node)[1], s, collapsed_gradient(g), kinked=True)
    found = conv_pullback(ctx, node, xs, ys, (g,))
    return (*found[:3], g) if len(node.inputs) > 3 else found


def fused_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Every activation of a FusedConv is monotone."""
    (box,) = conv_range(ctx, node, xs)
    z = xs[3] if len(xs) > 3 else None
    if box is None or (z is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return (None,)
    if z is not None:
        box = Range(box.lo + z.lo, box.hi + z.hi)
    f = _functions(node)[0]
    return (Range(f(box.lo), f(box.hi)),)


def fused_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """The convolution's bound times the steepest slope."""
    name, params = _activation(node)
    slopes = {"Sigmoid": (0.25,), "LeakyRelu": (1.0, *params), "HardSigmoid": params[:1]}
    slope = max(map(abs, slopes.get(name, (1.0,))), default=1.0)
    found = [None if f is None else f * slope for f in conv_bound(ctx, node, xs[:3], ys)[:3]]
    return (*found, *(None,) * (3 - len(found)), slope) if len(node.inputs) > 3 else found


def _before(b: Backward, node: ir.Node, g: ir.Value) -> ir.Value:
    """g ahead of the activation, by the output's own value."""
    y, (name, params) = node.outputs[0], _activation(node)

    def scaled(condition: ir.Value, yes: float, no: float) -> ir.Value:
        slope = b.op("Cast", condition, to=g.dtype, dtype=g.dtype)
        slope = slope if yes - no == 1 else b.op("Mul", slope, b.scalar(yes - no, g))
        return b.op("Mul", g, slope if no == 0 else b.op("Add", slope, b.scalar(no, g)))

    def beyond(threshold: float, compare: str = "Greater") -> ir.Value:
        return b.op(compare, y, b.scalar(threshold, y), dtype=ir.DataType.BOOL)

    if name == "Tanh":
        return b.op("Mul", g, b.op("Sub", b.scalar(1.0, y), b.op("Mul", y, y)))
    if name == "Sigmoid":
        return b.op("Mul", g, b.op("Mul", y, b.op("Sub", b.scalar(1.0, y), y)))
    if name == "Relu":
        return scaled(beyond(0.0), 1.0, 0.0)
    if name == "LeakyRelu":
        return scaled(beyond(0.0), 1.0, params[0] if params else 0.01)
    if name in ("Clip", "HardSigmoid") and len(params) == 2:
        lo, hi, slope = (*params, 1.0) if name == "Clip" else (0.0, 1.0, params[0])
        inside = b.op("And", beyond(lo), beyond(hi, "Less"), dtype=ir.DataType.BOOL)
        return scaled(inside, slope, 0.0)
    if name:
        raise Unsupported
    return g


def fused_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    assert gs[0] is not None
    g = _before(b, node, gs[0])
    found = list(conv_vjp(b, node, (g,)))
    return (*found[:3], g) if len(node.inputs) > 3 else found


row(
    "com.microsoft:FusedConv",
    moments=fused_moments,
    range=fused_range,
    pullback=fused_pullback,
    bound=fused_bound,
    vjp=fused_vjp,
)
