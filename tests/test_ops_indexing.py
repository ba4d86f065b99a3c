"""Operators that select by index."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(3)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def drawn(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high, shape)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    "index",
    [np.array(2), np.array(-1), ints(1, 2), ints(2, 0, 3, 1), ints(0, -1, 3, 3), ints(1, 0, 2, 2).reshape(2, 2)],
)
def test_gather(axis: int, index: np.ndarray) -> None:
    check_op("Gather", Activation((4, 4, 4), mean=0.5), index.astype(np.int64), axis=axis, pullback=0.15)


def test_gather_of_a_permutation() -> None:
    check_op("Gather", Activation((8, 5, 4), mean=0.5), ints(3, 0, 4, 1, 2), axis=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_elements(axis: int) -> None:
    shape = [4, 4, 3]
    index = drawn((6, 5, 3)[axis], *[7 if k == axis else n for k, n in enumerate(shape)])
    check_op("GatherElements", Activation((6, 5, 3), mean=0.5), index - (axis == 1), axis=axis, pullback=0.2)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_gather_nd(batch: int, depth: int) -> None:
    index = drawn(3, 6, 5, depth) - 1 if batch else drawn(3, 9, depth)
    check_op("GatherND", Activation((6, 3, 4, 5), mean=0.5), index, batch_dims=batch, pullback=0.15)


def test_gather_nd_over_two_batch_axes() -> None:
    check_op("GatherND", Activation((3, 2, 4, 5), mean=0.5), drawn(4, 3, 2, 6, 1), batch_dims=2, pullback=0.2)
