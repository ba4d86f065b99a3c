"""One number: how likely it is that the network won't train as it stands."""

from __future__ import annotations

import math

from gradlint.facts import Facts
from gradlint.options import Options


def risk(facts: Facts, options: Options) -> float | None:
    """A score in [0, 1]: logistic in the trunk's worst decay or growth beyond three decades, and in lost signal.

    None where nothing was measured or estimated, or the model is quantised.
    """
    if facts.model.get("quantized_ops") or not facts.weights:
        return None
    low, high = facts.model.get("trunk_min_decades"), facts.model.get("trunk_max_decades")
    if not isinstance(low, float) or not isinstance(high, float):
        return None
    signals = [s.facts["trunk_signal"] for s in facts.subjects if isinstance(s.facts.get("trunk_signal"), float)]
    collapse = -math.log10(max(min(signals, default=1.0), 1e-12))
    worst = max(-low, high, 1.5 * collapse)
    return round(1.0 / (1.0 + math.exp(-2.0 * (min(worst, 50.0) - 3.0))), 6)
