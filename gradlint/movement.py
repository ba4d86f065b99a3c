"""How far each weight moved from one model file to another: |w' - w| / |w|, where the shapes agree.

Training that reaches only the last layers shows here: they move, the early ones barely do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gradlint.compare import Move
from gradlint.graph import is_float
from gradlint.load import read, release
from gradlint.results import Report, WeightRow

_BLOCK = 1 << 20  # elements compared at a time


def movements(base: Report, head: Report) -> tuple[Move, ...]:
    """The weights of both models in head's order, by the framework's name where it is known. Reads both files, from
    the paths in the reports; raises ModelError."""
    before, after = (dict(read(report.model.path).model.graph.initializers) for report in (base, head))
    known = {_name(row): row for row in reversed(base.weights)}
    found: dict[str, Move] = {}
    for row in head.weights:
        name = _name(row)
        old = known.get(name)
        if old is None or name in found or old.shape != row.shape:
            continue
        moved = _moved(before, old.name, after, row.name)
        if moved is not None:
            found[name] = Move(name, row.layer, moved)
    return tuple(found.values())


def _name(row: WeightRow) -> str:
    return ", ".join(row.parameter) if isinstance(row.parameter, list) else row.parameter or row.name


def _moved(before: Mapping[str, ir.Value], old: str, after: Mapping[str, ir.Value], new: str) -> float | None:
    """None where the weight is no initializer of the main graph, or holds numbers that are not finite."""
    values = before.get(old), after.get(new)
    tensors = [v.const_value for v in values if v is not None and is_float(v) and v.const_value is not None]
    if len(tensors) != 2 or tensors[0].size != tensors[1].size:
        return None
    old_flat, new_flat = (tensor.numpy().reshape(-1) for tensor in tensors)
    size = distance = 0.0
    for k in range(0, old_flat.size, _BLOCK):
        a, b = (flat[k : k + _BLOCK].astype(np.float64) for flat in (old_flat, new_flat))
        size += float(np.dot(a, a))
        distance += float(np.dot(b - a, b - a))
    for tensor in tensors:
        release(tensor)
    if not (math.isfinite(size) and math.isfinite(distance)):
        return None
    return math.sqrt(distance / size) if size > 0 else (0.0 if distance == 0 else None)
