"""RNN, GRU and LSTM followed step by step for an ensemble of sequences, there and back, in float64.

A recurrent layer's gradient depends on how its gates, its cell and the steps are correlated: mean-field equations that
drop those correlations are off by 0.2 to 0.3 decades in the weights. So the recurrence is run as it is, with the actual
weights, for a few sequences drawn from the moments of the input (normal, independent between units; between steps as
the moments say), and the moments are those of the ensemble. Assumes whole sequences (sequence_lens is ignored).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import attribute, dims, op
from gradlint.ops.recurrent_cell import Activation, activations, backwards, directions, optional
from gradlint.transfer import Context

_FLOPS = 2e9  # the size of the ensemble is chosen to stay near this
_SIZES = (8, 128)


# -- activations -------------------------------------------------------------------------------------------------------


def apply(act: Activation, z: Array, clip: float) -> tuple[Array, Array]:
    """f(z) and f'(z)."""
    if clip:
        y, slope = apply(act, np.clip(z, -clip, clip), 0.0)
        return y, np.where(np.abs(z) < clip, slope, 0.0)
    a, b = act.alpha, act.beta
    positive = z > 0
    if act.name == "sigmoid":
        y = 0.5 * (1 + np.tanh(0.5 * z))
        return y, y * (1 - y)
    if act.name == "tanh":
        y = np.tanh(z)
        return y, 1 - y * y
    if act.name == "scaledtanh":
        y = np.tanh(b * z)
        return a * y, a * b * (1 - y * y)
    if act.name in ("relu", "leakyrelu", "elu"):
        low = np.expm1(np.minimum(z, 0)) if act.name == "elu" else z
        slope = np.exp(np.minimum(z, 0)) if act.name == "elu" else np.ones_like(z)
        return np.where(positive, z, a * low), np.where(positive, 1.0, a * slope)
    if act.name == "thresholdedrelu":
        return np.where(z > a, z, 0.0), (z > a).astype(float)
    if act.name == "hardsigmoid":
        y = a * z + b
        return np.clip(y, 0, 1), np.where((y > 0) & (y < 1), a, 0.0)
    if act.name == "softsign":
        scale = 1 / (1 + np.abs(z))
        return z * scale, scale * scale
    if act.name == "softplus":
        return np.logaddexp(0, z), 0.5 * (1 + np.tanh(0.5 * z))
    return a * z + b, np.full_like(z, a)


# -- one direction -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One direction's weights: w (G H, I), r (G H, H), biases (G H), peepholes (3, H)."""

    kind: str
    acts: tuple[Activation, ...]
    clip: float
    w: Array
    r: Array
    wb: Array
    rb: Array
    peepholes: Array
    late: bool  # GRU: the reset gate comes after the product with R
    coupled: bool  # LSTM: f = 1 - i


@dataclass
class Tape:
    """What the steps leave behind, one entry each: states before and after, and the factors of the way back."""

    x: Array
    before: list[Array] = field(default_factory=list)
    after: list[Array] = field(default_factory=list)
    cells: list[Array] = field(default_factory=list)
    factors: list[tuple[Array, ...]] = field(default_factory=list)


def product(sequences: Array, w: Array) -> Array:
    """sequences (T, n, k) times w (k, m), as one product: a stack of small ones takes eight times as long."""
    return (sequences.reshape(-1, sequences.shape[-1]) @ w).reshape(*sequences.shape[:-1], w.shape[-1])


def run(cell: Cell, x: Array, h: Array, c: Array) -> Tape:
    """Forward over x (T, n, I) from states h, c (n, H)."""
    tape = Tape(x)
    into = product(x, cell.w.T) + cell.wb
    for t in range(len(x)):
        tape.before.append(h)
        if cell.kind == "LSTM":
            tape.cells.append(c)
            h, c, factors = _lstm(cell, into[t] + h @ cell.r.T + cell.rb, c)
        elif cell.kind == "GRU":
            h, factors = _gru(cell, into[t], h)
        else:
            h, slope = apply(cell.acts[0], into[t] + h @ cell.r.T + cell.rb, cell.clip)
            factors = (slope,)
        tape.after.append(h)
        tape.factors.append(factors)
    tape.cells.append(c)
    return tape


def _lstm(cell: Cell, z: Array, c: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    (f, g, h), (pi, po, pf) = cell.acts, cell.peepholes
    zi, zo, zf, zg = np.split(z, 4, axis=-1)
    i, di = apply(f, zi + pi * c, cell.clip)
    candidate, dg = apply(g, zg, cell.clip)
    if cell.coupled:
        forget, df, source = 1 - i, np.zeros_like(i), candidate - c
    else:
        forget, df = apply(f, zf + pf * c, cell.clip)
        source = candidate
    after = forget * c + i * candidate
    o, do = apply(f, zo + po * after, cell.clip)
    out, dh = apply(h, after, 0.0)
    gates = np.concatenate([source * di, out * do, c * df, i * dg], axis=-1)
    through = forget + source * di * pi + c * df * pf
    return o * out, after, (gates, o * dh + out * do * po, through)


def _gru(cell: Cell, into: Array, h: Array) -> tuple[Array, tuple[Array, ...]]:
    f, g = cell.acts
    rz, rr, rn = np.split(cell.r, 3)
    bz, br, bn = np.split(cell.rb, 3)
    xz, xr, xn = np.split(into, 3, axis=-1)
    z, dz = apply(f, xz + h @ rz.T + bz, cell.clip)
    r, dr = apply(f, xr + h @ rr.T + br, cell.clip)
    inner = h @ rn.T + bn if cell.late else (r * h) @ rn.T + bn
    n, dn = apply(g, xn + (r * inner if cell.late else inner), cell.clip)

    return (1 - z) * n + z * h, ((h - n) * dz, (1 - z) * dn, inner * dr if cell.late else h * dr, r, z)


@dataclass(frozen=True)
class Back:
    """Gradients of one direction: of h behind each step, of c (without what h adds), what is passed on to h before it
    (T, n, H); of the gates as W and as R see them (T, n, G H); of the initial states."""

    hidden: Array
    cells: Array
    passed: Array
    into_w: Array
    into_r: Array
    h0: Array
    c0: Array


def back(cell: Cell, tape: Tape, dy: Array, dh: Array, dc: Array) -> Back:
    """Backward: dy (T, n, H) into every step, dh and dc (n, H) into the last states."""
    hidden, cells, passed, into_w, into_r = [], [], [], [], []
    for t in range(len(dy) - 1, -1, -1):
        dh = dh + dy[t]
        hidden.append(dh)
        cells.append(dc)
        factors = tape.factors[t]
        if cell.kind == "LSTM":
            gates, into, through = factors
            dc = dc + dh * into
            dz = dr = np.concatenate([dc, dh, dc, dc], axis=-1) * gates
            dh, dc = dr @ cell.r, dc * through
        elif cell.kind == "GRU":
            dz, dr, dh = _gru_back(cell, factors, dh)
        else:
            dz = dr = dh * factors[0]
            dh = dr @ cell.r
        passed.append(dh)
        into_w.append(dz)
        into_r.append(dr)
    return Back(
        np.stack(hidden[::-1]),
        np.stack(cells[::-1]),
        np.stack(passed[::-1]),
        np.stack(into_w[::-1]),
        np.stack(into_r[::-1]),
        dh,
        dc,
    )


def _gru_back(cell: Cell, factors: tuple[Array, ...], dh: Array) -> tuple[Array, Array, Array]:
    to_z, to_n, to_r, r, z = factors
    dz, dn = dh * to_z, dh * to_n
    rz, rr, rn = np.split(cell.r, 3)
    if cell.late:
        dr, inner = dn * to_r, dn * r
        before = inner @ rn
    else:
        reset = dn @ rn
        dr, inner = reset * to_r, dn
        before = reset * r
    into_w = np.concatenate([dz, dr, dn], axis=-1)
    return into_w, np.concatenate([dz, dr, inner], axis=-1), dh * z + before + dz @ rz + dr @ rr


# -- the node ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """Cells, tapes and drawn sizes of every direction of a node; sequences in the order the direction runs."""

    node: ir.Node
    rng: np.random.Generator
    count: int
    cells: list[Cell]
    tapes: list[Tape]


def follow(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Ensemble | None:
    """Draw an ensemble of input sequences and run the layer; None where the input or a weight is not known."""
    shape, x = dims(node.inputs[0]), xs[0]
    cells = cells_of(ctx, node)
    if x is None or shape is None or len(shape) != 3 or cells is None:
        return None
    steps, _, width = shape
    cost = 6 * steps * len(cells) * cells[0].w.shape[0] * (width + cells[0].r.shape[1])
    count = int(np.clip(_FLOPS / cost, *_SIZES)) // 2 * 2
    rng = np.random.default_rng(0)
    drawn = draw(rng, x, (steps, count, width))
    size = cells[0].r.shape[1]
    tapes = []
    for k, cell in enumerate(cells):
        states = [np.zeros((count, size))] * 2
        for j in (0, 1):
            given = xs[5 + j] if len(xs) > 5 + j else None
            if given is not None:
                states[j] = draw(rng, given, (len(cells), count, size))[k]
        tapes.append(run(cell, drawn[::-1] if backwards(node, k) else drawn, *states))
    return Ensemble(node, rng, count, cells, tapes)


def cells_of(ctx: Context, node: ir.Node) -> list[Cell] | None:
    w, r = ctx.array(node.inputs[1]), ctx.array(node.inputs[2])
    bias, peepholes = (ctx.array(optional(node, k)) for k in (3, 7))
    if w is None or r is None or (bias is None and optional(node, 3) is not None):
        return None
    size, width = r.shape[2], r.shape[1]
    b = np.zeros((len(w), 2 * width)) if bias is None else bias
    p = np.zeros((len(w), 3 * size)) if peepholes is None else peepholes
    clip = float(attribute(node, "clip", 0.0) or 0.0)
    late, coupled = bool(attribute(node, "linear_before_reset", 0)), bool(attribute(node, "input_forget", 0))
    return [
        Cell(
            op(node), acts, clip, w[k].astype(np.float64), r[k].astype(np.float64), b[k, :width].astype(np.float64),
            b[k, width:].astype(np.float64), p[k].reshape(3, size).astype(np.float64), late, coupled,
        )
        for k, acts in enumerate(activations(node)[: directions(node)])
    ]  # fmt: skip


def draw(rng: np.random.Generator, x: Moments, shape: tuple[int, int, int]) -> Array:
    """Sequences (T, n, I) with the moments of x: the fixed part alike for all n, the shared part alike for all T.

    A mean that differs between examples counts as variance: the ensemble has a size of its own. Every sequence comes
    with its mirror image (antithetic draws), which keeps the noise out of the mean of odd functions.
    """
    steps, count, width = shape
    mean, var_fixed, var_shared, var = (_one_batch(a) for a in (x.mean, x.fixed, x.shared, x.local))
    var = var + x.mean.var(axis=1, keepdims=True)
    fixed = np.sqrt(var_fixed) * rng.standard_normal((steps, 1, width))
    shared = np.sqrt(var_shared) * rng.standard_normal((1, count // 2, width))
    half = shared + np.sqrt(var) * rng.standard_normal((steps, count // 2, width))
    return mean + fixed + np.concatenate([half, -half], axis=1)


def cotangents(rng: np.random.Generator, g: Gradient | None, shape: tuple[int, ...], *, time: int | None) -> Array:
    """Gradients drawn with the second moments of g; its shared part is the same along the axis `time`."""
    if g is None:
        return np.zeros(shape)
    once = tuple(1 if a == time and g.shared.shape[a] == 1 else n for a, n in enumerate(shape))
    shared = np.sqrt(_one_batch(g.shared)) * rng.standard_normal(once)
    return shared + np.sqrt(_one_batch(g.local)) * rng.standard_normal(shape)


def _one_batch(a: Array) -> Array:
    """Averaged over the axis of examples, the last but one."""
    return a.mean(axis=-2, keepdims=True)


def follow_back(ens: Ensemble, gs: Sequence[Gradient | None]) -> list[Back]:
    """The gradients of every direction for gradients drawn at Y (T, D, n, H), Y_h and Y_c (D, n, H)."""
    gy, gh, gc = (*gs, None, None)[:3]
    steps, size, width = len(ens.tapes[0].x), ens.cells[0].r.shape[1], len(ens.cells)
    dy = cotangents(ens.rng, gy, (steps, width, ens.count, size), time=0)
    dh, dc = (cotangents(ens.rng, g, (width, ens.count, size), time=None) for g in (gh, gc))
    found = []
    for k, (cell, tape) in enumerate(zip(ens.cells, ens.tapes, strict=True)):
        each = dy[::-1, k] if backwards(ens.node, k) else dy[:, k]
        found.append(back(cell, tape, each, dh[k], dc[k]))
    return found


def step_norms(
    ctx: Context, node: ir.Node, xs: Sequence[Moments | None], gs: Sequence[Gradient | None]
) -> Array | None:
    """Norms per example of the state's gradient (of LSTM: both states') before and behind each step but the first
    (2, T - 1), in the order the direction runs; over units and directions."""
    ens = follow(ctx, node, xs)
    if ens is None or all(g is None for g in gs):
        return None
    backs = follow_back(ens, gs)
    leaving = sum(_square(b.passed[1:]) + _square(b.cells[:-1]) for b in backs)
    arriving = sum(_square(b.hidden[1:]) + _square(b.cells[1:]) for b in backs)
    return np.sqrt(np.stack([leaving, arriving]))


def _square(a: Array) -> Array:
    """(T, n, H) to (T): over units, averaged over sequences."""
    return np.square(a).sum(axis=2).mean(axis=1)
