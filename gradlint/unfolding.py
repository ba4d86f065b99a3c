"""Parameters that torch's exporters stored twice, stored once for several, or looked up before they stored them.

A gradient belongs to a parameter: what was computed from one that is still in the file is computed from it again, so
that a tied weight's gradient is a sum; what several parameters share because they hold the same numbers is parted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import permutations

import numpy as np
import onnx_ir as ir

from gradlint.graph import (
    constant_array,
    dims,
    folded_parameters,
    is_float,
    mark_parameter,
    numberless,
    trainable,
    was_looked_up,
)

_BLOCK = 1 << 22  # elements that are compared at once
_RANK = 4
_LARGEST_TABLE = 1 << 22


def unfold(model: ir.Model) -> None:
    """Undo, in place, what hides a parameter or merges it with another."""
    if model.producer_name != "pytorch":
        return
    _part_clones(model.graph)
    _join_copies(model.graph)
    _restore_tables(model.graph)


# -- one initializer for several parameters ----------------------------------------------------------------------------


def _part_clones(graph: ir.Graph) -> None:
    """TorchScript's exporter stores equal tensors once, and calls the others `Identity` of that one.

    Equal numbers mean a tied weight, but for constants (every fresh norm holds ones) and layers that were copied from
    one (names that differ in a number only).
    """
    for node in list(graph):
        kept = node.inputs[0] if node.op_type == "Identity" and node.domain == "" else None
        copy = node.outputs[0]
        if kept is None or not kept.is_initializer() or copy.is_graph_output() or not trainable(kept):
            continue
        if numberless(str(kept.name)) == numberless(str(copy.name)) or _is_even(kept):
            twin = ir.Value(name=copy.name, const_value=kept.const_value, shape=kept.shape, type=kept.type)
            twin.metadata_props.update(kept.metadata_props)
            twin.meta["initializer"] = kept.name
            ir.convenience.replace_all_uses_with(copy, twin)
            graph.remove(node, safe=True)
            graph.register_initializer(twin)


def _is_even(value: ir.Value) -> bool:
    array = constant_array(value)
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())


# -- one parameter stored twice ----------------------------------------------------------------------------------------


def _join_copies(graph: ir.Graph) -> None:
    """A transposed or repeated copy of a parameter that the file also holds is made of it again.

    torch says which parameter it was made from; TorchScript's nameless constants have to hold its numbers.
    """
    by_size: dict[int, list[ir.Value]] = defaultdict(list)
    first: dict[str, ir.Value] = {}  # of a parameter that isn't in the file itself
    for value in graph.initializers.values():
        if value.const_value is not None and "::" not in str(value.name) and len(dims(value) or ()) >= 2:
            by_size[value.const_value.size].append(value)
    for value in list(graph.initializers.values()):
        shape = dims(value)
        if not is_float(value) or value.is_graph_output() or shape is None or len(shape) > _RANK:
            continue
        names = folded_parameters(value)
        origins = [graph.initializers.get(name, first.get(name, value)) for name in names]
        if len(names) == 1:
            first.setdefault(names[0], value)
        if "::" in str(value.name) and len(shape) >= 2:
            origins = by_size[math.prod(shape)]
        for origin in origins:
            if (node := _made_of(graph, value, origin)) is not None:
                _replace(graph, value, [node])
                break


def _made_of(graph: ir.Graph, value: ir.Value, origin: ir.Value) -> ir.Node | None:
    """The node that makes `value` of `origin` by a transposition or by repeating it."""
    copy = constant_array(value)
    source = constant_array(origin) if trainable(origin) and origin is not value else None
    guessed = "::" in str(value.name)
    if copy is None or source is None or source.dtype != copy.dtype or (guessed and _is_even(origin)):
        return None
    if source.shape == copy.shape and _equal(source, copy):
        return ir.node("Identity", [origin], name=f"{value.name}.identity")
    for order in permutations(range(copy.ndim)) if source.ndim == copy.ndim else ():
        if tuple(source.shape[k] for k in order) == copy.shape and _equal(source.transpose(order), copy):
            return ir.node("Transpose", [origin], {"perm": list(order)}, name=f"{value.name}.transpose")
    if source.size < copy.size and source.ndim <= copy.ndim and _repeats(source, copy):
        sizes = _initializer(graph, f"{value.name}.shape", np.array(copy.shape, np.int64))
        return ir.node("Expand", [origin, sizes], name=f"{value.name}.expand")
    return None


def _repeats(source: np.ndarray, copy: np.ndarray) -> bool:
    fits = all(n in (1, m) for n, m in zip(source.shape[::-1], copy.shape[::-1], strict=False))
    return fits and _equal(np.broadcast_to(source, copy.shape), copy)


def _replace(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """The last of `nodes` gives what was stored as `value`."""
    out = nodes[-1].outputs[0]
    out.shape, out.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, out)
    del graph.initializers[str(value.name)]
    out.name = value.name
    graph.insert_before(graph[0], nodes)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.ndim == 0:
        return bool(a == b)
    rows = max(1, _BLOCK * len(a) // max(1, a.size))
    return all(np.array_equal(a[k : k + rows], b[k : k + rows]) for k in range(0, len(a), rows))


# -- a table of which the file holds what was looked up ----------------------------------------------------------------


def _restore_tables(graph: ir.Graph) -> None:
    """Positions and relative positions don't depend on the input: torch's exporter looks them up and stores the result.

    Equal rows of the result are one row of the table, whose gradient is the sum of theirs. The rows that were not
    looked up are in no file.
    """
    for value in list(graph.initializers.values()):
        made_of = folded_parameters(value)
        if len(made_of) != 1 or made_of[0] in graph.initializers or not was_looked_up(value):
            continue
        if not trainable(value) or value.is_graph_output():
            continue
        array = constant_array(value)
        found = None if array is None or array.size > _LARGEST_TABLE or _is_even(value) else _table(array)
        if found is None:
            continue
        table, index, axis = found
        rows = _initializer(graph, f"{value.name}.table", table)
        mark_parameter(rows)
        rows.meta["initializer"], rows.meta["parameter"] = value.name, made_of[0]
        lookup = ir.node(
            "Gather", [rows, _initializer(graph, f"{value.name}.index", index)], name=f"{value.name}.lookup"
        )
        order = list(range(index.ndim))
        order.insert(axis, index.ndim)  # the row's own axis, last in what was looked up, goes where it was
        lookup.outputs[0].name = f"{value.name}.rows"
        back = ir.node("Transpose", [lookup.outputs[0]], {"perm": order}, name=f"{value.name}.transpose")
        _replace(graph, value, [lookup, back])


def _table(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """The rows that `array` repeats (n, length), which of them stands where, and the axis that they lie along; None
    where it repeats none. Of several ways to read it, the one with the smallest table."""
    best = None
    for axis in range(array.ndim):
        length = array.shape[axis]
        rows = np.moveaxis(array, axis, -1).reshape(-1, length)
        if length < 2:
            continue
        table, index = np.unique(rows, axis=0, return_inverse=True)
        if len(table) < len(rows) and (best is None or table.size < best[0].size):
            shape = array.shape[:axis] + array.shape[axis + 1 :]
            best = table, index.reshape(shape).astype(np.int64), axis
    return best


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
