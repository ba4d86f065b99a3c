"""One number in [0, 1]: how likely it is that the network won't train as it stands.

A logistic function of the decades that are lost on the way, added up:

    risk = 1 / (1 + exp(-STEEPNESS * (sum_k min(x_k, CAPS[k]) - HALF)))

Every decade counts alike, whatever took it, so that two constants are fitted, no weights: HALF is the loss at which
half of the networks don't train. Each fact is cut off where more of it makes no difference. They are round numbers
near the fits on small networks labelled by really training them with SGD and momentum, which lie at 0.8 to 1.1 and 5.0
to 6.0, with and without the probe; benchmarks/risk_fit.py prints its fit with cross-validated AUROC, precision and
recall. All facts are measured or estimated quantities: nothing counts layers or reads operator names, so risk is the
same for every spelling of a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from gradlint.fact_table import Subject
from gradlint.facts import Facts

_SHARPEST = 1e-8  # signal below this is none
_SOUND_SPREAD = 2.5  # decades between the learning speeds of weights in networks which train
_SOUND_SHARPNESS = 4.0  # decades of the tangent kernel's trace at which usual rates don't overshoot yet
_SOUND_RESPONSE = -2.0  # decades of the trace, without what examples have in common, at which usual rates still do
_SOUND_ALIGNMENT = 0.3  # decades below 1 that the likeness of features to inputs falls in networks which train
_SHATTERED = 2.0  # decades from which on it makes no difference
_SYMMETRIC = 6.0  # decades lost where no unit differs from another

STEEPNESS = 1.1
HALF = 5.0
CAPS = {
    "decay": 6.0,  # decades the gradient falls: along the trunk, over time steps, from weight to weight
    "time_growth": 12.0,  # twice the decades it grows over the steps of a recurrence: as gradient, and as chaos
    "nonlinearity": 4.0,  # decades of the nonlinearity coefficient, or of likeness lost: shattered gradients, chaos
    "steepness": 8.0,  # thrice the decades that the largest stable learning rate lies below usual ones
    "flatness": 4.0,  # decades that the least effective learning rate lies above usual ones
    "collapse": 4.0,  # decades the signal falls below 1: between examples, or between positions with an output each
    "symmetry": _SYMMETRIC,  # all kernels constant
}


def risk(facts: Facts) -> float | None:
    """The score; None where nothing can be judged: no weights, or a quantised model."""
    if facts.model.get("quantized_ops") or not facts.weights or facts.model.get("trunk_min_decades") is None:
        return None
    found = evidence(facts.model, facts.subjects)
    return round(1.0 / (1.0 + math.exp(-STEEPNESS * (lost(found) - HALF))), 6)


def lost(found: Mapping[str, float]) -> float:
    """The decades of `evidence`, cut off and added up."""
    return sum(min(decades, CAPS[name]) for name, decades in found.items())


def evidence(model: Mapping[str, object], subjects: Iterable[Subject]) -> dict[str, float]:
    """What is lost, by the names of CAPS, in decades from 0; what is not known counts as nothing lost.

    Gates learn to hold, by a bias that no step stands before: only a recurrence without gates loses over time, while
    growth over time is a loss to all. Growth of the gradient over layers is nonlinearity, or steepness, or (where it is
    not finite) both. Features that have lost the likeness between the inputs (CKA) tell the same as nonlinearity: the
    larger counts. Adam's steps don't shrink with the gradient, so flatness is no loss to it. What training made itself
    is no loss: of a trained network nonlinearity, steepness and flatness don't count, and a signal that collapses or a
    recurrence that grows does on real data only.
    """
    subjects = list(subjects)
    trained = model.get("stage") == "trained"
    made_up = trained and not model.get("data_given")
    signals = _numbers(subjects, "trunk_signal", lambda s: not s.facts.get("is_head"))
    signals += _numbers(subjects, "position_signal", lambda s: True)
    growths = _numbers(subjects, "time_decades", lambda s: True)
    times = _numbers(subjects, "time_decades", lambda s: s.facts.get("cell") not in ("LSTM", "GRU"))
    kernels = [s for s in subjects if s.facts.get("role") in ("kernel", "recurrent")]
    spreads = _numbers(kernels, "weight_std", lambda s: True)
    alignment = _number(model.get("alignment"))
    unlike = 0.0 if alignment is None else -math.log10(max(alignment, _SHARPEST)) - _SOUND_ALIGNMENT
    overflows = _number(model.get("trunk_max_decades")) == math.inf
    steep = (_number(model.get("sharpness")) or 0.0) - _SOUND_SHARPNESS
    response = _number(model.get("responsiveness"))
    if response is None or model.get("optimizer") == "adam":
        response = _SOUND_RESPONSE
    found = {
        "decay": max(
            0.0,
            -(_number(model.get("trunk_min_decades")) or 0.0),
            (_number(model.get("learning_spread")) or 0.0) - _SOUND_SPREAD,
            *(-t for t in times),
        ),
        "time_growth": 2 * max([0.0, *growths]),
        "nonlinearity": max(_number(model.get("nonlinearity")) or 0.0, min(unlike, _SHATTERED)),
        "steepness": math.inf if overflows else 3 * max(0.0, steep),
        "flatness": max(0.0, _SOUND_RESPONSE - response),
        "collapse": max(0.0, -math.log10(max(min(signals, default=1.0), _SHARPEST))),
        "symmetry": _SYMMETRIC if spreads and max(spreads) < _SHARPEST else 0.0,
    }
    learned = (
        {"nonlinearity", "flatness"}
        | ({"collapse", "time_growth"} if made_up else set())
        | (set() if overflows else {"steepness"})
    )
    return {name: 0.0 if trained and name in learned else decades for name, decades in found.items()}


def _numbers(subjects: list[Subject], name: str, chosen: Callable[[Subject], bool]) -> list[float]:
    found = [_number(s.facts.get(name)) for s in subjects if chosen(s)]
    return [x for x in found if x is not None]


def _number(fact: object) -> float | None:
    return float(fact) if isinstance(fact, int | float) and not math.isnan(fact) else None
