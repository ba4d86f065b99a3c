"""Estimates beyond the normal approximation: rectified sums, gradients that go along with values, records."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gradlint.canonical import Dims, canonicalize
from gradlint.domain import Gradient, Moments
from gradlint.estimate import Estimate, estimate
from gradlint.load import from_proto
from gradlint.quadrature import halves, pieces, third_moments
from gradlint.reverse import differentiate
from gradlint.testing import session

BATCH, CHANNELS, SIZE, BLOCKS = 4, 32, 8, 6
RELU, STEP = pieces((0.0,), (0.0, 1.0), (0.0, 0.0))


def built(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", 1, [BATCH, CHANNELS, SIZE, SIZE])
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "stream", [x], [helper.make_empty_tensor_value_info("y")], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def estimated(model: onnx.ModelProto) -> tuple[Estimate, dict[str, object]]:
    loaded = from_proto(model, "stream", Path("."))
    canonicalize(loaded, Dims())
    values = {str(v.name): v for n in loaded.graph for v in [*n.inputs, *n.outputs] if v is not None}
    return estimate(loaded.graph, batch=BATCH, mode="eval"), values


def ratios(model: onnx.ModelProto, names: list[str], draws: int = 30) -> dict[str, float]:
    """log10 of the estimated over the sampled RMS of weights' gradients."""
    runner, rng = session(differentiate(model, wrt=names)), np.random.default_rng(1)
    squares = []
    for _ in range(draws):
        feed = {v.name: rng.standard_normal(v.shape).astype(np.float32) for v in runner.get_inputs()}
        feed["y.cotangent"] /= np.float32(BATCH**0.5)
        found = runner.run([f"{n}.grad" for n in names], feed)
        squares.append([np.mean(np.square(g, dtype=np.float64)) for g in found])
    found, values = estimated(model)
    truth = np.sqrt(np.mean(squares, axis=0))
    return {n: float(np.log10(found.grad_rms(values[n]) / t)) for n, t in zip(names, truth, strict=True)}


def kernel(rng: np.random.Generator, gain: float, size: int = 1) -> np.ndarray:
    return gain * rng.standard_normal((CHANNELS, CHANNELS, size, size)) / np.sqrt(CHANNELS * size * size)


def stream() -> onnx.ModelProto:
    """r = Relu(r + 0.3 Conv(r)), six times, behind a rectified convolution."""
    rng = np.random.default_rng(0)
    weights = {f"w{k}": kernel(rng, 0.3 if k else 1.0) for k in range(BLOCKS + 1)}
    nodes = [helper.make_node("Conv", ["x", "w0"], ["z0"]), helper.make_node("Relu", ["z0"], ["r0"])]
    for k in range(1, BLOCKS + 1):
        nodes.append(helper.make_node("Conv", [f"r{k - 1}", f"w{k}"], [f"b{k}"]))
        nodes.append(helper.make_node("Add", [f"r{k - 1}", f"b{k}"], [f"z{k}"]))
        nodes.append(helper.make_node("Relu", [f"z{k}"], ["y" if k == BLOCKS else f"r{k}"]))
    return built(nodes, weights)


def test_a_rectified_stream_keeps_its_moments() -> None:
    model = stream()
    model.graph.output.extend(helper.make_empty_tensor_value_info(f"r{k}") for k in range(BLOCKS))
    rng, (found, values) = np.random.default_rng(2), estimated(model)
    xs = [rng.standard_normal((BATCH, CHANNELS, SIZE, SIZE)).astype(np.float32) for _ in range(30)]
    rows = [session(model).run(["r5", "y"], {"x": x}) for x in xs]
    for k, name in enumerate(("r5", "y")):
        sample = np.concatenate([row[k] for row in rows])
        moments = found.moments[values[name]]
        assert np.mean(moments.mean) == pytest.approx(sample.mean(), rel=0.05)
        assert np.mean(moments.var) == pytest.approx(sample.var(axis=(0, 2, 3)).mean(), rel=0.06)


def test_what_a_relu_lets_through_the_next_lets_through_more_often() -> None:
    """The gradient at the first weight passes seven Relus: taken as independent it would come 0.06 short."""
    off = ratios(stream(), [f"w{k}" for k in range(BLOCKS + 1)])
    assert {n: round(d, 2) for n, d in off.items() if abs(d) > 0.035} == {}


@pytest.mark.parametrize("pooled", [False, True], ids=["Relu", "Relu and MaxPool"])
def test_a_gradient_alike_everywhere_goes_along_with_what_is_rectified(pooled: bool) -> None:
    """Behind the average all positions get the same gradient, and where z is large more of it comes through: a
    scale's gradient adds up over the positions."""
    rng = np.random.default_rng(0)
    ones, zeros = np.ones(CHANNELS), np.zeros(CHANNELS)
    weights = {"w": kernel(rng, 1.0, 3), "gamma": ones, "beta": zeros, "mean": zeros, "var": ones}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
    ]
    if pooled:
        nodes.append(helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]))
    nodes.append(helper.make_node("GlobalAveragePool", ["p" if pooled else "r"], ["y"]))
    off = ratios(built(nodes, weights), ["gamma", "beta", "w"], 60)
    assert {n: round(d, 2) for n, d in off.items() if abs(d) > 0.13} == {}


def recorded(factor: float, mean: float = 0.5) -> Moments:
    """Moments behind a BatchNormalization whose records are `factor` times the variance the estimate finds."""
    w = kernel(np.random.default_rng(0), 1.0)
    var = factor * np.square(w).sum(axis=(1, 2, 3))
    weights = {"w": w, "gamma": np.ones(CHANNELS), "beta": np.zeros(CHANNELS), "var": var}
    weights["mean"] = np.full(CHANNELS, mean)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], epsilon=1e-9),
    ]
    found, values = estimated(built(nodes, weights))
    return found.moments[values["y"]]


def test_running_statistics_are_records_of_the_input() -> None:
    y = recorded(1.5)
    np.testing.assert_allclose(y.var, 1.0, rtol=1e-6)
    np.testing.assert_allclose(y.mean, 0.0, atol=1e-6)


def test_running_statistics_of_other_data_are_not_believed() -> None:
    y = recorded(10.0, mean=0.0)
    np.testing.assert_allclose(y.var, 0.1, rtol=1e-3)


def test_moments_of_a_rectified_sum() -> None:
    """max(z, 0) for z = 0.7 max(u, 0) + 0.3 b - 0.1, against a sample."""
    rng = np.random.default_rng(0)
    u, b = rng.standard_normal((2, 1_000_000))
    z = 0.7 * np.maximum(u, 0) + 0.3 * b - 0.1
    mean, var = np.array([z.mean()]), np.array([z.var()])
    skew = np.array([np.mean((z - z.mean()) ** 3)])
    y = np.maximum(z, 0)
    truth = (y.mean(), np.mean(y**2), np.mean((y - y.mean()) ** 3))
    np.testing.assert_allclose(np.ravel(third_moments(RELU, mean, var, skew)), truth, rtol=0.01)
    lower, upper = halves(STEP, mean, var, skew)
    np.testing.assert_allclose([lower[0], upper[0]], [np.mean(z[u < 0] > 0), np.mean(z[u > 0] > 0)], atol=0.01)


def test_the_upper_half_of_a_sum_of_branches() -> None:
    """A branch that says nothing of the halves counts as alike in both."""
    one = np.ones((1, 2))
    total = Gradient(0 * one, 2 * one, upper=3 * one) + Gradient(0 * one, one)
    np.testing.assert_allclose(total.upper, 4.0)
    np.testing.assert_allclose(total.scaled(4.0).upper, 16.0)
