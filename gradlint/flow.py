"""The flow of gradient and signal along the trunk, per kind of evidence: what the rules on chains look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.derived_facts import on_trunk
from gradlint.estimate import Estimate
from gradlint.graph import MOVES, is_float, main_output, op
from gradlint.probe import Probe
from gradlint.results import Blame, Evidence
from gradlint.trunk import blame, completed, crossing, levels

_Curve = Mapping[ir.Node, float]
_CARRIERS = MOVES | {"Gather"}


@dataclass(frozen=True)
class Flow:
    """Trunk gradient (decades against its largest nearer the outputs, and against the last layer), signal, standard
    deviation and nonlinearity (`nonlinearity`) at every cut; how much the gradient grows over the head alone; and its
    norm at the output of the last layer with weights.
    """

    decades: Mapping[Evidence, _Curve]
    growth: Mapping[Evidence, _Curve]
    signal: Mapping[Evidence, _Curve]
    std: Mapping[Evidence, _Curve]
    nonlinearity: Mapping[Evidence, _Curve]
    head_growth: Mapping[Evidence, float]
    output_gradient: Mapping[Evidence, float]
    blames: Mapping[ir.Value, Sequence[Blame]]
    layers: tuple[ir.Node, ...]
    trunk: frozenset[ir.Node]

    @staticmethod
    def of(parts: Anatomy, estimate: Estimate, measured: Probe | None) -> Flow:
        graph = parts.graph
        values = {str(o.name): o for n in graph for o in n.outputs}
        names = {o for n in graph for o in n.outputs if o in estimate.varies}
        norms: dict[Evidence, dict[ir.Value, float]] = {
            "estimated": {v: g for v in names if (g := estimate.grad_norm(v)) is not None}
        }
        signals: dict[Evidence, dict[ir.Value, float]] = {
            "estimated": {v: s for v in names if (s := estimated_signal(estimate, v)) is not None}
        }
        spreads: dict[Evidence, dict[ir.Value, float]] = {
            "estimated": {v: s * math.sqrt(_second(estimate, v)) for v, s in signals["estimated"].items()}
        }
        stds: dict[Evidence, dict[ir.Value, float]] = {
            "estimated": {v: estimate.moments[v].std for v in names if v in estimate.moments}
        }
        if measured is not None:
            rows = {
                values[n]: row for n, row in measured.values.items() if n in values and values[n] in estimate.varies
            }
            rows |= {n.outputs[0]: rows[main_output(n)] for n in parts.layers if main_output(n) in rows}
            known = _carried(graph, {v: r["grad_norm"] for v, r in rows.items() if "grad_norm" in r})
            norms["measured"] = completed(graph, known, estimate.edges, norms["estimated"])
            signals["measured"] = _carried(graph, {v: r["signal"] for v, r in rows.items() if "signal" in r})
            stds["measured"] = _carried(graph, {v: r["output_std"] for v, r in rows.items() if "output_std" in r})
            spreads["measured"] = {
                v: row["signal"] * math.hypot(row["output_mean"], row["output_std"])
                for v, row in rows.items()
                if "signal" in row
            }
        falls: dict[Evidence, dict[ir.Node, float]] = {}
        growth: dict[Evidence, _Curve] = {}
        head_growth: dict[Evidence, float] = {}
        output_gradient: dict[Evidence, float] = {}
        level = levels(graph)
        stem = _before_head(parts, level)
        cotangents: dict[Evidence, float] = {"estimated": cotangent_norm(graph, estimate)}
        if measured is not None:
            cotangents["measured"] = measured.cotangent
        for kind, figures in norms.items():
            curve = crossing(level, figures)
            shown = {n: curve[n] for n in stem if n in curve}
            last = next((g for g in shown.values() if g), 0.0)
            output_gradient[kind] = last
            last = max(last, cotangents[kind])
            growth[kind] = {n: decades(g, last) for n, g in shown.items()}
            head = decades(_last_features(shown, level), last)
            head_growth[kind] = head if 0 < head < math.inf else 0.0
            falls[kind] = {}
            top = 0.0 if any(shown.values()) else cotangents[kind]  # nothing arrives at all: that is lost in the head
            for node, figure in shown.items():  # against the largest between here and the outputs
                top = max(top, figure)
                falls[kind][node] = decades(figure, top)
        best: Evidence = "measured" if norms.get("measured") else "estimated"
        targets = [main_output(n) for n in parts.layers]
        blames = blame(graph, norms[best], estimate.edges, cotangents[best], targets)
        signal = {kind: crossing(level, figures) for kind, figures in signals.items()}
        bent = {kind: nonlinearity(level, stem, norms[kind], spreads[kind]) for kind in norms}
        std = {kind: crossing(level, figures) for kind, figures in stds.items()}
        trunk = on_trunk(parts, level, norms[best])
        return Flow(falls, growth, signal, std, bent, head_growth, output_gradient, blames, parts.layers, trunk)

    def blame_of(self, node: ir.Node) -> Sequence[Blame]:
        return self.blames.get(main_output(node), ())

    def at(self, node: ir.Node, kind: Evidence) -> dict[str, float]:
        curves = {
            "trunk_decades": self.decades,
            "trunk_growth": self.growth,
            "trunk_signal": self.signal,
            "trunk_std": self.std,
        }
        return {name: curve[kind][node] for name, curve in curves.items() if node in curve.get(kind, {})}

    def signal_of(self, estimate: Estimate, kind: Evidence, value: ir.Value) -> float:
        """Of the trunk where a value is made; of an input, by its assumed or given moments; 1 where it is not known."""
        maker = value.producer()
        found = estimated_signal(estimate, value) if maker is None else self.signal[kind].get(maker)
        return 1.0 if found is None else found

    def model_facts(self) -> dict[Evidence, dict[str, float]]:
        found: dict[Evidence, dict[str, float]] = {"estimated": {}, "measured": {}}
        for kind in self.decades:
            if self.decades[kind]:
                found[kind]["trunk_min_decades"] = min(self.decades[kind].values())
                found[kind]["trunk_max_decades"] = max(self.growth[kind].values())
                found[kind]["head_growth"] = self.head_growth[kind]
            if self.nonlinearity[kind]:
                found[kind]["nonlinearity"] = max(self.nonlinearity[kind].values())
        return found


def nonlinearity(
    level: Mapping[ir.Node, int],
    stem: list[ir.Node],
    norms: Mapping[ir.Value, float],
    spreads: Mapping[ir.Value, float],
) -> dict[ir.Node, float]:
    """Decades of the nonlinearity coefficient from each layer to the last one of `stem` (its first).

    sqrt(E tr(J C J') / tr(C')), J the Jacobian from a value with covariance C over examples to one with C'
    (Philipp and Carbonell 2018): the variance that a linear map of the same slopes would carry, over what arrives. 0
    for a linear network. C is taken as its mean variance times the identity: then it is the product of gradient norm
    and spread over examples, here against there. The largest product of the values across a cut stands for the cut.
    """
    products = {v: norms[v] * spreads[v] for v in norms if v in spreads}
    curve = crossing(level, {v: p for v, p in products.items() if math.isfinite(p)})
    last = next((curve[n] for n in stem if n in curve), 0.0)
    return {n: decades(curve[n], last) for n in stem if curve.get(n, 0.0) > 0 and last > 0}


def _before_head(parts: Anatomy, level: Mapping[ir.Node, int]) -> list[ir.Node]:
    """The layers up to the deepest one with weights, deepest first: a head's Softmax is no matter of the trunk.

    Layers at the same depth count alike, whatever their order in the file.
    """
    end = max((level[n] for n in parts.layers if n in parts.weighted), default=-1)
    return sorted((n for n in parts.layers if level[n] <= end), key=lambda n: -level[n])


def _carried(graph: ir.Graph, figures: Mapping[ir.Value, float]) -> dict[ir.Value, float]:
    """With the values that hold elements of a measured one, which the probe leaves out: they cross cuts in its stead.

    Beside the weights of an attention, which hardly differ between examples, its values cross, transposed.
    """
    found = dict(figures)
    for node in graph:
        if op(node) in _CARRIERS and node.inputs[0] in found:
            found |= {o: found[node.inputs[0]] for o in node.outputs if o not in found}
    return found


def _last_features(curve: _Curve, level: Mapping[ir.Node, int]) -> float:
    """The trunk's gradient where the deepest layer reads it: what that layer does to it, it does to all alike."""
    deepest = max((level[n] for n in curve), default=0)
    return next((g for n, g in curve.items() if level[n] < deepest), 0.0)


def decades(figure: float, reference: float) -> float:
    if not math.isfinite(figure):
        return math.inf
    if figure <= 0 or reference <= 0:
        return -math.inf if reference > 0 else 0.0
    return math.log10(figure) - math.log10(reference) if math.isfinite(reference) else -math.inf


def cotangent_norm(graph: ir.Graph, estimate: Estimate) -> float:
    """Norm of standard normal targets over all float outputs, per example."""
    return math.sqrt(sum(estimate.elements(o) for o in dict.fromkeys(graph.outputs) if is_float(o)) or 1.0)


def _second(estimate: Estimate, value: ir.Value) -> float:
    """Mean square over examples, positions and units."""
    return float(np.mean(estimate.moments[value].second))


def estimated_signal(estimate: Estimate, value: ir.Value) -> float | None:
    """Standard deviation over examples / RMS."""
    x = estimate.moments.get(value)
    if x is None:
        return None
    second = _second(estimate, value)
    return math.sqrt(max(0.0, float(np.mean(x.shared + x.local))) / second) if second > 0 else 0.0
