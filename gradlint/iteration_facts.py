"""Recurrences written as Loop or Scan: what kind of cell their body is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from gradlint.fact_table import Fact
from gradlint.graph import MOVES, PRODUCTS, dims, is_float, op
from gradlint.iterations import State, parts_of, steps
from gradlint.ops.linear import operator_norm

Array = Callable[[ir.Value | None], np.ndarray | None]
_LARGEST = 1024  # units up to which a spectral radius is computed
_BY_ELEMENT = MOVES | {"Add", "Sub", "Mul", "Where", "Sum", "Neg"}


def iteration_facts(node: ir.Node, weighted: Collection[ir.Node], array: Array) -> dict[str, Fact] | None:
    """Facts of a Loop or Scan that carries a state through weights; None for any other.

    A state that the body multiplies by something computed, and passes on, is held by a gate: the cell is an `LSTM`
    where no kernel reads that state itself, else a `GRU`. Without gates it is an `RNN`, whose recurrent matrix is the
    kernel that reads the state.
    """
    parts = parts_of(node)
    if parts is None:
        return None
    states = [s for s in parts.states if is_float(s.into)]
    kernels = {s.into: _kernels(s.into, weighted) for s in states}
    if not any(kernels.values()):
        return None
    held = [s for s in states if _is_held(s, states)]
    shape = max((dims(s.into) or () for s in states), key=len)
    facts: dict[str, Fact] = {
        "cell": "RNN" if not held else "GRU" if any(kernels[s.into] for s in held) else "LSTM",
        "steps": steps(parts),
        "steps_assumed": False,
        "hidden_size": shape[-1] if shape else None,
    }
    matrices = [m for nodes in kernels.values() for n in nodes if (m := array(n.inputs[1])) is not None]
    square = [m for m in matrices if m.ndim == 2 and m.shape[0] == m.shape[1] and np.isfinite(m).all()]
    if not held and square:
        radii = [r for r in map(spectral_radius, square) if r is not None]
        facts |= {
            "recurrent_norm": max(operator_norm(m) for m in square),
            "recurrent_radius": max(radii, default=None),
        }
    return facts


def _kernels(state: ir.Value, weighted: Collection[ir.Node]) -> list[ir.Node]:
    """The products with weights that read a state, directly or but for moves and factors of its elements."""
    found, pending, seen = [], [state], {state}
    while pending:
        for use in pending.pop().uses():
            node = use.node
            if node in weighted and op(node) in PRODUCTS:
                if use.idx == 0:
                    found.append(node)
            elif op(node) in MOVES | {"Mul", "Where"}:
                fresh = [o for o in node.outputs if o not in seen]
                seen.update(fresh)
                pending.extend(fresh)
    return found


def _is_held(state: State, states: list[State]) -> bool:
    """Does a way lead from a state to what is passed on, by element, through a product with something computed?"""
    ends = {s.out for s in states}
    pending, seen = [(state.into, False)], {(state.into, False)}
    while pending:
        value, gated = pending.pop()
        if gated and value in ends:
            return True
        for use in value.uses():
            node = use.node
            if op(node) not in _BY_ELEMENT:
                continue
            gate = op(node) == "Mul" and all(v is None or v.const_value is None for v in node.inputs)
            for output in node.outputs:
                if (reached := (output, gated or gate)) not in seen:
                    seen.add(reached)
                    pending.append(reached)
    return False


def spectral_radius(matrix: np.ndarray) -> float | None:
    """Gelfand's formula, |R^n|^(1/n) for n = 2^12, with powers rescaled as they are squared."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) > _LARGEST:
        return None
    power, log, doublings = matrix.astype(np.float64), 0.0, 12
    for _ in range(doublings):
        size = float(np.linalg.norm(power))
        if size == 0:
            return 0.0
        power, log = power / size, log + math.log(size)
        power, log = power @ power, 2 * log
    size = float(np.linalg.norm(power))
    return math.exp((log + math.log(size)) / 2**doublings) if size > 0 else 0.0
