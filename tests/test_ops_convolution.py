"""Convolutions, plain and transposed."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gradlint import check
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Moments, Range
from gradlint.estimate import estimate, prove
from gradlint.exceptions import ModelError
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(1)


def normal(*shape: int, std: float = 0.3) -> np.ndarray:
    return (std * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((4, 3, 9, 8), (6, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((4, 3, 9, 8), (6, 3, 3, 2), {"strides": [3, 2], "pads": [0, 1, 2, 0]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ((4, 3, 11, 10), (6, 3, 3, 3), {"dilations": [2, 3], "strides": [2, 2], "pads": [1, 2, 1, 2]}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {}),
        ((2, 4, 17, 16), (6, 4, 1, 1), {}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {"strides": [2, 2]}),
        ((4, 4, 7, 7), (6, 4, 1, 1), {"pads": [1, 1, 1, 1]}),
        ((4, 4, 8, 7), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((4, 4, 8, 7), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 0, 1], "strides": [2, 2]}),
        ((4, 6, 8, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
        ((4, 6, 8, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((4, 3, 8, 7), (6, 1, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
        ((2, 3, 6, 18), (3, 1, 3, 5), {"group": 3, "pads": [1, 2, 0, 3]}),
        ((2, 3, 8, 20), (3, 1, 3, 2), {"group": 3, "dilations": [2, 3]}),
        ((4, 3, 3, 4), (6, 3, 3, 4), {}),
        ((4, 3, 5, 6), (6, 3, 1, 7), {"pads": [0, 3, 0, 3]}),
        ((4, 3, 5, 6), (6, 3, 5, 1), {"pads": [2, 0, 2, 0]}),
        ((4, 3, 4, 4), (6, 3, 2, 2), {"pads": [2, 2, 2, 2]}),
        ((4, 3, 9, 8), (6, 3, 3, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ],
)
def test_conv(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    check_op("Conv", Activation(x, mean=0.5), normal(*w), normal(w[0]), **attributes)


@pytest.mark.parametrize("attributes", [{}, {"pads": [2, 1], "strides": [2]}, {"dilations": [3], "pads": [3, 3]}])
def test_conv_in_one_dimension(attributes: dict[str, Any]) -> None:
    check_op("Conv", Activation((8, 3, 14), mean=0.5), normal(5, 3, 3), normal(5), **attributes)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 40, 24, 24), (40, 1, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((3, 64, 29, 26), (64, 1, 3, 5), {"strides": [2, 1], "dilations": [1, 2], "pads": [0, 3, 2, 1]}),
        ((2, 16, 1600), (16, 1, 9), {"strides": [1], "pads": [0, 4]}),
    ],
)
def test_depthwise_conv_on_a_large_map(
    x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, list[int]]
) -> None:
    check_op("Conv", Activation(x), normal(*w), group=w[0], moments=None, pullback=None, proof=False, **attributes)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_conv_in_three_dimensions(group: int) -> None:
    w = normal(4, 4 // group, 3, 2, 3)
    check_op("Conv", Activation((2, 4, 5, 4, 6)), w, pads=[1, 0, 1, 1, 1, 1], strides=[1, 2, 1], group=group)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((4, 3, 5, 6), (3, 4, 3, 3), {}),
        ((4, 3, 5, 6), (3, 4, 2, 2), {"strides": [2, 2]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"strides": [3, 2], "output_shape": [14, 12]}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"strides": [3, 2], "output_shape": [16, 14]}),
        ((4, 3, 5, 6), (3, 4, 2, 2), {"strides": [2, 2], "output_shape": [9, 11], "auto_pad": "SAME_UPPER"}),
        ((4, 3, 5, 6), (3, 4, 2, 2), {"strides": [2, 2], "output_shape": [9, 11], "auto_pad": "SAME_LOWER"}),
        ((4, 3, 5, 6), (3, 4, 3, 3), {"dilations": [2, 2], "pads": [1, 0, 2, 1]}),
        ((4, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "group": 2}),
        ((4, 4, 5, 6), (4, 1, 4, 4), {"strides": [2, 2], "group": 4, "pads": [1, 1, 1, 1]}),
        ((4, 3, 9), (3, 4, 4), {"strides": [2], "pads": [1, 1]}),
        ((2, 2, 3, 4, 3), (2, 3, 2, 3, 2), {"strides": [2, 1, 2]}),
    ],
)
def test_conv_transpose(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    bias = normal(w[1] * attributes.get("group", 1))
    check_op("ConvTranspose", Activation(x, mean=0.5), normal(*w), bias, **attributes)


PADDED = [
    'Conv<auto_pad="SAME_UPPER">(x, w)',
    'Conv<auto_pad="SAME_LOWER">(x, w)',
    'Conv<auto_pad="SAME_UPPER", strides=[2, 3]>(x, w)',
    'Conv<auto_pad="SAME_LOWER", strides=[2, 2], group=2>(x, half)',
    'Conv<auto_pad="VALID", strides=[2, 2]>(x, w)',
    'ConvTranspose<auto_pad="SAME_LOWER", strides=[2, 1]>(x, w)',
    'AveragePool<auto_pad="SAME_UPPER", kernel_shape=[3, 2]>(x)',
    'MaxPool<auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[2, 2]>(x)',
]


@pytest.mark.parametrize("layer", PADDED)
def test_auto_pad_of_symbolic_sizes(layer: str) -> None:
    """The gradients are those of the same model with its sizes written out."""
    weights = {"w": normal(4, 4, 3, 2), "half": normal(4, 2, 3, 2)}
    feed = {"x": RNG.standard_normal((2, 4, 7, 8)).astype(np.float32)}
    found: list[list[np.ndarray]] = []
    for shape in ("2, 4, 7, 8", "N, 4, H, W"):
        proto = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x) => (float[N, C, P, Q] y) {{ y = {layer} }}'
        )
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(a, n) for n, a in weights.items() if n in proto.graph.node[0].input
        )
        if not found:
            y = session(proto).run(None, feed)[0]
            feed["y.cotangent"] = RNG.standard_normal(y.shape).astype(np.float32)
        back = differentiate(proto)
        onnx.checker.check_model(back)
        names = [o.name for o in back.graph.output]
        assert names == ["y", "x.grad", *(f"{i.name}.grad" for i in proto.graph.initializer)]
        found.append(session(back).run(names, feed))
    for static, symbolic in zip(*found, strict=True):
        np.testing.assert_allclose(symbolic, static, rtol=1e-4, atol=1e-4)


SMALLER = [
    "output_shape=[3, 2]",
    'output_shape=[4, 3], auto_pad="SAME_UPPER"',
    "output_shape=[4, 7], strides=[2, 1], dilations=[1, 2], output_padding=[1, 0]",
]


@pytest.mark.parametrize("attributes", SMALLER)
@pytest.mark.parametrize("shape", ["2, 4, 5, 5", "N, 4, 5, 5"])
def test_conv_transpose_whose_output_is_smaller_than_its_input(shape: str, attributes: str) -> None:
    """onnx infers two axes for it, and onnxruntime refuses what reads them: the backward model says it by pads."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x) => (float[N, C, P, Q] y) '
        f"{{ y = ConvTranspose<{attributes}>(x, w) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(4, 4, 3, 3), "w"))
    feed = {"x": RNG.standard_normal((2, 4, 5, 5)).astype(np.float32)}
    (y,) = session(proto).run(None, feed)
    back = session(differentiate(proto))
    names = [o.name for o in back.get_outputs()]
    assert names == ["y", "x.grad", "w.grad"]
    again, dx, dw = back.run(names, {**feed, "y.cotangent": y})
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)
    w = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    for gradient, at in ((dx, feed["x"]), (dw, w)):  # y is linear in either: <y, y> = <dy, x>
        np.testing.assert_allclose(np.vdot(gradient, at), np.vdot(y, y), rtol=1e-4)


@pytest.mark.parametrize("shape", ["2, 4, 5, 5", "N, 4, H, W"])
def test_a_network_whose_transposed_convolution_shrinks(shape: str) -> None:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x) => (float[N, C, P, Q] y) '
        "{ a = ConvTranspose<output_shape=[3, 2]>(x, w)  y = Conv(a, v) }"
    )
    weights = {"w": normal(4, 4, 3, 3), "v": normal(4, 4, 2, 1)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    report = check(proto)
    assert [w.name for w in report.weights if w.measured and w.estimated] == ["w", "v"]
    assert not [f.code for f in report.findings if f.code.startswith("GL9")]


def test_conv_transpose_whose_output_is_a_step_larger_than_its_windows_is_not_run() -> None:
    """No padding gives that size: onnxruntime says what is wrong."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[4, 3, 5, 6] x) => (float[4, 4, 20, 12] y) '
        "{ y = ConvTranspose<strides=[3, 2], output_shape=[20, 12]>(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(3, 4, 3, 3), "w"))
    (skipped,) = (f for f in check(proto).findings if f.code == "GL902")
    assert "output_shape is inconsistent" in skipped.message


@pytest.mark.parametrize("head", ["y = Relu(a)", "y = GlobalAveragePool(a)", "y = Flatten(a)"])
@pytest.mark.parametrize(
    ("layer", "name"), [("Conv<dilations=[4, 2]>(x, w)", "Conv"), ("MaxPool<kernel_shape=[6, 6]>(x)", "MaxPool")]
)
def test_a_window_that_does_not_fit_is_one_line(layer: str, name: str, head: str) -> None:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4, 5, 5] x) => (float y) {{ a = {layer}  {head} }}'
    )
    if "w" in proto.graph.node[0].input:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(4, 4, 3, 3), "w"))
    for read in (check, differentiate):
        with pytest.raises(ModelError, match=rf"the window of {name} 'a' doesn't fit its padded input \(\w, 4, 5, 5\)"):
            read(proto)


# -- FusedConv is the sum of its parts, whose rows are proved on their own --------------------------------------------

ACTIVATIONS: list[tuple[str | None, list[float], list[tuple[str, dict[str, float]]]]] = [
    (None, [], []),
    ("Relu", [], [("Relu", {})]),
    ("Tanh", [], [("Tanh", {})]),
    ("Sigmoid", [], [("Sigmoid", {})]),
    ("LeakyRelu", [0.2], [("LeakyRelu", {"alpha": 0.2})]),
    ("Clip", [-0.5, 0.8], [("Clip", {"min": -0.5, "max": 0.8})]),
    ("HardSigmoid", [0.3, 0.4], [("HardSigmoid", {"alpha": 0.3, "beta": 0.4})]),
]
SHAPE = (4, 6, 6, 7)
WEIGHT, BIAS = normal(6, 6, 3, 3, std=0.1), normal(6)


def model(nodes: list[onnx.NodeProto], addend: bool, opset: int) -> onnx.ModelProto:
    names = ["x", "z"] if addend else ["x"]
    inputs = [onnx.helper.make_tensor_value_info(n, 1, SHAPE) for n in names]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, SHAPE)]
    weights = [onnx.numpy_helper.from_array(a, n) for a, n in ((WEIGHT, "w"), (BIAS, "b"))]
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(nodes, "fused", inputs, outputs, weights)
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def gradients(proto: onnx.ModelProto, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    found: list[np.ndarray] = session(differentiate(proto, wrt=names)).run([f"{n}.grad" for n in names], feed)
    return found


def estimated(proto: onnx.ModelProto) -> tuple[dict[str, float], dict[str, Range], dict[str, float]]:
    loaded = from_proto(proto, "model", Path("."))
    canonicalize(loaded, Dims())
    given = {"x": Moments.normal(4, 0.5, 1.0), "z": Moments.normal(4, 0.2, 0.5)}
    found = estimate(loaded.graph, batch=4, inputs=given)
    rms = {str(v.name): float(np.sqrt(np.mean(g.total))) for v, g in found.gradients.items()}
    rms["E[y^2]"] = next(float(np.mean(m.second)) for v, m in found.moments.items() if v.name == "y")
    box = Range(np.full((1,) * 4, -1.0), np.full((1,) * 4, 2.0))
    proof = prove(loaded.graph, {"x": box, "z": box}, batch=4, mode="eval")
    ranges = {str(v.name): r for v, r in proof.ranges.items()}
    return rms, ranges, {str(v.name): f for v, f in proof.bounds.items()}


@pytest.mark.parametrize(("activation", "params", "parts"), ACTIVATIONS)
@pytest.mark.parametrize("addend", [False, True])
def test_fused_conv(
    activation: str | None, params: list[float], parts: list[tuple[str, dict[str, float]]], addend: bool
) -> None:
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1]}
    named: dict[str, Any] = {} if activation is None else {"activation": activation}
    named |= {"activation_params": params} if params else {}
    make = onnx.helper.make_node
    read = ["x", "w", "b", *(["z"] if addend else [])]
    fused = model([make("FusedConv", read, ["y"], domain="com.microsoft", **window, **named)], addend, 21)
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Conv", ["x", "w", "b"], window),
        *([("Add", ["", "z"], {})] if addend else []),
    ]
    steps += [(op, [""], attributes) for op, attributes in parts]
    nodes = [
        make(op, [v or f"t{k - 1}" for v in names], ["y" if k == len(steps) - 1 else f"t{k}"], **attributes)
        for k, (op, names, attributes) in enumerate(steps)
    ]
    plain = model(nodes, addend, 10 if activation == "Clip" else 21)
    names = ["x", "w", "b", *(["z"] if addend else [])]
    feed = {n: RNG.standard_normal(SHAPE).astype(np.float32) for n in ("x", "z", "y.cotangent")}
    feed = feed if addend else {n: v for n, v in feed.items() if n != "z"}
    for one, other in zip(gradients(fused, names, feed), gradients(plain, names, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    rms, ranges, bounds = estimated(fused)
    rms_parts, ranges_parts, bounds_parts = estimated(plain)
    assert {k: rms[k] for k in (*names, "E[y^2]")} == pytest.approx({k: rms_parts[k] for k in (*names, "E[y^2]")}, 0.02)
    assert bounds["x"] == pytest.approx(bounds_parts["x"], 1e-3)
    np.testing.assert_allclose(ranges["y"].lo, ranges_parts["y"].lo, atol=1e-4)
    np.testing.assert_allclose(ranges["y"].hi, ranges_parts["y"].hi, atol=1e-4)
