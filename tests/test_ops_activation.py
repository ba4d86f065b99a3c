"""Activation functions: every row against what the operator does."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(2)
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


SELF_GATED = [
    ("com.microsoft", "Gelu", {}),
    ("com.microsoft", "QuickGelu", {}),
    ("com.microsoft", "QuickGelu", {"alpha": 1.0}),
]


@pytest.mark.parametrize(("domain", "op", "attributes"), [*SELF_GATED, ("com.microsoft", "FastGelu", {})])
@pytest.mark.parametrize("x", INPUTS, ids=["4d", "2d", "wide"])
def test_fused_activations(domain: str, op: str, attributes: dict[str, float], x: Activation) -> None:
    check_op(op, x, domain=domain, **attributes)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
@pytest.mark.parametrize("shape", [(64, 7), (8, 5, 7)])
def test_gelu_with_a_bias(op: str, shape: tuple[int, ...]) -> None:
    check_op(op, Activation(shape, mean=0.2), RNG.standard_normal(7).astype(np.float32), domain="com.microsoft")


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5}, {"alpha": 2.0}])
@pytest.mark.parametrize("x", INPUTS, ids=["4d", "2d", "wide"])
def test_swish(attributes: dict[str, float], x: Activation) -> None:
    check_op("Swish", x, opset=24, **attributes)


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 6.0), (-0.5, 1.0), (-1.0, None), (None, 0.3), (None, None), (2.0, -1.0)])
@pytest.mark.parametrize("x", INPUTS, ids=["4d", "2d", "wide"])
def test_clip(lo: float | None, hi: float | None, x: Activation) -> None:
    limits = [None if v is None else np.array(v, np.float32) for v in (lo, hi)]
    check_op("Clip", x, *limits, wrt=(0,))


@pytest.mark.parametrize("slope", [(1,), (4, 1, 1), (4, 5, 6), (6,)])
def test_prelu(slope: tuple[int, ...]) -> None:
    check_op("PRelu", Activation((8, 4, 5, 6), mean=-0.3), RNG.uniform(0.1, 0.6, slope).astype(np.float32))


def test_prelu_after_a_dense_layer() -> None:
    check_op("PRelu", Activation((64, 7)), RNG.uniform(-0.5, 0.6, 7).astype(np.float32))
