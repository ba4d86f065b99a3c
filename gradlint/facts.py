"""From analyses to facts: one row per layer and weight for the report, one subject per place for the rules.

Best evidence first: where the probe measured a quantity it stands before the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.attention_facts import attentions
from gradlint.derived_facts import (
    forward_scale,
    fp16_underflow,
    learning_spread,
    pole_nodes,
    pole_subjects,
    update_ratio,
    variance_ratios,
)
from gradlint.estimate import Estimate, Proof
from gradlint.fact_table import Fact, Scope, Subject
from gradlint.flow import Flow, cotangent_norm
from gradlint.folding import folded_batchnorms
from gradlint.graph import PRODUCTS, REORDERS, dims, is_float, leads_to, main_output, op, source
from gradlint.layer_facts import layer_figures, layer_inputs, layer_row, place
from gradlint.options import Options
from gradlint.parameters import WeightUse
from gradlint.patterns import compositions, scalar
from gradlint.positions import estimated_difference, last_features, told_apart
from gradlint.probe import Probe, Request, Skipped
from gradlint.recurrent_facts import Profiles
from gradlint.results import Blame, Evidence, LayerRow, WeightRow
from gradlint.sharpness import counted, estimated_sharpness, last_part, measured_sharpness, responsiveness, shares
from gradlint.static_facts import StaticFacts, static_facts
from gradlint.structure import unit_axis
from gradlint.transfer import ELEMENTWISE
from gradlint.trunk import depths
from gradlint.weight_facts import role

_KINDS: tuple[Evidence, ...] = ("estimated", "measured")
PICTURED = frozenset({"kernel", "recurrent", "embedding"})  # roles of the weights that a page has pictures of
EXPORT_LINE = "torch.onnx.export(model.train(), args, 'model.onnx', dynamo=True, optimize=False)"


def request(parts: Anatomy, estimate: Estimate, *, pictures: bool = False) -> Request:
    """What the probe measures: outputs of layers, of sums, of poles, and of whatever several nodes read. pictures: and
    the histograms of a page."""
    graph, poles, composed = parts.graph, set(pole_nodes(parts, estimate)), compositions(parts.graph)
    biased = {v for n in graph if op(n) in PRODUCTS and (v := main_output(n)) not in n.outputs}
    values: list[str] = []
    known: set[ir.Value] = set()  # measured, or holding the elements of what is
    for n in graph:
        if op(n) in REORDERS and n.inputs[0] in known and _alone(n.inputs[0]):
            known.update(n.outputs)
        elif main_output(n) in n.outputs:  # else the sum with the bias stands for it
            sums = op(n) in ("Add", "Sum") and n not in composed and all(scalar(v) is None for v in n.inputs)
            named = n in parts.layers or n in poles or sums or n.outputs[0] in biased
            chosen = [o for o in n.outputs if is_float(o) and (named or not _alone(o))]
            known.update(chosen)
            values += [str(o.name) for o in chosen]
    weights = list(dict.fromkeys(str(u.value.name) for u in parts.uses))
    units = {str(n.name): unit_axis(main_output(n), estimate) for n in parts.activations}
    last = last_features(parts, estimate)
    features = str(last[1].name) if last is not None else None
    apart = told_apart(parts, estimate)
    softmax = {str(a.node.outputs[0].name): str(a.path[0][0].name) for a in attentions(graph) if a.path}
    curves = [str(n.name) for n in parts.activations if op(n) in ELEMENTWISE]
    kernels = list(dict.fromkeys(str(u.value.name) for u in parts.uses if role(u) in PICTURED)) if pictures else None
    return Request(values, weights, curves, units, features, apart, softmax, kernels)


def _alone(value: ir.Value) -> bool:
    """Does one node read it, or none?"""
    return len(value.uses()) <= 1


@dataclass(frozen=True)
class Facts:
    """Everything the judge and the report need. blames: by layer; profiles: |dL/dh_t| per step of recurrent
    operators, by name."""

    layers: tuple[LayerRow, ...]
    weights: tuple[WeightRow, ...]
    subjects: tuple[Subject, ...]
    model: Mapping[str, Fact]
    blames: Mapping[str, Sequence[Blame]]
    profiles: Profiles = field(default_factory=dict)


@dataclass
class _Known:
    """A subject's facts while they are collected: best evidence under the plain name, each kind under its own."""

    facts: dict[str, Fact] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def add(self, kind: Evidence, figures: Mapping[str, Any]) -> None:
        """Later kinds win: call with proved, estimated, measured in this order."""
        for name, figure in figures.items():
            if figure is None:
                continue
            self.facts[f"{kind}_{name}"] = figure
            self.facts[name] = figure
            self.evidence[name] = kind


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def gather(
    parts: Anatomy,
    estimate: Estimate,
    proof: Proof,
    probed: Probe | Skipped | None,
    options: Options,
    model: Mapping[str, Fact],
    lengths: frozenset[str] = frozenset(),
    disconnected: Sequence[Subject] = (),
) -> Facts:
    """Collect facts of layers, activations, weights and the model as a whole.

    lengths: graph inputs whose sequence length was assumed; disconnected: weights of the file that lead to no output.
    """
    measured = probed if isinstance(probed, Probe) else None
    lost = _overflown(parts, measured)
    if measured is not None and lost:
        measured = _before_overflow(measured, lost)
    flow = Flow.of(parts, estimate, measured)
    rows, subjects = [], []
    weights_of: dict[ir.Node, list[WeightUse]] = {}
    for use in parts.uses:
        weights_of.setdefault(use.layer, []).append(use)
    order = {n: k for k, n in enumerate(parts.graph)}
    tapped, steps = (measured.values, measured.steps) if measured is not None else ({}, {})
    static = static_facts(parts, estimate, options.mode, tapped, steps, lengths)
    depth = depths(parts.graph)
    folded = set(folded_batchnorms(parts.graph))
    previous, last = layer_inputs(parts), last_features(parts, estimate)
    for index, node in enumerate(parts.layers):
        figures = layer_figures(node, parts, estimate, proof, measured, flow)
        rows.append(layer_row(node, figures, weights_of.get(node, []), previous.get(node, ()), flow))
        known = _Known()
        for kind in ("proved", "estimated", "measured"):
            known.add(kind, figures[kind])
        if last is not None and node is last[0]:
            known.add("estimated", {"position_signal": estimated_difference(parts, estimate)})
            known.add("measured", {"position_signal": measured.position_signal if measured is not None else None})
        known.facts |= place(node, parts, estimate, depth(node), index, node in folded) | static.layers[node]
        known.facts["on_trunk"] = node in flow.trunk
        if isinstance(probed, Probe):
            known.facts["output_non_finite"] = str(main_output(node).name) in lost
            known.evidence["output_non_finite"] = "measured"
        scope: Scope = "activation" if node in parts.activations else "layer"
        subjects.append(
            Subject(
                scope, str(node.name), None, order[node], known.facts, known.evidence, flow.blame_of(node), source(node)
            )
        )
    _add_ratios(subjects)
    steep = counted(parts)
    weights, weight_subjects = _weights(parts, estimate, measured, options, order, static, flow.trunk)
    for k, share in enumerate(shares(weight_subjects, steep)):
        if share is not None:
            weight_subjects[k] = replace(s := weight_subjects[k], facts={**s.facts, "sharpness_share": share})
    flow_facts = flow.model_facts()
    known = _Known(dict(model) | dict(static.model))
    if measured is not None:
        known.add("measured", {"alignment": measured.alignment})
    trunk = frozenset(str(n.name) for n in flow.trunk)
    for kind in _KINDS:
        known.add(kind, {**flow_facts[kind], "learning_spread": learning_spread(weight_subjects, trunk, kind)})
    at_outputs, floor = flow.output_gradient, last_part(weight_subjects)
    known.add("estimated", {"sharpness": estimated_sharpness(steep, estimate, at_outputs["estimated"], floor)})
    if measured is not None:
        known.add("measured", {"sharpness": measured_sharpness(steep, measured, at_outputs["measured"], floor)})
    for kind, rms_of, coherence in _gradients(estimate, None if lost else measured):
        signals = partial(flow.signal_of, estimate, kind)
        response = responsiveness(parts, estimate, rms_of, signals, at_outputs[kind], coherence)
        known.add(kind, {"responsiveness": response})
    if lost:
        known.add("measured", {"trunk_max_decades": math.inf})  # the loss is not finite, nor is any step
    probed_values = probed.values if isinstance(probed, Probe) else {}
    poles = frozenset(n for n, row in probed_values.items() if not math.isfinite(row.get("output_std", 0.0)))
    extra = [*static.subjects, *pole_subjects(parts, estimate, proof, poles)]
    subjects = sorted([*subjects, *extra], key=lambda s: s.order)
    subjects.insert(0, Subject("model", None, None, 0, known.facts, known.evidence))
    every = (*subjects, *weight_subjects, *disconnected)
    blames = {str(n.name): flow.blame_of(n) for n in parts.layers}
    return Facts(tuple(rows), tuple(weights), every, known.facts, blames, static.profiles)


def _gradients(
    estimate: Estimate, measured: Probe | None
) -> Iterator[tuple[Evidence, Callable[[ir.Value], float | None], float]]:
    """Per kind of evidence the RMS of a weight's gradient, and how far the examples' agree at the outputs."""
    yield "estimated", estimate.grad_rms, 1.0
    if measured is not None:
        rows = measured.weights
        yield "measured", lambda v: rows.get(str(v.name), {}).get("grad_rms"), measured.coherence


def _overflown(parts: Anatomy, measured: Probe | None) -> frozenset[str]:
    """Outputs of layers that held a NaN or an infinity: their mean tells (sums of squares overflow before they do)."""
    names = {str(main_output(n).name) for n in parts.layers}
    rows = measured.values.items() if measured is not None else ()
    return frozenset(n for n, row in rows if n in names and not math.isfinite(row.get("output_mean", 0.0)))


def _before_overflow(measured: Probe, lost: frozenset[str]) -> Probe:
    """What a run that overflowed still tells: the values it reached. Every gradient came back through the overflow,
    where comparisons with NaN made zeros of it."""
    kept = ("output_mean", "output_std", "signal")
    rows = {n: {k: row[k] for k in kept if k in row} for n, row in measured.values.items() if n not in lost}
    return replace(measured, values=rows, weights={}, steps={}, alignment=None, position_signal=None)


def _add_ratios(subjects: list[Subject]) -> None:
    """Variance of each output against the first layer's; best evidence under the plain name."""
    ratios = variance_ratios(subjects)
    for k, subject in enumerate(subjects):
        known = _Known(dict(subject.facts), dict(subject.evidence))
        for kind, figures in ratios.get(str(subject.layer), {}).items():
            known.add(kind, figures)
        subjects[k] = replace(subject, facts=known.facts, evidence=known.evidence)


def _weights(
    parts: Anatomy,
    estimate: Estimate,
    measured: Probe | None,
    options: Options,
    order: Mapping[ir.Node, int],
    static: StaticFacts,
    trunk: frozenset[ir.Node],
) -> tuple[list[WeightRow], list[Subject]]:
    rows, subjects = [], []
    cotangents = {
        "estimated": cotangent_norm(parts.graph, estimate),
        "measured": measured.cotangent if measured else 1.0,
    }
    for use in parts.uses:
        value = use.value
        numbers = static.weights[use.layer, use.index]
        rms = float(numbers["weight_rms"] or 0.0)
        estimated = {} if (g := estimate.grad_rms(value)) is None else {"grad_rms": g}
        got = dict(measured.weights.get(str(value.name), {})) if measured is not None else {}
        shape = tuple(dims(value) or ())
        rows.append(WeightRow(use.initializer, str(use.layer.name), shape, rms, True, use.parameter, estimated, got))
        known = _Known({"is_trainable": True, "parameter": str(use.parameter) if use.parameter else None, **numbers})
        known.facts["forward_scale"] = forward_scale(use.layer, estimate, measured.values if measured else {})
        known.facts |= {"is_head": not leads_to(use.layer, parts.weighted), "on_trunk": use.layer in trunk}
        known.add("estimated", estimated)
        known.add(
            "measured", {k: v for k, v in got.items() if k != "zero_share"} | {"grad_zero_share": got.get("zero_share")}
        )
        for kind, rms_of in zip(_KINDS, (estimated, got), strict=True):
            lost = fp16_underflow(rms_of.get("grad_rms"))
            cotangent = cotangents[kind] if kind == "estimated" or options.loss == "linear" else 1.0
            step = update_ratio(known.facts, kind, options.lr, options.optimizer == "adam", cotangent)
            known.add(kind, {"fp16_underflow": lost, "update_ratio": step})
        subjects.append(
            Subject(
                "weight",
                str(use.layer.name),
                use.initializer,
                order.get(use.layer, 0),
                known.facts,
                known.evidence,
                (),
                source(use.layer),
            )
        )
    return rows, subjects
