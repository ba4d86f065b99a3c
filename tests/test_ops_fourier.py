"""DFT."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op


@pytest.mark.parametrize(
    ("shape", "length", "axis", "attributes"),
    [
        ((2, 6, 1), None, 1, {}),
        ((2, 6, 2), None, 1, {}),
        ((2, 6, 2), 8, 1, {}),
        ((2, 6, 2), 4, -2, {}),
        ((5, 3, 1), None, 0, {}),
        ((2, 6, 1), None, 1, {"onesided": 1}),
        ((2, 7, 1), None, 1, {"onesided": 1}),
        ((2, 6, 1), 9, 1, {"onesided": 1}),
        ((2, 6, 2), None, 1, {"inverse": 1}),
        ((2, 5, 2), 7, 1, {"inverse": 1}),
    ],
)
def test_transform(shape: tuple[int, ...], length: int | None, axis: int, attributes: dict[str, int]) -> None:
    given = None if length is None else np.array(length, np.int64)
    check_op(
        "DFT", Activation(shape), given, np.array(axis, np.int64), moments=None, pullback=None, proof=False,
        **attributes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((8, 6, 1), {}),
        ((8, 6, 2), {}),
        ((8, 7, 1), {"onesided": 1}),
        ((8, 6, 2), {"inverse": 1}),
    ],
)
def test_estimate_of_the_transform(shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    check_op("DFT", Activation(shape), None, np.array(1, np.int64), vjp=False, pullback=None, proof=False, **attributes)
    check_op("DFT", Activation(shape), None, np.array(1, np.int64), moments=0.2, proof=False, **attributes)
