"""Operands of a shape that their operator doesn't take: exporters write them, and onnx's checker doesn't look."""

from __future__ import annotations

import onnx_ir as ir

from gradlint.exceptions import ModelError
from gradlint.graph import attribute, dims, op

_STATES = {"RNN": (5,), "GRU": (5,), "LSTM": (5, 6)}  # the inputs that hold first states


def check_operands(graph: ir.Graph, where: str) -> None:
    """Raises ModelError for the first constant that doesn't fit."""
    for node in graph.all_nodes():
        for index, needed in _needed(node).items():
            value = node.inputs[index] if index < len(node.inputs) else None
            found = dims(value)
            if value is None or value.const_value is None or found is None or _fits(found, needed):
                continue
            raise ModelError(
                f"{where}: {op(node)} {node.name!r} takes shape ({_shape(needed)}) as input {index}, but "
                f"{value.name!r} has ({_shape(found)}): the file is wrong, no runtime can run it"
            )


def _needed(node: ir.Node) -> dict[int, tuple[int | None, ...]]:
    """By input: the shape it must have; None for a size that doesn't matter."""
    kernel = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    if kernel is None:
        return {}
    if op(node) in ("Conv", "ConvTranspose") and len(kernel) > 1:
        out = kernel[0] if op(node) == "Conv" else kernel[1] * attribute(node, "group", 1)
        return {2: (out,)}
    recurrence = dims(node.inputs[2]) if op(node) in _STATES and len(node.inputs) > 2 else None
    if recurrence is not None and len(recurrence) == 3:
        return {2: (kernel[0], kernel[1], None), **dict.fromkeys(_STATES[op(node)], (kernel[0], None, recurrence[2]))}
    return {}


def _fits(found: tuple[int, ...], needed: tuple[int | None, ...]) -> bool:
    return len(found) == len(needed) and all(m in (None, n) for n, m in zip(found, needed, strict=True))


def _shape(sizes: tuple[int | None, ...]) -> str:
    return ", ".join("any" if n is None else str(n) for n in sizes)
