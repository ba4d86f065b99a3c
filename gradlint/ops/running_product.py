"""CumProd."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute
from gradlint.transfer import row

Values = Sequence[ir.Value | None]


def cumprod_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx_k = sum over i from k on of g_i y_i / x_k, the running sum from the other end.

    Exact at zeros too: products beyond the first zero are 0 whatever the rest is, so only it and what comes before it
    get a gradient; with a 1 in its place y_i / x_k is what the others multiply to.
    """
    x, axis, g = node.inputs[0], node.inputs[1], gs[0]
    assert x is not None
    assert g is not None
    exclusive, reverse = attribute(node, "exclusive", 0), attribute(node, "reverse", 0)
    zero, one = b.scalar(0.0, x), b.scalar(1.0, x)
    null = b.op("Equal", x, zero, dtype=ir.DataType.BOOL)
    count = b.op("CumSum", b.op("Where", null, one, zero, dtype=x.dtype), axis, reverse=reverse)
    first = b.op("And", null, b.op("Equal", count, one, dtype=ir.DataType.BOOL))
    before = b.op("Equal", count, zero, dtype=ir.DataType.BOOL)
    flags = {"exclusive": exclusive, "reverse": 1 - reverse}
    through = b.op("CumSum", b.op("Mul", g, node.outputs[0]), axis, **flags)
    filled = b.op("Where", first, one, x, dtype=x.dtype)
    product = b.op("CumProd", filled, axis, exclusive=exclusive, reverse=reverse)
    at_zero = b.op("CumSum", b.op("Mul", g, product), axis, **flags)
    whole = b.op("Div", through, b.op("Where", null, one, x, dtype=x.dtype))
    rest = b.op("Where", first, at_zero, zero, dtype=x.dtype)
    return b.op("Where", before, whole, rest, dtype=x.dtype), None


row("CumProd", vjp=cumprod_vjp)
