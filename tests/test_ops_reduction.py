"""Sums, means, extremes and norms over axes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Moments
from gradlint.estimate import estimate
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op


def axes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


LAYOUTS = [
    (axes(1), {}),
    (axes(-1), {"keepdims": 0}),
    (axes(2, 3), {}),
    (axes(-1, -2), {"keepdims": 0}),
    (axes(1, 2, 3), {"keepdims": 0}),
    (axes(0), {}),
    (None, {}),
    (None, {"keepdims": 0}),
    (axes(), {"keepdims": 0}),
]


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize(("over", "attributes"), LAYOUTS)
def test_sum_and_mean(op: str, over: np.ndarray | None, attributes: Mapping[str, Any]) -> None:
    check_op(op, Activation((8, 6, 4, 5), mean=0.3), over, **attributes)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin"])
def test_without_axes_nothing_is_reduced(op: str) -> None:
    check_op(op, Activation((8, 6), mean=0.3), None, noop_with_empty_axes=1)


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"])
@pytest.mark.parametrize(("over", "attributes"), LAYOUTS)
def test_norms(op: str, over: np.ndarray | None, attributes: Mapping[str, Any]) -> None:
    check_op(op, Activation((8, 6, 4, 5), mean=0.5), over, pullback=0.15 if op.endswith("Exp") else 0.1, **attributes)


@pytest.mark.parametrize(("over", "attributes"), LAYOUTS)
def test_log_of_a_sum(over: np.ndarray | None, attributes: Mapping[str, Any]) -> None:
    check_op("ReduceLogSum", Activation((8, 6, 4, 5), mean=3, std=0.5, low=1, high=5), over, **attributes)


@pytest.mark.parametrize(("over", "attributes"), LAYOUTS[:5])
def test_product(over: np.ndarray, attributes: Mapping[str, Any]) -> None:
    check_op("ReduceProd", Activation((8, 6, 2, 3), mean=1.0, std=0.2), over, **attributes)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [1, -1])
def test_running_sum(exclusive: int, reverse: int, axis: int) -> None:
    check_op("CumSum", Activation((8, 6, 5), mean=0.3), np.array(axis, np.int64), exclusive=exclusive, reverse=reverse)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("zeros", [(), (2,), (1, 3), (0,), (4,)])
def test_running_product(zeros: tuple[int, ...], exclusive: int, reverse: int) -> None:
    x = np.array([[0.5, -1.5, 2.0, 0.7, 1.2]], np.float32)
    x[:, list(zeros)] = 0.0
    node = onnx.helper.make_node("CumProd", ["x", "axis"], ["y"], exclusive=exclusive, reverse=reverse)
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    axis = onnx.numpy_helper.from_array(np.array(1), "axis")
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [axis])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 26)], ir_version=12)
    g = np.array([[1.0, 2.0, -1.0, 0.5, 3.0]], np.float32)
    back = ReferenceEvaluator(differentiate(model, wrt=["x"]))
    (found,) = back.run(["x.grad"], {"x": x, "y.cotangent": g})
    forward = ReferenceEvaluator(model)
    step = np.eye(5, dtype=np.float64)[:, None] * 1e-4
    ends = [np.stack([forward.run(None, {"x": x + sign * s})[0] for s in step]) for sign in (1, -1)]
    np.testing.assert_allclose(found[0], ((ends[0] - ends[1]) * g).sum(axis=(1, 2)) / 2e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize(("over", "attributes"), LAYOUTS)
def test_extremes(op: str, over: np.ndarray | None, attributes: Mapping[str, Any]) -> None:
    check_op(op, Activation((8, 6, 4, 5), mean=0.3), over, **attributes)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("axis", "k"), [(-1, 3), (1, 1), (2, 4)])
def test_top_k(largest: int, axis: int, k: int) -> None:
    x = Activation((8, 6, 4, 5), mean=0.3)
    check_op("TopK", x, np.array([k], np.int64), outputs=2, axis=axis, largest=largest)


@pytest.mark.parametrize("exclusive", [0, 1])
def test_running_product_estimate(exclusive: int) -> None:
    """Against drawn products (onnxruntime has no kernel to run)."""
    node = onnx.helper.make_node("CumProd", ["x", "axis"], ["y"], exclusive=exclusive)
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (8, 4)) for name in ("x", "y")]
    axis = onnx.numpy_helper.from_array(np.array(1), "axis")
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [axis])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 26)], ir_version=12)
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims())
    found = estimate(loaded.graph, batch=8, inputs={"x": Moments.normal(2, 0.5, 0.36)})
    assert not found.unmodelled
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 0.6, (200000, 4))
    y = np.cumprod(x, axis=1)
    y = np.concatenate([np.ones((len(y), 1)), y[:, :-1]], axis=1) if exclusive else y
    after = np.cumsum((rng.standard_normal(y.shape) * y)[:, ::-1], axis=1)[:, ::-1]
    dx = (np.concatenate([after[:, 1:], np.zeros((len(y), 1))], axis=1) if exclusive else after) / x
    moments, gradient = found.moments[loaded.graph.outputs[0]], found.gradients[loaded.graph.inputs[0]]
    assert float(moments.mean.mean()) == pytest.approx(y.mean(), rel=0.03)
    assert float(moments.second.mean()) == pytest.approx(np.square(y).mean(), rel=0.05)
    assert float(gradient.total.mean()) == pytest.approx(np.square(dx).mean(), rel=0.05)
