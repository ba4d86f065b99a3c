"""BatchNormalization that an exporter folded into the layer before it: training still normalises there."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from gradlint.graph import constant_array, dims, is_float, mark_constant, op, took_batchnorm

# TensorFlow's names for what is normalised; x * scale and + shift where it is done by constants.
_NAMES = re.compile(r"/(batchnorm/(mul|add)_1|FusedBatchNorm(V\d)?)(:\d+)?$")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_EPSILON = 1e-5
_RESTORED = "restored"


def folded_batchnorms(graph: ir.Graph) -> list[ir.Node]:
    """Nodes into which the exporter folded a BatchNormalization."""
    return [n for n in graph.all_nodes() if took_batchnorm(n) or _is_named(n)]


def _is_named(node: ir.Node) -> bool:
    """By TensorFlow's names; LayerNormalization has them too, but what it scales with is computed."""
    if not any(_NAMES.search(str(o.name)) for o in node.outputs):
        return False
    scaled = op(node) in ("Mul", "Add") and any(constant_array(v) is not None for v in node.inputs)
    return scaled or op(node) in _PRODUCTS


def is_restored(node: ir.Node) -> bool:
    return bool(node.meta.get(_RESTORED))


def restore_batchnorms(graph: ir.Graph) -> None:
    """Where a fresh BatchNormalization was folded, one that normalises in train mode and changes nothing in eval mode.

    Fresh ones have scale 1 and leave a bias of zero, which trained ones don't. What is put back is in no file: it has
    no weights.
    """
    for node in folded_batchnorms(graph):
        value = _normalised(node)
        shape = None if value is None else dims(value)
        if value is None or shape is None or node.graph is not graph or value.is_graph_output() or len(shape) < 2:
            continue
        ones, zeros = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
        parts = {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones - np.float32(_EPSILON)}
        name = f"gradlint.batchnorm.{value.name}"
        inputs = [_constant(graph, f"{name}.{part}", array) for part, array in parts.items()]
        norm = ir.node("BatchNormalization", [value, *inputs], {"epsilon": _EPSILON}, name=name)
        output = norm.outputs[0]
        output.name, output.shape, output.type = f"{name}.out", value.shape, value.type
        for use in list(value.uses()):
            if use.node is not norm:
                use.node.replace_input_with(use.idx, output)
        (graph.insert_before if op(node) == "Mul" else graph.insert_after)(node, norm)
        node.meta[_RESTORED] = True


def _normalised(node: ir.Node) -> ir.Value | None:
    """The value that a fresh BatchNormalization took, its channels along axis 1; None for one that was trained."""
    constants = [a for v in node.inputs if (a := constant_array(v)) is not None and a.size]
    if not constants:
        return None
    if op(node) == "Mul":
        scale, value = constants[0], next((v for v in node.inputs if constant_array(v) is None), None)
        shifts = [a for u in node.outputs[0].uses() if op(u.node) == "Add" and _is_named(u.node)
                  for v in u.node.inputs if (a := constant_array(v)) is not None]  # fmt: skip
        fresh = scale.any() and np.ptp(scale) == 0 and not any(a.any() for a in shifts)
    else:
        value = node.outputs[0] if op(node) in _PRODUCTS else None
        fresh = constants[0].any() and not any(a.any() for a in constants[1:])
    maker = None if value is None else value.producer()
    channels_first = maker is not None and (op(maker) in ("Conv", "ConvTranspose") or len(dims(value) or ()) == 2)
    return value if fresh and channels_first and is_float(value) else None


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    mark_constant(value)
    graph.register_initializer(value)
    return value
