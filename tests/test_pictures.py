"""Pictures of a layer: counted inside the session, and made for a page alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import mlp
from command import SAMPLES, gradlint
from onnx import numpy_helper
from test_recurrent_facts import chain

import gradlint as package
from gradlint.histograms import BINS, Histogram, stride
from gradlint.report import render
from gradlint.results import Picture, Report

GOLDEN = Path(__file__).parent / "golden"


def pictured(model: onnx.ModelProto | Path, **options: Any) -> Report:
    return package.check(model, pictures=True, **options)


def of(report: Report, kind: str, layer: str | None = None) -> list[Picture]:
    return [
        picture
        for row in report.layers
        if layer in (None, row.name)
        for picture in row.pictures or ()
        if picture.kind == kind
    ]


def elements(picture: Picture) -> int:
    return sum(picture.counts) + picture.left_out


def middles(picture: Picture) -> np.ndarray:
    edges = np.linspace(picture.low, picture.high, len(picture.counts) + 1)
    return (edges[1:] + edges[:-1]) / 2


def test_the_session_counts_as_numpy_does(tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((40, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    model = mlp(depth=2, width=16, inputs=16, activation="Tanh")
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    first = model.graph.node[0]
    z = x @ weights[first.input[1]].T + weights[first.input[2]]
    expected = Histogram.of(z)
    picture = of(pictured(model, data=tmp_path / "data.npz"), "input")[0]
    assert expected is not None
    assert (picture.low, picture.high) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert sum(picture.counts) == z.size
    # An element within rounding of an edge may fall on either side.
    assert np.abs(np.subtract(picture.counts, expected.counts)).sum() <= 4


def test_zero_is_an_edge_and_what_is_not_finite_is_left_out() -> None:
    found = Histogram.of(np.array([-1.0, 2.0, 0.0, math.nan, math.inf, -0.1]))
    assert found is not None
    edges = np.linspace(found.low, found.high, BINS + 1)
    assert np.abs(edges).min() < 1e-9
    assert (sum(found.counts), found.left_out) == (4, 2)
    assert sum(n for n, edge in zip(found.counts, edges, strict=False) if edge < -1e-9) == 2
    assert Histogram.of(np.full(3, math.nan)) is None


@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (4096, 4096), (3, 5), (100_000,), (1 << 20, 2)])
def test_a_sample_takes_part_of_every_column(shape: tuple[int, ...]) -> None:
    step, size = stride(shape), math.prod(shape)
    columns = {k % shape[-1] for k in range(0, size, step)}
    assert len(columns) == shape[-1] or size // step < shape[-1]


def test_the_shaded_part_is_the_saturated_share() -> None:
    report = pictured(mlp(depth=3, width=64, activation="Tanh", gain=6.0), batch=64)
    for row in report.layers:
        for picture in of(report, "input", row.name):
            flat = np.array(picture.curve) < 0.05
            share = np.array(picture.counts)[flat].sum() / elements(picture)
            assert share == pytest.approx(row.measured["saturated"], abs=0.05)
            assert 0 < max(picture.curve) <= 1


def test_a_weight_stands_beside_the_initialisation_it_should_have() -> None:
    report = pictured(mlp(depth=4, width=100, activation="Relu", gain=math.sqrt(2)), probe=False)
    first = of(report, "weight")[1]
    assert (first.scheme, first.std) == ("He", pytest.approx(math.sqrt(2 / 100), rel=1e-3))
    spread = math.sqrt(np.average(middles(first) ** 2, weights=first.counts))
    assert spread == pytest.approx(first.std, rel=0.1)


def test_gradients_are_counted_by_size_and_zeros_apart() -> None:
    report = pictured(SAMPLES / "dead_relu.onnx", data=SAMPLES / "dead_relu.npz")
    sizes = {picture.subject: picture for picture in of(report, "gradient")}
    for weight in report.weights:
        if (picture := sizes.get(weight.name)) is None:
            continue
        assert picture.left_out / elements(picture) == pytest.approx(weight.measured["zero_share"], abs=0.05)
        square = np.sum(10 ** (2 * middles(picture)) * picture.counts) / elements(picture)
        assert math.sqrt(square) == pytest.approx(weight.measured["grad_rms"], rel=0.25)
    assert any(picture.left_out > sum(picture.counts) for picture in sizes.values())


def test_recurrent_layers_show_the_gradient_over_time() -> None:
    path = SAMPLES / "rnn_200.onnx"
    for probe, evidence in ((True, "measured"), (False, "estimated")):
        (picture,) = of(pictured(path, data=SAMPLES / "rnn_200.npz", probe=probe), "time")
        assert (picture.low, picture.high, picture.evidence) == (1, 200, evidence)
        assert len(picture.curve) == 120
        assert picture.curve[0] < picture.curve[-1] - 10


def test_a_recurrence_that_was_unrolled_shows_it_too() -> None:
    report = pictured(chain(12))
    (picture,) = of(report, "time", "r0")
    norms = [row.measured["grad_norm"] for row in report.layers if row.name.startswith("r")]
    assert picture.curve == pytest.approx(np.log10(norms), abs=0.01)
    assert of(report, "time") == [picture]


def test_attention_shows_its_logits_and_entropy() -> None:
    report = pictured(GOLDEN / "attention.onnx")
    (logits,), (entropy,) = of(report, "logits"), of(report, "entropy")
    assert logits.std is not None
    assert np.average(middles(logits), weights=logits.counts) == pytest.approx(0, abs=0.2 * logits.std)
    assert 0 < entropy.low < entropy.high <= 1.1


def test_only_a_page_has_pictures_and_they_change_nothing_else() -> None:
    model = mlp(depth=3, width=32, activation="Sigmoid")
    without, drawn = package.check(model), pictured(model)
    assert "pictures" not in json.dumps(without.to_dict())
    assert "pictures_s" not in without.timing
    assert drawn.timing["pictures_s"] > 0
    rows = tuple(replace(row, pictures=None) for row in drawn.layers)
    assert replace(drawn, layers=rows, timing={}) == replace(without, timing={})
    assert pictured(model).layers == drawn.layers


def test_json_and_page_of_one_run_make_the_same_page(tmp_path: Path) -> None:
    model, data = SAMPLES / "lstm_200.onnx", SAMPLES / "lstm_200.npz"
    files = {name: tmp_path / name for name in ("r.json", "run.html", "named.html", "rendered.html")}
    command = (model, "--data", data, "--fail-on", "never")
    assert gradlint(*command, "--json", files["r.json"], "--html", files["run.html"]).returncode == 0
    assert gradlint(*command, "-o", files["named.html"]).returncode == 0
    assert gradlint("render", files["r.json"], "-o", files["rendered.html"]).returncode == 0
    page = files["run.html"].read_text()
    assert page.count("<figure") >= 6
    assert files["named.html"].read_text() == files["rendered.html"].read_text() == page


def test_a_report_with_pictures_survives_json() -> None:
    report = pictured(GOLDEN / "lstm.onnx")
    read = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert [row.pictures for row in read.layers] == [row.pictures for row in report.layers]
    assert render([read], "html") == render([report], "html")
    assert render([read], "json") == render([report], "json")


def test_a_batch_run_in_parts_is_counted_on_the_first(tmp_path: Path) -> None:
    model = mlp(depth=2, width=8, inputs=8, activation="Relu")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32))
    for picture in of(pictured(model, data=tmp_path / "data.npz"), "input"):
        assert elements(picture) == 8
