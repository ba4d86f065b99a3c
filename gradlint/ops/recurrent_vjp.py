"""Gradients of RNN, GRU and LSTM nodes, for which ONNX has no operators: directions taken apart and put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute, op
from gradlint.ops.recurrent_cell import activations, backwards, directions, lengths, optional
from gradlint.ops.recurrent_cells import gru_back, lstm_back, rnn_back
from gradlint.ops.recurrent_direction import Direction, Found, flip, float_type, hidden_size, shifted

Values = Sequence[ir.Value | None]
_END = np.iinfo(np.int64).max
_CELLS = {"RNN": rnn_back, "GRU": gru_back, "LSTM": lstm_back}


def recurrent_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Gradients of X, W, R, B, initial_h, initial_c and P.

    The squares of the state's gradient (LSTM: of both states), summed over directions, examples and units, are
    byproducts (T - 1): "arriving" behind each step but the first, "leaving" before it, in the order the direction runs.

    Assumes layout 0 (the canonical form). A clipped pre-activation has slope 0 outside the clip.
    """
    _name_hidden_states(node)
    x = node.inputs[0]
    assert x is not None
    count = directions(node)
    parts = [_direction(b, node, gs, k) for k in range(count)]
    found = [_CELLS[op(node)](d) for d in parts]
    _keep_squares(b, node, parts, found)
    dx = None
    if b.wanted(x):
        for k, (d, f) in enumerate(zip(parts, found, strict=True)):
            one = b.op("Gemm", f.into_w, d.w)
            one = _natural(b, node, k, d.steps(one))
            dx = one if dx is None else b.op("Add", dx, one)
    into: list[ir.Value | None] = [dx]
    if b.wanted(node.inputs[1]):
        products = [b.op("Gemm", f.into_w, d.rows(d.x), transA=1) for d, f in zip(parts, found, strict=True)]
        into.append(_stacked(b, products, 0))
    else:
        into.append(None)
    for index, name in ((2, "dr"), (3, "db"), (4, ""), (5, "h0"), (6, "c0"), (7, "dp")):
        wanted = name and b.wanted(optional(node, index))
        into.append(_stacked(b, [getattr(f, name) for f in found], 0) if wanted else None)
    return into[: len(node.inputs)]


def _keep_squares(b: Backward, node: ir.Node, parts: Sequence[Direction], found: Sequence[Found]) -> None:
    """In backward order, last step first, what leaves a step is what arrives at the next, without what came from
    outside."""
    axes, axis = b.constant([1, 2]), b.constant([0])
    for name, start, end in (("arriving", 0, -1), ("leaving", 1, _END)):
        totals = []
        for d, f in zip(parts, found, strict=True):
            g = f.hidden if name == "arriving" else b.op("Sub", f.hidden, d.dy)
            squares = b.op("ReduceSumSquare", g, axes, keepdims=0)
            totals += [squares] if f.cell is None else [squares, b.op("Squeeze", f.cell, axes)]
        whole = b.op("Slice", b.total(totals, totals[0]), b.constant([start]), b.constant([end]), axis)
        b.byproducts[node, name] = flip(b, whole)


def _name_hidden_states(node: ir.Node) -> None:
    """Y is needed although the model may not use it."""
    y, x, r = node.outputs[0], node.inputs[0], node.inputs[2]
    if not y.name:
        y.name = f"{node.name}.hidden"
    assert x is not None
    if x.dtype is not None:
        y.dtype = x.dtype
    if y.shape is None and x.shape is not None and r is not None and r.shape is not None:
        y.shape = ir.Shape([x.shape[0], r.shape[0], x.shape[1], r.shape[2]])


def _direction(b: Backward, node: ir.Node, gs: Values, k: int) -> Direction:
    x, w, r = node.inputs[:3]
    y = node.outputs[0]
    assert x is not None
    assert w is not None
    assert r is not None
    gy, gh, gc = (*gs, None, None)[:3]
    hidden = _hidden_states(b, node, k)
    size = _batch_by_hidden(b, node, x)
    zero = b.op("Expand", b.scalar(0.0, y), size, dtype=y.dtype)
    h0, c0 = (
        zero if v is None else _part(b, v, k, 0, node)
        for v in (optional(node, 5), optional(node, 6) if op(node) == "LSTM" else None)
    )
    bias = optional(node, 3)
    peephole = optional(node, 7)
    if gy is not None:
        dy = _ordered(b, node, k, _part(b, gy, k, 1, node))
    else:
        dy = b.op("Expand", b.scalar(0.0, y), b.op("Shape", hidden, dtype=ir.DataType.INT64), dtype=y.dtype)
    dy.shape = hidden.shape
    return Direction(
        b=b,
        node=node,
        acts=activations(node)[k],
        clip=float(attribute(node, "clip", 0.0) or 0.0),
        x=_ordered(b, node, k, x),
        y=hidden,
        before=shifted(b, hidden, h0),
        w=_part(b, w, k, 0, node),
        r=_part(b, r, k, 0, node),
        bias=None if bias is None else _part(b, bias, k, 0, node),
        peephole=None if peephole is None else _part(b, peephole, k, 0, node),
        c0=c0,
        dy=dy,
        dh=zero if gh is None else _part(b, gh, k, 0, node),
        dc=None if gc is None else _part(b, gc, k, 0, node),
        mask=_inside(b, node, x, y),
    )


def _part(b: Backward, v: ir.Value, k: int, axis: int, node: ir.Node) -> ir.Value:
    """Direction k of a value."""
    if directions(node) == 1:
        out = b.op("Squeeze", v, b.constant([axis]))
    else:
        out = b.op("Gather", v, b.constant(k), axis=axis)
    if v.shape is not None:
        out.shape = ir.Shape([d for a, d in enumerate(v.shape) if a != axis])
    return out


def _stacked(b: Backward, parts: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """The inverse: the directions along a new axis."""
    wide = [b.op("Unsqueeze", v, b.constant([axis])) for v in parts if v is not None]
    return wide[0] if len(wide) == 1 else b.op("Concat", *wide, axis=axis)


def _hidden_states(b: Backward, node: ir.Node, k: int) -> ir.Value:
    return _ordered(b, node, k, _part(b, node.outputs[0], k, 1, node))


def _ordered(b: Backward, node: ir.Node, k: int, v: ir.Value) -> ir.Value:
    """(T, B, n) from the order of time to backward order."""
    lens = lengths(node)
    if not backwards(node, k):
        return flip(b, v)
    return v if lens is None else flip(b, _each_reversed(b, v, lens))


def _natural(b: Backward, node: ir.Node, k: int, v: ir.Value) -> ir.Value:
    """The inverse of `_ordered`."""
    lens = lengths(node)
    if not backwards(node, k):
        return flip(b, v)
    return v if lens is None else _each_reversed(b, flip(b, v), lens)


def _each_reversed(b: Backward, v: ir.Value, lens: ir.Value) -> ir.Value:
    """Every example's sequence reversed within its own length, as a direction that runs backwards reads it."""
    long = b.op("Cast", lens, to=int(ir.DataType.INT64), dtype=ir.DataType.INT64)
    out = b.op("ReverseSequence", v, long, time_axis=0, batch_axis=1)
    out.shape = v.shape
    return out


def _inside(b: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value | None:
    """(T, B, 1) in backward order: 1 where the step is inside its sequence."""
    lens = lengths(node)
    if lens is None:
        return None
    steps = b.op("Squeeze", b.op("Shape", x, start=0, end=1, dtype=ir.DataType.INT64))
    times = b.op("Range", b.op("Sub", steps, b.constant(1)), b.constant(-1), b.constant(-1))
    times = b.op("Unsqueeze", times, b.constant([1, 2]))
    ends = b.op("Unsqueeze", b.op("Cast", lens, to=7, dtype=ir.DataType.INT64), b.constant([0, 2]))
    inside = b.op("Less", times, ends, dtype=ir.DataType.BOOL)
    return b.op("Cast", inside, to=int(float_type(y)), dtype=y.dtype)


def _batch_by_hidden(b: Backward, node: ir.Node, x: ir.Value) -> ir.Value:
    size = hidden_size(node)
    if x.shape is not None and isinstance(x.shape[1], int):
        return b.constant([x.shape[1], size])
    batch = b.op("Shape", x, start=1, end=2, dtype=ir.DataType.INT64)
    return b.op("Concat", batch, b.constant([size]), axis=0)
