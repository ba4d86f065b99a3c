"""What a layer is known by from one export to the next, whatever its nodes are numbered and its weights hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.graph import module, op
from gradlint.parameters import WeightUse


def identities(parts: Anatomy) -> Mapping[str, str]:
    """By node name: the parameter of a layer with weights; of any other node its operator, its module, and the last
    parameter (or input) on the way to it. Those alike in all that are numbered in graph order.
    """
    parameters = _parameters(parts.uses)
    last = {value: str(value.name) for value in parts.graph.inputs}
    seen: Counter[str] = Counter()
    found: dict[str, str] = {}
    for node in parts.graph.all_nodes():
        before = next((last[value] for value in node.inputs if value in last), "")
        own = parameters.get(node, "")
        known = own or f"{op(node)} in {module(node) or ''} after {before}"
        seen[known] += 1
        found[str(node.name)] = known if seen[known] == 1 else f"{known}#{seen[known]}"
        last |= dict.fromkeys(node.outputs, own or before)
    return found


def _parameters(uses: Iterable[WeightUse]) -> dict[ir.Node, str]:
    """The first parameter of each layer that the framework has a name for."""
    found: dict[ir.Node, str] = {}
    for use in uses:
        if use.parameter:
            found.setdefault(use.layer, use.parameter if isinstance(use.parameter, str) else ", ".join(use.parameter))
    return found
