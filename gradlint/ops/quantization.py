"""Quantised operators: rounding has no gradient, integers carry none. Declared so; what comes out is described."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.transfer import BLOCKED, Context, blocks, row

blocks(
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
    "com.microsoft:DynamicQuantizeMatMul",
    "com.microsoft:MatMulIntegerToFloat",
    "com.microsoft:QLinearAdd",
    "com.microsoft:QLinearMul",
    "com.microsoft:QLinearSigmoid",
    "com.microsoft:QLinearLeakyRelu",
    "com.microsoft:QLinearSoftmax",
    "com.microsoft:QLinearConcat",
    "com.microsoft:QLinearAveragePool",
    "com.microsoft:QLinearGlobalAveragePool",
    "com.microsoft:QGemm",
)

_QUANTIZED = re.compile(r"quantize|integer|^Q(Linear|Gemm|Attention|Embed|MoE|Ordered)|NBits$|Bnb4$", re.IGNORECASE)


def is_quantized(node: ir.Node) -> bool:
    """Does the operator work on quantised numbers, or make floats of them or them of floats?"""
    return bool(_QUANTIZED.search(node.op_type))


# A calibrated quantiser clips at about three standard deviations.
_CLIP = 3.0


def _levels(ctx: Context, node: ir.Node) -> tuple[Array, Array] | None:
    """The lowest and the highest float that a quantised input can stand for, per channel of `axis`."""
    x, scale = node.inputs[0], ctx.array(node.inputs[1])
    shape = dims(x)
    if x is None or x.dtype is None or shape is None or scale is None or not x.dtype.is_integer():
        return None
    point = node.inputs[2] if len(node.inputs) > 2 else None
    zero = np.zeros(()) if point is None else ctx.array(point)
    if zero is None:
        return None
    signed, bits = x.dtype.is_signed(), round(x.dtype.itemsize * 8)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    s, z = scale.astype(np.float64), zero.astype(np.float64)
    ends = np.sort(np.stack([(least - z) * s, (most - z) * s]), axis=0)
    if scale.ndim == 1 and scale.size > 1:
        each = [1] * len(shape)
        each[attribute(node, "axis", 1)] = -1
        return ends[0].reshape(each), ends[1].reshape(each)
    one = (1,) * len(shape)
    return np.full(one, ends[0].min()), np.full(one, ends[1].max())


def dequantize_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """The levels of the integer type, shifted and scaled."""
    found = _levels(ctx, node)
    return (None if found is None else Range(found[0] - 1e-6 * np.abs(found[0]), found[1] + 1e-6 * np.abs(found[1])),)


def dequantize_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Scale and zero point fit the data: mean at the middle of the levels, their width six standard deviations."""
    found = _levels(ctx, node)
    if found is None:
        return (None,)
    lo, hi = found
    zero = np.zeros_like(lo)
    return (Moments((lo + hi) / 2, zero, zero, ((hi - lo) / (2 * _CLIP)) ** 2),)


def dynamic_quantize_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """The scale is the spread of n normal elements over 255 steps: about 2 sqrt(2 log n) standard deviations."""
    x, shape = xs[0], dims(node.inputs[0])
    if x is None or shape is None:
        return (None, None, None)
    n = max(2, int(np.prod(shape)))
    scale = 2 * np.sqrt(2 * np.log(n) * np.mean(x.var)) / 255
    return None, Moments.constant(np.asarray(scale)), None


def dequantize_vjp(b: Backward, node: ir.Node, gs: Sequence[ir.Value | None]) -> Sequence[ir.Value | None]:
    """dscale = sum of g (x - zero point) over what each scale serves; integers have no gradient."""
    scale, g = node.inputs[1], gs[0]
    none = (None,) * (len(node.inputs) - 2)
    if not b.wanted(scale) or g is None:
        return None, None, *none
    assert scale is not None
    shape, scales = dims(node.inputs[0]), dims(scale)
    if shape is None or scales is None:
        raise Unsupported("shapes not known")
    axis, block = attribute(node, "axis", 1) % max(1, len(shape)), attribute(node, "block_size", 0)
    one = b.op("Expand", b.scalar(1.0, scale), b.shape(scale))
    settings = {"axis": axis, "block_size": block} if scales else {}
    steps = b.op("DequantizeLinear", node.inputs[0], one, *node.inputs[2:], dtype=scale.dtype, **settings)
    p = b.op("Mul", g, steps)
    if block:
        count = scales[axis]
        whole = count * block - shape[axis]  # the last block may be short
        if whole:
            p = b.op("Pad", p, b.constant([0, whole]), None, b.constant([axis]))
        p = b.op("Reshape", p, b.constant([*shape[:axis], count, block, *shape[axis + 1 :]]))
        return None, b.sum_over(p, [axis + 1]), *none
    rest = [k for k in range(len(shape)) if not scales or k != axis]
    return None, b.op("Reshape", b.sum_over(p, rest), b.shape(scale)), *none


def _nothing(*args: object) -> tuple[None, None]:
    return None, None


BLOCKED.add("DequantizeLinear")  # its integers have no gradient
row(
    "DequantizeLinear",
    moments=dequantize_moments,
    range=dequantize_range,
    pullback=_nothing,
    bound=_nothing,
    vjp=dequantize_vjp,
)
row("DynamicQuantizeLinear", moments=dynamic_quantize_moments)
