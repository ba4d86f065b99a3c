"""Measured gradients are PyTorch's (golden files: benchmarks/golden.py)."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import gradlint
from gradlint.results import Report

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(
    (path.stem, *key.split(".")[:2])
    for path in FOLDER.glob("*.npz")
    for key in {".".join(k.split(".")[:2]) for k in np.load(path).files if k.count(".") > 1}
)


def checked(name: str, loss: str, mode: str, tmp_path: Path) -> tuple[Report, dict[str, np.ndarray]]:
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    np.savez(tmp_path / "data.npz", x=arrays["x"], target=arrays[f"{loss}.target"])
    report = gradlint.check(FOLDER / f"{name}.onnx", data=tmp_path / "data.npz", loss=loss, mode=mode)
    prefix = f"{loss}.{mode}."
    return report, {k.removeprefix(prefix): g for k, g in arrays.items() if k.startswith(prefix)}


@pytest.mark.parametrize(("name", "loss", "mode"), CASES)
def test_gradients_are_those_of_pytorch(name: str, loss: str, mode: str, tmp_path: Path) -> None:
    report, truth = checked(name, loss, mode, tmp_path)
    rows = {}
    for row in report.weights:
        for parameter in [row.name, *([row.parameter] if isinstance(row.parameter, str) else row.parameter or [])]:
            rows.setdefault(parameter, row.measured)
    assert set(truth) <= set(rows)
    largest = max(float(np.abs(g).max()) for g in truth.values())
    for parameter, g in truth.items():
        found = rows[parameter]
        rms = float(np.sqrt(np.mean(g.astype(np.float64) ** 2)))
        assert found["grad_rms"] == pytest.approx(rms, rel=1e-3, abs=1e-6 * largest), parameter
        assert found["grad_mean_abs"] == pytest.approx(float(np.abs(g).mean()), rel=1e-3, abs=1e-6 * largest), parameter


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_estimates_are_of_the_same_size(name: str, tmp_path: Path) -> None:
    report, truth = checked(name, "linear", "eval", tmp_path)
    for row in report.weights:
        parameter = row.parameter if isinstance(row.parameter, str) else row.name
        rms = float(np.sqrt(np.mean(truth[parameter].astype(np.float64) ** 2)))
        if rms > 1e-4:
            assert 0.2 < row.estimated["grad_rms"] / rms < 5, parameter


def test_the_line_in_the_source_is_the_users_own() -> None:
    root = FOLDER.parent.parent
    report = gradlint.check(FOLDER / "attention.onnx", probe=False, source_root=root)
    files = {row.source.file for row in report.layers if row.source is not None}
    assert {(root / file).resolve() for file in files} == {root / "benchmarks" / "golden.py"}


def test_backward_model_of_every_golden_file_is_valid() -> None:
    for path in sorted(FOLDER.glob("*.onnx")):
        model = gradlint.differentiate(path)
        onnx.checker.check_model(model, full_check=True)
        assert [o.name for o in model.graph.output if o.name.endswith(".grad")], path
