"""Numbers for symbolic dimensions, constants for inputs that decide a branch, and the shapes that follow."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from gradlint.exceptions import DataError, ModelError
from gradlint.graph import FLOATS, attribute, dims, is_float, op
from gradlint.iterations import settle_shapes
from gradlint.lifting import constant
from gradlint.subgraphs import subgraphs

_STANDARD = ("", "ai.onnx")  # domains
_WINDOWS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})

# Sizes tried, in this order, for dimensions nobody gave: images, then sequences and the rest.
_IMAGE_SIZES = (64, 32, 48, 96, 128, 224, 256, 320, 512)
_OTHER_SIZES = (16, 32, 64, 128, 256, 512, 576, 1024, 4096)


@dataclass(frozen=True)
class Dims:
    """Sizes for symbolic dimensions: `batch` for axis 0, `names` by dimension name, `shapes` by input name.

    settings: inputs that become constants, by name (what decides a branch). passed_over: how many of the sizes that fit
    are left out where sizes have to be chosen, since the model rejected them when it ran.
    """

    batch: int = 8
    names: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: Mapping[str, np.ndarray] = field(default_factory=dict)
    passed_over: int = 0


def deciding_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of one integer or truth that the condition of an If depends on: with their value the branch is known."""
    pending = [v for n in graph.all_nodes() if n.op_type == "If" and (v := n.inputs[0]) is not None]
    seen, found = set(pending), []
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            small = value.shape is not None and all(d == 1 for d in value.shape)
            if value in graph.inputs and value.dtype not in FLOATS and small:
                found.append(value)
            continue
        fresh = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return found


def freeze(graph: ir.Graph, settings: Mapping[str, np.ndarray]) -> None:
    """Inputs become constants."""
    for value in [v for v in graph.inputs if v.name in settings]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(settings[str(value.name)], name=value.name)
        graph.register_initializer(value)


def _unknown(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) or dim <= 0


def dim_key(value: ir.Value, axis: int) -> str:
    """The name under which `--dim` sets an input's unknown dimension: its symbol, else `input.axis`."""
    dim = value.shape[axis] if value.shape is not None else None
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return symbol if symbol and symbol != "?" else f"{value.name}.{axis}"


def open_dimensions(graph: ir.Graph) -> list[str]:
    """The names under which `--dim` sets sizes, in the order of the inputs."""
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    return list(dict.fromkeys(dim_key(v, a) for v in inputs for a, d in enumerate(v.shape or ()) if _unknown(d)))


def bind(model: ir.Model, dims: Dims, where: str) -> tuple[str, ...]:
    inputs = list(model.graph.inputs)
    for value in inputs:
        if value.shape is None and isinstance(value.type, ir.TensorType | None) and value.uses():
            value.shape = _whole(value, dims.shapes.get(str(value.name)), where)
    inputs = [v for v in inputs if v.shape is not None]
    known: dict[str, int] = dict(dims.names)
    for value in inputs:
        _check_given(value, dims.shapes.get(str(value.name)), known, where)
    batch_keys = {dim_key(v, 0) for v in inputs if len(v.shape or ()) > 0 and _unknown(v.shape[0])}  # type: ignore[index]
    states = {v for v in inputs if len(v.shape or ()) == 3 and not _unknown(v.shape[0]) and batch_keys}  # type: ignore[index]
    batch_keys |= {dim_key(v, 1) for v in states if _unknown(v.shape[1])}  # type: ignore[index]
    free = [k for k in open_dimensions(model.graph) if k not in known]
    assumed = [f"{k} = {dims.batch}" for k in free if k in batch_keys]
    known |= {k: dims.batch for k in free if k in batch_keys}
    free = [k for k in free if k not in batch_keys]
    image = any(len(v.shape or ()) == 4 for v in inputs)
    originals = {v: v.shape for v in inputs}
    foreign = {o: o.shape for n in model.graph.all_nodes() if n.domain not in _STANDARD for o in n.outputs if o.shape}

    def gap(size: int) -> tuple[bool, int]:
        """Does the graph contradict this size? And how many outputs stay unknown or are empty."""
        trial = known | dict.fromkeys(free, size)
        for value, shape in originals.items():
            assert shape is not None
            numbers = [trial[dim_key_of(value, shape, a)] if _unknown(d) else d for a, d in enumerate(shape)]
            value.shape = ir.Shape(numbers)
        for value, shape in foreign.items():  # what the file declares: nothing infers it anew
            value.shape = ir.Shape([trial.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in shape])
        return not infer_shapes(model), sum(map(_missing, model.graph.all_nodes()))

    sizes = (_IMAGE_SIZES if image else _OTHER_SIZES) if free else (0,)
    gaps: dict[int, tuple[bool, int]] = {}
    for size in sizes:
        gaps[size] = gap(size)
        if dims.passed_over < sum(found == (False, 0) for found in gaps.values()):
            break
    fitting = sorted(gaps, key=lambda size: gaps[size])
    best = fitting[min(dims.passed_over, len(fitting) - 1)]
    if best != size:
        gap(best)
    return tuple(assumed + [f"{k} = {best}" for k in free])


def _missing(node: ir.Node) -> int:
    """Outputs of unknown shape, and those that hold nothing though no input is empty: of a window that doesn't fit."""
    unknown = sum(o.shape is None or not o.shape.is_static() for o in node.outputs)
    return unknown + _lost(node)


def _lost(node: ir.Node) -> bool:
    """Does an output hold nothing though no input is empty?"""
    return not any(map(_holds_nothing, node.inputs)) and any(map(_holds_nothing, node.outputs))


def _holds_nothing(value: ir.Value | None) -> bool:
    """Is it a float with an axis of no elements? (Inference counts those of a window that doesn't fit below zero.)"""
    sizes = () if value is None or value.shape is None or not is_float(value) else value.shape
    return any(isinstance(d, int) and d < 1 for d in sizes)


def check_windows(graph: ir.Graph, where: str) -> None:
    """Raise ModelError for a window that doesn't fit its input: no runtime computes it."""
    for node in graph:
        if op(node) in _WINDOWS and _lost(node):
            x = node.inputs[0]
            assert x is not None
            assert x.shape is not None
            raise ModelError(
                f"{where}: the window of {op(node)} {node.name!r} doesn't fit its padded input {_show(x.shape)}: "
                "give other sizes with --input-shape or --dim, or mend the model"
            )


def _whole(value: ir.Value, given: tuple[int, ...] | None, where: str) -> ir.Shape:
    """The shape given for an input of unknown rank: nothing can be said of the layers without one."""
    if given is None:
        raise DataError(
            f"{where}: input {value.name!r} has no shape in the file: give one with --input-shape {value.name}:N,N,..."
        )
    return ir.Shape(given)


def dim_key_of(value: ir.Value, shape: ir.Shape, axis: int) -> str:
    """`dim_key` for a shape that the value no longer carries."""
    value.shape = shape
    return dim_key(value, axis)


def _check_given(value: ir.Value, given: tuple[int, ...] | None, known: dict[str, int], where: str) -> None:
    shape = value.shape
    assert shape is not None
    if given is None:
        return
    if len(given) != len(shape):
        raise DataError(
            f"{where}: input {value.name!r} has {len(shape)} dimensions {_show(shape)}, got {len(given)}: {given}"
        )
    for axis, (have, want) in enumerate(zip(given, shape, strict=True)):
        if _unknown(want):
            key = dim_key(value, axis)
            if known.setdefault(key, have) != have:
                raise DataError(f"{where}: dimension {key!r} is {known[key]} and {have} at once (input {value.name!r})")
        elif have != want:
            raise DataError(f"{where}: input {value.name!r} is {_show(shape)}, got {given}: axis {axis} must be {want}")


def _show(shape: ir.Shape) -> str:
    return "(" + ", ".join(str(d) if isinstance(d, int) else (d.value or "?") for d in shape) + ")"


def infer_shapes(model: ir.Model) -> bool:
    """Infer every shape anew; False where the sizes contradict each other (then less is known).

    An output of the model keeps the shape it declares where none is inferred.
    """
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.meta.pop("guessed", False):
                output.shape = output.type = None
    return _infer(model)


def _infer(model: ir.Model) -> bool:
    declared = [(v, v.shape) for v in model.graph.outputs]
    restore = [_stand_in(n) for n in list(model.graph.all_nodes())]
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:  # a folded value keeps the symbols it had before
                value.shape = ir.Shape(value.const_value.shape.numpy())
        for node in graph:
            if node.domain in _STANDARD:
                for output in node.outputs:
                    output.shape = None
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    ok = settle_shapes(model, lambda: _inferred(model))
    for back in restore:
        back()
    for value, shape in declared:
        value.shape = value.shape or shape
    if _guess_foreign(model):
        return _infer(model)
    return ok and all(
        all(not isinstance(d, int) or d >= 0 for d in o.shape)
        for n in model.graph
        for o in n.outputs
        if o.shape is not None
    )


def _stand_in(node: ir.Node) -> Callable[[], None]:
    """Where onnx infers nothing, or wrongly, the node passes for one of the same shape; returns the way back."""
    kind, inputs, graph = node.op_type, tuple(node.inputs), node.graph
    if op(node) == "GroupNormalization":  # onnx infers nothing; this gives back its input's shape, too
        node.op_type = "LayerNormalization"
        return lambda: setattr(node, "op_type", kind)
    if op(node) == "com.microsoft:FusedConv":
        node.domain, node.op_type = "", "Conv"
        node.resize_inputs(min(3, len(inputs)))
        return partial(_restored, node, ("com.microsoft", kind), inputs)
    outs, weight = attribute(node, "output_shape", ()), dims(inputs[1]) if len(inputs) > 1 else None
    if op(node) != "ConvTranspose" or graph is None or weight is None or len(outs) != len(weight) - 2:
        return lambda: None
    # onnx loses the axes along which the output is smaller than the input
    sizes = np.array([0, weight[1] * attribute(node, "group", 1), *outs])
    shape = constant(graph, f"{node.outputs[0].name}/output_shape", sizes)
    node.op_type = "Reshape"
    node.resize_inputs(2)
    node.replace_input_with(1, shape)

    def restore() -> None:
        _restored(node, (node.domain, kind), inputs)
        del graph.initializers[str(shape.name)]

    return restore


def _restored(node: ir.Node, kind: tuple[str, str], inputs: Sequence[ir.Value | None]) -> None:
    node.domain, node.op_type = kind
    node.resize_inputs(len(inputs))
    for k, value in enumerate(inputs):
        node.replace_input_with(k, value)


def _inferred(model: ir.Model) -> bool:
    """One pass of inference; False where the sizes contradict each other."""
    ok = common.ShapeInferencePass(strict_mode=True)(model).modified
    if not ok:
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    for node in model.graph.all_nodes():
        _type_sequences(node)
    return ok


_SEQUENCES = (
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap", "SplitToSequence",
)  # fmt: skip


def _type_sequences(node: ir.Node) -> None:
    """onnx_ir takes every value without a declared type for a tensor."""
    same: Sequence[ir.Value | None] = ()
    if op(node) == "Identity":
        same = node.inputs
    elif op(node) in ("If", "Loop"):
        same = subgraphs(node)[0].outputs[-len(node.outputs) :]
    for output, like in itertools.zip_longest(node.outputs, same):
        sequence = op(node) in _SEQUENCES or (like is not None and isinstance(like.type, ir.SequenceType))
        if sequence and isinstance(output.type, ir.TensorType):
            output.type = ir.SequenceType(output.type)


def _guess_foreign(model: ir.Model) -> bool:
    """A custom operator without declared types is taken to keep type and shape of its first input; True if any was."""
    guessed = False
    for node in model.graph.all_nodes():
        first = next((v for v in node.inputs if v is not None), None)
        if node.domain in _STANDARD or first is None or first.dtype is None:
            continue
        for output in node.outputs:
            if output.dtype is None or (
                output.meta.get("guessed") and output.shape is None and first.shape is not None
            ):
                output.type, output.shape, guessed = first.type, first.shape, True
                output.meta["guessed"] = True
    return guessed
