"""How steep the loss is at the start, and how flat: whether a usual learning rate is short, or long, enough.

Gradient descent is stable up to a rate of about 2 / the largest eigenvalue of the tangent kernel, which its trace
bounds, and comes close to where activations are far from zero (LeCun et al. 1998; Jacot et al. 2018; Cohen et al.
2021). The trace grows with the squared scale of weights and inputs at every layer: it shows what ratios between layers
don't, such as two layers drawn far too large.

The same trace, without what all examples have in common, is how far a step of rate 1 moves examples apart. Where it is
tiny no usual number of steps does, whether the signal collapsed, the gradient, or a part of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.estimate import Estimate
from gradlint.fact_table import Subject
from gradlint.graph import dims, is_float
from gradlint.parameters import WeightUse
from gradlint.patterns import normalisations
from gradlint.probe import Probe
from gradlint.weight_facts import role

_MULTIPLIED = frozenset({"kernel", "recurrent", "embedding"})


def unnormalised(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes with a way to the outputs on which nothing normalises what they compute.

    Behind a normalisation the outputs stay where they are however long a step is: it makes the weights large, and their
    next steps shorter by as much (Arora, Li, Lyu 2019).
    """
    norms = normalisations(graph)
    pending = [p for o in graph.outputs if (p := o.producer()) is not None]
    found: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node in norms else node.predecessors()
    return frozenset(found)


def counted(parts: Anatomy) -> tuple[WeightUse, ...]:
    """Uses of weights without a normalisation behind."""
    bare = unnormalised(parts.graph)
    return tuple(use for use in parts.uses if use.layer in bare)


def estimated_sharpness(
    uses: Sequence[WeightUse], estimate: Estimate, output_gradient: float, floor: float | None
) -> float | None:
    """`trace` of the estimated gradients, those of independent targets; not below `floor`, the last layer's part."""
    found = trace((_square(v, estimate.grad_rms(v)) for v in _weights(uses)), output_gradient)
    return _at_least(found, floor)


def measured_sharpness(
    uses: Sequence[WeightUse], measured: Probe, output_gradient: float, floor: float | None
) -> float | None:
    """`trace` of the measured gradients; not below `floor`, the last layer's part."""
    rows = measured.weights
    squares = (_square(v, rows.get(str(v.name), {}).get("grad_rms")) for v in _weights(uses))
    return _at_least(trace(squares, output_gradient, measured.coherence), floor)


def trace(squares: Iterable[float], output_gradient: float, coherence: float = 1.0) -> float | None:
    """log10 of the trace of the tangent kernel, of one output.

    The squared gradient of the weights over that of a shift that the outputs of all examples share. squares: squared
    norms of the weights' gradients; output_gradient: norm of the gradient at the last layer's output, per example;
    coherence: how far these agree between examples. inf where the gradient is not finite; None where there is none.
    """
    total, shift = sum(squares), output_gradient**2 * coherence
    if math.isinf(total):
        return math.inf
    return math.log10(total) - math.log10(shift) if total > 0 and 0 < shift < math.inf else None


def responsiveness(
    parts: Anatomy,
    estimate: Estimate,
    gradients: Callable[[ir.Value], float | None],
    signals: Callable[[ir.Value], float],
    output_gradient: float,
    coherence: float = 1.0,
) -> float | None:
    """`trace` over kernels, each without the part of its gradient that its input's mean over examples makes.

    gradients: RMS of a weight's; signals: of what a layer reads (std over examples / RMS), whose square is the share of
    its second moment that tells examples apart. Input and gradient are taken as independent. -inf where nothing moves,
    None where a gradient is not known.
    """
    read: dict[ir.Value, float] = {}
    for use in parts.uses:
        if role(use) in _MULTIPLIED:
            value = multiplied(use.layer, estimate)
            signal = 1.0 if value is None else signals(value)
            read[use.value] = max(read.get(use.value, 0.0), signal)
    known = {value: gradients(value) for value in read}
    squares = [_square(value, known[value]) * min(signal, 1.0) ** 2 for value, signal in read.items()]
    if not squares or not 0 < output_gradient < math.inf:
        return None
    if sum(squares) > 0:
        return trace(squares, output_gradient, coherence)
    return None if None in known.values() else -math.inf


def multiplied(layer: ir.Node, estimate: Estimate) -> ir.Value | None:
    """The value that a layer's weights are multiplied with."""
    return next((v for v in layer.inputs if v is not None and v in estimate.varies and is_float(v)), None)


def last_part(weights: Sequence[Subject]) -> float | None:
    """log10 of the last layer's part of the trace: the squared norm of the features it reads, without their mean.

    Known where no gradient comes back, because the head's Softmax or Sigmoid is saturated by them.
    """
    kernels = [s for s in weights if s.facts.get("role") == "kernel"]
    if not kernels:
        return None
    facts = max(kernels, key=lambda s: s.order).facts
    fan_in, scale = facts.get("fan_in"), facts.get("forward_scale")
    if not isinstance(fan_in, int | float) or not isinstance(scale, float) or not fan_in * scale > 0:
        return None
    return math.log10(fan_in) + 2 * math.log10(scale)


def _at_least(found: float | None, floor: float | None) -> float | None:
    return max((x for x in (found, floor) if x is not None), default=None)


def shares(weights: Sequence[Subject], uses: Sequence[WeightUse]) -> list[float | None]:
    """Squared norm of each counted weight's gradient / the largest of them, by the best evidence; None for others."""
    layers = {str(use.layer.name) for use in uses}
    squares = [
        float(s.facts["elements"] or 0) * rms**2
        if s.layer in layers and isinstance(rms := s.facts.get("grad_rms"), float)
        else None
        for s in weights
    ]
    most = max((x for x in squares if x is not None), default=0.0)
    return [x / most if x is not None and 0 < most < math.inf else None for x in squares]


def _weights(uses: Sequence[WeightUse]) -> list[ir.Value]:
    """Those that several layers share once."""
    return list(dict.fromkeys(use.value for use in uses))


def _square(value: ir.Value, rms: float | None) -> float:
    return 0.0 if rms is None else math.prod(dims(value) or ()) * rms**2
