"""The backward model: an ONNX graph that computes a model's gradients.

Reverse mode on the canonical graph (Linnainmaa 1976): every node's row in the vjp table emits plain ONNX operators. The
result runs anywhere ONNX runs; weights are shared with the model, not copied.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

import gradlint.ops  # noqa: F401  (fills the tables)
from gradlint.backward import Backward, Cut, Unsupported
from gradlint.canonical import canonicalize
from gradlint.exceptions import UsageError
from gradlint.graph import holds_floats, is_float, op, trainable
from gradlint.load import from_proto, read
from gradlint.subgraphs import captured, inner
from gradlint.transfer import BLOCKED, ELEMENTWISE, VJP

CUT_KEY = "gradlint.cut"


def backward(
    graph: ir.Graph,
    seeds: Mapping[ir.Value, ir.Value],
    wrt: Iterable[ir.Value],
    *,
    mode: str = "eval",
    outer: Backward | None = None,
) -> tuple[Backward, dict[ir.Value, ir.Value], tuple[Cut, ...]]:
    """Emit the backward pass of `graph`, appended to it.

    seeds: output value -> its cotangent (in the graph already). Returns the builder, the gradient of each of `wrt` that
    has a whole one, and the cuts. A value behind a cut, or with no differentiable way to a seed, has no entry. For a
    subgraph `outer` builds the graph around it.
    """
    wanted = list(dict.fromkeys(wrt))
    order = list(graph)
    needs = _reachable(order, wanted)
    b = (
        Backward(mode, needs, backward, prefix=_free_prefix(graph))
        if outer is None
        else inner(outer, "Subgraph", needs)
    )
    grads: dict[ir.Value, list[ir.Value]] = {v: [g] for v, g in seeds.items()}
    for node in reversed(order):
        inputs = [v for v in (*node.inputs, *captured(node)) if b.wanted(v) and v is not None]
        if not inputs:
            continue
        spoiled = any(o in b.tainted for o in node.outputs)
        gs = [_total(b, grads, o) for o in node.outputs]
        if spoiled and op(node) not in BLOCKED:
            b.tainted.update(inputs)
        if all(g is None for g in gs):
            continue
        back = _pulled(b, node, gs)
        if back is None:
            b.tainted.update(v for v in inputs if holds_floats(v))
            b.cuts.append(Cut(str(node.name), op(node)))
            continue
        b.reached.add(node)
        if op(node) in ELEMENTWISE and (slope := _factor(back[0], gs[0])) is not None:
            b.slopes[node] = slope
        for value, g in (*zip(node.inputs, back, strict=False), *b.sent):
            if g is not None and value is not None and b.wanted(value):
                grads.setdefault(value, []).append(g)
        b.sent.clear()
    found = {v: g for v in wanted if v not in b.tainted and (g := _total(b, grads, v)) is not None}
    b.emit(graph, found.values())
    return b, found, tuple(reversed(b.cuts))


def _factor(product: ir.Value | None, g: ir.Value | None) -> ir.Value | None:
    """What g was multiplied with, element by element, where `product` is such a product."""
    node = product.producer() if product is not None else None
    if node is None or node.op_type != "Mul" or g not in node.inputs:
        return None
    return next((v for v in node.inputs if v is not g and v is not None and v.producer() is not None), None)


def _free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or with a number in a graph that has it already (a backward model of a backward model)."""
    used = {v.name for v in (*graph.inputs, *graph.outputs)}
    k, free = 1, name
    while free in used:
        k += 1
        free = f"{name}{k}"
    return free


def _free_prefix(graph: ir.Graph) -> str:
    """`grad`, or `grad2` .. in a graph that holds a backward pass already."""
    names = [str(n.name) for n in graph] + list(graph.initializers)
    k, prefix = 1, "grad"
    while any(name.startswith(f"{prefix}/") for name in names):
        k += 1
        prefix = f"grad{k}"
    return prefix


def _pulled(b: Backward, node: ir.Node, gs: Sequence[ir.Value | None]) -> Sequence[ir.Value | None] | None:
    """The gradients of a node's inputs; None where its operator, or this use of it, has no derivative here."""
    rule = VJP.get(op(node))
    try:
        return None if rule is None else rule(b, node, gs)
    except Unsupported:
        return None


def _reachable(order: Sequence[ir.Node], wanted: Sequence[ir.Value]) -> set[ir.Value]:
    """The float values, and sequences of them, that depend on one of `wanted`."""
    needs = set(wanted)
    for node in order:
        if any(v in needs for v in (*node.inputs, *captured(node))):
            needs.update(o for o in node.outputs if holds_floats(o) or o.dtype is None)
    return needs


def _total(b: Backward, grads: dict[ir.Value, list[ir.Value]], value: ir.Value) -> ir.Value | None:
    """The sum of what the consumers sent back; kept, so that it is built once."""
    terms = grads.get(value)
    if not terms:
        return None
    terms[:] = [b.total(terms, value)]
    return terms[0]


def differentiate(
    model: onnx.ModelProto | str | os.PathLike[str],
    wrt: Sequence[str] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> onnx.ModelProto:
    """The backward model of `model`: a plain ONNX model that computes its gradients.

    Inputs: the model's own and `<output>.cotangent` for each float output. Outputs: the model's own, then `<name>.grad`
    for each name in `wrt` (inputs, initializers or intermediate values; default: float inputs and weights). A name
    whose gradient is cut by an operator without a derivative here gets no output; it is listed in the metadata entry
    `gradlint.cut` (JSON: names and the operators that cut). External data stays where it is, relative to `base_dir`.

    Raises ModelError for an invalid model, UsageError for a name in `wrt` that is no float value of it.
    """
    if isinstance(model, onnx.ModelProto):
        loaded = from_proto(model, "model", Path(base_dir or "."))
    else:
        loaded = read(model).model
    if wrt is not None:
        _check_wrt(loaded.graph, wrt)
    canonicalize(loaded, None, keep=frozenset(wrt or ()))
    graph = loaded.graph
    known = _named_values(graph)
    names = list(dict.fromkeys(wrt)) if wrt is not None else default_wrt(graph)
    seeds: dict[ir.Value, ir.Value] = {}
    for output in list(graph.outputs):
        if is_float(output):
            seed = ir.Value(name=_free_name(graph, f"{output.name}.cotangent"), shape=output.shape, type=output.type)
            graph.inputs.append(seed)
            seeds[output] = seed
    _, found, cuts = backward(graph, seeds, [known[n] for n in names if n in known])
    missing = [n for n in names if n not in known or known[n] not in found]
    taken: set[ir.Value] = set(graph.inputs) | set(graph.outputs)
    for name in names:
        if name not in missing:
            graph.outputs.append(
                named_output(graph, found[known[name]], _free_name(graph, f"{name}.grad"), taken, known[name])
            )
    if missing:
        flat = _blocking([known[n] for n in missing if n in known])
        listed = {"names": missing, "operators": sorted({c.op_type for c in cuts} | flat)}
        loaded.metadata_props[CUT_KEY] = json.dumps(listed)
    return ir.to_proto(loaded)


def _blocking(values: Sequence[ir.Value]) -> set[str]:
    """The operators without a gradient by nature that the ways forward from these values end at."""
    pending, seen, found = list(values), set(values), set()
    while pending:
        for node in {use.node for use in pending.pop().uses()}:
            if op(node) in BLOCKED:
                found.add(op(node))
                continue
            fresh = [o for o in node.outputs if o not in seen]
            seen.update(fresh)
            pending += fresh
    return found


def named_output(
    graph: ir.Graph, value: ir.Value, name: str, taken: set[ir.Value], like: ir.Value | None = None
) -> ir.Value:
    """`value` under the name `name`, ready to be a graph output (through Identity where it is one already)."""
    if value in taken or value.producer() is None:
        node = ir.node("Identity", [value], name=f"grad/{name}")
        node.outputs[0].type = value.type
        graph.append(node)
        value = node.outputs[0]
    taken.add(value)
    value.name = name
    if like is not None:
        value.shape, value.type = like.shape, like.type
    return value


def default_wrt(graph: ir.Graph) -> list[str]:
    """Float inputs and trainable weights, in the graph's order."""
    inputs = [str(v.name) for v in graph.inputs if is_float(v)]
    return inputs + [str(v.name) for v in graph.initializers.values() if trainable(v)]


def _named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    for sub in graph.subgraphs():  # their weights are lifted out of them
        values += [*sub.initializers.values(), *(o for n in sub if op(n) == "Constant" for o in n.outputs)]
    return {str(v.name): v for v in values if v.name and (is_float(v) or v.dtype is None)}


def _check_wrt(graph: ir.Graph, wrt: Sequence[str]) -> None:
    known = _named_values(graph)
    for name in wrt:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(f"no float value named {name!r} in the model{hint}")
