"""Estimates through whole stacks: what is the same at every position, chosen maxima, borders."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gradlint.canonical import Dims, canonicalize
from gradlint.estimate import estimate
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import session

RNG = np.random.default_rng(3)
HE = 2.0**0.5


def stack(steps: list[tuple[str, dict[str, Any]]], channels: int = 24, size: int = 12) -> onnx.ModelProto:
    """A chain of operators on (4, channels, size, size); every Conv gets a 3 x 3 weight of He's scale and a bias."""
    nodes, weights, x = [], [], "x"
    for k, (op, attributes) in enumerate(steps):
        names = [x]
        if op == "Conv":
            scale = HE / (9 * channels) ** 0.5
            w = (scale * RNG.standard_normal((channels, channels, 3, 3))).astype(np.float32)
            weights += [numpy_helper.from_array(w, f"w{k}")]
            weights += [numpy_helper.from_array((0.1 * RNG.standard_normal(channels)).astype(np.float32), f"b{k}")]
            names += [f"w{k}", f"b{k}"]
        x = "y" if k == len(steps) - 1 else f"t{k}"
        nodes.append(helper.make_node(op, names, [x], **attributes))
    value = helper.make_tensor_value_info("x", 1, [4, channels, size, size])
    graph = helper.make_graph(nodes, "stack", [value], [helper.make_empty_tensor_value_info("y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def decades(model: onnx.ModelProto, draws: int = 40) -> dict[str, float]:
    """log10 of the estimated over the measured RMS of every gradient."""
    names = ["x", *(w.name for w in model.graph.initializer)]
    runner = session(differentiate(model, wrt=names))
    given = {i.name: i.shape for i in runner.get_inputs()}
    squares = dict.fromkeys(names, 0.0)
    for _ in range(draws):
        feed = {n: RNG.standard_normal(shape).astype(np.float32) for n, shape in given.items()}
        feed["y.cotangent"] /= np.float32(2.0)
        for name, g in zip(names, runner.run([f"{n}.grad" for n in names], feed), strict=True):
            squares[name] += float(np.mean(np.square(g, dtype=np.float64))) * (4 if name == "x" else 1) / draws
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims())
    found = estimate(loaded.graph, batch=4)
    values = {str(v.name): v for v in [*loaded.graph.inputs, *loaded.graph.initializers.values()]}
    return {n: float(np.log10(found.grad_rms(values[n]) / np.sqrt(squares[n]))) for n in names}


PADDED = {"pads": [1, 1, 1, 1]}
CONV: tuple[str, dict[str, Any]] = ("Conv", PADDED)
STRIDED: tuple[str, dict[str, Any]] = ("Conv", PADDED | {"strides": [2, 2]})
RELU: tuple[str, dict[str, Any]] = ("Relu", {})
POOL: tuple[str, dict[str, Any]] = ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})


@pytest.mark.parametrize(
    "steps",
    [
        [CONV, RELU, STRIDED, RELU, CONV, RELU],
        [CONV, RELU, STRIDED, RELU, CONV, RELU, ("GlobalAveragePool", {})],
        [CONV, RELU, POOL, CONV, RELU, POOL, CONV],
    ],
    ids=["plain", "global average", "maxima"],
)
def test_gradients_of_a_stack(steps: list[tuple[str, dict[str, Any]]]) -> None:
    """Within a tenth of a decade for every weight, bias and the input."""
    off = decades(stack(steps))
    assert {n: round(d, 2) for n, d in off.items() if abs(d) > 0.1} == {}


def test_gradients_behind_an_average() -> None:
    """An average sends the same gradient to all of its window; taken as independent, the bias before it comes short."""
    off = decades(stack([CONV, RELU, ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}), CONV, RELU]))
    assert off.pop("b0") == pytest.approx(-0.2, abs=0.05)
    assert {n: round(d, 2) for n, d in off.items() if abs(d) > 0.1} == {}
