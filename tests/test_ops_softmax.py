"""Softmax, LogSoftmax, Hardmax."""

import numpy as np
import onnx
import pytest

from gradlint.domain import Moments
from gradlint.ops.softmax import describe
from gradlint.ops.softmax_weights import weights
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

CASES = [((8, 10), -1, 1.0), ((8, 3), 1, 2.0), ((4, 6, 5), 1, 0.5), ((2, 3, 16, 16), -1, 1.5), ((4, 6, 5), -2, 0.1)]


@pytest.mark.parametrize(("shape", "axis", "std"), CASES)
def test_softmax(shape: tuple[int, ...], axis: int, std: float) -> None:
    check_op("Softmax", Activation(shape, mean=0.5, std=std), axis=axis)


@pytest.mark.parametrize(("shape", "axis", "std"), CASES)
def test_log_softmax(shape: tuple[int, ...], axis: int, std: float) -> None:
    check_op("LogSoftmax", Activation(shape, mean=0.5, std=std), axis=axis)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_one_class_has_no_gradient(op: str) -> None:
    check_op(op, Activation((4, 1)))


def test_before_opset_13_all_axes_from_the_given_one_are_one() -> None:
    def model(shape: str, opset: int) -> onnx.ModelProto:
        graph = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Softmax<axis: int = 1>(x) }}"
        return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {graph}')

    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 4, 15)).astype(np.float32)
    flat = session(differentiate(model("4, 15", 21))).run(["x.grad"], {"x": x, "y.cotangent": g})[0]
    feed = {"x": x.reshape(4, 3, 5), "y.cotangent": g.reshape(4, 3, 5)}
    old = session(differentiate(model("4, 3, 5", 11))).run(["x.grad"], feed)[0]
    np.testing.assert_allclose(old.reshape(4, 15), flat, rtol=1e-5, atol=1e-7)


def test_hardmax_has_no_gradient() -> None:
    check_op("Hardmax", Activation((8, 10)), pullback=None, vjp=False)


@pytest.mark.parametrize("n", [2, 10, 197, 1000])
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 2.0, 3.0, 6.0])
def test_weights_agree_with_sampled_softmax(n: int, s: float) -> None:
    z = s * np.random.default_rng(0).standard_normal((4000, n))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    log_sum = np.log(p.sum(axis=1)) + z.max(axis=1)
    p /= p.sum(axis=1, keepdims=True)
    squares = (p**2).sum(axis=1)
    found = weights(n, s)
    assert found.squares == pytest.approx(squares.mean(), rel=0.05)
    assert found.own == pytest.approx((p**2 * (1 - p) ** 2).sum(axis=1).mean(), rel=0.05)
    assert found.cross == pytest.approx((squares**2 - (p**4).sum(axis=1)).mean(), rel=0.1)
    assert found.excess + np.log(n) == pytest.approx(log_sum.mean(), rel=0.02, abs=0.1)


def test_a_variance_that_rounding_left_below_zero_is_none() -> None:
    one = np.ones((1, 1))
    row = describe(Moments(0 * one, -4e-21 * one, 8e-21 * one, 3e-21 * one), 1, 17)
    assert row.std == 0
    assert row.mean == pytest.approx(1 / 17)
