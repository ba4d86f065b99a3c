"""Arrays that keep equal neighbours along an axis once, with their count: run-length encoding, axis by axis.

A class token before 196 patches is two entries with the counts (1, 196), and costs what two tokens cost. `Runs` follows
numpy's protocols (NEP 13, NEP 18), so that rows written for plain arrays work on it unchanged: arithmetic works on the
entries, sums weigh them by their counts, whatever else is asked for is answered by the full array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from gradlint.domain import Array

Counts = tuple[tuple[int, ...] | None, ...]  # per axis the lengths of its runs; None: every element has its own entry
Axes = int | Sequence[int] | None


class Runs(NDArrayOperatorsMixin):
    """An array whose entry `values[i]` along an axis stands for `counts[axis][i]` neighbours."""

    __slots__ = ("counts", "shape", "values")

    def __init__(self, values: Array, counts: Counts) -> None:
        self.values, self.counts = values, counts
        self.shape = tuple(n if c is None else sum(c) for n, c in zip(values.shape, counts, strict=True))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[k] for k in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        full = _refined(self, (None,) * self.ndim)
        return full if dtype is None else full.astype(dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "__call__" and ufunc is np.matmul and not kwargs:
            return _matmul(*inputs)
        if method == "__call__" and ufunc.signature is None and "out" not in kwargs and "where" not in kwargs:
            (*plain,), wrap = entries(*inputs)
            return wrap(ufunc(*plain, **kwargs))
        return getattr(ufunc, method)(*(_full(a) for a in inputs), **kwargs)

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if func in _BY_ENTRY:
            (*plain,), wrap = entries(*args)
            return wrap(func(*plain, **kwargs))
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        return func(*(_full(a) for a in args), **{k: _full(a) for k, a in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(_full(self), name)

    def __getitem__(self, key: Any) -> Array:
        return _item(self, key if isinstance(key, tuple) else (key,))

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        return encoded(self.values.astype(dtype, copy=copy), self.counts)

    def sum(self, axis: Axes = None, keepdims: bool = False) -> Array:
        """Every entry counts as often as it occurs."""
        total = self.values
        for k in _axes(axis, self.ndim):
            if self.counts[k] is not None:
                total = total * _weights(self, k)
        return _kept(self, total.sum(axis=_axes(axis, self.ndim), keepdims=True), axis, keepdims)

    def mean(self, axis: Axes = None, keepdims: bool = False) -> Array:
        return self.sum(axis, keepdims) / max(1, math.prod(self.shape[k] for k in _axes(axis, self.ndim)))

    def var(self, axis: Axes = None, keepdims: bool = False) -> Array:
        return cast(Array, np.square(self - self.mean(axis, keepdims=True)).mean(axis, keepdims=keepdims))

    def max(self, axis: Axes = None, keepdims: bool = False) -> Array:
        return _kept(self, self.values.max(axis=_axes(axis, self.ndim), keepdims=True), axis, keepdims)

    def min(self, axis: Axes = None, keepdims: bool = False) -> Array:
        return _kept(self, self.values.min(axis=_axes(axis, self.ndim), keepdims=True), axis, keepdims)

    def any(self) -> bool:
        return bool(self.values.any())

    def all(self) -> bool:
        return bool(self.values.all())

    def transpose(self, axes: Sequence[int]) -> Array:
        return encoded(self.values.transpose(axes), tuple(self.counts[k] for k in axes))

    def reshape(self, *shape: Any) -> Array:
        return _reshaped(self, tuple(shape[0]) if len(shape) == 1 and not np.isscalar(shape[0]) else shape)


def encoded(values: Array, counts: Counts) -> Array:
    """An array by its entries: plain where every element has its own."""
    return values if all(c is None for c in counts) else cast(Array, Runs(values, counts))


def grouped(*arrays: Array) -> tuple[int, ...]:
    """The axes along which one of the arrays, of the same rank, keeps runs: positions told apart in groups."""
    return tuple(k for k in range(arrays[0].ndim) if any(_along(a, k) is not None for a in arrays))


def positional(axis: int, *arrays: Array) -> bool:
    """Do the arrays take an axis for one of positions, telling apart groups of them at most?"""
    return all(a.shape[axis] == 1 or axis % a.ndim in grouped(a) for a in arrays)


def stored(*arrays: Array) -> int:
    """How many entries describe, together, what the arrays describe."""
    counts = common(*arrays)
    sizes = np.broadcast_shapes(*(a.shape for a in arrays))
    return math.prod(n if c is None else len(c) for n, c in zip(sizes, counts, strict=True))


def common(*arrays: Array) -> Counts:
    """Per axis, counted from the last, the runs within which none of the arrays changes."""
    rank = max(map(np.ndim, arrays))
    return tuple(_merged([_along(a, k) for a in arrays if _size(a, k) > 1]) for k in range(-rank, 0))


def entries(*arrays: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The entries of arrays that broadcast, brought to common runs, and what makes arrays of results per entry.

    Results (one array, or several) may have further axes in front.
    """
    first = next((a for a in arrays if type(a) is Runs), None)
    if first is None:
        return list(arrays), lambda result: result
    counts = first.counts
    if all(_fits(a, counts) for a in arrays):
        plain = [a.values if type(a) is Runs else a for a in arrays]
    else:
        counts = common(*arrays)
        plain = [_refined(a, counts) for a in arrays]

    def wrap(result: Any) -> Any:
        if isinstance(result, (tuple, list)):
            return tuple(wrap(r) for r in result)
        return encoded(result, (None,) * (result.ndim - len(counts)) + counts)

    return plain, wrap


def averages(array: Array, counts: Counts) -> Array:
    """An array of the rank of `counts` averaged over each of these runs (along axes of size 1 there are none)."""
    counts = tuple(c if n > 1 else None for c, n in zip(counts, array.shape, strict=True))
    for k, c in enumerate(counts):
        if c is not None:
            starts = np.cumsum((0, *c[:-1]))
            lengths = np.reshape(c, (-1,) + (1,) * (array.ndim - 1 - k))
            array = np.add.reduceat(array, starts, axis=k) / lengths
    return encoded(array, counts)


def side_by_side(parts: Sequence[Array], sizes: Sequence[int], axis: int) -> Array:
    """Arrays joined along `axis`; a part of size 1 there is the same for the whole of its size: one run.

    Where all parts are the same, so is the whole.
    """
    if all(p.shape[axis] == 1 and np.array_equal(p, parts[0]) for p in parts):
        return parts[0]
    parts, sizes = zip(*((p, n) for p, n in zip(parts, sizes, strict=True) if n), strict=True)
    lengths: list[int] = []
    for p, n in zip(parts, sizes, strict=True):
        lengths += (n,) if _size(p, axis) == 1 else _along(p, axis) or (1,) * n
    own = [_entered(p, axis) for p in parts]
    counts = common(*(p[(slice(None),) * axis + (slice(0, 1),)] for p in own))
    plain = [_refined(p, counts) for p in own]
    other = np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in plain))
    full = [np.broadcast_to(p, (*other[:axis], p.shape[axis], *other[axis + 1 :])) for p in plain]
    along = None if max(lengths, default=1) == 1 else tuple(lengths)
    return encoded(np.concatenate(full, axis), (*counts[:axis], along, *counts[axis + 1 :]))


def run(a: Array, axis: int, size: int) -> Array:
    """The array stretched to a size along an axis; where it has size 1 it becomes one run there."""
    if a.shape[axis] == size:
        return a
    counts = a.counts if isinstance(a, Runs) else (None,) * a.ndim
    axis %= a.ndim
    return encoded(a.values if isinstance(a, Runs) else a, (*counts[:axis], (size,), *counts[axis + 1 :]))


def settled(a: Array, axis: int) -> Array:
    """The array with size 1 along an axis that is one run."""
    if not isinstance(a, Runs) or len(a.counts[axis] or ()) != 1:
        return a
    return encoded(a.values, (*a.counts[:axis], None, *a.counts[axis + 1 :]))


# -- runs of several arrays --------------------------------------------------------------------------------------------


def _size(a: Any, k: int) -> int:
    """The size along an axis, counted from the last or not; 1 where there is none."""
    return a.shape[k] if -np.ndim(a) <= k < np.ndim(a) else 1


def _along(a: Any, k: int) -> tuple[int, ...] | None:
    return a.counts[k] if isinstance(a, Runs) else None


def _merged(found: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Runs that end wherever one of the given ones does."""
    if not found or any(c is None for c in found):
        return None
    if all(c == found[0] for c in found):
        return found[0]
    ends = np.unique(np.concatenate([np.cumsum(c) for c in found if c is not None]))
    return tuple(int(n) for n in np.diff(ends, prepend=0))


def _fits(a: Any, counts: Counts) -> bool:
    """Has an array these runs, or size 1 where there are some?"""
    if type(a) is Runs:
        return a.counts == counts
    rank = np.ndim(a)
    return rank <= len(counts) and all(counts[k] is None or a.shape[k] == 1 for k in range(-rank, 0))


def _refined(a: Any, counts: Counts) -> Any:
    """The entries of an array for runs that lie within its own (None: for every element)."""
    if type(a) is not Runs:
        return a
    values = a.values
    for k in range(-a.ndim, 0):
        own, wanted = a.counts[k], counts[k]
        if own is None or own == wanted or a.shape[k] == 1:
            continue
        if wanted is None:
            values = np.repeat(values, own, axis=k)
        else:
            values = np.take(values, np.searchsorted(np.cumsum(own), np.cumsum(wanted)), axis=k)
    return values


def _full(a: Any) -> Any:
    if isinstance(a, (list, tuple)):
        return type(a)(_full(x) for x in a)
    return np.asarray(a) if type(a) is Runs else a


def _entered(a: Array, axis: int) -> Array:
    """The array with its entries along `axis` for elements."""
    return encoded(a.values, (*a.counts[:axis], None, *a.counts[axis + 1 :])) if isinstance(a, Runs) else a


def _axes(axis: Axes, rank: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(rank))
    return (axis % rank,) if isinstance(axis, int) else tuple(k % rank for k in axis)


def _weights(a: Runs, k: int) -> Array:
    return np.reshape(np.asarray(a.counts[k], np.float64), (-1,) + (1,) * (a.ndim - 1 - k))


def _kept(a: Runs, values: Array, axis: Axes, keepdims: bool) -> Array:
    """What a reduction over `axis` leaves (`values` has size 1 there)."""
    gone = _axes(axis, a.ndim)
    if not keepdims:
        values = values.reshape([n for k, n in enumerate(values.shape) if k not in gone])
        return encoded(values, tuple(c for k, c in enumerate(a.counts) if k not in gone))
    return encoded(values, tuple(None if k in gone else c for k, c in enumerate(a.counts)))


# -- numpy's functions -------------------------------------------------------------------------------------------------


def _matmul(a: Array, b: Array) -> Array:
    """The sum over the common axis takes every run as often as it is long."""
    if min(np.ndim(a), np.ndim(b)) < 2 or a.shape[-1] != b.shape[-2]:
        return np.matmul(_full(a), _full(b))
    lead = tuple(_merged([_along(x, k) for x in (a, b) if _size(x, k) > 1]) for k in range(-max(a.ndim, b.ndim), -2))
    inner = _merged([_along(a, -1), _along(b, -2)]) if a.shape[-1] > 1 else None
    x = _refined(a, (*lead, _along(a, -2), inner))
    y = _refined(b, (*lead, inner, _along(b, -1)))
    y = y if inner is None else y * np.reshape(np.asarray(inner, np.float64), (-1, 1))
    return encoded(np.matmul(x, y), (*lead, _along(a, -2), _along(b, -1)))


def _item(a: Runs, key: tuple[Any, ...]) -> Array:
    if any(isinstance(k, (np.ndarray, list, Runs)) for k in key):
        return cast(Array, _full(a)[tuple(_full(k) for k in key)])
    missing = (slice(None),) * (a.ndim - sum(k is not None and k is not Ellipsis for k in key))
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    values, counts, plain, axis = a.values, [], [], 0
    for k in (*key[:at], *missing, *key[at + 1 :]):
        c = None if k is None else a.counts[axis]
        if c is not None and k != slice(None):
            owner = np.repeat(np.arange(len(c)), c)[k]
            if isinstance(k, slice):
                starts = np.flatnonzero(np.diff(owner, prepend=-1))
                c = tuple(int(n) for n in np.diff([*starts, len(owner)]))
                values, k = np.take(values, owner[starts], axis=axis), slice(None)
            else:
                k = int(owner)
        axis += k is not None
        plain.append(k)
        if k is None or isinstance(k, slice):
            counts.append(c)
    return encoded(values[tuple(plain)], tuple(counts))


Groups = list[tuple[list[int], list[int]]]


def groups(src: tuple[int, ...], dst: tuple[int, ...]) -> Groups:
    """The smallest groups of axes of `src` and of `dst` that hold the same elements; axes of size 1 are in none."""
    found: Groups = []
    i = j = 0
    while i < len(src) or j < len(dst):
        left, right = ([i] if i < len(src) else []), ([j] if j < len(dst) else [])
        n, m = math.prod(src[k] for k in left), math.prod(dst[k] for k in right)
        while n != m:
            if n < m:
                left.append(left[-1] + 1 if left else i)
                n *= src[left[-1]]
            else:
                right.append(right[-1] + 1 if right else j)
                m *= dst[right[-1]]
        i, j = i + len(left), j + len(right)
        found.append(([k for k in left if src[k] != 1], [k for k in right if dst[k] != 1]))
    return [pair for pair in found if pair[0] or pair[1]]


def _reshaped(a: Runs, shape: tuple[int, ...]) -> Array:
    """Runs stay where their axis does, or becomes the last of several that are joined; else there are none."""
    if shape == a.shape:
        return cast(Array, a)
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        shape = tuple(a.size // max(1, known) if n == -1 else n for n in shape)
    kept, sizes = list(a.counts), list(shape)
    counts: list[tuple[int, ...] | None] = [None] * len(shape)
    for left, right in groups(a.shape, shape):
        entered = [k for k in left if a.counts[k] is not None]
        if not entered:
            continue
        own, lead = a.counts[left[-1]], math.prod(a.shape[k] for k in left[:-1])
        if all(a.values.shape[k] == 1 for k in left):
            for k in right:
                sizes[k], counts[k] = 1, (shape[k],)
        elif len(right) == 1 and entered == left[-1:] and own is not None:
            sizes[right[0]], counts[right[0]] = len(own) * lead, own * lead
        else:
            kept = [None if k in left else c for k, c in enumerate(kept)]
    return encoded(_refined(a, tuple(kept)).reshape(sizes), tuple(counts))


def _broadcast_to(a: Runs, shape: Sequence[int]) -> Array:
    """Along new elements there is one run."""
    lead = len(shape) - a.ndim
    grown = zip(shape, (None,) * lead + a.counts, (1,) * lead + a.shape, strict=True)
    counts = tuple((n,) if n != m else c for n, c, m in grown)
    return encoded(a.values.reshape((1,) * lead + a.values.shape), counts)


def _stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    if axis != 0:
        return np.stack([_full(a) for a in arrays], axis)
    plain, wrap = entries(*arrays)
    return cast(Array, wrap(np.stack(np.broadcast_arrays(*plain))))


def _swapaxes(a: Runs, i: int, j: int) -> Array:
    order = list(range(a.ndim))
    order[i], order[j] = order[j], order[i]
    return a.transpose(order)


def _expand_dims(a: Runs, axis: Any) -> Array:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    rank = a.ndim + len(axes)
    new = {k % rank for k in axes}
    return a[tuple(None if k in new else slice(None) for k in range(rank))]


_BY_ENTRY: set[Any] = {
    np.where, np.clip, np.nan_to_num, np.zeros_like, np.ones_like, np.full_like, np.broadcast_arrays,
}  # fmt: skip
_OWN: dict[Any, Callable[..., Any]] = {
    np.sum: Runs.sum, np.mean: Runs.mean, np.var: Runs.var, np.max: Runs.max, np.min: Runs.min,
    np.any: Runs.any, np.all: Runs.all,
    np.ndim: lambda a: a.ndim, np.shape: lambda a: a.shape, np.size: lambda a: a.size,
    np.reshape: lambda a, shape: _reshaped(a, tuple(shape)), np.transpose: Runs.transpose,
    np.broadcast_to: _broadcast_to, np.stack: _stack, np.swapaxes: _swapaxes, np.expand_dims: _expand_dims,
}  # fmt: skip
