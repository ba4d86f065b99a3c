"""Pooling over windows and over all positions."""

from typing import Any

import pytest

from gradlint.testing import Activation, check_op

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
