"""What picks one piece of a Concat reads the piece itself.

Exporters that unroll a recurrence put its states side by side and pick the last one; the estimate spreads the gradient
of a piece evenly over the axis it was cut from, and would give every step a part of it.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from gradlint.graph import attribute, constant_array, dims, op


def read_pieces(graph: ir.Graph) -> None:
    """Rewrite Gather(Concat(pieces)), also behind one Transpose, to Gather(piece) where constant indices stay in it."""
    for node in list(graph):
        if op(node) != "Gather" or node.inputs[0] is None or node.inputs[0].graph is not graph:
            continue
        moved = node.inputs[0].producer()
        perm = attribute(moved, "perm") if moved is not None and op(moved) == "Transpose" else None
        concat = moved.inputs[0].producer() if moved is not None and perm and moved.inputs[0] is not None else moved
        index, rank = constant_array(node.inputs[1]), len(dims(node.inputs[0]) or ())
        if concat is None or op(concat) != "Concat" or index is None or not index.size or not rank:
            continue
        axis = attribute(node, "axis", 0) % rank
        found = _piece(concat, list(perm)[axis] if perm else axis, rank, index)
        if found is not None:
            piece, start, total = found
            if perm:
                piece = _transposed(piece, list(perm), node)
            tensor = ir.tensor(np.asarray(index % total - start, np.int64))
            kind = ir.TensorType(ir.DataType.INT64)
            place = ir.Value(name=f"{node.name}/index", const_value=tensor, shape=ir.Shape(index.shape), type=kind)
            graph.register_initializer(place)
            node.replace_input_with(0, piece)
            node.replace_input_with(1, place)


def _piece(concat: ir.Node, axis: int, rank: int, index: np.ndarray) -> tuple[ir.Value, int, int] | None:
    """The one piece that all indices along `axis` fall in, where it starts, and the size of all."""
    shapes = [dims(v) for v in concat.inputs]
    if attribute(concat, "axis") % rank != axis or any(s is None for s in shapes):
        return None
    ends = list(itertools.accumulate(s[axis] for s in shapes if s is not None))
    if np.any(index < -ends[-1]) or np.any(index >= ends[-1]):
        return None
    places = set(np.searchsorted(ends, np.ravel(index % ends[-1]), side="right").tolist())
    piece = concat.inputs[k] if len(places) == 1 and (k := places.pop()) >= 0 else None
    return None if piece is None else (piece, ends[k] - (dims(piece) or ())[axis], ends[-1])


def _transposed(piece: ir.Value, perm: list[int], before: ir.Node) -> ir.Value:
    name = f"{before.name}/{piece.name}"
    shape = dims(piece) or ()
    moved = ir.Value(name=name, shape=ir.Shape([shape[k] for k in perm]), type=piece.type)
    node = ir.node("Transpose", [piece], attributes={"perm": perm}, outputs=[moved], name=name)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return moved
