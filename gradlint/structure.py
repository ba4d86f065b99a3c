"""Facts that walks over the graph tell: skips, chains, what follows what. No numbers but sizes are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import onnx_ir as ir

from gradlint.anatomy import Anatomy
from gradlint.constants import varying
from gradlint.estimate import Estimate
from gradlint.fact_table import Fact
from gradlint.graph import ACTIVATIONS, MOVES, PRODUCTS, attribute, dims, is_float, is_gate, is_head, main_output, op
from gradlint.patterns import (
    Composition,
    activation_name,
    behind,
    compositions,
    normalisations,
    onward,
)
from gradlint.transfer import ELEMENTWISE, derivative

_JOINS = frozenset(
    {"Add", "Sum", "Concat", "com.microsoft:SkipLayerNormalization", "com.microsoft:SkipSimplifiedLayerNormalization"}
)
KERNEL_OPS = PRODUCTS | {"LSTM", "GRU", "RNN"}
_SLOPES = {"Silu": 1.0998, "Gelu": 1.1290, "Mish": 1.0885, "HardSwish": 1.5, "Softsign": 1.0}  # sup |f'|
_SIMPLE = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish",
                     "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Softmax", "LogSoftmax"})  # fmt: skip
_MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum"})


@dataclass(frozen=True)
class Bypasses:
    """`bypassed`: nodes around which a shallower path leads; `joins`: the Add, Sum and Concat nodes where one joins."""

    bypassed: frozenset[ir.Node]
    joins: frozenset[ir.Node]


def bypasses(parts: Anatomy) -> Bypasses:
    """Which nodes have a skip.

    A node is bypassed where it lies behind one operand of a sum or concatenation and not behind another, both operands
    come from a common value, and the other one has fewer layers behind it (towers side by side are no skips).
    Ancestor sets are bit sets, dropped once nothing reads them any more.
    """
    graph, layers = parts.graph, set(parts.layers)
    varies = varying(graph)
    order = {node: k for k, node in enumerate(graph)}
    ancestors: dict[ir.Value, int] = {v: 1 << (len(order) + k) for k, v in enumerate(graph.inputs) if is_float(v)}
    roots: dict[ir.Value, int] = {v: 1 << k for k, v in enumerate(graph.inputs)}
    offspring: list[int] = [0] * len(graph.inputs)  # per root: the nodes that come from it
    depth: dict[ir.Value, int] = dict.fromkeys(ancestors, 0)
    last = {v: k for node, k in order.items() for v in node.inputs if v is not None}
    marked, joins = 0, set()
    for node, k in order.items():
        reads = [v for v in dict.fromkeys(node.inputs) if v is not None and v in ancestors]
        outputs = [o for o in node.outputs if is_float(o) and o in varies]
        if outputs:
            if op(node) in _JOINS and len(reads) > 1:
                found = _bypassed_at(reads, ancestors, roots, offspring, depth)
                marked |= found
                if found:
                    joins.add(node)
            whole, from_, deep = 1 << k, 0, 0
            for v in reads:
                whole, from_, deep = whole | ancestors[v], from_ | roots[v], max(deep, depth[v])
            if not reads:
                from_ = 1 << len(offspring)
                offspring.append(0)
            for r in _bits(from_):
                offspring[r] |= 1 << k
            for o in outputs:
                ancestors[o], roots[o], depth[o] = whole, from_, deep + (node in layers)
        for v in reads:
            if last[v] == k:
                del ancestors[v]
    nodes = list(order)
    return Bypasses(frozenset(nodes[b] for b in _bits(marked & ((1 << len(nodes)) - 1))), frozenset(joins))


def _bypassed_at(
    reads: list[ir.Value],
    ancestors: Mapping[ir.Value, int],
    roots: Mapping[ir.Value, int],
    offspring: list[int],
    depth: Mapping[ir.Value, int],
) -> int:
    """The nodes behind one operand that another operand leads around."""
    found = 0
    for deep in reads:
        for shallow in reads:
            if depth[shallow] >= depth[deep]:
                continue
            reach = 0
            for r in _bits(roots[shallow] & roots[deep]):
                reach |= offspring[r]
            found |= ancestors[deep] & ~ancestors[shallow] & reach
    return found


def _bits(number: int) -> Iterator[int]:
    """The positions of the bits that are set."""
    for byte, part in enumerate(number.to_bytes((number.bit_length() + 7) // 8, "little")):
        while part:
            low = part & -part
            yield 8 * byte + low.bit_length() - 1
            part ^= low


# -- chains ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chain:
    """What lies on the way to a value since the last skip; `post_norm` counts from the input on, `residual` from the
    last normalisation of the whole stream."""

    layers: int = 0
    sigmoids: int = 0
    batchnorms: int = 0
    narrow: float = 0.0
    residual: int = 0
    post_norm: int = 0


def structure(parts: Anatomy, estimate: Estimate, around: Bypasses) -> dict[ir.Node, dict[str, Fact]]:
    """Structural facts of every layer and of every residual addition."""
    graph = parts.graph
    composed, norms = compositions(graph), normalisations(graph)
    varies = varying(graph)
    chains = _chains(parts, estimate, around, composed, norms)
    sigmoids = _whole_chains(graph, chains)
    found: dict[ir.Node, dict[str, Fact]] = {}
    residuals = [n for n in graph if n in around.joins and op(n) != "Concat"]
    for node in dict.fromkeys([*parts.layers, *residuals]):
        facts: dict[str, Fact] = {
            "has_skip": node in around.bypassed,
            "constant_branch": not any(o in varies for o in node.outputs),
            "follows_norm": _follows_norm(node, norms),
        }
        facts |= _chain_facts(node, chains[node], around, norms)
        if op(node) in ("Sigmoid", "HardSigmoid"):
            facts["sigmoid_chain"] = sigmoids[node] if node not in around.bypassed else 0
        if node in norms:
            facts["ends_residual"] = any(n in around.joins and op(n) != "Concat" for n, _ in onward(node.outputs[0]))
        if node in parts.activations:
            facts |= _activation_facts(node, parts, composed)
        if node in parts.weighted:
            follows = next_activation(main_output(node), composed, norms)
            facts |= {"next_activation": follows.name, "before_norm": follows.normalised}
        found[node] = facts
    for node, growth in _residual_growth(residuals, chains, estimate).items():
        found[node]["estimated_residual_growth"] = found[node]["residual_growth"] = growth
    return found


def _chains(
    parts: Anatomy, estimate: Estimate, around: Bypasses, composed: Mapping[ir.Node, Composition], norms: set[ir.Node]
) -> dict[ir.Node, _Chain]:
    """The longest chains that end at each node: maxima over its inputs, plus what the node itself adds."""
    at: dict[ir.Value, _Chain] = {}
    found: dict[ir.Node, _Chain] = {}
    activations = set(parts.activations)
    for node in parts.graph:
        chain = _merged([at[v] for v in node.inputs if v is not None and v in at])
        if node in around.joins:
            chain = _Chain(residual=chain.residual + (op(node) != "Concat"), post_norm=chain.post_norm)
        if node in norms:
            chain = replace(chain, sigmoids=0, narrow=0.0)
            if _is_post_norm(node, around):  # the stream starts anew
                chain = replace(chain, residual=0, post_norm=chain.post_norm + 1)
        if node not in around.bypassed:
            chain = replace(
                chain,
                layers=chain.layers + (node in parts.weighted and op(node) in KERNEL_OPS),
                sigmoids=chain.sigmoids + (node in activations and _hidden_sigmoid(node, parts, composed)),
                batchnorms=chain.batchnorms + (op(node) == "BatchNormalization" and _activated(node, composed)),
                narrow=chain.narrow + (1 / _width(node, estimate) if op(node) == "Relu" else 0.0),
            )
        found[node] = chain
        for output in node.outputs:
            if is_float(output):
                at[output] = chain
    return found


def _merged(chains: list[_Chain]) -> _Chain:
    """The largest of each count."""
    if len(chains) == 1:
        return chains[0]
    return _Chain(*(max((getattr(c, f.name) for c in chains), default=0) for f in fields(_Chain)))


def _chain_facts(node: ir.Node, chain: _Chain, around: Bypasses, norms: set[ir.Node]) -> dict[str, Fact]:
    """Counts of a bypassed node are those of no chain: 0."""
    alone = node not in around.bypassed
    facts: dict[str, Fact] = {
        "chain_without_skip": chain.layers if alone else 0,
        "batchnorm_chain": chain.batchnorms if alone else 0,
        "narrow_sum": chain.narrow if alone else 0.0,
    }
    if node in around.joins and op(node) != "Concat":
        facts["residual_index"] = chain.residual
    if node in norms:
        facts["post_norm_blocks"] = chain.post_norm
    return facts


def _whole_chains(graph: ir.Graph, chains: Mapping[ir.Node, _Chain]) -> dict[ir.Node, int]:
    """Sigmoids in the longest unbroken chain through each node: the count where it ends, told to all it comes from."""
    found: dict[ir.Node, int] = {}
    for node in reversed(list(graph)):
        own = chains[node].sigmoids
        going_on = [found[n] for n in node.successors() if n in found and chains[n].sigmoids >= own]
        found[node] = max([own, *going_on]) if own else 0
    return found


def _hidden_sigmoid(node: ir.Node, parts: Anatomy, composed: Mapping[ir.Node, Composition]) -> bool:
    if op(node) not in ("Sigmoid", "HardSigmoid") or node in composed:
        return False
    return not is_gate(node) and not is_head(node, parts.weighted)


def _activated(node: ir.Node, composed: Mapping[ir.Node, Composition]) -> bool:
    """Does an activation read the node's output (through moves)?"""
    return any(
        op(n) in ACTIVATIONS or (n in composed and composed[n].source in n.inputs) for n, _ in onward(main_output(node))
    )


def _is_post_norm(node: ir.Node, around: Bypasses) -> bool:
    """A normalisation of the residual stream itself: the sum it reads goes nowhere else."""
    if op(node).startswith("com.microsoft:Skip"):
        return node in around.joins and len(node.outputs) < 4
    value = behind(node.inputs[0])
    centred = value.producer() if value is not None else None
    if centred is not None and op(centred) == "Sub":  # written out: the mean is a second reader
        value = behind(centred.inputs[0])
    if value is None or value.producer() not in around.joins or op(value.producer()) == "Concat":  # type: ignore[arg-type]
        return False
    return len({n for n, _ in onward(value) if op(n) not in _MEANS}) == 1


def _width(node: ir.Node, estimate: Estimate) -> float:
    """Units a layer's gradient is averaged over: features; of images and sequences of channels, channels times the
    positions of a window of 3."""
    shape = dims(main_output(node)) or (1,)
    axis = unit_axis(main_output(node), estimate)
    window = math.prod(min(3, max(1, n)) for n in shape[2:]) if axis == 1 else 1
    return float(max(1, shape[axis]) * window)


def unit_axis(value: ir.Value, estimate: Estimate) -> int:
    """The axis of channels or features: the one the moments resolve, else 1 of four axes and the last of fewer."""
    rank = len(value.shape or ())
    found = estimate.moments.get(value)
    if found is not None:
        resolved = [a for a, n in enumerate(found.mean.shape) if n > 1]
        if len(resolved) == 1:
            return resolved[0]
    return 1 if rank >= 4 else max(0, rank - 1)


def _residual_growth(
    residuals: list[ir.Node], chains: Mapping[ir.Node, _Chain], estimate: Estimate
) -> dict[ir.Node, float]:
    """Variance behind each residual addition / behind the first of its stream, estimated."""
    first, found = None, {}
    for node in residuals:
        variance = _variance(estimate, node.outputs[0])
        if variance is not None and chains[node].residual == 1:
            first = variance
        if variance is not None and first:
            found[node] = variance / first
    return found


def _variance(estimate: Estimate, value: ir.Value) -> float | None:
    x = estimate.moments.get(value)
    if x is None:
        return None
    return x.std * x.std


# -- neighbours --------------------------------------------------------------------------------------------------------


def _follows_norm(node: ir.Node, norms: set[ir.Node]) -> bool:
    """Does a normalisation stand directly before (its own scale and shift, and moves, between)?"""
    for value in node.inputs[:2]:
        source = behind(value)
        if source is not None and source.producer() in norms and source.producer() is not node:
            return True
    return False


@dataclass(frozen=True)
class Following:
    """The activation that follows a layer, by name and node (`Identity`, None where another layer comes first).

    normalised: a normalisation stands between, which makes the layer's scale irrelevant.
    """

    name: str
    node: ir.Node | None
    normalised: bool


def next_activation(value: ir.Value, composed: Mapping[ir.Node, Composition], norms: set[ir.Node]) -> Following:
    """What follows a value, looking through moves, biases, normalisations, sums and pooling."""
    pending, seen, normalised = [value], {value}, False
    while pending:
        current = pending.pop(0)
        for node, index in onward(current):
            if node in composed and (composed[node].source in node.inputs or op(node) in ACTIVATIONS):
                return Following(composed[node].name, node, normalised)
            if op(node) in ACTIVATIONS:
                return Following(activation_name(node, {}), node, normalised)
            normalised |= node in norms
            passes = index == 0 and (node in norms or op(node) in _POOLS)
            if (passes or op(node) in ("Add", "Sum")) and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])
    return Following("Identity", None, normalised)


def _activation_facts(node: ir.Node, parts: Anatomy, composed: dict[ir.Node, Composition]) -> dict[str, Fact]:
    name = activation_name(node, composed)
    return {
        "activation": name,
        "max_slope": _max_slope(node, name, composed),
        "second_activation": _is_second(node, composed),
        "hidden_softmax": op(node) in ("Softmax", "LogSoftmax") and _meets_kernel(node, parts),
    }


def _max_slope(node: ir.Node, name: str, composed: Mapping[ir.Node, Composition]) -> float | None:
    if node in composed or op(node) not in ELEMENTWISE:
        return _SLOPES.get(name)
    return derivative(op(node), node)[2]


def _is_second(node: ir.Node, composed: Mapping[ir.Node, Composition]) -> bool:
    """Does an activation read another one's output, moves at most between? Parts of one composed function don't
    count."""
    if op(node) not in _SIMPLE:
        return False
    source = composed[node].source if node in composed else node.inputs[0]
    for _ in range(8):
        before = source.producer() if source is not None else None
        if before is None or op(before) not in MOVES:
            break
        source = before.inputs[0]
    if before is None or (before in composed and composed[before] is composed.get(node)):
        return False
    whole = composed.get(before)
    return source is whole.output if whole is not None else op(before) in _SIMPLE


def _meets_kernel(node: ir.Node, parts: Anatomy) -> bool:
    """Does the output go into a kernel as its data, with nothing but functions of one input between?

    Attention multiplies it with another value first; a kernel of one output takes an expectation over the classes; and
    one that mixes along another axis (talking heads) leaves the distributions as they are.
    """
    classes = (dims(node.outputs[0]) or (0,))[int(attribute(node, "axis", -1))]
    pending, seen = [node.outputs[0]], {node.outputs[0]}
    while pending:
        for use in pending.pop().uses():
            follower = use.node
            varying_inputs = [v for v in follower.inputs if v is not None and is_float(v) and v.const_value is None]
            if follower in parts.weighted and op(follower) in KERNEL_OPS:
                axis = 1 if op(follower).startswith("Conv") else -1
                into, out = ((dims(v) or (0,))[axis] for v in (follower.inputs[0], follower.outputs[0]))
                if use.idx == 0 and out != 1 and into % max(1, classes) == 0:
                    return True
            elif len(varying_inputs) <= 1:
                fresh = [o for o in follower.outputs if o not in seen]
                seen.update(fresh)
                pending.extend(fresh)
    return False
