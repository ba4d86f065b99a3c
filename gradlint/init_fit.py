"""Does a weight still look as it was drawn? Goodness of fit to the distributions that frameworks start weights with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradlint.domain import Array
from gradlint.quadrature import erf

_SAMPLE = 1 << 13
_TRUNCATED = 0.87962566103423978  # standard deviation of a standard normal cut off at two

Cdf = Callable[[Array], Array]


@dataclass(frozen=True)
class Fit:
    """The initial distribution that fits best, and the p-value of that fit."""

    name: str
    p: float


def sample(array: np.ndarray, most: int = _SAMPLE) -> Array:
    """Elements at an even stride that has no factor in common with the rows' length, so that all columns take part."""
    flat = array.reshape(-1)
    stride = max(1, flat.size // most)
    width = array.shape[-1] if array.ndim else 1
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return flat[::stride][:most].astype(np.float64)


def _uniform(bound: float) -> Cdf:
    return lambda x: np.clip(0.5 + x / (2 * bound), 0.0, 1.0)


def _normal(std: float) -> Cdf:
    return lambda x: 0.5 * (1 + erf(x / (std * math.sqrt(2))))


def _truncated(std: float) -> Cdf:
    """A normal distribution of which what lies beyond two standard deviations was drawn again; `std` is that of the
    result."""
    tail = 0.5 * (1 + math.erf(-math.sqrt(2)))
    normal = _normal(std / _TRUNCATED)
    return lambda x: np.clip((normal(x) - tail) / (1 - 2 * tail), 0.0, 1.0)


def p_value(ordered: Array, cdf: Cdf) -> float:
    """Kolmogorov-Smirnov: the chance of a distance as large, for independent draws (Stephens 1970). `ordered` is
    sorted."""
    n = ordered.size
    weight = math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)
    coarse = np.arange(0, n, max(1, n // 64))  # most distributions are far off already at a few quantiles
    if weight * (float(np.max(np.abs(cdf(ordered[coarse]) - coarse / n))) - 1 / n) > 3:
        return 0.0
    at = cdf(ordered)
    rank = np.arange(n + 1) / n
    reach = weight * max(float(np.max(rank[1:] - at)), float(np.max(at - rank[:-1])))
    if reach < 0.2:
        return 1.0
    total = 0.0
    for k in range(1, 101):
        term = math.exp(-2 * (k * reach) ** 2)
        if term == 0:
            break
        total += term if k % 2 else -term
    return min(1.0, max(0.0, 2 * total))


def candidates(fan_in: float, fan_out: float) -> list[tuple[str, float]]:
    """Standard deviations that initialisers give a kernel, by name.

    torch's default for linear layers and convolutions is uniform in +-1/sqrt(fan_in), variance 1 / (3 fan_in).
    """
    return [
        ("torch default", math.sqrt(1 / (3 * fan_in))),
        ("He", math.sqrt(2 / fan_in)),
        ("He (fan_out)", math.sqrt(2 / fan_out)),
        ("Xavier", math.sqrt(2 / (fan_in + fan_out))),
        ("LeCun", math.sqrt(1 / fan_in)),
        ("torch default of recurrent layers", math.sqrt(1 / (3 * fan_out))),
        ("std 0.02", 0.02),
        ("std 0.01", 0.01),
        ("std 0.05", 0.05),
        ("std 1", 1.0),
    ]


def best_fit(array: np.ndarray, sizes: tuple[float, float], mean: float, rms: float) -> Fit | None:
    """The initial distribution (uniform, normal or truncated, by the schemes' variances) that fits a kernel best.

    sizes: (fan_in, fan_out); mean, rms: over all elements. Only schemes are tried with which both agree within four
    standard errors. Entries of an orthogonal matrix look normal with variance 1 / its longer side. Rows or columns of
    unequal strength fit nothing. None: too small, zero, or not finite.
    """
    draws = sample(array)
    if draws.size < 50 or not np.isfinite(draws).all() or not rms > 0:
        return None
    if _uneven(array) or abs(mean) > 4 * rms / math.sqrt(array.size):
        return Fit("none", 0.0)
    ordered = np.sort(draws)
    known = candidates(*sizes)
    if sizes[0] > 1 and sizes[1] > 1:
        known.append(("orthogonal", math.sqrt(1 / max(sizes))))
    best = Fit("none", 0.0)
    slack = 4 / math.sqrt(2 * array.size)
    for name, scale in known:
        if abs(rms / scale - 1) > slack:
            continue
        shapes: list[tuple[str, Cdf]] = [("normal", _normal(scale)), ("truncated normal", _truncated(scale))]
        if not name.startswith(("std", "orthogonal")):
            shapes.append(("uniform", _uniform(scale * math.sqrt(3))))
        for shape, cdf in shapes:
            p = p_value(ordered, cdf)
            if p > best.p:
                best = Fit(name if name == "orthogonal" or "torch" in name else f"{name} {shape}", p)
    return best


def looks_drawn(array: np.ndarray) -> bool | None:
    """Does a weight look like independent draws from one normal or truncated normal distribution of any scale, or a
    uniform one over any interval?

    Two tests: the elements' distribution, and whether rows are as alike in size as draws are (training makes some units
    stronger than others). None: too small to tell, constant, or not finite.
    """
    draws = sample(array)
    if draws.size < 200 or not np.isfinite(draws).all():
        return None
    std = float(np.sqrt(np.mean(draws**2)))
    if std == 0 or draws.min() == draws.max():
        return None
    ordered = np.sort(draws)
    bound = max(float(np.abs(ordered[[0, -1]]).max()), std * math.sqrt(3) * (1 - 3 / draws.size))
    fits = max(p_value(ordered, cdf) for cdf in (_uniform(bound), _normal(std), _truncated(std)))
    low, high = float(ordered[0]), float(ordered[-1])  # of an interval not around 0: (0, 1), say
    reach = (high - low) / 2 * (1 + 2 / draws.size)
    fits = max(fits, p_value(ordered - (low + high) / 2, _uniform(reach)))
    return fits > 1e-3 and not _uneven(array)


def _uneven(array: np.ndarray) -> bool:
    """Do the mean squares along the first or second axis scatter more than those of independent draws would?

    Their variance is then (E[w^4] - E[w^2]^2) / elements.
    """
    return any(_uneven_rows(np.moveaxis(array, k, 0)) for k in range(min(2, array.ndim)))


def _uneven_rows(array: np.ndarray) -> bool:
    """The test on at most 128 slices along the first axis, with at most 512 elements of each."""
    rows = array[:: max(1, len(array) // 128)]
    if rows.ndim > 2:
        rows = rows[:, : max(1, 512 // math.prod(rows.shape[2:]))]
    squares = np.square(rows.reshape(len(rows), -1)[:, :512].astype(np.float64))
    energies = squares.mean(axis=1)
    units, columns = squares.shape
    limit = float(squares.var()) / columns * (1 + 6 * math.sqrt(2 / units) + 12 / columns)
    return units >= 8 and float(energies.var()) > limit
