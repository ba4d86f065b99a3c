"""onnxruntime's normalisations that ONNX has no single operator for, taken apart into operators of opset 21."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gradlint.graph import attribute, op

# operator -> (its weights' inputs from scale on, the input added besides the residual)
_SKIP = {
    "com.microsoft:SkipLayerNormalization": ((2, 3), 4),
    "com.microsoft:SkipSimplifiedLayerNormalization": ((2,), 3),
}


def take_apart(graph: ir.Graph) -> None:
    """Rewrite, in place, normalisations fused with the residual sum before them and those without a mean.

    The last node of each keeps the fused node's name and output; the sum takes the place of its fourth output.
    """
    for node in list(graph):
        total = node.inputs[0] if node.inputs else None
        if op(node) in _SKIP:
            weights, bias = _SKIP[op(node)]
            total = _sum(graph, node, (1, bias))
        elif op(node) == "SimplifiedLayerNormalization":
            weights = (1,)
        else:
            continue
        assert total is not None
        scale, *shift = (node.inputs[k] if k < len(node.inputs) else None for k in weights)
        epsilon = float(attribute(node, "epsilon", 1e-5 if node.domain == "" else 1e-12))
        if shift:
            settings = {"axis": -1, "epsilon": epsilon}
            last = ir.node("LayerNormalization", [total, scale, *shift], settings, num_outputs=3)
        else:
            assert scale is not None
            last = ir.node("Mul", [_root_mean_square_normalised(graph, node, total, scale, epsilon), scale])
        graph.insert_before(node, last)
        last.name = node.name
        last.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, last.outputs, strict=False):
            new.name, old.name, new.shape = old.name, None, old.shape
            if old.type is not None:
                new.type = old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _emit(graph: ir.Graph, before: ir.Node, step: str, op_type: str, *inputs: ir.Value | None) -> ir.Value:
    node = ir.node(op_type, list(inputs), name=f"{before.name or before.outputs[0].name}/{step}")
    node.metadata_props.update(before.metadata_props)
    graph.insert_before(before, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, before: ir.Node, step: str, array: np.ndarray) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=f"{before.name or before.outputs[0].name}/{step}")
    graph.insert_before(before, node)
    return node.outputs[0]


def _sum(graph: ir.Graph, node: ir.Node, addends: tuple[int, ...]) -> ir.Value | None:
    """Input 0 plus the others; handed out under the name of the fourth output."""
    total = node.inputs[0]
    for k in addends:
        if k < len(node.inputs) and node.inputs[k] is not None:
            total = _emit(graph, node, f"sum{k}", "Add", total, node.inputs[k])
    if len(node.outputs) > 3 and total is not None:
        carried = node.outputs[3]
        if carried.name:
            total.name, carried.name = carried.name, None
        if carried.type is not None:
            total.type = carried.type
        ir.convenience.replace_all_uses_with(carried, total, replace_graph_outputs=True)
        node.resize_outputs(3)
    return total


def _root_mean_square_normalised(
    graph: ir.Graph, node: ir.Node, x: ir.Value, scale: ir.Value, epsilon: float
) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) over as many last axes as the scale has."""
    dtype = scale.dtype.numpy() if scale.dtype is not None else np.dtype(np.float32)
    rank = len(scale.shape) if scale.shape is not None else 1
    two, eps = (_constant(graph, node, s, np.array(v, dtype)) for s, v in (("two", 2.0), ("epsilon", epsilon)))
    axes = _constant(graph, node, "axes", np.arange(-rank, 0))
    mean = _emit(graph, node, "mean", "ReduceMean", _emit(graph, node, "square", "Pow", x, two), axes)
    root = _emit(graph, node, "root", "Sqrt", _emit(graph, node, "shifted", "Add", mean, eps))
    return _emit(graph, node, "normalised", "Div", x, root)
