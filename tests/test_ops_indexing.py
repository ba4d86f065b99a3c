"""Operators that select by index."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(3)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def drawn(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high, shape)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    "index",
    [np.array(2), np.array(-1), ints(1, 2), ints(2, 0, 3, 1), ints(0, -1, 3, 3), ints(1, 0, 2, 2).reshape(2, 2)],
)
def test_gather(axis: int, index: np.ndarray) -> None:
    check_op("Gather", Activation((4, 4, 4), mean=0.5), index.astype(np.int64), axis=axis, pullback=0.15)


def test_gather_of_a_permutation() -> None:
    check_op("Gather", Activation((8, 5, 4), mean=0.5), ints(3, 0, 4, 1, 2), axis=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_elements(axis: int) -> None:
    shape = (6, 5, 3)
    index = drawn(shape[axis], *(7 if k == axis else n for k, n in enumerate(shape)))
    check_op("GatherElements", Activation(shape, mean=0.5), index - (axis == 1), axis=axis, pullback=0.2)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_gather_nd(batch: int, depth: int) -> None:
    index = drawn(3, 6, 5, depth) - 1 if batch else drawn(3, 9, depth)
    check_op("GatherND", Activation((6, 3, 4, 5), mean=0.5), index, batch_dims=batch, pullback=0.15)


def test_gather_nd_over_two_batch_axes() -> None:
    check_op("GatherND", Activation((3, 2, 4, 5), mean=0.5), drawn(4, 3, 2, 6, 1), batch_dims=2, pullback=0.2)


def test_gather_nd_of_one_number() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[5] x) => (float y) <int64[1] i = {-2}> { y = GatherND(x, i) }"""
    loaded = from_proto(parser.parse_model(text), "model", Path("."))
    canonicalize(loaded, Dims())
    found = estimate(loaded.graph, batch=1)
    assert not found.unmodelled
    assert found.moments[loaded.graph.outputs[0]].mean.shape == ()


# -- embeddings: ids that vary -----------------------------------------------------------------------------------------


def embedding(table: np.ndarray, ids: tuple[int, ...]) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (int64[{",".join(map(str, ids))}] ids) => (float[{",".join(map(str, (*ids, table.shape[1])))}] y)
    <float[{table.shape[0]},{table.shape[1]}] table = {{{",".join(map(str, table.reshape(-1)))}}}>
    {{ y = Gather(table, ids) }}"""
    return parser.parse_model(text)


def test_embedding_adds_the_gradients_of_equal_ids() -> None:
    table, ids = normal(5, 3), drawn(5, 40, 500)
    back = differentiate(embedding(table, ids.shape), wrt=["table"])
    g = normal(40, 500, 3)
    grad = session(back).run(["table.grad"], {"ids": ids, "y.cotangent": g})[0]
    expected = np.zeros((5, 3))
    np.add.at(expected, ids, g)
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-3)


def test_embedding_estimate() -> None:
    table, batch, length = normal(20, 3) + np.arange(3), 8, 50
    model = from_proto(embedding(table, (batch, length)), "model", Path("."))
    canonicalize(model, Dims())
    found = estimate(model.graph, batch=batch)
    y = found.moments[model.graph.outputs[0]]
    np.testing.assert_allclose(y.mean.reshape(-1), table.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(y.var.reshape(-1), table.var(axis=0), rtol=1e-5)
    grad = found.gradients[model.graph.initializers["table"]]
    np.testing.assert_allclose(np.mean(grad.total), length / 20)


# -- writing at indices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "add"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements(reduction: str, axis: int) -> None:
    shape = (6, 5, 4)
    index = np.argsort(RNG.random(shape), axis=axis)[:4, :3, :2]
    updates = Activation(index.shape, mean=1.0)
    check_op(
        "ScatterElements", Activation(shape, mean=0.5), index, updates, axis=axis, reduction=reduction, pullback=0.15
    )


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter_nd(reduction: str) -> None:
    index = np.array([[[0, 1], [3, -1]], [[2, 0], [5, 3]]])
    updates = Activation((2, 2, 4), mean=1.0)
    check_op("ScatterND", Activation((6, 5, 4), mean=0.5), index, updates, reduction=reduction, pullback=0.15)


@pytest.mark.parametrize("reduction", ["mul", "max", "min"])
def test_scatter_of_products_and_extremes_has_a_vjp(reduction: str) -> None:
    def check(op: str, index: np.ndarray, updates: tuple[int, ...]) -> None:
        inputs = Activation((6, 5, 4), mean=0.5), index, Activation(updates, mean=0.2)
        check_op(op, *inputs, reduction=reduction, moments=None, pullback=None)

    check("ScatterElements", np.zeros((6, 2, 4), np.int64), (6, 2, 4))
    check("ScatterND", np.array([[0, 1], [3, 2], [0, 1]]), (3, 4))


def test_scattered_products_with_zero_factors() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[3] x, float[5] u) => (float[3] y) <int64[5] i = {0, 0, 1, 2, 2}>
    { y = ScatterElements<reduction="mul">(x, i, u) }"""
    back = session(differentiate(parser.parse_model(text), wrt=["x", "u"]))
    x, u = np.array([2, 3, 5], np.float32), np.array([0, 7, 0, 0, 0], np.float32)
    dx, du = back.run(["x.grad", "u.grad"], {"x": x, "u": u, "y.cotangent": np.ones(3, np.float32)})
    np.testing.assert_allclose(dx, [0, 0, 0])
    np.testing.assert_allclose(du, [14, 0, 3, 0, 0])


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(mode: str) -> None:
    start = ints(1, 3) if mode == "linear" else ints(4, 3)
    cache, update = Activation((2, 3, 5, 4), mean=0.5), Activation((2, 3, 2, 4), mean=1.0)
    check_op("TensorScatter", cache, update, start, mode=mode, opset=24)


@pytest.mark.parametrize("axis", [-1, 1])
def test_one_hot_values(axis: int) -> None:
    depth = np.array(5, np.int64)
    check_op("OneHot", drawn(5, 6, 7), depth, Activation((2,)), axis=axis, moments=None, pullback=None, proof=False)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_compress_puts_back_what_it_kept(axis: int | None) -> None:
    condition = RNG.random(3 * 4 if axis is None else (3, 4)[axis]) < 0.6
    condition[0] = True
    given = "" if axis is None else f"<axis={axis}>"
    bits = ",".join(str(int(c)) for c in condition)
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[3,4] x) => (float y) <bool[{len(condition)}] c = {{{bits}}}> {{ y = Compress{given}(x, c) }}"""
    x = normal(3, 4)
    kept = np.compress(condition, x, axis)
    back = session(differentiate(parser.parse_model(text), wrt=["x"]))
    grad = back.run(["x.grad"], {"x": x, "y.cotangent": np.ones_like(kept)})[0]
    expected = np.zeros((3, 4))
    if axis is None:
        expected.reshape(-1)[condition] = 1
    else:
        np.moveaxis(expected, axis, 0)[condition] = 1
    np.testing.assert_array_equal(grad, expected)
