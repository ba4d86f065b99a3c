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
        if output_shape:
            totals = [max(0, f - o) for f, o in zip(full, output_shape[-rank:], strict=True)]
            begin, end = [t - t // 2 for t in totals], [t // 2 for t in totals]
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
        rank = len(kernel)
        strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
        pads = pads or (0,) * (2 * rank)
        values, places = x, np.arange(x.size).reshape(x.shape)
        for axis in range(rank - 1, -1, -1):  # the last axis first: ties go to the first in the order of the taps
            size, span = x.shape[2 + axis], (kernel[axis] - 1) * dilations[axis] + 1
            steps = (size + pads[axis] + pads[rank + axis] - span) / strides[axis]
            count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
            if (count - 1) * strides[axis] >= size + pads[axis]:  # a window that starts in the padding at the end
                count -= 1
            starts = np.arange(count) * strides[axis] - pads[axis]
            moved, where = np.moveaxis(values, 2 + axis, -1), np.moveaxis(places, 2 + axis, -1)
            top = np.full((*moved.shape[:-1], count), -np.inf)
            at = np.full(top.shape, -1)
            for tap in range(kernel[axis]):
                reads = starts + tap * dilations[axis]
                inside = np.flatnonzero((reads >= 0) & (reads < size))
                better = moved[..., reads[inside]] > top[..., inside]
                top[..., inside] = np.where(better, moved[..., reads[inside]], top[..., inside])
                at[..., inside] = np.where(better, where[..., reads[inside]], at[..., inside])
            values, places = np.moveaxis(top, -1, 2 + axis), np.moveaxis(at, -1, 2 + axis)
        values = values.astype(x.dtype)
        return (values, places) if len(self.onnx_node.output) > 1 else (values,)


class GlobalMaxPool(OpRun):
    """The largest element of each channel (the evaluator's own knows images only)."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


CORRECTED = (ConvTranspose, MaxPool, GlobalMaxPool)
