"""The canonical form every analysis sees: one opset, no functions, constants folded, dimensions bound.

Functions are inlined, constants become initializers and are folded (never through a float weight: its name must
survive), old opsets are lifted to 21 so that each operator has one form, default attributes are filled in, `auto_pad`
becomes pads, as `output_shape` does, and symbolic dimensions get numbers (what was chosen is said in words).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from gradlint.binding import Dims, bind, check_windows, freeze, infer_shapes
from gradlint.exceptions import ModelError
from gradlint.expansion import expand
from gradlint.functions import inline
from gradlint.fused import take_apart
from gradlint.graph import mark_constant, mark_constants, op, trainable
from gradlint.invariants import read_invariants_outside
from gradlint.lifting import lift, resolve_auto_pad, resolve_output_shape
from gradlint.operands import check_operands
from gradlint.respelling import respell
from gradlint.subgraphs import name_outputs

_SHAPE_LIKE = 64  # elements: more than any shape, pads or axes have
_FOLD_LIMIT = 1 << 24  # elements of one folded result: beyond that the file is a bomb or folding saves nothing


def canonicalize(
    model: ir.Model, dims: Dims | None, where: str = "model", keep: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Bring `model` into canonical form, in place; returns what was assumed about its dimensions, in words.

    With `dims` None symbolic dimensions stay symbolic; values named in `keep` survive. Raises ModelError, and DataError
    for a shape that doesn't fit an input.
    """
    inline(model, where)
    for graph in (model.graph, *model.graph.subgraphs()):
        take_apart(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    name_outputs(model)
    read_invariants_outside(model)
    _lift_weights(model, keep)
    _lower_settings(model, keep)
    mark_constants(model)
    _name_nodes(model)
    outputs = list(model.graph.outputs)
    kept = [v for n in model.graph for v in n.outputs if v.name in keep and v not in outputs]
    model.graph.outputs.extend(kept)  # no pass removes or renames an output
    copies = [n for n in model.graph if _is_copy(n) and n.outputs[0].name in keep]
    for node in copies:  # nor does any read past a sum what is kept
        node.op_type = "Sum"
        node.attributes.clear()
        node.resize_inputs(1)
        node.resize_outputs(1)
    infer_shapes(model)
    respell(model)
    lift(model)
    if dims is not None:
        freeze(model.graph, dims.settings)
    _fold(model, keep)
    assumed: tuple[str, ...] = ()
    if dims is None:
        infer_shapes(model)
    else:
        assumed = bind(model, dims, where)
    _fold(model, keep)
    check_windows(model.graph, where)
    while expand(model):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _lower_settings(model, keep)
        infer_shapes(model)
        _fold(model, keep)
    mark_constants(model)  # what expanding made is no parameter either
    for node in copies:
        node.op_type = "Identity"
    _remove_identities(model, keep)
    common.RemoveUnusedNodesPass()(model)
    _remove_unread(model)
    common.AddDefaultAttributesPass()(model)
    check_operands(model.graph, where)
    for node in model.graph.all_nodes():
        resolve_output_shape(node)
        resolve_auto_pad(node)
    del model.graph.outputs[len(outputs) :]
    return assumed


def _remove_unread(model: ir.Model) -> None:
    """Drop initializers that only a branch read which folding removed (its nodes still count as their users)."""
    read = {v for n in model.graph.all_nodes() for v in n.inputs} | set(model.graph.outputs)
    read |= {v for g in model.graph.subgraphs() for v in g.outputs}
    for graph in (model.graph, *model.graph.subgraphs()):
        for name in [n for n, v in graph.initializers.items() if v not in read]:
            del graph.initializers[name]


def _name_nodes(model: ir.Model) -> None:
    """Every node gets a unique name: reports, blame and fingerprints speak of nodes by name."""
    seen: set[str] = set()
    for node in model.graph.all_nodes():
        base = node.name or (node.outputs[0].name if node.outputs and node.outputs[0].name else node.op_type)
        name, k = base, 1
        while name in seen:
            k += 1
            name = f"{base}#{k}"
        seen.add(name)
        node.name = name


def _lift_weights(model: ir.Model, keep: frozenset[str]) -> None:
    """Weights stored in the body of an If, Loop or Scan move to the main graph: bodies read them from outside. So does
    what `keep` names.

    Settings stay: shape inference looks for axes and shapes in the body only.
    """
    main = model.graph
    taken = {v.name for v in main.inputs} | {o.name for n in main.all_nodes() for o in n.outputs}
    for graph in main.subgraphs():
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.is_graph_output() or not (name in keep or trainable(value)):
                continue
            del graph.initializers[name]
            unique, k = name, 0
            while unique in taken or unique in main.initializers:
                k += 1
                unique = f"{name}_{k}"
            value.name = unique
            main.register_initializer(value)


def _lower_settings(model: ir.Model, keep: frozenset[str]) -> None:
    """Axes, shapes and the like that a body reads from outside get a copy in it: shape inference looks no further."""
    taken = {o.name for n in model.graph.all_nodes() for o in n.outputs} | set(model.graph.initializers)
    for graph in model.graph.subgraphs():
        copies: dict[ir.Value, ir.Value] = {}
        for node in graph:
            for k, value in enumerate(node.inputs):
                if value is None or value.const_value is None or value.graph is graph:
                    continue
                if value.const_value.size > _SHAPE_LIKE or value.name in keep or trainable(value):
                    continue
                if value not in copies:
                    name = f"{graph.name}/{value.name}"
                    while name in taken:
                        name += "'"
                    taken.add(name)
                    copies[value] = ir.Value(
                        name=name, const_value=value.const_value, shape=value.shape, type=value.type
                    )
                    graph.register_initializer(copies[value])
                node.replace_input_with(k, copies[value])


def _is_copy(node: ir.Node) -> bool:
    return op(node) in ("Identity", "Dropout") and not any(o.uses() or o.is_graph_output() for o in node.outputs[1:])


def _remove_identities(model: ir.Model, keep: frozenset[str]) -> None:
    """Identity, Dropout and taking out of an Optional what was put in do nothing here; one that names a graph output
    must stay if its input is named elsewhere."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if not _is_copy(node) and op(node) != "OptionalGetElement":
                continue
            x, y = node.inputs[0], node.outputs[0]
            if y.name in keep:
                continue
            if op(node) == "OptionalGetElement":
                wrapped = x.producer() if x is not None else None
                if wrapped is None or op(wrapped) != "Optional" or not wrapped.inputs:
                    continue
                x = wrapped.inputs[0]
            assert x is not None
            if any(o.is_graph_output() for o in node.outputs):
                if x.graph is not graph or x.producer() is None or x.is_graph_output() or len(node.outputs) > 1:
                    continue
                x.name, y.name = y.name, None
            ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _fold(model: ir.Model, keep: frozenset[str]) -> None:
    """Fold constants to a fixpoint, but for what is computed from a weight or from a value in `keep`: so what folding
    makes is no parameter."""
    from onnxscript.optimizer import fold_constants  # here: half of the start-up time, and reading errors need it not

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    stored = set(_initializers(model))
    weights = {v.name for v in stored if trainable(v)} | keep

    def should_fold(node: ir.Node) -> bool | None:
        if any(v is not None and v.name in weights for v in node.inputs):
            return False
        sizes = [o.shape.numpy() if o.shape is not None and o.shape.is_static() else None for o in node.outputs]
        if any(math.prod(s) > _FOLD_LIMIT for s in sizes if s is not None):
            return False
        bombs = node.op_type in ("Range", "Expand", "Tile", "Pad", "Resize", "ConstantOfShape")
        if bombs and None in sizes:
            return False
        small = all(s is not None and math.prod(s) <= _SHAPE_LIKE for s in sizes)
        return True if small and node.op_type == "ConstantOfShape" else None  # onnxscript leaves it out of itself

    for _ in range(8):
        try:
            with np.errstate(all="ignore"):  # what isn't finite in the model shows where it is used
                modified = fold_constants(model, onnx_shape_inference=False, should_fold=should_fold).modified
            if not modified:
                break
        except RuntimeError as error:
            raise ModelError(f"constants can't be folded: {str(error).splitlines()[0]}") from None
        infer_shapes(model)
    for value in set(_initializers(model)) - stored:
        mark_constant(value)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()
