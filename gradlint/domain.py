"""What an analysis knows about one value: its moments, the second moment of its gradient, its range.

Every array *broadcasts* against the value it describes: size 1 along an axis means "the same everywhere along it". Axes
along which the arrays have size 1 although the value has more are its *positions* (pixels, tokens); the others are its
*units* (channels, features). Activations of a convolution are described by arrays of shape (1, C, 1, 1). Positions that
differ by group (a class token, the patches) are runs of equal elements: `gradlint.runs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of a value, the variance split by what it varies with.

    fixed: over positions, the same for every example (padding, position embeddings);
    shared: over examples, the same at every position (what global pooling keeps);
    local: over examples and positions at once;
    skew: the third central moment where it matters, as a rectified value's (None: 0, as a normal's).
    """

    mean: Array
    fixed: Array
    shared: Array
    local: Array
    skew: Array | None = None

    @property
    def var(self) -> Array:
        return self.fixed + self.shared + self.local

    @property
    def second(self) -> Array:
        """E[x^2] per unit."""
        return self.mean**2 + self.var

    @property
    def std(self) -> float:
        """Standard deviation over examples, positions and units; infinite where a moment overflows."""
        mean, second = float(np.mean(self.mean)), float(np.mean(self.second))
        if not (math.isfinite(second) and math.isfinite(mean)):
            return math.inf
        return math.sqrt(max(0.0, second - mean * mean))

    def map(self, move: Callable[[Array], Array]) -> Moments:
        """The same moments in another arrangement of axes."""
        skew = None if self.skew is None else move(self.skew)
        return Moments(move(self.mean), move(self.fixed), move(self.shared), move(self.local), skew)

    def scaled(self, factor: Array | float, shift: Array | float = 0.0) -> Moments:
        """Moments of factor * x + shift, with a known factor per unit."""
        square = np.square(factor)
        parts = (self.fixed * square, self.shared * square, self.local * square)
        skew = None if self.skew is None else self.skew * (square * factor)
        return Moments(self.mean * factor + shift, *parts, skew)

    @staticmethod
    def constant(array: Array) -> Moments:
        zero = np.zeros((1,) * np.ndim(array))
        return Moments(np.asarray(array, np.float64), zero, zero, zero)

    @staticmethod
    def normal(rank: int, mean: float = 0.0, var: float = 1.0) -> Moments:
        """Independent elements, alike everywhere."""
        one = np.ones((1,) * rank)
        return Moments(mean * one, 0 * one, 0 * one, var * one)


@dataclass(frozen=True, slots=True)
class Gradient:
    """E[g^2] of a value's gradient per element, split into the part that is the same at every position and the rest.

    balanced: the part of `local` that sums to zero over the positions of each example, so that a weight behind it does
    not see what all positions have in common (keys of attention: softmax cancels what they share). None: nothing.
    aligned: second moment of the mean over positions of g z, z the standardised value: an activation lets through more
    of the gradient where its input is large, so that what was the same at every position goes along with z. None: 0.
    upper: second moment where the value is in the upper half of its distribution: behind a sum that is rectified again,
    what a Relu has let through is let through more often than what it has not. None: as in the lower half.

    For a value that depends on the input g is the gradient of the per-example loss; for a weight, of the batch loss.
    Under the linear loss with independent normal targets both have the same second moment for any batch size.
    """

    shared: Array
    local: Array
    balanced: Array | None = None
    aligned: Array | None = None
    upper: Array | None = None

    @property
    def total(self) -> Array:
        return self.shared + self.local

    def map(self, move: Callable[[Array], Array]) -> Gradient:
        parts = (self.balanced, self.aligned, self.upper)
        balanced, aligned, upper = (None if part is None else move(part) for part in parts)
        return Gradient(move(self.shared), move(self.local), balanced, aligned, upper)

    def scaled(self, square: Array | float) -> Gradient:
        """The gradient times a factor whose square is `square`; one number keeps the balance."""
        balanced = self.balanced * square if self.balanced is not None and np.ndim(square) == 0 else None
        aligned, upper = (None if part is None else part * square for part in (self.aligned, self.upper))
        return Gradient(self.shared * square, self.local * square, balanced, aligned, upper)

    def __add__(self, other: Gradient) -> Gradient:
        """Where branches meet their gradients add; taken as uncorrelated, so second moments add."""
        balanced, aligned = _either(self.balanced, other.balanced), _either(self.aligned, other.aligned)
        halves = [g.total if g.upper is None else g.upper for g in (self, other)]
        upper = None if self.upper is None and other.upper is None else halves[0] + halves[1]
        return Gradient(self.shared + other.shared, self.local + other.local, balanced, aligned, upper)


def _either(a: Array | None, b: Array | None) -> Array | None:
    """The sum of what is known."""
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True, slots=True)
class Range:
    """An interval that holds every element for every input in the declared range (sound; lo <= hi)."""

    lo: Array
    hi: Array

    def map(self, move: Callable[[Array], Array]) -> Range:
        return Range(move(self.lo), move(self.hi))


def mean_over(array: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Mean over `axes` of the full value that `array` describes, axes kept with size 1 (no full value is built)."""
    return array.mean(axis=tuple(a for a in axes if array.shape[a] > 1), keepdims=True)


def mean_element(array: Array, shape: tuple[int, ...]) -> float:
    """Mean over all elements of the value: arrays that broadcast weigh every element alike, so a plain mean."""
    return float(np.mean(array))
