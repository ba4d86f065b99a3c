"""Elementary functions, selections, and operators without a gradient."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op
from gradlint.transfer import BLOCKED

RNG = np.random.default_rng(4)
EVERYWHERE = ["Neg", "Abs", "Exp", "Sin", "Cos", "Atan", "Sinh", "Cosh", "Asinh"]
POSITIVE = ["Log", "Sqrt", "Reciprocal"]
SMALL = ["Asin", "Acos", "Atanh", "Tan"]


@pytest.mark.parametrize("op", EVERYWHERE)
@pytest.mark.parametrize(
    "x",
    [Activation((8, 4, 5, 6), std=0.7, low=-3, high=3), Activation((64, 7), mean=-1, std=0.5, low=-3, high=3)],
    ids=["4d", "2d"],
)
def test_functions(op: str, x: Activation) -> None:
    check_op(op, x)


@pytest.mark.parametrize("op", POSITIVE)
@pytest.mark.parametrize(
    "x", [Activation((8, 4, 5), mean=2, std=0.4, low=0.8), Activation((64, 7), mean=0.5, std=0.05, low=0.25)]
)
def test_functions_of_positive_values(op: str, x: Activation) -> None:
    check_op(op, x)


@pytest.mark.parametrize("op", SMALL)
def test_functions_with_a_small_domain(op: str) -> None:
    check_op(op, Activation((8, 4, 5), mean=0.1, std=0.2, low=-0.8, high=0.8))


def test_acosh() -> None:
    check_op("Acosh", Activation((8, 4, 5), mean=3, std=0.3, low=1.5))


@pytest.mark.parametrize("op", ["Sign", "Floor", "Ceil", "Round"])
def test_steps_have_moments_but_no_gradient(op: str) -> None:
    check_op(op, Activation((8, 4, 5), mean=0.3, std=1.3), vjp=False)
    assert op in BLOCKED


@pytest.mark.parametrize("op", ["Max", "Min"])
@pytest.mark.parametrize("c", [(), (4, 1, 1), (6,)])
def test_extremes_with_a_constant(op: str, c: tuple[int, ...]) -> None:
    check_op(op, Activation((8, 4, 5, 6)), RNG.standard_normal(c).astype(np.float32), wrt=(0,))


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_extremes_of_activations(op: str) -> None:
    check_op(op, Activation((64, 7)))
    check_op(op, Activation((64, 7)), Activation((64, 7), mean=0.5, std=2))
    check_op(op, Activation((64, 7)), Activation((64, 7), mean=0.5, std=2), Activation((64, 1), mean=0.3))
    check_op(op, Activation((8, 4, 5)), Activation((8, 4, 5)), Activation((8, 4, 5)), Activation((8, 4, 5)))


CONDITIONS = [(8, 4, 5, 6), (1, 4, 1, 1), (5, 6), ()]


@pytest.mark.parametrize("shape", CONDITIONS)
def test_where(shape: tuple[int, ...]) -> None:
    condition = RNG.random(shape) < 0.4
    a, b = Activation((8, 4, 5, 6), mean=0.5), Activation((8, 4, 5, 6), mean=-0.5, std=2)
    check_op("Where", condition, a, b, wrt=(1, 2), moments=0.1)


def test_where_broadcasts() -> None:
    condition = RNG.random((5, 6)) < 0.4
    check_op("Where", condition, Activation((8, 4, 5, 6), mean=0.5), np.array(0.3, np.float32), wrt=(1,))
    check_op("Where", condition, Activation((8, 4, 1, 1), mean=0.5), Activation((8, 4, 5, 6)), wrt=(1, 2))


def test_mod_away_from_its_jumps() -> None:
    divisor = np.array(1.3, np.float32)
    check_op("Mod", Activation((8, 4, 5), std=0.3, low=-1.2, high=1.2), divisor, fmod=1, pullback=None)
    x = Activation((8, 4, 5), mean=2, std=0.1, low=1.5, high=2.5)
    check_op("Mod", x, divisor, fmod=1, moments=None, pullback=None)
    check_op("Mod", x, Activation((4, 5), mean=1.2, std=0.1, low=1.1, high=1.4), fmod=1, moments=None, pullback=None)


def test_remainders_have_moments() -> None:
    check_op("Mod", Activation((8, 4, 5), mean=0.5, std=3), np.array(1.3, np.float32), fmod=1, vjp=False)
