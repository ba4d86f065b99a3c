"""Softmax, LogSoftmax, Hardmax, and the statistics of softmax weights over normal logits that attention needs as well.

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims, op
from gradlint.ops.attention_products import weighs
from gradlint.transfer import Context, blocks, row

Values = Sequence[ir.Value | None]

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
    return Weights(1 - (1 - squares) / beyond, own / beyond, cross / beyond, (found[3] + log_n) * beyond - log_n)


# -- a row of logits ---------------------------------------------------------------------------------------------------


def _sum(a: Array, axis: int, n: int) -> Array:
    """Sum over the axis of the value that `a` broadcasts against."""
    return a * n if a.shape[axis] == 1 else a.sum(axis=axis, keepdims=True)


@dataclass(frozen=True, slots=True)
class Row:
    """Softmax weights along one axis: their mean, second moment, the equal count, the logits' deviation, E[log S]."""

    mean: Array
    second: Array
    count: Array
    std: Array
    log_sum: Array
    stats: Weights


def describe(x: Moments, axis: int, n: int) -> Row:
    """Softmax weights over normal logits x of size n along `axis`.

    A shared part that is one along the axis moves all logits alike: softmax does not see it. Logits of different
    means weigh by exp(mean + var / 2), of different variances by their weighted average. Assumes them independent.
    """
    var = x.fixed + x.local + _visible(x, axis)
    # E[e^z] grows as e^(s^2 / 2) up to s = sqrt(2 log n), beyond it only the largest of n counts: then linearly in s.
    limit = math.sqrt(2 * math.log(max(n, 2)))
    s = np.sqrt(var)
    gain = np.where(s < limit, var / 2, limit * s - limit**2 / 2)
    log_weight = x.mean + gain
    top = log_weight.max(axis=axis, keepdims=True)
    weight = np.exp(log_weight - top)
    total = _sum(weight, axis, n)
    mean = weight / total
    count = 1 / np.clip(_sum(mean**2, axis, n), 1 / n, 1)
    level = _sum(mean * var, axis, n) if mean.shape[axis] > 1 else var
    if level.shape[axis] > 1:
        level = level.mean(axis=axis, keepdims=True)
    stats = weights(count, np.sqrt(level))
    second = np.minimum(mean**2 * count * stats.squares, mean)
    log_sum = top + np.log(total) - level / 2 + stats.excess
    return Row(mean, np.maximum(second, mean**2), count, np.sqrt(level), log_sum, stats)


def _axis(node: ir.Node) -> tuple[int, int] | None:
    """The axis, counted from the front, and its size."""
    shape = dims(node.inputs[0])
    if not shape:
        return None
    axis = attribute(node, "axis", -1) % len(shape)
    return axis, shape[axis]


def _split(x: Moments, var: Array, visible: Array, s: Array) -> tuple[Array, Array, Array]:
    """Share a variance of weights between fixed, shared and local as e^z shares it (lognormal correlations).

    visible: the shared part of the logits that tells them apart.
    """
    square = np.minimum(s**2, 50.0)
    whole = x.fixed + visible + x.local

    def part(a: Array) -> Array:
        rho = np.divide(a, whole, out=np.zeros(np.broadcast(a, whole).shape), where=whole > 0)
        return np.where(square > 1e-6, np.expm1(rho * square) / np.expm1(np.maximum(square, 1e-6)), rho)

    fixed, shared = var * part(x.fixed), var * part(visible)
    return fixed, shared, np.maximum(var - fixed - shared, 0)


def _visible(x: Moments, axis: int) -> Array:
    """What of the shared part differs along the axis."""
    return x.shared if x.shared.shape[axis] > 1 else np.zeros_like(x.shared)


def softmax_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Mean and second moment of the weights over independent normal logits."""
    x, at = xs[0], _axis(node)
    if x is None or at is None:
        return (None,)
    x = _examples_alike(x)
    r = describe(x, *at)
    return (Moments(r.mean, *_split(x, r.second - r.mean**2, _visible(x, at[0]), r.std)),)


def softmax_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dz_i = p_i (g_i - sum_j p_j g_j), g independent of p and along the axis; what is the same all along it cancels.

    E[dz_i^2] = E[p_i^2 (1 - p_i)^2] q_i + sum_(j!=i) E[p_i^2 p_j^2] q_j, each term that of the weights' means
    times what the logits' variance adds to it.
    """
    x, g, at = xs[0], gs[0], _axis(node)
    if x is None or g is None or at is None:
        return (None,)
    axis, n = at
    r = describe(_examples_alike(x), axis, n)
    still = weights(r.count, 0.0)
    spread = _ratio(r.stats.own, still.own), _ratio(r.stats.cross, still.cross)
    if weighs(node):
        total = _jacobian(g.total, r.mean, axis, n, *spread)
        same = _jacobian(g.shared, r.mean.mean(axis=axis - 1, keepdims=True), axis, n, 1.0, 1.0)
        return (Gradient(same, np.maximum(total - same, 0)),)
    total = _jacobian(g.total if g.shared.shape[axis] > 1 else g.local, r.mean, axis, n, *spread)
    return (Gradient(np.zeros_like(total), total),)


def _jacobian(q: Array, p: Array, axis: int, n: int, own: Array | float, cross: Array | float) -> Array:
    """E[(p_i (g_i - sum p_j g_j))^2], at the mean weights p, times what their variance adds to both terms."""
    q, p = np.broadcast_arrays(q, p)
    others = np.maximum(_sum(p**2 * q, axis, n) - p**2 * q, 0)
    return np.minimum(p**2 * (1 - p) ** 2 * own, 1 / 16) * q + p**2 * others * cross


def _examples_alike(x: Moments) -> Moments:
    """A constant mask repeated for every example is one mask."""
    same = x.mean.shape[0] > 1 and bool((x.mean == x.mean[:1]).all())
    return Moments(x.mean[:1], x.fixed, x.shared, x.local) if same else x


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.ones_like(a), where=b > 1e-12)


def softmax_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = y (g - sum g y)."""
    y, g = node.outputs[0], gs[0]
    assert g is not None
    pair = _attention_product(node, g)
    if pair is not None:
        mean = b.op("ReduceSum", b.op("Mul", *pair), b.constant([-1]), keepdims=1)
    else:
        mean = b.op("ReduceSum", b.op("Mul", g, y), b.constant([attribute(node, "axis", -1)]), keepdims=1)
    return (b.op("Mul", y, b.op("Sub", g, mean)),)


def _attention_product(node: ir.Node, g: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """In attention, o = y V and g = G V^T: the sum over keys of g y is that over features of G o. (G, o), else None."""
    y, back = node.outputs[0], g.producer()
    uses = [u for u in y.uses() if u.node.graph is node.graph]
    if len(uses) != 1 or uses[0].idx != 0 or op(uses[0].node) != "MatMul" or back is None or back.op_type != "MatMul":
        return None
    o = uses[0].node.outputs[0]
    if y.shape is None or o.shape is None or len(y.shape) < 3 or len(o.shape) != len(y.shape):
        return None
    last = attribute(node, "axis", -1) in (-1, len(y.shape) - 1)
    return (back.inputs[0], o) if last and back.inputs[0] is not None else None


def softmax_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """p_i = 1 / (1 + sum_(j!=i) e^(z_j - z_i)): least with z_i at its lower end and the rest at their upper."""
    at = _axis(node)
    if at is None:
        return (None,)
    if xs[0] is None:
        zero = np.zeros((1,) * len(dims(node.inputs[0]) or ()))
        return (Range(zero, zero + 1),)
    y = log_softmax_range_along(xs[0], *at)
    slack = 1e-6
    return (
        Range(np.maximum(np.exp(y.lo) * (1 - slack) - 1e-30, 0), np.minimum(np.exp(y.hi) * (1 + slack), 1 + slack)),
    )


def log_softmax_range_along(x: Range, axis: int, n: int) -> Range:
    """log p_i = -log(1 + sum_(j!=i) e^(z_j - z_i)), rounding included."""
    lo, hi = np.broadcast_arrays(x.lo, x.hi)

    def least(low: Array, high: Array) -> Array:
        """-log(1 + sum_(j!=i) exp(high_j - low_i))."""
        top = high.max(axis=axis, keepdims=True)
        others = np.exp(high - top)
        rest = np.maximum(_sum(others, axis, n) - others, 0.0)
        with np.errstate(divide="ignore"):
            return -np.logaddexp(0.0, np.log(rest) + top - low)

    low, high = least(lo, hi), least(hi, lo)
    return Range(low - 1e-5 * (1 + np.abs(low)), np.minimum(high + 1e-5 * (1 + np.abs(high)), 1e-6))


def softmax_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """|diag(p) - p p^T| <= 1/2 (Gao & Pavel 2017)."""
    return (0.5,)


row(
    "Softmax",
    moments=softmax_moments,
    range=softmax_range,
    pullback=softmax_pullback,
    bound=softmax_bound,
    vjp=softmax_vjp,
)


# -- LogSoftmax --------------------------------------------------------------------------------------------------------


def log_softmax_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, at = xs[0], _axis(node)
    return (None if x is None or at is None else log_softmax_moments_along(x, *at),)


def log_softmax_moments_along(x: Moments, axis: int, n: int) -> Moments:
    """y_i = z_i - log S: Cov(z_i, log S) = var_i E[p_i] (Stein), Var(log S) = sum var_j E[p_j^2] to first order."""
    r = describe(x, axis, n)
    visible = _visible(x, axis)

    if n == 1:
        return Moments.normal(x.mean.ndim, var=0.0)

    def part(var: Array) -> Array:
        return np.maximum(var * (1 - 2 * r.mean) + _sum(var * r.second, axis, n), 0)

    return Moments(x.mean - r.log_sum, part(x.fixed), part(visible), part(x.local))


def log_softmax_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dz_i = g_i - p_i sum_j g_j: the sum coherent for what is the same along the axis, else incoherent."""
    x, g, at = xs[0], gs[0], _axis(node)
    if x is None or g is None or at is None:
        return (None,)
    axis, n = at
    r = describe(x, axis, n)
    common = np.zeros(1)
    q = g.total
    if max(g.local.shape[axis], g.shared.shape[axis]) == 1:
        common, q = g.shared * np.maximum(1 - 2 * n * r.mean + n**2 * r.second, 0), g.local
    q, p = np.broadcast_arrays(q, r.mean)
    total = np.maximum(q * (1 - 2 * p) + r.second * _sum(q, axis, n), 0) + common
    return (Gradient(np.zeros_like(total), total),)


def log_softmax_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = g - e^y sum g."""
    y, g, axis = node.outputs[0], gs[0], attribute(node, "axis", -1)
    assert g is not None
    total = b.op("ReduceSum", g, b.constant([axis]), keepdims=1)
    return (b.op("Sub", g, b.op("Mul", b.op("Exp", y), total)),)


def log_softmax_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    at = _axis(node)
    if xs[0] is None or at is None:
        return (None,)
    return (log_softmax_range_along(xs[0], *at),)


def log_softmax_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """I - 1 p^T is an oblique projection: its norm is sqrt(n) |p| <= sqrt(n)."""
    at = _axis(node)
    return (None if at is None else math.sqrt(at[1]),)


row(
    "LogSoftmax",
    moments=log_softmax_moments,
    range=log_softmax_range,
    pullback=log_softmax_pullback,
    bound=log_softmax_bound,
    vjp=log_softmax_vjp,
)


# -- Hardmax -----------------------------------------------------------------------------------------------------------


def hardmax_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """One of n elements is 1: the softmax of logits scaled up, p^2 = p."""
    x, at = xs[0], _axis(node)
    if x is None or at is None:
        return (None,)
    mean = describe(x, *at).mean
    zero = np.zeros_like(mean)
    return (Moments(mean, zero, zero, mean * (1 - mean)),)


def hardmax_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    zero = np.zeros((1,) * len(node.inputs[0].shape or ()) if node.inputs[0] is not None else ())
    return (Range(zero, zero + 1),)


blocks("Hardmax")
row("Hardmax", moments=hardmax_moments, range=hardmax_range)
