"""The samples tell the story they were built for."""

import math
from pathlib import Path

import pytest

import gradlint
from gradlint.results import Report

FOLDER = Path(__file__).parent.parent / "sample_models"


def checked(name: str, **changes: object) -> Report:
    return gradlint.check(FOLDER / f"{name}.onnx", data=FOLDER / f"{name}.npz", loss="cross-entropy", **changes)


def mean_abs(report: Report, weight: str) -> float:
    return next(w.measured["grad_mean_abs"] for w in report.weights if w.name == weight)


def rules(report: Report, *levels: str) -> set[str]:
    return {f.rule for f in report.findings if not levels or f.level in levels}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("digits_sigmoid", 2.5, 5.0), ("digits_relu", -1.0, 1.0), ("digits_leaky_relu", -1.0, 1.0)],
)
def test_the_first_layer_starves_behind_sigmoids_only(name: str, low: float, high: float) -> None:
    report = checked(name)
    fall = math.log10(mean_abs(report, "layers.5.weight") / mean_abs(report, "layers.0.weight"))
    assert low < fall < high


def test_fifty_sigmoids_fail_and_their_slopes_are_blamed() -> None:
    report = checked("sigmoid_chain_50")
    assert report.summary.verdict == "fail"
    assert "vanishing-gradient" in rules(report, "error")
    first = report.layers[0]
    shares: dict[str, float] = {}
    for part in first.blame:
        shares[part.op_type] = shares.get(part.op_type, 0.0) + part.decades
    assert shares["Sigmoid"] < -25
    assert abs(shares.get("Gemm", 0.0)) < 3
    assert sum(shares.values()) == pytest.approx(first.measured["decades"], abs=0.2)


def test_the_fall_over_fifty_sigmoids_is_certain_for_every_input() -> None:
    finding = next(f for f in checked("sigmoid_chain_50").findings if f.rule == "vanishing-for-every-input")
    assert finding.evidence == "proved"


@pytest.mark.parametrize("name", ["resnet_bn", "digits_relu", "digits_leaky_relu", "lstm_200"])
def test_healthy_samples_pass_in_silence(name: str) -> None:
    report = checked(name)
    assert report.summary.verdict == "pass"
    assert rules(report, "error", "warning") == set()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("digits_sigmoid", "vanishing-gradient"),
        ("dead_relu", "dead-relu"),
        ("exploding_mlp", "exploding-gradient"),
        ("rnn_200", "rnn-vanishing-in-time"),
    ],
)
def test_sick_samples_are_named(name: str, rule: str) -> None:
    report = checked(name)
    assert report.summary.verdict in ("fail", "warn")
    assert rule in rules(report, "error")


def test_estimates_agree_with_measurements_on_the_sigmoid_chain() -> None:
    report = checked("sigmoid_chain_50", mode="eval")
    for layer in report.layers:
        assert abs(layer.estimated["decades"] - layer.measured["decades"]) < 1.0, layer.name


def test_gradients_far_under_single_precision_are_measured() -> None:
    """Squares of 1e-33 are no float32 numbers: the probe scales the cotangent and measures again."""
    first = checked("sigmoid_chain_50").layers[0]
    assert 0 < first.measured["grad_rms"] < 1e-25


def test_every_sample_is_covered_by_estimate_and_probe() -> None:
    for path in sorted(FOLDER.glob("*.onnx")):
        coverage = checked(path.stem).coverage
        assert coverage.unmodelled == {}, path.stem
        assert coverage.estimated == coverage.nodes, path.stem
        assert coverage.measured == coverage.nodes, path.stem
