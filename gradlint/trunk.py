"""How gradient and signal flow through the whole graph: the trunk at every depth, and which nodes take what share.

Plain graph walks over per-value figures; where the figures come from (estimate or probe) does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import overload

import numpy as np
import onnx_ir as ir

from gradlint.results import Blame

Figures = Mapping[ir.Value, float]
TINY = 1e-300
# Decades that the parts left out of a blame come to, all together.
SLACK = 5e-4


class Parts(Sequence[Blame]):
    """The blame of one value, made as it is read: of the millions of parts that a deep network has, few are told."""

    def __init__(self, names: Sequence[tuple[str, str]], at: np.ndarray, decades: np.ndarray) -> None:
        """names: name and operator of every node; at: indices of those that have a part; decades: the parts."""
        self._names, self._at, self._decades = names, at, decades

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, key: int) -> Blame: ...
    @overload
    def __getitem__(self, key: slice) -> Parts: ...
    def __getitem__(self, key: int | slice) -> Blame | Parts:
        if isinstance(key, slice):
            return Parts(self._names, self._at[key], self._decades[key])
        node, op_type = self._names[self._at[key]]
        return Blame(node, op_type, float(self._decades[key]))


def levels(graph: ir.Graph) -> dict[ir.Node, int]:
    """How deep each node lies: nodes on the longest path to it (their order in the file has no part in it)."""
    found: dict[ir.Node, int] = {}
    for node in graph:
        found[node] = 1 + max((found[p] for p in node.predecessors() if p in found), default=-1)
    return found


def crossing(level: Mapping[ir.Node, int], figures: Figures) -> dict[ir.Node, float]:
    """For the cut behind each node's level (of `levels`): the largest figure of the values that cross it.

    A value crosses every cut from its producer's level up to the one before its deepest consumer. Values without a
    figure don't count; a cut that none crosses takes the figure of the cut before.
    """
    starts: dict[int, list[tuple[int, float]]] = {}
    for node, k in level.items():
        for output in node.outputs:
            if (figure := figures.get(output)) is not None:
                last = max((level[u.node] for u in output.uses() if u.node in level), default=k + 1)
                starts.setdefault(k, []).append((last, figure))
    at: dict[int, float] = {}
    live: list[tuple[int, float]] = []
    for k in range(1 + max(level.values(), default=-1)):
        live = [(end, f) for end, f in live if end > k] + starts.get(k, [])
        if live:
            at[k] = max(f for _, f in live)
        elif k - 1 in at:
            at[k] = at[k - 1]
    return {node: at[k] for node, k in level.items() if k in at}


def blame(
    graph: ir.Graph,
    norms: Figures,
    edges: Mapping[tuple[ir.Node, int], float],
    cotangent: float,
    targets: Sequence[ir.Value],
) -> dict[ir.Value, Parts]:
    """Split log10(norm(v) / cotangent) of each target over the nodes between it and the outputs.

    With w_e the share of consumer e in the second moment of a value's gradient:
    log q(v) = sum_e w_e (log q(out_e) + gain_e), which telescopes, so the parts sum to the decay, but for the
    smallest ones (`SLACK`); a node's own input value counts as passed unchanged where its norm is not known. edges:
    squared norm sent back per (node, input).
    """
    order = [n for n in graph if any(o in norms for o in n.outputs) or n.outputs]
    names = [(str(n.name), n.op_type) for n in order]
    index = {node: k for k, node in enumerate(order)}
    wanted = set(targets)
    log = _filled(order, norms, edges)
    parts: dict[ir.Value, np.ndarray] = {}
    found: dict[ir.Value, Parts] = {}
    base = math.log10(max(cotangent, TINY))
    for node in reversed(order):
        for value in node.outputs:
            if value not in log:
                continue
            vector = _parts(value, log, edges, parts, index, base)
            parts[value] = vector
            if value in wanted:
                found[value] = _essential(vector, names)
        for value in node.outputs:  # what lies behind is no longer needed by anyone before
            for use in value.uses():
                for output in use.node.outputs:
                    if output in parts and output not in wanted and _done(output, index, node):
                        parts.pop(output)
    return found


def _done(output: ir.Value, index: Mapping[ir.Node, int], now: ir.Node) -> bool:
    producer = output.producer()
    readers = [v.producer() for v in (producer.inputs if producer is not None else ()) if v is not None]
    return all(r is None or r not in index or index[r] > index[now] for r in readers)


def completed(
    graph: ir.Graph, norms: Figures, edges: Mapping[tuple[ir.Node, int], float], among: Collection[ir.Value]
) -> dict[ir.Value, float]:
    """Norms also of those of `among` that lie between known ones: by the estimated gains from what lies behind them."""
    order, reached = list(graph), set(norms)
    for node in order:
        if not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    logs = _filled(order, norms, edges)
    return {v: 10.0**log for v, log in logs.items() if v in among and v in reached} | dict(norms)


def _filled(
    order: Sequence[ir.Node], norms: Figures, edges: Mapping[tuple[ir.Node, int], float]
) -> dict[ir.Value, float]:
    """log10 norm of every value on the way: known, or by the estimated gains from what lies behind it."""
    log: dict[ir.Value, float] = {}
    estimated: dict[ir.Value, float] = {}
    for node in reversed(order):
        for value in node.outputs:
            sent = [(u.node, edges[u.node, u.idx]) for u in value.uses() if (u.node, u.idx) in edges]
            total = sum(q for _, q in sent)
            if total > 0:
                estimated[value] = 0.5 * math.log10(max(total, TINY))
            if value in norms:
                log[value] = math.log10(max(norms[value], TINY))
            elif total > 0:
                behind = [(log[o] - estimated.get(o, log[o]), q) for n, q in sent for o in n.outputs[:1] if o in log]
                weight = sum(q for _, q in behind)
                offset = sum(d * q for d, q in behind) / weight if weight > 0 else 0.0
                log[value] = estimated[value] + offset
    return log


def _parts(
    value: ir.Value,
    log: Mapping[ir.Value, float],
    edges: Mapping[tuple[ir.Node, int], float],
    parts: Mapping[ir.Value, np.ndarray],
    index: Mapping[ir.Node, int],
    base: float,
) -> np.ndarray:
    vector = np.zeros(len(index))
    sent = [(u.node, edges.get((u.node, u.idx), 0.0)) for u in value.uses() if u.node in index]
    total = sum(q for _, q in sent)
    if total <= 0:
        return vector
    for node, q in sent:
        outputs = [o for o in node.outputs if o in log]
        if q <= 0 or not outputs:
            continue
        share = q / total
        behind = outputs[0]
        vector[index[node]] += share * (log[value] - log[behind])
        if behind in parts:
            vector += share * parts[behind]
        elif behind.is_graph_output():
            vector[index[node]] += share * (log[behind] - base)
    return vector


def _essential(vector: np.ndarray, names: Sequence[tuple[str, str]]) -> Parts:
    sizes = np.where(np.isnan(vector), 0.0, np.abs(vector))
    smallest_first = np.argsort(sizes, kind="stable")
    kept = np.sort(smallest_first[np.cumsum(sizes[smallest_first]) > SLACK])
    return Parts(names, kept, np.round(vector[kept], 6))


def depths(graph: ir.Graph) -> Callable[[ir.Node], float]:
    """A node's depth in [0, 1]: longest path to it over the longest path through it."""
    before = levels(graph)
    after: dict[ir.Node, int] = {}
    for node in reversed(list(graph)):
        after[node] = 1 + max((after[s] for s in node.successors() if s in after), default=-1)
    return lambda node: before.get(node, 0) / max(1, before.get(node, 0) + after.get(node, 0))
