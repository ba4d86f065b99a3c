"""The two matrix products inside attention: logits s = q k^T and the mixture o = p v, p = softmax(s).

What general products can't know: the weights of a query sum to one, and softmax is blind to what is the same for all keys.

- s: the part that is the same for all keys of a query is kept apart as `shared`, and softmax ignores it.
- o: what all tokens share passes whole (sum p = 1), what differs from token to token is averaged: sum p^2. Where the mean
  weights are the same for every query, so is that average: it becomes `shared`.
- Gradients of p and s: `shared` is what is the same for every query (it differs from key to key); what is the same for all
  keys is left out, since it ends at the softmax. Gradients of s sum to zero over the keys: towards q only the differences
  between keys count.

q, k and v are taken as independent, though they come from the same tokens. Shapes: q (.., M, D), k^T (.., D, N), p (.., M, N),
v (.., N, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import attribute, op

_BETWEEN = frozenset({"Mul", "Div", "Add", "Sub", "Where", "Cast", "Tanh"})  # scale, mask, bias, cap before softmax


# -- which products these are ------------------------------------------------------------------------------------------


def _users(value: ir.Value) -> Iterator[ir.Usage]:
    owner = value.producer()
    return (u for u in value.uses() if owner is None or u.node.graph is owner.graph)


def _sole_use(value: ir.Value) -> ir.Usage | None:
    uses = list(_users(value))
    return uses[0] if len(uses) == 1 else None


def weighs(node: ir.Node) -> bool:
    """Is this a softmax over keys: along the last axis, its only use (but for masks) the left side of a product?"""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if op(node) != "Softmax" or shape is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        return False
    use = _sole_use(node.outputs[0])
    while use is not None and op(use.node) in ("Cast", "Where"):
        use = _sole_use(use.node.outputs[0])
    return use is not None and op(use.node) == "MatMul" and use.idx == 0


def makes_logits(product: ir.Node) -> bool:
    """Does this product end, scaled and masked, in a softmax over keys?"""
    use = _sole_use(product.outputs[0])
    while use is not None and op(use.node) in _BETWEEN:
        use = _sole_use(use.node.outputs[0])
    return use is not None and weighs(use.node)


def mixes(product: ir.Node) -> bool:
    """Is the left side of this product a softmax over keys?"""
    value = product.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if op(node) not in ("Cast", "Where"):
            return weighs(node)
        value = node.inputs[-1] if op(node) == "Where" else node.inputs[0]
    return False


# -- arrays ------------------------------------------------------------------------------------------------------------


def swap(a: Array) -> Array:
    return np.swapaxes(a, -1, -2)


def contract(a: Array, b: Array, width: int) -> Array:
    """a @ b for arrays that broadcast against operands whose common axis has `width` elements."""
    if a.shape[-1] == 1 and b.shape[-2] == 1:
        return width * a * b
    return np.matmul(
        np.broadcast_to(a, (*a.shape[:-1], width)), np.broadcast_to(b, (*b.shape[:-2], width, b.shape[-1]))
    )


def _average(a: Array, axis: int) -> Array:
    return a.mean(axis=axis, keepdims=True)


def _spread(a: Array, axis: int) -> Array:
    """The squared distance from the average along an axis."""
    return (a - _average(a, axis)) ** 2


def _differences(x: Moments, axis: int) -> Array:
    """Variance between tokens: of what is not the same along `axis`."""
    return _spread(x.mean, axis) + x.fixed + x.local


# -- logits ------------------------------------------------------------------------------------------------------------


def logits(q: Moments, k: Moments, width: int) -> Moments:
    """s = q k^T (k given transposed): local and fixed differ from key to key, shared (of size 1 there) does not."""
    spread = _spread(k.mean, -1)
    centre = _average(k.mean, -1) ** 2 + _average(k.shared, -1)
    fixed = contract(q.mean**2 + q.fixed, k.fixed, width) + contract(q.fixed, spread, width)
    visible = contract(q.second, k.fixed + k.local, width) + contract(q.var, spread, width)
    blind = contract(q.var, centre, width) + contract(q.mean**2, _average(k.shared, -1), width)
    return Moments(contract(q.mean, k.mean, width), fixed, blind, np.maximum(visible - fixed, 0))


def logits_pullback(g: Gradient, q: Moments, k: Moments, queries: int, keys: int) -> tuple[Gradient, Gradient]:
    """dq = sum over keys of g times what differs between keys; dk = sum over queries, coherent for g's shared part."""
    between = swap(_differences(k, -1))
    dq = Gradient(contract(g.shared, between, keys), contract(g.local, between, keys))
    level = _average(q.mean, -2) ** 2 + _average(q.shared, -2)
    scatter = _average(_differences(q, -2), -2)
    same = _average(g.shared, -2)
    dk = swap(same) * (queries**2 * level + queries * scatter) + contract(swap(g.local), q.second, queries)
    return dq, Gradient(np.zeros_like(dk), dk).map(swap)


# -- mixture -----------------------------------------------------------------------------------------------------------


def mixture(p: Moments, v: Moments, width: int) -> Moments:
    """o = p v with sum p = 1 over `width` tokens."""
    between = _spread(v.mean, -2) + v.fixed
    weight = p.mean**2
    shared = contract(p.mean, _average(v.shared, -2), width) + contract(_average(p.mean, -2) ** 2, v.local, width)
    fixed = contract(weight, v.fixed, width) + contract(p.fixed, between, width)
    total = contract(weight, v.local, width) + contract(p.var, between + v.local, width)
    total = total - contract(_average(p.mean, -2) ** 2, v.local, width) - contract(p.fixed, between, width)
    return Moments(contract(p.mean, v.mean, width), fixed, shared, np.maximum(total, 0))


def mixture_pullback(g: Gradient, p: Moments, v: Moments, queries: int, features: int) -> tuple[Gradient, Gradient]:
    """dp = g v^T but for what is the same for all keys; dv = p^T g: with equal weights the same at every token."""
    between = swap(_differences(v, -2))
    dp = Gradient(contract(_average(g.shared, -2), between, features), contract(g.total, between, features))
    dp = Gradient(dp.shared, np.maximum(dp.local - dp.shared, 0))
    received = p.mean.sum(axis=-2, keepdims=True) * (queries if p.mean.shape[-2] == 1 else 1)
    coherent, column = _average(g.shared, -2), swap(p.var)
    dv_shared = coherent * _average(received, -1) ** 2 + contract(swap(_average(p.mean, -1) ** 2), g.local, queries)
    dv_local = (
        coherent * swap(_spread(received, -1))
        + contract(column, g.total, queries)
        + contract(swap(_spread(p.mean, -1)), g.local, queries)
    )
    return dp, Gradient(dv_shared, dv_local)
