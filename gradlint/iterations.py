"""Loop and Scan taken apart: what they carry from step to step, what they slice and stack, how many steps they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gradlint.graph import attribute, constant_array, dims, op


@dataclass(frozen=True)
class State:
    """A value carried from step to step: before the first, after the last, and into and out of the body."""

    first: ir.Value
    last: ir.Value
    into: ir.Value
    out: ir.Value


@dataclass(frozen=True)
class Track:
    """A value with a slice per step along `axis`, in the order of the steps unless `reverse`: outside, in the body."""

    whole: ir.Value
    each: ir.Value
    axis: int = 0
    reverse: bool = False


@dataclass(frozen=True)
class Iteration:
    """What Loop and Scan have in common. number, going: Loop's two inputs of the body that say where it is."""

    node: ir.Node
    body: ir.Graph
    states: list[State]
    slices: list[Track]
    outputs: list[Track]
    number: ir.Value | None = None
    going: ir.Value | None = None


def parts_of(node: ir.Node) -> Iteration | None:
    """A Loop or Scan taken apart; None for Scan as opset 8 had it (batched, with lengths)."""
    if op(node) == "Loop":
        return loop_parts(node)
    whole = len(node.inputs) == len(node.attributes["body"].as_graph().inputs)
    return scan_parts(node) if whole else None


def scan_parts(node: ir.Node) -> Iteration:
    body, count = node.attributes["body"].as_graph(), int(attribute(node, "num_scan_inputs"))
    carried = len(node.inputs) - count

    def track(wholes: Sequence[ir.Value | None], each: Sequence[ir.Value], kind: str) -> list[Track]:
        axes = list(attribute(node, f"scan_{kind}_axes", ())) or [0] * len(each)
        reverse = list(attribute(node, f"scan_{kind}_directions", ())) or [0] * len(each)
        return [
            Track(w, e, int(a), bool(r))
            for w, e, a, r in zip(wholes, each, axes, reverse, strict=True)
            if w is not None
        ]

    states = [
        State(v, *rest)
        for v, *rest in zip(
            node.inputs[:carried], node.outputs[:carried], body.inputs[:carried], body.outputs[:carried], strict=True
        )
        if v is not None
    ]
    return Iteration(
        node,
        body,
        states,
        track(node.inputs[carried:], body.inputs[carried:], "input"),
        track(node.outputs[carried:], body.outputs[carried:], "output"),
    )


def loop_parts(node: ir.Node) -> Iteration:
    body = node.attributes["body"].as_graph()
    count = len(node.inputs) - 2
    states = [
        State(v, *rest)
        for v, *rest in zip(
            node.inputs[2:], node.outputs[:count], body.inputs[2:], body.outputs[1 : 1 + count], strict=True
        )
        if v is not None
    ]
    outputs = [Track(w, e) for w, e in zip(node.outputs[count:], body.outputs[1 + count :], strict=True)]
    return Iteration(node, body, states, [], outputs, body.inputs[0], body.inputs[1])


def original(value: ir.Value) -> ir.Value:
    """What a value is a plain copy of: no two outputs of a body are the same, so exporters copy."""
    while (node := value.producer()) is not None and op(node) == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


# -- how many steps ----------------------------------------------------------------------------------------------------


def steps(parts: Iteration) -> int | None:
    """The number of steps, where the graph tells it: the length of what is sliced; of a Loop its limit, or where its
    condition, a comparison with a counter, ends it."""
    for track in parts.slices:
        shape = dims(track.whole)
        if shape is not None:
            return shape[track.axis]
    if op(parts.node) == "Scan":
        return None
    limit, begins = (None if v is None else constant_array(v) for v in parts.node.inputs[:2])
    if any(v is not None and a is None for v, a in zip(parts.node.inputs, (limit, begins), strict=False)):
        return None
    if begins is not None and not begins.all():
        return 0
    last = _holds_until(parts, parts.body.outputs[0])
    count = math.inf if limit is None else max(0, int(limit.reshape(-1)[0]))
    if last is None:
        return None
    count = min(count, last + 1)
    return int(count) if count < math.inf else None


def _holds_until(parts: Iteration, value: ir.Value) -> float | None:
    """The first step, counted from 0, at which a truth computed in the body is false; None where it can't be told."""
    ends: dict[ir.Value | None, float | None] = {} if parts.going is None else {parts.going: math.inf}

    def end(truth: ir.Value | None) -> float | None:
        array = constant_array(truth)
        return ends.get(truth) if array is None else math.inf if array.all() else 0.0

    for node in parts.body:
        if op(node) in ("Identity", "Cast", "Squeeze", "Reshape"):
            ends[node.outputs[0]] = end(node.inputs[0])
        elif op(node) == "And":
            sides = [e for v in node.inputs if (e := end(v)) is not None]
            ends[node.outputs[0]] = min(sides) if len(sides) == 2 else None
        elif op(node) in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            ends[node.outputs[0]] = _compares_until(parts, node)
    return end(value)


def _compares_until(parts: Iteration, node: ir.Node) -> float | None:
    low, high = (_line(parts, v) for v in (node.inputs if op(node).startswith("Less") else node.inputs[::-1]))
    if low is None or high is None:
        return None
    rise, room = low[0] - high[0], high[1] - low[1]
    if rise <= 0:
        return math.inf if room > 0 or (room == 0 and op(node).endswith("OrEqual")) else None
    last = room / rise
    return max(0.0, math.floor(last) + 1.0 if op(node).endswith("OrEqual") else float(math.ceil(last)))


def _line(parts: Iteration, value: ir.Value | None) -> tuple[float, float] | None:
    """(a, b) of a scalar in the body that is a t + b at step t: the step's number, a counter, a constant."""
    offset = 0.0
    for _ in range(_LONGEST):
        if value is None:
            return None
        if value is parts.number:
            return 1.0, offset
        if (own := _scalar(value)) is not None:
            return 0.0, own + offset
        for state in parts.states:
            if value is state.into:
                step, first = _gain(state), _scalar(state.first)
                return None if step is None or first is None else (step, first + offset)
        found = _shifted(value)
        if found is None:
            return None
        value, offset = found[0], offset + found[1]
    return None


_LONGEST = 64  # additions between a counter and what compares it


def _gain(state: State) -> float | None:
    """What every step adds to a state."""
    value, total = state.out, 0.0
    for _ in range(_LONGEST):
        if value is state.into:
            return total
        found = _shifted(value)
        if found is None:
            return None
        value, total = found[0], total + found[1]
    return None


def _shifted(value: ir.Value) -> tuple[ir.Value, float] | None:
    """The value that this one is a copy of, or a constant more or less than, and how much more."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    if op(node) in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"):
        return node.inputs[0], 0.0
    if op(node) not in ("Add", "Sub"):
        return None
    first, second = node.inputs
    if second is not None and (more := _scalar(second)) is not None:
        return node.inputs[0], more if op(node) == "Add" else -more
    if op(node) == "Add" and second is not None and (more := _scalar(first)) is not None:
        return second, more
    return None


def _scalar(value: ir.Value | None) -> float | None:
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


# -- shapes ------------------------------------------------------------------------------------------------------------


def settle_shapes(model: ir.Model, infer: Callable[[], bool]) -> bool:
    """Run `infer` (shape inference over the model) until Loops tell no more; returns what it returned last.

    Inference leaves a Loop's states open, since their shapes may change from step to step, and the length of what it
    stacks. Where the body keeps the shape it is given, that is the state's; the number of steps is the length.
    """
    loops = [loop_parts(n) for n in model.graph.all_nodes() if op(n) == "Loop"]
    for s in (s for parts in loops for s in parts.states):
        s.into.shape = s.into.meta.setdefault("declared shape", s.into.shape)
    ok, changing = infer(), set[ir.Value]()
    while sum(_settle(parts, changing) for parts in loops) > 0:
        ok = infer()
    return ok


def _settle(parts: Iteration, changing: set[ir.Value]) -> bool:
    """Write down what a Loop tells; True where that is more than was known. `changing`: states that keep no shape."""
    news = False
    for s in parts.states:
        before, after = dims(s.first), dims(s.out)
        if before is None or s.into in changing:
            continue
        if dims(s.into) is None:
            s.into.shape, news = ir.Shape(before), True
        elif after is not None and after != before:
            changing.add(s.into)
            s.into.shape, news = s.into.meta["declared shape"], True
        elif after == before and dims(s.last) is None:
            s.last.shape, news = ir.Shape(before), True
    count = steps(parts)
    for t in parts.outputs:
        each = dims(t.each)
        if count is not None and each is not None and dims(t.whole) is None:
            t.whole.shape, news = ir.Shape([count, *each]), True
    return news
