"""Is the model at initialisation, or trained? A guess from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.graph import WeightUse, constant_array, dims
from gradlint.init_fit import looks_drawn
from gradlint.load import release
from gradlint.options import Stage

_MOST, _HALF = 0.8, 0.5


def guess_stage(uses: Sequence[WeightUse]) -> Stage:
    """`init` where nearly all kernels still look like independent draws from one distribution each.

    Where only most do, scales of one and biases of zero throughout settle it. Models too small to tell count as `init`.
    """
    values = {use.value for use in uses}
    judged = [d for v in values if len(dims(v) or ()) >= 2 and (d := _drawn(v)) is not None]
    share = sum(judged) / len(judged) if judged else 1.0
    fresh = share >= _MOST or (share >= _HALF and _untouched(values))
    return "init" if fresh else "trained"


def _drawn(value: ir.Value) -> bool | None:
    array = constant_array(value)
    drawn = None if array is None else looks_drawn(array)
    release(value.const_value)
    return drawn


def _untouched(values: Iterable[ir.Value]) -> bool:
    """Are all vectors (scales, biases) constant: one, zero, or whatever they were filled with?"""
    vectors = [constant_array(v) for v in values if len(dims(v) or ()) == 1]
    return bool(vectors) and all(a is not None and bool(np.all(a == a[0])) for a in vectors if a is not None and a.size)
