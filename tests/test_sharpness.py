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


def test_what_is_not_finite_is_infinitely_steep() -> None:
    assert trace([1.0, math.inf], 1.0) == math.inf
    assert trace([0.0], 1.0) is None
    assert trace([1.0], 0.0) is None
