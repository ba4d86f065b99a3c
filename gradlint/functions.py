"""Functions that a model brings along, written out where they are called."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from gradlint.exceptions import ModelError

_MOST = 1 << 20  # nodes: functions that call others twice each double with every level


def inline(model: ir.Model, where: str) -> None:
    """Every call becomes the body of its function, in place; nodes keep the opset their function was written for.

    Raises ModelError for functions that call each other in a circle, or that become too many nodes.
    """
    for function in model.functions.values():
        for node in function.all_nodes():
            node.version = function.opset_imports.get(node.domain, node.version)
        for domain, version in function.opset_imports.items():
            function.opset_imports[domain] = model.opset_imports.setdefault(domain, version)
    _check_calls(model, where)
    common.InlinePass()(model)


def _check_calls(model: ir.Model, where: str) -> None:
    """Add up, callees first, what each function becomes when all it calls is written out."""
    calls = {
        name: [n.op_identifier() for n in function.all_nodes() if n.op_identifier() in model.functions]
        for name, function in model.functions.items()
    }
    sizes: dict[ir.OperatorIdentifier, int] = {}
    while left := [name for name in calls if name not in sizes]:
        ready = [name for name in left if all(c in sizes for c in calls[name])]
        if not ready:
            circle = ", ".join(sorted(f"{domain}:{name}" for domain, name, _ in left))
            raise ModelError(f"{where}: functions call each other in a circle (among {circle})")
        for name in ready:
            sizes[name] = sum(1 for _ in model.functions[name].all_nodes()) + sum(sizes[c] for c in calls[name])
    total = sum(sizes.get(n.op_identifier(), 1) for n in model.graph.all_nodes())
    if model.functions and total > _MOST:
        raise ModelError(f"{where}: the functions become {total} nodes when they are written out: refused")
