"""One form per operator: every node is lifted to the form it has in opset 21, pads are written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.graph import attribute, constant_array

TARGET_OPSET = 21


def lift(model: ir.Model) -> None:
    """Lift every node to the form it has in opset 21 (or the model's own, where newer)."""
    version = model.opset_imports.get("", TARGET_OPSET)
    if "ai.onnx" in model.opset_imports:
        version = model.opset_imports.pop("ai.onnx")
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        for node in list(graph):
            if node.domain == "ai.onnx":
                node.domain = ""
            own, node.version = node.version or version, None  # a function may have an opset of its own
            if node.domain == "" and (since := _LIFTS.get(node.op_type)) is not None and own < since[0]:
                since[1](node, own)
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


def _to_input(*names: str, position: int = 1, dtype: Any = np.int64) -> Callable[[ir.Node, int], None]:
    """Attributes `names` of the old form become inputs, from `position` on."""

    def lift(node: ir.Node, version: int) -> None:
        assert node.graph is not None
        for k, name in enumerate(names):
            attr = node.attributes.pop(name, None)
            if attr is None:
                continue
            if len(node.inputs) <= position + k:
                node.resize_inputs(position + k + 1)
            array: np.ndarray = np.asarray(attr.value, dtype=dtype)
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


def _split(node: ir.Node, version: int) -> None:
    """Before opset 18 equal parts are as many as there are outputs; from then on a number says so."""
    _to_input("split")(node, version)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _softmax(node: ir.Node, version: int) -> None:
    """Before opset 13 softmax flattens to two dimensions at `axis` (default 1) and normalises over the second."""
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert graph is not None
    axis = attribute(node, "axis", 1)
    if axis == -1 or (x.shape is not None and axis == len(x.shape) - 1):
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
    back.outputs[0].type, back.outputs[0].shape, out.shape = out.type, out.shape, None
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
        _nearest(node, constant_array(scales) if scales is not None else None)


def _nearest(node: ir.Node, scales: np.ndarray | None) -> None:
    """Opset 10 rounds down along axes that grow and up along those that shrink: one Resize for each."""
    shrinks = scales is not None and scales.min(initial=1) < 1
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")
    if scales is None or not shrinks or scales.max() <= 1:
        return
    assert node.graph is not None
    first = ir.node("Resize", node.inputs[:2], node.attributes, name=f"{node.name}.larger")
    first.resize_inputs(3)
    first.replace_input_with(2, constant(node.graph, f"{node.name}.larger.scales", np.maximum(scales, 1)))
    first.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    first.outputs[0].type = node.outputs[0].type
    node.graph.insert_before(node, first)
    node.replace_input_with(0, first.outputs[0])
    node.replace_input_with(2, constant(node.graph, f"{node.name}.smaller.scales", np.minimum(scales, 1)))


def _resize(node: ir.Node, version: int) -> None:
    """Opset 10 has two inputs; 11 and 12 know TensorFlow's rule for the nearest, floor((y + 0.5) / scale)."""
    if version == 10:
        _upsample(node, version)
    elif attribute(node, "coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "half_pixel"
        )
        if attribute(node, "nearest_mode", "") == "floor":  # half a pixel less, half a pixel more
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "round_prefer_ceil")


def _grid_sample(node: ir.Node, version: int) -> None:
    """Opset 20 names the modes for any number of dimensions."""
    mode = attribute(node, "mode", "bilinear")
    node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _roi_align(node: ir.Node, version: int) -> None:
    """Opset 16 shifts by half a pixel unless told otherwise."""
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


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


def _dft(node: ir.Node, version: int) -> None:
    """Opset 20 makes the axis an input (and another one its default)."""
    assert node.graph is not None
    axis = attribute(node, "axis", 1)
    node.attributes.pop("axis", None)
    node.resize_inputs(3)
    node.replace_input_with(2, constant(node.graph, f"{node.name}.axis", np.array(axis)))


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
    "Split": (18, _split),
    "Slice": (10, _slice),
    "Clip": (11, _float_inputs("min", "max")),
    "Pad": (11, _pad),
    "TopK": (10, _to_input("k")),
    "Dropout": (12, _dropout),
    "BatchNormalization": (14, _batch_normalization),
    "Upsample": (10, _upsample),
    "Resize": (13, _resize),
    "GridSample": (20, _grid_sample),
    "RoiAlign": (16, _roi_align),
    "Scatter": (11, _renamed("ScatterElements")),
    "GroupNormalization": (21, _group_normalization),
    "DFT": (20, _dft),
}  # fmt: skip


def _time_major(node: ir.Node) -> None:
    """A recurrent layer whose inputs and outputs have the batch first (layout 1): transposed around layout 0."""
    assert node.graph is not None
    del node.attributes["layout"]
    for k in (0, 5, 6):
        value = node.inputs[k] if k < len(node.inputs) else None
        if value is not None:
            move = ir.node("Transpose", [value], {"perm": [1, 0, 2]}, name=f"{node.name}.time_major.{k}")
            move.outputs[0].type = value.type
            node.graph.insert_before(node, move)
            node.replace_input_with(k, move.outputs[0])
    for out in node.outputs:
        if out.name:
            perm = [2, 0, 1, 3] if out.index() == 0 else [1, 0, 2]
            move = ir.node("Transpose", [out], {"perm": perm}, name=f"{node.name}.batch_major.{out.index()}")
            move.outputs[0].type, move.outputs[0].shape, out.shape = out.type, out.shape, None
            ir.convenience.replace_all_uses_with(out, move.outputs[0], replace_graph_outputs=True)
            move.replace_input_with(0, out)
            node.graph.insert_after(node, move)
            move.outputs[0].name, out.name = out.name, f"{out.name}.time_major"


def resolve_output_shape(node: ir.Node) -> None:
    """A ConvTranspose's `output_shape` becomes the pads that give that size, where the input's is known and pads do.

    The larger half is at the beginning but for SAME_UPPER.
    """
    outs = attribute(node, "output_shape", ())
    if node.op_type != "ConvTranspose" or not outs:
        return
    shapes = [v.shape.dims[2:] if v is not None and v.shape is not None else () for v in node.inputs[:2]]
    sizes, kernel = ([n for n in shape if isinstance(n, int)] for shape in shapes)
    if not len(sizes) == len(kernel) == len(outs):
        return
    ones, zeros = (1,) * len(outs), (0,) * len(outs)
    strides, dilations = (attribute(node, name, ()) or ones for name in ("strides", "dilations"))
    extra = list(attribute(node, "output_padding", ()) or zeros)
    rows = zip(sizes, kernel, strides, dilations, extra, outs, strict=True)
    totals = [s * (n - 1) + e + d * (k - 1) + 1 - out for n, k, s, d, e, out in rows]
    if min(totals) < 0:  # what is missing is padding of the output, of which there may be less than a step
        extra = [e + max(0, -t) for e, t in zip(extra, totals, strict=True)]
        if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            return  # onnxruntime says what is wrong
        node.attributes["output_padding"] = ir.AttrInt64s("output_padding", extra)
        totals = [max(0, t) for t in totals]
    _set_pads(node, totals, more_at_end=attribute(node, "auto_pad", "NOTSET") == "SAME_UPPER")
    del node.attributes["output_shape"]


def resolve_auto_pad(node: ir.Node) -> None:
    """SAME_UPPER, SAME_LOWER and VALID become explicit pads where the input's size is known, or does not matter.

    Else a Conv gets a Pad of its own, whose sizes are computed when it runs; of poolings `auto_pad` stays.
    """
    mode = attribute(node, "auto_pad", "NOTSET")
    x = node.inputs[0] if node.inputs else None
    if mode == "NOTSET" or node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool", "ConvTranspose"):
        return
    kernel = list(attribute(node, "kernel_shape", ()))
    if not kernel and len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].shape is not None:
        kernel = [d for d in node.inputs[1].shape.dims[2:] if isinstance(d, int)]
    if not kernel or attribute(node, "output_shape", ()):
        return
    strides = list(attribute(node, "strides", ())) or [1] * len(kernel)
    dilations = list(attribute(node, "dilations", ())) or [1] * len(kernel)
    extra = list(attribute(node, "output_padding", ())) or [0] * len(kernel)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = list(x.shape.dims[2:]) if x is not None and x.shape is not None else [None] * len(kernel)
    totals: list[int] = []
    for size, span, stride, more in zip(sizes, spans, strides, extra, strict=True):
        if mode == "VALID":
            totals.append(0)
        elif node.op_type == "ConvTranspose":
            totals.append(max(0, span + more - stride))
        elif stride == 1:
            totals.append(span - 1)
        elif isinstance(size, int):
            totals.append(max(0, (math.ceil(size / stride) - 1) * stride + span - size))
        else:
            if node.op_type == "Conv":
                _pad_at_run(node, mode, spans, strides)
            return
    _set_pads(node, totals, more_at_end=mode != "SAME_LOWER")


def _set_pads(node: ir.Node, totals: list[int], *, more_at_end: bool) -> None:
    """So many pads along each axis, half of them at either end."""
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    node.attributes["pads"] = ir.AttrInt64s("pads", small + large if more_at_end else large + small)
    node.attributes["auto_pad"] = ir.AttrString("auto_pad", "NOTSET")


def _pad_at_run(node: ir.Node, mode: str, spans: list[int], strides: list[int]) -> None:
    """Zeros around x, (ceil(n / s) - 1) s + span - n of them along an axis of n elements, in a node before a Conv."""
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert graph is not None
    nodes: list[ir.Node] = []

    def made(op_type: str, *inputs: ir.Value | int | list[int], **attributes: int) -> ir.Value:
        name = f"{node.name}.auto_pad.{len(nodes)}"
        values = [
            v if isinstance(v, ir.Value) else constant(graph, f"{name}.{k}", np.array(v)) for k, v in enumerate(inputs)
        ]
        nodes.append(ir.node(op_type, values, attributes, name=name))
        result = nodes[-1].outputs[0]
        result.name, result.dtype = name, ir.DataType.INT64
        return result

    size = made("Shape", x, start=2)
    windows = made("Div", made("Add", size, [s - 1 for s in strides]), strides)
    covered = made("Add", made("Mul", made("Sub", windows, 1), strides), spans)
    total = made("Max", made("Sub", covered, size), 0)
    small = made("Div", total, 2)
    large = made("Sub", total, small)
    begin, end = (large, small) if mode == "SAME_LOWER" else (small, large)
    padded = made("Pad", x, made("Concat", [0, 0], begin, [0, 0], end, axis=0))
    padded.type = x.type
    if x.shape is not None:
        padded.shape = ir.Shape([*x.shape.dims[:2], *[None] * len(spans)])
    graph.insert_before(node, nodes)
    node.replace_input_with(0, padded)
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * (2 * len(spans)))
    node.attributes["auto_pad"] = ir.AttrString("auto_pad", "NOTSET")
