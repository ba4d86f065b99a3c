"""onnxruntime's fused attention, rotary embeddings and embedding sums, taken apart into operators of opset 21.

Only what has no cache, no packing and no attribute beyond those used here; the rest stays, and is reported.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from gradlint.fused import Parts
from gradlint.graph import attribute, mark_constant, op


def take_attention_apart(graph: ir.Graph, node: ir.Node) -> bool:
    """Write the node out in place where it is one of these and all that matters is known; False where not."""
    write = _WRITERS.get(op(node))
    if write is None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return False
    parts = Parts(graph, node)
    last = write(parts, node)
    if last is None:
        return False
    parts.finish(last)
    return True


def _given(node: ir.Node, *names: str) -> bool:
    """Has the node other attributes than these, but for zeros?"""
    return any(name not in names and attribute(node, name) not in (0, 0.0, -1) for name in node.attributes)


def _inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """The first inputs, None where omitted; whether there are more is `_more`'s question."""
    return [*node.inputs, *[None] * count][:count]


def _more(node: ir.Node, count: int) -> bool:
    return any(v is not None for v in node.inputs[count:])


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _width(value: ir.Value | None) -> int | None:
    """The size of the last axis."""
    size = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


# -- attention ---------------------------------------------------------------------------------------------------------


def _multi_head_attention(p: Parts, node: ir.Node) -> ir.Node | None:
    """softmax(scale q k^T + masks) v per head, of queries, keys and values (B, S, heads size)."""
    q, k, v, bias, mask, added = _inputs(node, 6)
    sizes = [_width(x) for x in (q, k, v)]
    if _more(node, 6) or _given(node, "num_heads", "scale", "mask_filter_value", "unidirectional"):
        return None
    if any(_rank(x) != 3 for x in (q, k, v)) or None in sizes:
        return None
    triple = [x for x in (q, k, v) if x is not None]
    if bias is not None:
        parts = p.split(bias, [n for n in sizes if n is not None], axis=0)
        triple = [p.emit(f"biased{i}", "Add", x, part) for i, (x, part) in enumerate(zip(triple, parts, strict=True))]
    return _attend(p, node, triple, sizes[0] or 0, mask, added)


def _attention(p: Parts, node: ir.Node) -> ir.Node | None:
    """The same of x W + b, whose columns hold queries, keys and values one after the other."""
    x, w, bias, mask, past, added = _inputs(node, 6)
    columns = _width(w)
    if past is not None or _more(node, 6) or columns is None or _rank(x) != 3:
        return None
    if _given(node, "num_heads", "scale", "mask_filter_value", "unidirectional", "qkv_hidden_sizes"):
        return None
    sizes = list(attribute(node, "qkv_hidden_sizes", ()) or (columns // 3,) * 3)
    packed = p.emit("product", "MatMul", x, w)
    if bias is not None:
        packed = p.emit("biased", "Add", packed, bias)
    return _attend(p, node, p.split(packed, sizes, axis=-1), sizes[0], mask, added)


def _attend(
    p: Parts, node: ir.Node, qkv: list[ir.Value], width: int, mask: ir.Value | None, added: ir.Value | None
) -> ir.Node | None:
    count = int(attribute(node, "num_heads", 0))
    if count <= 0 or width <= 0 or (mask is not None and _rank(mask) not in (2, 3)):
        return None
    heads = p.constant("heads", np.array([0, 0, count, -1]))
    q, k, v = (
        p.emit(f"heads{i}", "Transpose", p.emit(f"split{i}", "Reshape", x, heads), perm=[0, 2, *axes])
        for i, (x, axes) in enumerate(zip(qkv, ([1, 3], [3, 1], [1, 3]), strict=True))
    )
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(width / count)
    logits = p.emit("logits", "Mul", p.emit("scores", "MatMul", q, k), p.like("scale", scale))
    lowest = float(attribute(node, "mask_filter_value", -10000.0))
    if mask is not None:
        kept = p.emit("kept", "Cast", mask, to=ir.DataType.BOOL)
        filtered = p.emit("filtered", "Where", kept, p.like("nothing", 0.0), p.like("lowest", lowest))
        axes = p.constant("axes", np.array([1, 2] if _rank(mask) == 2 else [1]))
        logits = p.emit("masked", "Add", logits, p.emit("mask", "Unsqueeze", filtered, axes))
    if attribute(node, "unidirectional", 0):
        square = p.emit("square", "Shape", logits, start=2)
        full = p.emit("full", "Expand", p.like("later", lowest), square)
        logits = p.emit(
            "causal", "Add", logits, p.emit("upper", "Trilu", full, p.constant("above", np.array(1)), upper=1)
        )
    if added is not None:
        logits = p.emit("added", "Add", logits, added)
    mixed = p.emit("mixed", "MatMul", p.emit("softmax", "Softmax", logits, axis=-1), v)
    together = p.emit("together", "Transpose", mixed, perm=[0, 2, 1, 3])
    return ir.node("Reshape", [together, p.constant("merged", np.array([0, 0, -1]))])


# -- embeddings --------------------------------------------------------------------------------------------------------


def _rotary_embedding(p: Parts, node: ir.Node) -> ir.Node | None:
    """Pairs (a, b) of a head turned by the angle of their position: (a cos - b sin, a sin + b cos).

    A pair are the halves' elements, or neighbours where interleaved.
    """
    x, places, cos, sin = _inputs(node, 4)
    half, rank = _width(cos), _rank(x)
    if half is None or rank not in (3, 4) or _rank(places) != 2 or _more(node, 4):
        return None
    if _given(node, "interleaved", "num_heads", "scale") or attribute(node, "scale", 1.0) != 1.0:
        return None
    for table in (cos, sin):
        if table is not None and table.const_value is not None:
            mark_constant(table)
    heads = x
    if rank == 3:
        heads = p.emit("heads", "Reshape", x, p.constant("size", np.array([0, 0, -1, 2 * half])))
    paired = bool(attribute(node, "interleaved", 0))
    shape = [0, 0, 0, half, 2] if paired else [0, 0, 0, 2, half]
    pairs = p.emit("pairs", "Reshape", heads, p.constant("pair", np.array(shape)))
    a, b = p.split(pairs, [1, 1], axis=-1 if paired else -2)
    axes = p.constant("axes", np.array([2 if rank == 3 else 1, -1 if paired else -2]))
    c, s = (
        p.emit(name, "Unsqueeze", p.emit(f"{name}_row", "Gather", table, places, axis=0), axes)
        for name, table in (("cos", cos), ("sin", sin))
    )
    first = p.emit("first", "Sub", p.emit("ac", "Mul", a, c), p.emit("bs", "Mul", b, s))
    second = p.emit("second", "Add", p.emit("as", "Mul", a, s), p.emit("bc", "Mul", b, c))
    turned = p.emit("turned", "Concat", first, second, axis=-1 if paired else -2)
    return ir.node("Reshape", [turned, p.emit("shape", "Shape", x)])


def _embedding_sum(p: Parts, node: ir.Node) -> ir.Node | None:
    """LayerNormalization of the rows of words, positions and segments, added up; positions count from 0."""
    words, segments, word, position, segment, gamma, beta, mask, places = _inputs(node, 9)
    if mask is not None or _more(node, 9) or _given(node, "epsilon", "mask_index_type"):
        return None
    total = p.emit("words", "Gather", word, words, axis=0)
    if places is None:
        zero, one = p.constant("zero", np.array(0)), p.constant("one", np.array(1))
        length = p.emit("length", "Squeeze", p.emit("shape", "Shape", words, start=1, end=2))
        places = p.emit("places", "Range", zero, length, one)
    total = p.emit("placed", "Add", total, p.emit("positions", "Gather", position, places, axis=0))
    if segment is not None and segments is not None:
        total = p.emit("typed", "Add", total, p.emit("segments", "Gather", segment, segments, axis=0))
    settings = {"axis": -1, "epsilon": float(attribute(node, "epsilon", 1e-12))}
    return ir.node("LayerNormalization", [total, gamma, beta], settings)


_WRITERS = {
    "com.microsoft:MultiHeadAttention": _multi_head_attention,
    "com.microsoft:Attention": _attention,
    "com.microsoft:RotaryEmbedding": _rotary_embedding,
    "com.microsoft:EmbedLayerNormalization": _embedding_sum,
}
