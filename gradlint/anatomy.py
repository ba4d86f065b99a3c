"""What a canonical graph is made of, for everyone who asks about its layers."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gradlint.graph import ACTIVATIONS, is_float, op
from gradlint.parameters import WeightUse, weight_uses
from gradlint.subgraphs import subgraphs


@dataclass(frozen=True)
class Anatomy:
    """What the graph is made of: weight uses, layers in graph order, activations among them."""

    graph: ir.Graph
    uses: tuple[WeightUse, ...]
    layers: tuple[ir.Node, ...]
    activations: tuple[ir.Node, ...]
    weighted: frozenset[ir.Node]


def anatomy(graph: ir.Graph) -> Anatomy:
    """Layers are the main graph's nodes with weights, in their bodies too, and its activations on values that vary."""
    uses = tuple(u for u in weight_uses(graph))
    weighted = frozenset(u.layer for u in uses)
    holders = {n for n in graph if any(inner in weighted for body in subgraphs(n) for inner in body.all_nodes())}
    activations = tuple(n for n in graph if op(n) in ACTIVATIONS and is_float(n.inputs[0]) and n not in weighted)
    layers = tuple(n for n in graph if n in weighted or n in holders or n in activations)
    return Anatomy(graph, uses, layers, activations, weighted)
