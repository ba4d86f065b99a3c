"""The figures of a layer by each kind of evidence, its place in the network, and its row of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.domain import Moments
from gradlint.estimate import Estimate, Proof
from gradlint.fact_table import Fact
from gradlint.flow import Flow, cotangent_norm, decades, estimated_signal
from gradlint.graph import ACTIVATIONS, dims, is_gate, leads_to, main_output, module, op, source
from gradlint.ops.activation import LOST, active_share, lost_share, saturated_share
from gradlint.parameters import WeightUse
from gradlint.probe import Probe, activation_figures
from gradlint.results import Evidence, LayerRow
from gradlint.structure import unit_axis
from gradlint.transfer import ELEMENTWISE, spectrum, steepest

_REACH = 4.0  # standard deviations that an input reaches from its mean
_ALIVE = 0.01  # a unit that is active less often is taken for dead


def layer_figures(
    node: ir.Node, parts: Anatomy, estimate: Estimate, proof: Proof, measured: Probe | None, flow: Flow
) -> dict[Evidence, dict[str, Any]]:
    out = main_output(node)
    name = str(out.name)
    cotangent = cotangent_norm(parts.graph, estimate)
    estimated: dict[str, Any] = {}
    if (x := estimate.moments.get(out)) is not None:
        estimated |= {"output_mean": float(np.mean(x.mean)), "output_std": x.std}
        if out in estimate.varies:
            estimated["signal"] = estimated_signal(estimate, out)
    if (norm := estimate.grad_norm(out)) is not None:
        estimated |= {"grad_rms": estimate.grad_rms(out), "grad_norm": norm, "decades": decades(norm, cotangent)}
    if node in parts.activations:
        estimated |= _estimated_slopes(node, estimate)
    gains = [
        n for v in node.inputs if v is not None and v in estimate.varies and (n := estimate.grad_norm(v)) is not None
    ]
    if gains and estimated.get("grad_norm"):
        estimated["gain"] = decades(math.sqrt(sum(g * g for g in gains)), estimated["grad_norm"])
    estimated |= flow.at(node, "estimated")
    found: dict[Evidence, dict[str, Any]] = {
        "proved": _proved(node, proof, cotangent),
        "estimated": estimated,
        "measured": {},
    }
    if measured is not None:
        row = dict(measured.values.get(name, {}))
        if "grad_norm" in row:
            row["decades"] = decades(row["grad_norm"], measured.cotangent)
            into = [
                measured.values[str(v.name)].get("grad_norm")
                for v in node.inputs
                if v is not None and str(v.name) in measured.values
            ]
            known = [g for g in into if g is not None]
            if known and row["grad_norm"] > 0:
                row["gain"] = decades(math.sqrt(sum(g * g for g in known)), row["grad_norm"])
        if node in parts.activations:
            row |= {**activation_figures(measured, str(node.name)), **_measured_input(node, measured)}
        row |= flow.at(node, "measured")
        found["measured"] = row
        if "grad_norm" in row and not math.isfinite(row["grad_norm"]):
            found["measured"]["grad_non_finite"] = True
    return found


def _estimated_slopes(node: ir.Node, estimate: Estimate) -> dict[str, Any]:
    z = estimate.moments.get(node.inputs[0]) if node.inputs[0] is not None else None
    if z is None or op(node) not in ELEMENTWISE:
        return {}
    spread, mean = z.std, float(np.mean(z.mean))
    z = _some_units(z)
    active = active_share(op(node), node, z)
    slope = spectrum(ELEMENTWISE[op(node)].functions(node)[1], z.mean, z.var, kinked=True).second
    return {
        "slope": math.sqrt(float(np.mean(slope))),
        "saturated": float(np.mean(saturated_share(op(node), node, z))),
        "flat": float(np.mean(1 - active)),
        "fully_saturated": float(np.mean(lost_share(op(node), node, z))),
        "dead": float(np.mean(active < _ALIVE)),
        "input_std": spread,
        "input_high": mean + _REACH * spread,
    }


def _measured_input(node: ir.Node, measured: Probe) -> dict[str, float]:
    """Spread of an activation's input, where a layer's output (which the probe measures) is read as it is."""
    row = measured.values.get(str(node.inputs[0].name), {}) if node.inputs[0] is not None else {}
    if "output_std" not in row or "output_mean" not in row:
        return {}
    return {"input_std": row["output_std"], "input_high": row["output_mean"] + _REACH * row["output_std"]}


def _some_units(z: Moments) -> Moments:
    """Up to 512 units, evenly taken: enough for a share."""
    mean, fixed, shared, local = (a.reshape(-1) for a in np.broadcast_arrays(z.mean, z.fixed, z.shared, z.local))
    step = max(1, -(-mean.size // 512))
    return Moments(mean[::step], fixed[::step], shared[::step], local[::step])


def _proved(node: ir.Node, proof: Proof, cotangent: float) -> dict[str, Any]:
    out = main_output(node)
    found: dict[str, Any] = {}
    if (box := proof.ranges.get(out)) is not None:
        found["output_range"] = [float(box.lo.min()), float(box.hi.max())]
        found |= {"output_low": float(box.lo.min()), "output_high": float(box.hi.max())}
    if (limit := proof.bounds.get(out)) is not None:
        found |= {"grad_norm": limit * cotangent, "decades": math.log10(max(limit, 1e-300))}
    z = proof.ranges.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if z is not None and op(node) in ("Relu", "ThresholdedRelu"):
        found["dead"] = float(np.mean(z.hi <= 0))
    if z is not None and op(node) in ACTIVATIONS:
        found |= {"input_low": float(z.lo.min()), "input_high": float(z.hi.max())}
    slopes = None if z is None or op(node) not in ELEMENTWISE else steepest(ELEMENTWISE[op(node)], node, z.lo, z.hi)
    if slopes is not None:
        found |= {"flat": float(np.mean(slopes == 0)), "fully_saturated": float(np.mean(slopes < LOST))}
    return found


_EXPECTED = (
    "output_mean", "output_std", "signal", "slope", "saturated", "dead", "grad_rms", "grad_norm", "decades", "gain",
)  # fmt: skip
_REPORTED: Mapping[Evidence, tuple[str, ...]] = {
    "proved": ("output_range", "grad_norm"),
    "estimated": _EXPECTED,
    "measured": _EXPECTED,
}


def layer_row(
    node: ir.Node,
    figures: Mapping[Evidence, Mapping[str, Any]],
    uses: Sequence[WeightUse],
    inputs: tuple[str, ...],
    flow: Flow,
) -> LayerRow:
    kept = {kind: {k: figures[kind][k] for k in names if k in figures[kind]} for kind, names in _REPORTED.items()}
    return LayerRow(
        name=str(node.name),
        op_type=node.op_type,
        module=module(node),
        source=source(node),
        shape=tuple(dims(main_output(node)) or ()),
        inputs=inputs,
        weights=tuple(dict.fromkeys(u.initializer for u in uses)),
        proved=kept["proved"],
        estimated=kept["estimated"],
        measured=kept["measured"],
    )


def layer_inputs(parts: Anatomy) -> dict[ir.Node, tuple[str, ...]]:
    """The layers whose outputs reach a layer without another layer between, in graph order."""
    layers = set(parts.layers)
    sources: dict[ir.Value, tuple[str, ...]] = {}
    found: dict[ir.Node, tuple[str, ...]] = {}
    for node in parts.graph:
        names = tuple(dict.fromkeys(s for v in node.inputs if v is not None for s in sources.get(v, ())))
        if node in layers:
            found[node] = names
            names = (str(node.name),)
        for output in node.outputs:
            sources[output] = names[:16]
    return found


def place(node: ir.Node, parts: Anatomy, estimate: Estimate, depth: float, index: int, folded: bool) -> dict[str, Fact]:
    shape = dims(main_output(node)) or ()
    return {
        "op_type": op(node),
        "module": module(node),
        "depth": depth,
        "layer_index": index,
        "is_gate": is_gate(node),
        "is_head": not leads_to(node, parts.weighted),
        "folded_norm": folded,
        "width": shape[unit_axis(main_output(node), estimate)] if shape else None,
    }
