"""Is the model at initialisation, or trained? A guess from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradlint.graph import WeightUse, dims
from gradlint.options import Stage

# Excess kurtosis of the distributions that weights are drawn from: uniform, normal truncated at two deviations, normal.
_KURTOSES = (-1.2, -0.63, 0.0)
_SAMPLE = 1 << 16


def guess_stage(uses: Sequence[WeightUse]) -> Stage:
    """`init` where most kernels still look drawn from a uniform or normal distribution.

    The excess kurtosis of n such draws scatters by sqrt(24 / n) about its own; training makes weights heavy-tailed.
    """
    fresh = judged = 0
    for use in {u.value: u for u in uses}.values():
        shape = dims(use.value) or ()
        size = int(np.prod(shape))
        if len(shape) < 2 or size < 256 or use.value.const_value is None:
            continue
        flat = use.value.const_value.numpy().reshape(-1)
        sample = flat[:: max(1, size // _SAMPLE)].astype(np.float64)
        centred = sample - sample.mean()
        variance = float(np.mean(centred**2))
        if not np.isfinite(variance) or variance <= 0:
            continue
        excess = float(np.mean(centred**4)) / variance**2 - 3
        judged += 1
        fresh += any(abs(excess - k) < 5 * np.sqrt(24 / sample.size) + 0.05 for k in _KURTOSES)
    return "init" if fresh >= 0.7 * judged else "trained"
