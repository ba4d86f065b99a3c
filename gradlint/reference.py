"""Operators that ONNX's reference evaluator computes wrongly or not at all in some cases, for `check_op`.

Straight from the definitions in the ONNX operator specification, in the type of the input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from onnx.reference.op_run import OpRun


class ConvTranspose(OpRun):
    """Every input position adds W, scaled by its value, to the output (the evaluator's own mishandles groups)."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        kernel, rank = w.shape[2:], w.ndim - 2
        ones, zeros, groups = (1,) * rank, (0,) * rank, group or 1
        strides, dilations, extra = strides or ones, dilations or ones, output_padding or zeros
        pads = pads or (*zeros, *zeros)
        rows = list(zip(x.shape[2:], kernel, strides, dilations, extra, strict=True))
        full = [s * (n - 1) + d * (k - 1) + 1 + e for n, k, s, d, e in rows]
        begin, end = pads[:rank], pads[rank:]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER") and not output_shape:
            output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        if output_shape:
            totals = [f - o for f, o in zip(full, output_shape[-rank:], strict=True)]
            full = [f - min(0, t) for f, t in zip(full, totals, strict=True)]
            small, large = [max(0, t) // 2 for t in totals], [max(0, t) - max(0, t) // 2 for t in totals]
            begin, end = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        y = np.zeros((x.shape[0], w.shape[1] * groups, *full), x.dtype)
        split = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        kernels = w.reshape(groups, -1, *w.shape[1:])
        for taps in itertools.product(*(range(k) for k in kernel)):
            values = np.einsum("ngc...,gco->ngo...", split, kernels[(slice(None),) * 3 + taps])
            where = tuple(
                slice(t * d, t * d + s * (n - 1) + 1, s) for t, (n, _, s, d, _) in zip(taps, rows, strict=True)
            )
            y[(slice(None), slice(None), *where)] += values.reshape(x.shape[0], -1, *x.shape[2:])
        crop = tuple(slice(b, f - e) for b, e, f in zip(begin, end, full, strict=True))
        y = y[(slice(None), slice(None), *crop)]
        return (y if bias is None else y + bias.reshape(-1, *ones),)


class LRN(OpRun):
    """x / (bias + alpha / size * sum of x^2 over a window of channels)^beta (the evaluator's own walks the batch)."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        alpha: float | None = None,
        beta: float | None = None,
        bias: float | None = None,
        size: int | None = None,
    ) -> tuple[np.ndarray]:
        width, before = size or 1, ((size or 1) - 1) // 2
        padded = np.pad(x**2, [(0, 0), (before, width - 1 - before), *[(0, 0)] * (x.ndim - 2)])
        total = sum(padded[:, k : k + x.shape[1]] for k in range(width))
        scale = (1.0 if bias is None else bias) + (1e-4 if alpha is None else alpha) / width * total
        return ((x * scale ** -(0.75 if beta is None else beta)).astype(x.dtype),)


class LpNormalization(OpRun):
    """x over its p-norm (the evaluator's own forgets the absolute value for p = 1)."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None, p: int | None = None) -> tuple[np.ndarray]:
        norm = np.linalg.norm(x, ord=p or 2, axis=-1 if axis is None else axis, keepdims=True)
        return (np.divide(x, norm, out=np.zeros_like(x), where=norm > 0),)


class MeanVarianceNormalization(OpRun):
    """(x - mean) / (std + 1e-9) (the function ONNX defines holds float32 constants)."""

    op_domain = ""

    def _run(self, x: np.ndarray, axes: Sequence[int] | None = None) -> tuple[np.ndarray]:
        over = tuple(axes or (0, 2, 3))
        centred = x - x.mean(axis=over, keepdims=True)
        return ((centred / (x.std(axis=over, keepdims=True) + 1e-9)).astype(x.dtype),)


def _starts(
    sizes: Sequence[int],
    kernel: Sequence[int],
    auto_pad: str | None,
    ceil_mode: int | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> list[tuple[np.ndarray, int]]:
    """Per axis: where the windows begin (padding is below 0 or beyond the size) and the step between their taps."""
    rank = len(kernel)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    pads = pads or (0,) * (2 * rank)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        rows = zip(sizes, kernel, strides, dilations, strict=True)
        totals = [max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n) for n, k, s, d in rows]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = small + large if auto_pad == "SAME_UPPER" else large + small
    found = []
    for n, k, s, d, begin, end in zip(sizes, kernel, strides, dilations, pads[:rank], pads[rank:], strict=True):
        steps = (n + begin + end - (k - 1) * d - 1) / s
        count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
        if (count - 1) * s >= n + begin:  # a window that starts in the padding at the end
            count -= 1
        found.append((np.arange(count) * s - begin, d))
    return found


class MaxPool(OpRun):
    """The largest element of each window and its place in the flattened input (the evaluator's own picks others)."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        storage_order: int | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        kernel = tuple(kernel_shape or ())
        values: np.ndarray = x
        places: np.ndarray = np.arange(x.size).reshape(x.shape)
        starts = _starts(x.shape[2:], kernel, auto_pad, ceil_mode, dilations, pads, strides)
        for axis in range(len(kernel) - 1, -1, -1):  # the last first: ties go to the first in the order of the taps
            begin, step = starts[axis]
            moved, where = np.moveaxis(values, 2 + axis, -1), np.moveaxis(places, 2 + axis, -1)
            top = np.full((*moved.shape[:-1], len(begin)), -np.inf)
            at = np.full(top.shape, -1)
            for tap in range(kernel[axis]):
                reads = begin + tap * step
                inside = np.flatnonzero((reads >= 0) & (reads < x.shape[2 + axis]))
                better = moved[..., reads[inside]] > top[..., inside]
                top[..., inside] = np.where(better, moved[..., reads[inside]], top[..., inside])
                at[..., inside] = np.where(better, where[..., reads[inside]], at[..., inside])
            values, places = np.moveaxis(top, -1, 2 + axis), np.moveaxis(at, -1, 2 + axis)
        values = values.astype(x.dtype)
        return (values, places) if len(self.onnx_node.output) > 1 else (values,)


class LpPool(OpRun):
    """The p-norm of each window (the evaluator's own mistakes ceil_mode)."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None,
        p: int | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        kernel, power = tuple(kernel_shape or ()), p or 2
        total = np.abs(x) ** power
        starts = _starts(x.shape[2:], kernel, auto_pad, ceil_mode, dilations, pads, strides)
        for axis, (begin, step) in enumerate(starts):
            moved = np.moveaxis(total, 2 + axis, -1)
            sums = np.zeros((*moved.shape[:-1], len(begin)), x.dtype)
            for tap in range(kernel[axis]):
                reads = begin + tap * step
                inside = np.flatnonzero((reads >= 0) & (reads < x.shape[2 + axis]))
                sums[..., inside] += moved[..., reads[inside]]
            total = np.moveaxis(sums, -1, 2 + axis)
        return (total ** (1 / power),)


class GlobalLpPool(OpRun):
    """The p-norm of each channel."""

    op_domain = ""

    def _run(self, x: np.ndarray, p: int | None = None) -> tuple[np.ndarray]:
        power = p or 2
        return ((np.abs(x) ** power).sum(axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / power),)


class GlobalMaxPool(OpRun):
    """The largest element of each channel (the evaluator's own knows images only)."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


def _reflected(place: np.ndarray, low: float, high: float) -> np.ndarray:
    """Positions folded back into [low, high]."""
    span = high - low
    return low + np.abs((place - low + span) % (2 * span) - span) if span > 0 else np.zeros_like(place)


class GridSample(OpRun):
    """The input at the grid's points (the evaluator's own rounds them to float32)."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        grid: np.ndarray,
        align_corners: int | None = None,
        mode: str | None = None,
        padding_mode: str | None = None,
    ) -> tuple[np.ndarray]:
        rank = x.ndim - 2
        along = [self._taps(grid[..., rank - 1 - k], x.shape[2 + k], align_corners, mode) for k in range(rank)]
        batch = np.arange(len(x)).reshape(-1, *(1,) * rank)
        y = np.zeros((*grid.shape[:-1], x.shape[1]), x.dtype)
        for taps in itertools.product(*along):
            weight = np.ones(grid.shape[:-1], x.dtype)
            index = []
            for (place, share), n in zip(taps, x.shape[2:], strict=True):
                inside = (place >= 0) & (place < n)
                if padding_mode == "reflection":
                    edge = 0.0 if align_corners else 0.5
                    place = np.rint(_reflected(place, -edge, n - 1 + edge))
                weight = weight * (np.where(inside, share, 0.0) if padding_mode in (None, "zeros") else share)
                index.append(np.clip(place, 0, n - 1).astype(np.int64))
            y += weight[..., None] * np.moveaxis(x, 1, -1)[(batch, *index)]
        return (np.moveaxis(y, -1, 1),)

    @staticmethod
    def _taps(
        c: np.ndarray, n: int, align_corners: int | None, mode: str | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and weights of the elements around each coordinate, along one axis."""
        place = (c + 1) / 2 * (n - 1) if align_corners else ((c + 1) * n - 1) / 2
        if mode == "nearest":
            return [(np.rint(place), np.ones_like(place))]
        below = np.floor(place)
        r, a = place - below, -0.75
        if mode != "cubic":
            return [(below, 1 - r), (below + 1, r)]

        def near(t: np.ndarray) -> np.ndarray:
            return ((a + 2) * t - (a + 3)) * t * t + 1

        def far(t: np.ndarray) -> np.ndarray:
            return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

        return [(below - 1, far(1 + r)), (below, near(r)), (below + 1, near(1 - r)), (below + 2, far(2 - r))]


class AffineGrid(OpRun):
    """theta times the coordinates of the output (the evaluator's own rounds to float32)."""

    op_domain = ""

    def _run(self, theta: np.ndarray, size: np.ndarray, align_corners: int | None = None) -> tuple[np.ndarray]:
        axes = [
            np.linspace(-1, 1, n) if align_corners and n > 1 else (2 * np.arange(n) + 1) / n - 1
            for n in size[2:].tolist()
        ]
        points = np.stack([*reversed(np.meshgrid(*axes, indexing="ij")), np.ones(size[2:])], axis=-1)
        return (np.einsum("...k,njk->n...j", points, theta).astype(theta.dtype),)


CORRECTED = (
    ConvTranspose,
    LRN,
    LpNormalization,
    MeanVarianceNormalization,
    MaxPool,
    LpPool,
    GlobalLpPool,
    GlobalMaxPool,
    GridSample,
    AffineGrid,
)
