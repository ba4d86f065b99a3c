"""The canonical form every analysis sees: one opset, no functions, constants folded, dimensions bound.

Functions are inlined, constants become initializers and are folded (never through a float weight: its name must survive),
old opsets are lifted to 21 so that each operator has one form, default attributes are filled in, `auto_pad` becomes pads,
and symbolic dimensions get numbers (what was chosen is said in words).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from gradlint.exceptions import DataError, ModelError
from gradlint.expansion import expand
from gradlint.fused import take_apart
from gradlint.graph import FLOATS, attribute, mark_constants, op, trainable

TARGET_OPSET = 21
_SHAPE_LIKE = 64  # elements: more than any shape, pads or axes have
_FOLD_LIMIT = 1 << 24  # elements of one folded result: beyond that the file is a bomb or folding saves nothing

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


def canonicalize(
    model: ir.Model, dims: Dims | None, where: str = "model", keep: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Bring `model` into canonical form, in place; returns what was assumed about its dimensions, in words.

    With `dims` None symbolic dimensions stay symbolic; values named in `keep` survive. Raises ModelError, DataError (a shape that doesn't fit an input).
    """
    common.InlinePass()(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        take_apart(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    _lift_weights(model)
    _lower_settings(model)
    mark_constants(model)
    _name_nodes(model)
    outputs = list(model.graph.outputs)
    kept = [v for n in model.graph for v in n.outputs if v.name in keep and v not in outputs]
    model.graph.outputs.extend(kept)  # no pass removes or renames an output
    _infer_shapes(model)
    _lift(model)
    if dims is not None:
        _freeze(model.graph, dims.settings)
    _fold(model)
    assumed = () if dims is None else _bind(model, dims, where)
    _fold(model)
    while expand(model):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _infer_shapes(model)
        _fold(model)
    mark_constants(model)  # what folding made is no parameter either
    _remove_identities(model)
    common.RemoveUnusedNodesPass()(model)
    _remove_unread(model)
    common.AddDefaultAttributesPass()(model)
    _infer_shapes(model)
    for node in model.graph.all_nodes():
        _resolve_auto_pad(node)
    del model.graph.outputs[len(outputs) :]
    return assumed


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


def _freeze(graph: ir.Graph, settings: Mapping[str, np.ndarray]) -> None:
    """Inputs become constants."""
    for value in [v for v in graph.inputs if v.name in settings]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(settings[str(value.name)], name=value.name)
        graph.register_initializer(value)


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


def _lift_weights(model: ir.Model) -> None:
    """Weights stored in the body of an If, Loop or Scan move to the main graph: bodies read them from outside.

    Settings stay: shape inference looks for axes and shapes in the body only.
    """
    main = model.graph
    taken = {v.name for v in main.inputs} | {o.name for n in main.all_nodes() for o in n.outputs}
    for graph in main.subgraphs():
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.is_graph_output() or not trainable(value):
                continue
            del graph.initializers[name]
            unique, k = name, 0
            while unique in taken or unique in main.initializers:
                k += 1
                unique = f"{name}_{k}"
            value.name = unique
            main.register_initializer(value)


def _lower_settings(model: ir.Model) -> None:
    """Axes, shapes and the like that a body reads from outside get a copy in it: shape inference looks no further."""
    taken = {o.name for n in model.graph.all_nodes() for o in n.outputs} | set(model.graph.initializers)
    for graph in model.graph.subgraphs():
        copies: dict[ir.Value, ir.Value] = {}
        for node in graph:
            for k, value in enumerate(node.inputs):
                if value is None or value.const_value is None or value.graph is graph:
                    continue
                if value.const_value.size > _SHAPE_LIKE or trainable(value):
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


def _remove_identities(model: ir.Model) -> None:
    """Identity and Dropout do nothing here; one that names a graph output must stay if its input is named elsewhere."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if node.domain or node.op_type not in ("Identity", "Dropout") or any(o.uses() for o in node.outputs[1:]):
                continue
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            if any(o.is_graph_output() for o in node.outputs):
                if x.graph is not graph or x.producer() is None or x.is_graph_output() or len(node.outputs) > 1:
                    continue
                x.name, y.name = y.name, None
            ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
            graph.remove(node, safe=True)


# -- dimensions --------------------------------------------------------------------------------------------------------


def _unknown(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) or dim <= 0


def dim_key(value: ir.Value, axis: int) -> str:
    """The name under which `--dim` sets an input's unknown dimension: its symbol, else `input.axis`."""
    dim = value.shape[axis] if value.shape is not None else None
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return symbol if symbol and symbol != "?" else f"{value.name}.{axis}"


def _bind(model: ir.Model, dims: Dims, where: str) -> tuple[str, ...]:
    inputs = [v for v in model.graph.inputs if v.shape is not None]
    names = {v.name for v in model.graph.inputs}
    for name in dims.shapes:
        if name not in names:
            raise DataError(f"{where}: no input named {name!r}; inputs: {', '.join(sorted(map(str, names)))}")
    known: dict[str, int] = dict(dims.names)
    for value in inputs:
        _check_given(value, dims.shapes.get(str(value.name)), known, where)
    batch_keys = {dim_key(v, 0) for v in inputs if len(v.shape or ()) > 0 and _unknown(v.shape[0])}  # type: ignore[index]
    states = {v for v in inputs if len(v.shape or ()) == 3 and not _unknown(v.shape[0]) and batch_keys}  # type: ignore[index]
    batch_keys |= {dim_key(v, 1) for v in states if _unknown(v.shape[1])}  # type: ignore[index]
    keys = [dim_key(v, a) for v in inputs for a, d in enumerate(v.shape or ()) if _unknown(d)]
    free = [k for k in dict.fromkeys(keys) if k not in known]
    assumed = [f"{k} = {dims.batch}" for k in free if k in batch_keys]
    known |= {k: dims.batch for k in free if k in batch_keys}
    free = [k for k in free if k not in batch_keys]
    image = any(len(v.shape or ()) == 4 for v in inputs)
    originals = {v: v.shape for v in inputs}

    def missing(size: int) -> float:
        """Outputs whose shape stays unknown at this size; infinite where the graph contradicts it."""
        trial = known | dict.fromkeys(free, size)
        for value, shape in originals.items():
            assert shape is not None
            numbers = [trial[dim_key_of(value, shape, a)] if _unknown(d) else d for a, d in enumerate(shape)]
            value.shape = ir.Shape(numbers)
        return _unknown_shapes(model) if _infer_shapes(model) else math.inf

    sizes = (_IMAGE_SIZES if image else _OTHER_SIZES) if free else (0,)
    gaps: dict[int, float] = {}
    for size in sizes:
        gaps[size] = missing(size)
        if gaps[size] == 0 and dims.passed_over < sum(gap == 0 for gap in gaps.values()):
            break
    fitting = sorted(gaps, key=lambda size: gaps[size])
    best = fitting[min(dims.passed_over, len(fitting) - 1)]
    if best != size:
        missing(best)
    return tuple(assumed + [f"{k} = {best}" for k in free])


def _unknown_shapes(model: ir.Model) -> int:
    return sum(o.shape is None or not o.shape.is_static() for n in model.graph.all_nodes() for o in n.outputs)


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


def _infer_shapes(model: ir.Model) -> bool:
    """Infer every shape anew; False where the sizes contradict each other (then less is known).

    An output of the model keeps the shape it declares where none is inferred.
    """
    declared = [(v, v.shape) for v in model.graph.outputs]
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            if node.domain in ("", "ai.onnx"):
                for output in node.outputs:
                    output.shape = None
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    # onnx infers nothing for GroupNormalization; LayerNormalization, too, gives back its input's shape
    grouped = [n for n in model.graph.all_nodes() if op(n) == "GroupNormalization"]
    for node in grouped:
        node.op_type = "LayerNormalization"
    ok = common.ShapeInferencePass(strict_mode=True)(model).modified
    if not ok:
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    for node in grouped:
        node.op_type = "GroupNormalization"
    for value, shape in declared:
        value.shape = value.shape or shape
    return ok and all(
        all(not isinstance(d, int) or d >= 0 for d in o.shape)
        for n in model.graph
        for o in n.outputs
        if o.shape is not None
    )


# -- folding -----------------------------------------------------------------------------------------------------------


def _fold(model: ir.Model) -> None:
    from onnxscript.optimizer import fold_constants  # here: half of the start-up time, and reading errors need it not

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    weights = {v.name for g in (model.graph, *model.graph.subgraphs()) for v in g.initializers.values() if trainable(v)}

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
            if not fold_constants(model, onnx_shape_inference=False, should_fold=should_fold).modified:
                break
        except RuntimeError as error:
            raise ModelError(f"constants can't be folded: {str(error).splitlines()[0]}") from None
        _infer_shapes(model)


# -- one form per operator ---------------------------------------------------------------------------------------------


def _lift(model: ir.Model) -> None:
    """Lift every node to the form it has in opset 21 (or the model's own, where newer)."""
    version = model.opset_imports.get("", TARGET_OPSET)
    if "ai.onnx" in model.opset_imports:
        version = model.opset_imports.pop("ai.onnx")
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        for node in list(graph):
            if node.domain == "ai.onnx":
                node.domain = ""
            node.version = None
            if node.domain == "" and (since := _LIFTS.get(node.op_type)) is not None and version < since[0]:
                since[1](node, version)
            if node.op_type in ("RNN", "GRU", "LSTM") and attribute(node, "layout", 0):
                _time_major(node)
        graph.opset_imports[""] = max(version, TARGET_OPSET)
    model.opset_imports[""] = max(version, TARGET_OPSET)
    model.ir_version = max(model.ir_version or 0, 10)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of `graph` named after `name`, made unique."""
    k = 0
    while (unique := f"{name}.{k}" if k else name) in graph.initializers:
        k += 1
    value = ir.Value(
        name=unique,
        const_value=ir.tensor(array, name=unique),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value


def _to_input(*names: str, position: int = 1, dtype: type = np.int64) -> Callable[[ir.Node, int], None]:
    """Attributes `names` of the old form become inputs, from `position` on."""

    def lift(node: ir.Node, version: int) -> None:
        assert node.graph is not None
        for k, name in enumerate(names):
            attr = node.attributes.pop(name, None)
            if attr is None:
                continue
            if len(node.inputs) <= position + k:
                node.resize_inputs(position + k + 1)
            array = np.asarray(attr.value, dtype=dtype)
            array = np.atleast_1d(array) if dtype is np.int64 else array
            node.replace_input_with(position + k, constant(node.graph, f"{node.name}.{name}", array))

    return lift


def _float_inputs(*names: str) -> Callable[[ir.Node, int], None]:
    """Like `_to_input`, for float attributes of the input's own type (Clip's bounds, Pad's value)."""

    def lift(node: ir.Node, version: int) -> None:
        x = node.inputs[0]
        dtype = x.dtype.numpy() if x is not None and x.dtype is not None else np.float32
        _to_input(*names, position=1, dtype=dtype)(node, version)

    return lift


def _pad(node: ir.Node, version: int) -> None:
    value = node.attributes.pop("value", None)
    _to_input("pads")(node, version)
    if value is not None and value.as_float() != 0.0:
        node.attributes["value"] = value
        x = node.inputs[0]
        dtype = x.dtype.numpy() if x is not None and x.dtype is not None else np.float32
        _to_input("value", position=2, dtype=dtype)(node, version)


def _slice(node: ir.Node, version: int) -> None:
    _to_input("starts", "ends", "axes")(node, version)


def _softmax(node: ir.Node, version: int) -> None:
    """Before opset 13 softmax flattens to two dimensions at `axis` (default 1) and normalises over the second."""
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert graph is not None
    axis = attribute(node, "axis", 1)
    rank = len(x.shape) if x.shape is not None else None
    if rank is None or axis in (-1, rank - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    flat = ir.node("Flatten", [x], {"axis": axis}, name=f"{node.name}.flatten")
    shape = ir.node("Shape", [x], name=f"{node.name}.shape")
    graph.insert_before(node, [flat, shape])
    node.replace_input_with(0, flat.outputs[0])
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    _reshape_output(node, shape.outputs[0])


def _reshape_output(node: ir.Node, shape: ir.Value) -> None:
    out, graph = node.outputs[0], node.graph
    assert graph is not None
    back = ir.node("Reshape", [out, shape], name=f"{node.name}.reshape")
    back.outputs[0].dtype, back.outputs[0].shape, out.shape = out.dtype, out.shape, None
    ir.convenience.replace_all_uses_with(out, back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, out)
    graph.insert_after(node, back)
    back.outputs[0].name, out.name = out.name, f"{out.name}.flat"


def _dropout(node: ir.Node, version: int) -> None:
    """Dropout is the identity in every analysis: its ratio is no use."""
    node.attributes.pop("ratio", None)
    node.attributes.pop("seed", None)


def _batch_normalization(node: ir.Node, version: int) -> None:
    node.attributes.pop("spatial", None)
    if len(node.outputs) > 1:
        node.resize_outputs(1)


def _upsample(node: ir.Node, version: int) -> None:
    assert node.graph is not None
    if "scales" in node.attributes:
        _to_input("scales", position=1, dtype=np.float32)(node, version)
    scales = node.inputs[1]
    node.op_type = "Resize"
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if attribute(node, "mode", "nearest") == "nearest":
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")


def _resize(node: ir.Node, version: int) -> None:
    if version == 10:
        _upsample(node, version)


def _renamed(op_type: str) -> Callable[[ir.Node, int], None]:
    def lift(node: ir.Node, version: int) -> None:
        node.op_type = op_type

    return lift


def _group_normalization(node: ir.Node, version: int) -> None:
    """Opset 18 scales per group, 21 per channel: repeat each group's scale over its channels."""
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert graph is not None
    if x.shape is None or not isinstance(x.shape[1], int):
        return
    groups = attribute(node, "num_groups", 1)
    each = x.shape[1] // groups
    for k in (1, 2):
        column = constant(graph, f"{node.name}.column", np.array([groups, 1], np.int64))
        wide = constant(graph, f"{node.name}.wide", np.array([groups, each], np.int64))
        flat = constant(graph, f"{node.name}.flat", np.array([groups * each], np.int64))
        a = ir.node("Reshape", [node.inputs[k], column], name=f"{node.name}.{k}.column")
        b = ir.node("Expand", [a.outputs[0], wide], name=f"{node.name}.{k}.wide")
        c = ir.node("Reshape", [b.outputs[0], flat], name=f"{node.name}.{k}.flat")
        graph.insert_before(node, [a, b, c])
        node.replace_input_with(k, c.outputs[0])


# operator -> (first opset of the new form, how to get there)
_LIFTS: dict[str, tuple[int, Callable[[ir.Node, int], None]]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), (13, _softmax)),
    **{op: (13, _to_input("axes")) for op in ("Squeeze", "Unsqueeze", "ReduceSum")},
    **{
        op: (18, _to_input("axes"))
        for op in (
            "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
            "ReduceLogSumExp", "ReduceSumSquare",
        )
    },
    "Split": (13, _to_input("split")),
    "Slice": (10, _slice),
    "Clip": (11, _float_inputs("min", "max")),
    "Pad": (11, _pad),
    "TopK": (10, _to_input("k")),
    "Dropout": (12, _dropout),
    "BatchNormalization": (14, _batch_normalization),
    "Upsample": (10, _upsample),
    "Resize": (11, _resize),
    "Scatter": (11, _renamed("ScatterElements")),
    "GroupNormalization": (21, _group_normalization),
}  # fmt: skip


def _time_major(node: ir.Node) -> None:
    """A recurrent layer whose inputs and outputs have the batch first (layout 1): transposed around layout 0."""
    assert node.graph is not None
    del node.attributes["layout"]
    for k in (0, 5, 6):
        value = node.inputs[k] if k < len(node.inputs) else None
        if value is not None:
            move = ir.node("Transpose", [value], {"perm": [1, 0, 2]}, name=f"{node.name}.time_major.{k}")
            move.outputs[0].dtype = value.dtype
            node.graph.insert_before(node, move)
            node.replace_input_with(k, move.outputs[0])
    for out in node.outputs:
        if out.name:
            perm = [2, 0, 1, 3] if out.index() == 0 else [1, 0, 2]
            move = ir.node("Transpose", [out], {"perm": perm}, name=f"{node.name}.batch_major.{out.index()}")
            move.outputs[0].dtype, move.outputs[0].shape, out.shape = out.dtype, out.shape, None
            ir.convenience.replace_all_uses_with(out, move.outputs[0], replace_graph_outputs=True)
            move.replace_input_with(0, out)
            node.graph.insert_after(node, move)
            move.outputs[0].name, out.name = out.name, f"{out.name}.time_major"


def _resolve_auto_pad(node: ir.Node) -> None:
    """SAME_UPPER, SAME_LOWER and VALID become explicit pads (where the input's size is known)."""
    mode = attribute(node, "auto_pad", "NOTSET")
    x = node.inputs[0] if node.inputs else None
    if mode == "NOTSET" or node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool", "ConvTranspose"):
        return
    kernel = list(attribute(node, "kernel_shape", ()))
    if not kernel and len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].shape is not None:
        kernel = [int(d) for d in node.inputs[1].shape.numpy()[2:]]
    if x is None or x.shape is None or not all(isinstance(d, int) for d in x.shape[2:]):
        return
    strides = list(attribute(node, "strides", ())) or [1] * len(kernel)
    dilations = list(attribute(node, "dilations", ())) or [1] * len(kernel)
    begin, end = [], []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        span = (k - 1) * d + 1
        if node.op_type == "ConvTranspose":
            extra = list(attribute(node, "output_padding", ())) or [0] * len(kernel)
            total = max(0, span + extra[len(begin)] - s)
        else:
            total = max(0, (math.ceil(size / s) - 1) * s + span - size)
        total = 0 if mode == "VALID" else total
        small, large = total // 2, total - total // 2
        begin.append(large if mode == "SAME_LOWER" else small)
        end.append(small if mode == "SAME_LOWER" else large)
    node.attributes["pads"] = ir.AttrInt64s("pads", begin + end)
    node.attributes["auto_pad"] = ir.AttrString("auto_pad", "NOTSET")
