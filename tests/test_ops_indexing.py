"""Operators that select by index."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(3)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    "index", [np.array(2), np.array(-1), ints(1, 2), ints(0, -1, 3, 3), ints(1, 0, 2, 2).reshape(2, 2)]
)
def test_gather(axis: int, index: np.ndarray) -> None:
    check_op("Gather", Activation((4, 5, 6), mean=0.5), index.astype(np.int64), axis=axis, pullback=0.15)
