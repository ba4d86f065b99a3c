"""CumSum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]


def _running(ctx: Context, node: ir.Node, xs: Sequence[object]) -> tuple[int, int, Array] | None:
    """The axis, its size, and how many elements each output sums (as an array along the axis)."""
    shape, axis = dims(node.inputs[0]), constant_array(node.inputs[1])
    if shape is None or axis is None or xs[0] is None:
        return None
    a = int(axis.ravel()[0]) % len(shape)
    counts = np.arange(shape[a], dtype=float) + (0 if attribute(node, "exclusive", 0) else 1)
    counts = counts[::-1] if attribute(node, "reverse", 0) else counts
    return a, shape[a], counts.reshape([-1 if k == a else 1 for k in range(len(shape))])


def _accumulate(node: ir.Node, axis: int, size: int, array: Array, *, reverse: bool = False) -> Array:
    """The running sum of an array that describes the value (stretched along the axis)."""
    shape = tuple(size if k == axis else n for k, n in enumerate(array.shape))
    a = np.broadcast_to(array, shape)
    backward_ = bool(attribute(node, "reverse", 0)) != reverse
    a = np.flip(a, axis) if backward_ else a
    total = np.cumsum(a, axis=axis) - (a if attribute(node, "exclusive", 0) else 0)
    return np.flip(total, axis) if backward_ else total


def _cumsum_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Sums of k elements, told apart by k: a shared part adds coherently (k^2), the rest incoherently (k)."""
    found, x = _running(ctx, node, xs), xs[0]
    if found is None or x is None:
        return (None,)
    axis, size, counts = found
    y = x.map(lambda a: _accumulate(node, axis, size, a))
    return (y if x.shared.shape[axis] == size else Moments(y.mean, y.fixed, x.shared * counts**2, y.local),)


def _cumsum_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """The gradient is the running sum from the other end."""
    g, found = gs[0], _running(ctx, node, gs)
    if g is None or found is None:
        return (None, None)
    axis, size, counts = found
    back = g.map(lambda a: _accumulate(node, axis, size, a, reverse=True))
    if g.shared.shape[axis] == size:
        return (back, None)
    return (Gradient(g.shared * np.flip(counts, axis) ** 2, back.local), None)


def _cumsum_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    found, x = _running(ctx, node, xs), xs[0]
    if found is None or x is None:
        return (None,)
    return (x.map(lambda a: _accumulate(node, found[0], found[1], a)),)


def _cumsum_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """Frobenius norm of the triangle of ones: sqrt(n (n + 1) / 2)."""
    shape, axis = dims(node.inputs[0]), constant_array(node.inputs[1])
    if shape is None or axis is None:
        return (None, None)
    n = shape[int(axis.ravel()[0])]
    return (math.sqrt(n * (n + 1) / 2), None)


def _cumsum_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = the running sum of g in the other direction."""
    back = 1 - attribute(node, "reverse", 0)
    return (b.op("CumSum", gs[0], node.inputs[1], exclusive=attribute(node, "exclusive", 0), reverse=back), None)


row(
    "CumSum",
    moments=_cumsum_moments,
    range=_cumsum_range,
    pullback=_cumsum_pullback,
    bound=_cumsum_bound,
    vjp=_cumsum_vjp,
)
