"""One number in [0, 1]: how likely it is that the network won't train as it stands.

A logistic function of six facts, each cut off where more of it makes no difference:

    risk = 1 / (1 + exp(-(b + sum_k w_k min(x_k, cap_k))))

The weights were fitted (L2-regularised maximum likelihood) on small networks labelled by really training them with SGD
and momentum; benchmarks/risk_fit.py prints them with their cross-validated AUROC. All facts are measured or estimated
quantities: nothing counts layers or reads operator names, so risk is the same for every spelling of a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gradlint.fact_table import Subject
from gradlint.facts import Facts

_SHARPEST = 1e-8  # signal below this is none


@dataclass(frozen=True)
class Term:
    """One fact's share: weight per unit, up to `cap`; `unknown` stands in where it was not measured."""

    name: str
    weight: float
    cap: float
    unknown: float = 0.0


INTERCEPT = -4.15
TERMS = (
    Term("decay", 0.52, 6.0),  # decades the trunk's gradient falls
    Term("growth", 0.82, 6.0),  # decades it grows
    Term("collapse", 0.99, 4.0),  # decades the trunk's signal falls below 1
    Term("misalignment", 0.34, 1.0, 0.5),  # 1 - alignment of the last features with the inputs
    Term("time_decay", 0.57, 6.0),  # decades the gradient falls over the steps of a recurrence
    Term("time_growth", 1.06, 6.0),  # decades it grows over them
)


def risk(facts: Facts) -> float | None:
    """The score; None where nothing can be judged: no weights, or a quantised model."""
    if facts.model.get("quantized_ops") or not facts.weights or facts.model.get("trunk_min_decades") is None:
        return None
    found = evidence(facts.model, facts.subjects)
    score = INTERCEPT + sum(t.weight * min(found.get(t.name, t.unknown), t.cap) for t in TERMS)
    return round(1.0 / (1.0 + math.exp(-score)), 6)


def evidence(model: Mapping[str, object], subjects: Iterable[Subject]) -> dict[str, float]:
    """The six quantities, by the name of their term; what is not known is left out."""
    subjects = list(subjects)
    signals = _numbers(subjects, "trunk_signal", lambda s: not s.facts.get("is_head"))
    times = _numbers(subjects, "time_decades", lambda s: True)
    alignment = _number(model.get("alignment"))
    found = {
        "decay": max(0.0, -(_number(model.get("trunk_min_decades")) or 0.0)),
        "growth": max(0.0, _number(model.get("trunk_max_decades")) or 0.0),
        "collapse": max(0.0, -math.log10(max(min(signals, default=1.0), _SHARPEST))),
        "time_decay": max([0.0, *(-t for t in times)]),
        "time_growth": max([0.0, *times]),
    }
    return found if alignment is None else {**found, "misalignment": 1.0 - alignment}


def _numbers(subjects: list[Subject], name: str, chosen: Callable[[Subject], bool]) -> list[float]:
    found = [_number(s.facts.get(name)) for s in subjects if chosen(s)]
    return [x for x in found if x is not None]


def _number(fact: object) -> float | None:
    return float(fact) if isinstance(fact, int | float) and not math.isnan(fact) else None
