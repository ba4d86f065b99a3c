"""Questions about a canonical graph: attributes, weights, layers, names the framework gave, source lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
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

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
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
_SETTINGS: Mapping[str, frozenset[int]] = {
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
    kind = value.metadata_props.get(_KIND)
    if kind is not None:
        return kind.endswith("PARAMETER")
    uses = list(value.uses())
    if _FOLDED in value.metadata_props:
        made_of, there = folded_parameters(value), value.graph.initializers if value.graph is not None else {}
        alone = len(made_of) == 1 or not any(name in there for name in made_of)
        return bool(made_of) and alone and not _is_mask(tensor)
    if tensor.size < 2 or not uses or all(u.idx in _SETTINGS.get(op(u.node), ()) for u in uses):
        return False
    steps = ("Sub", "Div", "Mul", "Add")
    if tensor.size <= 4 and all(op(u.node) in steps and _reads_input(u.node, value.graph) for u in uses):
        return False  # mean and standard deviation of the input's channels
    return not (all(op(u.node) in ("Add", "Mul", "Sub") for u in uses) and _is_mask(tensor))


# What modules call their buffers, as the last part of a name: indices, masks, statistics, tables that were computed.
_BUFFER = re.compile(
    r"(^|_)(idxs?|ids?|index|indices|mask|masked_bias|freqs?|sin|cos|running_mean|running_var|window|filters?|grid|"
    r"coords\w*|anchors|positions?)(_cached)?$|^_?(u|v|pe|fb|mean|var|std|pixel_mean|pixel_std)$"
)
# Parameters of the model itself have no module before their name; those of operations (`mul_1`, `t`) stand beside them.
_TOP_LEVEL = re.compile(r"[A-Z]\w*|(?!t$)[a-z]\d?|[a-z]\w*(token|pos_embed|weight|bias|gamma|beta|scale)s?(_\d+)?")


def folded_parameters(value: ir.Value) -> list[str]:
    """The parameters from which torch's exporter computed this constant. Of what it computed from it keeps the names,
    and says no more which of them are parameters: those that the node mentions as such, or else those that aren't
    called like a buffer."""
    made_of = _literal(value.metadata_props.get(_FOLDED, "[]"))
    nodes = " ".join(fx_node(u.node) or "" for u in value.uses())
    if mentioned := [n for n in made_of if re.search(rf"%{_mangled(n)}\b", nodes)]:
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
    if any(v.metadata_props.get(_KIND, "").endswith("PARAMETER") for v in values):
        for value in values:
            if _KIND not in value.metadata_props and _FOLDED not in value.metadata_props and value not in folded:
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
    value.metadata_props[_KIND] = "CONSTANT"


def mark_parameter(value: ir.Value) -> None:
    """Say that an initializer is a parameter."""
    value.metadata_props[_KIND] = "PARAMETER"


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


@dataclass(frozen=True)
class WeightUse:
    """One weight as one layer uses it (`index`: the layer's input, seen through moves such as Transpose)."""

    value: ir.Value
    layer: ir.Node
    index: int
    parameter: str | list[str] | None

    @property
    def initializer(self) -> str:
        """The name in the file."""
        return str(self.value.meta.get("initializer", self.value.name))


def weight_uses(graph: ir.Graph) -> list[WeightUse]:
    """Every trainable initializer with every layer that uses it, in the order of the layers."""
    uses: list[tuple[int, int, WeightUse]] = []
    position = {node: k for k, node in enumerate(graph.all_nodes())}
    for owner in (graph, *graph.subgraphs()):
        for value in owner.initializers.values():
            if not trainable(value):
                continue
            for node, index in _consumers(value):
                if node not in position:  # the branch of an If that folding removed
                    continue
                uses.append((position[node], index, WeightUse(value, node, index, _known_as(value, node, index))))
    return [use for _, _, use in sorted(uses, key=lambda row: (row[0], row[1], str(row[2].value.name)))]


def _known_as(value: ir.Value, node: ir.Node, index: int) -> str | list[str] | None:
    """The parameter's name; where modules share it, also what the one that uses it here calls it (torch keeps one name
    of a tied embedding, or of a module that is registered under several)."""
    named: str | list[str] | None = value.meta.get("parameter")
    if named is not None:
        return named
    named = parameter_name(node, index, value)
    if not isinstance(named, str) or (owner := module(node)) is None or not fx_node(node):
        return named
    kept, _, leaf = named.rpartition(".")
    users = {u.node for u in value.uses()} - {node}
    if (op(node) == "Gather" and users) or (kept != owner and kept in {module(user) for user in users}):
        return list(dict.fromkeys([named, f"{owner}.{leaf}"]))
    return named


def _consumers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that compute with `value`, through operators that only move elements."""
    pending, seen = [value], set()
    while pending:
        for use in pending.pop().uses():
            node = use.node
            if (op(node) in MOVES and use.idx == 0) or op(node) == "Concat":
                if node not in seen:
                    seen.add(node)
                    pending.extend(node.outputs)
            elif use.idx not in _SETTINGS.get(op(node), ()):
                yield node, use.idx


def split_merged(model: ir.Model) -> None:
    """Undo the exporter's merging of equal initializers: one initializer per parameter (tensors stay shared).

    torch's exporter keeps one tensor where two parameters hold the same numbers (all norms at initialisation); the
    gradient belongs to the parameter, so each gets its own value, which remembers the name in the file.
    """
    for value in list(model.graph.initializers.values()):
        if not trainable(value):
            continue
        by_parameter: dict[str, tuple[str | list[str] | None, list[Any]]] = {}
        for use in value.uses():
            named = parameter_name(use.node, use.idx, value)
            by_parameter.setdefault(str(named), (named, []))[1].append(use)
        told = _FOLDED in value.metadata_props or all("p_" in (fx_node(u.node) or "") for u in value.uses())
        if len(by_parameter) < 2 or not told:
            continue
        for key, (named, uses) in by_parameter.items():
            twin = ir.Value(
                name=f"{value.name}@{key}", const_value=value.const_value, shape=value.shape, type=value.type,
                metadata_props=dict(value.metadata_props),
            )  # fmt: skip
            twin.meta["initializer"], twin.meta["parameter"] = value.meta.get("initializer", value.name), named
            model.graph.register_initializer(twin)
            for use in uses:
                use.node.replace_input_with(use.idx, twin)
        del model.graph.initializers[str(value.name)]


# -- what the framework said -------------------------------------------------------------------------------------------


def fx_node(node: ir.Node) -> str | None:
    return node.metadata_props.get("pkg.torch.onnx.fx_node")


def _scopes(node: ir.Node) -> list[str]:
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
    scopes = _scopes(node)
    if len(scopes) > 1:
        return scopes[-2] or None
    name = node.name or ""
    path = [p for p in name.split("/") if p and not _CALL.fullmatch(p)]
    if name.startswith("/") and len(path) > 1:
        inner = [*path[1:-1], ""]  # TorchScript repeats a container's path: /layer1/layer1.0/conv/Conv
        return ".".join(p for p, after in zip(path[:-1], inner, strict=True) if not after.startswith(f"{p}."))
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in (value.name or ""):
            return str(value.name).rpartition(".")[0]
    return ".".join(path[:-1]) or None


def _mangled(name: str) -> str:
    return "p_" + re.sub(r"[^0-9a-zA-Z]", "_", name).lower()


def parameter_name(node: ir.Node, index: int, value: ir.Value) -> str | list[str] | None:
    """The framework's name for the weight that `node` reads at `index`; a list where several are packed into one."""
    name = str(value.name)
    mentioned = re.findall(r"%(p_\w+)", fx_node(node) or "")
    if took_batchnorm(node):  # what is added behind a kernel without a bias is the BatchNormalization's own
        made_up = any(v is not None and name == f"{v.name}_bias" for v in node.inputs)
        return _dotted(mentioned[-1], node) if made_up and mentioned else name
    made_of = [_in_layer(name, node) for name in folded_parameters(value)]
    if own := [n for n in made_of if _mangled(n) in mentioned]:
        return _one_or_all(own)
    if not mentioned and not made_of:
        return name if "::" not in name else _torchscript_name(node, index)
    if _mangled(name) in mentioned or (value.metadata_props.get(_KIND) and len(list(value.uses())) == 1):
        return name
    parts = {node, *(n for n in (*node.predecessors(), *node.successors()) if fx_node(n) == fx_node(node))}
    named = {_mangled(str(v.name)) for n in parts for v in n.inputs if v is not None and v.is_initializer()}
    rest = [p for p in dict.fromkeys(mentioned) if p not in named]
    if not rest:
        return _one_or_all(made_of or [name])
    if node.op_type in ("LSTM", "GRU", "RNN"):
        part = {1: "weight_ih", 2: "weight_hh", 3: "bias"}.get(index, "")
        return _one_or_all([_dotted(p, node) for p in rest if part in p] or [name])
    if len(rest) == 1 or node.op_type in ("MatMul", "Conv", "Gather", "ConvTranspose"):
        return _dotted(rest[0], node)
    if node.op_type == "Add":
        return _dotted(rest[-1], node)
    weights = [
        i
        for i, v in enumerate(node.inputs)
        if v is not None and v.is_initializer() and _mangled(str(v.name)) not in mentioned
    ]
    rank = weights.index(index) if index in weights else 0
    return _dotted(rest[min(rank, len(rest) - 1)], node)


def _in_layer(name: str, node: ir.Node) -> str:
    """Of a constant that several layers share, since their parameters hold the same numbers: that of the node's own."""
    owner, _, leaf = name.rpartition(".")
    scopes = _scopes(node)
    if owner in scopes:
        return name
    twin = next((s for s in reversed(scopes) if s and numberless(s) == numberless(owner)), owner)
    return f"{twin}.{leaf}" if twin else leaf


def numberless(name: str) -> str:
    """Alike for the same parameter of all layers."""
    return re.sub(r"\d+", "0", name)


def _dotted(mangled: str, node: ir.Node) -> str:
    """`p_blocks_0_attn_qkv_weight` -> `blocks.0.attn.qkv.weight`: the module path spells the dots."""
    beside = [str(v.name) for v in node.inputs if v is not None and v.is_initializer()]
    for name in beside:  # the same parameter of another layer, of which the exporter has kept one
        if numbers := re.fullmatch(re.sub(r"\d+", r"(\\d+)", _mangled(name)), mangled):
            found = iter(numbers.groups())
            return re.sub(r"\d+", lambda _: next(found), name)  # noqa: B023
    owners = {name.rpartition(".")[0] for name in beside} | set(_scopes(node))
    for scope in sorted(owners, key=len, reverse=True):
        prefix = _mangled(scope) + "_" if scope else "p_"
        if mangled.startswith(prefix):
            leaf = mangled[len(prefix) :]
            return f"{scope}.{leaf}" if scope else leaf
    return mangled.removeprefix("p_")


def _torchscript_name(node: ir.Node, index: int) -> str | list[str] | None:
    """TorchScript calls a weight that it transposed, folded or packed `onnx::MatMul_42`; the bias beside it has kept
    its name, and else the node's path tells whose it is."""
    adds = [n for n in node.successors() if op(n) == "Add"]
    names = [str(v.name) for n in (node, *adds) for v in n.inputs if v is not None and v.const_value is not None]
    if op(node) in ("MatMul", "Gemm") and (bias := next((n for n in names if n.endswith("bias")), None)):
        return f"{bias.removesuffix('bias')}weight"
    owner = module(node)
    if owner is None:
        return None
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return _packed(node, index, owner)
    return f"{owner}.{'bias' if node.op_type == 'Add' or index == 2 else 'weight'}"


def _packed(node: ir.Node, index: int, owner: str) -> str | list[str] | None:
    """torch's names of what a recurrent layer packs; TorchScript numbers the layers of a stack: LSTM, LSTM_1."""
    layer = re.search(r"_(\d+)$", node.name or "")
    parts = {1: ["weight_ih"], 2: ["weight_hh"], 3: ["bias_ih", "bias_hh"]}.get(index, [])
    ways = ["", "_reverse"] if attribute(node, "direction") == "bidirectional" else [""]
    names = [f"{owner}.{part}_l{layer[1] if layer else 0}{way}" for way in ways for part in parts]
    return _one_or_all(names) if names else None


def _one_or_all(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


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
