"""Baselines: known findings stay quiet, worse and new ones don't, entries that no longer occur are told."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command import RELU, SIGMOID, gradlint
from report_fixtures import healthy_resnet, sigmoid_chain

from gradlint.baseline import hide_known, read_baseline, to_baseline
from gradlint.compare import compare, compare_all
from gradlint.exceptions import UsageError
from gradlint.report import render

RULES = {"vanishing-gradient", "sigmoid-chain", "init-scale-mismatch"}


def test_a_baseline_hides_exactly_its_findings(tmp_path: Path) -> None:
    report = replace(sigmoid_chain(), model=replace(sigmoid_chain().model, path=str(tmp_path / "nets" / "a.onnx")))
    known = tmp_path / "known.json"
    known.write_text(to_baseline([report], tmp_path))
    assert list(json.loads(known.read_text())["models"]) == ["nets/a.onnx"]
    hidden, stale = hide_known(report, read_baseline(known), RULES)
    assert (hidden.findings, stale) == ((), ())
    assert (hidden.summary.verdict, dict(hidden.summary.counts)) == ("warn", {"error": 0, "warning": 0, "note": 0})
    fewer = replace(report, findings=report.findings[1:])
    assert [entry.rule for entry in hide_known(fewer, read_baseline(known), RULES)[1]] == ["vanishing-gradient"]
    assert hide_known(fewer, read_baseline(known), {"sigmoid-chain"})[1] == ()


@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("full", "Nothing new: 14 findings are in the baseline.\n"),
        ("full", "\nno findings (14 in the baseline)\n"),
        ("concise", ": warn, risk 0.98, no findings (14 in the baseline)\n"),
        ("html", "<p>No findings (14 in the baseline).</p>"),
        ("markdown", "Nothing new: 14 findings are in the baseline."),
        ("github", "warn, risk 0.98, no findings (14 in the baseline)\n"),
        ("junit", "<system-out>Nothing new: 14 findings are in the baseline.</system-out>"),
        ("sarif", '"baselined": 14'),
        ("json", '"baselined": 14'),
    ],
)
def test_every_report_says_how_many_are_in_the_baseline(format: str, says: str, tmp_path: Path) -> None:
    known = tmp_path / "known.json"
    known.write_text(to_baseline([sigmoid_chain()], Path()))
    hidden, _ = hide_known(sigmoid_chain(), replace(read_baseline(known), folder=Path()), RULES)
    assert says in render([hidden], format)


def test_what_is_new_stands_beside_the_number_of_what_is_known(tmp_path: Path) -> None:
    report = sigmoid_chain()
    known = tmp_path / "known.json"
    known.write_text(to_baseline([replace(report, findings=report.findings[1:])], Path()))
    hidden, _ = hide_known(report, replace(read_baseline(known), folder=Path()), RULES)
    assert len(hidden.findings) == 1
    assert "\n1 error (13 in the baseline)\n" in render([hidden], "full")
    assert "13 findings in the baseline</sub>" in render([hidden], "markdown")
    assert "in the baseline" not in render([report], "full")


def test_a_finding_that_got_worse_is_not_hidden(tmp_path: Path) -> None:
    report = sigmoid_chain()
    milder = replace(report, findings=(replace(report.findings[0], level="warning"),))
    known = tmp_path / "known.json"
    known.write_text(to_baseline([milder], Path()))
    hidden, _ = hide_known(report, replace(read_baseline(known), folder=Path()), RULES)
    assert hidden.findings == report.findings


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "gradlint-baseline/1", "models": {"a": [{}]}}'])
def test_another_file_is_no_baseline(text: str, tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="baseline"):
        read_baseline(path)


def test_the_command_writes_it_hides_by_it_and_is_strict_about_it(tmp_path: Path) -> None:
    known, model = tmp_path / "known.json", tmp_path / "net.onnx"
    model.write_bytes(Path(SIGMOID).read_bytes())
    run = gradlint("baseline", model, "--no-probe", "-o", known)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    entries = len(json.loads(known.read_text())["models"]["net.onnx"])
    quiet = gradlint(model, "--no-probe", "--baseline", known, "--format", "json")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    report = json.loads(quiet.stdout)
    assert (report["findings"], report["summary"]["baselined"]) == ([], entries)
    model.write_bytes(Path(RELU).read_bytes())
    told = gradlint(model, "--no-probe", "--baseline", known)
    assert told.returncode == 0
    assert "no longer occurs: GL201 vanishing-gradient at layers.0.linear" in told.stderr
    assert gradlint(model, "--no-probe", "--baseline", known, "--strict-baseline").returncode == 1


def test_a_difference_tells_new_gone_and_same_findings_and_layers_that_lost() -> None:
    base, head = sigmoid_chain(40), sigmoid_chain(50)
    difference = compare(replace(base, findings=base.findings[1:]), head)
    assert [finding.rule for finding in difference.new] == ["vanishing-gradient"]
    assert difference.gone == ()
    assert (difference.layers_added, difference.layers_removed) == (20, 0)
    assert len(difference.shifts) == 80
    assert difference.shifts[0].change == pytest.approx(-3.5)
    assert compare(head, healthy_resnet()).gone == head.findings


def test_of_several_models_those_of_the_same_path_are_compared() -> None:
    pairs = compare_all([healthy_resnet(), sigmoid_chain()], [sigmoid_chain()])
    assert [(pair.new, len(pair.same)) for pair in pairs] == [((), 14)]
    alone = compare_all([healthy_resnet()] * 2, [sigmoid_chain()])
    assert alone[0].base is None
    assert len(alone[0].new) == 14


def test_of_two_folders_the_models_of_the_same_name_are_compared(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        for name in ("a.onnx", "sub/b.onnx"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SIGMOID if name == "a.onnx" else RELU, tmp_path / folder / name)
    shutil.copy(SIGMOID, tmp_path / "new" / "sub" / "b.onnx")
    worse = gradlint("diff", "old", "new", "--no-probe", "--format", "json", cwd=tmp_path)
    assert worse.returncode == 1
    a, b = json.loads(worse.stdout)["models"]
    assert a["new"] == []
    assert "GL201" in {finding["code"] for finding in b["new"]}


def test_renumbered_layers_are_compared_with_themselves() -> None:
    """With one more layer in front, an exporter that counts gives every other layer the name of the one behind it."""
    base = sigmoid_chain(6)

    def moved(name: str) -> str:
        return re.sub(r"\d+", lambda number: str(int(number[0]) + 2), name)

    layers = tuple(replace(r, name=moved(r.name), inputs=tuple(map(moved, r.inputs))) for r in base.layers)
    weights = tuple(replace(weight, layer=moved(weight.layer)) for weight in base.weights)
    difference = compare(base, replace(base, layers=layers, weights=weights))
    assert (difference.layers_added, difference.layers_removed, difference.shifts) == (0, 0, ())
