"""Operators written out in terms of others, where gradlint has no rows of its own for them.

ONNX defines some operators (Attention, RotaryEmbedding ..) as functions: their standard body takes the node's place.
onnxruntime's fused matrix product and attention become what they fuse.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper, inliner

import gradlint.ops  # noqa: F401  (fills the tables)
from gradlint.exceptions import ModelError
from gradlint.fused_attention import take_attention_apart
from gradlint.graph import attribute, is_float, op
from gradlint.transfer import MOMENTS, VJP

_STANDARD = ("", "ai.onnx.preview")  # domains


def expand(model: ir.Model) -> bool:
    """Replace, in place, every such node; True if there was one. Raises ModelError for a node its body does not fit."""
    found = False
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if op(node) in ("com.microsoft:FusedMatMul", "com.microsoft:TransposeMatMul"):
                _write_out_product(graph, node)
            elif _is_function(node, version := model.opset_imports.get(node.domain, 0)):
                _write_out_body(graph, node, version)
            elif not take_attention_apart(graph, node):
                continue
            found = True
    return found


def _is_function(node: ir.Node, version: int) -> bool:
    """A float operator without rows that the standard defines by other operators."""
    if node.domain not in _STANDARD or op(node) in MOMENTS or op(node) in VJP:
        return False
    if not any(is_float(v) for v in node.inputs) or not any(is_float(v) for v in node.outputs):
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def _write_out_body(graph: ir.Graph, node: ir.Node, version: int) -> None:
    """The body of a function operator takes its place; inner values are named after the node."""
    body = _body(node, version)
    results = list(body.outputs)
    given = dict.fromkeys(v for v in node.inputs if v is not None)
    inside = dict(zip(body.inputs, given, strict=True))
    body.inputs.clear()
    body.outputs.clear()
    for k, inner in enumerate(list(body)):
        body.remove(inner)
        inner.name = f"{node.name}/{inner.op_type}_{k}"
        inner.metadata_props.update(node.metadata_props)
        for i, value in enumerate(inner.inputs):
            if value in inside:
                inner.replace_input_with(i, inside[value])
        for j, output in enumerate(inner.outputs):
            output.name = f"{inner.name}.{j}"
        graph.insert_before(node, inner)
    for old, new in zip([o for o in node.outputs if o.name], results, strict=True):
        new.type, new.shape = old.type, old.shape
        new.name, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _body(node: ir.Node, version: int) -> ir.Graph:
    """The function body as a graph whose inputs are the node's (omitted and repeated ones left out) and its outputs."""
    inputs = list(dict.fromkeys(v for v in node.inputs if v is not None))
    names = {v: f"in{k}" for k, v in enumerate(inputs)}
    proto = ir.to_proto(node)
    proto.input[:] = ["" if v is None else names[v] for v in node.inputs]
    proto.output[:] = [f"out{k}" if o.name else "" for k, o in enumerate(node.outputs)]
    function = _function(proto, [_type(v) for v in node.inputs], version)
    if not function.node:
        raise ModelError(f"{node.op_type} {node.name!r} can't be written out: the types of its inputs are not known")
    function.domain = proto.domain = "body"
    given = [helper.make_value_info(names[v], _type(v)) for v in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    imports = [o for o in function.opset_import if o.domain == ""] + [helper.make_opsetid("body", 1)]
    graph = helper.make_graph([proto], "body", given, results)
    model = helper.make_model(graph, opset_imports=imports, functions=[function])
    return ir.from_proto(inliner.inline_local_functions(model)).graph


def _function(proto: onnx.NodeProto, types: list[onnx.TypeProto], version: int) -> onnx.FunctionProto:
    """The newest body in the standard not beyond opset `version`; without nodes where it does not fit the types."""
    schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
    function = onnx.FunctionProto()
    if schema.has_function:  # type: ignore[attr-defined]
        opset = max(v for v in schema.function_opset_versions if v <= version)  # type: ignore[attr-defined]
        function.ParseFromString(schema.get_function_with_opset_version(opset))  # type: ignore[attr-defined]
        return function
    opset = max(v for v in schema.context_dependent_function_opset_versions if v <= version)  # type: ignore[attr-defined]
    function.ParseFromString(
        schema.get_context_dependent_function_with_opset_version(  # type: ignore[attr-defined]
            opset, proto.SerializeToString(), [t.SerializeToString() for t in types]
        )
    )
    return function


def _type(value: ir.Value | None) -> onnx.TypeProto:
    """A value's type and shape; of an omitted input nothing."""
    if value is None or value.dtype is None:
        return onnx.TypeProto()
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return helper.make_tensor_type_proto(int(value.dtype.value), shape)


def _write_out_product(graph: ir.Graph, node: ir.Node) -> None:
    """alpha * op(A) op(B): transpositions, MatMul, Mul; transBatch moves axis 0 behind the other batch axes."""
    sides = []
    for side, x in zip("AB", node.inputs, strict=True):
        assert x is not None
        order = list(range(len(x.shape) if x.shape is not None else 2))
        plain = list(order)
        if attribute(node, f"transBatch{side}", 0) and len(order) > 2:
            order = [*order[1:-1], order[0], order[-1]]
        if attribute(node, f"trans{side}", 0):
            order[-2:] = order[-1], order[-2]
        if order != plain:
            turned = ir.node("Transpose", [x], {"perm": order}, name=f"{node.name}/{side}")
            turned.outputs[0].type = x.type
            graph.insert_before(node, turned)
            x = turned.outputs[0]
        sides.append(x)
    last = ir.node("MatMul", sides, name=node.name)
    graph.insert_before(node, last)
    out, alpha = node.outputs[0], attribute(node, "alpha", 1.0)
    if alpha != 1.0:
        assert out.dtype is not None
        factor = ir.node("Constant", [], {"value": ir.tensor(alpha, dtype=out.dtype)}, name=f"{node.name}/alpha")
        last.outputs[0].type = factor.outputs[0].type = out.type
        scaled = ir.node("Mul", [last.outputs[0], factor.outputs[0]], name=f"{node.name}/scale")
        graph.insert_before(node, [factor, scaled])
        last = scaled
    new = last.outputs[0]
    new.type, new.shape, new.name, out.name = out.type, out.shape, out.name, None
    last.metadata_props.update(node.metadata_props)
    ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
