"""The two matrix products inside attention: logits s = q k^T and the mixture o = p v, p = softmax(s).

Unlike factors of other products, the weights of a query sum to one, and softmax is blind to what all keys share.

- s: the part that is the same for all keys of a query is kept apart as `shared`, and softmax ignores it.
- o: what all tokens share passes whole (sum p = 1), what differs from token to token is averaged: sum p^2. Where the
  mean weights are the same for every query, so is that average: it becomes `shared`.
- Gradients of p and s: `shared` is what is the same for every query (it differs from key to key); what is the same for
  all keys is left out, since it ends at the softmax. Gradients of s sum to zero over the keys: towards q only the
  differences between keys count.

Shapes: q (.., M, D), k^T (.., D, N), p (.., M, N), v (.., N, D).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import attribute, dims, op
from gradlint.ops.softmax_weights import weights
from gradlint.runs import run
from gradlint.transfer import Context

_BETWEEN = frozenset({"Mul", "Div", "Add", "Sub", "Where", "Cast", "Tanh"})  # scale, mask, bias, cap before softmax

MASKED = -1e4  # what is added to a logit to switch it off lies below


# -- which products these are ------------------------------------------------------------------------------------------


def _sole_use(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The one node of the graph that reads a value, and at which input; None if there are more or none."""
    owner = value.producer()
    uses = [(u.node, u.idx) for u in value.uses() if owner is None or u.node.graph is owner.graph]
    return uses[0] if len(uses) == 1 else None


def weighs(node: ir.Node) -> bool:
    """Is this a softmax over keys: along the last axis, its only use (but for masks) the left side of a product?"""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if op(node) != "Softmax" or shape is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        return False
    use = _sole_use(node.outputs[0])
    while use is not None and op(use[0]) in ("Cast", "Where"):
        use = _sole_use(use[0].outputs[0])
    return use is not None and op(use[0]) == "MatMul" and use[1] == 0


def makes_logits(product: ir.Node) -> bool:
    """Does this product end, scaled and masked, in a softmax over keys?"""
    use = _sole_use(product.outputs[0])
    while use is not None and op(use[0]) in _BETWEEN:
        use = _sole_use(use[0].outputs[0])
    return use is not None and weighs(use[0])


def mixes(product: ir.Node) -> bool:
    """Is the left side of this product a softmax over keys?"""
    value = product.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if op(node) not in ("Cast", "Where"):
            return weighs(node)
        value = node.inputs[-1] if op(node) == "Where" else node.inputs[0]
    return False


def keys_seen(ctx: Context, softmax: ir.Node) -> np.ndarray | None:
    """How many keys each query sees through constant masks (added, or by Where), flat; None without masks."""
    shape, value = dims(softmax.inputs[0]), softmax.inputs[0]
    hidden: np.ndarray | None = None
    while value is not None and shape is not None and (node := value.producer()) is not None and op(node) in _BETWEEN:
        found = _hidden(ctx, node)
        if found is not None:
            hidden = found if hidden is None else hidden | found
        moving = [v for v in node.inputs if ctx.varies(v) and dims(v) == shape]
        value = moving[0] if len(moving) == 1 else None
    if hidden is None or shape is None or not hidden.any():
        return None
    hidden = np.broadcast_to(hidden, (*hidden.shape[:-1], shape[-1]))
    return np.maximum(shape[-1] - hidden.sum(axis=-1), 1).ravel()


def _hidden(ctx: Context, node: ir.Node) -> np.ndarray | None:
    """Where this node puts minus infinity in place of a logit."""
    arrays = [None if v is None or ctx.varies(v) else ctx.array(v) for v in node.inputs]
    if op(node) == "Add":
        mask = next((a for a in arrays if a is not None), None)
        return None if mask is None or mask.ndim == 0 else np.asarray(mask <= MASKED)
    if op(node) == "Where" and arrays[0] is not None and arrays[0].ndim > 0:
        for k, covered in ((1, arrays[0]), (2, ~arrays[0])):
            branch = arrays[k]
            if branch is not None and branch.size > 0 and bool((branch <= MASKED).all()):
                return covered
    return None


_KEPT = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Cast", "Add", "Mul"}
)


def _source(ctx: Context, value: ir.Value | None) -> ir.Value | None:
    """The tokens that keys or values are projected from, through one matrix product with a weight."""
    projected = False
    while value is not None and (node := value.producer()) is not None:
        moving = [v for v in node.inputs if ctx.varies(v)]
        product = op(node) in ("MatMul", "Gemm")
        if len(moving) != 1 or (product and (projected or node.inputs[0] is not moving[0])):
            break
        if not product and op(node) not in _KEPT:
            break
        projected, value = projected or product, moving[0]
    return value if projected else None


def kinship(ctx: Context, product: ir.Node, s: Moments) -> float:
    """How much keys and values made from the same tokens raise the gradients of logits q k^T: 1 + n / D.

    Towards q, sum over keys of p (G v) k^T is a sum over n tokens x of v k^T = W_v x x^T W_k^T: n like terms beside n
    random ones, of which there are D^2 of size 1 / D: the same for dW_k = sum of x dk^T. n = 1 / sum p^2 keys count.
    """
    scale, use = 1.0, _sole_use(product.outputs[0])
    while use is not None and op(use[0]) in _BETWEEN:
        factors = [ctx.array(v) for k, v in enumerate(use[0].inputs) if k != use[1] and not ctx.varies(v)]
        if op(use[0]) in ("Mul", "Div") and factors and factors[0] is not None and factors[0].size == 1:
            scale *= float(factors[0].reshape(-1)[0]) ** (1 if op(use[0]) == "Mul" else -1)
        use = _sole_use(use[0].outputs[0])
    softmax = None if use is None else use[0]
    use = None if softmax is None else _sole_use(softmax.outputs[0])
    while use is not None and op(use[0]) != "MatMul":
        use = _sole_use(use[0].outputs[0])
    source, shape = _source(ctx, product.inputs[1]), dims(product.outputs[0])
    if softmax is None or use is None or source is None or shape is None:
        return 1.0
    width = (dims(source) or (0,))[-1]
    if source is not _source(ctx, use[0].inputs[1]) or width == 0:
        return 1.0
    seen = keys_seen(ctx, softmax)
    counts = np.asarray(float(shape[-1])) if seen is None else seen
    std = float(np.sqrt(np.mean(s.fixed + s.local))) * abs(scale)
    return 1 + float(np.mean(1 / weights(counts, std).squares)) / width


# -- arrays ------------------------------------------------------------------------------------------------------------


def swap(a: Array) -> Array:
    return np.swapaxes(a, -1, -2)


def contract(a: Array, b: Array, width: int) -> Array:
    """a @ b for arrays that broadcast against operands whose common axis has `width` elements."""
    if a.shape[-1] == 1 and b.shape[-2] == 1:
        return width * a * b
    return np.matmul(run(a, -1, width), run(b, -2, width))


def heads_apart(a: Array, shape: tuple[int, ...]) -> Array:
    """Resolved along all axes but the examples' and the tokens': heads and features do not share what tokens share."""
    return np.broadcast_to(a, [n if 0 < k != len(shape) - 2 else a.shape[k] for k, n in enumerate(shape)])


def _average(a: Array, axis: int) -> Array:
    return a.mean(axis=axis, keepdims=True)


def _coherent(shared: Array) -> Array:
    """The second moment of the average over tokens of what is the same at all of them, up to its size."""
    return _average(np.sqrt(shared), -2) ** 2


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
    """dq = sum over keys of g times what differs between keys; dk = sum over queries, coherent for g's shared part.

    g sums to zero over keys, behind a softmax: so does dk.
    """
    between = swap(_differences(k, -1))
    dq = Gradient(contract(g.shared, between, keys), contract(g.local, between, keys))
    level = _average(q.mean, -2) ** 2 + _average(q.shared, -2)
    scatter = _average(_differences(q, -2), -2)
    same = _coherent(g.shared)
    dk = swap(same) * (queries**2 * level + queries * scatter) + contract(swap(g.local), q.second, queries)
    return dq, Gradient(np.zeros_like(dk), dk, dk).map(swap)


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
    dp = Gradient(contract(_coherent(g.shared), between, features), contract(g.total, between, features))
    dp = Gradient(dp.shared, np.maximum(dp.local - dp.shared, 0))
    received = p.mean.sum(axis=-2, keepdims=True) * (queries if p.mean.shape[-2] == 1 else 1)
    coherent, column = _coherent(g.shared), swap(p.var)
    dv_shared = coherent * _average(received, -1) ** 2 + contract(swap(_average(p.mean, -1) ** 2), g.local, queries)
    dv_local = (
        coherent * swap(_spread(received, -1))
        + contract(column, g.total, queries)
        + contract(swap(_spread(p.mean, -1)), g.local, queries)
    )
    return dp, Gradient(dv_shared, dv_local)
