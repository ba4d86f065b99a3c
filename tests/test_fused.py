"""onnxruntime's fused operators taken apart: what its own kernels compute, and finite differences of them."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gradlint import check
from gradlint.reverse import CUT_KEY, differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(11)
TOKENS = Activation((3, 6, 8))
MASK = np.array([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1]], np.int32)


def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> np.ndarray:
    return (mean + std * RNG.standard_normal(shape)).astype(np.float32)


def check_fused(op: str, *inputs: Activation | np.ndarray | None, **attributes: Any) -> None:
    """The forward values are the kernel's, and the gradients finite differences of it."""
    check_op(op, *inputs, domain="com.microsoft", moments=None, pullback=None, proof=False, **attributes)
    assert_same_values(op, *inputs, **attributes)


def assert_same_values(op: str, *inputs: Activation | np.ndarray | None, **attributes: Any) -> None:
    names = [f"x{k}" if v is not None else "" for k, v in enumerate(inputs)]
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes)
    floats = {f"x{k}": normal(*v.shape) for k, v in enumerate(inputs) if isinstance(v, Activation)}
    stored = [numpy_helper.from_array(v, f"x{k}") for k, v in enumerate(inputs) if isinstance(v, np.ndarray)]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in floats.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], op, given, [result], stored)
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    back = differentiate(proto)
    assert all(n.domain == "" for n in back.graph.node)
    assert CUT_KEY not in {p.key for p in back.metadata_props}
    onnx.checker.check_model(back)
    (y,) = session(proto).run(["y"], floats)
    (again,) = session(back).run(["y"], {**floats, "y.cotangent": np.zeros_like(y)})
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [
        {"activation": "Relu"},
        {"activation": "LeakyRelu", "activation_alpha": 0.2, "transB": 1},
        {"activation": "Tanh", "alpha": 2.0, "beta": 0.1},
        {"activation": "HardSigmoid", "activation_alpha": 0.1, "activation_beta": 0.5},
    ],
)
def test_gemm_with_an_activation(attributes: dict[str, Any]) -> None:
    far_from_kinks = np.tile(np.array([3, -3], np.float32), 4)
    check_fused("FusedGemm", Activation((5, 8)), normal(8, 8, std=0.1), far_from_kinks, **attributes)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"unidirectional": 1}])
def test_attention_of_a_packed_product(attributes: dict[str, Any]) -> None:
    check_fused("Attention", TOKENS, normal(8, 24, std=0.4), normal(24), num_heads=2, **attributes)


def test_attention_whose_values_have_a_width_of_their_own() -> None:
    w, b, sizes = normal(8, 16, std=0.4), normal(16), [4, 4, 8]
    check_fused("Attention", TOKENS, w, b, num_heads=2, qkv_hidden_sizes=sizes)


@pytest.mark.parametrize("mask", [MASK, np.stack([np.tril(np.ones((6, 6), np.int32))] * 3)])
def test_attention_with_a_mask_and_a_bias_of_positions(mask: np.ndarray) -> None:
    w = normal(8, 24, std=0.4)
    check_fused("Attention", TOKENS, w, normal(24), mask, None, normal(3, 2, 6, 6), num_heads=2)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3, "mask_filter_value": -50.0}, {"unidirectional": 1}])
@pytest.mark.parametrize("biased", [False, True])
def test_multi_head_attention(attributes: dict[str, Any], biased: bool) -> None:
    bias = normal(24) if biased else None
    check_fused("MultiHeadAttention", TOKENS, TOKENS, TOKENS, bias, MASK, num_heads=2, **attributes)


def test_multi_head_attention_over_other_tokens() -> None:
    other, bias = Activation((3, 5, 8)), normal(1, 2, 6, 5)
    check_fused("MultiHeadAttention", TOKENS, other, other, normal(24), MASK[:, :5].copy(), bias, num_heads=2)


ANGLES = np.outer(np.arange(10), [1.0, 0.3]).astype(np.float32)
PLACES = np.array([np.arange(6), np.arange(1, 7), np.arange(4, 10)])


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 2, 6, 4)])
def test_rotary_embedding(shape: tuple[int, ...], interleaved: int) -> None:
    check_fused("RotaryEmbedding", Activation(shape), PLACES, np.cos(ANGLES), np.sin(ANGLES), interleaved=interleaved)


EMBEDDED = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (int32[2, 6] ids, int32[2, 6] kinds) => (float[2, 6, 8] y) {
    y, mask = com.microsoft.EmbedLayerNormalization<epsilon = 1e-5>(ids, kinds, word, position, kind, gamma, beta)
}"""
LOOKED_UP = """<ir_version: 8, opset_import: ["" : 17]>
g (int32[2, 6] ids, int32[2, 6] kinds) => (float[2, 6, 8] y) {
    a = Gather(word, ids)
    c = Gather(kind, kinds)
    b = Gather(position, places)
    ab = Add(a, b)
    abc = Add(ab, c)
    y = LayerNormalization<epsilon = 1e-5>(abc, gamma, beta)
}"""


def test_embeddings_added_up_and_normalised() -> None:
    tables = {
        "word": normal(20, 8), "position": normal(9, 8), "kind": normal(2, 8), "gamma": normal(8, mean=1.0),
        "beta": normal(8), "places": np.arange(6),
    }  # fmt: skip
    ids = {"ids": RNG.integers(0, 20, (2, 6)).astype(np.int32), "kinds": RNG.integers(0, 2, (2, 6)).astype(np.int32)}
    cotangent = normal(2, 6, 8)
    found = []
    for text in (EMBEDDED, LOOKED_UP):
        proto = onnx.parser.parse_model(text)
        read = {name for node in proto.graph.node for name in node.input}
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in tables.items() if n in read)
        wrt = ["word", "position", "kind", "gamma", "beta"]
        (y,) = session(proto).run(["y"], ids)
        names = ["y", *(f"{n}.grad" for n in wrt)]
        found.append([y, *session(differentiate(proto, wrt)).run(names, {**ids, "y.cotangent": cotangent})])
    for fused, plain in zip(*found, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("past", [False, True])
def test_attention_with_a_cache_stays_a_cut(past: bool) -> None:
    names = ["q", "k", "v", "", "", "", "past_key", "past_value"][: 8 if past else 3]
    node = helper.make_node(
        "MultiHeadAttention", names, ["y", "key", "value"], "a", domain="com.microsoft", num_heads=2
    )
    shapes = {n: [3, 2, 5, 4] if "past" in n else [3, 6, 8] for n in names if n}
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "key", "value")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(helper.make_graph([node], "g", given, outputs), opset_imports=imports, ir_version=8)
    listed = {p.key: p.value for p in differentiate(proto).metadata_props}[CUT_KEY]
    assert json.loads(listed)["operators"] == ["com.microsoft:MultiHeadAttention"]


def test_the_tables_of_a_rotary_embedding_are_no_weights() -> None:
    node = helper.make_node("RotaryEmbedding", ["x", "at", "cos", "sin"], ["y"], "turn", domain="com.microsoft")
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 6, 8])]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6, 8])]
    tables = {"at": PLACES, "cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}
    stored = [numpy_helper.from_array(a, n) for n, a in tables.items()]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "rotary", given, result, stored)
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    assert [o.name for o in differentiate(proto).graph.output] == ["y", "x.grad"]
    assert check(proto).weights == ()


BLOCK = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
block (float[B, S, 16] x, int32[B, S] mask) => (float[B, S, 16] y) {
    a = com.microsoft.Attention<num_heads = 4>(x, qkv, qkv_bias, mask)
    o = MatMul(a, out)
    s, mean, rate, r = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(o, x, gamma, beta, out_bias)
    f = MatMul(s, up)
    h = com.microsoft.BiasGelu(f, up_bias)
    flat = Reshape(h, rows)
    k = com.microsoft.FusedGemm<activation = "Tanh">(flat, down)
    back = Reshape(k, like)
    y = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(back, s, gamma, beta)
}"""
CONVOLUTIONS = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
net (float[N, 3, H, W] x) => (float[N, 6, P, Q] y) {
    a = com.microsoft.FusedConv<activation = "Relu", strides = [2, 2], pads = [1, 1, 1, 1]>(x, first)
    y = com.microsoft.FusedConv<activation = "Relu">(a, second)
}"""


@pytest.mark.parametrize("text", [BLOCK, CONVOLUTIONS])
def test_an_optimised_network_of_symbolic_sizes_is_modelled_whole(text: str) -> None:
    weights = {
        "qkv": normal(16, 48, std=0.25), "qkv_bias": normal(48, std=0.1), "out": normal(16, 16, std=0.25),
        "out_bias": normal(16, std=0.1), "gamma": normal(16, mean=1.0, std=0.1), "beta": normal(16, std=0.1),
        "up": normal(16, 64, std=0.25), "up_bias": normal(64, std=0.1), "down": normal(64, 16, std=0.1),
        "rows": np.array([-1, 64]), "like": np.array([-1, 16, 16]),
        "first": normal(8, 3, 3, 3, std=0.3), "second": normal(6, 8, 3, 3, std=0.2),
    }  # fmt: skip
    proto = onnx.parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items() if n in read)
    report = check(proto)
    assert report.coverage.unmodelled == {}
    for row in report.weights:
        assert 0.5 < row.estimated["grad_rms"] / row.measured["grad_rms"] < 2, row.name
