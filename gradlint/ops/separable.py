"""Linear maps that act on each axis by a matrix of its own: average pooling, interpolation.

y = x with A_a (out, in) applied along every axis a of a few; the gradient goes through the transposed matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.ops.shape import averaged, averaged_gradient

Maps = Mapping[int, Array]  # axis -> (out, in)


# -- estimate ----------------------------------------------------------------------------------------------------------


def _sums(maps: Maps) -> tuple[float, float, float]:
    """Over output positions: the mean of the row sums, of their squares, and of the sums of squares."""
    rows = [a.sum(axis=1) for a in maps.values()]
    level = math.prod(float(r.mean()) for r in rows)
    square = math.prod(float(np.square(r).mean()) for r in rows)
    energy = math.prod(float(np.square(a).sum(axis=1).mean()) for a in maps.values())
    return level, square, energy


def separable_moments(maps: Maps, x: Moments) -> Moments:
    """What is the same at every position goes through the row sums, what is independent through the sums of squares.

    The mean and the shared part vary over positions as the row sums do. Neighbours are taken as uncorrelated.
    """
    x = averaged(x, list(maps))
    level, square, energy = _sums(maps)
    spread = max(square - level**2, 0.0)
    return Moments(
        x.mean * level,
        x.mean**2 * spread + x.fixed * energy,
        x.shared * level**2,
        x.shared * spread + x.local * energy,
    )


def separable_pullback(maps: Maps, g: Gradient) -> Gradient:
    """The same through the transposed matrices."""
    g = averaged_gradient(g, list(maps))
    level, square, energy = _sums({k: a.T for k, a in maps.items()})
    return Gradient(g.shared * level**2, g.shared * max(square - level**2, 0.0) + g.local * energy)


def separable_range(maps: Maps, x: Range) -> Range:
    """Positive and negative weights take opposite ends; the worst position of each axis."""
    axes = tuple(maps)
    lo, hi = x.lo.min(axis=axes, keepdims=True), x.hi.max(axis=axes, keepdims=True)
    for a in maps.values():
        up, down = np.maximum(a, 0).sum(axis=1), np.minimum(a, 0).sum(axis=1)
        low = np.min(up * lo[..., None] + down * hi[..., None], axis=-1)
        lo, hi = low, np.max(up * hi[..., None] + down * lo[..., None], axis=-1)
    slack = 1e-5 * np.maximum(np.abs(lo), np.abs(hi))
    return Range(lo - slack, hi + slack)


def separable_bound(maps: Maps) -> float:
    """The norm of a Kronecker product is the product of the norms; each from above by sqrt(norm_1 norm_inf)."""
    found = 1.0
    for a in maps.values():
        size = np.abs(a)
        found *= math.sqrt(float(size.sum(axis=0).max()) * float(size.sum(axis=1).max()))
    return found * (1 + 1e-6)


# -- gradient ----------------------------------------------------------------------------------------------------------


def _repeats(a: Array) -> int | None:
    """k where a (out, in) repeats every element k times, else None."""
    k = a.shape[0] // max(1, a.shape[1])
    return k if k * a.shape[1] == a.shape[0] and np.array_equal(a, np.repeat(np.eye(a.shape[1]), k, axis=0)) else None


def _picks(a: Array) -> tuple[np.ndarray, float] | None:
    """(index, factor) where a^T (in, out) only picks elements, times one factor, else None."""
    index = np.abs(a).argmax(axis=0)
    values = a[index, np.arange(a.shape[1])]
    alone = np.count_nonzero(a, axis=0).max(initial=0) == 1 and values.size > 0 and np.all(values == values[0])
    return (index, float(values[0])) if alone else None


def adjoint(b: Backward, g: ir.Value, maps: Maps, shape: Sequence[int | None]) -> ir.Value:
    """g, of `shape` (at most one size unknown, before the mapped axes), with A_a^T applied along each axis a.

    Sums of repeats by AveragePool, picks by Gather, the last axis and the rest by MatMul (measured).
    """
    assert g.dtype is not None
    kind, rank, now = g.dtype.numpy(), len(shape), [-1 if n is None else n for n in shape]
    maps = {k: a for k, a in maps.items() if not np.array_equal(a, np.eye(len(a)))}
    if maps and min(maps) >= 2 and all(_repeats(a) for a in maps.values()):
        kernel = [(_repeats(maps[k]) or 1) if k in maps else 1 for k in range(2, rank)]
        pooled = b.op("AveragePool", g, kernel_shape=kernel, strides=kernel)
        return b.op("Mul", pooled, b.scalar(float(math.prod(kernel)), g))
    picks = {k: found for k, a in maps.items() if k < rank - 1 and (found := _picks(a)) is not None}
    factor = math.prod(value for _, value in picks.values())
    for axis in sorted(maps, reverse=True):
        a = maps[axis]
        if axis in picks:
            g = b.op("Gather", g, b.constant(picks[axis][0]), axis=axis)
            now[axis] = a.shape[1]
            continue
        a, factor = a * factor, 1.0
        now[axis] = a.shape[1]
        if axis == rank - 1:
            g = b.op("MatMul", g, b.constant(a, kind))
        elif axis == rank - 2:
            g = b.op("MatMul", b.constant(a.T, kind), g)
        else:
            columns = b.op("Reshape", g, b.constant([-1, a.shape[0], math.prod(now[axis + 1 :])]))
            g = b.op("Reshape", b.op("MatMul", b.constant(a.T, kind), columns), b.constant(now))
    return g if factor == 1.0 else b.op("Mul", g, b.scalar(factor, g))
