"""Normalisations: by batch statistics, by running ones, within an example."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.load import from_proto
from gradlint.ops.batch_normalization import to_train_mode
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(2)


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return (mean + std * RNG.standard_normal(shape)).astype(np.float32)


def running(channels: int) -> tuple[np.ndarray, ...]:
    """gamma, beta, running mean, running variance."""
    return (
        normal(channels, mean=1, std=0.3),
        normal(channels),
        normal(channels),
        RNG.uniform(0.5, 2, channels).astype(np.float32),
    )


SHAPES = [(16, 5), (8, 5, 6), (8, 5, 4, 4), (4, 3, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_normalization_by_batch_statistics(shape: tuple[int, ...]) -> None:
    x = Activation(shape, mean=0.7, std=1.5)
    check_op("BatchNormalization", x, *running(shape[1]), training_mode=1, momentum=0.0, outputs=3, wrt=(0, 1, 2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updated_running_statistics_have_gradients_too(momentum: float) -> None:
    check_op(
        "BatchNormalization",
        Activation((6, 5, 4, 4), mean=0.7),
        *running(5),
        training_mode=1,
        momentum=momentum,
        outputs=3,
        wrt=(0, 1, 2, 3, 4) if momentum else (0, 1, 2),
        moments=None,
        pullback=None,
        proof=False,
    )


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 12), -1), ((8, 5, 12), -1), ((8, 5, 12), 2), ((8, 3, 4, 6), -2), ((8, 3, 4), 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(shape: tuple[int, ...], axis: int, bias: bool) -> None:
    last = shape[axis:]
    weights = (normal(*last, mean=1, std=0.3), normal(*last) if bias else None)
    check_op("LayerNormalization", Activation(shape, mean=0.5, std=2), *weights, axis=axis)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_normalization_by_running_statistics(shape: tuple[int, ...]) -> None:
    check_op(
        "BatchNormalization",
        Activation(shape, mean=0.7, std=1.5),
        *running(shape[1]),
        wrt=(0, 1, 2),
        analysis_mode="eval",
    )


def test_one_value_per_channel_is_normalised_by_running_statistics() -> None:
    check_op("BatchNormalization", Activation((1, 5)), *running(5), wrt=(0, 1, 2), analysis_mode="train")


def test_layer_normalization_hands_out_its_statistics() -> None:
    check_op("LayerNormalization", Activation((6, 4, 8)), normal(8), normal(8), outputs=3, moments=None, pullback=None)


@pytest.mark.parametrize("shape", [(8, 5, 12), (8, 12)])
def test_rms_normalization(shape: tuple[int, ...]) -> None:
    check_op("RMSNormalization", Activation(shape, mean=0.5), normal(12, mean=1, std=0.3), axis=-1, opset=23)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_instance_normalization(shape: tuple[int, ...]) -> None:
    check_op("InstanceNormalization", Activation(shape, mean=0.5, std=2), *running(shape[1])[:2])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("spatial", [(5,), (4, 3)])
def test_group_normalization(groups: int, spatial: tuple[int, ...]) -> None:
    check_op(
        "GroupNormalization",
        Activation((8, 6, *spatial), mean=0.5, std=2),
        *running(6)[:2],
        num_groups=groups,
        stash_type=11,
    )


@pytest.mark.parametrize("extra", [True, False])
def test_layer_normalization_of_a_residual_sum(extra: bool) -> None:
    check_op(
        "SkipLayerNormalization",
        Activation((4, 6, 16)),
        Activation((4, 6, 16), std=0.5),
        normal(16, mean=1, std=0.3),
        normal(16),
        normal(16) if extra else None,
        domain="com.microsoft",
        epsilon=1e-5,
    )


def test_rms_normalization_of_a_residual_sum() -> None:
    check_op(
        "SkipSimplifiedLayerNormalization",
        Activation((4, 6, 16)),
        Activation((4, 6, 16), std=0.5),
        normal(16, mean=1, std=0.3),
        domain="com.microsoft",
        epsilon=1e-5,
    )


def test_running_statistics_have_gradients_where_asked() -> None:
    check_op("BatchNormalization", Activation((6, 5, 4)), *running(5), moments=None, pullback=None)


@pytest.mark.parametrize("axes", [[0, 2, 3], [2, 3], [1, 2, 3], [0, 1, 2, 3]])
def test_mean_variance_normalization(axes: list[int]) -> None:
    check_op("MeanVarianceNormalization", Activation((8, 5, 4, 4), mean=0.5, std=2), axes=axes)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [1, -1])
def test_lp_normalization(p: int, axis: int) -> None:
    check_op("LpNormalization", Activation((8, 12, 10), mean=0.5), p=p, axis=axis)


@pytest.mark.parametrize("size", [3, 5])
def test_local_response_normalization(size: int) -> None:
    check_op("LRN", Activation((4, 6, 3, 3), mean=0.5), size=size, alpha=0.05, beta=0.75, bias=1.0)


def test_local_response_normalization_has_an_exact_vjp() -> None:
    check_op("LRN", Activation((4, 6, 3, 3)), size=3, alpha=2.0, beta=0.6, bias=1.5, moments=None, pullback=None)


RESIDUAL_SUM = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (float[4, 6, 16] x, float[4, 6, 16] skip) => (float[4, 6, 16] y, float[4, 6, 16] total) {
    y, mean, rate, total = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (x, skip, gamma, beta, bias)
}"""
APART = """<ir_version: 10, opset_import: ["": 21]>
g (float[4, 6, 16] x, float[4, 6, 16] skip) => (float[4, 6, 16] y, float[4, 6, 16] total) {
    both = Add(x, skip)
    total = Add(both, bias)
    y = LayerNormalization <epsilon = 1e-5> (total, gamma, beta)
}"""
SIMPLIFIED = """<ir_version: 10, opset_import: ["": 21]>
g (float[4, 6, 16] x) => (float[4, 6, 16] y) {
    y = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (x, gamma)
}"""
RMS = """<ir_version: 11, opset_import: ["": 23]>
g (float[4, 6, 16] x) => (float[4, 6, 16] y) {
    y = RMSNormalization <axis = -1, epsilon = 1e-5> (x, gamma)
}"""


@pytest.mark.parametrize(("fused", "plain"), [(RESIDUAL_SUM, APART), (SIMPLIFIED, RMS)])
def test_fused_forms_have_the_gradient_of_the_plain_ones(fused: str, plain: str) -> None:
    weights = {"gamma": normal(16, mean=1, std=0.3), "beta": normal(16), "bias": normal(16)}
    feed: dict[str, np.ndarray] = {}
    results = []
    for text in (fused, plain):
        model = onnx.parser.parse_model(text)
        read = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items() if n in read)
        runner = session(differentiate(model))
        for value in runner.get_inputs():
            if value.name not in feed:
                feed[value.name] = normal(*value.shape)
        names = [o.name for o in runner.get_outputs()]
        results.append(
            dict(zip(names, runner.run(names, {v.name: feed[v.name] for v in runner.get_inputs()}), strict=True))
        )
    first, second = results
    assert first.keys() == second.keys() >= {"x.grad", "gamma.grad"}
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=1e-4, atol=1e-4)


def chain(depth: int, batch: int, width: int, size: int = 1) -> onnx.ModelProto:
    """depth times 1x1 Conv, BatchNormalization, Relu; orthogonal weights."""
    nodes, weights, last = [], {}, "x"
    for k in range(depth):
        q, _ = np.linalg.qr(RNG.standard_normal((width, width)))
        names = [f"{part}{k}" for part in ("gamma", "beta", "mean", "var")]
        weights[f"w{k}"] = q.astype(np.float32).reshape(width, width, 1, 1)
        weights |= dict(zip(names, np.array([[1], [0], [3], [9]], np.float32).repeat(width, axis=1), strict=True))
        nodes += [
            onnx.helper.make_node("Conv", [last, f"w{k}"], [f"z{k}"], name=f"conv{k}", kernel_shape=[1, 1]),
            onnx.helper.make_node("BatchNormalization", [f"z{k}", *names], [f"n{k}"], name=f"norm{k}"),
            onnx.helper.make_node("Relu", [f"n{k}"], [f"r{k}"], name=f"relu{k}"),
        ]
        last = f"r{k}"
    shape = (batch, width, size, size)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", last))
    initializers = [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = onnx.helper.make_graph(nodes, "chain", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def canonical(model: onnx.ModelProto) -> ir.Model:
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims())
    return loaded


def test_train_mode_normalises_by_the_batch_and_keeps_every_name() -> None:
    model = canonical(chain(1, batch=6, width=4, size=3))
    assert to_train_mode(model.graph) == ()
    x = normal(6, 4, 3, 3, mean=2, std=3)
    assert [o.name for o in model.graph.outputs] == ["r0"]
    weights = {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}
    z = np.einsum("oi,nihw->nohw", weights["w0"][:, :, 0, 0], x)
    expected = (z - z.mean((0, 2, 3), keepdims=True)) / np.sqrt(z.var((0, 2, 3), keepdims=True) + 1e-5)
    (y,) = session(ir.to_proto(model)).run(["r0"], {"x": x})
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-5)


def test_too_small_a_batch_keeps_its_running_statistics_and_says_so() -> None:
    model = canonical(chain(1, batch=1, width=4, size=1))
    assert to_train_mode(model.graph) == ("norm0",)
    x = normal(1, 4, 1, 1)
    (y,) = session(ir.to_proto(model)).run(None, {"x": x})
    (eval_y,) = session(chain(1, batch=1, width=4, size=1)).run(None, {"x": x})
    np.testing.assert_allclose(y, eval_y)


def test_gradients_grow_through_batch_normalization_and_relu() -> None:
    """sqrt(pi / (pi - 1)) = 1.211 per layer (Yang et al. 2019)."""
    model = canonical(chain(12, batch=256, width=64))
    found = estimate(model.graph, batch=256, mode="train")
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    first, last = found.grad_rms(values["z1"]), found.grad_rms(values["z11"])
    assert first is not None
    assert last is not None
    assert (first / last) ** (1 / 10) == pytest.approx(np.sqrt(np.pi / (np.pi - 1)), rel=0.02)


def test_symbolic_sizes_are_found_when_it_runs() -> None:
    texts = [
        "y, m, v = BatchNormalization <training_mode = 1> (x, gamma, beta, mean, var)",
        "y = BatchNormalization (x, gamma, beta, mean, var)",
        "y = LayerNormalization <axis = 2> (x, other)",
        "y = InstanceNormalization (x, gamma, beta)",
        "y = GroupNormalization <num_groups = 2> (x, gamma, beta)",
    ]
    weights = {
        "gamma": normal(4),
        "beta": normal(4),
        "mean": normal(4),
        "var": np.ones(4, np.float32),
        "other": normal(5),
    }
    x, cotangent = normal(3, 4, 5), normal(3, 4, 5)
    for text in texts:
        grads = []
        for shape in ("N, C, L", "3, 4, 5"):
            head = f'<ir_version: 10, opset_import: ["": 21]> g (float[{shape}] x) => (float[{shape}] y) {{ {text} }}'
            model = onnx.parser.parse_model(head)
            read = set(model.graph.node[0].input)
            model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items() if n in read)
            grads.append(
                session(differentiate(model, wrt=["x"])).run(["x.grad"], {"x": x, "y.cotangent": cotangent})[0]
            )
        np.testing.assert_allclose(grads[0], grads[1], rtol=1e-4, atol=1e-5)
