"""If, Loop and Scan: their bodies are differentiated as graphs of their own.

A body's gradient needs what the body computed, so the backward node computes it again from the body's inputs: taken
branch for If, tape of the carried states for Loop and Scan. What a body reads from outside (its weights) gets a gradient
through `Backward.send`.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import is_float
from gradlint.subgraphs import captured, copied, emit, finish
from gradlint.transfer import row

Values = Sequence[ir.Value | None]


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


# -- If ------------------------------------------------------------------------------------------------------------------


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
        inside.emit(body)
        finish(body, results)
    then, other = (body for body, _, _ in parts)
    condition = node.inputs[0]
    assert condition is not None
    for value, g in zip(reached, emit(b, "If", [condition], reached, then_branch=then, else_branch=other), strict=True):
        g.shape = value.shape
        b.send(value, g)
    return (None,) * len(node.inputs)


row("If", vjp=if_vjp)
