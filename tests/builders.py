"""Small ONNX models by one call, for tests and for the examples on rule pages: seeded, numpy and onnx only.

`gain` is the standard deviation of a kernel times sqrt(fan_in): sqrt(2) is He, 1 is LeCun. The batch axis is symbolic.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDED = "FuseBatchNormIntoConv"


class _Graph:
    """Nodes and initializers in the making."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> str:
        return self.weight(name, std * self.rng.standard_normal(shape))

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def dense(self, value: str, name: str, kernel: np.ndarray, bias: float = 0.0) -> str:
        offset = self.weight(f"{name}.bias", np.full(len(kernel), bias))
        return self.node("Gemm", [value, self.weight(f"{name}.weight", kernel), offset], name, transB=1)

    def conv(self, value: str, name: str, inputs: int, outputs: int, gain: float, size: int = 3) -> str:
        kernel = self.normal(f"{name}.weight", (outputs, inputs, size, size), gain / math.sqrt(inputs * size * size))
        bias = self.weight(f"{name}.bias", np.zeros(outputs))
        return self.node("Conv", [value, kernel, bias], name, pads=[size // 2] * 4, kernel_shape=[size, size])

    def batchnorm(self, value: str, name: str, channels: int, gamma: float = 1.0) -> str:
        ones, zeros = np.ones(channels), np.zeros(channels)
        parts = {"weight": gamma * ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        return self.node(
            "BatchNormalization", [value, *(self.weight(f"{name}.{k}", v) for k, v in parts.items())], name
        )

    def model(self, shape: list[int | str], value: str, out_shape: list[int | str]) -> onnx.ModelProto:
        self.nodes[-1].output[0] = "y"
        assert value.endswith(".out")
        x = helper.make_tensor_value_info("x", self.dtype, shape)
        y = helper.make_tensor_value_info("y", self.dtype, out_shape)
        graph = helper.make_graph(self.nodes, "model", [x], [y], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def _kernel(graph: _Graph, kind: str, shape: tuple[int, int], gain: float) -> np.ndarray:
    """A hidden layer's kernel (out, in): as drawn, or with the defect that a rule looks for."""
    normal = gain / math.sqrt(shape[1]) * graph.rng.standard_normal(shape)
    if kind == "trained":  # a few strong directions over a decayed bulk: no initial distribution looks like it
        strong = graph.rng.standard_normal((shape[0], 2)) @ graph.rng.standard_normal((2, shape[1]))
        return 0.3 * normal + gain * strong / math.sqrt(2 * shape[1])
    return {
        "normal": normal,
        "uniform": graph.rng.uniform(-1, 1, shape) / math.sqrt(shape[1]),
        "constant": np.full(shape, 0.1),
        "zero": np.zeros(shape),
        "duplicate": np.repeat(normal[: shape[0] // 2], 2, axis=0),
        "near-zero": 1e-6 * normal,
        "oversized": np.where(graph.rng.random(shape) < 0.05, 8.0, normal),
        "nan": np.where(np.arange(shape[1]) == 0, np.nan, normal),
    }[kind]


def mlp(
    *,
    depth: int = 4,
    width: int = 64,
    inputs: int = 32,
    outputs: int = 10,
    activation: str = "Relu",
    gain: float = 1.0,
    bias: float = 0.0,
    residual: bool = False,
    norm: bool = False,
    kernels: Sequence[str] = (),
    half: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """`depth` hidden layers `layers.i` (Gemm) and `act.i`, and a linear head; `kernels`: kinds of the first kernels,
    the head's behind those of the hidden layers."""
    graph, value, size = _Graph(seed), "x", inputs
    for i in range(depth):
        below = value
        kernel = _kernel(graph, kernels[i] if i < len(kernels) else "normal", (width, size), gain)
        value = graph.dense(value, f"layers.{i}", kernel, bias)
        if norm:
            value = graph.batchnorm(value, f"norm.{i}", width)
        value = graph.node(activation, [value], f"act.{i}")
        if residual and i > 0:
            value = graph.node("Add", [below, value], f"add.{i}")
        size = width
    last = kernels[depth] if depth < len(kernels) else "normal"
    value = graph.dense(value, "head", _kernel(graph, last, (outputs, size), 1.0))
    if half:
        graph.dtype = TensorProto.FLOAT16
        graph.initializers = [
            numpy_helper.from_array(numpy_helper.to_array(w).astype(np.float16), w.name) for w in graph.initializers
        ]
    return graph.model(["N", inputs], value, ["N", outputs])


def cnn(
    *,
    depth: int = 4,
    channels: int = 16,
    image: int = 16,
    outputs: int = 10,
    activation: str = "Relu",
    gain: float = math.sqrt(2),
    norm: bool = False,
    gamma: float = 1.0,
    residual: bool = False,
    gate: bool = False,
    folded: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """3x3 convolutions, pooled into a linear head. `gate` adds squeeze-excite; `folded` marks BatchNorm as folded."""
    graph, value, size = _Graph(seed), "x", 3
    for i in range(depth):
        below = value
        value = graph.conv(value, f"conv.{i}", size, channels, gain)
        if folded:
            graph.nodes[-1].metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value=FOLDED)
        if norm:
            value = graph.batchnorm(value, f"norm.{i}", channels, gamma)
        value = graph.node(activation, [value], f"act.{i}")
        if gate:
            pooled = graph.node("GlobalAveragePool", [value], f"squeeze.{i}")
            logits = graph.conv(pooled, f"excite.{i}", channels, channels, 1.0, size=1)
            value = graph.node("Mul", [value, graph.node("Sigmoid", [logits], f"gate.{i}")], f"scale.{i}")
        if residual and i > 0:
            value = graph.node("Add", [below, value], f"add.{i}")
        size = channels
    pooled = graph.node("GlobalAveragePool", [value], "pool")
    flat = graph.node("Flatten", [pooled], "flat")
    value = graph.dense(flat, "head", _kernel(graph, "normal", (outputs, channels), 1.0))
    return graph.model(["N", 3, image, image], value, ["N", outputs])


def rnn(
    *,
    cell: str = "RNN",
    activation: str = "Tanh",
    steps: int = 50,
    inputs: int = 8,
    hidden: int = 16,
    outputs: int = 4,
    gain: float = 1.0,
    gate_bias: float = 0.0,
    seed: int = 0,
) -> onnx.ModelProto:
    """One recurrent operator whose R is orthogonal times `gain`, and a linear head on its last state.

    `gate_bias` goes to the forget gate (LSTM) or the update gate (GRU).
    """
    graph = _Graph(seed)
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[cell]
    blocks = [np.linalg.qr(graph.rng.standard_normal((hidden, hidden)))[0] for _ in range(gates)]
    kernel = graph.normal("rnn.W", (1, gates * hidden, inputs), 1 / math.sqrt(inputs))
    recurrent = graph.weight("rnn.R", gain * np.concatenate(blocks)[None])
    bias = np.zeros((1, 2 * gates * hidden))
    start = {"RNN": None, "GRU": 0, "LSTM": 2 * hidden}[cell]
    if start is not None:
        bias[0, start : start + hidden] = gate_bias
    inputs_of_cell = ["x", kernel, recurrent, graph.weight("rnn.B", bias)]
    graph.nodes.append(helper.make_node(cell, inputs_of_cell, ["", "rnn.last"], "rnn", hidden_size=hidden))
    if cell == "RNN":
        graph.nodes[-1].attribute.append(helper.make_attribute("activations", [activation]))
    last = graph.node("Squeeze", ["rnn.last", "zero"], "squeeze")
    graph.initializers.append(numpy_helper.from_array(np.array([0], np.int64), "zero"))
    value = graph.dense(last, "head", _kernel(graph, "normal", (outputs, hidden), 1.0))
    return graph.model([steps, "N", inputs], value, ["N", outputs])


def transformer(
    *,
    depth: int = 2,
    tokens: int = 16,
    dim: int = 32,
    outputs: int = 4,
    gain: float = 1.0,
    query_gain: float = 1.0,
    scaled: bool = True,
    skip: bool = True,
    norm: str = "pre",
    seed: int = 0,
) -> onnx.ModelProto:
    """Blocks of single-head attention and a two-layer MLP, then a head on every token; `norm` is pre, post or none."""
    graph, value = _Graph(seed), "x"
    if scaled:
        graph.weight("sqrt_d", np.array(math.sqrt(dim)))

    def linear(below: str, name: str, inputs: int, units: int, scale: float) -> str:
        kernel = graph.weight(f"{name}.weight", _kernel(graph, "normal", (units, inputs), scale).T)
        return graph.node("MatMul", [below, kernel], name)

    def layernorm(below: str, name: str) -> str:
        ones, zeros = graph.weight(f"{name}.weight", np.ones(dim)), graph.weight(f"{name}.bias", np.zeros(dim))
        return graph.node("LayerNormalization", [below, ones, zeros], name)

    def attention(below: str, name: str) -> str:
        query = linear(below, f"{name}.query", dim, dim, query_gain)
        key, values = (linear(below, f"{name}.{part}", dim, dim, 1.0) for part in ("key", "value"))
        logits = graph.node(
            "MatMul", [query, graph.node("Transpose", [key], f"{name}.t", perm=[0, 2, 1])], f"{name}.qk"
        )
        if scaled:
            logits = graph.node("Div", [logits, "sqrt_d"], f"{name}.scale")
        mixed = graph.node("MatMul", [graph.node("Softmax", [logits], f"{name}.softmax"), values], f"{name}.mix")
        return linear(mixed, f"{name}.proj", dim, dim, gain)

    def feedforward(below: str, name: str) -> str:
        hidden = graph.node("Relu", [linear(below, f"{name}.up", dim, 2 * dim, math.sqrt(2))], f"{name}.act")
        return linear(hidden, f"{name}.down", 2 * dim, dim, gain)

    for i in range(depth):
        for part, block in (("attention", attention), ("mlp", feedforward)):
            below = value
            value = block(layernorm(value, f"{part}.{i}.norm") if norm == "pre" else value, f"{part}.{i}")
            if skip:
                value = graph.node("Add", [below, value], f"{part}.{i}.add")
            if norm == "post":
                value = layernorm(value, f"{part}.{i}.norm")
    value = linear(value, "head", dim, outputs, 1.0)
    return graph.model(["N", tokens, dim], value, ["N", tokens, outputs])


BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {"mlp": mlp, "cnn": cnn, "rnn": rnn, "transformer": transformer}


# Data by name for examples on rule pages, given the shape of the input `x`.
DATA: dict[str, Callable[[tuple[int, ...]], dict[str, np.ndarray]]] = {
    "shifted": lambda shape: {"x": np.random.default_rng(0).normal(50.0, 20.0, shape).astype(np.float32)},
    "classes": lambda shape: {
        "x": np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        "target": np.arange(shape[0]) % 10,
    },
}


def build(call: str) -> onnx.ModelProto:
    """The model of a builder call with literal keyword arguments, as `mlp(depth=3, activation="Tanh")`."""
    expression = ast.parse(call.strip(), mode="eval").body
    if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name) or expression.args:
        raise ValueError(f"not a builder call with keyword arguments: {call!r}")
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in expression.keywords}
    return BUILDERS[expression.func.id](**arguments)
