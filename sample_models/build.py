"""Builds the sample models: `python sample_models/build.py [DIR]` writes `<name>.onnx` and `<name>.npz` there.

Seeded and bit-identical on rebuild. The only file read is `digits.npz`; DIR is this folder unless given. Every `.npz`
holds the inputs by name and `target`, int64 class labels for the cross-entropy loss. README.md tells what each shows.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
CLASSES = 10
STEPS = 200

Arrays = Mapping[str, np.ndarray]
Sample = tuple[ModelProto, Arrays]


@dataclass
class Graph:
    """A graph under construction; a node's output value carries the node's name."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def weight(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer; floats are stored as float32."""
        stored = array if array.dtype == np.int64 else array.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(stored), name))
        return name

    def op(self, op_type: str, name: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        """Adds a node and returns the name of its last output."""
        self.nodes.append(helper.make_node(op_type, inputs, outputs or (name,), name, **attributes))
        return str(self.nodes[-1].output[-1])

    def dense(self, layer: str, x: str, weight: np.ndarray, bias: np.ndarray, node: str, output: str = "") -> str:
        """y = x W^T + b with W (out, in), as torch stores it."""
        w, b = self.weight(f"{layer}.weight", weight), self.weight(f"{layer}.bias", bias)
        return self.op("Gemm", node, x, w, b, outputs=(output or node,), transB=1)

    def model(self, name: str, input_shape: list[int | str]) -> ModelProto:
        """The model from `input` to `logits` (batch, CLASSES)."""
        inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape)]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="gradlint-samples"
        )


def generator() -> np.random.RandomState:
    """The same seed for every model. RandomState: numpy promises that its stream never changes."""
    return np.random.RandomState(0)


def he_normal(rng: np.random.RandomState, *shape: int) -> np.ndarray:
    """Variance 2 / fan_in, which ReLU preserves (He et al. 2015); shape (out, in, ...)."""
    weights: np.ndarray = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return weights


def glorot_uniform(rng: np.random.RandomState, fan_out: int, fan_in: int) -> np.ndarray:
    """U(-a, a), a = sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010): Keras' default for Dense."""
    weights: np.ndarray = rng.uniform(-1, 1, (fan_out, fan_in)) * np.sqrt(6 / (fan_in + fan_out))
    return weights


def digits(*shape: int) -> dict[str, np.ndarray]:
    """The 64 handwritten digits in [0, 1], each example reshaped to `shape`, and their labels."""
    with np.load(HERE / "digits.npz") as stored:
        images = stored["images"].astype(np.float32) / np.float32(255)
        return {"input": images.reshape(len(images), *shape), "target": stored["labels"]}


def mlp(name: str, activation: str, weights: list[np.ndarray], biases: list[np.ndarray], **attributes: Any) -> Sample:
    """Dense layers with an activation between them, the last one the head, on the flattened digits."""
    graph, x = Graph(), "input"
    for i, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        x = graph.dense(f"layers.{i}", x, weight, bias, f"layers.{i}.linear")
        x = graph.op(activation, f"layers.{i}.act", x, **attributes)
    graph.dense("head", x, weights[-1], biases[-1], "head", "logits")
    return graph.model(name, ["batch", weights[0].shape[1]]), digits(784)


def dense_weights(rng: np.random.RandomState, init: Callable[..., np.ndarray], widths: list[int]) -> list[np.ndarray]:
    """One matrix (out, in) between each two neighbours of `widths`."""
    return [init(rng, n_out, n_in) for n_in, n_out in pairwise(widths)]


def zero_biases(weights: list[np.ndarray]) -> list[np.ndarray]:
    return [np.zeros(len(w)) for w in weights]


def digits_mlp(name: str, activation: str, **attributes: Any) -> Sample:
    """Six dense layers of 10 units as Keras initialises them: Glorot uniform weights, zero biases."""
    rng, widths = generator(), [784, *[10] * 6, CLASSES]
    weights = dense_weights(rng, glorot_uniform, widths)
    return mlp(name, activation, weights, zero_biases(weights), **attributes)


def sigmoid_chain(name: str) -> Sample:
    """Fifty sigmoid layers of 32 units, Glorot uniform: each slope is at most 1/4."""
    rng, widths = generator(), [784, *[32] * 50, CLASSES]
    weights = dense_weights(rng, glorot_uniform, widths)
    return mlp(name, "Sigmoid", weights, zero_biases(weights))


def dead_relu(name: str) -> Sample:
    """Five ReLU layers of 64 units with He weights; the second and third have bias -10, seven deviations, on 52."""
    rng, widths = generator(), [784, *[64] * 5, CLASSES]
    weights = dense_weights(rng, he_normal, widths)
    biases = zero_biases(weights)
    for layer in (1, 2):
        biases[layer][rng.permutation(64)[:52]] = -10
    return mlp(name, "Relu", weights, biases)


def exploding_mlp(name: str) -> Sample:
    """Twenty ReLU layers of 32 units with twice the standard deviation of He: every layer doubles the gradient."""
    rng, widths = generator(), [784, *[32] * 20, CLASSES]
    *hidden, head = dense_weights(rng, he_normal, widths)
    weights = [*(2 * w for w in hidden), head]
    return mlp(name, "Relu", weights, zero_biases(weights))


def convolve(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Convolution without bias of x (N, C, H, W) by weight (O, C, k, k), padded by k // 2."""
    k = weight.shape[-1]
    padded = np.pad(x, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.tensordot(windows, weight, axes=([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Feature:
    """A value of the graph together with what it holds on the digits, (N, C, H, W) in float64."""

    name: str
    array: np.ndarray


def conv_bn(
    graph: Graph, rng: np.random.RandomState, x: Feature, conv: str, bn: str, channels: int, k: int, stride: int
) -> Feature:
    """He-initialised convolution without bias, then BatchNormalization whose running statistics are the digits' own.

    The statistics are rounded, so that they don't depend on the order in which a machine sums.
    """
    weight = he_normal(rng, channels, x.array.shape[1], k, k).astype(np.float32)
    pads = [k // 2] * 4
    y = graph.op("Conv", conv, x.name, graph.weight(f"{conv}.weight", weight), pads=pads, strides=[stride, stride])
    array = convolve(x.array, weight.astype(np.float64), stride)
    mean, var = array.mean(axis=(0, 2, 3)).round(4), array.var(axis=(0, 2, 3)).round(4)
    parameters = {"weight": np.ones(channels), "bias": np.zeros(channels), "running_mean": mean, "running_var": var}
    names = [graph.weight(f"{bn}.{key}", value) for key, value in parameters.items()]
    y = graph.op("BatchNormalization", bn, y, *names, epsilon=1e-5)
    return Feature(y, (array - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5))


def relu(graph: Graph, x: Feature, name: str) -> Feature:
    return Feature(graph.op("Relu", name, x.name), np.maximum(x.array, 0))


def basic_block(graph: Graph, rng: np.random.RandomState, x: Feature, name: str, channels: int, stride: int) -> Feature:
    """relu(x + bn(conv(relu(bn(conv(x)))))); a 1x1 convolution carries x where the shape changes (He et al. 2016)."""
    y = conv_bn(graph, rng, x, f"{name}.conv1", f"{name}.bn1", channels, 3, stride)
    y = relu(graph, y, f"{name}.relu1")
    y = conv_bn(graph, rng, y, f"{name}.conv2", f"{name}.bn2", channels, 3, 1)
    if x.array.shape[1] != channels:
        x = conv_bn(graph, rng, x, f"{name}.downsample.0", f"{name}.downsample.1", channels, 1, stride)
    total = Feature(graph.op("Add", f"{name}.add", y.name, x.name), x.array + y.array)
    return relu(graph, total, f"{name}.relu2")


def resnet_bn(name: str) -> Sample:
    """A stem, three stages of two basic blocks (8, 16, 32 channels), global average pooling, a dense head."""
    graph, rng, data = Graph(), generator(), digits(1, 28, 28)
    x = conv_bn(graph, rng, Feature("input", data["input"].astype(np.float64)), "stem.conv", "stem.bn", 8, 3, 2)
    x = relu(graph, x, "stem.relu")
    for stage, channels in enumerate((8, 16, 32), start=1):
        for block in range(2):
            stride = 2 if stage > 1 and block == 0 else 1
            x = basic_block(graph, rng, x, f"layer{stage}.{block}", channels, stride)
    pooled = graph.op("Flatten", "flatten", graph.op("GlobalAveragePool", "pool", x.name), axis=1)
    graph.dense("head", pooled, glorot_uniform(rng, CLASSES, 32), np.zeros(CLASSES), "head", "logits")
    return graph.model(name, ["batch", 1, 28, 28]), data


def sequences(rng: np.random.RandomState, examples: int, features: int) -> dict[str, np.ndarray]:
    """Noise of deviation 1 around a small mean that tells the class: (STEPS, examples, features)."""
    target = np.arange(examples, dtype=np.int64) % CLASSES
    means = rng.uniform(-0.25, 0.25, (CLASSES, features))
    noise = rng.standard_normal((STEPS, examples, features))
    return {"input": (means[target] + noise).astype(np.float32), "target": target}


def recurrent(name: str, op_type: str, w: np.ndarray, r: np.ndarray, bias: np.ndarray, head: np.ndarray) -> ModelProto:
    """One recurrent layer over (time, batch, features); its last hidden state goes to a dense head.

    w (gates*hidden, features), r (gates*hidden, hidden), bias (gates*hidden): the input's; the recurrent bias is zero.
    """
    graph, layer = Graph(), op_type.lower()
    parameters = [
        graph.weight(f"{layer}.weight_ih_l0", w[None]),
        graph.weight(f"{layer}.weight_hh_l0", r[None]),
        graph.weight(f"{layer}.bias_l0", np.concatenate([bias, np.zeros_like(bias)])[None]),
    ]
    last = graph.op(op_type, layer, "input", *parameters, outputs=("", "last_hidden"), hidden_size=r.shape[1])
    last = graph.op("Squeeze", "squeeze", last, graph.weight("squeeze.axes", np.array([0])))
    graph.dense("head", last, head, np.zeros(CLASSES), "head", "logits")
    return graph.model(name, [STEPS, "batch", w.shape[1]])


def orthogonal(rng: np.random.RandomState, size: int) -> np.ndarray:
    """A random orthogonal matrix (Saxe et al. 2014), rounded so that it is the same with every LAPACK."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return (q * np.sign(np.diag(r))).round(6)


def rnn_200(name: str, hidden: int = 24, features: int = 4) -> Sample:
    """A tanh RNN whose recurrent matrix is 0.9 times orthogonal: 0.9^200 = 7e-10 before tanh takes its part."""
    rng = generator()
    data = sequences(rng, 32, features)
    w, r = 0.5 * glorot_uniform(rng, hidden, features), 0.9 * orthogonal(rng, hidden)
    return recurrent(name, "RNN", w, r, np.zeros(hidden), glorot_uniform(rng, CLASSES, hidden)), data


def lstm_200(name: str, hidden: int = 24, features: int = 4) -> Sample:
    """An LSTM with forget bias log T, so that a cell keeps (T / (T + 1))^T = 1/e of its state over all T steps.

    The input bias is -log(T) / 2: a write then has weight 1 / sqrt(T), and T independent ones add up to a state of
    order 1, within tanh's slope. Chrono initialisation (Tallec & Ollivier 2018) goes further, to -log T, which suits a
    steady input. The recurrent matrices are 0.7 times orthogonal; at 1 the gates' feedback lets the gradient grow.
    ONNX orders the gates i, o, f, c.
    """
    rng = generator()
    data = sequences(rng, 32, features)
    w = np.concatenate([glorot_uniform(rng, hidden, features) for _ in range(4)])
    r = np.concatenate([0.7 * orthogonal(rng, hidden) for _ in range(4)])
    bias = np.repeat([-np.log(STEPS) / 2, 0, np.log(STEPS), 0], hidden)
    return recurrent(name, "LSTM", w, r, bias, glorot_uniform(rng, CLASSES, hidden)), data


MODELS: dict[str, Callable[[str], Sample]] = {
    "digits_sigmoid": lambda name: digits_mlp(name, "Sigmoid"),
    "digits_relu": lambda name: digits_mlp(name, "Relu"),
    "digits_leaky_relu": lambda name: digits_mlp(name, "LeakyRelu", alpha=0.3),
    "sigmoid_chain_50": sigmoid_chain,
    "resnet_bn": resnet_bn,
    "dead_relu": dead_relu,
    "exploding_mlp": exploding_mlp,
    "rnn_200": rnn_200,
    "lstm_200": lstm_200,
}


def npz_bytes(arrays: Arrays) -> bytes:
    """An .npz with nothing of the clock, the platform or the zlib version in it: np.savez stamps the present time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(member, content.getvalue())
    return buffer.getvalue()


def build(directory: Path) -> None:
    """Writes every model of the table with its data into `directory`, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in MODELS.items():
        model, data = make(name)
        onnx.checker.check_model(model, full_check=True)
        (directory / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        (directory / f"{name}.npz").write_bytes(npz_bytes(data))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the sample models and their data.")
    parser.add_argument("directory", nargs="?", type=Path, default=HERE, help="default: beside build.py")
    build(parser.parse_args().directory)
