"""One direction of a recurrent layer in the backward graph, and what its cell is built from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute, dims, op
from gradlint.ops.recurrent_cell import GATES, Activation

_END = np.iinfo(np.int64).max

# -- activations of a cell ---------------------------------------------------------------------------------------------

_OPERATORS = {
    "sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "leakyrelu": "LeakyRelu",
    "thresholdedrelu": "ThresholdedRelu", "hardsigmoid": "HardSigmoid", "elu": "Elu", "softsign": "Softsign",
    "softplus": "Softplus",
}  # fmt: skip


def activate(b: Backward, act: Activation, z: ir.Value) -> ir.Value:
    if act.name == "affine":
        return b.op("Add", b.op("Mul", z, b.scalar(act.alpha, z)), b.scalar(act.beta, z))
    if act.name == "scaledtanh":
        return b.op("Mul", b.op("Tanh", b.op("Mul", z, b.scalar(act.beta, z))), b.scalar(act.alpha, z))
    alpha = act.alpha if act.name in ("leakyrelu", "thresholdedrelu", "hardsigmoid", "elu") else None
    beta = act.beta if act.name == "hardsigmoid" else None
    return b.op(_OPERATORS[act.name], z, alpha=alpha, beta=beta)


def slope(b: Backward, act: Activation, y: ir.Value, z: ir.Value | None, clip: float) -> ir.Value:
    """f'(z), from the output y = f(z) where that tells it; z is needed for kinks, and where it is clipped."""
    factor = _slope(b, act, y, z)
    if not clip:
        return factor
    assert z is not None
    inside = b.op("Less", b.op("Abs", z), b.scalar(clip, z), dtype=ir.DataType.BOOL)
    return b.op("Where", inside, factor, b.scalar(0.0, y), dtype=y.dtype)


def needs_input(act: Activation, clip: float) -> bool:
    return bool(clip) or act.name in ("leakyrelu", "thresholdedrelu", "hardsigmoid", "elu")


def _slope(b: Backward, act: Activation, y: ir.Value, z: ir.Value | None) -> ir.Value:
    one = b.scalar(1.0, y)
    if act.name == "sigmoid":
        return b.op("Mul", y, b.op("Sub", one, y))
    if act.name == "tanh":
        return b.op("Sub", one, b.op("Mul", y, y))
    if act.name == "scaledtanh":  # a b (1 - tanh^2) = b (a - y^2 / a)
        square = b.op("Mul", b.op("Mul", y, y), b.scalar(act.beta / act.alpha, y))
        return b.op("Sub", b.scalar(act.alpha * act.beta, y), square)
    if act.name == "softsign":
        rest = b.op("Sub", one, b.op("Abs", y))
        return b.op("Mul", rest, rest)
    if act.name == "softplus":
        return b.op("Sub", one, b.op("Exp", b.op("Neg", y)))
    if act.name == "affine":
        return b.op("Expand", b.scalar(act.alpha, y), b.op("Shape", y, dtype=ir.DataType.INT64), dtype=y.dtype)
    if act.name == "relu":
        return b.op("Cast", _above(b, y, 0.0), to=int(float_type(y)), dtype=y.dtype)
    assert z is not None
    if act.name == "hardsigmoid":
        inside = b.op("And", _above(b, y, 0.0), b.op("Not", _above(b, y, 1.0, strict=False)))
        return b.op("Where", inside, b.scalar(act.alpha, y), b.scalar(0.0, y), dtype=y.dtype)
    if act.name == "thresholdedrelu":
        return b.op("Cast", _above(b, z, act.alpha), to=int(float_type(y)), dtype=y.dtype)
    below = b.scalar(act.alpha, y) if act.name == "leakyrelu" else b.op("Add", y, b.scalar(act.alpha, y))
    return b.op("Where", _above(b, z, 0.0), one, below, dtype=y.dtype)


def float_type(v: ir.Value) -> ir.DataType:
    assert v.dtype is not None
    return v.dtype


def _above(b: Backward, v: ir.Value, level: float, *, strict: bool = True) -> ir.Value:
    return b.op("Greater" if strict else "GreaterOrEqual", v, b.scalar(level, v), dtype=ir.DataType.BOOL)


# -- one direction -----------------------------------------------------------------------------------------------------


@dataclass
class Direction:
    """One direction of a node: its weights without the axis of directions, its sequences in backward order.

    x: (T, B, I), y: hidden states (T, B, H), before: the hidden states one step earlier; dy, dh, dc: gradients that
    come from Y, Y_h, Y_c; mask: 1 where a step is inside its sequence (T, B, 1), None where all are.
    """

    b: Backward
    node: ir.Node
    acts: tuple[Activation, ...]
    clip: float
    x: ir.Value
    y: ir.Value
    before: ir.Value
    w: ir.Value
    r: ir.Value
    bias: ir.Value | None
    peephole: ir.Value | None
    c0: ir.Value
    dy: ir.Value
    dh: ir.Value
    dc: ir.Value | None
    mask: ir.Value | None

    def rows(self, v: ir.Value) -> ir.Value:
        """(T, B, n) as a matrix with a row per step and example."""
        return self.b.op("Flatten", v, axis=2)

    def steps(self, v: ir.Value) -> ir.Value:
        """The inverse: rows as (T, B, n)."""
        out = self.b.op("Reshape", v, _leading(self.b, self.y))
        out.shape = None if self.y.shape is None else ir.Shape([*list(self.y.shape)[:2], None])
        return out

    def keep(self, v: ir.Value) -> ir.Value:
        """v (T, B, n), zero outside the sequences."""
        return v if self.mask is None else self.b.op("Mul", v, self.mask)


@dataclass
class Found:
    """Gradients of one direction; those of the weights are (gates of W, gates of R) pairs of rows to multiply with.

    hidden: dL/dh behind every step, in backward order; cell: of dL/dc the squares (T, 1, 1), without what h adds to it.
    """

    hidden: ir.Value
    h0: ir.Value
    c0: ir.Value | None
    into_w: ir.Value
    dr: ir.Value | None
    db: ir.Value | None
    dp: ir.Value | None = None
    cell: ir.Value | None = None


def _leading(b: Backward, like: ir.Value) -> ir.Value:
    known = dims(like)
    if known is not None:
        return b.constant([known[0], known[1], -1])
    return b.op("Concat", b.op("Shape", like, start=0, end=2, dtype=ir.DataType.INT64), b.constant([-1]), axis=0)


def flip(b: Backward, v: ir.Value) -> ir.Value:
    """Reversed along axis 0."""
    if v.shape is not None and v.shape[0] == 1:
        return v
    out = b.op("Slice", v, b.constant([-1]), b.constant([-_END]), b.constant([0]), b.constant([-1]))
    out.shape = v.shape
    return out


def shifted(b: Backward, v: ir.Value, first: ir.Value) -> ir.Value:
    """In backward order: the entry of one step earlier, `first` (B, n) before the first step."""
    start = b.op("Unsqueeze", first, b.constant([0]))
    if v.shape is not None and v.shape[0] == 1:
        return start
    rest = b.op("Slice", v, b.constant([1]), b.constant([_END]), b.constant([0]))
    return b.op("Concat", rest, start, axis=0)


def split(b: Backward, v: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    """Columns of a matrix."""
    return b.ops("Split", v, b.constant(sizes), outputs=len(sizes), axis=1) if len(sizes) > 1 else (v,)


def hidden_size(node: ir.Node) -> int:
    size = attribute(node, "hidden_size")
    if size is not None:
        return int(size)
    r = node.inputs[2]
    assert r is not None
    assert r.shape is not None
    assert isinstance(r.shape[2], int)
    return r.shape[2]


def gemm(d: Direction, x: ir.Value, w: ir.Value, added: ir.Value | None) -> ir.Value:
    """x W^T + added over all steps at once, as rows."""
    return d.b.op("Gemm", d.rows(x), w, *([added] if added is not None else []), transB=1)


def both_biases(d: Direction) -> ir.Value | None:
    """The sum of the two halves of B."""
    if d.bias is None:
        return None
    width = GATES[op(d.node)] * hidden_size(d.node)
    one, two = split_rows(d.b, d.bias, [width] * 2)
    return d.b.op("Add", one, two)


def split_rows(b: Backward, v: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    return b.ops("Split", v, b.constant(sizes), outputs=len(sizes), axis=0)


def clipped(b: Backward, z: ir.Value, clip: float) -> ir.Value:
    return b.op("Clip", z, b.scalar(-clip, z), b.scalar(clip, z)) if clip else z


def peepholes(d: Direction) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    if d.peephole is None:
        return None, None, None
    i, o, f = split_rows(d.b, d.peephole, [hidden_size(d.node)] * 3)
    return i, o, f


def added(b: Backward, z: ir.Value, c: ir.Value, p: ir.Value | None) -> ir.Value:
    return z if p is None else b.op("Add", z, b.op("Mul", c, p))


def stay(s: Backward, back: ir.Value, dh: ir.Value, mask: list[ir.Value]) -> ir.Value:
    """Outside its sequence a step does nothing: the gradient passes."""
    return s.op("Add", back, s.op("Mul", dh, mask[0])) if mask else back


def outside(d: Direction) -> list[ir.Value]:
    """What `_stay` multiplies with: 1 outside the sequences."""
    return [] if d.mask is None else [d.b.op("Sub", d.b.scalar(1.0, d.mask), d.mask)]
