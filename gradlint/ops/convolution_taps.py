"""The taps of a convolution's kernel: at which positions of the map each reads a value, and its products with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradlint.domain import Array
from gradlint.ops.convolution_gradient import Geometry

_BLOCK = 1 << 18  # elements of a weight worked on at a time: 1 MB in float32


# -- taps and positions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taps:
    """Positions of a map, by which taps of the kernel reach a stored value there.

    masks: (taps, classes), 1 where the tap does; share: the share of positions in each class; count: all positions.
    """

    masks: Array
    share: Array
    count: int

    @property
    def valid(self) -> Array:
        """Share of the positions at which each tap reaches a value."""
        return self.masks @ self.share


@lru_cache(maxsize=1024)
def _axis(here: int, there: int, kernel: int, stride: int, dilation: int, pad: int, back: bool) -> tuple[Array, Array]:
    """Classes along one axis of positions `here` reading `there`: forward q s + t d - p, back (u + p - t d) / s."""
    q, t = np.arange(here), np.arange(kernel)[:, None]
    if back:
        reached = q + pad - t * dilation
        inside = (reached % stride == 0) & (reached >= 0) & (reached < there * stride)
    else:
        reached = q * stride + t * dilation - pad
        inside = (reached >= 0) & (reached < there)
    masks, counts = np.unique(inside, axis=1, return_counts=True)
    return masks.astype(np.float64), counts / here


def taps(here: Sequence[int], there: Sequence[int], kernel: Sequence[int], at: Geometry, *, back: bool) -> Taps:
    """The classes of positions of a map of size `here` that reads one of size `there`, all axes together."""
    masks: Array = np.ones((1, 1))
    share: Array = np.ones(1)
    for args in zip(here, there, kernel, at.strides, at.dilations, at.begin, strict=True):
        m, s = _axis(*args, back)
        masks, share = np.asarray(np.kron(masks, m)), np.asarray(np.kron(share, s))
    return Taps(masks, share, math.prod(here))


# -- a kernel as matrices ----------------------------------------------------------------------------------------------


Reduce = Callable[[np.ndarray, Taps], np.ndarray]


def _over_taps(w: np.ndarray, m: Array) -> np.ndarray:
    """w (groups, rows, columns, taps) times m (taps, ..): one product of matrices."""
    return (w.reshape(-1, w.shape[3]) @ m.astype(np.float32)).reshape(*w.shape[:3], -1)


def each_tap(w: np.ndarray, t: Taps) -> np.ndarray:
    """W itself, tap by tap."""
    return w


def magnitude(w: np.ndarray, t: Taps) -> np.ndarray:
    """|W|, tap by tap."""
    return np.abs(w)


def mean_energy(w: np.ndarray, t: Taps) -> np.ndarray:
    """Mean over positions of the sum over taps of W^2: what an independent part goes through."""
    return _over_taps(np.square(w), t.valid[:, None])


def mean_level(w: np.ndarray, t: Taps) -> np.ndarray:
    """Square of the mean over positions of the sum over taps of W: how much of a shared part stays shared."""
    return np.square(_over_taps(w, t.valid[:, None]))


def coherent_energy(w: np.ndarray, t: Taps) -> np.ndarray:
    """Mean over positions of the square of the sum over taps of W: all that comes of a shared part.

    A form of rank `classes` at most; components under a thousandth of the whole are left out.
    """
    values, vectors = np.linalg.eigh((t.masks * t.share) @ t.masks.T)
    kept = values > 1e-3 * values.sum()
    return np.square(_over_taps(w, vectors[:, kept] * np.sqrt(values[kept]))).sum(axis=-1, keepdims=True)


def through(w: np.ndarray, t: Taps, terms: Sequence[tuple[Reduce, Array]], *, rows: bool) -> list[Array]:
    """For each (reduce, v): the sum of v times `reduce(w, t)` over the rows or columns of w.

    w is (groups, rows, columns, taps), v (groups, channels), the answer (groups, channels, 1 or taps). In float32, in
    blocks of rows that fit the cache; each v is scaled so that nothing underflows.
    """
    tops = [float(np.max(np.abs(v), initial=0.0)) or 1.0 for _, v in terms]
    scaled = [(v / top).astype(np.float32)[:, None] for (_, v), top in zip(terms, tops, strict=True)]
    groups, count, columns = w.shape[:3]
    step = max(1, _BLOCK // max(1, groups * columns * w.shape[3]))
    parts: list[list[Array]] = [[] for _ in terms]
    for k in range(0, count, step):
        block = w[:, k : k + step].astype(np.float32, copy=False)
        for (reduce, _), v, found in zip(terms, scaled, parts, strict=True):
            m = reduce(block, t)
            if rows:
                part = np.matmul(v[..., k : k + step], m.reshape(*m.shape[:2], -1)).reshape(groups, columns, -1)
            elif m.shape[3] == 1:
                part = np.matmul(m[..., 0], np.swapaxes(v, 1, 2))
            else:
                part = np.matmul(v[:, None], m)[:, :, 0]
            found.append(part.astype(np.float64))
    if rows:
        return [np.asarray(np.sum(found, axis=0) * top) for found, top in zip(parts, tops, strict=True)]
    return [np.concatenate(found, axis=1) * top for found, top in zip(parts, tops, strict=True)]
