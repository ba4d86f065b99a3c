"""The sample models: rebuilt to the same bytes, valid, small, runnable, each with the property it is there to show."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
SAMPLES = [
    "digits_sigmoid",
    "digits_relu",
    "digits_leaky_relu",
    "sigmoid_chain_50",
    "resnet_bn",
    "dead_relu",
    "exploding_mlp",
    "rnn_200",
    "lstm_200",
]
SLOPES = {
    "Sigmoid": lambda z, attributes: np.exp(-z) / (1 + np.exp(-z)) ** 2,
    "Relu": lambda z, attributes: z > 0,
    "LeakyRelu": lambda z, attributes: np.where(z > 0, 1, attributes["alpha"]),
}
VALUES = {
    "Sigmoid": lambda z, attributes: 1 / (1 + np.exp(-z)),
    "Relu": lambda z, attributes: np.maximum(z, 0),
    "LeakyRelu": lambda z, attributes: np.where(z > 0, z, attributes["alpha"] * z),
}


def load(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The model, its initializers in float64, and its data."""
    model = onnx.load(FOLDER / f"{name}.onnx")
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    with np.load(FOLDER / f"{name}.npz") as stored:
        return model, weights, dict(stored)


def run(name: str, inputs: np.ndarray, *values: str) -> list[np.ndarray]:
    """The logits by onnxruntime, then the named intermediate values."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    model = onnx.load(FOLDER / f"{name}.onnx")
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"input": inputs})]


def mlp_gradients(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values by node name, and gradients of the mean cross-entropy by node, weight and input name, in float64."""
    model, weights, data = load(name)
    values: dict[str, np.ndarray] = {"input": data["input"].astype(np.float64)}
    attributes: dict[str, dict[str, Any]] = {}
    for node in model.graph.node:
        attributes[node.name] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        x = values[node.input[0]]
        if node.op_type == "Gemm":
            values[node.output[0]] = x @ weights[node.input[1]].T + weights[node.input[2]]
        else:
            values[node.output[0]] = VALUES[node.op_type](x, attributes[node.name])
    logits, target = values["logits"], data["target"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    gradients = {"logits": (probabilities - np.eye(10)[target]) / len(target)}
    for node in reversed(model.graph.node):
        x, cotangent = values[node.input[0]], gradients[node.output[0]]
        if node.op_type == "Gemm":
            gradients[node.input[1]] = cotangent.T @ x
            gradients[node.input[0]] = cotangent @ weights[node.input[1]]
        else:
            gradients[node.input[0]] = cotangent * SLOPES[node.op_type](x, attributes[node.name])
    return values, gradients


def decades(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """log10 of the ratio of mean absolute values."""
    return float(np.log10(np.abs(numerator).mean() / np.abs(denominator).mean()))


def test_rebuilding_gives_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "build.py", tmp_path], check=True)
    rebuilt = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {f"{name}.{suffix}" for name in SAMPLES for suffix in ("onnx", "npz")}
    assert set(rebuilt) == committed
    assert [name for name in sorted(rebuilt) if rebuilt[name] != (FOLDER / name).read_bytes()] == []


def test_every_file_is_under_a_megabyte() -> None:
    assert [path.name for path in FOLDER.iterdir() if path.is_file() and path.stat().st_size >= 1_000_000] == []


def test_the_readme_has_a_section_for_every_model() -> None:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line.removeprefix("## ") for line in lines if line.removeprefix("## ") in SAMPLES] == SAMPLES


def test_the_digits_are_64_real_images_balanced_over_the_classes() -> None:
    with np.load(FOLDER / "digits.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    assert (images.shape, images.dtype) == ((64, 28, 28), np.uint8)
    assert set(np.bincount(labels, minlength=10)) == {6, 7}
    assert len(np.unique(images.reshape(64, -1), axis=0)) == 64


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_valid_and_runs_on_its_data(name: str) -> None:
    model, _, data = load(name)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 17)])
    [logits] = run(name, data["input"])
    assert logits.shape == (len(data["target"]), 10)
    assert np.isfinite(logits).all()
    assert data["target"].dtype == np.int64
    assert set(data["target"]) == set(range(10))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_batch_dimension_is_symbolic(name: str) -> None:
    model, _, data = load(name)
    axis = 1 if name in ("rnn_200", "lstm_200") else 0
    assert model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param == "batch"
    [three] = run(name, np.take(data["input"], range(3), axis=axis))
    np.testing.assert_allclose(three, run(name, data["input"])[0][:3], rtol=1e-3, atol=1e-4)


def test_the_digits_gradient_falls_by_decades_with_sigmoid_only() -> None:
    fall = {}
    for name in ("digits_sigmoid", "digits_relu", "digits_leaky_relu"):
        _, gradients = mlp_gradients(name)
        fall[name] = decades(gradients["layers.0.weight"], gradients["layers.5.weight"])
    assert fall["digits_sigmoid"] < -3
    assert abs(fall["digits_relu"]) < 0.5
    assert abs(fall["digits_leaky_relu"]) < 0.5


def test_the_three_digits_models_differ_in_their_activation_only() -> None:
    reference = load("digits_relu")[1]
    for name in ("digits_sigmoid", "digits_leaky_relu"):
        weights = load(name)[1]
        assert weights.keys() == reference.keys()
        assert all(np.array_equal(weights[key], reference[key]) for key in weights)


def test_fifty_sigmoids_lose_thirty_decades_and_stay_in_float32() -> None:
    _, gradients = mlp_gradients("sigmoid_chain_50")
    assert decades(gradients["input"], gradients["logits"]) < -30
    assert np.abs(gradients["layers.0.linear"]).mean() > np.finfo(np.float32).tiny


def test_most_units_of_two_layers_never_fire() -> None:
    values, _ = mlp_gradients("dead_relu")
    dead = [float((values[f"layers.{i}.act"] == 0).all(axis=0).mean()) for i in range(5)]
    assert min(dead[1:3]) > 0.75
    assert max(dead[0], *dead[3:]) < 0.25


def test_the_exploding_gradient_grows_a_million_times() -> None:
    values, gradients = mlp_gradients("exploding_mlp")
    assert decades(gradients["layers.0.linear"], gradients["logits"]) > 5
    assert all(np.abs(value).max() < 1e7 for value in values.values())


def test_the_residual_network_keeps_batchnorm_calibrated_on_the_digits() -> None:
    model, weights, data = load("resnet_bn")
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert (len(norms), sum(node.op_type == "Add" for node in model.graph.node)) == (15, 6)
    logits, *normalised = run("resnet_bn", data["input"], *(node.output[0] for node in norms))
    for node, value in zip(norms, normalised, strict=True):
        np.testing.assert_allclose(value.mean(axis=(0, 2, 3)), 0, atol=1e-2, err_msg=node.name)
        np.testing.assert_allclose(value.std(axis=(0, 2, 3)), 1, atol=1e-2, err_msg=node.name)
        assert weights[node.input[4]].min() > 1e-2
    assert 0.3 < logits.std() < 3


def echo(name: str, step: int) -> float:
    """RMS change of the logits when the input of one time step is drawn anew."""
    data = load(name)[2]
    other = data["input"].copy()
    other[step] = np.random.default_rng(0).standard_normal(other[step].shape)
    return float(np.sqrt(np.mean((run(name, other)[0] - run(name, data["input"])[0]) ** 2)))


def test_the_lstm_still_hears_the_first_step_and_the_rnn_does_not() -> None:
    assert echo("rnn_200", 0) < 1e-6 < 1e-2 < echo("rnn_200", 199)
    assert echo("lstm_200", 0) > 0.1 * echo("lstm_200", 199) > 1e-3
