"""Extremes and order statistics: ReduceMax, ReduceMin, TopK; which element it was has no gradient.

Elements are taken as independent normals with their units' own means and variances; what is shared by all of them moves
the extreme as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, constant_array, dims
from gradlint.ops.reduction import Reduction, reduction, spread, unreduced
from gradlint.quadrature import erf
from gradlint.transfer import Context, blocks, row

Values = Sequence[ir.Value | None]
_CELLS = 400
_TABLE = 1 << 22  # numbers in one table of distribution functions: beyond that units are described by their average

blocks("ArgMax", "ArgMin")


# -- the distribution of an extreme ------------------------------------------------------------------------------------


def _flat(r: Reduction, a: Array, common: tuple[int, ...]) -> Array:
    """The array as (rest, reduced units)."""
    a = np.broadcast_to(a, common)
    rest = [k for k in range(a.ndim) if k not in r.axes]
    return np.transpose(a, (*rest, *r.axes)).reshape(math.prod(a.shape[k] for k in rest), -1)


def _unflat(r: Reduction, a: Array, common: tuple[int, ...], *, reduced: bool) -> Array:
    """Back to an array that broadcasts against the input."""
    rest = [k for k in range(len(common)) if k not in r.axes]
    inner = [1 if reduced else common[k] for k in r.axes]
    order = [*rest, *r.axes]
    return np.transpose(a.reshape([common[k] for k in rest] + inner), np.argsort(order))


def _extreme(mean: Array, var: Array, copies: float) -> tuple[Array, Array, Array]:
    """The largest of independent normals (rows: cases, columns: units, each `copies` times).

    Its mean and variance, and the chance that it is one of a unit's: integrals over its distribution function, which is
    the product of theirs.
    """
    if mean.size * _CELLS > _TABLE:
        second = (var + mean**2).mean(axis=1, keepdims=True)
        copies *= mean.shape[1]
        average = mean.mean(axis=1, keepdims=True)
        m, v, _ = _extreme(average, second - average**2, copies)
        return m, v, np.full(mean.shape, 1 / mean.shape[1])
    deviation = np.sqrt(np.maximum(var, 1e-18))
    low, high = (mean - 9 * deviation).max(axis=1), (mean + 9 * deviation).max(axis=1)
    edges = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, _CELLS + 1)
    below = 0.5 * (1 + erf((edges[:, None, :] - mean[:, :, None]) / (deviation[:, :, None] * math.sqrt(2))))
    logs = copies * np.log(np.maximum(below, 1e-300))
    whole = np.exp(logs.sum(axis=1))
    mass = np.diff(whole, axis=1)
    mass /= np.maximum(mass.sum(axis=1, keepdims=True), 1e-300)
    centre = (edges[:, 1:] + edges[:, :-1]) / 2
    m = (mass * centre).sum(axis=1)
    v = (mass * (centre - m[:, None]) ** 2).sum(axis=1)
    winners = np.diff(logs, axis=2) * mass[:, None, :] / np.maximum(np.diff(logs.sum(axis=1), axis=1), 1e-300)[:, None]
    share = winners.sum(axis=2)
    return m[:, None], v[:, None], share / np.maximum(share.sum(axis=1, keepdims=True), 1e-300)


def _parts(r: Reduction, x: Moments) -> tuple[tuple[int, ...], Array, Array]:
    """The common shape of x's arrays, what differs among the reduced elements, and what they share."""
    common = np.broadcast_shapes(x.mean.shape, x.fixed.shape, x.shared.shape, x.local.shape)
    together = r.examples == 1 and all(common[a] == 1 for a in r.axes)
    differing = np.broadcast_to(x.fixed + x.local + (0 if together else x.shared), common)
    return common, differing, np.broadcast_to(x.shared if together else 0 * x.shared, common)


def _sign(node: ir.Node) -> int:
    return -1 if node.op_type == "ReduceMin" else 1


def extreme_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Mean and variance of the largest (smallest) of the reduced elements."""
    r, x = reduction(ctx, node), xs[0]
    if r is None or x is None:
        return (None,)
    common, differing, same = _parts(r, x)
    sign = _sign(node)
    copies = r.size / math.prod(common[a] for a in r.axes)
    m, v, _ = _extreme(_flat(r, sign * x.mean, common), _flat(r, differing, common), copies)
    mean, local = (_unflat(r, a, common, reduced=True) for a in (sign * m, v))
    shared = same.mean(axis=r.axes, keepdims=True)
    if r.alone(np.broadcast_to(x.mean, common)):
        shared, local = shared + local, 0 * local
    return (Moments(mean, 0 * local, shared, local).map(r.drop),)


def extreme_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """All of the gradient goes to one element: E[dx^2] = q times the chance that it is this one."""
    none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
    r, x, g = reduction(ctx, node), xs[0], gs[0]
    if r is None or x is None or g is None:
        return (None, *none)
    common, differing, _ = _parts(r, x)
    copies = r.size / math.prod(common[a] for a in r.axes)
    _, _, share = _extreme(_flat(r, _sign(node) * x.mean, common), _flat(r, differing, common), copies)
    total = spread(r, g).total * _unflat(r, share, common, reduced=False) / copies
    return (Gradient(0 * total, total), *none)


def extreme_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    r, x = reduction(ctx, node), xs[0]
    if r is None or x is None:
        return (None,)
    pick = np.min if node.op_type == "ReduceMin" else np.max
    return (x.map(lambda a: r.drop(pick(a, axis=r.axes, keepdims=True))),)


def extreme_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (1.0, *(None,) * (len(node.inputs) - 1))


def extreme_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = g where x is the extreme, split evenly among equals."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    hit = b.op("Equal", x, unreduced(b, node, node.outputs[0]), dtype=ir.DataType.BOOL)
    ones = b.op("Cast", hit, to=int(g.dtype or ir.DataType.FLOAT), dtype=g.dtype)
    noop = attribute(node, "noop_with_empty_axes", 0)
    count = b.op("ReduceSum", ones, axes, keepdims=1, noop_with_empty_axes=noop)
    return (b.op("Mul", ones, b.op("Div", unreduced(b, node, g), count)),)


for _op in ("ReduceMax", "ReduceMin"):
    row(
        _op,
        moments=extreme_moments,
        range=extreme_range,
        pullback=extreme_pullback,
        bound=extreme_bound,
        vjp=extreme_vjp,
    )


# -- TopK --------------------------------------------------------------------------------------------------------------


def _order_statistics(n: int, k: int) -> tuple[Array, Array]:
    """Means and variances of the k largest of n standard normals, the largest first.

    The j-th largest has density n! / ((j-1)! (n-j)!) Phi^(n-j) (1 - Phi)^(j-1) phi.
    """
    z = np.linspace(-9, 9, 2001)
    half = 0.5 * (1 + erf(z / math.sqrt(2)))
    log_below, log_above = np.log(np.maximum(half, 1e-300)), np.log(np.maximum(half[::-1], 1e-300))
    j = np.arange(1, k + 1)[:, None]
    density = np.exp(
        np.array([[math.lgamma(n + 1) - math.lgamma(i) - math.lgamma(n - i + 1)] for i in range(1, k + 1)])
        + (n - j) * log_below
        + (j - 1) * log_above
        - z**2 / 2
    )
    density /= density.sum(axis=1, keepdims=True)
    mean = density @ z
    return mean, density @ z**2 - mean**2


def _chosen(node: ir.Node) -> tuple[int, int, int] | None:
    """The axis, its size, and k."""
    shape, k = dims(node.inputs[0]), constant_array(node.inputs[1])
    if shape is None or k is None:
        return None
    axis = attribute(node, "axis", -1) % len(shape)
    return axis, shape[axis], int(k.ravel()[0])


def top_k_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """The ranks are told apart (for up to 64 of them; more by their average); units along the axis are pooled."""
    x, found = xs[0], _chosen(node)
    if x is None or found is None:
        return (None, None)
    axis, n, k = found
    along = [-1 if a == axis else 1 for a in range(x.mean.ndim)]
    together = np.broadcast(x.mean, x.var).shape[axis] == 1
    mean = x.mean.mean(axis=axis, keepdims=True)
    shared = x.shared if together else np.zeros_like(mean)
    var = (x.second - shared).mean(axis=axis, keepdims=True) - mean**2
    m, v = _order_statistics(n, k)
    order = 1 if attribute(node, "largest", 1) else -1
    if k > 64 or not attribute(node, "sorted", 1):
        m, v = np.array([m.mean()]), np.array([v.mean() + m.var()])
    y = Moments(mean + order * np.sqrt(var) * m.reshape(along), 0 * mean, shared, var * v.reshape(along))
    return (y, None)


def top_k_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """k of n elements, chosen as good as at random, get a gradient: q k / n."""
    g, found = gs[0], _chosen(node)
    if g is None or found is None:
        return (None, None)
    axis, n, k = found
    total = g.total.mean(axis=axis, keepdims=True) * (k / n)
    return (Gradient(0 * total, total), None)


def top_k_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    x, found = xs[0], _chosen(node)
    if x is None or found is None:
        return (None, None)
    axis = found[0]
    return (Range(x.lo.min(axis=axis, keepdims=True), x.hi.max(axis=axis, keepdims=True)), None)


def top_k_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (1.0, None)


def top_k_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dx = g put back where the values came from, 0 elsewhere."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    if g is None:
        return (None, None)
    empty = b.op("Expand", b.scalar(0.0, g), b.shape(x))
    return (b.op("ScatterElements", empty, node.outputs[1], g, axis=attribute(node, "axis", -1)), None)


row(
    "TopK",
    moments=top_k_moments,
    range=top_k_range,
    pullback=top_k_pullback,
    bound=top_k_bound,
    vjp=top_k_vjp,
)
