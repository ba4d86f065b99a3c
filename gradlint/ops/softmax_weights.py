"""Statistics of softmax weights over normal logits.

For n logits z = s u, u ~ N(0, 1) independent, S = sum e^z and phi_k(t) = E[(t e^z)^k exp(-t e^z)]: since
1 / S^k = int t^(k-1) e^(-tS) dt / (k-1)!, every moment of the weights p = e^z / S is one integral over x = log t,

    E[sum p^k]             = n / (k-1)! int phi_k phi_0^(n-1) dx
    E[sum_(i!=j) p_i^2 p_j^2] = n (n-1) / 3! int phi_2^2 phi_0^(n-2) dx
    E[log S]               = int e^(-t) - phi_0^n dx,

exact for every s, from uniform weights (s = 0) to a single winner (s >> sqrt(2 log n): the random energy model, Derrida
1981). n need not be whole: logits with different means m count as n = 1 / sum softmax(m)^2 equal ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from gradlint.domain import Array
from gradlint.runs import entries

_STEP = 1 / 16  # of s in the table
_TOP = 12.0  # beyond it the winner takes nearly all; 1 - weight falls as 1 / s
_LOG_N = np.arange(0, 14.01, 0.25)  # of log n in the table: up to a million


@functools.cache
def _table_row(k: int) -> Array:
    """For s = k * _STEP, over the grid of log n: sum p^2, sum p^2 (1-p)^2, cross sum p_i^2 p_j^2, log S - log n."""
    s = k * _STEP
    u = np.linspace(-8, 8, max(41, int(16 * s / 0.25)))
    weight = np.exp(-0.5 * u**2)
    weight /= weight.sum()
    h = 0.2
    x = np.arange(-(8 * s + _LOG_N[-1] + 12), 8 * s + 5, h)
    log_t = x[:, None] + s * u[None, :]
    t = np.exp(log_t)
    phi = [np.exp(j * log_t - t) @ weight for j in range(5)]
    n = np.exp(_LOG_N)[:, None]
    log_phi = np.log(np.maximum(phi[0], 1e-300))
    alone, pair = np.exp((n - 1) * log_phi), np.exp((n - 2) * log_phi)
    p2, p3, p4 = (n[:, 0] * h * (phi[j] * alone).sum(axis=1) / math.factorial(j - 1) for j in (2, 3, 4))
    cross = (n * (n - 1))[:, 0] * h * (phi[2] ** 2 * pair).sum(axis=1) / 6
    log_sum = h * (np.exp(-np.exp(x)) - alone * phi[0]).sum(axis=1)
    return np.stack([p2, np.maximum(p2 - 2 * p3 + p4, 0), cross, log_sum - _LOG_N])


@dataclass(frozen=True, slots=True)
class Weights:
    """Statistics of softmax weights: E[sum p^2], E[sum p^2 (1-p)^2], E[sum_(i!=j) p_i^2 p_j^2], E[log S] - log n."""

    squares: Array
    own: Array
    cross: Array
    excess: Array


def weights(n: Array | float, s: Array | float) -> Weights:
    """Statistics of softmax weights over n >= 1 independent normal logits of standard deviation s (elementwise)."""
    (n, s), wrap = entries(n, s)
    n_, s_ = np.broadcast_arrays(np.asarray(n, np.float64), np.asarray(s, np.float64))
    capped = np.clip(s_, 0, _TOP - 1e-9) / _STEP
    column = np.clip(np.log(np.maximum(n_, 1)), 0, _LOG_N[-1] - 1e-9) / 0.25
    i, j = capped.astype(int), column.astype(int)
    fi, fj = capped - i, column - j
    levels = np.unique(np.concatenate([i.ravel(), i.ravel() + 1]))
    table = np.stack([_table_row(int(k)) for k in levels])
    table[:, :3] = np.log(np.maximum(table[:, :3], 1e-300))
    a = np.searchsorted(levels, i)
    found = [
        (1 - fi) * ((1 - fj) * table[a, q, j] + fj * table[a, q, j + 1])
        + fi * ((1 - fj) * table[a + 1, q, j] + fj * table[a + 1, q, j + 1])
        for q in range(4)
    ]
    beyond = np.maximum(s_ / _TOP, 1.0)
    squares, own, cross = (np.exp(f) for f in found[:3])
    log_n = np.log(np.maximum(n_, 1))
    log_sum = (found[3] + log_n) * beyond - log_n
    return Weights(*wrap((1 - (1 - squares) / beyond, own / beyond, cross / beyond, log_sum)))
