"""Activation functions: every row against what the operator does."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

CASES = [
    ("Relu", {}),
    ("LeakyRelu", {}),
    ("LeakyRelu", {"alpha": 0.3}),
    ("LeakyRelu", {"alpha": -0.5}),
    ("Elu", {}),
    ("Elu", {"alpha": 2.0}),
    ("Selu", {}),
    ("Selu", {"alpha": 1.0, "gamma": 2.0}),
    ("Celu", {}),
    ("Celu", {"alpha": 0.5}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("Erf", {}),
    ("HardSigmoid", {}),
    ("HardSigmoid", {"alpha": 0.5, "beta": 0.2}),
    ("HardSigmoid", {"alpha": -0.5, "beta": 0.2}),
    ("HardSwish", {}),
    ("ThresholdedRelu", {}),
    ("ThresholdedRelu", {"alpha": 0.4}),
    ("Shrink", {}),
    ("Shrink", {"lambd": 0.3, "bias": 0.2}),
    ("Shrink", {"lambd": 0.5, "bias": 2.0}),
    ("Softplus", {}),
    ("Softsign", {}),
    ("Mish", {}),
    ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}),
]
INPUTS = [
    Activation((8, 4, 5, 6)),
    Activation((64, 7), mean=-1.5, std=0.8),
    Activation((512,), mean=0.7, std=2.5, low=-12, high=12),
]


@pytest.mark.parametrize(("op", "attributes"), CASES)
@pytest.mark.parametrize("x", INPUTS, ids=["4d", "2d", "wide"])
def test_every_row(op: str, attributes: dict[str, float], x: Activation) -> None:
    check_op(op, x, **attributes)
