"""How far weights moved between two model files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import mlp
from command import gradlint
from onnx import numpy_helper


def moved(model: onnx.ModelProto, shares: dict[str, float]) -> onnx.ModelProto:
    """The model with these weights moved, each by a share of its size."""
    copy, rng = onnx.ModelProto(), np.random.default_rng(7)
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in shares:
            array = numpy_helper.to_array(tensor)
            step = rng.standard_normal(array.shape)
            step *= shares[tensor.name] * np.linalg.norm(array) / np.linalg.norm(step)
            tensor.CopyFrom(numpy_helper.from_array((array + step).astype(np.float32), tensor.name))
    return copy


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    model = mlp(depth=3, width=32, activation="Relu")
    shares = {"layers.1.weight": 1e-3, "layers.2.weight": 0.25, "head.weight": 2.0}
    paths = tmp_path / "base.onnx", tmp_path / "head.onnx"
    for path, side in zip(paths, (model, moved(model, shares)), strict=True):
        onnx.save(side, path)
    return paths


def test_the_change_over_the_size_of_each_weight(sides: tuple[Path, Path]) -> None:
    run = gradlint("diff", *sides, "--format", "json", "--fail-on", "never")
    rows = {row["weight"]: row["moved"] for row in json.loads(run.stdout)["models"][0]["weights"]}
    assert rows["layers.0.weight"] == 0
    assert rows["layers.1.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert rows["layers.2.weight"] == pytest.approx(0.25, rel=1e-4)
    assert rows["head.weight"] == pytest.approx(2.0, rel=1e-4)
    assert (
        "weights moved by 0 % (layers.0.weight) to 200 % (head.weight)"
        in gradlint("diff", *sides, "--fail-on", "never").stdout
    )


def test_weights_of_another_shape_are_passed_over(sides: tuple[Path, Path], tmp_path: Path) -> None:
    onnx.save(mlp(depth=3, width=24, activation="Relu"), tmp_path / "narrow.onnx")
    run = gradlint("diff", sides[0], tmp_path / "narrow.onnx", "--format", "json", "--fail-on", "never")
    names = {row["weight"] for row in json.loads(run.stdout)["models"][0]["weights"]}
    assert names <= {"head.bias"}


def test_of_reports_there_is_no_movement(sides: tuple[Path, Path], tmp_path: Path) -> None:
    gradlint(sides[0], "--json", tmp_path / "base.json")
    run = gradlint("diff", tmp_path / "base.json", sides[1], "--html", tmp_path / "d.html", "--fail-on", "never")
    assert run.returncode == 0
    assert "moved" not in run.stdout
    assert "How far each weight moved" not in (tmp_path / "d.html").read_text()
