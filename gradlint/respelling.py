"""What exporters spell so that what belongs together stands apart, spelled so that it stands together.

No analysis that follows one value at a time sees that two factors have to do with each other: `mask * a + (1 - mask) *
b` is a selection, `x * s + (beta - mean * s)` a normalisation.
"""

from __future__ import annotations

import onnx_ir as ir

from gradlint.graph import op


def respell(model: ir.Model) -> None:
    """Selections become Where, normalisations begin with what they subtract; in place."""
    for node in list(model.graph.all_nodes()):
        if op(node) == "Add" and node.graph is not None and not _as_selection(node):
            _as_normalisation(node)


def _replace(node: ir.Node, fresh: list[ir.Node]) -> None:
    """`fresh`, whose last node computes the same, takes the node's place."""
    graph, last = node.graph, fresh[-1]
    assert graph is not None
    for made in fresh:
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, fresh)
    old, new = node.outputs[0], last.outputs[0]
    new.shape, new.name, old.name = old.shape, old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


# -- selections --------------------------------------------------------------------------------------------------------


def _as_selection(node: ir.Node) -> bool:
    """Where(c, a, b) in the place of Cast(c) * a + Cast(Not(c)) * b, in either order."""
    parts = [_masked(v) for v in node.inputs]
    found = next(((c, a, b) for c, a in parts[0] for d, b in parts[1] if _negates(d, c)), None)
    swapped = next(((d, b, a) for c, a in parts[0] for d, b in parts[1] if _negates(c, d)), None)
    if (chosen := found or swapped) is None:
        return False
    _replace(node, [ir.node("Where", list(chosen), name=node.name)])
    return True


def _masked(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """(truth, what it is multiplied with), for either factor of a product that is a truth cast to a number."""
    node = None if value is None else value.producer()
    if node is None or op(node) != "Mul":
        return []
    found = []
    for k, factor in enumerate(node.inputs):
        cast, other = None if factor is None else factor.producer(), node.inputs[1 - k]
        if cast is not None and op(cast) == "Cast" and other is not None:
            truth = cast.inputs[0]
            if truth is not None and truth.dtype == ir.DataType.BOOL:
                found.append((truth, other))
    return found


def _negates(one: ir.Value, other: ir.Value) -> bool:
    node = one.producer()
    return node is not None and op(node) == "Not" and node.inputs[0] is other


# -- normalisations ----------------------------------------------------------------------------------------------------


def _as_normalisation(node: ir.Node) -> None:
    """(x - m) r gamma + beta in the place of x s + (beta - m s), where s = r gamma, or r alone; beta, gamma: stored."""
    for product, rest in (node.inputs, node.inputs[::-1]):
        shift = None if rest is None else _shift(rest)
        if product is None or shift is None:
            continue
        beta, mean, scale = shift
        x = next((a for a, s in _factors(product) if s is scale), None)
        if x is None or x is mean:
            continue
        apart = next(((r, g) for r, g in _factors(scale) if _stored(g) and not _stored(r)), (scale, None))
        nodes = [ir.node("Sub", [x, mean], name=f"{node.name}/centred")]
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], apart[0]], name=f"{node.name}/normalised"))
        if apart[1] is not None:
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], apart[1]], name=f"{node.name}/scaled"))
        _replace(node, [*nodes, ir.node("Add", [nodes[-1].outputs[0], beta], name=node.name)])
        return


def _shift(value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(beta, m, s) of beta - m s or beta + (-m) s, where beta is stored and the others are computed."""
    node = value.producer()
    if node is None or op(node) not in ("Add", "Sub"):
        return None
    pairs = [node.inputs] if op(node) == "Sub" else [node.inputs, node.inputs[::-1]]
    for beta, product in pairs:
        if beta is None or product is None or not _stored(beta):
            continue
        for mean, scale in _factors(product):
            negated = mean.producer()
            if op(node) == "Sub" and not _stored(mean) and not _stored(scale):
                return beta, mean, scale
            if op(node) == "Add" and negated is not None and op(negated) == "Neg" and negated.inputs[0] is not None:
                return beta, negated.inputs[0], scale
    return None


def _factors(value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The two factors of a product, in both orders."""
    node = value.producer()
    if node is None or op(node) != "Mul" or None in node.inputs:
        return []
    a, b = (v for v in node.inputs if v is not None)
    return [(a, b), (b, a)]


def _stored(value: ir.Value) -> bool:
    return value.const_value is not None
