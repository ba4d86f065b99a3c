"""Facts that follow from others: ratios between layers, updates at a learning rate, derivatives near a pole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.estimate import Estimate, Proof
from gradlint.fact_table import Fact, Subject
from gradlint.graph import main_output, op, source
from gradlint.patterns import behind, normalisations, scalar
from gradlint.results import Evidence
from gradlint.sharpness import multiplied
from gradlint.trunk import crossing

Figures = dict[Evidence, dict[str, float]]
_KINDS: tuple[Evidence, ...] = ("estimated", "measured")
_MOSTLY = 0.95  # a kernel whose elements are near zero to a larger share starts at zero
_REACH = 4.0  # standard deviations an estimated range extends to
_POLE_EVIDENCE: dict[str, Evidence] = {
    "pole_derivative": "estimated",
    "pole_in_range": "proved",
    "output_non_finite": "measured",
}
_POLES = ("Log", "Sqrt", "Div", "Reciprocal", "Pow")


def on_trunk(parts: Anatomy, level: Mapping[ir.Node, int], norms: Mapping[ir.Value, float]) -> frozenset[ir.Node]:
    """Layers whose output carries the largest gradient across its cut of the graph, within a decade (all of them where
    it is zero)."""
    curve = crossing(level, norms)
    return frozenset(n for n in parts.layers if n in curve and norms.get(main_output(n), 0.0) >= 0.1 * curve[n])


def variance_ratios(subjects: Sequence[Subject]) -> dict[str, Figures]:
    """Variance of each layer's output / of the first layer's, by layer name and kind of evidence."""
    found: dict[str, Figures] = {}
    for kind in _KINDS:
        spreads = [
            (s.layer, float(std))
            for s in subjects
            if s.layer and isinstance(std := s.facts.get(f"{kind}_output_std"), float) and math.isfinite(std)
        ]
        first = next((std for _, std in spreads if std > 0), None)
        if first is None:
            continue
        for layer, std in spreads:
            found.setdefault(layer, {}).setdefault(kind, {})["variance_ratio"] = (std / first) * (std / first)
    return found


def update_ratio(
    facts: Mapping[str, Fact], kind: Evidence, learning_rate: float | None, adam: bool, cotangent: float
) -> float | None:
    """log10 of a step / the weight, both as root mean squares. A step is learning rate * gradient, with Adam the rate
    itself (its first steps have an element's gradient divided by its own size).

    cotangent: norm of the loss's gradient at the outputs, to divide by: the linear loss's targets are arbitrary, while
    that of a cross-entropy is about 1.
    """
    grad, weight = facts.get(f"{kind}_grad_rms"), facts.get("weight_rms")
    if not learning_rate or not isinstance(grad, float) or not isinstance(weight, float) or min(grad, weight) <= 0:
        return None
    return math.log10(learning_rate * (1.0 if adam else grad / cotangent) / weight)


def fp16_underflow(grad_rms: float | None) -> float | None:
    """Share of normal draws of this root mean square that are under 2^-24, the least positive number of half
    precision."""
    if grad_rms is None or not math.isfinite(grad_rms) or grad_rms <= 0:
        return None
    return math.erf(2.0**-24 / (grad_rms * math.sqrt(2)))


def learning_spread(weights: Iterable[Subject], trunk: frozenset[str], kind: Evidence) -> float | None:
    """log10 of the largest to the smallest gradient / weight, over the kernels of layers on the trunk (by name).

    Kernels that start at as good as zero (spatial gates at 1e-6) grow by their first steps, and have no ratio to keep.
    """
    ratios = [
        float(grad) / float(rms)
        for s in weights
        if s.layer in trunk
        and s.facts.get("role") in ("kernel", "recurrent")
        and not s.facts.get("is_structural_zero")
        and float(s.facts.get("near_zero_share") or 0.0) <= _MOSTLY
        and isinstance(grad := s.facts.get(f"{kind}_grad_rms"), float)
        and isinstance(rms := s.facts.get("weight_rms"), float)
        and grad > 0
        and rms > 0
    ]
    return math.log10(max(ratios) / min(ratios)) if len(ratios) > 1 else None


def forward_scale(layer: ir.Node, estimate: Estimate, measured: Mapping[str, Mapping[str, float]]) -> float | None:
    """Standard deviation of the value a layer's weights are multiplied with; measured where it was."""
    value = multiplied(layer, estimate)
    if value is None:
        return None
    if (std := measured.get(str(value.name), {}).get("output_std")) is not None:
        return std
    x = estimate.moments.get(value)
    return None if x is None else x.std


# -- poles -------------------------------------------------------------------------------------------------------------


def pole_subjects(parts: Anatomy, estimate: Estimate, proof: Proof, non_finite: frozenset[str]) -> list[Subject]:
    """Nodes whose derivative has a pole, with its bound over the input's range. non_finite: values the probe saw
    overflow."""
    found, order = [], {n: k for k, n in enumerate(parts.graph)}
    for node in pole_nodes(parts, estimate):
        facts = _pole_facts(node, estimate, proof)
        if facts:
            facts |= {"op_type": op(node), "output_non_finite": str(node.outputs[0].name) in non_finite}
            found.append(Subject("layer", str(node.name), None, order[node], facts, _POLE_EVIDENCE, (), source(node)))
    return found


def pole_nodes(parts: Anatomy, estimate: Estimate) -> list[ir.Node]:
    """Nodes whose derivative has a pole and whose input varies, those of normalisations and softmaxes left out."""
    norms = normalisations(parts.graph)
    varying = [n for n in parts.graph if _may_have_pole(n) and n.outputs[0] in estimate.varies]
    return [n for n in varying if not _is_guarded(n, norms)]


def _may_have_pole(node: ir.Node) -> bool:
    exponent = scalar(node.inputs[1]) if op(node) == "Pow" else None
    return op(node) in _POLES and (exponent is None or exponent < 1)


def _is_guarded(node: ir.Node, norms: set[ir.Node]) -> bool:
    """Part of a normalisation written out, or of a softmax: x / sum(x)."""
    if node in norms:
        return True
    readers = {s for n in (node, *node.successors()) for s in n.successors()}
    if (readers | {s for n in readers for s in n.successors()}) & norms:
        return True
    divisor = behind(node.inputs[1]) if op(node) == "Div" else None
    sums = divisor.producer() if divisor is not None else None
    return sums is not None and op(sums) == "ReduceSum" and sums.inputs[0] is node.inputs[0]


def _pole_facts(node: ir.Node, estimate: Estimate, proof: Proof) -> dict[str, Fact]:
    """Bound of |f'| over mean +- 4 standard deviations, cut to the proved range; and whether that range holds the
    pole."""
    value = node.inputs[1] if op(node) == "Div" else node.inputs[0]
    exponent = scalar(node.inputs[1]) if op(node) == "Pow" else None
    x = estimate.moments.get(value) if value is not None else None
    if value not in estimate.varies or x is None or (op(node) == "Pow" and exponent is None):
        return {}
    spread = _REACH * np.sqrt(np.maximum(x.var, 0))
    low, high = float(np.min(x.mean - spread)), float(np.max(x.mean + spread))
    box = proof.ranges.get(value)
    if box is not None:
        low, high = max(low, float(box.lo.min())), min(high, float(box.hi.max()))
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    if op(node) in ("Log", "Sqrt") and low <= 0:
        nearest = 0.0
    facts: dict[str, Fact] = {"pole_derivative": _derivative(node, nearest, exponent, estimate)}
    if box is not None:
        facts["pole_in_range"] = bool(np.any((box.lo <= 0) & (box.hi >= 0)))
    return facts


def _derivative(node: ir.Node, nearest: float, exponent: float | None, estimate: Estimate) -> float:
    """|f'| at the distance `nearest` from the pole."""
    if nearest < 1e-100:  # powers of less would overflow
        return math.inf
    if op(node) == "Log":
        return 1 / nearest
    if op(node) == "Sqrt":
        return 0.5 / math.sqrt(nearest)
    if op(node) == "Pow":
        assert exponent is not None
        return abs(exponent) * nearest ** (exponent - 1)
    x = estimate.moments.get(node.inputs[0]) if op(node) == "Div" and node.inputs[0] is not None else None
    size = 1.0 if x is None else math.sqrt(float(np.max(x.second)))
    return max(1 / nearest, size / nearest**2) if op(node) == "Div" else 1 / nearest**2
