"""How steep the loss is at the start: the trace of the tangent kernel, by every loss and by the estimate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import mlp

import gradlint
from gradlint.sharpness import trace

ANY = {"steep-loss": {"warning": -99.0, "error": 99.0}}


def sharpness(model: onnx.ModelProto, **options: Any) -> float:
    (finding,) = gradlint.check(model, select=("steep-loss",), limits=ANY, **options).findings
    return float(finding.metrics["sharpness"])


def responsiveness(model: onnx.ModelProto, **options: Any) -> float:
    any_ = {"weight-gradient-underflow": {"warning": 99.0, "error": -99.0}}
    (finding,) = gradlint.check(model, select=("weight-gradient-underflow",), limits=any_, **options).findings
    return float(finding.metrics["responsiveness"])


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize("probe", [True, False])
def test_of_one_linear_layer_it_is_the_square_of_the_input_and_one_for_the_bias(probe: bool) -> None:
    assert sharpness(mlp(depth=0, inputs=400), batch=64, probe=probe) == pytest.approx(math.log10(401), abs=0.1)


def test_every_loss_finds_the_same(tmp_path: Path) -> None:
    """The mean of a cross-entropy's gradients over examples cancels in part; so does that of a shift."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((64, 32)).astype(np.float32), rng.integers(0, 10, 64)
    model = mlp(depth=3, gain=1.5)
    alike = sharpness(model, data=saved(tmp_path, x=x, target=target), loss="cross-entropy")
    onehot = np.eye(10, dtype=np.float32)[target]
    others = [
        sharpness(model, data=saved(tmp_path, x=x)),
        sharpness(model, data=saved(tmp_path, x=x, target=onehot), loss="mse"),
        sharpness(model, data=saved(tmp_path, x=x, target=onehot), loss="bce"),
        sharpness(model, data=saved(tmp_path, x=x), probe=False),
    ]
    assert others == pytest.approx([alike] * 4, abs=0.35)


def test_it_grows_with_the_square_of_every_layer() -> None:
    """Of three layers that are each drawn 10 times larger, two stand between a kernel and the outputs."""
    small, large = (sharpness(mlp(depth=3, gain=gain)) for gain in (1.4, 14.0))
    assert large - small == pytest.approx(6.0, abs=0.7)


def test_a_layer_behind_which_a_normalisation_stands_does_not_count() -> None:
    one, two = (mlp(depth=3, gain=gain, norm=True) for gain in (1.0, 30.0))
    assert sharpness(two) == pytest.approx(sharpness(one), abs=0.1)


def test_a_network_that_overshoots_fails_though_no_layer_stands_out() -> None:
    steep = gradlint.check(mlp(depth=2, gain=20.0))
    assert steep.summary.verdict == "fail"
    assert [f.rule for f in steep.findings if f.level == "error"] == ["steep-loss"]
    assert gradlint.check(mlp(depth=2, gain=20.0), optimizer="adam").summary.verdict == "warn"


@pytest.mark.parametrize("probe", [True, False])
def test_what_all_examples_have_in_common_moves_none_of_them_apart(probe: bool, tmp_path: Path) -> None:
    """Inputs of mean 10 and variance 1: of the square of 101 per input 1 is left."""
    x = 10 + np.random.default_rng(0).standard_normal((64, 400)).astype(np.float32)
    options = {"data": saved(tmp_path, x=x), "probe": probe}
    model = mlp(depth=0, inputs=400)
    assert sharpness(model, **options) == pytest.approx(math.log10(400 * 101), abs=0.3)
    assert responsiveness(model, **options) == pytest.approx(math.log10(400), abs=0.3)


@pytest.mark.parametrize("probe", [True, False])
def test_small_weights_make_the_loss_flat_though_all_layers_learn_at_one_pace(probe: bool) -> None:
    """Each of four kernels has three others beside it, two of which are drawn 10 times smaller, or three (the head)."""
    usual, small = (responsiveness(mlp(depth=3, gain=gain), probe=probe) for gain in (1.4, 0.14))
    assert usual - small == pytest.approx(4.0, abs=0.7)


def test_a_network_that_hardly_moves_fails_unless_adam_trains_it() -> None:
    flat = mlp(depth=8, gain=0.3)
    found = gradlint.check(flat)
    assert found.summary.verdict == "fail"
    assert "weight-gradient-underflow" in {f.rule for f in found.findings if f.level == "error"}
    adam = gradlint.check(flat, optimizer="adam")
    assert adam.summary.risk is not None
    assert found.summary.risk is not None
    assert adam.summary.risk < found.summary.risk
    assert "weight-gradient-underflow" not in {f.rule for f in adam.findings}


def test_dead_units_move_nothing() -> None:
    assert responsiveness(mlp(depth=2, bias=-100.0)) == -math.inf


def test_what_is_not_finite_is_infinitely_steep() -> None:
    assert trace([1.0, math.inf], 1.0) == math.inf
    assert trace([0.0], 1.0) is None
    assert trace([1.0], 0.0) is None


def test_a_gradient_that_is_not_known_is_not_taken_for_none() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> {
            parts = SplitToSequence <axis = 1> (x)
            h = ConcatFromSequence <axis = 1> (parts)
            y = MatMul (h, w)
        }"""
    )
    report = gradlint.check(model, probe=False)
    assert not [f for f in report.findings if f.rule == "weight-gradient-underflow"]
