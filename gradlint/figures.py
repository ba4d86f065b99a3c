"""The report's figures from the sums that left the session."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gradlint.graph import dims
from gradlint.taps import Taps, batch_axis

Table = dict[str, dict[str, float]]


def statistics(
    taps: Taps,
    sums: Mapping[tuple[str, str], np.ndarray],
    values: Mapping[str, ir.Value],
    factor: int,
    batch: int,
    chunks: int,
) -> tuple[Table, Table, dict[str, np.ndarray], float]:
    """The report's figures. factor: squared norm of a per-example gradient over that of the batch loss's."""
    rows: Table = {}
    weights: Table = {}
    steps: dict[str, np.ndarray] = {}
    cotangent = 0.0
    for (kind, name), total in sums.items():
        if kind == "seed":
            cotangent += factor * float(total)
        elif kind == "leaving":
            steps[name] = over_time(np.sqrt(factor * total), np.sqrt(factor * sums["arriving", name]))
        elif kind == "grad":
            shape = dims(values[name]) or ()
            each = math.prod(shape) / (batch if batch_axis(shape, batch) is not None else 1)
            norm = math.sqrt(factor * float(total)) if math.isfinite(float(total)) else math.inf
            rows.setdefault(name, {}).update(grad_norm=norm, grad_rms=norm / math.sqrt(max(1.0, each)))
        elif kind == "square":
            rows.setdefault(name, {}).update(_spread(name, sums, math.prod(dims(values[name]) or ()), batch, chunks))
        elif kind == "peak":
            between = float(sums["logits", name] - sums["center", name]) / chunks
            spread = math.sqrt(max(0.0, between)) if math.isfinite(between) else math.inf
            rows.setdefault(name, {}).update(max_probability=float(total) / chunks, logit_std=spread)
        elif kind == "slope":
            rows.setdefault(name + ACTIVATION, {}).update(_slopes(name, sums, taps, chunks))
        elif kind in ("wgrad", "whole"):
            weights[name] = _weight(kind, name, sums, taps, math.prod(dims(values[name]) or ()))
    return rows, weights, steps, math.sqrt(cotangent)


def coherence(sums: Mapping[tuple[str, str], np.ndarray], examples: int) -> float:
    """How far the examples' gradients at the outputs agree: |their mean|^2 / the mean of their squares.

    Independent ones have 1 / examples on average; what chance takes away below that is not counted.
    """
    shifts = sum(float(np.sum(np.square(a))) for (kind, _), a in sums.items() if kind == "shift")
    squares = examples * sum(float(a) for (kind, _), a in sums.items() if kind == "seed")
    return max(shifts / squares if squares > 0 else 1.0, 1 / examples)


def difference(apart: float, energy: float) -> float | None:
    """|X - 1 m| / |X|, m the mean over the positions of each example: the distance from rank one (Dong et al. 2021).

    apart, energy: the squares of numerator and denominator. None where one overflows.
    """
    if not (math.isfinite(apart) and math.isfinite(energy)):
        return None
    return math.sqrt(apart / energy) if energy > 0 else 0.0


ACTIVATION = "\0activation"  # activation figures are kept under the node's name, apart from values


def _spread(
    name: str, sums: Mapping[tuple[str, str], np.ndarray], size: int, batch: int, chunks: int
) -> dict[str, float]:
    """Mean, standard deviation and signal; the variance over examples is freed of the bias of a finite batch."""
    square = float(sums["square", name]) / max(1, size * chunks)
    mean = float(sums["mean", name]) / chunks
    found = {
        "output_mean": mean,
        "output_std": math.sqrt(max(0.0, square - mean**2)) if math.isfinite(square) else math.inf,
    }
    common = sums.get(("common", name))
    if common is not None and chunks == 1 and math.isfinite(square):
        between = (square - float(common) * batch / max(1, size)) * batch / (batch - 1)
        found["signal"] = math.sqrt(max(0.0, between) / square) if square > 0 else 0.0
    return found


def _slopes(name: str, sums: Mapping[tuple[str, str], np.ndarray], taps: Taps, chunks: int) -> dict[str, float]:
    each = taps.samples[name] * chunks
    slope = sums["slope", name] / each
    flat = float((sums["flat", name] / each).mean())
    return {
        "slope": math.sqrt(float(slope.mean())),
        "saturated": float((sums["saturated", name] / each).mean()),
        "flat": flat,
        "fully_saturated": flat,
        "dead": float((slope == 0).mean()),
        "samples_per_unit": each,
    }


def _weight(
    kind: str, name: str, sums: Mapping[tuple[str, str], np.ndarray], taps: Taps, size: int
) -> dict[str, float]:
    if kind == "whole":
        g = sums["whole", name]
        return {
            "grad_rms": float(np.sqrt(np.mean(np.square(g)))),
            "grad_mean_abs": float(np.mean(np.abs(g))),
            "zero_share": float(np.mean(g == 0)),
        }
    square = float(sums["wgrad", name])
    return {
        "grad_rms": math.sqrt(square / max(1, size)) if math.isfinite(square) else math.inf,
        "grad_mean_abs": float(sums["wabs", name]) / max(1, size),
        "zero_share": float(np.mean(sums["sample", name] == 0)),
    }


def over_time(leaving: np.ndarray, arriving: np.ndarray) -> np.ndarray:
    """What is left, before each step and behind the last, of the gradient that arrives at a recurrence's last state.

    leaving, arriving: its norm before and behind each step (T). What arrives at a step from elsewhere (a loss on all
    steps, the layer above) is no work of the recurrence: the gains of the steps are multiplied up instead. A step that
    nothing arrives at changes nothing.
    """
    reached = np.flatnonzero(arriving > 0)
    if reached.size == 0:
        return np.zeros(len(leaving) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.log(leaving.astype(np.float64)) - np.log(arriving.astype(np.float64))
    gains[reached[-1] + 1 :] = 0.0
    gains[: reached[0]] = -np.inf
    gains = np.where(np.isnan(gains), np.inf, gains)
    left = np.cumsum(np.append(gains, np.log(arriving[reached[-1]]))[::-1])[::-1]
    return np.asarray(np.exp(left))
