"""Losses in the graph: SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss.

Both pick from log-probabilities l (N, C, d1 ..) the one of each label: loss = -w[label] l[label], labels equal to
ignore_index left out; `mean` divides by the sum of the labels' weights. Estimates take labels as uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import attribute, dims
from gradlint.ops.softmax import describe, log_softmax_moments_along, log_softmax_range_along
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
_CLASSES = 1  # the axis of the classes


def _class_weights(ctx: Context, node: ir.Node) -> Array | None:
    """One weight per class, shape (C,); None where it is not known."""
    shape = dims(node.inputs[0])
    if shape is None or len(shape) < 2:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.ones(shape[1])
    found = None if ctx.varies(node.inputs[2]) else ctx.array(node.inputs[2])
    return None if found is None else found.astype(np.float64)


def _like_classes(w: Array, rank: int) -> Array:
    return w.reshape(1, -1, *(1,) * (rank - 2))


def _labels(node: ir.Node) -> int:
    """How many labels there are."""
    shape = dims(node.inputs[0]) or (1, 1)
    return math.prod(shape) // shape[1]


# -- estimates ---------------------------------------------------------------------------------------------------------


def _picked(node: ir.Node, log_p: Moments, w: Array) -> Moments:
    """Moments of the loss from those of the log-probabilities; losses of different labels taken as independent."""
    kind, n, rank = attribute(node, "reduction", "mean"), _labels(node), log_p.mean.ndim
    v = _like_classes(w, rank)
    level = v.mean() if kind == "mean" else 1.0
    mean = -(v * log_p.mean).mean(axis=_CLASSES, keepdims=True) / level
    # of the weighted mean only what differs from it varies: a label of weight w adds w (l - mean)
    centre = mean if kind == "mean" else 0.0
    second = (v**2 * ((log_p.mean + centre) ** 2 + log_p.var)).mean(axis=_CLASSES, keepdims=True) / level**2
    var = second if kind == "mean" else np.maximum(second - mean**2, 0)
    if kind == "none":
        return Moments(*(np.squeeze(a, _CLASSES) for a in (mean, 0 * var, 0 * var, var)))
    times, power = (n, n) if kind == "sum" else (1, 1 / n)
    zero = np.zeros(())
    return Moments(np.asarray(mean.mean() * times), zero, zero, np.asarray(var.mean() * power))


def _spread(node: ir.Node, g: Gradient, rank: int) -> Array:
    """E[g^2] of the loss, for each label: over `mean`, divided by their number."""
    kind = attribute(node, "reduction", "mean")
    if kind == "none":
        return np.expand_dims(g.total, _CLASSES)
    return g.total.reshape((1,) * rank) / (_labels(node) ** 2 if kind == "mean" else 1.0)


def _gradient(total: Array) -> Gradient:
    return Gradient(np.zeros_like(total), total)


def cross_entropy_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    x, w, shape = xs[0], _class_weights(ctx, node), dims(node.inputs[0])
    if x is None or w is None or shape is None:
        return (None, None)
    log_p = log_softmax_moments_along(x, _CLASSES, shape[_CLASSES])
    return _picked(node, log_p, w), log_p


def cross_entropy_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dz_i = w_label (p_i - [i = label]) g: E over labels = (w_i^2 (1 - 2 E p_i) + sum w^2 E p_i^2) / C."""
    none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
    x, w, shape = xs[0], _class_weights(ctx, node), dims(node.inputs[0])
    if x is None or w is None or shape is None:
        return (None, *none)
    r = describe(x, _CLASSES, shape[_CLASSES])
    found: Gradient | None = None
    if gs[0] is not None:
        v = _like_classes(w / (w.mean() if attribute(node, "reduction", "mean") == "mean" else 1.0), len(shape))
        share = v**2 * (1 - 2 * r.mean) / shape[_CLASSES] + (v**2).mean() * r.second
        found = _gradient(np.maximum(share, 0) * _spread(node, gs[0], len(shape)))
    if len(gs) > 1 and gs[1] is not None:
        q, p = np.broadcast_arrays(gs[1].total, r.mean)
        total = q * (1 - 2 * p) + r.second * q.mean(axis=_CLASSES, keepdims=True) * shape[_CLASSES]
        found = _gradient(np.maximum(total, 0)) if found is None else found + _gradient(np.maximum(total, 0))
    return (found, *none)


def likelihood_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    w = _class_weights(ctx, node)
    return (None if xs[0] is None or w is None else _picked(node, xs[0], w),)


def likelihood_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """dl_i = -w_i [i = label] g: one element in C."""
    none: tuple[Gradient | None, ...] = (None,) * (len(node.inputs) - 1)
    w, shape = _class_weights(ctx, node), dims(node.inputs[0])
    if w is None or shape is None or gs[0] is None:
        return (None, *none)
    v = _like_classes(w / (w.mean() if attribute(node, "reduction", "mean") == "mean" else 1.0), len(shape))
    return (_gradient(v**2 / len(w) * _spread(node, gs[0], len(shape))), *none)


# -- proofs ------------------------------------------------------------------------------------------------------------


def _range(ctx: Context, node: ir.Node, log_p: Range) -> Range | None:
    """-w l over all classes; a label may be ignored, so 0 belongs to it."""
    w = _class_weights(ctx, node)
    kind = attribute(node, "reduction", "mean")
    if w is None or (w < 0).any():
        return None
    v = np.ones_like(w) if kind == "mean" else w
    v = _like_classes(v, log_p.lo.ndim)
    lo = np.minimum((-v * log_p.hi).min(axis=_CLASSES), 0)
    hi = np.maximum((-v * log_p.lo).max(axis=_CLASSES), 0)
    if kind == "none":
        return Range(lo, hi)
    times = _labels(node) if kind == "sum" else 1
    return Range(np.asarray(lo.min() * times), np.asarray(hi.max() * times))


def cross_entropy_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    shape = dims(node.inputs[0])
    if xs[0] is None or shape is None:
        return (None, None)
    log_p = log_softmax_range_along(xs[0], _CLASSES, shape[_CLASSES])
    return _range(ctx, node, log_p), log_p


def likelihood_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    return (None if xs[0] is None else _range(ctx, node, xs[0]),)


def _steepest(ctx: Context, node: ir.Node) -> float | None:
    """Norm of the derivative with respect to the log-probabilities; `mean` over a single valid label is the worst."""
    w, kind = _class_weights(ctx, node), attribute(node, "reduction", "mean")
    if w is None or (w < 0).any():
        return None
    return 1.0 if kind == "mean" else float(w.max()) * (math.sqrt(_labels(node)) if kind == "sum" else 1.0)


def cross_entropy_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    """|p - onehot| <= sqrt(2) for each label; towards log_prob sqrt(C)."""
    norm, shape = _steepest(ctx, node), dims(node.inputs[0])
    rest: tuple[float | None, ...] = (None,) * (len(node.inputs) - 1)
    if norm is None or shape is None:
        return (None, *rest)
    both = norm * math.sqrt(2) + (math.sqrt(shape[_CLASSES]) if len(node.outputs) > 1 else 0.0)
    return (both, *rest)


def likelihood_bound(
    ctx: Context, node: ir.Node, xs: Sequence[Range | None], ys: Sequence[Range | None]
) -> Sequence[float | None]:
    return (_steepest(ctx, node), *(None,) * (len(node.inputs) - 1))


# -- exact gradients ---------------------------------------------------------------------------------------------------


def _selected(b: Backward, node: ir.Node) -> ir.Value:
    """[class = label] of every label that counts, shaped like the scores."""
    x, labels = node.inputs[:2]
    assert x is not None
    assert x.shape is not None
    assert labels is not None
    size, int64 = x.shape[_CLASSES], ir.DataType.INT64
    column = b.constant([-1] + [1] * (len(x.shape) - 2))
    if isinstance(size, int):
        classes = b.constant(np.arange(size).reshape(-1, *(1,) * (len(x.shape) - 2)))
    else:
        count = b.op("Gather", b.shape(x), b.constant(_CLASSES), dtype=int64)
        classes = b.op("Reshape", b.op("Range", b.constant(0), count, b.constant(1)), column)
    wide = b.op("Cast", b.op("Unsqueeze", labels, b.constant([_CLASSES])), to=int64.value, dtype=int64)
    hit = b.op("Equal", wide, classes, dtype=ir.DataType.BOOL)
    ignored = attribute(node, "ignore_index")
    if ignored is not None:
        hit = b.op("And", hit, b.op("Not", b.op("Equal", wide, b.constant(ignored), dtype=ir.DataType.BOOL)))
    assert x.dtype is not None
    return b.op("Cast", hit, to=x.dtype.value, dtype=x.dtype)


def _weighted(b: Backward, node: ir.Node, hits: ir.Value) -> ir.Value:
    x = node.inputs[0]
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return hits
    assert x is not None
    assert x.shape is not None
    return b.op("Mul", hits, b.op("Reshape", node.inputs[2], b.constant([-1] + [1] * (len(x.shape) - 2))))


def _per_label(b: Backward, node: ir.Node, g: ir.Value, weighted: ir.Value) -> ir.Value:
    """dL / d(weighted loss) of each label."""
    kind = attribute(node, "reduction", "mean")
    if kind == "none":
        return b.op("Unsqueeze", g, b.constant([_CLASSES]))
    return g if kind == "sum" else b.op("Div", g, b.op("ReduceSum", weighted, keepdims=0))


def _towards_class_weights(
    b: Backward, node: ir.Node, hits: ir.Value, each: ir.Value, log_p: ir.Value
) -> ir.Value | None:
    """dw_c = -sum over labels c of l g; of the mean, of (l + loss) g."""
    if len(node.inputs) < 3 or not b.wanted(node.inputs[2]):
        return None
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    if attribute(node, "reduction", "mean") == "mean":
        log_p = b.op("Add", log_p, node.outputs[0])
    terms = b.op("Mul", b.op("Mul", hits, log_p), each)
    return b.op("Neg", b.sum_over(terms, [a for a in range(len(x.shape)) if a != _CLASSES]))


def cross_entropy_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dl = -w [class = label] g (+ the gradient of log_prob), dz = dl - softmax(z) sum dl."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    known = len(node.outputs) > 1 and node.outputs[1] is not None
    log_p = node.outputs[1] if known else b.op("LogSoftmax", x, axis=_CLASSES)
    dl = gs[1] if len(gs) > 1 else None
    dw = None
    if g is not None:
        hits = _selected(b, node)
        weighted = _weighted(b, node, hits)
        each = _per_label(b, node, g, weighted)
        picked = b.op("Neg", b.op("Mul", weighted, each))
        dl = picked if dl is None else b.op("Add", dl, picked)
        dw = _towards_class_weights(b, node, hits, each, log_p)
    assert dl is not None
    dx = b.op("Sub", dl, b.op("Mul", b.op("Exp", log_p), b.sum_over(dl, [_CLASSES], keepdims=True)))
    return dx, None, dw


def likelihood_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """dl = -w [class = label] g."""
    x, g = node.inputs[0], gs[0]
    assert x is not None
    assert g is not None
    hits = _selected(b, node)
    weighted = _weighted(b, node, hits)
    each = _per_label(b, node, g, weighted)
    return b.op("Neg", b.op("Mul", weighted, each)), None, _towards_class_weights(b, node, hits, each, x)


row(
    "SoftmaxCrossEntropyLoss",
    moments=cross_entropy_moments,
    range=cross_entropy_range,
    pullback=cross_entropy_pullback,
    bound=cross_entropy_bound,
    vjp=cross_entropy_vjp,
)
row(
    "NegativeLogLikelihoodLoss",
    moments=likelihood_moments,
    range=likelihood_range,
    pullback=likelihood_pullback,
    bound=likelihood_bound,
    vjp=likelihood_vjp,
)
