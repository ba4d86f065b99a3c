"""Recurrent layers: RNN, GRU, LSTM.

Moments and gradients come from an ensemble of sequences that is followed through time (`recurrent_ensemble`); Y is
described step by step, by arrays (T, D, 1, H).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Gradient, Moments, Range
from gradlint.graph import op
from gradlint.ops.linear import operator_norm
from gradlint.ops.recurrent_cell import activations, backwards, lengths, optional
from gradlint.ops.recurrent_ensemble import Back, Cell, Tape, follow, follow_back, product, step_norms
from gradlint.ops.recurrent_vjp import recurrent_vjp
from gradlint.transfer import Context, row

__all__ = ["contraction", "step_norms"]


def recurrent_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Mean and variance over the ensemble, per step and unit."""
    ens = follow(ctx, node, xs)
    if ens is None:
        return (None,) * len(node.outputs)
    states = [_natural(node, k, np.stack(tape.after)) for k, tape in enumerate(ens.tapes)]
    y = np.stack(states, axis=1)
    last = np.stack([tape.after[-1] for tape in ens.tapes])
    cell = np.stack([tape.cells[-1] for tape in ens.tapes])
    return tuple(_moments(a) for a in (y, last, cell))[: len(node.outputs)]


def _moments(a: Array) -> Moments:
    """Over the axis of the ensemble, the last but one."""
    mean = a.mean(axis=-2, keepdims=True)
    zero = np.zeros_like(mean)
    return Moments(mean, zero, zero, a.var(axis=-2, keepdims=True, ddof=1))


def _natural(node: ir.Node, k: int, sequence: Array) -> Array:
    """From the order direction k runs in to the order of time."""
    return sequence[::-1] if backwards(node, k) else sequence


def recurrent_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Second moments over the ensemble of gradients drawn at the outputs; a weight's is summed over the steps first.

    The gradient into X is described step by step, as if steps were uncorrelated: where a recurrent layer feeds another,
    the lower one's biases come out about 0.2 decades too small.
    """
    ens = follow(ctx, node, xs)
    if ens is None:
        return (None,) * len(node.inputs)
    backs = follow_back(ens, gs)
    dx = sum(_natural(node, k, product(b.into_w, c.w)) for k, (b, c) in enumerate(zip(backs, ens.cells, strict=True)))
    parts = [_weights(c, t, b) for c, t, b in zip(ens.cells, ens.tapes, backs, strict=True)]
    dw, dr, db, dp = (np.stack(p) for p in zip(*parts, strict=True))
    h0, c0 = (np.stack([getattr(b, name) for b in backs]) for name in ("h0", "c0"))
    squares = [
        _mean_square(np.asarray(dx)), dw, dr, db, None, _mean_square(h0), _mean_square(c0), dp,
    ]  # fmt: skip
    return [None if s is None else Gradient(np.zeros_like(s), s) for s in squares[: len(node.inputs)]]


def _mean_square(a: Array) -> Array:
    return np.square(a).mean(axis=-2, keepdims=True)


def _weights(cell: Cell, tape: Tape, b: Back) -> tuple[Array, Array, Array, Array]:
    """E over the ensemble of the squared sums over steps: W and R (rows averaged over their columns), B, P."""
    before = np.stack(tape.before)

    dw = _summed_products(b.into_w, tape.x)
    dr = _summed_products(b.into_r, before)
    if cell.kind == "GRU" and not cell.late:
        third = 2 * cell.r.shape[1]
        dr[third:] = _summed_products(b.into_r[..., third:], before * np.stack([f[3] for f in tape.factors]))
    db = np.concatenate([np.square(g.sum(axis=0)).mean(axis=0) for g in (b.into_w, b.into_r)])
    dp = np.zeros(3 * cell.r.shape[1])
    if cell.kind == "LSTM":
        i, o, f, _ = np.split(b.into_w, 4, axis=-1)
        old, new = np.stack(tape.cells[:-1]), np.stack(tape.cells[1:])
        sums = [np.square((g * c).sum(axis=0)).mean(axis=0) for g, c in ((i, old), (o, new), (f, old))]
        dp = np.concatenate(sums)
    return dw, dr, db, dp


def _summed_products(g: Array, v: Array) -> Array:
    """E of (sum over t of g_tj v_tk)^2, averaged over k: the diagonal of g^T (v v^T / K) g, one sequence at a time."""
    total = np.zeros(g.shape[2])
    for n in range(g.shape[1]):
        own, seen = g[:, n], v[:, n]
        if len(seen) <= seen.shape[1]:
            total += np.sum(own * (seen @ seen.T @ own), axis=0) / seen.shape[1]
        else:
            total += np.square(own.T @ seen).mean(axis=1)
    return (total / g.shape[1])[:, None]


_BOUNDED = {"tanh": (-1.0, 1.0), "softsign": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0)}


def recurrent_range(ctx: Context, node: ir.Node, xs: Sequence[Range | None]) -> Sequence[Range | None]:
    """Where the activations are bounded: h = f(.) lies in f's interval, o h(c) in that of the product.

    GRU: h is an average of the candidate and the state before it, so an initial state widens the interval. 0 always
    lies in it (what follows a short sequence). Nothing is said of cells (they add up), nor of other activations.
    """
    none: tuple[None, ...] = (None,) * len(node.outputs)
    kinds = [[a.name for a in acts] for acts in activations(node)]
    start = optional(node, 5)
    known = xs[5] if len(xs) > 5 else None
    used = {name for names in kinds for name in (names[:1] + names[-1:])}
    if not used <= _BOUNDED.keys() or (lengths(node) is not None and start is not None):
        return none
    ends = [_BOUNDED[names[-1]] for names in kinds]
    lo, hi = min(0.0, *(e[0] for e in ends)), max(0.0, *(e[1] for e in ends))
    gates = [_BOUNDED[names[0]][0] for names in kinds]
    if op(node) == "LSTM" and min(gates) < 0:
        lo = -hi
    if op(node) == "GRU":
        if min(gates) < 0 or (start is not None and known is None):
            return none
        if known is not None:
            lo, hi = min(lo, float(known.lo.min())), max(hi, float(known.hi.max()))
    y, h = (Range(np.full((1,) * n, lo), np.full((1,) * n, hi)) for n in (4, 3))
    return (y, h, None)[: len(node.outputs)]


# sup |f'| of the activations without a parameter.
_STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "relu": 1.0, "thresholdedrelu": 1.0, "softsign": 1.0, "softplus": 1.0}


def contraction(node: ir.Node, r: np.ndarray | None) -> float | None:
    """An upper bound of the norm of dh_t/dh_{t-1} at every step: sup |f'| times the largest singular value of R.

    r: the node's R (D, H, H). For RNN only (the largest over its directions); None for GRU and LSTM, whose states also
    pass by R.
    """
    if op(node) != "RNN" or r is None:
        return None
    steepest = []
    for (act,) in activations(node):
        a, b = abs(act.alpha), abs(act.beta)
        own = {"affine": a, "hardsigmoid": a, "scaledtanh": a * b, "leakyrelu": max(1.0, a), "elu": max(1.0, a)}
        steepest.append(own[act.name] if act.name in own else _STEEPEST[act.name])
    return max(s * operator_norm(r[k]) for k, s in enumerate(steepest))


for _cell in ("RNN", "GRU", "LSTM"):
    row(_cell, moments=recurrent_moments, range=recurrent_range, pullback=recurrent_pullback, vjp=recurrent_vjp)
