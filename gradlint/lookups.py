"""Which ids an input may hold: what it indexes, and how far up that table goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from gradlint.constants import evaluator
from gradlint.graph import FLOATS, attribute, constant_array, dims, op

_MOVED = frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Slice", "Flatten", "Expand"})
# What wraps negative ids around, shifts the ids of each column, clips, or rounds ids that come as floats.
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Mod", "Where", "Max", "Min", "Clip", "Floor", "Round", "Less", "Greater",
                         "LessOrEqual", "GreaterOrEqual", "Not", "And", "Or"})  # fmt: skip


def id_limit(value: ir.Value) -> int | None:
    """The number of ids an input may hold, 0 and up; None for one that indexes nothing.

    The rows of the smallest table that it (or what is moved, retyped or computed from it) indexes, or the length of its
    one-hot code. A float input holds ids where it is used for nothing else.
    """
    limits: list[int] = []
    open_ends: list[int] = []
    for node, computed in _lookups(value, lambda node, index: op(node) in _MOVED | _ARITHMETIC):
        if node is None:
            if value.dtype in FLOATS:
                return None
        elif op(node) in ("Gather", "GatherElements"):
            shape = dims(node.inputs[0])
            if shape is None:
                continue
            rows = shape[attribute(node, "axis", 0)]
            if not computed:
                limits.append(rows)
            elif (most := _largest(value, node.inputs[1], rows)) is not None:
                (limits if most < rows * 8 else open_ends).append(min(most, rows))
        elif op(node) == "OneHot":
            depth = constant_array(node.inputs[1])
            limits.append(2 if depth is None else int(depth.item()))
        else:
            classes = next((a for v in node.inputs if (a := constant_array(v)) is not None), None)
            if classes is not None and classes.size > 1 and np.ptp(classes) > 0:  # one-hot, written out
                limits.append(int(classes.max()) + 1)
    return min(limits) if limits else max(open_ends, default=None)


def table_rows(value: ir.Value) -> int | None:
    """The rows of the smallest table that every element of an input indexes as it stands; None where there is none."""
    found = [
        shape[attribute(node, "axis", 0)]
        for node, _ in _lookups(value, lambda node, index: op(node) in _MOVED - {"Slice"} and index == 0)
        if node is not None and op(node) in ("Gather", "GatherElements") and (shape := dims(node.inputs[0]))
    ]
    return min(found, default=None)


def _lookups(value: ir.Value, passes: Callable[[ir.Node, int], bool]) -> Iterator[tuple[ir.Node | None, bool]]:
    """The nodes that look a value up, None for other uses, and True where there was arithmetic on the way. passes: does
    the way go on through a node that reads the value at this index?"""
    pending, seen = [(value, False)], {value}
    while pending:
        current, computed = pending.pop()
        for use in current.uses():
            node = use.node
            lookup = op(node) in ("Gather", "GatherElements") and use.idx == 1
            if lookup or (op(node) == "OneHot" and use.idx == 0) or op(node) == "Equal":
                yield node, computed
            elif passes(node, use.idx):
                further = computed or op(node) in _ARITHMETIC
                fresh = [(o, further) for o in node.outputs if o not in seen]
                seen.update(o for o, _ in fresh)
                pending.extend(fresh)
            else:
                yield None, computed


def _largest(value: ir.Value, index: ir.Value | None, rows: int) -> int | None:
    """How many ids, 0 and up, keep a computed index inside a table of so many rows; None where other inputs decide."""
    shape, kind = dims(value), value.dtype
    if shape is None or kind is None:
        return None

    def fits(highest: int) -> bool | None:
        known = evaluator(value.graph, set(), {value: np.full(shape, highest, kind.numpy())})  # type: ignore[arg-type]
        found = known(index)
        return None if found is None else bool(np.all((found >= -rows) & (found < rows)))

    low, high = 0, rows * 8  # ids 0 to low fit, those up to high don't
    if fits(low) is None or not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:
        middle = rows - 1 if low < rows - 1 < high and high == rows * 8 else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low + 1
