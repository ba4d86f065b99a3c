"""All that the file tells beside gradients: structure, weights, recurrences, attention; gathered once per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.attention_facts import attention_subjects, attentions
from gradlint.estimate import Estimate, context
from gradlint.fact_table import Fact, Subject
from gradlint.figures import over_time
from gradlint.graph import attribute, constant_array, dims, main_output, op, source
from gradlint.ops.recurrent import step_norms
from gradlint.patterns import array_behind, compositions, normalisations
from gradlint.reach import Zeros, blocked, reaching_layers, structural_zeros
from gradlint.recurrent_facts import CELLS, Profiles, recurrent_subjects
from gradlint.results import Evidence
from gradlint.structure import KERNEL_OPS, Following, bypasses, next_activation, structure
from gradlint.transfer import Context
from gradlint.weight_facts import norm_facts, role, trained_share, weight_facts


@dataclass(frozen=True)
class StaticFacts:
    """layers: by layer and residual addition; weights: by (layer, input); subjects: residual additions (which are no
    layers), recurrences and attentions; model: facts of the whole; profiles: |dL/dh_t| of recurrent operators."""

    layers: Mapping[ir.Node, dict[str, Fact]]
    weights: Mapping[tuple[ir.Node, int], dict[str, Fact]]
    subjects: tuple[Subject, ...]
    model: Mapping[str, Fact]
    profiles: Profiles


def static_facts(
    parts: Anatomy,
    estimate: Estimate,
    mode: str,
    measured: Mapping[str, Mapping[str, float]],
    steps: Mapping[str, np.ndarray],
    assumed: frozenset[str] = frozenset(),
) -> StaticFacts:
    """Facts of layers, weights, recurrences and attentions.

    measured, steps: the probe's figures by value name, and |dL/dh_t| per step by operator name (empty without a probe);
    assumed: graph inputs whose length was assumed.
    """
    graph = parts.graph
    ctx = context(graph, batch=estimate.batch, mode=mode)
    profiles: Profiles = {"estimated": _profiles(ctx, graph, estimate), "measured": steps}
    around, found = bypasses(parts), attentions(graph)
    zeros = structural_zeros(parts, around, found, mode)
    layers = structure(parts, estimate, around)
    for node, facts in blocked(parts).items():
        layers[node] |= facts | {"is_structural_zero": node in zeros.layers}
        if op(node).endswith("Normalization"):
            layers[node] |= norm_facts(node)
    weights = _weights(parts, zeros)
    _describe_kernels(parts, layers, weights)
    norms: dict[Evidence, dict[str, float]] = {
        "estimated": {
            str(main_output(n).name): g for n in parts.weighted if (g := estimate.grad_norm(main_output(n))) is not None
        },
        "measured": {name: row["grad_norm"] for name, row in measured.items() if "grad_norm" in row},
    }
    subjects = [
        *_residual_subjects(parts, layers, measured),
        *recurrent_subjects(parts, ctx.array, profiles, norms, assumed),
        *attention_subjects(parts, found, around, estimate, measured, ctx.array),
    ]
    model: dict[str, Fact] = {
        "residual_additions": sum("residual_index" in facts for facts in layers.values()),
        "trained_share": trained_share(list(weights.values())),
        "precision": _precision(parts),
    }
    return StaticFacts(layers, weights, tuple(subjects), model, profiles)


def _profiles(ctx: Context, graph: ir.Graph, estimate: Estimate) -> dict[str, np.ndarray]:
    """The estimated |dL/dh_t| of every recurrent operator, and of the states of every Loop and Scan."""
    found = {str(node.name): over_time(*norms) for node, norms in estimate.profiles.items()}
    for node in graph:
        if op(node) in CELLS:
            xs = [None if v is None else estimate.moments.get(v) for v in node.inputs]
            norms = step_norms(ctx, node, xs, [estimate.gradients.get(o) for o in node.outputs])
            if norms is not None:
                found[str(node.name)] = over_time(*norms)
    return found


def _precision(parts: Anatomy) -> str | None:
    """The data type of most weights."""
    kinds = Counter(u.value.const_value.dtype.name.lower() for u in parts.uses if u.value.const_value is not None)
    kind = max(kinds, key=lambda k: kinds[k], default=None)
    return {"float": "float32", "double": "float64"}.get(str(kind), kind)


# -- weights -----------------------------------------------------------------------------------------------------------


def _weights(parts: Anatomy, zeros: Zeros) -> dict[tuple[ir.Node, int], dict[str, Fact]]:
    """Facts per use; the numbers of a weight that several layers share are read once per use that asks differently."""
    composed, norms = compositions(parts.graph), normalisations(parts.graph)
    reached = reaching_layers(parts)
    biases = _biases(parts)
    found = {}
    for use in parts.uses:
        follows = next_activation(main_output(use.layer), composed, norms)
        facts = weight_facts(
            use,
            role=role(use),
            bias=biases.get(use.layer),
            activation=follows.name,
            alpha=_negative_slope(follows),
            normalised=follows.normalised,
        )
        facts |= {
            "role": role(use),
            "next_activation": follows.name,
            "is_structural_zero": (use.layer, use.index) in zeros.weights,
            "reaches_output": use.layer in reached,
        }
        found[use.layer, use.index] = facts
    return found


def _biases(parts: Anatomy) -> dict[ir.Node, ir.Value]:
    """The bias of each layer with a kernel: its own input, or what an Add behind it adds to every unit."""
    found: dict[ir.Node, ir.Value] = {}
    for use in parts.uses:
        if role(use) != "bias":
            continue
        if op(use.layer) in KERNEL_OPS:
            found.setdefault(use.layer, use.value)
        for value in use.layer.inputs if op(use.layer) == "Add" else ():
            before = value.producer() if value is not None else None
            if before is not None and op(before) in KERNEL_OPS:
                found.setdefault(before, use.value)
    return found


def _negative_slope(follows: Following) -> float:
    """The slope of a LeakyRelu or PRelu where its input is negative."""
    if follows.node is None or follows.name not in ("LeakyRelu", "PRelu"):
        return 0.0
    if follows.name == "LeakyRelu":
        return float(attribute(follows.node, "alpha", 0.01))
    slopes = constant_array(array_behind(follows.node.inputs[1]))
    return 0.25 if slopes is None else float(np.sqrt(np.mean(np.square(slopes.astype(np.float64)))))


_KERNEL_FACTS = ("fan_in", "fan_out", "weight_rms", "init_ratio", "init_factor", "init_scheme")


def _describe_kernels(
    parts: Anatomy, layers: dict[ir.Node, dict[str, Fact]], weights: Mapping[tuple[ir.Node, int], dict[str, Fact]]
) -> None:
    """What of a kernel or a scale is said of its layer too; and the non-finite elements of all its weights."""
    lost: dict[ir.Node, tuple[int, str]] = {}
    for use in parts.uses:
        facts, layer = weights[use.layer, use.index], layers.get(use.layer)
        if layer is None:
            continue
        if facts["role"] in ("kernel", "embedding") and "main_weight" not in layer:
            layer |= {"main_weight": use.initializer} | {k: facts[k] for k in _KERNEL_FACTS if k in facts}
        if facts["role"] in ("gamma", "residual-scale") and op(use.layer) not in ("PRelu", "Div"):
            layer["scale_max"] = facts["weight_max"]
        count = int(facts.get("non_finite") or 0)
        before, name = lost.get(use.layer, (0, use.initializer))
        lost[use.layer] = (before + count, name if before or not count else use.initializer)
    for node, (count, name) in lost.items():
        if node in layers:
            layers[node] |= {"non_finite": count, "non_finite_in": name if count else None}


# -- residual additions ------------------------------------------------------------------------------------------------


def _residual_subjects(
    parts: Anatomy, layers: Mapping[ir.Node, dict[str, Fact]], measured: Mapping[str, Mapping[str, float]]
) -> list[Subject]:
    """Sums where a skip joins, as subjects of the rules about layers: with structural facts and the growth of
    variance."""
    order = {n: k for k, n in enumerate(parts.graph)}
    own = [n for n in layers if "residual_index" in layers[n] and n not in parts.layers]
    spreads = {
        n: row["output_std"] * row["output_std"]
        for n in own
        if "output_std" in (row := measured.get(str(n.outputs[0].name), {})) and np.isfinite(row["output_std"])
    }
    first, subjects = None, []
    for node in own:
        if layers[node]["residual_index"] == 1 and spreads.get(node, 0) > 0:
            first = spreads[node]
        shape = dims(node.outputs[0]) or ()
        facts: dict[str, Fact] = {"op_type": op(node), "width": shape[1] if len(shape) >= 4 else (shape or (None,))[-1]}
        facts |= layers[node]
        evidence: dict[str, Evidence] = {"residual_growth": "estimated"} if "residual_growth" in facts else {}
        if first is not None and node in spreads:
            facts["measured_residual_growth"] = facts["residual_growth"] = spreads[node] / first
            evidence["residual_growth"] = "measured"
        subjects.append(Subject("layer", str(node.name), None, order[node], facts, evidence, (), source(node)))
    return subjects
