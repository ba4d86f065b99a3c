"""How much the last features differ from position to position, where each position has an output of its own.

Attention averages over tokens: without skips a stack of it comes to one and the same vector everywhere, doubly
exponentially with depth (Dong et al. 2021). Whatever the layers behind, every position then says the same, although
examples differ and gradients have a good norm.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.domain import mean_over
from gradlint.estimate import Estimate
from gradlint.figures import difference
from gradlint.graph import dims, is_float, main_output
from gradlint.structure import unit_axis


def last_features(parts: Anatomy, estimate: Estimate) -> tuple[ir.Node, ir.Value] | None:
    """The last layer with weights, and the value it reads."""
    layer = next((n for n in reversed(parts.layers) if n in parts.weighted), None)
    read = [v for v in (layer.inputs if layer is not None else ()) if v is not None and v in estimate.varies]
    return (layer, read[0]) if layer is not None and read else None


def told_apart(parts: Anatomy, estimate: Estimate) -> tuple[int, ...]:
    """The axes of the last features whose positions have an output each.

    None where the last layer or what follows puts positions together: what is pooled may be alike.
    """
    found = last_features(parts, estimate)
    if found is None or not is_float(found[1]):
        return ()
    layer, features = found
    output = main_output(layer)
    kept = any(is_float(o) and estimate.elements(o) >= estimate.elements(output) for o in parts.graph.outputs)
    return _positions(features, estimate) if kept and _positions(output, estimate) else ()


def _positions(value: ir.Value, estimate: Estimate) -> tuple[int, ...]:
    """The axes that are neither examples nor units; none where examples and positions share an axis."""
    shape = dims(value) or ()
    batch = next((a for a in (0, 1) if a < len(shape) and shape[a] == estimate.batch), None)
    if batch is None:
        return ()
    return tuple(a for a, n in enumerate(shape) if n > 1 and a not in (batch, unit_axis(value, estimate)))


def estimated_difference(parts: Anatomy, estimate: Estimate) -> float | None:
    """`figures.difference` of the last features, by the estimated moments."""
    found, axes = last_features(parts, estimate), told_apart(parts, estimate)
    x, shape = (estimate.moments.get(found[1]), dims(found[1])) if found is not None else (None, None)
    if x is None or shape is None or not axes:
        return None
    apart = np.square(x.mean - mean_over(x.mean, shape, axes)) + x.fixed + x.local
    return difference(float(np.mean(apart)), float(np.mean(x.second)))
