"""Activation functions: every row against what the operator does."""

import numpy as np
import onnx_ir as ir
import pytest

from gradlint.domain import Gradient, Moments
from gradlint.ops.activation import active_share, saturated_share
from gradlint.quadrature import spectrum
from gradlint.testing import Activation, check_op
from gradlint.transfer import ELEMENTWISE, MOMENTS, PULLBACK, derivative

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
    check_op("Clip", x, *limits, pullback=None, proof=False)


@pytest.mark.parametrize("slope", [(1,), (4, 1, 1), (4, 5, 6), (6,)])
def test_prelu(slope: tuple[int, ...]) -> None:
    check_op("PRelu", Activation((8, 4, 5, 6), mean=-0.3), RNG.uniform(0.1, 0.6, slope).astype(np.float32))


def test_prelu_after_a_dense_layer() -> None:
    check_op("PRelu", Activation((64, 7)), RNG.uniform(-0.5, 0.6, 7).astype(np.float32))


# -- shares of flat and of active units --------------------------------------------------------------------------------


def _node(op: str, **attributes: float) -> ir.Node:
    return ir.node(op, [ir.Value(name="z")], attributes)


def _normal(mean: float, std: float) -> Moments:
    return Moments.normal(2, mean, std**2)


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "HardSigmoid", "Gelu", "Relu", "Softsign", "Elu"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 20.0), (-4.0, 1.5), (2.0, 300.0)])
def test_saturated_share_is_that_of_samples(op: str, mean: float, std: float) -> None:
    node = _node(op)
    _, df, top = derivative(op, node)
    assert top is not None
    slopes = np.abs(df(np.random.default_rng(6).normal(mean, std, 1_000_000)))
    found = saturated_share(op, node, _normal(mean, std))
    np.testing.assert_allclose(found, np.mean(slopes < 0.05 * top), atol=0.002)


def test_active_share_of_a_dying_unit() -> None:
    found = active_share("Relu", _node("Relu"), Moments(np.array([[0.0, -3.0, -6.0]]), *3 * [np.array([[1 / 3]])]))
    np.testing.assert_allclose(found[0], [0.5, 1.3498980e-3, 9.8658765e-10], rtol=1e-6)
    assert active_share("LeakyRelu", _node("LeakyRelu"), _normal(-6, 1)) == 1


def test_exp_has_no_largest_slope() -> None:
    assert derivative("Exp", _node("Exp"))[2] is None
    assert saturated_share("Exp", _node("Exp"), _normal(0, 1)) == 0


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "Gelu", "Softplus", "Mish", "Elu"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 20.0), (30.0, 20.0), (-50.0, 400.0), (0.0, 3.0), (-4.0, 0.3)])
def test_saturating_units_keep_their_accuracy(op: str, mean: float, std: float) -> None:
    node, x = _node(op), _normal(mean, std)
    f, df, _ = derivative(op, node)
    z = mean + std * np.linspace(-9, 9, 2_000_001)
    w = np.exp(-0.5 * np.linspace(-9, 9, 2_000_001) ** 2)
    y = MOMENTS[op](None, node, [x])[0]
    g = PULLBACK[op](None, node, [x], [y], [Gradient(np.zeros((1, 1)), np.ones((1, 1)))])[0]
    np.testing.assert_allclose(y.second, np.average(f(z) ** 2, weights=w), rtol=0.02)
    np.testing.assert_allclose(y.mean, np.average(f(z), weights=w), rtol=0.02, atol=0.01 * np.sqrt(y.second.item()))
    np.testing.assert_allclose(g.total, np.average(df(z) ** 2, weights=w), rtol=0.02)


@pytest.mark.parametrize("op", sorted(ELEMENTWISE))
def test_no_function_overflows_noisily(op: str) -> None:
    if op in {"PRelu", "Clip"}:
        return
    rule, node, z = ELEMENTWISE[op], _node(op.split(":")[-1]), np.array([-1e5, -800.0, -30.0, 30.0, 800.0, 1e5])
    with np.errstate(all="raise", under="ignore"):
        f, df = rule.functions(node)
        if not rule.positive and op not in {"Exp", "Sinh", "Cosh"}:
            assert np.isfinite(f(z)).all()
            assert np.isfinite(df(z)).all()


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "Gelu", "Elu", "HardSwish"])
@pytest.mark.parametrize(("spread", "scale"), [(0.3, 0.5), (1.0, 2.0), (5.0, 20.0)])
def test_wide_layers_are_tabulated(op: str, spread: float, scale: float) -> None:
    rng = np.random.default_rng(7)
    mean, var = rng.normal(0, spread, 8192), (scale * rng.uniform(0.5, 1.5, 8192)) ** 2
    for h in ELEMENTWISE[op].functions(_node(op)):
        kinked, kinks = ELEMENTWISE[op].kinked, ELEMENTWISE[op].critical(_node(op))
        table = spectrum(h, mean, var, kinked=kinked, kinks=kinks)
        exact = spectrum(h, mean, var, kinked=kinked, kinks=kinks, per_unit=True)
        np.testing.assert_allclose(table.second, exact.second, rtol=0.02)
        np.testing.assert_allclose(table.mean, exact.mean, atol=0.01 * np.sqrt(exact.second).max())
        np.testing.assert_allclose(
            table.second - table.mean**2, exact.second - exact.mean**2, rtol=0.05, atol=1e-3 * exact.second.max()
        )
