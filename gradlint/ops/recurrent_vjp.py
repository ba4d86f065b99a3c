"""Gradients of RNN, GRU and LSTM, for which ONNX has no operators.

The gates of all steps are computed again at once from X and Y (one product each); only what truly is a recurrence
runs step by step, in a Scan: going back, one small product per step. The gradients of the weights are products over all
steps again. Sequences are kept in *backward order*: entry 0 is the step the forward pass made last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute, dims, op
from gradlint.ops.recurrent_cell import GATES, Activation, activations, backwards, directions, lengths, optional
from gradlint.subgraphs import scan

Values = Sequence[ir.Value | None]
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
        return b.op("Cast", _above(b, y, 0.0), to=int(_dtype(y)), dtype=y.dtype)
    assert z is not None
    if act.name == "hardsigmoid":
        inside = b.op("And", _above(b, y, 0.0), b.op("Not", _above(b, y, 1.0, strict=False)))
        return b.op("Where", inside, b.scalar(act.alpha, y), b.scalar(0.0, y), dtype=y.dtype)
    if act.name == "thresholdedrelu":
        return b.op("Cast", _above(b, z, act.alpha), to=int(_dtype(y)), dtype=y.dtype)
    below = b.scalar(act.alpha, y) if act.name == "leakyrelu" else b.op("Add", y, b.scalar(act.alpha, y))
    return b.op("Where", _above(b, z, 0.0), one, below, dtype=y.dtype)


def _dtype(v: ir.Value) -> ir.DataType:
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
    """Gradients of one direction; those of the weights are (gates of W, gates of R) pairs of rows to multiply with."""

    hidden: ir.Value
    h0: ir.Value
    c0: ir.Value | None
    into_w: ir.Value
    dr: ir.Value | None
    db: ir.Value | None
    dp: ir.Value | None = None


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


def _shifted(b: Backward, v: ir.Value, first: ir.Value) -> ir.Value:
    """In backward order: the entry of one step earlier, `first` (B, n) before the first step."""
    start = b.op("Unsqueeze", first, b.constant([0]))
    if v.shape is not None and v.shape[0] == 1:
        return start
    rest = b.op("Slice", v, b.constant([1]), b.constant([_END]), b.constant([0]))
    return b.op("Concat", rest, start, axis=0)


def split(b: Backward, v: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    """Columns of a matrix."""
    return b.ops("Split", v, b.constant(sizes), outputs=len(sizes), axis=1) if len(sizes) > 1 else (v,)


# -- the cells ---------------------------------------------------------------------------------------------------------


def rnn_back(d: Direction) -> Found:
    """h = f(W x + R h' + b): with dz = dh f', dh' = dz R."""
    b, act = d.b, d.acts[0]
    z = None
    if needs_input(act, d.clip):
        z = d.steps(_gemm(d, d.before, d.r, _gemm(d, d.x, d.w, _both(d))))
    gate = d.keep(slope(b, act, d.y, z, d.clip))

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dh = s.op("Add", carried[0], at[0])
        dz = s.op("Mul", dh, at[1])
        return [_stay(s, s.op("MatMul", dz, d.r), dh, at[2:])], [dz, dh]

    (dh0,), (dz, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gate, *_mask(d)], 2)
    flat = d.rows(dz)
    db = b.op("ReduceSum", flat, b.constant([0]), keepdims=0)
    dr = b.op("Gemm", flat, d.rows(d.before), transA=1)
    return Found(hidden, dh0, None, flat, dr, b.op("Concat", db, db, axis=0))


def lstm_back(d: Direction) -> Found:
    """i, o, f = f(..), g = g(..); c = f c' + i g; h = o h(c). Every gate's gradient is dh or dc times a known factor:

    dc += dh o h'(c);  (di, do, df, dg) = (dc g i', dh h(c) o', dc c' f', dc i g');
    dc' = dc f;  dh' = (di, do, df, dg) R.
    Peepholes add their products with the gates' gradients, which are factors of dc and dh as well.
    """
    b, (f, g, h) = d.b, d.acts
    size = _hidden(d.node)
    pre = _gemm(d, d.before, d.r, _gemm(d, d.x, d.w, _both(d)))
    zi, zo, zf, zg = split(b, pre, [size] * 4)
    coupled = bool(attribute(d.node, "input_forget", 0))
    cell = activate(b, g, _clipped(b, zg, d.clip))
    pi, po, pf = _peepholes(d)
    c, c_before = _cells(d, f, zi, zf, cell, (pi, pf), coupled)
    zi, zf, zo = _added(b, zi, c_before, pi), _added(b, zf, c_before, pf), _added(b, zo, c, po)
    i, o = (activate(b, f, _clipped(b, z, d.clip)) for z in (zi, zo))
    forget = b.op("Sub", b.scalar(1.0, i), i) if coupled else activate(b, f, _clipped(b, zf, d.clip))
    out = activate(b, h, c)

    source = b.op("Sub", cell, c_before) if coupled else cell
    to_i = b.op("Mul", source, slope(b, f, i, zi, d.clip))
    to_o = b.op("Mul", out, slope(b, f, o, zo, d.clip))
    to_f = b.op("Mul", c_before, slope(b, f, forget, zf, d.clip))
    to_f = b.op("Mul", to_f, b.scalar(0.0, to_f)) if coupled else to_f
    to_g = b.op("Mul", i, slope(b, g, cell, zg, d.clip))
    into_c = _plus(b, b.op("Mul", o, slope(b, h, out, c, 0.0)), to_o, po)
    through = _plus(b, _plus(b, forget, to_i, pi), to_f, pf)
    gates = d.keep(d.steps(b.op("Concat", to_i, to_o, to_f, to_g, axis=1)))
    into_c, through = d.keep(d.steps(into_c)), d.steps(through)
    if d.mask is not None:
        outside = b.op("Sub", b.scalar(1.0, d.mask), d.mask)
        through = b.op("Add", d.keep(through), outside)

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dy, gate, into, keep, *mask = at
        dh = s.op("Add", carried[0], dy)
        dc = s.op("Add", carried[1], s.op("Mul", dh, into))
        dz = s.op("Mul", s.op("Concat", dc, dh, dc, dc, axis=1), gate)
        return [_stay(s, s.op("MatMul", dz, d.r), dh, mask), s.op("Mul", dc, keep)], [dz, dh]

    start = d.dc if d.dc is not None else b.op("Mul", d.dh, b.scalar(0.0, d.dh))
    (dh0, dc0), (dz, hidden) = scan(b, step, [d.dh, start], [d.keep(d.dy), gates, into_c, through, *_mask(d)], 2)
    flat = d.rows(dz)
    db = b.op("ReduceSum", flat, b.constant([0]), keepdims=0)
    dr = b.op("Gemm", flat, d.rows(d.before), transA=1)
    dp = None
    if d.peephole is not None:
        di, do, df, _ = split(b, flat, [size] * 4)
        seen = b.op("Concat", b.op("Mul", di, c_before), b.op("Mul", do, c), b.op("Mul", df, c_before), axis=1)
        dp = b.op("ReduceSum", seen, b.constant([0]), keepdims=0)
    return Found(hidden, dh0, dc0, flat, dr, b.op("Concat", db, db, axis=0), dp)


def _cells(
    d: Direction,
    f: Activation,
    zi: ir.Value,
    zf: ir.Value,
    cell: ir.Value,
    peepholes: tuple[ir.Value | None, ir.Value | None],
    coupled: bool,
) -> tuple[ir.Value, ir.Value]:
    """The cell states of all steps and those one step earlier, as rows: c = f c' + i g, run forward once more."""
    b = d.b

    def gates(s: Backward, i: ir.Value, forget: ir.Value) -> tuple[ir.Value, ir.Value]:
        i = activate(s, f, _clipped(s, i, d.clip))
        if coupled:
            return i, s.op("Sub", s.scalar(1.0, i), i)
        return i, activate(s, f, _clipped(s, forget, d.clip))

    def plain(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        c = s.op("Add", s.op("Mul", at[0], carried[0]), at[1])
        return [c], [c]

    def peeping(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        before = carried[0]
        i, forget = gates(s, _added(s, at[0], before, peepholes[0]), _added(s, at[1], before, peepholes[1]))
        c = s.op("Add", s.op("Mul", forget, before), s.op("Mul", i, at[2]))
        return [c], [c]

    if d.peephole is None:
        i, forget = gates(b, zi, zf)
        each, run = [forget, b.op("Mul", i, cell)], plain
    else:
        each, run = [zi, zf, cell], peeping
    ordered = [flip(b, d.steps(v)) for v in each]
    _, (states,) = scan(b, run, [d.c0], ordered, 2)
    states.shape = d.y.shape
    c = flip(b, states)
    return d.rows(c), d.rows(_shifted(b, c, d.c0))


def gru_back(d: Direction) -> Found:
    """z, r = f(..), n = g(W x + r (R h' + b)) or g(W x + R (r h') + b); h = (1 - z) n + z h'.

    dz = dh (h' - n) z', dn = dh (1 - z) g'; where the reset gate comes after R all gates' gradients are dh times a
    known factor; where it comes before, one more product per step leads from dn to r.
    """
    b, (f, g), size = d.b, d.acts, _hidden(d.node)
    wb, rb = split1(b, d.bias, [3 * size] * 2) if d.bias is not None else (None, None)
    x_zr, x_n = split(b, _gemm(d, d.x, d.w, wb), [2 * size, size])
    h = d.rows(d.before)
    r_zr, r_n = b.ops("Split", d.r, b.constant([2 * size, size]), outputs=2, axis=0)
    late = bool(attribute(d.node, "linear_before_reset", 0))
    if late:
        s_zr, s_n = split(b, _gemm(d, d.before, d.r, rb), [2 * size, size])
        zz, zr = split(b, b.op("Add", x_zr, s_zr), [size] * 2)
    else:
        rb_zr, rb_n = split1(b, rb, [2 * size, size]) if rb is not None else (None, None)
        s_zr = b.op("Gemm", h, r_zr, x_zr if rb_zr is None else b.op("Add", x_zr, rb_zr), transB=1)
        zz, zr = split(b, s_zr, [size] * 2)
    z, r = (activate(b, f, _clipped(b, v, d.clip)) for v in (zz, zr))
    if late:
        zn = b.op("Add", x_n, b.op("Mul", r, s_n))
    else:
        reset = b.op("Mul", r, h)
        zn = b.op("Gemm", reset, r_n, x_n if rb_n is None else b.op("Add", x_n, rb_n), transB=1)
    n = activate(b, g, _clipped(b, zn, d.clip))

    to_z = b.op("Mul", b.op("Sub", h, n), slope(b, f, z, zz, d.clip))
    to_n = b.op("Mul", b.op("Sub", b.scalar(1.0, z), z), slope(b, g, n, zn, d.clip))
    r_slope = slope(b, f, r, zr, d.clip)
    through = d.steps(z)
    if d.mask is not None:
        through = b.op("Add", d.keep(through), b.op("Sub", b.scalar(1.0, d.mask), d.mask))
    if late:
        to_r = b.op("Mul", b.op("Mul", to_n, s_n), r_slope)
        gates = d.keep(d.steps(b.op("Concat", to_z, to_r, b.op("Mul", to_n, r), axis=1)))

        def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
            dh = s.op("Add", carried[0], at[0])
            dz = s.op("Mul", s.op("Concat", dh, dh, dh, axis=1), at[1])
            return [s.op("Add", s.op("Mul", dh, at[2]), s.op("MatMul", dz, d.r))], [dz, dh]

        (dh0,), (dz, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gates, through], 2)
        flat = d.rows(dz)
        d_zr, _ = split(b, flat, [2 * size, size])
        dn = b.op("Mul", d.rows(d.keep(hidden)), to_n)
        dr = b.op("Gemm", flat, h, transA=1)
        into_r = flat
    else:
        gates = d.keep(d.steps(b.op("Concat", to_z, to_n, axis=1)))
        extra = [d.steps(b.op("Mul", h, r_slope)), d.steps(r)]

        def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
            dy, gate, keep, to_r, reset = at
            dh = s.op("Add", carried[0], dy)
            both = s.op("Mul", s.op("Concat", dh, dh, axis=1), gate)
            dz, dn = split(s, both, [size] * 2)
            dq = s.op("MatMul", dn, r_n)
            dzr = s.op("Concat", dz, s.op("Mul", dq, to_r), axis=1)
            back = s.op("Add", s.op("Mul", dh, keep), s.op("Mul", dq, reset))
            return [s.op("Add", back, s.op("MatMul", dzr, r_zr))], [dzr, dn, dh]

        (dh0,), (dzr, dn, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gates, through, *extra], 2)
        d_zr, dn = d.rows(dzr), d.rows(dn)
        dr = b.op("Concat", b.op("Gemm", d_zr, h, transA=1), b.op("Gemm", dn, reset, transA=1), axis=0)
        into_r = None
    into_w = b.op("Concat", d_zr, dn, axis=1)
    dwb = b.op("ReduceSum", into_w, b.constant([0]), keepdims=0)
    drb = dwb if into_r is None else b.op("ReduceSum", into_r, b.constant([0]), keepdims=0)
    return Found(hidden, dh0, None, into_w, dr, b.op("Concat", dwb, drb, axis=0))


_CELLS = {"RNN": rnn_back, "GRU": gru_back, "LSTM": lstm_back}


# -- small parts of the cells ------------------------------------------------------------------------------------------


def _hidden(node: ir.Node) -> int:
    size = attribute(node, "hidden_size")
    if size is not None:
        return int(size)
    r = node.inputs[2]
    assert r is not None
    assert r.shape is not None
    assert isinstance(r.shape[2], int)
    return r.shape[2]


def _gemm(d: Direction, x: ir.Value, w: ir.Value, added: ir.Value | None) -> ir.Value:
    """x W^T + added over all steps at once, as rows."""
    return d.b.op("Gemm", d.rows(x), w, *([added] if added is not None else []), transB=1)


def _both(d: Direction) -> ir.Value | None:
    """The sum of the two halves of B."""
    if d.bias is None:
        return None
    width = GATES[op(d.node)] * _hidden(d.node)
    one, two = split1(d.b, d.bias, [width] * 2)
    return d.b.op("Add", one, two)


def split1(b: Backward, v: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    return b.ops("Split", v, b.constant(sizes), outputs=len(sizes), axis=0)


def _clipped(b: Backward, z: ir.Value, clip: float) -> ir.Value:
    return b.op("Clip", z, b.scalar(-clip, z), b.scalar(clip, z)) if clip else z


def _peepholes(d: Direction) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    if d.peephole is None:
        return None, None, None
    i, o, f = split1(d.b, d.peephole, [_hidden(d.node)] * 3)
    return i, o, f


def _added(b: Backward, z: ir.Value, c: ir.Value, p: ir.Value | None) -> ir.Value:
    return z if p is None else b.op("Add", z, b.op("Mul", c, p))


def _plus(b: Backward, v: ir.Value, gate: ir.Value, p: ir.Value | None) -> ir.Value:
    return _added(b, v, gate, p)


def _stay(s: Backward, back: ir.Value, dh: ir.Value, mask: list[ir.Value]) -> ir.Value:
    """Outside its sequence a step does nothing: the gradient passes."""
    return s.op("Add", back, s.op("Mul", dh, mask[0])) if mask else back


def _mask(d: Direction) -> list[ir.Value]:
    """What `_stay` multiplies with: 1 outside the sequences."""
    return [] if d.mask is None else [d.b.op("Sub", d.b.scalar(1.0, d.mask), d.mask)]


# -- the node ----------------------------------------------------------------------------------------------------------


def recurrent_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """Gradients of X, W, R, B, initial_h, initial_c and P; dL/dh of every step is the byproduct "hidden" (T, D, B, H),
    its steps in the order the direction runs (entry 0 is the step farthest from the last state).

    Assumes layout 0 (the canonical form). A clipped pre-activation has slope 0 outside the clip.
    """
    _name_hidden_states(node)
    x = node.inputs[0]
    assert x is not None
    count = directions(node)
    parts = [_direction(b, node, gs, k) for k in range(count)]
    found = [_CELLS[op(node)](d) for d in parts]
    b.byproducts[node, "hidden"] = _stacked(b, [flip(b, f.hidden) for f in found], 1)
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
        before=_shifted(b, hidden, h0),
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
    return b.op("Cast", inside, to=int(_dtype(y)), dtype=y.dtype)


def _batch_by_hidden(b: Backward, node: ir.Node, x: ir.Value) -> ir.Value:
    size = _hidden(node)
    if x.shape is not None and isinstance(x.shape[1], int):
        return b.constant([x.shape[1], size])
    batch = b.op("Shape", x, start=1, end=2, dtype=ir.DataType.INT64)
    return b.op("Concat", batch, b.constant([size]), axis=0)
