"""Convolutions: y[o, q] = sum over channels c and taps t of W[o, c, t] x[c, q s + t d - p] + bias[o].

Activations are described per channel, (1, C, 1, ..). Elements are taken as uncorrelated except for the shared part of
their variance, which is the same at every position and so adds coherently over the taps. Which taps lie inside the map
differs near the border; the averages over positions are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.convolution_gradient import (
    Geometry,
    convolve,
    geometry,
    input_gradient,
    layout,
    spatial_rank,
    weight_gradient,
)
from gradlint.ops.convolution_taps import (
    Reduce,
    Taps,
    coherent_energy,
    each_tap,
    magnitude,
    mean_energy,
    mean_level,
    taps,
    through,
)
from gradlint.ops.linear import operator_norm
from gradlint.transfer import Context, product, row

Values = Sequence[ir.Value | None]


# -- estimate ----------------------------------------------------------------------------------------------------------


def _spread(w: np.ndarray, t: Taps, x: Moments, bias: Array, *, rows: bool) -> Moments:
    """Moments of a convolution, (groups, channels) in and out.

    The mean differs by class of position: its variance over positions is `fixed`. A shared part goes through the sum
    over taps: what of it is the same in every class stays shared, the rest varies with the example and the position.
    """
    terms: list[tuple[Reduce, Array]] = [(each_tap, x.mean), *_shared_terms(t, x.shared)]
    terms += [(mean_energy, v) for v in (x.fixed, x.local) if v.any()]
    each, *found = through(w, t, terms, rows=rows)
    per_class = each @ t.masks
    mean = np.asarray(per_class @ t.share)
    shared, moved = _shared_parts(t, x.shared, found, mean)
    rest = [v[..., 0] for v in found[len(_shared_terms(t, x.shared)) :]]
    fixed = rest.pop(0) if x.fixed.any() else np.zeros_like(mean)
    local = rest.pop(0) if x.local.any() else np.zeros_like(mean)
    uneven = np.maximum(per_class**2 @ t.share - mean**2, 0.0)
    return Moments(mean + bias, fixed + uneven, shared, local + moved)


def _shared_terms(t: Taps, shared: Array) -> list[tuple[Reduce, Array]]:
    """What `through` has to be asked about a shared part."""
    if not shared.any():
        return []
    return [(mean_level, shared)] if t.masks.shape[1] == 1 else [(mean_level, shared), (coherent_energy, shared)]


def _shared_parts(t: Taps, shared: Array, found: Sequence[Array], like: Array) -> tuple[Array, Array]:
    """From the answers: what of a shared part is still shared, and what now differs between positions."""
    asked = len(_shared_terms(t, shared))
    level = found[0][..., 0] if asked else np.zeros_like(like)
    return level, np.maximum(found[1][..., 0] - level, 0.0) if asked == 2 else np.zeros_like(level)


def _per_channel(a: Array, channels: int, groups: int) -> Array:
    """A description (1, C, 1, ..), or unresolved, as (groups, C / groups)."""
    return np.array(np.broadcast_to(a.reshape(-1), (channels,))).reshape(groups, -1)


def collapsed(x: Moments) -> Moments:
    """A description per position reduced to one per channel; what varies between positions becomes fixed or local."""
    rank = x.mean.ndim
    axes = tuple(a for a in range(rank) if a != 1)

    def over(a: Array) -> Array:
        return np.asarray(a.mean(axis=axes, keepdims=True))

    resolved = any(x.shared.shape[a] > 1 for a in axes)
    shared = np.zeros((1,) * rank) if resolved else x.shared
    local = over(x.local + x.shared) if resolved else over(x.local)
    return Moments(over(x.mean), over(x.fixed) + x.mean.var(axis=axes, keepdims=True), shared, local)


def collapsed_gradient(g: Gradient) -> Gradient:
    """The same for a gradient: a part that is shared only within positions told apart is local."""
    axes = tuple(a for a in range(g.local.ndim) if a != 1)
    if any(g.shared.shape[a] > 1 for a in axes):
        total = np.asarray(g.total.mean(axis=axes, keepdims=True))
        return Gradient(np.zeros_like(total), total)
    aligned = None if g.aligned is None else np.asarray(g.aligned.mean(axis=axes, keepdims=True))
    return Gradient(g.shared, np.asarray(g.local.mean(axis=axes, keepdims=True)), aligned=aligned)


@dataclass(frozen=True)
class Case:
    """A convolution, or a transposed one, with a constant weight and static sizes."""

    w: np.ndarray  # (groups, rows, columns, taps)
    transposed: bool
    at: Geometry
    kernel: tuple[int, ...]
    sizes: tuple[int, ...]
    outs: tuple[int, ...]
    channels: int
    out_channels: int

    @property
    def forward(self) -> Taps:
        return taps(self.outs, self.sizes, self.kernel, self.at, back=self.transposed)

    @property
    def backward(self) -> Taps:
        return taps(self.sizes, self.outs, self.kernel, self.at, back=not self.transposed)


def case(ctx: Context, node: ir.Node) -> Case | None:
    """The node's sizes and weight, or None where they are not known before it runs."""
    x, w, y = dims(node.inputs[0]), dims(node.inputs[1]), dims(node.outputs[0])
    if x is None or w is None or y is None or ctx.varies(node.inputs[1]) or 0 in (*w, *y):
        return None
    if attribute(node, "output_shape", ()):  # one that no pads give
        return None
    array = ctx.array(node.inputs[1])
    if array is None:
        return None
    transposed = node.op_type == "ConvTranspose"
    at = geometry(node, len(w) - 2)
    grouped = array.reshape(at.group, w[0] // at.group, w[1], math.prod(w[2:]))
    return Case(grouped, transposed, at, w[2:], x[2:], y[2:], x[1], y[1])


def _bias(ctx: Context, node: ir.Node, channels: int) -> Array | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(channels)
    array = None if ctx.varies(value) else ctx.array(value)
    return None if array is None else array.astype(np.float64)


def conv_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, c = xs[0], case(ctx, node)
    if x is None or c is None or (bias := _bias(ctx, node, c.out_channels)) is None:
        return (None,)
    groups = c.at.group
    flat = collapsed(x).map(lambda a: _per_channel(a, c.channels, groups))
    y = _spread(c.w, c.forward, flat, bias.reshape(groups, -1), rows=c.transposed)
    return (y.map(lambda a: a.reshape(1, -1, *(1,) * len(c.kernel))),)


def conv_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dx: as the forward pass, through the transposed kernel. dW: the sum over positions of g x, averaged over channels
    and taps: n^2 of what is the same at every position, n of the rest, n the positions at which the tap is valid."""
    x, g, c = xs[0], gs[0], case(ctx, node)
    if x is None or g is None or c is None:
        return (None,) * len(node.inputs)
    groups, ones = c.at.group, (1,) * len(c.kernel)
    g = collapsed_gradient(g)
    per_group = g.map(lambda a: _per_channel(a, c.out_channels, groups))
    back = c.backward
    terms: list[tuple[Reduce, Array]] = [(mean_energy, per_group.local), *_shared_terms(back, per_group.shared)]
    energy, *found_shared = through(c.w, back, terms, rows=not c.transposed)
    local = energy[..., 0]
    shared, moved = _shared_parts(back, per_group.shared, found_shared, local)
    dx = Gradient(shared, local + moved).map(lambda a: a.reshape(1, -1, *ones))
    flat = collapsed(x).map(lambda a: _per_channel(a, c.channels, groups))
    found: list[Gradient | None] = [dx, _weight(c, flat, per_group).map(lambda a: a.reshape(-1, 1, *ones))]
    if len(node.inputs) > 2:
        count = float(math.prod(c.outs))
        db = (g.shared * count**2 + g.local * count).reshape(-1)
        found.append(Gradient(np.zeros_like(db), db))
    return found


def _weight(c: Case, x: Moments, g: Gradient) -> Gradient:
    """Second moment of dW per row of W, (groups, rows), averaged over columns and taps.

    What of g goes along with the output goes along with each of the F inputs of a row by w_j^2 var_j / var_y, 1 / F on
    average.
    """
    if c.transposed:  # rows are the input's channels, and positions those of the input
        n = c.backward.valid * math.prod(c.sizes)
        g = g.map(lambda a: a.mean(axis=1, keepdims=True))
    else:
        n = c.forward.valid * math.prod(c.outs)
        mean = np.sqrt(np.square(x.mean).mean(axis=1, keepdims=True))
        x = Moments(mean, *(a.mean(axis=1, keepdims=True) for a in (x.fixed, x.shared, x.local)))
    fan_in = 1 if c.transposed else math.prod(c.w.shape[2:])
    term = product(g, x, along=1 / fan_in)
    total = term.shared * float(np.mean(n**2)) + term.local * float(np.mean(n))
    return Gradient(np.zeros_like(total), total)


# -- proof -------------------------------------------------------------------------------------------------------------


def conv_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """The box's centre goes through the sum over taps of W, its radius through that of |W|.

    Where a tap may miss the map, 0 joins the box.
    """
    x, c = xs[0], case(ctx, node)
    if x is None or c is None or (bias := _bias(ctx, node, c.out_channels)) is None:
        return (None,)
    axes = tuple(a for a in range(x.lo.ndim) if a != 1)
    lo, hi = x.lo.min(axis=axes), x.hi.max(axis=axes)
    if not (c.forward.valid == 1.0).all():
        lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    centre, radius = (_per_channel(a, c.channels, c.at.group) for a in ((lo + hi) / 2, (hi - lo) / 2))
    terms: list[tuple[Reduce, Array]] = [(each_tap, centre), (magnitude, np.abs(centre)), (magnitude, radius)]
    found = through(c.w, c.forward, terms, rows=c.transposed)
    mid, size, reach = (m.sum(axis=-1).reshape(-1) for m in found)
    slack = 1e-5 * (size + reach + np.abs(bias))  # float32, here and in the model
    shape = (1, -1, *(1,) * len(c.kernel))
    return (Range((mid + bias - reach - slack).reshape(shape), (mid + bias + reach + slack).reshape(shape)),)


def conv_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """sqrt(windows that read one position) times the norm of the matrix (outputs, inputs * taps) of the worst group.

    Stacking the windows copies each input at most prod ceil(k gcd(s, d) / s) times, which bounds the norm of that step
    by its root; a transposed convolution is the adjoint, of the same norm.
    """
    rest = (None,) * (len(node.inputs) - 1)
    c = case(ctx, node)
    if c is None:
        return (None, *rest)
    rows = zip(c.kernel, c.at.strides, c.at.dilations, strict=True)
    copies = math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in rows)
    matrices = c.w.reshape(*c.w.shape[:2], -1)
    norm = max(operator_norm(m) for m in matrices) if c.at.group <= 64 else operator_norm(matrices)
    return (math.sqrt(copies) * norm, *rest)


# -- Conv --------------------------------------------------------------------------------------------------------------


def conv_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    x, w, g, y = node.inputs[0], node.inputs[1], gs[0], node.outputs[0]
    rank = spatial_rank(node)
    assert x is not None
    assert w is not None
    assert g is not None
    if rank is None:
        raise Unsupported
    at = geometry(node, rank)
    found: list[ir.Value | None] = [
        input_gradient(b, g, y, w, x, at) if b.wanted(x) else None,
        weight_gradient(b, x, x, g, y, w, at) if b.wanted(w) else None,
    ]
    if len(node.inputs) > 2:
        found.append(b.sum_over(g, [0, *range(2, rank + 2)]) if b.wanted(node.inputs[2]) else None)
    return found


row("Conv", moments=conv_moments, range=conv_range, pullback=conv_pullback, bound=conv_bound, vjp=conv_vjp)


# -- ConvTranspose -----------------------------------------------------------------------------------------------------


def conv_transpose_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The adjoint's adjoint: dx is the Conv of g by the same weight; dW swaps the roles of x and g."""
    x, w, g, y = node.inputs[0], node.inputs[1], gs[0], node.outputs[0]
    rank = spatial_rank(node)
    assert x is not None
    assert w is not None
    assert g is not None
    if rank is None or attribute(node, "output_shape", ()):
        raise Unsupported
    at = geometry(node, rank)
    dx = None
    if b.wanted(x):
        dx = convolve(b, g, w, at.strides, at.dilations, at.begin, at.end, at.group)
        if any(attribute(node, "output_padding", ())):  # beyond a stride it makes room for further windows
            axes, zero = list(range(2, rank + 2)), [0] * rank
            dx = b.op("Slice", dx, b.constant(zero), layout(b, (x, 2, None)), b.constant(axes))
    found: list[ir.Value | None] = [dx, weight_gradient(b, g, y, x, x, w, at) if b.wanted(w) else None]
    if len(node.inputs) > 2:
        found.append(b.sum_over(g, [0, *range(2, rank + 2)]) if b.wanted(node.inputs[2]) else None)
    return found


row(
    "ConvTranspose",
    moments=conv_moments,
    range=conv_range,
    pullback=conv_pullback,
    bound=conv_bound,
    vjp=conv_transpose_vjp,
)
