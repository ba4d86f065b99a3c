"""Softmax, LogSoftmax, Hardmax: logits are taken as normal and independent along the axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims, op
from gradlint.ops.attention_products import keys_seen, weighs
from gradlint.ops.softmax_weights import Weights, weights
from gradlint.transfer import Context, blocks, row

Values = Sequence[ir.Value | None]

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
    var = np.maximum(x.fixed + x.local + _visible(x, axis), 0)  # differences of products round below zero
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


def _masked(x: Moments, axis: int, n: int, seen: np.ndarray) -> Row:
    """The same where masks leave a query only `seen` of n keys, which keys being different for every query."""
    counts, times = np.unique(seen, return_counts=True)
    share = times / times.sum()
    std = np.sqrt(np.maximum(x.fixed + x.local, 0))
    found = weights(counts, std[..., None])
    stats = Weights(*(a @ share for a in (found.squares, found.own, found.cross, found.excess)))
    mean = np.full_like(std, 1 / n)
    count = np.full_like(std, 1 / float((share / counts).sum()))
    return Row(mean, stats.squares / n, count, std, stats.excess + float(share @ np.log(counts)), stats)


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
        rho = a / np.where(whole > 0, whole, np.inf)
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
    seen = keys_seen(ctx, node) if weighs(node) and x.mean.shape[at[0]] == 1 else None
    if seen is not None:
        r = _masked(x, *at, seen)
        between = r.mean / r.count - r.mean**2
        within = _split(x, r.second - r.mean / r.count, _visible(x, at[0]), r.std)
        return (Moments(r.mean, within[0] + between, *within[1:]),)
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
    if weighs(node) and x.mean.shape[axis] == 1 and (seen := keys_seen(ctx, node)) is not None:
        stats = _masked(x, axis, n, seen).stats
        total = g.total * (stats.own + stats.cross) / n
        same = np.minimum(_jacobian(g.shared, np.full_like(g.shared, 1 / n), axis, n, 1.0, 1.0), total)
        return (Gradient(same, total - same),)
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
    return np.where(b > 1e-12, a / np.where(b > 1e-12, b, 1.0), 1.0)


def softmax_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dz = y (g - sum g y)."""
    y, g = _without_nan(node), gs[0]
    assert g is not None
    pair = _attention_product(node, g)
    if pair is not None:
        mean = b.op("ReduceSum", b.op("Mul", *pair), b.constant([-1]), keepdims=1)
    else:
        mean = b.op("ReduceSum", b.op("Mul", g, y), b.constant([attribute(node, "axis", -1)]), keepdims=1)
    return (b.op("Mul", y, b.op("Sub", g, mean)),)


def _without_nan(node: ir.Node) -> ir.Value:
    """y, or the 0 that a Where puts in place of a row whose logits are all -inf (NaN; no gradient reaches it)."""
    y, axis = node.outputs[0], attribute(node, "axis", -1)
    for use in y.uses():
        condition, masked, _ = use.node.inputs if op(use.node) == "Where" else (None, None, None)
        zero = constant_array(masked)
        if use.idx != 2 or condition is None or zero is None or zero.any():
            continue
        test, rank = condition.producer(), len(y.shape) if y.shape is not None else 0
        whole = condition.shape is not None and rank and _one_along(condition.shape, axis % rank - rank)
        if whole or (test is not None and op(test) == "IsNaN" and test.inputs[0] is y):
            return use.node.outputs[0]
    return y


def _one_along(shape: ir.Shape, axis: int) -> bool:
    """Is an axis, counted from the end, of size 1 or missing?"""
    return len(shape) < -axis or shape[axis] == 1


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
