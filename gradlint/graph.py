"""Questions about a canonical graph: attributes, weights, layers, names the framework gave, source lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir

from gradlint.results import Source

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

ACTIVATIONS = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Softplus",
        "Softsign", "ThresholdedRelu", "Gelu", "Mish", "Swish", "Clip", "Erf", "Exp", "Shrink", "Softmax", "LogSoftmax",
        "com.microsoft:Gelu", "com.microsoft:FastGelu", "com.microsoft:BiasGelu", "com.microsoft:QuickGelu",
    }
)  # fmt: skip

# Operators that only move, select or retype elements: a weight seen through them is still that weight.
MOVES = frozenset(
    {
        "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat", "Cast", "Identity", "Expand",
        "Split", "Dropout", "CastLike", "DequantizeLinear",
    }
)  # fmt: skip

# Those of them that keep every element.
REORDERS = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})

# Operators that multiply by a kernel, once.
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})

KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_SQUASHING = frozenset({"Sigmoid", "HardSigmoid", "Tanh", "Softmax", "LogSoftmax", "Erf", "Clip"})


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The plain value of a node's attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def op(node: ir.Node) -> str:
    """The operator's name in the tables: `Relu`, or `com.microsoft:Gelu` outside ONNX's own domain."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """The value's static shape, or None where a dimension (or the rank) is not known."""
    if value is None or value.shape is None:
        return None
    sizes = tuple(d for d in value.shape.dims if isinstance(d, int))
    return sizes if len(sizes) == len(value.shape) else None


def batch_size(graph: ir.Graph) -> int:
    """Examples per run: the length of the axis that examples lie along in the first float input, or the first at all.

    Axis 1 of (T, B, I): where a recurrent operator reads an input so, or the outputs have B rows and not T.
    """
    shapes = [(not is_float(v), shape) for v in graph.inputs if (shape := dims(v))]
    if not shapes:
        return 1
    _, shape = min(shapes, key=lambda known: known[0])
    recurrent = any(op(u.node) in ("LSTM", "GRU", "RNN") and u.idx == 0 for v in graph.inputs for u in v.uses())
    rows = {sizes[0] for o in graph.outputs if is_float(o) and (sizes := dims(o))}
    steps_first = len(shape) == 3 and (recurrent or (shape[0] not in rows and shape[1] in rows))
    return max(1, shape[1] if steps_first else shape[0])


def main_output(node: ir.Node) -> ir.Value:
    """What a layer gives: its first output that anything reads (of a recurrent operator it may be the last state
    alone), with the bias that the exporter made an addition of its own."""
    out = next((o for o in node.outputs if o.uses() or o.is_graph_output()), node.outputs[0])
    if node.op_type not in PRODUCTS or len(out.uses()) != 1 or out.is_graph_output():
        return out
    (reader,) = (use.node for use in out.uses())
    biased = op(reader) == "Add" and any(v is not out and _is_bias(v) for v in reader.inputs)
    return reader.outputs[0] if biased else out


def _is_bias(value: ir.Value | None) -> bool:
    """A stored number per unit: one axis at most is longer than 1."""
    shape = dims(value)
    return value is not None and value.const_value is not None and sum(n > 1 for n in shape or (2, 2)) <= 1


def is_float(value: ir.Value | None) -> bool:
    return holds_floats(value) and not isinstance(value.type, (ir.SequenceType, ir.OptionalType))


def holds_floats(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Is it a float tensor, or a sequence of them?"""
    return value is not None and value.dtype in FLOATS


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The stored array of an initializer, else None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


# -- weights -----------------------------------------------------------------------------------------------------------

# Inputs of an operator that hold settings or statistics, never something training moves.
SETTINGS: Mapping[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),
    "Clip": frozenset({1, 2}),
    "Pow": frozenset({1}),
    "Resize": frozenset({1, 2}),
    "Pad": frozenset({2}),
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "OneHot": frozenset({2}),
    "Dropout": frozenset({1}),
    "RNN": frozenset({4, 5}),
    "GRU": frozenset({4, 5}),
    "LSTM": frozenset({4, 5, 6}),
    "Where": frozenset({0, 1, 2}),
    "Equal": frozenset({0, 1}),
    "Greater": frozenset({0, 1}),
    "Less": frozenset({0, 1}),
    "GreaterOrEqual": frozenset({0, 1}),
    "LessOrEqual": frozenset({0, 1}),
    "Max": frozenset({0, 1}),
    "Min": frozenset({0, 1}),
}


def trainable(value: ir.Value) -> bool:
    """Would training change this initializer?

    The exporter's own word (torch: PARAMETER or BUFFER) decides where there is one. Else: floats, two elements or more,
    not computed by the exporter, used otherwise than as a statistic or a setting, and not a mask (only 0, 1 or huge
    values).
    """
    tensor = value.const_value
    if tensor is None or tensor.dtype not in FLOATS:
        return False
    kind = value.metadata_props.get(KIND)
    if kind is not None:
        return kind.endswith("PARAMETER")
    uses = list(value.uses())
    if was_folded(value):
        made_of, there = folded_parameters(value), value.graph.initializers if value.graph is not None else {}
        alone = len(made_of) == 1 or not any(name in there for name in made_of)
        added = all(op(u.node) in ("Add", "Mul", "Sub", "Where") for u in uses)
        return bool(made_of) and alone and not (added and _is_mask(tensor))
    if tensor.size < 2 or not uses or all(u.idx in SETTINGS.get(op(u.node), ()) for u in uses):
        return False
    steps = ("Sub", "Div", "Mul", "Add")
    if tensor.size <= 4 and all(op(u.node) in steps and _reads_input(u.node, value.graph) for u in uses):
        return False  # mean and standard deviation of the input's channels
    return not (all(op(u.node) in ("Add", "Mul", "Sub") for u in uses) and _is_mask(tensor))


# What modules call their buffers, as the last part of a name: indices, masks, statistics, tables that were computed.
_BUFFER = re.compile(
    r"(^|_)(idxs?|ids?|index|indices|masks?|masked_bias|freqs?|sin|cos|running_mean|running_var|window|filters?|grid|"
    r"coords\w*|anchors|positions?)(_cached)?$|^_?(u|v|pe|fb|mean|var|std|pixel_mean|pixel_std)$"
)
# Parameters of the model itself have no module before their name; those of operations (`mul_1`, `t`) stand beside them.
_TOP_LEVEL = re.compile(r"[A-Z]\w*|(?!t$)[a-z]\d?|[a-z]\w*(token|pos_embed|weight|bias|gamma|beta|scale)s?(_\d+)?")


def folded_parameters(value: ir.Value) -> list[str]:
    """The parameters from which torch's exporter computed this constant. Of what it computed from it keeps the names,
    and says no more which of them are parameters: those that the node mentions as such, or else those that aren't
    called like a buffer."""
    made_of = _literal(value.metadata_props.get(_FOLDED, "[]"))
    told = {name for u in value.uses() for name in re.findall(r"%(p_\w+)", fx_node(u.node) or "")}
    if mentioned := [n for n in made_of if mangled(n) in told]:
        return mentioned
    stored = [name for name in made_of if "." in name or _TOP_LEVEL.fullmatch(name)]
    return [name for name in stored if not _BUFFER.search(name.rpartition(".")[2])]


_LOOKUPS = re.compile(r"(index|embedding|gather|index_select|expand|repeat|tile|repeat_interleave)(_\d+)?")


def was_looked_up(value: ir.Value) -> bool:
    """Did torch's exporter fold an operation that reads rows of a parameter, or repeats it, into this constant?"""
    steps = (str(value.name), *_literal(value.metadata_props.get(_FOLDED, "[]")))
    return any(_LOOKUPS.fullmatch(step) for step in steps)


def mark_constants(model: ir.Model) -> None:
    """Where the exporter says what is a parameter, an initializer of which it says nothing is none, but for what a
    BatchNormalization was folded into: there the exporter's word is lost."""
    graphs = (model.graph, *model.graph.subgraphs())
    folded = {v for n in model.graph.all_nodes() if took_batchnorm(n) for v in n.inputs}
    values = [v for g in graphs for v in g.initializers.values()]
    if any(v.metadata_props.get(KIND, "").endswith("PARAMETER") for v in values):
        for value in values:
            if KIND not in value.metadata_props and not was_folded(value) and value not in folded:
                mark_constant(value)


def padding_row(node: ir.Node) -> int | None:
    """The row of an embedding that torch doesn't train (`padding_idx`)."""
    found = re.search(r"aten\.embedding\.default\]\(args = \(%\w+, %\w+, (\d{1,9})[,)]", fx_node(node) or "")
    return int(found[1]) if found else None


def took_batchnorm(node: ir.Node) -> bool:
    """Did torch's exporter fold a BatchNormalization into this node?"""
    return "FuseBatchNorm" in node.metadata_props.get("pkg.onnxscript.rewriter.rule_name", "")


def mark_constant(value: ir.Value) -> None:
    """Say that an initializer is no parameter."""
    value.metadata_props[KIND] = "CONSTANT"


def mark_parameter(value: ir.Value) -> None:
    """Say that an initializer is a parameter."""
    value.metadata_props[KIND] = "PARAMETER"


def _reads_input(node: ir.Node, graph: ir.Graph | None) -> bool:
    """Does it read an input of the graph (and not one of a body in it)?"""
    return any(v is not None and v.is_graph_input() and v.graph is graph for v in node.inputs)


def _is_mask(tensor: ir.TensorProtocol) -> bool:
    """Zeros and ones mixed, or with entries beyond 1e4: attention and padding masks (not a fresh bias or gamma)."""
    if len(tensor.shape) < 2 or tensor.size > 1 << 22:
        return False
    array = tensor.numpy().astype(np.float32)
    values = np.unique(array)
    return 1 < len(values) <= 2 and bool(np.all((values == 0) | (values == 1) | (np.abs(values) >= 1e4)))


# -- what the framework said -------------------------------------------------------------------------------------------


def fx_node(node: ir.Node) -> str | None:
    return node.metadata_props.get("pkg.torch.onnx.fx_node")


def scopes(node: ir.Node) -> list[str]:
    """The modules around a node, outermost first, as torch recorded them; the last is the operation."""
    return _literal(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))


def _literal(text: str) -> list[str]:
    """A Python list of strings as torch writes it; anything else is an empty list."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [s for s in found if isinstance(s, str)] if isinstance(found, list) else []


_CALL = re.compile(r"(Stateful)?PartitionedCall(_\d+)?")  # TensorFlow's own wrapping of a whole model


def module(node: ir.Node) -> str | None:
    """The module the layer belongs to, dotted: by torch's metadata, a TorchScript name, its weights' names, or the path
    that tf2onnx leaves in a Keras layer's name (`model/dense/MatMul`).
    """
    around = scopes(node)
    if len(around) > 1:
        return around[-2] or None
    name = node.name or ""
    path = [p for p in name.split("/") if p and not _CALL.fullmatch(p)]
    if name.startswith("/") and len(path) > 1:
        inner = [*path[1:-1], ""]  # TorchScript repeats a container's path: /layer1/layer1.0/conv/Conv
        return ".".join(p for p, after in zip(path[:-1], inner, strict=True) if not after.startswith(f"{p}."))
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in (value.name or ""):
            return str(value.name).rpartition(".")[0]
    return ".".join(path[:-1]) or None


def mangled(name: str) -> str:
    """What torch calls a parameter in the nodes that it traced."""
    return "p_" + re.sub(r"[^0-9a-zA-Z]", "_", name).lower()


def was_folded(value: ir.Value) -> bool:
    """Did torch's exporter compute this constant?"""
    return _FOLDED in value.metadata_props


def numberless(name: str) -> str:
    """Alike for the same parameter of all layers."""
    return re.sub(r"\d+", "0", name)


_FRAME = re.compile(r'File "([^"]+)", line (\d{1,9})\b')


def frames(node: ir.Node) -> list[tuple[str, int]]:
    """Files and lines of the stack that torch recorded when it traced the node, outermost first."""
    stack = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
    return [(path, int(line)) for path, line in _FRAME.findall(stack)]


def place(node: ir.Node, where: Source) -> None:
    """Remember which line of the user's the node was written on."""
    node.meta["source"] = where


def source(node: ir.Node) -> Source | None:
    """The user's own line, where `source_tree` found it."""
    found = node.meta.get("source")
    return found if isinstance(found, Source) else None


# -- roles -------------------------------------------------------------------------------------------------------------


def is_gate(node: ir.Node) -> bool:
    """Does this squashing activation only scale another signal (SiLU, GELU, squeeze-excite, GLU, gated cells)?"""
    if op(node) not in _SQUASHING or len(node.outputs) != 1:
        return False
    uses = [u.node for u in _through_constants(node.outputs[0])]
    if not uses or not all(op(n) == "Mul" for n in uses):
        return False
    if op(node) != "Tanh":
        return True
    return not any(
        v is not None and (p := v.producer()) is not None and op(p) in ("Sigmoid", "HardSigmoid")
        for n in uses
        for v in n.inputs
    )


def _through_constants(value: ir.Value) -> Iterator[Any]:
    """Uses of a value, looking through moves and arithmetic with constants."""
    for use in value.uses():
        node = use.node
        others = [v for i, v in enumerate(node.inputs) if i != use.idx and v is not None]
        constants = all(v.const_value is not None and v.const_value.size == 1 for v in others)
        if (op(node) in MOVES and use.idx == 0) or (op(node) in ("Add", "Sub", "Mul", "Div") and constants and others):
            yield from _through_constants(node.outputs[0])
        else:
            yield use


def is_head(node: ir.Node, layers: Iterable[ir.Node]) -> bool:
    """Is this squashing activation the model's last word: nothing with weights comes after it?"""
    if op(node) not in _SQUASHING:
        return False
    return not leads_to(node, set(layers))


def leads_to(node: ir.Node, targets: Set[ir.Node]) -> bool:
    """Does any way forward from the node reach one of these?"""
    pending, seen = [node], {node}
    while pending:
        for successor in pending.pop().successors():
            if successor in targets:
                return True
            if successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return False
