"""States of a Loop or Scan that no step changes: weights, mostly, which an exporter carries along."""

from __future__ import annotations

import onnx_ir as ir

from gradlint.graph import attribute
from gradlint.iterations import original


def read_invariants_outside(model: ir.Model) -> None:
    """A state that every step hands on as it came is no state: the body reads it from outside, as it does weights."""
    while True:  # what one loop no longer carries may be constant in the loop around it
        loops = [n for n in model.graph.all_nodes() if n.domain == "" and n.op_type in ("Loop", "Scan")]
        if sum(_read_outside(node) for node in loops) == 0:
            return


def _read_outside(node: ir.Node) -> bool:
    """Take the unchanged states out of a node, in place; True where there were any."""
    body, graph = node.attributes["body"].as_graph(), node.graph
    assert graph is not None
    leading = 2 if node.op_type == "Loop" else 0  # the number of steps and the condition
    states = len(node.inputs) - leading - (attribute(node, "num_scan_inputs", 0) if node.op_type == "Scan" else 0)
    if len(body.inputs) != len(node.inputs):
        return False  # Scan as opset 8 had it
    skipped = leading // 2  # outputs of the body that are no states: the condition
    constant = [
        k
        for k in range(states)
        if node.inputs[leading + k] is not None
        and original(body.outputs[skipped + k]) is body.inputs[leading + k]
        and not node.outputs[k].is_graph_output()
    ]
    if not constant:
        return False
    gone = set(constant)
    body.outputs[:] = [v for k, v in enumerate(body.outputs) if k - skipped not in gone]
    for k in constant:
        outside = node.inputs[leading + k]
        assert outside is not None
        ir.convenience.replace_all_uses_with(body.inputs[leading + k], outside, replace_graph_outputs=True)
        ir.convenience.replace_all_uses_with(node.outputs[k], outside)
    inputs = [v for k, v in enumerate(node.inputs) if k - leading not in gone]
    body.inputs[:] = [v for k, v in enumerate(body.inputs) if k - leading not in gone]
    kept = [o for k, o in enumerate(node.outputs) if k not in gone]
    attributes = [a for a in node.attributes.values() if a.name != "body"]
    node.attributes.pop("body")
    fresh = ir.Node(
        node.domain, node.op_type, inputs, [*attributes, ir.AttrGraph("body", body)], num_outputs=len(kept),
        name=node.name, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    graph.insert_before(node, fresh)
    for old, new in zip(kept, fresh.outputs, strict=True):
        new.type, new.shape, new.name, old.name = old.type, old.shape, old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
