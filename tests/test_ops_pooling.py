"""Pooling over windows and over all positions."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(1)

WINDOWS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((4, 3, 8, 6), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((4, 3, 9, 7), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((4, 3, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((4, 3, 9, 8), {"kernel_shape": [3, 2]}),
    ((4, 3, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((4, 3, 8, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [0, 0, 1, 1]}),
    ((4, 3, 9, 8), {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [1, 2, 1, 0]}),
    ((4, 3, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((4, 3, 13), {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    ((2, 3, 4, 5, 6), {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2]}),
    ((2, 3, 4, 6, 6), {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
]


@pytest.mark.parametrize(("shape", "attributes"), WINDOWS)
def test_max_pool(shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    check_op("MaxPool", Activation(shape, mean=0.5), **attributes)


def test_max_pool_with_indices() -> None:
    check_op("MaxPool", Activation((4, 3, 9, 8)), outputs=2, kernel_shape=[3, 3], strides=[2, 2])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("shape", "attributes"), WINDOWS)
def test_average_pool(shape: tuple[int, ...], attributes: dict[str, Any], padding: int) -> None:
    check_op("AveragePool", Activation(shape, mean=0.5), count_include_pad=padding, **attributes)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 7), (2, 3, 2, 3, 4)])
def test_global_average_pool(shape: tuple[int, ...]) -> None:
    check_op("GlobalAveragePool", Activation(shape, mean=0.5))


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 7), (2, 3, 2, 3, 4)])
def test_global_max_pool(shape: tuple[int, ...]) -> None:
    check_op("GlobalMaxPool", Activation(shape, mean=0.5))


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("shape", "attributes"), WINDOWS)
def test_lp_pool(shape: tuple[int, ...], attributes: dict[str, Any], p: int) -> None:
    check_op("LpPool", Activation(shape, mean=0.5), p=p, moments=0.12, pullback=0.2, **attributes)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    check_op("GlobalLpPool", Activation((4, 3, 5, 6), mean=0.5), p=p, pullback=0.15)


def places(shape: tuple[int, ...], size: tuple[int, ...], stride: int) -> np.ndarray:
    """Where MaxPool would have found the maxima: one place in each tile."""
    batch, channels, height, width = np.indices(shape)
    row, column = (stride * axis + RNG.integers(0, stride, shape) for axis in (height, width))
    return (((batch * shape[1] + channels) * size[0] + row) * size[1] + column).astype(np.int64)


def test_max_unpool() -> None:
    indices = places((2, 3, 4, 5), (8, 10), 2)
    check_op("MaxUnpool", Activation((2, 3, 4, 5), mean=0.5), indices, kernel_shape=[2, 2], strides=[2, 2])


def test_max_unpool_indices_count_in_the_size_that_windows_give() -> None:
    """As in ONNX's own example: `output_shape` (5, 5) puts index 5 of a 4 x 4 map at row 1, column 1."""
    node = onnx.helper.make_node("MaxUnpool", ["x", "i", "s"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    x, y = (onnx.helper.make_tensor_value_info(n, 1, [1, 1, k, k]) for n, k in (("x", 2), ("y", 5)))
    constants = {"i": np.array([[[[5, 7], [13, 15]]]]), "s": np.array([1, 1, 5, 5])}
    initializers = [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = onnx.helper.make_graph([node], "unpool", [x], [y], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    g = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    feed = {"x": np.ones((1, 1, 2, 2), np.float32), "y.cotangent": g}
    (dx,) = ReferenceEvaluator(differentiate(model)).run(["x.grad"], feed)
    np.testing.assert_array_equal(dx[0, 0], [[6, 8], [16, 18]])
