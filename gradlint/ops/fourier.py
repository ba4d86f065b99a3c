"""DFT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Gradient, Moments, mean_over
from gradlint.graph import attribute, constant_array, dims
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]


def _size(value: ir.Value, axis: int) -> int:
    """A size that must be known when the gradient is built."""
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise Unsupported("size of the transform not known")
    return size


def dft_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The conjugate transpose: of the forward transform N times the inverse one, of the inverse the forward one / N.

    What a one-sided spectrum leaves out got no gradient; as an input its inner entries stand for two. Zero padding is
    undone by cutting, cutting by zeros.
    """
    x, y, g = node.inputs[0], node.outputs[0], gs[0]
    assert x is not None
    assert g is not None
    if x.shape is None:
        raise Unsupported("signal of unknown rank")
    given = node.inputs[2] if len(node.inputs) > 2 else None
    index = np.array(-2) if given is None else constant_array(given)
    length = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if index is None:
        raise Unsupported("axis not known")
    axis = int(index.reshape(-1)[0]) % len(x.shape)
    inverse, onesided = attribute(node, "inverse", 0), attribute(node, "onesided", 0)
    size, kept = _size(x, axis), _size(y, axis)
    full = kept if inverse or not onesided else size if length is None else int(length.reshape(-1)[0])
    if inverse and onesided:
        d = b.op("DFT", g, None, b.constant(axis), onesided=1)
        twice = np.full(full // 2 + 1, 2.0 / full)
        twice[0] = 1 / full
        if full % 2 == 0:
            twice[-1] = 1 / full
        assert g.dtype is not None
        column = twice.reshape([-1 if k == axis else 1 for k in range(len(x.shape))])
        d = b.op("Mul", d, b.constant(column, g.dtype.numpy()))
        return _fitted(b, d, axis, full // 2 + 1, size), *(None,) * (len(node.inputs) - 1)
    d = _fitted(b, g, axis, kept, full)
    d = b.op("DFT", d, None, b.constant(axis), inverse=1 - inverse)
    d = b.op("Mul", d, b.scalar(1 / full if inverse else float(full), d))
    d = _fitted(b, d, axis, full, size)
    last = len(x.shape) - 1
    return _fitted(b, d, last, 2, _size(x, last)), *(None,) * (len(node.inputs) - 1)


def _fitted(b: Backward, d: ir.Value, axis: int, size: int, wanted: int) -> ir.Value:
    """`d` cut, or filled up with zeros, to the wanted size along an axis."""
    if size < wanted:
        return b.op("Pad", d, b.constant([0, wanted - size]), None, b.constant([axis]))
    if size > wanted:
        return b.op("Slice", d, b.constant([0]), b.constant([wanted]), b.constant([axis]))
    return d


def _sizes(ctx: Context, node: ir.Node) -> tuple[int, int, int, float] | None:
    """Axis, samples that enter, bins that leave, and the square of the transform's scale; None where not known."""
    shape, out = dims(node.inputs[0]), dims(node.outputs[0])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    index = np.array(-2) if given is None else ctx.array(given)
    if (
        shape is None
        or out is None
        or index is None
        or (attribute(node, "inverse", 0) and attribute(node, "onesided", 0))
    ):
        return None
    axis = int(index.reshape(-1)[0]) % len(shape)
    length = ctx.array(node.inputs[1]) if len(node.inputs) > 1 else None
    full = shape[axis] if length is None else int(length.reshape(-1)[0])
    scale = 1.0 / full**2 if attribute(node, "inverse", 0) else 1.0
    return axis, min(full, shape[axis]), out[axis], scale


def dft_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """E[y^2] of a part (real or imaginary) is half the energy of the samples (Parseval), averaged over the bins.

    The share of a constant mean goes into `fixed`: it stands in the first bin alone.
    """
    x, sizes, shape = xs[0], _sizes(ctx, node), dims(node.inputs[0])
    if x is None or sizes is None or shape is None:
        return (None,)
    axis, samples, _, scale = sizes
    energy = 0.5 * shape[-1] * samples * scale
    m = x.map(lambda a: mean_over(a, shape, (axis, len(shape) - 1)))
    square = mean_over(x.mean**2, shape, (axis, len(shape) - 1))
    return (Moments(0 * m.mean, energy * (square + m.fixed), 0 * m.shared, energy * (m.shared + m.local)),)


def dft_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Each sample gathers all bins: the sum over them of q cos^2 and q sin^2, averaged over samples and parts."""
    g, sizes, shape, out = gs[0], _sizes(ctx, node), dims(node.inputs[0]), dims(node.outputs[0])
    none = (None,) * (len(node.inputs) - 1)
    if g is None or sizes is None or shape is None or out is None:
        return None, *none
    axis, samples, bins, scale = sizes
    total = mean_over(g.total, out, (axis, len(out) - 1)) * bins * scale * samples / shape[axis]
    return Gradient(0 * total, total), *none


row("DFT", moments=dft_moments, pullback=dft_pullback, vjp=dft_vjp)
