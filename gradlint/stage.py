"""Is the model at initialisation, or trained? A guess from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.graph import constant_array, dims
from gradlint.init_fit import looks_drawn
from gradlint.load import release
from gradlint.options import Stage
from gradlint.parameters import WeightUse
from gradlint.weight_facts import role

_MOST, _HALF = 0.8, 0.5
_FILLS = 2  # numbers that a fresh bias may hold: of an LSTM the forget gate's differs


def guess_stage(uses: Sequence[WeightUse]) -> Stage:
    """`init` where nearly all kernels still look like independent draws from one distribution each.

    Where only most do, scales of one and biases of zero throughout settle it. Models too small to tell count as `init`.
    """
    values = {use.value: use for use in uses}
    kernels = [v for v, use in values.items() if len(dims(v) or ()) >= 2 and role(use) != "bias"]
    judged = [d for v in kernels if (d := _drawn(v)) is not None]
    share = sum(judged) / len(judged) if judged else 1.0
    fresh = share >= _MOST or (share >= _HALF and _untouched(v for v in values if v not in kernels))
    return "init" if fresh else "trained"


def _drawn(value: ir.Value) -> bool | None:
    array = constant_array(value)
    drawn = None if array is None else looks_drawn(array)
    release(value.const_value)
    return drawn


def _untouched(values: Iterable[ir.Value]) -> bool:
    """Are all scales and biases constant: one, zero, or whatever they were filled with (a recurrent one per gate)? True
    where there are none, since exporters drop biases of zero.
    """
    arrays = [a for v in values if (a := constant_array(v)) is not None and a.size]
    return all(len(np.unique(a)) <= _FILLS for a in arrays)
