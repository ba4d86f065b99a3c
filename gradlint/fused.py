"""onnxruntime's fusions that ONNX has no single operator for, taken apart into operators of opset 21."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.graph import FLOATS, attribute, op

# operator -> (its weights' inputs from scale on, the input added besides the residual)
_SKIP = {
    "com.microsoft:SkipLayerNormalization": ((2, 3), 4),
    "com.microsoft:SkipSimplifiedLayerNormalization": ((2,), 3),
}


class Parts:
    """What takes the place of a fused node: nodes before it that are named after it, and a last one for its outputs."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        floats = next((v.dtype for v in node.inputs if v is not None and v.dtype in FLOATS), None)
        self._dtype = floats.numpy() if floats is not None else np.dtype(np.float32)

    def emit(self, step: str, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._insert(step, ir.node(op_type, list(inputs), attributes)).outputs[0]

    def constant(self, step: str, array: np.ndarray) -> ir.Value:
        return self.emit(step, "Constant", value=ir.tensor(array))

    def like(self, step: str, number: float) -> ir.Value:
        """A number of the type the fused node computes in."""
        return self.constant(step, np.array(number, self._dtype))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        lengths = self.constant(f"{value.name or 'parts'}.sizes", np.array(sizes))
        node = ir.node("Split", [value, lengths], {"axis": axis}, num_outputs=len(sizes))
        return list(self._insert("parts", node).outputs)

    def finish(self, last: ir.Node) -> None:
        """The last node takes the fused one's place, name and outputs."""
        node = self.node
        self.graph.insert_before(node, last)
        last.name = node.name
        last.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, last.outputs, strict=False):
            new.name, old.name, new.shape = old.name, None, old.shape
            if old.type is not None:
                new.type = old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _insert(self, step: str, made: ir.Node) -> ir.Node:
        made.name = f"{self.node.name or self.node.outputs[0].name}/{step}"
        made.metadata_props.update(self.node.metadata_props)
        self.graph.insert_before(self.node, made)
        return made


def take_apart(graph: ir.Graph) -> None:
    """Rewrite, in place, normalisations fused with the residual sum before them, those without a mean, and activations
    fused with the Gemm before them.

    The last node of each keeps the fused node's name and output; the sum takes the place of its fourth output.
    """
    for node in list(graph):
        p = Parts(graph, node)
        if op(node) in _SKIP:
            weights, bias = _SKIP[op(node)]
            p.finish(_normalisation(p, _sum(p, (1, bias)), weights))
        elif op(node) == "SimplifiedLayerNormalization":
            p.finish(_normalisation(p, node.inputs[0], (1,)))
        elif op(node) == "com.microsoft:FusedGemm" and attribute(node, "activation", ""):
            p.finish(_activated(p))


def _normalisation(p: Parts, total: ir.Value | None, weights: Sequence[int]) -> ir.Node:
    assert total is not None
    node = p.node
    scale, *shift = (node.inputs[k] if k < len(node.inputs) else None for k in weights)
    epsilon = float(attribute(node, "epsilon", 1e-5 if node.domain == "" else 1e-12))
    if shift:
        settings = {"axis": -1, "epsilon": epsilon}
        return ir.node("LayerNormalization", [total, scale, *shift], settings, num_outputs=3)
    assert scale is not None
    return ir.node("Mul", [_root_mean_square_normalised(p, total, scale, epsilon), scale])


def _sum(p: Parts, addends: tuple[int, ...]) -> ir.Value | None:
    """Input 0 plus the others; handed out under the name of the fourth output."""
    node = p.node
    total = node.inputs[0]
    for k in addends:
        if k < len(node.inputs) and node.inputs[k] is not None:
            total = p.emit(f"sum{k}", "Add", total, node.inputs[k])
    if len(node.outputs) > 3 and total is not None:
        carried = node.outputs[3]
        if carried.name:
            total.name, carried.name = carried.name, None
        if carried.type is not None:
            total.type = carried.type
        ir.convenience.replace_all_uses_with(carried, total, replace_graph_outputs=True)
        node.resize_outputs(3)
    return total


def _root_mean_square_normalised(p: Parts, x: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) over as many last axes as the scale has."""
    rank = len(scale.shape) if scale.shape is not None else 1
    axes = p.constant("axes", np.arange(-rank, 0))
    mean = p.emit("mean", "ReduceMean", p.emit("square", "Pow", x, p.like("two", 2.0)), axes)
    root = p.emit("root", "Sqrt", p.emit("shifted", "Add", mean, p.like("epsilon", epsilon)))
    return p.emit("normalised", "Div", x, root)


def _activated(p: Parts) -> ir.Node:
    """activation(alpha A B + beta C)."""
    settings = {name: attribute(p.node, name) for name in p.node.attributes}
    slopes = {name: settings.pop(f"activation_{name}", None) for name in ("alpha", "beta", "gamma")}
    kind = str(settings.pop("activation"))
    product = p.emit("product", "Gemm", *p.node.inputs, **settings)
    return ir.node(kind, [product], {name: value for name, value in slopes.items() if value is not None})
