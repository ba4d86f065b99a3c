"""How far the last features differ between positions: by hand, by probe and estimate; where nothing is to be said."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import cnn, transformer
from onnx import numpy_helper

import gradlint
from gradlint.figures import difference

ANY = {"position-collapse": {"warning": 99.0, "error": -1.0}}


def figures(model: onnx.ModelProto, **options: Any) -> list[float]:
    """position_signal of the layer that has one."""
    findings = gradlint.check(model, select=("position-collapse",), limits=ANY, **options).findings
    return [float(f.metrics["position_signal"]) for f in findings]


def parsed(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items())
    return model


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape) / np.sqrt(shape[0])


PER_TOKEN = """agraph (float[N, 16, 32] x) => (float[N, 16, 4] y) {
    h = MatMul(x, kernel)  scaled = Mul(h, scale)  common = ReduceMean <axes = [1], keepdims = 1> (h)
    mixed = Add(scaled, common)  y = MatMul(mixed, head)
}"""
PER_PIXEL = """agraph (float[N, 3, 16, 16] x) => (float[N, 4, 16, 16] y) {
    hidden = Conv <pads = [1, 1, 1, 1]> (x, kernel)  y = Conv(hidden, head)
}"""
POOLED_BEHIND = """agraph (float[N, 3, 16, 16] x) => (float[N, 4, 1, 1] y) {
    hidden = Conv <pads = [1, 1, 1, 1]> (x, kernel)  maps = Conv(hidden, head)  y = GlobalAveragePool(maps)
}"""
PER_STEP = """agraph (float[20, N, 8] x) => (float[20, N, 4] y) {
    states = RNN <hidden_size = 16> (x, w, r)  flat = Squeeze(states, one)  y = MatMul(flat, head)
}"""


@pytest.mark.parametrize("probe", [True, False])
def test_of_tokens_with_a_common_part_it_is_what_is_left(probe: bool) -> None:
    """h / 100 beside the mean of 16: the variances are 1e-4 and 1/16."""
    model = parsed(PER_TOKEN, scale=np.array(0.01), kernel=drawn(32, 32), head=drawn(32, 4))
    assert figures(model, probe=probe, batch=32) == [pytest.approx(0.01 / np.sqrt(1 / 16), rel=0.1)]


@pytest.mark.parametrize("probe", [True, False])
def test_pixels_and_time_steps_are_positions_too(probe: bool) -> None:
    kernels = {"kernel": drawn(27, 8).T.reshape(8, 3, 3, 3), "head": drawn(8, 4).T.reshape(4, 8, 1, 1)}
    assert figures(parsed(PER_PIXEL, **kernels), probe=probe) == [pytest.approx(1.0, abs=0.2)]
    cell = {"w": drawn(8, 16).T[None], "r": np.linalg.qr(drawn(16, 16))[0][None], "head": drawn(16, 4)}
    model = parsed(PER_STEP, **cell)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    assert figures(model, probe=probe) == [pytest.approx(0.95, abs=0.1)]


@pytest.mark.parametrize("probe", [True, False])
def test_what_is_pooled_may_be_alike(probe: bool) -> None:
    kernels = {"kernel": drawn(27, 8).T.reshape(8, 3, 3, 3), "head": drawn(8, 4).T.reshape(4, 8, 1, 1)}
    assert figures(parsed(POOLED_BEHIND, **kernels), probe=probe) == []
    assert figures(cnn(), probe=probe) == []


def test_probe_and_estimate_agree_on_attention_with_and_without_skips() -> None:
    for depth, skip in ((1, False), (2, False), (4, True)):
        model = transformer(depth=depth, skip=skip)
        (measured,), (estimated,) = (figures(model, probe=probe, batch=32) for probe in (True, False))
        assert np.log10(estimated) == pytest.approx(np.log10(measured), abs=0.3)


def test_nothing_at_all_is_no_difference_and_overflow_is_not_known() -> None:
    assert difference(0.0, 0.0) == 0.0
    assert difference(1.0, float("inf")) is None
