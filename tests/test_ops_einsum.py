"""Einsum in all its spellings, and onnxruntime's fused matrix products."""

import numpy as np
import pytest

from gradlint.ops.einsum import parse
from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return (0.4 * RNG.standard_normal(shape)).astype(np.float32)


def test_an_equation_is_spelled_out() -> None:
    assert parse("...ij , ...jk", (4, 3)).operands == ("ABij", "Bjk")
    assert parse("...ij , ...jk", (4, 3)).out == "ABik"
    assert parse("ba", (2,)).out == "ab"
    assert parse("ii", (2,)).out == ""


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("btd,de->bte", (4, 5, 6), (6, 7)),
        ("...d,de->...e", (4, 5, 6), (6, 7)),
        ("btd,dhe->bhte", (4, 5, 6), (6, 2, 3)),
        ("btd,d->btd", (4, 5, 6), (6,)),
        ("btd,d->bt", (4, 5, 6), (6,)),
        ("bd,ed->be", (8, 6), (7, 6)),
        ("bd,cde->bc", (8, 6), (7, 6, 3)),
    ],
)
def test_by_a_weight(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    check_op("Einsum", Activation(x, mean=0.3), normal(*w), equation=equation)


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bhqd,bhkd->bhqk", (4, 2, 5, 8), (4, 2, 6, 8)),
        ("bhqk,bhkd->bhqd", (4, 2, 5, 6), (4, 2, 6, 8)),
        ("bij,bij->bij", (4, 3, 5), (4, 3, 5)),
        ("bi,bj->bij", (4, 3), (4, 5)),
        ("bij,bkj", (4, 3, 5), (4, 6, 5)),
        ("...ij,...jk->...ik", (4, 2, 3, 5), (4, 1, 5, 6)),
        ("bij,b->b", (4, 3, 5), (4,)),
    ],
)
def test_of_two_activations(equation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op("Einsum", Activation(a), Activation(b), equation=equation, moments=0.15, pullback=0.15)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bij->bji", (4, 3, 5)),
        ("bij->b", (4, 3, 5)),
        ("bij->bj", (4, 3, 5)),
        ("...ij->...i", (4, 3, 5)),
        ("bii->bi", (4, 5, 5)),
        ("bii->b", (4, 5, 5)),
        ("bij", (4, 3, 5)),
    ],
)
def test_of_one_operand(equation: str, shape: tuple[int, ...]) -> None:
    check_op("Einsum", Activation(shape), equation=equation)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bi,ij,bj->b", [(4, 3), (3, 5), (4, 5)]),
        ("bi,bj,bk->bijk", [(4, 3), (4, 2), (4, 5)]),
        ("ii,i->", [(4, 4), (4,)]),
        ("iij,jk->ik", [(4, 4, 3), (3, 2)]),
        ("i...,i...->...", [(4, 1), (4, 5)]),
        ("iii->i", [(3, 3, 3)]),
    ],
)
def test_gradients_of_unusual_equations(equation: str, shapes: list[tuple[int, ...]]) -> None:
    check_op("Einsum", *(Activation(s) for s in shapes), equation=equation, moments=None, pullback=None)


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5}, {"transB": 1}, {"transA": 1, "alpha": 2.0}])
def test_fused_matrix_product_of_two_activations(attributes: dict[str, float]) -> None:
    a, b = Activation((8, 5, 5)), Activation((8, 5, 5))
    check_op("FusedMatMul", a, b, domain="com.microsoft", moments=0.15, pullback=0.15, **attributes)
