"""GridSample and AffineGrid."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

X = Activation((2, 3, 5, 6), mean=0.5)
GRID = Activation((2, 4, 7, 2), std=0.6, low=-1.63, high=1.63)
# Approximations: the points are taken as anywhere between elements, coordinates as normal.
LOOSE = 0.3


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
def test_grid_sample(mode: str, padding: str, aligned: int) -> None:
    moments = LOOSE if padding == "zeros" else None
    exact = mode != "nearest"  # there no gradient reaches the grid
    check_op(
        "GridSample",
        X,
        GRID,
        align_corners=aligned,
        moments=moments,
        pullback=LOOSE if moments and exact else None,
        wrt=(0, 1) if exact else (0,),
        mode=mode,
        padding_mode=padding,
    )


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_grid_sample_of_a_volume(padding: str) -> None:
    grid = Activation((2, 2, 3, 4, 3), std=0.5, low=-1.4, high=1.4)
    x = Activation((2, 2, 3, 4, 5))
    check_op("GridSample", x, grid, mode="linear", padding_mode=padding, moments=None, pullback=None)


def test_nearest_gives_the_grid_zeros() -> None:
    check_op("GridSample", X, GRID, mode="nearest", moments=None, pullback=None, wrt=(1,))


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("size", [(4, 3, 5, 6), (4, 2, 3, 4, 5)])
def test_affine_grid(size: tuple[int, ...], aligned: int) -> None:
    rank = len(size) - 2
    theta = Activation((4, rank, rank + 1), mean=0.3)
    check_op("AffineGrid", theta, np.array(size, np.int64), align_corners=aligned)
