"""Convolutions, plain and transposed."""

from typing import Any

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(1)


def normal(*shape: int, std: float = 0.3) -> np.ndarray:
    return (std * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((4, 3, 9, 8), (6, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((4, 3, 9, 8), (6, 3, 3, 2), {"strides": [3, 2], "pads": [0, 1, 2, 0]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ((4, 3, 11, 10), (6, 3, 3, 3), {"dilations": [2, 3], "strides": [2, 2], "pads": [1, 2, 1, 2]}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {}),
        ((2, 4, 17, 16), (6, 4, 1, 1), {}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {"strides": [2, 2]}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {"pads": [1, 1, 1, 1]}),
        ((4, 4, 8, 7), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((4, 4, 8, 7), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 0, 1], "strides": [2, 2]}),
        ((4, 6, 8, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
        ((4, 6, 8, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((4, 3, 8, 7), (6, 1, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
        ((4, 3, 5, 6), (6, 3, 1, 7), {"pads": [0, 3, 0, 3]}),
        ((4, 3, 5, 6), (6, 3, 5, 1), {"pads": [2, 0, 2, 0]}),
        ((4, 3, 4, 4), (6, 3, 2, 2), {"pads": [2, 2, 2, 2]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ],
)
def test_conv(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    check_op("Conv", Activation(x, mean=0.5), normal(*w), normal(w[0]), **attributes)


@pytest.mark.parametrize("attributes", [{}, {"pads": [2, 1], "strides": [2]}, {"dilations": [3], "pads": [3, 3]}])
def test_conv_in_one_dimension(attributes: dict[str, Any]) -> None:
    check_op("Conv", Activation((8, 3, 14), mean=0.5), normal(5, 3, 3), normal(5), **attributes)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_conv_in_three_dimensions(group: int) -> None:
    w = normal(4, 4 // group, 3, 2, 3)
    check_op("Conv", Activation((2, 4, 5, 4, 6)), w, pads=[1, 0, 1, 1, 1, 1], strides=[1, 2, 1], group=group)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((4, 3, 5, 6), (3, 4, 3, 3), {}),
        ((4, 3, 5, 6), (3, 4, 2, 2), {"strides": [2, 2]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"strides": [3, 2], "output_shape": [14, 12]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"dilations": [2, 2], "pads": [1, 0, 2, 1]}),
        ((4, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "group": 2}),
        ((4, 4, 5, 6), (4, 1, 4, 4), {"strides": [2, 2], "group": 4, "pads": [1, 1, 1, 1]}),
        ((4, 3, 9), (3, 4, 4), {"strides": [2], "pads": [1, 1]}),
        ((2, 2, 3, 4, 3), (2, 3, 2, 3, 2), {"strides": [2, 1, 2]}),
    ],
)
def test_conv_transpose(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    bias = normal(w[1] * attributes.get("group", 1))
    check_op("ConvTranspose", Activation(x, mean=0.5), normal(*w), bias, **attributes)
