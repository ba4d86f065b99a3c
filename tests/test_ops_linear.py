"""Matrix products."""

import numpy as np
import onnx
import pytest

from gradlint.ops.linear import operator_norm
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(1)


def normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return (std * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(8, 12), (8, 5, 12), (2, 3, 4, 12)])
def test_matmul_by_a_weight(shape: tuple[int, ...]) -> None:
    check_op("MatMul", Activation(shape, mean=0.5), normal(12, 7, std=0.3))


def test_matmul_by_a_large_weight_is_streamed() -> None:
    check_op("MatMul", Activation((4, 600)), normal(600, 500, std=0.03), vjp=False, proof=False, draws=20)


def test_matmul_by_a_weight_from_the_left() -> None:
    check_op("MatMul", normal(7, 5, std=0.3), Activation((8, 5, 6)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((8, 4, 6), (8, 6, 5)),
        ((8, 2, 4, 6), (8, 2, 6, 5)),
        ((8, 2, 4, 6), (8, 1, 6, 5)),
        ((8, 4, 6), (6, 5)),
    ],
)
def test_matmul_of_two_activations(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op(
        "MatMul",
        Activation(a, mean=0.3),
        Activation(b, mean=-0.2),
        moments=0.15,
        pullback=None if len(b) == 2 else 0.15,
    )


@pytest.mark.parametrize(
    ("a", "b"), [((6,), (6, 5)), ((4, 6), (6,)), ((6,), (6,)), ((3, 4, 6), (6,)), ((6,), (3, 6, 5))]
)
def test_matmul_of_vectors_has_a_vjp(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op("MatMul", Activation(a), Activation(b), moments=None, pullback=None)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1, 2, 4, 6), (2, 6, 5)),
        ((4, 6), (1, 1, 6, 5)),
        ((1, 3, 4, 6), (2, 1, 1, 6, 5)),
        ((3, 1, 4, 6), (1, 2, 6, 5)),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_matmul_of_stacks_that_are_broadcast(a: tuple[int, ...], b: tuple[int, ...], symbolic: bool) -> None:
    """dA = G B^T and dB = A^T G, summed over what was broadcast, in the operands' own shapes."""
    named = {n: [f"{n}{k}" for k in range(len(s))] if symbolic else s for n, s in (("a", a), ("b", b))}
    inputs = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in named.items()]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["y"])],
        "product",
        inputs,
        [onnx.helper.make_tensor_value_info("y", 1, [None] * max(len(a), len(b)))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    x, w = normal(*a), normal(*b)
    g = normal(*(x @ w).shape)
    feed = {"a": x, "b": w, "y.cotangent": g}
    da, db = session(differentiate(model)).run(["a.grad", "b.grad"], feed)
    for found, shape, full in ((da, a, g @ w.swapaxes(-1, -2)), (db, b, x.swapaxes(-1, -2) @ g)):
        lead = full.ndim - len(shape)
        axes = tuple(k for k in range(full.ndim - 2) if k < lead or shape[k - lead] == 1)
        assert found.shape == shape
        np.testing.assert_allclose(found, full.sum(axes).reshape(shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "alpha": 2.0}])
def test_gemm(attributes: dict[str, float]) -> None:
    w = normal(12, 7, std=0.3)
    check_op(
        "Gemm", Activation((8, 12), mean=0.5), w.T.copy() if attributes.get("transB") else w, normal(7), **attributes
    )


def test_gemm_transposed_input() -> None:
    check_op("Gemm", Activation((8, 12)), normal(8, 7), normal(12, 1), transA=1, moments=None, pullback=None)


@pytest.mark.parametrize("shape", [(64, 32), (600, 700), (1024, 1024)])
def test_the_operator_norm_is_an_upper_bound_within_a_decade(shape: tuple[int, int]) -> None:
    w = normal(*shape, std=shape[0] ** -0.5)
    true = float(np.linalg.norm(w.astype(np.float64), 2))
    assert true <= operator_norm(w) < 10 * true


@pytest.mark.parametrize(
    ("shape", "scale"), [((64, 32), 1e30), ((100, 3000), 1.0), ((3000, 100), 1e-30), ((512, 512), 1.0)]
)
def test_the_operator_norm_of_a_small_or_narrow_matrix_is_exact(shape: tuple[int, int], scale: float) -> None:
    w = normal(*shape, std=scale)
    assert operator_norm(w) == pytest.approx(float(np.linalg.norm(w.astype(np.float64), 2)), rel=1e-8)


@pytest.mark.parametrize(("odd", "norm"), [(0.0, 0.0), (np.inf, np.inf), (np.nan, np.inf)])
def test_the_operator_norm_of_what_is_no_number_is_infinite(odd: float, norm: float) -> None:
    assert operator_norm(np.full((3, 4), odd, np.float32)) == norm
