"""Weights by the layers that use them, under the names that the framework gave them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from gradlint.graph import (
    KIND,
    MOVES,
    SETTINGS,
    attribute,
    folded_parameters,
    fx_node,
    mangled,
    module,
    numberless,
    op,
    scopes,
    took_batchnorm,
    trainable,
    was_folded,
)


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
            elif use.idx not in SETTINGS.get(op(node), ()):
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
        told = was_folded(value) or all("p_" in (fx_node(u.node) or "") for u in value.uses())
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


# -- names -------------------------------------------------------------------------------------------------------------


def parameter_name(node: ir.Node, index: int, value: ir.Value) -> str | list[str] | None:
    """The framework's name for the weight that `node` reads at `index`; a list where several are packed into one."""
    name = str(value.name)
    mentioned = re.findall(r"%(p_\w+)", fx_node(node) or "")
    if took_batchnorm(node):  # what is added behind a kernel without a bias is the BatchNormalization's own
        made_up = any(v is not None and name == f"{v.name}_bias" for v in node.inputs)
        return _dotted(mentioned[-1], node) if made_up and mentioned else name
    made_of = [_in_layer(name, node) for name in folded_parameters(value)]
    if own := [n for n in made_of if mangled(n) in mentioned]:
        return _one_or_all(own)
    if not mentioned and not made_of:
        return name if "::" not in name else _torchscript_name(node, index)
    if mangled(name) in mentioned or (value.metadata_props.get(KIND) and len(list(value.uses())) == 1):
        return name
    parts = {node, *(n for n in (*node.predecessors(), *node.successors()) if fx_node(n) == fx_node(node))}
    named = {mangled(str(v.name)) for n in parts for v in n.inputs if v is not None and v.is_initializer()}
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
        if v is not None and v.is_initializer() and mangled(str(v.name)) not in mentioned
    ]
    rank = weights.index(index) if index in weights else 0
    return _dotted(rest[min(rank, len(rest) - 1)], node)


def _in_layer(name: str, node: ir.Node) -> str:
    """Of a constant that several layers share, since their parameters hold the same numbers: that of the node's own."""
    owner, _, leaf = name.rpartition(".")
    around = scopes(node)
    if owner in around:
        return name
    twin = next((s for s in reversed(around) if s and numberless(s) == numberless(owner)), owner)
    return f"{twin}.{leaf}" if twin else leaf


def _dotted(told: str, node: ir.Node) -> str:
    """`p_blocks_0_attn_qkv_weight` -> `blocks.0.attn.qkv.weight`: the module path spells the dots."""
    beside = [str(v.name) for v in node.inputs if v is not None and v.is_initializer()]
    for name in beside:  # the same parameter of another layer, of which the exporter has kept one
        if numbers := re.fullmatch(re.sub(r"\d+", r"(\\d+)", mangled(name)), told):
            found = iter(numbers.groups())
            return re.sub(r"\d+", lambda _: next(found), name)  # noqa: B023
    owners = {name.rpartition(".")[0] for name in beside} | set(scopes(node))
    for scope in sorted(owners, key=len, reverse=True):
        prefix = mangled(scope) + "_" if scope else "p_"
        if told.startswith(prefix):
            leaf = told[len(prefix) :]
            return f"{scope}.{leaf}" if scope else leaf
    return told.removeprefix("p_")


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
