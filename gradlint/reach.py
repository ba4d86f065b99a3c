"""What the gradient can reach at all: operators that block it, multiplications by zero, biases that nothing feels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import gradlint.ops  # noqa: F401  (fills BLOCKED)
from gradlint.anatomy import Anatomy
from gradlint.attention_facts import Attention
from gradlint.fact_table import Fact, Subject
from gradlint.graph import MOVES, PRODUCTS, attribute, constant_array, dims, holds_floats, is_float, op, trainable
from gradlint.parameters import WeightUse
from gradlint.patterns import array_behind, onward, rescaled
from gradlint.structure import KERNEL_OPS, Bypasses
from gradlint.subgraphs import subgraphs
from gradlint.transfer import BLOCKED

_NORMS = frozenset({"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
                    "RMSNormalization"})  # fmt: skip
_HEAD = 0.01  # standard deviation of what stands in for a head of zeros
_SCALE_ZERO = 1e-4  # a residual scale this small counts as zero: LayerScale starts at 1e-5 or 1e-6
_SHAPES = frozenset({"Shape", "Size"})

Reads = Callable[[ir.Node, int], bool]


# -- zeros by construction ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zeros:
    """`layers`: nodes whose output has no gradient because what follows multiplies it by zero; `weights`: uses whose
    gradient is zero, as (layer, input)."""

    layers: frozenset[ir.Node]
    weights: frozenset[tuple[ir.Node, int]]


def structural_zeros(parts: Anatomy, around: Bypasses, attentions: Sequence[Attention], mode: str) -> Zeros:
    """Gradients that are zero (or as good as) by construction, in healthy models: behind a residual scale of zero, and
    those of biases that what follows cancels."""
    zeroed = {(n, k) for n in around.bypassed for k, v in enumerate(n.inputs) if is_float(v) and _annuls(n, k, around)}
    felt = _reaching(parts.graph, lambda node, k: not _is_blocked(node) and (node, k) not in zeroed)
    reachable = _reaching(parts.graph, lambda node, k: not _is_blocked(node))
    layers = frozenset(n for n in parts.layers if not _any(n, felt) and _any(n, reachable))
    weights = {(u.layer, u.index) for u in parts.uses if u.layer in layers}
    keys = {a.key for a in attentions}
    weights |= {
        (u.layer, u.index) for u in parts.uses if _is_shift(u) and _absorbed(u.layer.outputs[0], mode, keys, attentions)
    }
    return Zeros(layers, frozenset(weights))


def _any(node: ir.Node, values: set[ir.Value]) -> bool:
    return any(o in values for o in node.outputs)


def draw_zero_heads(parts: Anatomy, seed: int) -> bool:
    """Draws the kernels of last layers that are all zero from N(0, 0.01^2); returns whether there were any.

    Every gradient before a zero head is zero until the first step, which makes the head look like one drawn small: as
    such it is judged.
    """
    heads = [u for u in parts.uses if op(u.layer) in KERNEL_OPS and u.index == 1 and _is_zero(u.value, 0.0)]
    heads = [u for u in heads if not any(n in parts.weighted and op(n) in KERNEL_OPS for n in _descendants(u.layer))]
    generator = np.random.default_rng(seed)
    for value in dict.fromkeys(use.value for use in heads):
        drawn = generator.standard_normal(dims(value) or (), np.float32) * np.float32(_HEAD)
        value.const_value = ir.tensor(drawn, value.dtype, name=value.name)
    return bool(heads)


def _descendants(node: ir.Node) -> set[ir.Node]:
    pending, seen = [node], set()
    while pending:
        for successor in pending.pop().successors():
            if successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return seen


def _annuls(node: ir.Node, index: int, around: Bypasses) -> bool:
    """Does a bypassed node multiply its input by zero: a zero kernel, or a scale of (almost) zero that ends the
    branch?"""
    if op(node) in PRODUCTS - {"Einsum"}:
        return index == 0 and _is_zero(array_behind(node.inputs[1]), 0.0)
    if not any(n in around.joins for n, _ in onward(node.outputs[0])):
        return False
    if op(node) in _NORMS:
        return index == 0 and len(node.inputs) > 1 and _is_zero(array_behind(node.inputs[1]), _SCALE_ZERO)
    return op(node) == "Mul" and len(node.inputs) == 2 and _is_zero(array_behind(node.inputs[1 - index]), _SCALE_ZERO)


def _is_zero(value: ir.Value | None, limit: float) -> bool:
    """Are all elements of a stored float array at most `limit` in size?"""
    array = constant_array(value)
    if array is None or not is_float(value) or array.size == 0:
        return False
    flat = array.reshape(-1)
    if np.abs(flat[:64].astype(np.float32)).max() > limit:
        return False
    return bool(np.abs(flat.astype(np.float32)).max() <= limit)


def _reaching(graph: ir.Graph, reads: Reads) -> set[ir.Value]:
    """The float values from which a float output can be reached over inputs for which `reads(node, index)` holds."""
    found = {o for o in graph.outputs if holds_floats(o)}
    for node in reversed(list(graph)):
        if _any(node, found):
            found.update(v for k, v in enumerate(node.inputs) if holds_floats(v) and reads(node, k))
    return found


# -- biases that what follows cancels ----------------------------------------------------------------------------------


def _is_shift(use: WeightUse) -> bool:
    kind = op(use.layer)
    return kind == "Add" or (use.index == 2 and (kind in _NORMS or kind in ("Conv", "ConvTranspose", "Gemm")))


def _absorbed(value: ir.Value, mode: str, keys: set[ir.Value], attentions: Sequence[Attention], depth: int = 8) -> bool:
    """Does everything that reads the value ignore a constant added to each of its channels?

    Normalisation over the batch or over each channel's positions subtracts the mean; softmax over keys is blind to what
    all keys have in common (q b is the same for every key).
    """
    if value in keys:
        return _only_key(value, attentions)
    uses = list(value.uses())
    if not uses or depth == 0 or value.is_graph_output():
        return False
    for use in uses:
        node = use.node
        if use.idx == 0 and op(node) == "InstanceNormalization":
            continue
        if use.idx == 0 and op(node) == "BatchNormalization" and mode == "train":
            continue
        moves = (op(node) in MOVES and use.idx == 0 and op(node) != "Concat") or rescaled(node) is not None
        if not moves or not all(_absorbed(o, mode, keys, attentions, depth - 1) for o in node.outputs):
            return False
    return True


def _only_key(value: ir.Value, attentions: Sequence[Attention]) -> bool:
    """Is the value read by nothing but the attentions whose key it is?"""
    products = {v.producer() for a in attentions if a.key is value for v, _ in a.path[-1:]}
    fused = {a.node for a in attentions if a.key is value and not a.path}
    pending = [value]
    while pending:
        for use in pending.pop().uses():
            if use.node in products | fused and use.idx == 1:
                continue
            if op(use.node) not in MOVES and rescaled(use.node) is None:
                return False
            pending.extend(use.node.outputs)
    return True


# -- blocked and lost --------------------------------------------------------------------------------------------------


def _is_blocked(node: ir.Node) -> bool:
    """No gradient passes: an operator without one, one that gives no floats (comparison, cast to integers, indices), or
    a softmax over one unit, which is 1 whatever it reads."""
    if op(node) in ("Softmax", "LogSoftmax") and (shape := dims(node.outputs[0])):
        return shape[attribute(node, "axis", -1)] == 1
    return op(node) in BLOCKED or not any(holds_floats(o) for o in node.outputs)


def _is_data(node: ir.Node, index: int) -> bool:
    """Is the input what the node computes with? Integers and truths that choose among floats are not."""
    value = node.inputs[index]
    return holds_floats(value) or op(node) in ("Cast", "CastLike") or not any(holds_floats(o) for o in node.outputs)


def blocked(parts: Anatomy) -> dict[ir.Node, dict[str, Fact]]:
    """Per layer: whether all ways, or some, to the float outputs lead through an operator without a gradient, and
    which.

    All: counts every use but that of shapes. Some: counts the ways on which the values themselves are rounded or
    compared, not those on which they only choose (a mask, an index).
    """
    graph = parts.graph
    free = _reaching(graph, lambda node, k: not _is_blocked(node))
    leads: dict[ir.Value, frozenset[str]] = {o: frozenset() for o in graph.outputs if holds_floats(o)}
    data: dict[ir.Value, frozenset[str]] = dict(leads)
    for node in reversed(list(graph)):
        if op(node) in _SHAPES:
            continue
        for table, counts in ((leads, lambda n, k: True), (data, _is_data)):
            behind = [table[o] for o in node.outputs if o in table]
            if not behind:
                continue
            crossed = frozenset().union(*behind, [op(node)] if _is_blocked(node) else [])
            for k, value in enumerate(node.inputs):
                if value is not None and counts(node, k):
                    table[value] = table.get(value, frozenset()) | crossed
    found: dict[ir.Node, dict[str, Fact]] = {}
    for node in parts.layers:
        outputs = [o for o in node.outputs if o in leads]
        everywhere = bool(outputs) and not _any(node, free)
        ways = leads if everywhere else data
        ops = frozenset().union(*(ways.get(o, frozenset()) for o in outputs)) if outputs else frozenset()
        found[node] = {
            "blocked_everywhere": everywhere,
            "blocked_somewhere": bool(ops),
            "blocking_ops": ", ".join(sorted(ops)) or None,
        }
    return found


def reaching_layers(parts: Anatomy) -> frozenset[ir.Node]:
    """Layers from which some path leads to an output, other than times a zero that training won't change."""
    graph = parts.graph

    def passes(node: ir.Node, index: int) -> bool:
        if op(node) != "Mul" or len(node.inputs) != 2:
            return True
        other = array_behind(node.inputs[1 - index])
        return other is None or trainable(other) or not _is_zero(other, 0.0)

    found = set(graph.outputs)
    for node in reversed(list(graph)):
        if _any(node, found):
            found.update(v for k, v in enumerate(node.inputs) if v is not None and passes(node, k))
    return frozenset(n for n in parts.weighted if _any(n, found) or n.graph is not graph)


def disconnected_subjects(graph: ir.Graph) -> list[Subject]:
    """Weights that lead nowhere, as subjects: for a graph as it was read."""
    found = []
    for value in disconnected_weights(graph):
        user = next(iter(value.uses()), None)
        facts: dict[str, Fact] = {
            "op_type": None if user is None else op(user.node),
            "role": "embedding" if user is not None and op(user.node) == "Gather" else "kernel",
            "is_trainable": True,
            "reaches_output": False,
            "elements": 0 if value.const_value is None else int(value.const_value.size),
        }
        found.append(Subject("weight", None if user is None else str(user.node.name), str(value.name), 0, facts))
    return found


def disconnected_weights(graph: ir.Graph) -> list[ir.Value]:
    """Trainable matrices of a model as it was read from which no path leads to an output (the canonical form drops
    them)."""
    needed: set[ir.Value] = set(graph.outputs)
    for node in reversed(list(graph)):
        if _any(node, needed):
            needed.update(v for v in node.inputs if v is not None)
            for inner in subgraphs(node):
                needed.update(v for n in inner.all_nodes() for v in n.inputs if v is not None)
                needed.update(inner.outputs)
    return [v for v in graph.initializers.values() if v not in needed and trainable(v) and len(v.shape or ()) >= 2]
