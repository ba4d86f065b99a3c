"""The gradients of convolutions as plain ONNX operators that onnxruntime's CPU kernels run fast.

With y[o, q] = sum_{c,t} W[o, c, t] x[c, q s + t d - p] (s strides, d dilations, p pads):

- dx, stride 1: the convolution of g with the kernel flipped and its channels swapped, at the speed of the forward pass;
  other strides: ConvTranspose.
- dW: a matrix product of g, (O, N L), with the patches of x, (N L, taps C). Patches are gathered channels-last, first
  along the last axis, then over the others: Gather copies whole rows and uses all threads, unlike Slice and Concat.
  Depthwise: the patches times g, summed; where they would be many, a convolution of x with g as its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute, dims

_PATCHES = 1 << 23  # elements: larger matrices of patches are built and multiplied one leading tap at a time
_FLIPPED = 1 << 23  # elements: larger kernels are not copied flipped
_COPIES = 200_000  # elements: more patches of one example are not laid out for a depthwise convolution (measured)
_SHORT = 256  # positions: below, one product over all examples beats one per example (measured)


@dataclass(frozen=True)
class Geometry:
    """Strides, dilations, pads and groups of a convolution."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    group: int

    @property
    def rank(self) -> int:
        return len(self.strides)


def geometry(node: ir.Node, rank: int) -> Geometry:
    """The attributes of a Conv, in `rank` spatial dimensions (auto_pad is resolved in the canonical graph)."""
    pads = tuple(attribute(node, "pads", ()) or (0,) * (2 * rank))
    return Geometry(
        tuple(attribute(node, "strides", ()) or (1,) * rank),
        tuple(attribute(node, "dilations", ()) or (1,) * rank),
        pads[:rank],
        pads[rank:],
        int(attribute(node, "group", 1)),
    )


def spatial_rank(node: ir.Node) -> int | None:
    """Spatial dimensions of a convolution, from whichever of its inputs has a known rank."""
    for value in node.inputs[:2]:
        if value is not None and value.shape is not None:
            return len(value.shape) - 2
    kernel = attribute(node, "kernel_shape", ())
    return len(kernel) or None


def layout(b: Backward, *parts: int | tuple[ir.Value, int, int | None]) -> ir.Value:
    """A shape from numbers and from the axes [start, end) of values: a constant where all are known."""
    known: list[int] = []
    for part in parts:
        if isinstance(part, int):
            known.append(part)
            continue
        value, start, end = part
        sizes = value.shape.dims[start:end] if value.shape is not None else (None,)
        numbers = [n for n in sizes if isinstance(n, int)]
        if len(numbers) < len(sizes):
            break
        known.extend(numbers)
    else:
        return b.constant(known)
    pieces = [
        b.constant([p]) if isinstance(p, int) else b.op("Shape", p[0], start=p[1], end=p[2], dtype=ir.DataType.INT64)
        for p in parts
    ]
    return pieces[0] if len(pieces) == 1 else b.op("Concat", *pieces, axis=0)


def convolve(
    b: Backward, x: ir.Value, w: ir.Value, strides: Sequence[int], dilations: Sequence[int], begin: Sequence[int],
    end: Sequence[int], group: int,
) -> ir.Value:  # fmt: skip
    """Conv; pads below zero crop x first (Conv itself refuses them)."""
    if min((*begin, *end)) < 0:
        starts = [max(-p, 0) for p in begin]
        ends = [p if p < 0 else np.iinfo(np.int64).max for p in end]
        x = b.op("Slice", x, b.constant(starts), b.constant(ends), b.constant(range(2, len(begin) + 2)))
    pads = [max(p, 0) for p in (*begin, *end)]
    return b.op("Conv", x, w, strides=list(strides), dilations=list(dilations), pads=pads, group=group)


def _connected(
    shape: tuple[int, ...], sizes: tuple[int, ...] | None, outs: tuple[int, ...] | None, at: Geometry
) -> bool:
    """Does the one window read the whole input once: a fully connected layer?"""
    whole = sizes == shape[2:] and outs == (1,) * at.rank and at.group == 1
    return whole and not any((*at.begin, *at.end)) and all(d == 1 for d in at.dilations)


# -- dx ----------------------------------------------------------------------------------------------------------------


def flipped(b: Backward, w: ir.Value, shape: tuple[int, ...], group: int) -> ir.Value:
    """W (O, C/group, taps) as the kernel of the input's gradient, (C, O/group, taps reversed)."""
    kernel = shape[2:]
    taps, out, into = math.prod(kernel), shape[0] // group, shape[1]
    if taps > 1:
        flat = b.op("Reshape", w, b.constant([0, 0, -1]))
        w = b.op("Reshape", b.op("Gather", flat, b.constant(range(taps - 1, -1, -1)), axis=2), b.constant(shape))
    if group == 1:
        return b.op("Transpose", w, perm=[1, 0, *range(2, len(shape))])
    if out == into == 1:
        return w
    split = b.op("Reshape", w, b.constant([group, out, into, *kernel]))
    swapped = b.op("Transpose", split, perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return b.op("Reshape", swapped, b.constant([group * into, out, *kernel]))


def input_gradient(b: Backward, g: ir.Value, y: ir.Value, w: ir.Value, x: ir.Value, at: Geometry) -> ir.Value:
    """dx of a Conv y = W * x."""
    shape = dims(w)
    if shape is not None and _connected(shape, _spatial(x), _spatial(y), at):
        flat_g, flat_w = b.op("Flatten", g, axis=1), b.op("Flatten", w, axis=1)
        return b.op("Reshape", b.op("MatMul", flat_g, flat_w), b.shape(x))
    if shape is not None and all(s == 1 for s in at.strides) and math.prod(shape) <= _FLIPPED:
        reach = [d * (k - 1) for d, k in zip(at.dilations, shape[2:], strict=True)]
        begin = [r - p for r, p in zip(reach, at.begin, strict=True)]
        end = [r - p for r, p in zip(reach, at.end, strict=True)]
        ones = (1,) * at.rank
        return convolve(b, g, flipped(b, w, shape, at.group), ones, at.dilations, begin, end, at.group)
    common: dict[str, Any] = {"strides": list(at.strides), "dilations": list(at.dilations), "group": at.group}
    sizes, outs = _spatial(x), _spatial(y)
    if sizes is not None and outs is not None and shape is not None:
        rows = zip(outs, at.strides, at.dilations, shape[2:], at.begin, at.end, strict=True)
        natural = [(q - 1) * s + d * (k - 1) + 1 - p - e for q, s, d, k, p, e in rows]
        rest = [n - m for n, m in zip(sizes, natural, strict=True)]
        if all(0 <= r < s for r, s in zip(rest, at.strides, strict=True)):
            return b.op("ConvTranspose", g, w, pads=[*at.begin, *at.end], output_padding=rest, **common)
    full = b.op("ConvTranspose", g, w, **common)
    spare = [max(0, s - 1) for s in at.strides]  # the last positions may have been read by no window
    widened = b.op("Pad", full, b.constant([0] * (at.rank + 4) + spare))
    spatial = list(range(2, at.rank + 2))
    start = b.constant(at.begin)
    end_ = b.op("Add", layout(b, (x, 2, None)), start)
    return b.op("Slice", widened, start, end_, b.constant(spatial))


# -- dW ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfolding:
    """How the patches of x are laid out: static sizes of a convolution whose batch may be symbolic."""

    sizes: tuple[int, ...]
    outs: tuple[int, ...]
    kernel: tuple[int, ...]
    at: Geometry
    out: int  # output channels per group
    into: int  # input channels per group

    @property
    def depthwise(self) -> bool:
        return self.at.group > 1 and self.out == self.into == 1

    @property
    def lead(self) -> list[int]:
        """A leading axis of groups, where the product is one per group."""
        return [] if self.at.group == 1 or self.depthwise else [self.at.group]

    @property
    def channels(self) -> int:
        return self.into * (1 if self.lead else self.at.group)

    @property
    def length(self) -> int:
        return math.prod(self.outs)

    @property
    def padded(self) -> tuple[int, ...]:
        """Input positions kept: all of them, and the padding that is read."""
        rows = zip(self.outs, self.at.strides, self.at.dilations, self.kernel, self.at.begin, self.sizes, strict=True)
        return tuple(max((q - 1) * s + d * (k - 1) + 1, p + n) for q, s, d, k, p, n in rows)

    @property
    def pointwise(self) -> bool:
        """Does every output position read just its own input position?"""
        return math.prod(self.kernel) == 1 and self.sizes == self.outs == self.padded

    def offsets(self, axis: int) -> np.ndarray:
        """Padded input position that each tap of each output position reads, along one axis: (positions, taps)."""
        out, kernel = self.outs[axis], self.kernel[axis]
        return np.arange(out)[:, None] * self.at.strides[axis] + np.arange(kernel) * self.at.dilations[axis]


def weight_gradient(
    b: Backward, x: ir.Value, source: ir.Value, g: ir.Value, target: ir.Value, w: ir.Value, at: Geometry
) -> ir.Value:
    """dW[o, c, t] = sum over examples and positions q of g[o, q] x[c, q s + t d - p].

    `source`, `target`: the values whose shapes x and g have (they may carry no shape of their own).
    """
    shape, sizes, outs = dims(w), _spatial(source), _spatial(target)
    if shape is None or sizes is None or outs is None:
        return _swapped_roles(b, x, source, g, target, w, at)
    if _connected(shape, sizes, outs, at):
        return b.op(
            "Reshape", b.op("Gemm", b.op("Flatten", g, axis=1), b.op("Flatten", x, axis=1), transA=1), b.shape(w)
        )
    u = Unfolding(sizes, outs, shape[2:], at, shape[0] // at.group, shape[1])
    if u.pointwise and at.group == 1 and u.length >= _SHORT:
        rows, columns = (b.op("Reshape", v, b.constant([0, 0, -1])) for v in (g, x))
        each = b.op("MatMul", rows, b.op("Transpose", columns, perm=[0, 2, 1]))
        return b.op("Reshape", b.sum_over(each, [0]), b.constant(shape))
    patches = u.length * math.prod(u.kernel) * u.channels
    if u.depthwise and patches > _COPIES and (batch := (dims(source) or (0,))[0]):
        return _correlation(b, x, g, u, w, batch)
    split = at.rank > 1 and patches > _PATCHES
    windows = _windows(b, x, u)
    taps = [slice(k, k + 1) for k in range(u.kernel[0])] if split else [slice(None)]
    multiply = _depthwise if u.depthwise else _product
    parts = [multiply(b, *_patches(b, windows, u, t), g, u) for t in taps]
    whole = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=0 if u.depthwise else -1)
    if u.depthwise:  # (taps, C)
        return b.op("Reshape", b.op("Transpose", whole, perm=[1, 0]), b.constant(shape))
    if math.prod(u.kernel) == 1:
        return b.op("Reshape", whole, b.constant(shape))
    channels_last = b.op("Reshape", whole, b.constant([shape[0], math.prod(u.kernel), u.into]))
    return b.op("Reshape", b.op("Transpose", channels_last, perm=[0, 2, 1]), b.constant(shape))


def _spatial(value: ir.Value) -> tuple[int, ...] | None:
    if value.shape is None:
        return None
    sizes = [n for n in value.shape.dims[2:] if isinstance(n, int)]
    return tuple(sizes) if len(sizes) == len(value.shape) - 2 else None


def _windows(b: Backward, x: ir.Value, u: Unfolding) -> ir.Value:
    """x channels-last and padded, its windows along the last axis side by side: (groups, N, positions, taps C)."""
    lead, rank = len(u.lead), u.at.rank
    if lead:
        x = b.op("Reshape", x, b.constant([0, u.at.group, u.into, *u.sizes]))
        x = b.op("Transpose", x, perm=[1, 0, *range(3, rank + 3), 2])
    else:
        x = b.op("Transpose", x, perm=[0, *range(2, rank + 2), 1])
    end = [m - p - n for m, p, n in zip(u.padded, u.at.begin, u.sizes, strict=True)]
    if any(u.at.begin) or any(end):
        zero = [0] * (lead + 1)
        x = b.op("Pad", x, b.constant([*zero, *u.at.begin, 0, *zero, *end, 0]))
    offsets = u.offsets(rank - 1)
    if offsets.shape != (u.padded[-1], 1):
        x = b.op("Gather", x, b.constant(offsets), axis=lead + rank)
    positions = math.prod(u.padded[:-1]) * u.outs[-1]
    return b.op("Reshape", x, b.constant([0] * (lead + 1) + [positions, u.kernel[-1] * u.channels]))


def _patches(b: Backward, windows: ir.Value, u: Unfolding, taps: slice) -> tuple[ir.Value, int]:
    """The windows along the other axes too, for the leading axis's `taps`; how many taps there are at each position."""
    index = np.arange(u.outs[-1])[:, None]
    stride = u.outs[-1]
    for axis in range(u.at.rank - 2, -1, -1):
        offsets = u.offsets(axis)[:, taps if axis == 0 else slice(None)] * stride
        index = offsets[:, None, :, None] + index[None, :, None, :]
        index = index.reshape(index.shape[0] * index.shape[1], -1)
        stride *= u.padded[axis]
    if np.array_equal(index, np.arange(stride)[:, None]):
        return windows, u.kernel[-1]
    gathered = b.op("Gather", windows, b.constant(index), axis=len(u.lead) + 1)
    return gathered, index.shape[1] * u.kernel[-1]


def _product(b: Backward, patches: ir.Value, taps: int, g: ir.Value, u: Unfolding) -> ir.Value:
    """g times the patches over all examples and positions: (groups, O/groups, taps C/groups)."""
    if u.lead:
        g = b.op("Reshape", g, b.constant([0, u.at.group, u.out, -1]))
        g = b.op("Reshape", b.op("Transpose", g, perm=[1, 2, 0, 3]), b.constant([u.at.group, u.out, -1]))
    else:
        g = b.op("Transpose", b.op("Reshape", g, b.constant([0, 0, -1])), perm=[1, 0, 2])
        g = b.op("Reshape", g, b.constant([u.out, -1]))
    return b.op("MatMul", g, b.op("Reshape", patches, b.constant([*u.lead, -1, taps * u.channels])))


def _depthwise(b: Backward, patches: ir.Value, taps: int, g: ir.Value, u: Unfolding) -> ir.Value:
    """The patches times g, summed over all examples and positions: (taps, C)."""
    spread = b.op("Reshape", patches, b.constant([0, u.length, taps, u.channels]))
    g = b.op("Transpose", b.op("Reshape", g, b.constant([0, 0, u.length, 1])), perm=[0, 2, 3, 1])
    return b.sum_over(b.op("Mul", spread, g), [0, 1])


def _correlation(b: Backward, x: ir.Value, g: ir.Value, u: Unfolding, w: ir.Value, batch: int) -> ir.Value:
    """Depthwise: the convolution of x with the kernel g, every channel of every example a group of its own."""
    signal, kernel = b.op("Reshape", x, b.constant([1, -1, *u.sizes])), b.op("Reshape", g, b.constant([-1, 1, *u.outs]))
    at, spatial = u.at, range(2, u.at.rank + 2)
    wide = convolve(b, signal, kernel, at.dilations, at.strides, at.begin, at.end, batch * u.channels)
    taps = b.op("Slice", wide, b.constant([0] * at.rank), b.constant(u.kernel), b.constant(spatial))
    return b.op("Reshape", b.sum_over(b.op("Reshape", taps, b.constant([batch, u.channels, -1])), [0]), b.shape(w))


def _swapped_roles(
    b: Backward, x: ir.Value, source: ir.Value, g: ir.Value, target: ir.Value, w: ir.Value, at: Geometry
) -> ir.Value:
    """dW where sizes are symbolic: the convolution of x with the kernel g, examples and channels swapped."""
    swap = [1, 0, *range(2, at.rank + 2)]
    kernel = b.op("Transpose", g, perm=swap)
    if at.group == 1:
        x = b.op("Transpose", x, perm=swap)
    else:  # channels of one group take the place of the examples
        split = b.op("Reshape", x, layout(b, (source, 0, 1), at.group, -1, (source, 2, None)))
        moved = b.op("Transpose", split, perm=[2, 1, 0, *range(3, at.rank + 3)])
        x = b.op("Reshape", moved, layout(b, (w, 1, 2), -1, (source, 2, None)))
    wide = convolve(b, x, kernel, at.dilations, at.strides, at.begin, at.end, at.group)
    axes = list(range(2, at.rank + 2))
    taps = b.op("Slice", wide, b.constant([0] * at.rank), layout(b, (w, 2, None)), b.constant(axes))
    return b.op("Transpose", taps, perm=swap)
