"""Operands of different shapes and resolutions brought together, as arithmetic rows need them.

The arrays of `Moments` resolve an activation's units; along the other axes (positions, examples) it is the same. A
constant that meets it (bias, position embedding, mask, scale) is therefore averaged over positions; its variance there
is `fixed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Moments, Range
from gradlint.graph import dims
from gradlint.runs import Counts, averages, common, stored
from gradlint.transfer import Context

_LARGEST = 1 << 20  # elements of the arrays that describe one value

Shape = tuple[int, ...]


def _ranked(array: np.ndarray, rank: int) -> np.ndarray:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def collapsed_axes(array: np.ndarray, reference: Shape) -> tuple[int, ...]:
    """The axes over which a constant of the output's rank is averaged beside arrays of shape `reference`.

    It keeps its resolution along the axes that `reference` resolves. Where that resolves none (a raw input plus a bias
    per channel) it keeps one: axis 1 from rank 4 on, the last of rank 2 and 3, or the only one it varies along.
    """
    rank = len(reference)
    own = [a for a, n in enumerate(array.shape) if n > 1]
    keep = {a for a, n in enumerate(reference) if n > 1}
    if not keep and rank > 1:
        usual = 1 if rank >= 4 else rank - 1
        keep = {usual} if array.shape[usual] > 1 else set(own if len(own) == 1 else ())
    return tuple(a for a in own if a not in keep)


def align(array: np.ndarray, reference: Shape, counts: Counts | None = None) -> Moments:
    """Moments of a constant beside an activation described by arrays of shape `reference` (the output's rank).

    counts: the runs of like positions in these, over each of which the constant is averaged too.
    """
    array = _ranked(np.asarray(array), len(reference))
    axes = collapsed_axes(array, reference)
    runs = counts if counts is not None and any(counts) else None
    if not axes and runs is None:
        return Moments.constant(array)
    if array.dtype.kind == "f":
        array = np.maximum(array, np.asarray(-1e30, array.dtype))  # minus infinity has no variance
    mean = array.mean(axis=axes, keepdims=True, dtype=np.float64)
    zero = np.zeros((1,) * array.ndim)
    if runs is None:
        return Moments(mean, array.var(axis=axes, keepdims=True, dtype=np.float64), zero, zero)
    mean = averages(mean, runs)
    return Moments(mean, averages(np.square(array - mean).mean(axis=axes, keepdims=True), runs), zero, zero)


def align_range(array: np.ndarray, reference: Shape) -> Range:
    """The interval of a constant, per unit that `align` tells apart."""
    array = _ranked(np.asarray(array), len(reference))
    axes = collapsed_axes(array, reference)
    return Range(array.min(axis=axes, keepdims=True).astype(float), array.max(axis=axes, keepdims=True).astype(float))


def stretch(x: Moments, own: Shape, out: Shape) -> Moments:
    """Moments of a value of shape `own` broadcast to `out`: without positions of its own it is shared over new ones."""
    x = x.map(lambda a: _ranked(a, len(out)))
    own = (1,) * (len(out) - len(own)) + own
    new = any(n == 1 and m > 1 for n, m in list(zip(own, out, strict=True))[1:])
    positions = any(n > 1 and x.mean.shape[a] == 1 for a, n in enumerate(own) if a > 0)
    return Moments(x.mean, x.fixed, x.shared + x.local, 0 * x.local) if new and not positions else x


def _collapse(x: Moments, reference: Shape) -> Moments:
    """Averaged over the axes that `reference` does not resolve; what the means differed by there becomes fixed."""
    axes = tuple(a for a, n in enumerate(reference) if n == 1)

    def mean(a: Array) -> Array:
        return a.mean(axis=axes, keepdims=True)

    return Moments(mean(x.mean), mean(x.fixed) + x.mean.var(axis=axes, keepdims=True), mean(x.shared), mean(x.local))


def shape_of(*arrays: Array) -> Shape:
    return np.broadcast_shapes(*(a.shape for a in arrays))


def operands(
    ctx: Context, node: ir.Node, xs: Sequence[Moments | None], like: Shape | None = None
) -> list[Moments] | None:
    """All inputs of an arithmetic node in the output's rank, constants aligned with the activations.

    like: the shape of the arrays that describe the output where no input varies. None where something isn't known.
    """
    out = dims(node.outputs[0])
    if out is None:
        return None
    found: dict[int, Moments] = {}
    for k, value in enumerate(node.inputs):
        x, own = xs[k], dims(value)
        if value is not None and ctx.varies(value):
            if x is None or own is None:
                return None
            found[k] = stretch(x, own, out)
    arrays = [(x.mean, x.fixed, x.shared, x.local) for x in found.values()]
    every = [a for four in arrays for a in four]
    reference = shape_of(*every) if every else like or (1,) * len(out)
    if every and stored(*every) > _LARGEST:
        every = list(max(arrays, key=lambda four: stored(*four)))
        reference = shape_of(*every)
        found = {k: _collapse(x, reference) for k, x in found.items()}
    counts = common(*every) if every else None
    for k, value in enumerate(node.inputs):
        if k not in found:
            array = ctx.array(value)
            if array is None:
                return None
            found[k] = align(array, reference, counts)
    return [found[k] for k in range(len(node.inputs))]


def boxes(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> list[Range] | None:
    """The ranges of all inputs in the output's rank, constants aligned; None where one isn't known."""
    out = dims(node.outputs[0])
    if out is None:
        return None
    rank = len(out)
    moving = {k: x for k, x in enumerate(xs) if x is not None and ctx.varies(node.inputs[k])}
    found = {k: Range(_ranked(x.lo, rank), _ranked(x.hi, rank)) for k, x in moving.items()}
    reference = np.broadcast_shapes((1,) * rank, *(shape_of(x.lo, x.hi) for x in found.values()))
    for k, value in enumerate(node.inputs):
        if k in found:
            continue
        array = None if ctx.varies(value) else ctx.array(value)
        if array is None:
            return None
        found[k] = align_range(array, reference)
    return [found[k] for k in range(len(node.inputs))]


def fan(node: ir.Node, index: int) -> float | None:
    """sqrt of how many output elements one element of the input was broadcast to."""
    out, own = dims(node.outputs[0]), dims(node.inputs[index])
    return None if out is None or own is None else math.sqrt(math.prod(out) / max(1, math.prod(own)))
