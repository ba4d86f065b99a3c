"""Attention and RotaryEmbedding, written out by their standard bodies; attention as exporters spell it."""

import numpy as np
import onnx
import pytest

from gradlint import check
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(5)


def heads(batch: int, count: int, tokens: int, size: int, std: float = 1.0) -> Activation:
    return Activation((batch, count, tokens, size), std=std)


Q, K, V = heads(4, 2, 12, 16), heads(4, 2, 12, 16), heads(4, 2, 12, 8)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_attention_over_heads(std: float) -> None:
    check_op("Attention", heads(4, 2, 12, 16, std), K, V, opset=23, proof=False)


@pytest.mark.parametrize(
    "attributes", [{"scale": 0.1}, {"is_causal": 1}, {"softcap": 1.5}, {"is_causal": 1, "scale": 0.5, "softcap": 3.0}]
)
def test_attention_attributes(attributes: dict[str, float]) -> None:
    check_op("Attention", Q, K, V, opset=23, proof=False, moments=0.15, pullback=0.2, **attributes)


def test_three_dimensional_layout_with_grouped_queries() -> None:
    q, k, v = Activation((4, 12, 64)), Activation((4, 12, 32)), Activation((4, 12, 16))
    check_op("Attention", q, k, v, opset=23, proof=False, q_num_heads=4, kv_num_heads=2, pullback=0.15)


def test_float_mask() -> None:
    mask = np.where(RNG.uniform(size=(12, 12)) < 0.3, -1e4, 0.0).astype(np.float32)
    check_op("Attention", Q, K, V, mask, opset=23, proof=False, wrt=(0, 1, 2), pullback=0.15)


def test_boolean_mask() -> None:
    mask = (RNG.uniform(size=(1, 1, 12, 12)) < 0.7) | np.eye(12, dtype=bool)
    check_op("Attention", Q, K, V, mask, opset=23, proof=False, pullback=0.15)


def test_gradient_of_a_learned_bias_of_the_logits() -> None:
    bias = RNG.standard_normal((2, 12, 12)).astype(np.float32)
    check_op("Attention", Q, K, V, bias, opset=23, proof=False, moments=None, pullback=None)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_cache_and_scores_as_outputs(mode: int) -> None:
    causal = int(mode != 2)  # scores behind the mask hold infinities
    past_k, past_v = heads(2, 2, 5, 16), heads(2, 2, 5, 8)
    check_op(
        "Attention", heads(2, 2, 3, 16), heads(2, 2, 3, 16), heads(2, 2, 3, 8), None, past_k, past_v,
        opset=23, outputs=4, qk_matmul_output_mode=mode, is_causal=causal, proof=False, moments=None, pullback=None,
    )  # fmt: skip


def tables(rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(rows)[:, None] * 100.0 ** (-np.arange(size) / size)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_embedding(interleaved: int, part: int) -> None:
    cos, sin = tables(20, (part or 8) // 2)
    positions = RNG.integers(0, 20, (4, 6))
    check_op(
        "RotaryEmbedding", heads(4, 2, 6, 8), cos, sin, positions,
        opset=23, wrt=(0,), interleaved=interleaved, rotary_embedding_dim=part, proof=False,
    )  # fmt: skip


def test_rotary_embedding_of_flat_heads() -> None:
    cos, sin = tables(6, 4)
    cos, sin = np.repeat(cos[None], 4, 0), np.repeat(sin[None], 4, 0)
    check_op("RotaryEmbedding", Activation((4, 6, 16)), cos, sin, opset=23, wrt=(0,), num_heads=2, proof=False)


def test_the_constants_of_the_body_are_no_weights() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 12, opset_import: ["" : 24]> g (float[2, 2, 5, 8] x) => (float[2, 2, 5, 8] y) '
        "{ y = Attention(x, x, x) }"
    )
    assert [o.name for o in differentiate(proto).graph.output] == ["y", "x.grad"]
    assert check(proto).weights == ()
