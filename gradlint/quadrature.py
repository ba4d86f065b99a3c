"""Expectations of a function of a normal variable: E[h(z)], E[h(z)^2] and its Hermite spectrum, per unit.

Smooth functions by the trapezoidal rule, which converges exponentially for them (Trefethen & Weideman 2014), with nodes
0.7 apart in z: 0.3 % for features as wide as those of Sigmoid and Tanh. Much wider normals, and kinks, by cells
that are fine around 0 and around the mean; piecewise linear functions in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gradlint.domain import Array
from gradlint.runs import entries

Function = Callable[[Array], Array]
Level = Array | float

_ORDER = 6  # of the Hermite expansion
_REACH = 8.5  # standard deviations that cells cover

# -- the normal distribution -------------------------------------------------------------------------------------------

_STEP = 64.0  # entries of the table per unit
_TABLE = np.array([math.erfc(k / _STEP) for k in range(int(27 * _STEP) + 1)])
_TABLE_SLOPE = np.array([-2 / math.sqrt(math.pi) * math.exp(-((k / _STEP) ** 2)) for k in range(len(_TABLE))])


def erfc(x: Array) -> Array:
    """1 - erf(x), elementwise: Taylor's expansion to order 4 about the nearest table entry; error below 1e-10."""
    size = np.fmin(np.abs(x), 26.9)  # a NaN (infinity less infinity) counts as far out
    k = np.rint(size * _STEP).astype(np.intp)
    c = k / _STEP
    h = size - c
    series = h * (1 - h * (c - h * ((2 * c**2 - 1) / 3 - h * (2 * c**2 - 3) * c / 6)))
    value = _TABLE[k] + _TABLE_SLOPE[k] * series
    return np.where(x >= 0, value, 2 - value)


def erf(x: Array) -> Array:
    return np.copysign(1 - erfc(np.abs(x)), x)


def density(t: Array) -> Array:
    """The standard normal density."""
    return np.exp(-0.5 * np.minimum(np.square(t), 1400.0)) * (1 / math.sqrt(2 * math.pi))


def above(t: Array) -> Array:
    """P(u > t) for u ~ N(0, 1)."""
    return 0.5 * erfc(t * math.sqrt(0.5))


def mass(lo: Array, hi: Array) -> Array:
    """P(lo < u < hi), taken in the tail that is smaller: accurate far out on both sides."""
    right = lo + hi > 0
    return np.maximum(above(np.where(right, lo, -hi)) - above(np.where(right, hi, -lo)), 0.0)


# -- piecewise linear functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piecewise:
    """slopes[i] * z + offsets[i] for breaks[i - 1] < z <= breaks[i]; numbers, or arrays with one entry per unit."""

    breaks: tuple[Level, ...]
    slopes: tuple[Level, ...]
    offsets: tuple[Level, ...]

    def __call__(self, z: Array) -> Array:
        value = _line(self.slopes[0], self.offsets[0], z)
        for c, slope, offset in zip(self.breaks, self.slopes[1:], self.offsets[1:], strict=True):
            value = np.where(z > c, _line(slope, offset, z), value)
        return value

    def derivative(self) -> Piecewise:
        return Piecewise(self.breaks, (0.0,) * len(self.slopes), self.slopes)

    def over(self, lo: Array, hi: Array) -> list[tuple[Array, Array, Any]]:
        """Per piece: its values at the ends of what [lo, hi] leaves of it, and whether it leaves anything."""
        edges = (-np.inf, *self.breaks, np.inf)
        found = []
        for k, (slope, offset) in enumerate(zip(self.slopes, self.offsets, strict=True)):
            left, right = np.maximum(lo, edges[k]), np.minimum(hi, edges[k + 1])
            found.append((_line(slope, offset, left), _line(slope, offset, right), left <= right))
        return found


def pieces(breaks: Sequence[Level], slopes: Sequence[Level], offsets: Sequence[Level]) -> tuple[Piecewise, Piecewise]:
    """A piecewise linear function and its derivative."""
    f = Piecewise(tuple(breaks), tuple(slopes), tuple(offsets))
    return f, f.derivative()


def _line(slope: Level, offset: Level, z: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.equal(slope, 0), np.asarray(offset, float), slope * z + offset)


def indicator(chosen: Callable[[Array], np.ndarray[Any, np.dtype[np.bool_]]]) -> Piecewise:
    """1 where `chosen(z)` holds, 0 elsewhere; its jumps found by bisection (0.005 apart or more)."""
    z = np.sinh(np.linspace(-12.0, 12.0, 4801))
    flags = chosen(z)
    (turns,) = np.nonzero(flags[1:] != flags[:-1])
    lo, hi, left = z[turns], z[turns + 1], flags[turns]
    for _ in range(50):
        middle = (lo + hi) / 2
        same = chosen(middle) == left
        lo, hi = np.where(same, middle, lo), np.where(same, hi, middle)
    values = [float(flags[0]), *(float(not flag) for flag in left)]
    return Piecewise(tuple(float(c) for c in lo), (0.0,) * len(values), tuple(values))


# -- spectra -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spectrum:
    """E[h(z)], E[h(z)^2], and for z ~ N(mean, var) the squared Hermite coefficients of h, by order."""

    mean: Array
    second: Array
    coefficients: Array

    def correlated(self, rho: Array) -> Array:
        """E[h(z1) h(z2)] for z1, z2 with correlation rho (Mehler): sum of c_k^2 rho^k, the tail at the last order."""
        total = self.coefficients[-1] * 0.0
        for c in self.coefficients[::-1]:
            total = total * rho + c
        tail = np.maximum(self.second - self.coefficients.sum(axis=0), 0.0)
        return total + tail * rho ** len(self.coefficients)


def spectrum(
    h: Function | Piecewise,
    mean: Array,
    var: Array,
    *,
    kinked: bool,
    kinks: Sequence[float] = (),
    per_unit: bool = False,
) -> Spectrum:
    """Hermite spectrum of h under z ~ N(mean, var), per unit. Assumes the pre-activation is normal.

    kinked: h or its derivative jumps; `kinks`: where, as far as known; per_unit: h itself differs between units.
    """
    if per_unit:
        mean, var = np.asarray(mean), np.asarray(var)
    (mean, var), wrap = entries(mean, var)
    mean, var = np.broadcast_arrays(mean, var)
    std = np.sqrt(np.maximum(var, 1e-300))
    found = _closed_form(h, mean, std) if isinstance(h, Piecewise) else None
    if found is None and not per_unit:
        found = _tabulated(h, mean, std, kinked, kinks)
    if found is None:
        second, coefficients = _integrated(h, mean, std, kinked, kinks)
        found = Spectrum(coefficients[0], np.maximum(second, coefficients[0] ** 2), coefficients**2)
    return Spectrum(*wrap((found.mean, found.second, found.coefficients)))


def _integrated(h: Function, mean: Array, std: Array, kinked: bool, kinks: Sequence[float]) -> tuple[Array, Array]:
    """E[h^2] and the signed Hermite coefficients."""
    u, w = _nodes(mean, std, kinked, kinks)
    with np.errstate(all="ignore"):
        values = h(mean[..., None] + std[..., None] * u)
        weighted = values * w
        return (weighted * values).sum(axis=-1), _moments(weighted, u)


def _tabulated(h: Function, mean: Array, std: Array, kinked: bool, kinks: Sequence[float]) -> Spectrum | None:
    """The spectrum of many units by bilinear interpolation in (mean, ln std); None where a table would not be smaller.

    What is interpolated is smooth in both: E[h], Var[h] / std^2, coefficients / std.
    """
    if mean.size < 512 or not (np.isfinite(mean).all() and np.isfinite(std).all()):
        return None
    low, log = float(std.min()), np.log(std)
    spans = (mean, 0.1 * math.sqrt(0.3 + low**2)), (log, 0.08)
    counts = [2 + math.ceil(min((float(v.max()) - float(v.min())) / step, 1e9)) for v, step in spans]
    if math.prod(counts) * 3 > mean.size:
        return None
    axes = [np.linspace(v.min(), v.max(), n) for (v, _), n in zip(spans, counts, strict=True)]
    m, s = np.meshgrid(axes[0], np.exp(axes[1]), indexing="ij")
    second, coefficients = _integrated(h, m, s, kinked, kinks)
    spread = np.maximum(second - coefficients[0] ** 2, 0)
    table = np.concatenate([coefficients[:1], coefficients[1:] / s, [spread / s**2]])
    places = [
        np.clip((v - axis[0]) / max(axis[-1] - axis[0], 1e-300) * (n - 1), 0, n - 1)
        for (v, _), axis, n in zip(spans, axes, counts, strict=True)
    ]
    i, j = (np.minimum(x.astype(np.intp), n - 2) for x, n in zip(places, counts, strict=True))
    a, b = places[0] - i, places[1] - j
    found = (1 - a) * ((1 - b) * table[:, i, j] + b * table[:, i, j + 1]) + a * (
        (1 - b) * table[:, i + 1, j] + b * table[:, i + 1, j + 1]
    )
    coefficients = np.concatenate([found[:1], found[1:-1] * std])
    return Spectrum(found[0], found[0] ** 2 + found[-1] * std**2, coefficients**2)


# -- skewed variables --------------------------------------------------------------------------------------------------

_MEAN = 1 / math.sqrt(2 * math.pi)  # of max(u, 0), u standard normal, as are
_VAR, _THIRD = 0.5 - _MEAN**2, 0.5 * _MEAN + 2 * _MEAN**3  # variance and third central moment
_MOST = 0.98  # of a variance: what the rectified part may have
_HALF, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_HALF = np.concatenate([[0.0], 2.5 * (_HALF + 1)])  # nodes of max(u, 0): half of it is 0
_WEIGHTS = np.concatenate([[0.5], 0.5 * _WEIGHTS * density(_HALF[1:]) / (_WEIGHTS @ density(_HALF[1:]))])


def third_moments(h: Piecewise, mean: Array, var: Array, skew: Array | None = None) -> tuple[Array, Array, Array]:
    """E[h(z)], E[h(z)^2] and the third central moment of h(z), for z of the given third central moment.

    z is taken as a max(u, 0) + b, u and b normal, the first of these with all of the skewness: exact for a rectified
    normal plus a normal, which is what a residual stream of rectified sums looks like.
    """
    (mean, var, *rest), wrap = entries(mean, var, *(() if skew is None else (skew,)))
    if not rest:
        raw = _raw_moments(h, mean, np.sqrt(np.maximum(var, 1e-300)))
    else:
        raw = _raw_moments(h, *_parts(mean, var, rest[0])) @ _WEIGHTS
    first, second, third = raw
    return wrap((first, np.maximum(second, first**2), third - 3 * first * second + 2 * first**3))


def halves(h: Piecewise, mean: Array, var: Array, skew: Array | None = None) -> tuple[Array, Array]:
    """E[h(z)^2] where u < 0 and where u > 0: z = mean + std u, or as in `third_moments`."""
    (mean, var, *rest), wrap = entries(mean, var, *(() if skew is None else (skew,)))
    if rest:
        centres, std = _parts(mean, var, rest[0])
        second = _raw_moments(h, centres, std)[1]
        lower, upper = second[..., 0], 2 * (second[..., 1:] @ _WEIGHTS[1:])
    else:
        std = np.sqrt(np.maximum(var, 1e-300))
        lower, upper = (_raw_moments(h, mean, std, *ends)[1] * 2 for ends in ((-38.0, 0.0), (0.0, 38.0)))
    return wrap((lower, upper))


def _parts(mean: Array, var: Array, skew: Array) -> tuple[Array, Array]:
    """Means of z for nodes of max(u, 0), one more axis, and the standard deviation of b."""
    most = np.sqrt(_MOST * np.maximum(var, 1e-300) / _VAR)
    a = np.clip(np.cbrt(skew / _THIRD), -most, most)
    std = np.sqrt(np.maximum(var - _VAR * a**2, 1e-300))
    return (mean - a * _MEAN)[..., None] + a[..., None] * _HALF, std[..., None]


def _raw_moments(h: Piecewise, mean: Array, std: Array, lo: float = -38.0, hi: float = 38.0) -> Array:
    """E[h], E[h^2], E[h^3] over lo < u < hi, z = mean + std u: per piece h = A u + B on an interval of u."""
    mean, std = np.broadcast_arrays(mean, std)
    edges = [np.full(mean.shape, lo), *(np.clip((c - mean) / std, lo, hi) for c in h.breaks), np.full(mean.shape, hi)]
    heights = [(phi, t * phi, (t**2 + 2) * phi) for t in edges for phi in [density(t)]]
    found = np.zeros((3, *mean.shape))
    for k, (slope, offset) in enumerate(zip(h.slopes, h.offsets, strict=True)):
        lower, upper, p = heights[k], heights[k + 1], mass(edges[k], edges[k + 1])
        e1, e2, e3 = lower[0] - upper[0], p + lower[1] - upper[1], lower[2] - upper[2]
        a, b = slope * std, slope * mean + offset
        found[0] += a * e1 + b * p
        found[1] += a**2 * e2 + 2 * a * b * e1 + b**2 * p
        found[2] += a**3 * e3 + 3 * a**2 * b * e2 + 3 * a * b**2 * e1 + b**3 * p
    return found


def _moments(weighted: Array, u: Array) -> Array:
    """Sums of `weighted` times the normalised Hermite polynomials He_k(u) / sqrt(k!), k = 0 .. order."""
    before, now = np.zeros_like(u), np.ones_like(u)
    found = []
    for k in range(_ORDER + 1):
        found.append(weighted @ now if u.ndim == 1 else (weighted * now).sum(axis=-1))
        before, now = now, (u * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    return np.stack(found)


_STEP_U, _STEP_Z, _WIDEST = 0.65, 0.7, 8.0  # spacing in u and in z; the standard deviation up to which it is kept


@cache
def _even_nodes(count: int) -> tuple[Array, Array]:
    """Even nodes over 6.8 standard deviations, weighted by the density (trapezoidal rule)."""
    u = np.linspace(-6.8, 6.8, count)
    w = density(u)
    return u, w / w.sum()


_BASE = np.linspace(-_REACH, _REACH, 171)
_CORE = np.sinh(np.linspace(-5.0, 5.0, 121))


def _nodes(mean: Array, std: Array, kinked: bool, kinks: Sequence[float]) -> tuple[Array, Array]:
    """Nodes u and weights: even ones, or the middles of cells: even in u, dense around z = 0, and cut at kinks."""
    widest = float(std.max(initial=0.0))
    if not kinked and widest <= _WIDEST:
        return _even_nodes(2 * math.ceil(6.8 / min(_STEP_U, _STEP_Z / max(widest, 1e-9))) + 1)
    inner = np.concatenate([_CORE, np.asarray(kinks, float)])
    edges = np.clip((inner - mean[..., None]) / std[..., None], -_REACH, _REACH)
    edges = np.sort(np.concatenate([np.broadcast_to(_BASE, (*mean.shape, len(_BASE))), edges], axis=-1), axis=-1)
    tails = above(edges)
    right = edges[..., :-1] > 0
    opposite = above(-edges)
    w = np.where(right, tails[..., :-1] - tails[..., 1:], opposite[..., 1:] - opposite[..., :-1])
    return (edges[..., 1:] + edges[..., :-1]) / 2, w / w.sum(axis=-1, keepdims=True)


def _closed_form(h: Piecewise, mean: Array, std: Array) -> Spectrum:
    """Exact: per piece h = A u + B on an interval of u; orders from 1 on by Stein's lemma, E[h He_k] = E[h' He_(k-1)].

    h' holds the slopes and a pulse at every jump, h'' a pulse at every change of slope.
    """
    ts = [np.clip((c - mean) / std, -38.0, 38.0) for c in h.breaks]
    phis = [density(t) for t in ts]
    infinite, zero = np.full(mean.shape, np.inf), np.zeros(mean.shape)
    edges, heights = [-infinite, *ts, infinite], [zero, *phis, zero]
    products = [zero, *(t * phi for t, phi in zip(ts, phis, strict=True)), zero]
    first, second, linear = zero, zero, zero
    for k, (slope, offset) in enumerate(zip(h.slopes, h.offsets, strict=True)):
        p = mass(edges[k], edges[k + 1]) if h.breaks else zero + 1
        e1 = heights[k] - heights[k + 1]
        e2 = p + products[k] - products[k + 1]
        a, b = slope * std, slope * mean + offset
        first = first + a * e1 + b * p
        second = second + a**2 * e2 + 2 * a * b * e1 + b**2 * p
        linear = linear + a * p
    orders = [np.asarray(first), np.asarray(linear), *(zero for _ in range(2, _ORDER + 1))]
    for k, (c, t, phi) in enumerate(zip(h.breaks, ts, phis, strict=True)):
        bend = (np.asarray(h.slopes[k + 1], float) - np.asarray(h.slopes[k], float)) * std * phi
        here = np.asarray(c, float)
        jump = (_line(h.slopes[k + 1], h.offsets[k + 1], here) - _line(h.slopes[k], h.offsets[k], here)) * phi
        before, now, factor = np.zeros_like(t), np.ones_like(t), 1.0  # He_(j-1), He_j, sqrt(order!)
        orders[1] = orders[1] + jump
        for order in range(2, _ORDER + 1):
            factor *= math.sqrt(order)
            following = t * now - (order - 2) * before
            orders[order] = orders[order] + (bend * now + jump * following) / factor
            before, now = now, following
    coefficients = np.stack(np.broadcast_arrays(*orders))
    return Spectrum(coefficients[0], np.maximum(second, coefficients[0] ** 2), coefficients**2)
