"""Broadcasting arithmetic, and products of values that depend on each other."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(3)


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return (mean + std * RNG.standard_normal(shape)).astype(np.float32)


def draws(shape: tuple[int, ...]) -> int:
    """A gradient of few elements needs more of them."""
    return 200 if np.prod(shape) > 20 else 2000


CONSTANTS = [
    ((8, 4, 5, 6), (4, 1, 1)),
    ((8, 4, 5, 6), ()),
    ((8, 4, 5, 6), (6,)),
    ((8, 4, 5, 6), (1, 1, 5, 6)),
    ((64, 7), (7,)),
    ((64, 7), (1,)),
    ((8, 5, 7), (7,)),
    ((8, 5, 7), (1, 5, 7)),
    ((8, 5, 1), (7,)),
    ((32, 7), (2, 1, 7)),
]
PAIRS = [
    ((8, 4, 5, 6), (8, 4, 5, 6)),
    ((8, 4, 5, 6), (8, 4, 1, 1)),
    ((8, 5, 7), (8, 5, 1)),
    ((8, 1, 7), (8, 5, 1)),
    ((64, 7), (64, 7)),
]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Sum"])
@pytest.mark.parametrize(("x", "c"), CONSTANTS)
def test_with_a_constant(op: str, x: tuple[int, ...], c: tuple[int, ...]) -> None:
    check_op(op, Activation(x, mean=0.5), normal(*c, mean=0.3), draws=draws(c))
    check_op(op, normal(*c, mean=0.3), Activation(x, mean=0.5), draws=draws(c))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Sum"])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_of_two_activations(op: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op(op, Activation(a, mean=0.5), Activation(b, mean=-0.7, std=0.6))
    check_op(op, Activation(b, mean=0.5), Activation(a, mean=-0.7, std=0.6))


@pytest.mark.parametrize(("x", "c"), CONSTANTS)
def test_quotient_with_a_constant(x: tuple[int, ...], c: tuple[int, ...]) -> None:
    divisor = RNG.uniform(0.7, 1.5, c).astype(np.float32)
    check_op("Div", Activation(x, mean=0.5), divisor, draws=draws(c))
    check_op("Div", divisor, Activation(x, mean=2.0, std=0.3, low=1.0), draws=draws(c))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_quotient_of_two_activations(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op("Div", Activation(a, mean=0.5), Activation(b, mean=2.0, std=0.3, low=1.0))
    check_op("Div", Activation(b, mean=0.5), Activation(a, mean=2.0, std=0.3, low=1.0))


@pytest.mark.parametrize("exponent", [2.0, 3.0, 1.0, 0.0, 4.0])
def test_whole_powers(exponent: float) -> None:
    check_op("Pow", Activation((64, 7), mean=0.5), np.array(exponent, np.float32), wrt=(0,))


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1.0, -2.0, 1.5])
def test_powers_of_what_is_positive(exponent: float) -> None:
    x = Activation((8, 4, 5), mean=2.0, std=0.3, low=0.9)
    check_op("Pow", x, np.array(exponent, np.float32), wrt=(0,))


def test_power_with_a_whole_exponent_of_integer_type() -> None:
    check_op("Pow", Activation((8, 4, 5)), np.array(3, np.int64))
    check_op("Pow", Activation((8, 4, 5)), np.array([1, 2, 3, 2, 1], np.int64))


def test_power_of_two_activations() -> None:
    check_op(
        "Pow",
        Activation((8, 4, 5), mean=2.0, std=0.2, low=0.9),
        Activation((8, 4, 5), mean=1.5, std=0.3),
        moments=0.15,
        pullback=0.15,
    )
    check_op("Pow", np.array(1.7, np.float32), Activation((8, 4, 5)), wrt=(1,))


@pytest.mark.parametrize("c", [(4, 1, 1), (), (1, 4, 5, 6)])
def test_mean(c: tuple[int, ...]) -> None:
    check_op("Mean", Activation((8, 4, 5, 6), mean=0.5), normal(*c, mean=0.3), Activation((8, 4, 5, 6)), draws=draws(c))
