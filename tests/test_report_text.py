"""The reports for people: every line fits, folds, tells the cause, and shows hostile names as text."""

from __future__ import annotations

import re
import unicodedata

import pytest
from report_fixtures import SNAPSHOTS, healthy_resnet, hostile, sigmoid_chain, snapshots

from gradlint.exceptions import UsageError
from gradlint.report import FORMATS, headline, render
from gradlint.report.ladder import Fold, fold, rungs
from gradlint.report.text import cells, clip_left, escape, wrap


@pytest.mark.parametrize("name", sorted(snapshots()))
def test_output_is_as_it_was_reviewed(name: str) -> None:
    assert snapshots()[name] == (SNAPSHOTS / name).read_text(encoding="utf-8")


def test_no_snapshot_is_left_over() -> None:
    assert {path.name for path in SNAPSHOTS.iterdir()} == set(snapshots())


@pytest.mark.parametrize("width", [40, 60, 80, 132])
@pytest.mark.parametrize("make", [sigmoid_chain, healthy_resnet, hostile])
def test_no_line_is_wider_than_asked(make, width: int) -> None:
    lines = render([make()], "full", width=width).splitlines()
    assert max(cells(line) for line in lines) <= width


def test_colour_adds_styles_and_nothing_else() -> None:
    report = sigmoid_chain()
    colored = render([report], "full", color=True)
    assert "\x1b[31m" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == render([report], "full")


def test_a_layer_of_error_is_red_and_a_healthy_one_green() -> None:
    lines = render([sigmoid_chain(12)], "full", color=True).splitlines()
    first = next(line for line in lines if line.startswith("layers.0 "))
    last = next(line for line in reversed(lines) if "layers.23" in line)
    assert "\x1b[31m" in first
    assert "\x1b[32m" in last


def test_the_headline_counts_starved_layers_and_names_the_cause() -> None:
    said = "The first 43 layers get less than a thousandth of the gradient; 50 Sigmoid slopes take it."
    assert headline(sigmoid_chain()) == said


def test_a_healthy_model_gets_a_calm_headline_and_a_short_report() -> None:
    report = healthy_resnet(60)
    assert headline(healthy_resnet()).startswith("Every layer gets a gradient to learn from")
    assert len(render([report], "full").splitlines()) < 40


def test_a_ladder_of_a_thousand_layers_folds_to_sixty_lines_and_loses_none() -> None:
    report = sigmoid_chain(500)
    lines = fold(rungs(report), 60, report.summary.worst_layer)
    assert len(lines) <= 60
    assert sum(len(line.rungs) if isinstance(line, Fold) else 1 for line in lines) == 1000
    assert lines[0].row.name == "layers.0"
    assert lines[-1].row.name == "layers.999"


def test_alternating_levels_fold_too() -> None:
    ladder = rungs(sigmoid_chain(500))
    mixed = [rung for pair in zip(ladder[:300], ladder[-300:], strict=True) for rung in pair]
    assert len(fold(mixed, 60)) <= 60


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("html",)])
def test_hostile_names_leave_no_control_character(format: str) -> None:
    text = render([hostile()], format)
    assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} <= {"\n"}
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("conv1.weight", "conv1.weight"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("\ud800\U000e0041", "\\ud800\\U000e0041"),
        ("Größe層", "Größe層"),
    ],
)
def test_escape_shows_what_it_hides(raw: str, shown: str) -> None:
    assert escape(raw) == shown


def test_width_counts_columns_of_wide_and_combining_characters() -> None:
    assert cells("層a\u0301") == 3
    assert clip_left("encoder.blocks.11.attn.qkv", 14) == "…11.attn.qkv"
    assert wrap("aa 層層層層 b", 5) == ["aa", "層層", "層層", "b"]


def test_concise_has_one_line_per_finding_and_one_per_model() -> None:
    report = sigmoid_chain(3)
    lines = render([report, healthy_resnet()], "concise").splitlines()
    assert len(lines) == len(report.findings) + 2
    assert lines[0].startswith("sigmoid50.onnx: layers.0: error GL201 vanishing-gradient ")
    assert lines[-1] == "resnet.onnx: pass, risk 0.03, no findings"


def test_an_unknown_format_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="unknown format 'pdf': one of full, concise, json, html"):
        render([healthy_resnet()], "pdf")
