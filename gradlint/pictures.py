"""Pictures of each layer for a page: histograms and curves, made only when one is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.attention_facts import Attention, attentions
from gradlint.fact_table import Fact
from gradlint.facts import PICTURED, Facts
from gradlint.graph import constant_array, op
from gradlint.histograms import Histogram
from gradlint.init_fit import sample
from gradlint.load import release
from gradlint.parameters import WeightUse
from gradlint.probe import Probe
from gradlint.recurrent_facts import CELLS, unrolled
from gradlint.results import Evidence, LayerRow, Picture, PictureKind
from gradlint.transfer import ELEMENTWISE, derivative
from gradlint.weight_facts import role

_STEPS = 120  # points of a curve over time


def pictured(facts: Facts, parts: Anatomy, probed: Probe | None) -> tuple[LayerRow, ...]:
    """The layers' rows with their pictures. Without a probe: weights, and estimated curves over time."""
    histograms = probed.histograms if probed is not None else {}
    pictures: dict[str, list[Picture]] = {row.name: [] for row in facts.layers}
    known = {(s.layer, s.weight): s.facts for s in facts.subjects if s.scope == "weight"}
    for node in parts.activations:
        pictures[str(node.name)] += _inputs(node, histograms)
    for attention in attentions(parts.graph):
        pictures.setdefault(str(attention.node.name), []).extend(_attention(attention, histograms))
    for use in parts.uses:
        if role(use) in PICTURED:
            pictures[str(use.layer.name)] += _weights(use, known[str(use.layer.name), use.initializer], histograms)
    for name, evidence, curve in _over_time(facts, parts, probed):
        pictures[name].append(_time(name, evidence, curve))
    return tuple(replace(row, pictures=tuple(pictures[row.name])) for row in facts.layers)


def _picture(kind: PictureKind, subject: str, histogram: Histogram, scale: float = 1.0) -> Picture:
    return Picture(
        kind, subject, _short(scale * histogram.low), _short(scale * histogram.high), histogram.counts,
        histogram.left_out,
    )  # fmt: skip


def _short(number: float, digits: int = 5) -> float:
    """Few digits: more would only fill the page."""
    return float(f"{number:.{digits}g}")


def _inputs(node: ir.Node, histograms: Mapping[tuple[str, str], Histogram]) -> Iterator[Picture]:
    """What goes into an activation, and |f'| in the middle of each bin as a share of the largest."""
    found, z = histograms.get(("input", str(node.name))), node.inputs[0]
    if found is None or z is None or op(node) not in ELEMENTWISE:
        return
    _, slope, steepest = derivative(op(node), node)
    edges = np.linspace(found.low, found.high, len(found.counts) + 1)
    with np.errstate(all="ignore"):
        curve = np.abs(np.broadcast_to(slope((edges[1:] + edges[:-1]) / 2), len(found.counts)))
    largest = steepest or float(np.max(curve, initial=0.0, where=np.isfinite(curve)))
    if largest > 0 and np.isfinite(curve).all():
        shares = tuple(_short(v, 3) for v in np.minimum(curve / largest, 1.0).tolist())
        yield replace(_picture("input", str(z.name), found), curve=shares)


def _attention(found: Attention, histograms: Mapping[tuple[str, str], Histogram]) -> Iterator[Picture]:
    name = str(found.node.outputs[0].name)
    scale = found.path[0][1] if found.path else 1.0
    if (logits := histograms.get(("logits", name))) is not None:
        middles = np.linspace(logits.low, logits.high, 2 * len(logits.counts) + 1)[1::2] * scale
        spread = np.sqrt(np.average(middles**2, weights=logits.counts))
        yield replace(_picture("logits", name, logits, scale), std=_short(float(spread), 3))
    if (entropy := histograms.get(("entropy", name))) is not None:
        yield _picture("entropy", name, entropy)


def _weights(
    use: WeightUse, facts: Mapping[str, Fact], histograms: Mapping[tuple[str, str], Histogram]
) -> Iterator[Picture]:
    """A weight beside the initialisation it should have, and its gradient."""
    array = constant_array(use.value)
    if array is not None and (found := Histogram.of(sample(array))) is not None:
        scheme, std = facts.get("init_scheme"), facts.get("init_std")
        picture = _picture("weight", use.initializer, found)
        yield replace(
            picture,
            scheme=scheme if isinstance(scheme, str) else None,
            std=_short(std) if isinstance(std, float) else None,
        )
        release(use.value.const_value)
    if (gradient := histograms.get(("gradient", str(use.value.name)))) is not None:
        yield _picture("gradient", use.initializer, gradient)


def _over_time(facts: Facts, parts: Anatomy, probed: Probe | None) -> Iterator[tuple[str, Evidence, np.ndarray]]:
    """|dL/dh_t| of recurrent operators, and of recurrences that an exporter has unrolled at their first step."""
    kinds: tuple[Evidence, ...] = ("measured", "estimated")
    rows = {row.name: row for row in facts.layers}
    for name in (str(n.name) for n in parts.layers if op(n) in CELLS):
        for kind in kinds:
            if (curve := facts.profiles.get(kind, {}).get(name)) is not None:
                yield name, kind, curve
                break
    for chain in unrolled(parts):
        names = [str(n.name) for n in chain.nodes]
        for kind in kinds:
            norms = [getattr(rows[name], kind).get("grad_norm") for name in names]
            if all(norm is not None for norm in norms):
                yield names[0], kind, np.array(norms)
                break


def _time(name: str, evidence: Evidence, curve: np.ndarray) -> Picture:
    """log10 of the norm at up to _STEPS evenly spaced steps; where it is zero, of the smallest float32."""
    curve = np.asarray(curve, np.float64)
    with np.errstate(all="ignore"):
        logs = np.log10(np.maximum(curve, np.finfo(np.float32).tiny))
    some = logs[np.unique(np.linspace(0, curve.size - 1, min(curve.size, _STEPS)).astype(int))]
    levels = tuple(round(v, 2) for v in some.tolist())
    return Picture("time", name, 1.0, float(curve.size), curve=levels, evidence=evidence)
