"""The way back through the cells of RNN, LSTM and GRU, emitted as ONNX operators.

The gates of all steps are computed again at once from X and Y (one product each); only what truly is a recurrence
runs step by step, in a Scan: going back, one small product per step. The gradients of the weights are products over all
steps again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import attribute
from gradlint.ops.recurrent_cell import Activation
from gradlint.ops.recurrent_direction import (
    Direction,
    Found,
    activate,
    added,
    both_biases,
    clipped,
    flip,
    gemm,
    hidden_size,
    needs_input,
    outside,
    peepholes,
    shifted,
    slope,
    split,
    split_rows,
    stay,
)
from gradlint.subgraphs import scan


def rnn_back(d: Direction) -> Found:
    """h = f(W x + R h' + b): with dz = dh f', dh' = dz R."""
    b, act = d.b, d.acts[0]
    z = None
    if needs_input(act, d.clip):
        z = d.steps(gemm(d, d.before, d.r, gemm(d, d.x, d.w, both_biases(d))))
    gate = d.keep(slope(b, act, d.y, z, d.clip))

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dh = s.op("Add", carried[0], at[0])
        dz = s.op("Mul", dh, at[1])
        return [stay(s, s.op("MatMul", dz, d.r), dh, at[2:])], [dz, dh]

    (dh0,), (dz, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gate, *outside(d)], 2)
    flat = d.rows(dz)
    dr = b.op("Gemm", flat, d.rows(d.before), transA=1)
    return Found(hidden, dh0, None, flat, dr, _biases(b, flat, flat))


def lstm_back(d: Direction) -> Found:
    """i, o, f = f(..), g = g(..); c = f c' + i g; h = o h(c). Every gate's gradient is dh or dc times a known factor:

    dc += dh o h'(c);  (di, do, df, dg) = (dc g i', dh h(c) o', dc c' f', dc i g');
    dc' = dc f;  dh' = (di, do, df, dg) R.
    Peepholes add their products with the gates' gradients, which are factors of dc and dh as well.
    """
    b, (f, g, h) = d.b, d.acts
    size = hidden_size(d.node)
    pre = gemm(d, d.before, d.r, gemm(d, d.x, d.w, both_biases(d)))
    zi, zo, zf, zg = split(b, pre, [size] * 4)
    coupled = bool(attribute(d.node, "input_forget", 0))
    cell = activate(b, g, clipped(b, zg, d.clip))
    pi, po, pf = peepholes(d)
    c, c_before = _cells(d, f, zi, zf, cell, (pi, pf), coupled)
    zi, zf, zo = added(b, zi, c_before, pi), added(b, zf, c_before, pf), added(b, zo, c, po)
    i, o = (activate(b, f, clipped(b, z, d.clip)) for z in (zi, zo))
    forget = b.op("Sub", b.scalar(1.0, i), i) if coupled else activate(b, f, clipped(b, zf, d.clip))
    out = activate(b, h, c)

    source = b.op("Sub", cell, c_before) if coupled else cell
    to_i = b.op("Mul", source, slope(b, f, i, zi, d.clip))
    to_o = b.op("Mul", out, slope(b, f, o, zo, d.clip))
    to_f = b.op("Mul", c_before, slope(b, f, forget, zf, d.clip))
    to_f = b.op("Mul", to_f, b.scalar(0.0, to_f)) if coupled else to_f
    to_g = b.op("Mul", i, slope(b, g, cell, zg, d.clip))
    into_c = added(b, b.op("Mul", o, slope(b, h, out, c, 0.0)), to_o, po)
    through = added(b, added(b, forget, to_i, pi), to_f, pf)
    gates = d.keep(d.steps(b.op("Concat", to_i, to_o, to_f, to_g, axis=1)))
    into_c, through = d.keep(d.steps(into_c)), d.steps(through)
    if d.mask is not None:
        through = b.op("Add", d.keep(through), outside(d)[0])

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dy, gate, into, keep, *mask = at
        dh = s.op("Add", carried[0], dy)
        dc = s.op("Add", carried[1], s.op("Mul", dh, into))
        dz = s.op("Mul", s.op("Concat", dc, dh, dc, dc, axis=1), gate)
        square = s.op("ReduceSumSquare", carried[1])
        return [stay(s, s.op("MatMul", dz, d.r), dh, mask), s.op("Mul", dc, keep)], [dz, dh, square]

    start = d.dc if d.dc is not None else b.op("Mul", d.dh, b.scalar(0.0, d.dh))
    sequences = [d.keep(d.dy), gates, into_c, through, *outside(d)]
    (dh0, dc0), (dz, hidden, squares) = scan(b, step, [d.dh, start], sequences, 2)
    flat = d.rows(dz)
    dr = b.op("Gemm", flat, d.rows(d.before), transA=1)
    dp = None
    if d.peephole is not None:
        di, do, df, _ = split(b, flat, [size] * 4)
        seen = b.op("Concat", b.op("Mul", di, c_before), b.op("Mul", do, c), b.op("Mul", df, c_before), axis=1)
        dp = b.op("ReduceSum", seen, b.constant([0]), keepdims=0)
    return Found(hidden, dh0, dc0, flat, dr, _biases(b, flat, flat), dp, squares)


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
        i = activate(s, f, clipped(s, i, d.clip))
        if coupled:
            return i, s.op("Sub", s.scalar(1.0, i), i)
        return i, activate(s, f, clipped(s, forget, d.clip))

    def plain(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        c = s.op("Add", s.op("Mul", at[0], carried[0]), at[1])
        return [c], [c]

    def peeping(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        before = carried[0]
        i, forget = gates(s, added(s, at[0], before, peepholes[0]), added(s, at[1], before, peepholes[1]))
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
    return d.rows(c), d.rows(shifted(b, c, d.c0))


@dataclass(frozen=True)
class Gru:
    """Rows of a GRU's gates and of the factors of their gradients: dz = dh to_z, dn = dh to_n; h: the states before.

    product: R h' + b of the candidate, before it is reset.
    """

    h: ir.Value
    r: ir.Value
    r_slope: ir.Value
    to_z: ir.Value
    to_n: ir.Value
    through: ir.Value
    product: ir.Value | None


def gru_back(d: Direction) -> Found:
    """z, r = f(..), n = g(W x + r (R h' + b)) or g(W x + R (r h') + b); h = (1 - z) n + z h'.

    dz = dh (h' - n) z', dn = dh (1 - z) g'; where the reset gate comes after R all gates' gradients are dh times a
    known factor; where it comes before, one more product per step leads from dn to r.
    """
    return _reset_late(d) if attribute(d.node, "linear_before_reset", 0) else _reset_early(d)


def _gru_rates(
    d: Direction, zz: ir.Value, zr: ir.Value, candidate: Callable[[ir.Value], tuple[ir.Value, ir.Value | None]]
) -> Gru:
    """The gates from their inputs; candidate(r) gives the input of n."""
    b, (f, g), h = d.b, d.acts, d.rows(d.before)
    z, r = (activate(b, f, clipped(b, v, d.clip)) for v in (zz, zr))
    zn, product = candidate(r)
    n = activate(b, g, clipped(b, zn, d.clip))
    through = d.steps(z)
    if d.mask is not None:
        through = b.op("Add", d.keep(through), outside(d)[0])
    return Gru(
        h,
        r,
        slope(b, f, r, zr, d.clip),
        b.op("Mul", b.op("Sub", h, n), slope(b, f, z, zz, d.clip)),
        b.op("Mul", b.op("Sub", b.scalar(1.0, z), z), slope(b, g, n, zn, d.clip)),
        through,
        product,
    )


def _gru_inputs(d: Direction) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """W x + b of (z, r) and of n, and the biases that go with R."""
    b, size = d.b, hidden_size(d.node)
    wb, rb = split_rows(b, d.bias, [3 * size] * 2) if d.bias is not None else (None, None)
    x_zr, x_n = split(b, gemm(d, d.x, d.w, wb), [2 * size, size])
    return x_zr, x_n, rb


def _reset_late(d: Direction) -> Found:
    b, size = d.b, hidden_size(d.node)
    x_zr, x_n, rb = _gru_inputs(d)
    s_zr, s_n = split(b, gemm(d, d.before, d.r, rb), [2 * size, size])
    zz, zr = split(b, b.op("Add", x_zr, s_zr), [size] * 2)
    c = _gru_rates(d, zz, zr, lambda r: (b.op("Add", x_n, b.op("Mul", r, s_n)), s_n))
    to_r = b.op("Mul", b.op("Mul", c.to_n, c.product), c.r_slope)
    gates = d.keep(d.steps(b.op("Concat", c.to_z, to_r, b.op("Mul", c.to_n, c.r), axis=1)))

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dh = s.op("Add", carried[0], at[0])
        dz = s.op("Mul", s.op("Concat", dh, dh, dh, axis=1), at[1])
        return [s.op("Add", s.op("Mul", dh, at[2]), s.op("MatMul", dz, d.r))], [dz, dh]

    (dh0,), (dz, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gates, c.through], 2)
    flat = d.rows(dz)
    d_zr, _ = split(b, flat, [2 * size, size])
    into_w = b.op("Concat", d_zr, b.op("Mul", d.rows(d.keep(hidden)), c.to_n), axis=1)
    return Found(hidden, dh0, None, into_w, b.op("Gemm", flat, c.h, transA=1), _biases(b, into_w, flat))


def _reset_early(d: Direction) -> Found:
    b, size = d.b, hidden_size(d.node)
    x_zr, x_n, rb = _gru_inputs(d)
    r_zr, r_n = split_rows(b, d.r, [2 * size, size])
    rb_zr, rb_n = split_rows(b, rb, [2 * size, size]) if rb is not None else (None, None)
    h = d.rows(d.before)
    zz, zr = split(b, b.op("Gemm", h, r_zr, x_zr if rb_zr is None else b.op("Add", x_zr, rb_zr), transB=1), [size] * 2)
    own = x_n if rb_n is None else b.op("Add", x_n, rb_n)
    c = _gru_rates(d, zz, zr, lambda r: (b.op("Gemm", b.op("Mul", r, h), r_n, own, transB=1), None))
    gates = d.keep(d.steps(b.op("Concat", c.to_z, c.to_n, axis=1)))
    extra = [d.steps(b.op("Mul", h, c.r_slope)), d.steps(c.r)]

    def step(s: Backward, carried: list[ir.Value], at: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        dy, gate, keep, to_r, reset = at
        dh = s.op("Add", carried[0], dy)
        dz, dn = split(s, s.op("Mul", s.op("Concat", dh, dh, axis=1), gate), [size] * 2)
        dq = s.op("MatMul", dn, r_n)
        dzr = s.op("Concat", dz, s.op("Mul", dq, to_r), axis=1)
        back = s.op("Add", s.op("Mul", dh, keep), s.op("Mul", dq, reset))
        return [s.op("Add", back, s.op("MatMul", dzr, r_zr))], [dzr, dn, dh]

    (dh0,), (dzr, dn, hidden) = scan(b, step, [d.dh], [d.keep(d.dy), gates, c.through, *extra], 2)
    d_zr, dn = d.rows(dzr), d.rows(dn)
    dr = b.op("Concat", b.op("Gemm", d_zr, h, transA=1), b.op("Gemm", dn, b.op("Mul", c.r, h), transA=1), axis=0)
    into_w = b.op("Concat", d_zr, dn, axis=1)
    return Found(hidden, dh0, None, into_w, dr, _biases(b, into_w, into_w))


def _biases(b: Backward, into_w: ir.Value, into_r: ir.Value) -> ir.Value:
    """Sums over steps and examples: the two halves of B."""
    return b.op("Concat", *(b.op("ReduceSum", v, b.constant([0]), keepdims=0) for v in (into_w, into_r)), axis=0)
