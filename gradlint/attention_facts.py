"""Dot-product attention: where it stands, over how many keys, with which scale, and how far its logits spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.estimate import Estimate
from gradlint.fact_table import Fact, Subject
from gradlint.graph import MOVES, attribute, dims, is_float, module, op, source
from gradlint.patterns import array_behind, normalisations, scalar
from gradlint.results import Evidence
from gradlint.structure import Bypasses
from gradlint.weight_facts import fans

_FUSED = frozenset({"Attention", "com.microsoft:MultiHeadAttention", "com.microsoft:Attention"})
_LOGIT_OPS = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Max", "Min", "Clip"})
_FOLDED = 2.0  # variance of the logits per unit of input variance up to which a scale counts as folded into the weights


@dataclass(frozen=True)
class Attention:
    """One softmax over products of queries and keys.

    node: the Softmax or the fused operator; query, key: the factors of the product, as the layers give them; scale:
    what the graph multiplies their product with (None: can't be told); path: values from the product on to the first
    mask, each with the scale still to come.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    keys: int | None
    head_dim: int | None
    scale: float | None
    path: tuple[tuple[ir.Value, float], ...]


def attentions(graph: ir.Graph) -> list[Attention]:
    """Every dot-product attention, in graph order."""
    found = (_fused(n) if op(n) in _FUSED else _around(n) for n in graph if op(n) in {"Softmax", *_FUSED})
    return [a for a in found if a is not None]


def _fused(node: ir.Node) -> Attention | None:
    """An attention operator divides by sqrt(d) unless it is told a scale."""
    if op(node) == "com.microsoft:Attention" or any(v is None for v in node.inputs[:3]) or len(node.inputs) < 3:
        return None
    query, key = node.inputs[0], node.inputs[1]
    assert query is not None
    assert key is not None
    heads = attribute(node, "q_num_heads", attribute(node, "num_heads", 0)) or 1
    q, k = dims(query), dims(key)
    size = None if q is None else q[-1] // (heads if len(q) == 3 else 1)
    scale = attribute(node, "scale", 0.0) or (1 / math.sqrt(size) if size else None)
    return Attention(node, query, key, None if k is None else k[-2], size, scale, ())


def _around(softmax: ir.Node) -> Attention | None:
    """Back from the softmax, through masks, scales and moves, to the product of two values that vary."""
    logits = softmax.inputs[0]
    shape = dims(logits)
    if shape is None or attribute(softmax, "axis", -1) not in (-1, len(shape) - 1):
        return None
    found = _product(logits, 8)
    if found is None:
        return None
    node, steps = found
    query, key = (_stripped(v) for v in node.inputs[:2])
    (q, before), (k, after) = query, key
    if q is None or k is None:
        return None
    later = 1.0
    path: list[tuple[ir.Value, float]] = []
    for value, factor in steps:  # from the softmax back to the product
        if factor is None:
            path = []  # a mask changes the logits here: what was seen so far is not the plain product
            continue
        path.append((value, later))
        later *= factor
    path.append((node.outputs[0], later))
    width = dims(node.inputs[0])
    return Attention(
        softmax, q, k, shape[-1], None if width is None else width[-1], later * before * after, tuple(path)
    )


def _product(value: ir.Value | None, depth: int) -> tuple[ir.Node, list[tuple[ir.Value, float | None]]] | None:
    """The MatMul of two varying values behind the logits, and the steps back to it: (value, factor; None: no
    factor)."""
    node = value.producer() if value is not None else None
    if node is None or value is None or depth == 0:
        return None
    if op(node) in ("MatMul", "Einsum") and len(node.inputs) == 2:
        return (node, []) if all(_varies(v) for v in node.inputs) else None
    if op(node) in MOVES or op(node) in _LOGIT_OPS:
        factor = _factor(node)
        for parent in (v for v in node.inputs if _varies(v)):
            found = _product(parent, depth - 1)
            if found is not None:
                return found[0], [(value, factor), *found[1]]
    return None


def _varies(value: ir.Value | None) -> bool:
    """Not a constant, and not one merely moved (what the model's weights are multiplied with is a projection)."""
    return value is not None and is_float(value) and array_behind(value) is None


def _factor(node: ir.Node) -> float | None:
    """What a node multiplies its varying input with: 1 for a move, None for masks and functions."""
    if op(node) in MOVES:
        return 1.0
    if op(node) not in ("Mul", "Div"):
        return None
    for k, value in enumerate(node.inputs):
        size = _size(value)
        if size is not None and not (op(node) == "Div" and k == 0):
            return size if op(node) == "Mul" else (1 / size if size else None)
    return None


def _size(value: ir.Value | None) -> float | None:
    """The number a constant holds; of several (a temperature per head) their root mean square."""
    if (single := scalar(value)) is not None:
        return abs(single)
    stored = array_behind(value)
    if stored is None or stored.const_value is None or not is_float(stored) or stored.const_value.size > 1 << 12:
        return None
    return float(np.sqrt(np.mean(np.square(stored.const_value.numpy().astype(np.float64)))))


def _stripped(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a factor of the product is made of by moves and scales; and that scale."""
    scale = 1.0
    for _ in range(12):
        node = value.producer() if value is not None else None
        factor = None if node is None or op(node) not in {*MOVES, "Mul", "Div"} else _factor(node)
        parents = [] if node is None else [v for v in node.inputs if _varies(v)]
        if factor is None or len(parents) != 1:
            break
        value, scale = parents[0], scale * factor
    return value, scale


# -- facts -------------------------------------------------------------------------------------------------------------


def attention_subjects(
    parts: Anatomy,
    found: list[Attention],
    around: Bypasses,
    estimate: Estimate,
    measured: Mapping[str, Mapping[str, float]],
    array: Callable[[ir.Value | None], np.ndarray | None],
) -> list[Subject]:
    """One subject per attention. `measured`: the probe's figures by value name (those of the softmax are read)."""
    norms = normalisations(parts.graph)
    series = _series(parts.graph, {a.node for a in found}, around)
    order = {n: k for k, n in enumerate(parts.graph)}
    subjects = []
    for attention in found:
        node = attention.node
        facts: dict[str, Fact] = {
            "op_type": op(node),
            "module": module(node),
            "keys": attention.keys,
            "head_dim": attention.head_dim,
            "is_scaled": _is_scaled(attention, norms, array),
            "attention_index": series[node],
            "has_skip": node in around.bypassed,
        }
        evidence: dict[str, Evidence] = {}
        row = measured.get(str(node.outputs[0].name), {})
        spreads: tuple[tuple[Evidence, float | None], ...] = (
            ("estimated", _estimated_spread(attention, estimate)),
            ("measured", _measured_spread(attention, row)),
        )
        for kind, spread in spreads:
            if spread is not None:
                facts[f"{kind}_logit_std"] = facts["logit_std"] = spread
                evidence["logit_std"] = kind
        if "max_probability" in row:
            facts["measured_max_probability"] = facts["max_probability"] = row["max_probability"]
            evidence["max_probability"] = "measured"
        subjects.append(Subject("attention", str(node.name), None, order[node], facts, evidence, (), source(node)))
    return subjects


def _series(graph: ir.Graph, nodes: set[ir.Node], around: Bypasses) -> dict[ir.Node, int]:
    """Attentions in a row that end at each, counted anew behind a skip; a bypassed one counts 0."""
    at: dict[ir.Value, int] = {}
    found: dict[ir.Node, int] = {}
    for node in graph:
        count = 0 if node in around.joins else max((at.get(v, 0) for v in node.inputs if v is not None), default=0)
        if node in nodes:
            count = 0 if node in around.bypassed else count + 1
            found[node] = count
        at.update(dict.fromkeys(node.outputs, count))
    return found


def _is_scaled(
    attention: Attention, norms: set[ir.Node], array: Callable[[ir.Value | None], np.ndarray | None]
) -> bool | None:
    """Is the product divided by about sqrt(d), in the graph or in the weights of query and key? None: can't be told.

    With inputs of variance 1 the logits have variance scale^2 d v_q v_k, v = fan_in E[w^2] of the projection; a factor
    of 1/sqrt(d) folded into a query weight of the usual size keeps that at 2 or below.
    """
    size, scale = attention.head_dim, attention.scale
    if size is None or scale is None:
        return None
    if scale * math.sqrt(size) <= 2.0:
        return True
    variances = [_projection_variance(v, array) for v in (attention.query, attention.key)]
    if variances[0] is None or variances[1] is None:
        return None
    return scale**2 * size * variances[0] * variances[1] <= _FOLDED


def _projection_variance(value: ir.Value, array: Callable[[ir.Value | None], np.ndarray | None]) -> float | None:
    """fan_in E[w^2] of the layer that gives a query or key, looking through its bias and through slices of a packed
    one."""
    for _ in range(8):
        node = value.producer()
        if node is None:
            return None
        if op(node) in ("MatMul", "Gemm"):
            w = array(node.inputs[1])
            sizes = fans(node, 1)
            if w is None or sizes is None:
                return None
            flat = w.reshape(-1)[:: max(1, w.size >> 16)].astype(np.float64)
            return sizes[0] * float(np.mean(flat**2))
        moving = [v for v in node.inputs if _varies(v)]
        if len(moving) != 1 or (op(node) not in MOVES and op(node) != "Add"):
            return None
        value = moving[0]  # type: ignore[assignment]
    return None


def _estimated_spread(attention: Attention, estimate: Estimate) -> float | None:
    """Standard deviation of the plain logits over keys: what is the same at all of them does not count."""
    for value, scale in reversed(attention.path):
        x = estimate.moments.get(value)
        if x is not None:
            between = float(np.mean(np.var(x.mean, axis=-1))) if x.mean.ndim else 0.0
            return scale * math.sqrt(max(0.0, between + float(np.mean(x.fixed + x.local))))
    return None


def _measured_spread(attention: Attention, row: Mapping[str, float]) -> float | None:
    """Of the logits next to the softmax, times what they are still scaled with."""
    return attention.path[0][1] * row["logit_std"] if attention.path and "logit_std" in row else None
