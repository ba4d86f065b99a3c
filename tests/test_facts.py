"""Facts that the probe and its data give: figures of the data, the first loss, saturation, what an overflow leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import cnn, mlp, rnn, transformer

import gradlint
from gradlint.results import Finding, Report


def only(model: onnx.ModelProto, rule: str, **options: Any) -> Finding:
    (finding,) = gradlint.check(model, select=(rule,), **options).findings
    return finding


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def test_initial_loss_is_the_mean_cross_entropy_of_the_data(tmp_path: Path) -> None:
    model, rng = mlp(depth=4, gain=4.0), np.random.default_rng(0)
    x, target = rng.standard_normal((16, 32)).astype(np.float32), np.arange(16) % 10
    (logits,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    expected = float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(16), target]))
    found = only(model, "initial-loss", loss="cross-entropy", data=saved(tmp_path, x=x, target=target))
    assert found.metrics["initial_loss"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["classes"] == 10


def test_figures_of_the_data_are_those_of_the_array(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(50.0, 20.0, (16, 32)).astype(np.float32)
    metrics = only(mlp(), "data-scale", data=saved(tmp_path, x=x)).metrics
    figures = [metrics[f"data_{name}"] for name in ("mean", "std", "low", "high")]
    assert figures == pytest.approx([x.mean(), x.std(), x.min(), x.max()], rel=1e-5)


def test_a_saturated_attention_puts_its_weight_on_one_key() -> None:
    metrics = only(transformer(depth=1, query_gain=40.0), "attention-saturated").metrics
    assert 0.9 < metrics["max_probability"] <= 1.0
    assert metrics["logit_std"] == pytest.approx(40, rel=0.5)


def test_a_slope_that_float32_lost_is_an_error() -> None:
    found = only(mlp(depth=2, activation="Sigmoid", gain=1e6), "saturated-activation")
    assert (found.level, found.evidence) == ("error", "measured")


def test_a_clip_that_is_always_shut_is_proved_flat() -> None:
    found = only(mlp(depth=1, activation="HardSigmoid", bias=-1000.0), "flat-activation", probe=False)
    assert found.level == "error"


def overflowing() -> Report:
    return gradlint.check(mlp(depth=60, gain=50.0))


def test_an_overflow_is_said_and_no_gradient_is_believed_that_came_through_it() -> None:
    report = overflowing()
    by_rule = {f.rule: f for f in report.findings}
    assert by_rule["non-finite"].evidence == "measured"
    assert "overflows" in by_rule["non-finite"].message
    assert by_rule["exploding-gradient"].evidence == "estimated"
    assert "vanishing-gradient" not in by_rule
    assert report.summary.verdict == "fail"
    first, last = report.layers[0], report.layers[-1]
    assert math.isfinite(first.measured["output_std"])
    assert "grad_norm" not in first.measured
    assert not last.measured


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        mlp(depth=8, activation="Exp", gain=5.0),
        mlp(depth=60, activation="Identity", gain=1e6),
        mlp(depth=12, gain=100.0, residual=True),
        mlp(depth=3, kernels=["normal", "nan"]),
        rnn(steps=100, gain=9.0, activation="Relu"),
        cnn(depth=20, gain=1e5),
        transformer(depth=2, query_gain=1e8, gain=1e8),
    ],
    ids=["exp", "linear", "residual", "nan", "rnn", "cnn", "transformer"],
)
def test_what_explodes_fails_and_nothing_raises(model: onnx.ModelProto, probe: bool) -> None:
    assert gradlint.check(model, probe=probe).summary.verdict == "fail"


def test_a_model_without_a_float_output_has_no_gradient_to_measure() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> net (float[N, 2] x) => (int64[N] y) <float[2, 2] w = {1, 2, 3, 4}>'
        "{ z = MatMul(x, w) y = ArgMax<axis = 1, keepdims = 0>(z) }"
    )
    assert "no output is a float" in only(model, "probe-skipped").message


def conv1d(length: int) -> onnx.ModelProto:
    """Six convolutions of 16 channels over a sequence, each with a ReLU."""
    rng, text, value = np.random.default_rng(0), [], "x"
    weights = [f"float[16, 16, 3] w{k} = {{{', '.join(map(str, rng.normal(0, 0.2, 768).round(3)))}}}" for k in range(6)]
    for k in range(6):
        text.append(f"c{k} = Conv<pads = [1, 1]>({value}, w{k}) {'y' if k == 5 else f'r{k}'} = Relu(c{k})")
        value = f"r{k}"
    shape = f"float[N, 16, {length}]"
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> net ({shape} x) => ({shape} y) <{", ".join(weights)}>'
        f"{{ {' '.join(text)} }}"
    )


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_a_recurrent_layer_speaks_of_the_output_that_is_read(cell: str) -> None:
    """The builder leaves Y out, as exporters do where only the last state is wanted."""
    row = next(row for row in gradlint.check(rnn(cell=cell)).layers if row.op_type == cell)
    assert (row.shape[0], row.shape[-1]) == (1, 16)
    for figures in (row.estimated, row.measured):
        assert {"output_std", "signal", "grad_norm", "decades"} <= set(figures)


def test_the_width_of_a_convolution_over_a_sequence_is_that_of_its_channels() -> None:
    assert gradlint.check(conv1d(2), select=("narrow-deep-relu",)).findings == ()


def test_a_large_head_is_no_exploding_chain() -> None:
    model = mlp(depth=4, gain=1.414)
    head = next(w for w in model.graph.initializer if w.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(1e5 * onnx.numpy_helper.to_array(head), head.name))
    assert not gradlint.check(model, select=("exploding-gradient",)).findings


def test_values_carry_the_signal_past_the_weights_of_an_attention() -> None:
    model = transformer(depth=2, skip=False, query_gain=1e-4)  # weights that hardly differ between examples
    for node in [n for n in model.graph.node if n.name.endswith(".value")]:
        there, moved = f"{node.output[0]}.moved", f"{node.output[0]}.there"
        back = onnx.helper.make_node("Transpose", [there], [node.output[0]], f"{node.name}.back", perm=[0, 2, 1])
        away = onnx.helper.make_node("Transpose", [moved], [there], f"{node.name}.away", perm=[0, 2, 1])
        node.output[0] = moved
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at + 1, back)
        model.graph.node.insert(at + 1, away)
    assert not gradlint.check(model, select=("signal-collapse",)).findings


def test_a_layer_of_one_unit_is_measured_behind_its_bias() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[8, 4] x) => (float[8, 1] y) <float[4, 1] w = {1, 2, 3, 4}, float[1] b = {0.5}> {
            h = MatMul (x, w)
            y = Add (h, b)
        }"""
    )
    (row,) = (layer for layer in gradlint.check(model).layers if layer.op_type == "MatMul")
    assert row.measured is not None
    assert row.measured["output_std"] > 0
