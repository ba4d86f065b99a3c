"""Values that do not depend on the model's inputs, computed when an analysis asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from gradlint.graph import FLOATS, attribute, op
from gradlint.subgraphs import captured, subgraphs

_KEEP = 1 << 20  # elements: larger results are computed again rather than kept
_KEPT = 256
_LARGEST = 1 << 28


def varying(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on the graph's inputs (or on a random draw), those inside bodies included."""
    varies = set(graph.inputs)
    _spread(graph, varies)
    return varies


def _spread(graph: ir.Graph, varies: set[ir.Value]) -> None:
    for node in graph:
        reads = any(v in varies for v in (*node.inputs, *captured(node))) or node.op_type.startswith("Random")
        if reads:
            varies.update(node.outputs)
        for body in subgraphs(node):
            varies.update(body.inputs if reads else ())
            _spread(body, varies)


def evaluator(
    graph: ir.Graph, varies: set[ir.Value], given: Mapping[ir.Value, np.ndarray] | None = None
) -> Callable[[ir.Value | None], np.ndarray | None]:
    """A function that gives the array of a constant value, or None where it varies or can't be computed.

    Half-precision floats come as float32. Results of moderate size are kept for the next question. given: arrays taken
    for values that do vary.
    """
    kept: OrderedDict[ir.Value, np.ndarray] = OrderedDict(given or {})

    def array(value: ir.Value | None) -> np.ndarray | None:
        if value is None or value in varies:
            return None
        if value.const_value is not None:
            stored = value.const_value.numpy()
            half = value.dtype in FLOATS and stored.dtype not in (np.float32, np.float64)
            return stored.astype(np.float32) if half else stored
        if value in kept:
            return kept[value]
        node = value.producer()
        if node is None or node.graph is None or subgraphs(node):
            return None
        inputs = [array(v) for v in node.inputs]
        if any(a is None and v is not None for a, v in zip(inputs, node.inputs, strict=True)):
            return None
        if sum(a.size for a in inputs if a is not None) > _LARGEST:
            return None
        results = _run(node, inputs, graph.opset_imports.get("", 21))
        if results is None:
            return None
        for output, result in zip(node.outputs, results, strict=False):
            if result.size <= _KEEP:
                kept[output] = result
                if len(kept) > _KEPT:
                    kept.popitem(last=False)
        return results[list(node.outputs).index(value)]

    return array


def _run(node: ir.Node, inputs: list[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """One operator on arrays: NumPy for the moves that weights pass through, ONNX's reference for the rest."""
    if not inputs:
        return None
    first = inputs[0]
    if op(node) == "Transpose" and first is not None:
        perm = node.attributes.get("perm")
        return [first.transpose(perm.as_ints() if perm is not None else None)]
    if op(node) == "Reshape" and first is not None and inputs[1] is not None and (inputs[1] != 0).all():
        return [first.reshape([int(n) for n in inputs[1]])]
    if op(node) == "GatherElements" and first is not None and inputs[1] is not None:  # the reference fails beyond 32
        return [np.take_along_axis(first, inputs[1].astype(np.int64), axis=attribute(node, "axis", 0))]
    if node.domain not in ("", "ai.onnx"):
        return None
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [n for n in proto.input if n]
    arrays = {n: a for n, a in zip(proto.input, inputs, strict=True) if n and a is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(arrays[n].dtype), None)
            for n in dict.fromkeys(names)
        ],
        [onnx.helper.make_empty_tensor_value_info(n) for n in proto.output if n],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        results = ReferenceEvaluator(model).run(None, arrays)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    if any(isinstance(r, list) for r in results):  # sequences
        return None
    return [np.asarray(r) for r in results]
