"""Gradients of If, Loop and Scan: their bodies are differentiated as graphs of their own.

A body's gradient needs what the body computed, so the backward node computes it again: the branch of an If as it was,
the body of a Loop or Scan from a tape of its carried states. What a body reads from outside (its weights) gets its
gradient through `Backward.send`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward, Unsupported
from gradlint.graph import dims, is_float
from gradlint.iterations import Iteration, State, Track, original, parts_of
from gradlint.subgraphs import captured, copied, emit, finish, inner

Values = Sequence[ir.Value | None]
_END = np.iinfo(np.int64).max


def _zeros(b: Backward, like: ir.Value) -> ir.Value:
    return b.op("Expand", b.scalar(0.0, like), b.shape(like), dtype=like.dtype)


def _differentiated(
    b: Backward, body: ir.Graph, seeds: dict[ir.Value, ir.Value], wrt: Sequence[ir.Value]
) -> tuple[Backward, dict[ir.Value, ir.Value]]:
    """The backward pass of a body, appended to it; cuts inside it are cuts of the node."""
    assert b.reverse is not None
    inside, found, cuts = b.reverse(body, seeds, wrt, mode=b.mode, outer=b)
    b.cuts.extend(cuts)
    b.tainted.update(v for v in wrt if v in inside.tainted)
    return inside, found


# -- If ----------------------------------------------------------------------------------------------------------------


def if_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """An If of the same condition: each branch computes itself again and the gradients of all that both read outside.

    What only the other branch reads has gradient zero.
    """
    wanted = [v for v in captured(node) if b.wanted(v) and is_float(v)]
    parts = []
    for name in ("then_branch", "else_branch"):
        body = copied(b, node.attributes[name].as_graph())
        seeds: dict[ir.Value, ir.Value] = {}
        for output, g in zip(body.outputs, gs, strict=True):
            if g is not None and is_float(output):
                seeds[output] = b.op("Add", seeds[output], g) if output in seeds else g
        parts.append((body, *_differentiated(b, body, seeds, wanted)))
    reached = [v for v in wanted if v not in b.tainted and any(v in found for _, _, found in parts)]
    if not reached:
        return (None,) * len(node.inputs)
    for body, inside, found in parts:
        results = [found.get(v) or _zeros(inside, v) for v in reached]
        for g, v in zip(results, reached, strict=True):
            g.shape = g.shape or v.shape
        inside.emit(body)
        finish(body, results)
    then, other = (body for body, _, _ in parts)
    condition = node.inputs[0]
    assert condition is not None
    for value, g in zip(reached, emit(b, "If", [condition], reached, then_branch=then, else_branch=other), strict=True):
        g.shape = value.shape
        b.send(value, g)
    return (None,) * len(node.inputs)


# -- Loop and Scan -----------------------------------------------------------------------------------------------------


def _taped(parts: Iteration, kept: Sequence[ir.Value]) -> list[Track]:
    """Further outputs of the forward node: `kept`, inputs of the body, as every step begins."""
    node, tape = parts.node, []
    start = len(node.outputs)
    node.resize_outputs(start + len(kept))
    for k, value in enumerate(kept):
        copy = ir.node("Identity", [value], name=f"{node.name}/tape_{k}")
        copy.outputs[0].name, copy.outputs[0].type = f"{node.name}/tape_{k}.step", value.type
        copy.outputs[0].shape = value.shape
        parts.body.append(copy)
        parts.body.outputs.append(copy.outputs[0])
        whole = node.outputs[start + k]
        whole.name, whole.type = f"{node.name}/tape_{k}", value.type
        if value.shape is not None:
            whole.shape = ir.Shape([None, *value.shape])
        tape.append(Track(whole, value))
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in node.attributes:
            given = list(node.attributes[name].as_ints()) + [0] * len(kept)
            node.attributes[name] = ir.AttrInt64s(name, given)
    return tape


def _last_first(b: Backward, v: ir.Value, track: Track) -> ir.Value:
    """A track's value with the last step's slice first; the inverse, too."""
    if track.reverse:
        return v
    out = b.op("Slice", v, *(b.constant([k]) for k in (-1, -_END, track.axis, -1)))
    out.shape = v.shape
    return out


@dataclass(frozen=True)
class Reversed:
    """A body that computes the gradients of one step, and what stands for what in it.

    carried, sums: the states and captured values whose gradients go from step to step (`arguments`, then `results` in
    the body); slices: the tracks whose slices get a gradient, the next of `results`; the last two are the squares of
    the states' gradient before and behind the step. reads: what the forward body read, to what stands for it; sources:
    outputs with a gradient, to what stands for its slice.
    """

    body: ir.Graph
    inside: Backward
    carried: list[State]
    sums: list[ir.Value]
    slices: list[Track]
    arguments: list[ir.Value]
    results: list[ir.Value]
    reads: dict[ir.Value, ir.Value]
    sources: dict[Track, ir.Value]


def iteration_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The steps backwards over a tape: the gradients of the states are carried, those of what is captured summed. The
    squares of the states' gradient, all together, are byproducts (T): "arriving" behind each step, "leaving" before it.

    Assumes states of one shape in all steps (a tape stacks them) and tensors, no sequences.
    """
    parts = parts_of(node)
    if parts is None or not _one_shape(parts):
        raise Unsupported
    given = {v: g for v, g in zip(node.outputs, gs, strict=True) if g is not None}
    step = _reversed(b, parts, given)
    starts = [given.get(s.last) or _zeros(b, s.last) for s in step.carried] + [_zeros(b, v) for v in step.sums]
    tape = _taped(parts, [v for v in step.reads if v not in {t.each for t in parts.slices}])
    tracks = {step.reads[t.each]: t for t in (*tape, *parts.slices)}
    tracks |= {v: Track(given[t.whole], v, t.axis, t.reverse) for t, v in step.sources.items()}
    back = _as_scan(b, step, starts, tracks) if parts.number is None else _as_loop(b, step, starts, tracks, tape[-1])
    firsts = [s.first for s in step.carried]
    if firsts:
        whole = Track(node.outputs[0], node.outputs[0])
        b.byproducts[node, "arriving"] = _last_first(b, back.pop(), whole)
        b.byproducts[node, "leaving"] = _last_first(b, back.pop(), whole)
    for value, g in zip(firsts + step.sums + [t.whole for t in step.slices], back, strict=True):
        b.send(value, g)
    return (None,) * len(node.inputs)


def _reversed(b: Backward, parts: Iteration, given: dict[ir.Value, ir.Value]) -> Reversed:
    body = copied(b, parts.body)
    twin = dict(zip((*parts.body.inputs, *parts.body.outputs), (*body.inputs, *body.outputs), strict=True))
    kept = [s.into for s in parts.states] + [t.each for t in parts.slices]
    kept += [] if parts.number is None else [parts.number]
    if parts.going is not None:
        ir.convenience.replace_all_uses_with(twin[parts.going], b.constant(True, np.bool_))
    carried = [s for s in parts.states if is_float(s.into)]
    sums = [v for v in captured(parts.node) if b.wanted(v) and is_float(v)]
    slices = [t for t in parts.slices if is_float(t.each) and b.wanted(t.whole)]
    d_states = [_input(body, f"d_state_{k}", twin[s.into]) for k, s in enumerate(carried)]
    so_far = [_input(body, f"sum_{k}", v) for k, v in enumerate(sums)]
    sources = {t: _input(body, f"d_output_{k}", twin[t.each]) for k, t in enumerate(parts.outputs) if t.whole in given}

    seeds: dict[ir.Value, ir.Value] = {}
    for v, g in (*zip((s.out for s in carried), d_states, strict=True), *((t.each, g) for t, g in sources.items())):
        _seed(body, seeds, original(twin[v]), g)
    inside, found = _differentiated(
        b, body, seeds, [twin[s.into] for s in carried] + [twin[t.each] for t in slices] + sums
    )
    if any(twin[s.into] in inside.tainted for s in carried):
        raise Unsupported
    b.tainted.update(t.whole for t in slices if twin[t.each] in inside.tainted)
    slices = [t for t in slices if twin[t.each] in found]
    results = [found.get(twin[s.into]) or _zeros(inside, twin[s.into]) for s in carried]
    results += [inside.op("Add", g, found[v]) if v in found else g for v, g in zip(sums, so_far, strict=True)]
    results += [found[twin[t.each]] for t in slices]
    ends = [seeds[original(twin[s.out])] for s in carried]
    for value, like in zip(results, [*d_states, *so_far, *(twin[t.each] for t in slices)], strict=True):
        value.shape = value.shape or like.shape
    if carried:
        results += [_square(inside, results[: len(carried)]), _square(inside, ends)]
    inside.emit(body)
    reads = {v: twin[v] for v in kept}
    return Reversed(body, inside, carried, sums, slices, d_states + so_far, results, reads, sources)


def _square(b: Backward, parts: Sequence[ir.Value]) -> ir.Value:
    squares = [b.op("ReduceSumSquare", g, keepdims=0) for g in dict.fromkeys(parts)]
    total = b.total(squares, squares[0])
    total.shape = ir.Shape([])
    return total


def _as_scan(b: Backward, step: Reversed, starts: list[ir.Value], tracks: dict[ir.Value, Track]) -> list[ir.Value]:
    """All tracks last step first; the gradients of slices come out in that order."""
    del step.body.inputs[:]
    step.body.inputs.extend([*step.arguments, *tracks])
    finish(step.body, step.results)
    ordered = [_last_first(b, t.whole, t) for t in tracks.values()]
    axes = [t.axis for t in tracks.values()]
    out_axes = [t.axis for t in step.slices] + [0, 0] * bool(step.carried)
    back = emit(
        b, "Scan", [*starts, *ordered], list(step.body.outputs), body=step.body, num_scan_inputs=len(ordered),
        scan_input_axes=axes if any(axes) else None, scan_output_axes=out_axes if any(out_axes) else None,
    )  # fmt: skip
    count = len(starts)
    end = count + len(step.slices)
    return back[:count] + [_last_first(b, g, t) for g, t in zip(back[count:end], step.slices, strict=True)] + back[end:]


def _as_loop(
    b: Backward, step: Reversed, starts: list[ir.Value], tracks: dict[ir.Value, Track], numbers: Track
) -> list[ir.Value]:
    """The body picks its slices from the tapes by itself: unlike Scan, Loop may make no step at all."""
    body, int64 = step.body, ir.DataType.INT64
    count = b.op("Squeeze", b.op("Shape", numbers.whole, dtype=int64), b.constant([0]))
    number, going = (
        ir.Value(name=f"{body.name}/{n}", shape=ir.Shape([]), type=ir.TensorType(kind))
        for n, kind in (("number", int64), ("going", ir.DataType.BOOL))
    )
    head = inner(step.inside, "Head")
    at = head.op("Sub", head.op("Sub", count, b.constant(1)), number)
    for argument, track in tracks.items():
        piece = head.op("Gather", track.whole, at, axis=0)
        piece.shape = argument.shape
        ir.convenience.replace_all_uses_with(argument, piece)
    on = head.op("Identity", going)
    body_nodes = list(body)
    for node in head.nodes:
        if body_nodes:
            body.insert_before(body_nodes[0], node)
        else:
            body.append(node)
    del body.inputs[:]
    body.inputs.extend([number, going, *step.arguments])
    finish(body, [on, *step.results])
    return emit(b, "Loop", [count, b.constant(True, np.bool_), *starts], list(body.outputs[1:]), body=body)


def _one_shape(parts: Iteration) -> bool:
    """Are all states tensors whose shape, as far as it is known, is the same before and after a step?"""
    tensors = all(isinstance(v.type, ir.TensorType) for s in parts.states for v in (s.into, s.out))
    return tensors and all(dims(s.into) == dims(s.out) or None in (dims(s.into), dims(s.out)) for s in parts.states)


def _input(body: ir.Graph, name: str, like: ir.Value) -> ir.Value:
    return ir.Value(name=f"{body.name}/{name}", shape=like.shape, type=like.type)


def _seed(body: ir.Graph, seeds: dict[ir.Value, ir.Value], output: ir.Value, g: ir.Value) -> None:
    """A cotangent for a body's output; a value that is several outputs gets their sum."""
    if output in seeds:
        both = ir.node("Add", [seeds[output], g], name=f"{g.name}/sum")
        both.outputs[0].name, both.outputs[0].type, both.outputs[0].shape = f"{g.name}/sum.0", g.type, g.shape
        body.append(both)
        g = both.outputs[0]
    seeds[output] = g
