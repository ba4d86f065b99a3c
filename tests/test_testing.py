"""`assert_trainable`, as a test of one's own would use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command import DEAD, RELU, SIGMOID, environment

import gradlint
from gradlint.testing import assert_trainable


def test_a_network_that_trains_gives_its_report() -> None:
    report = assert_trainable(RELU, probe=False)
    assert isinstance(report, gradlint.Report)
    assert report.summary.verdict == "pass"


def test_one_that_does_not_is_told_with_findings_and_fixes() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_trainable(onnx.load(SIGMOID), probe=False, select=["vanishing-gradient"])
    first, place, message, *fixes = str(caught.value).splitlines()
    assert first.startswith("model is not trainable: fail, risk 1.00, ")
    assert place == "error GL201 vanishing-gradient at layers.0.linear:"
    assert "smaller than the network's largest" in message
    assert fixes
    assert all(line.startswith("  fix: ") for line in fixes)
    assert "PyTorch: `nn.ReLU()`" in fixes[0]


def test_fail_on_means_what_it_means_on_the_command_line() -> None:
    level = {"select": ["dead-relu"], "levels": {"dead-relu": "warning"}, "probe": False}
    assert_trainable(DEAD, **level)
    with pytest.raises(AssertionError, match="warning GL104 dead-relu"):
        assert_trainable(DEAD, fail_on="warning", **level)


def test_data_are_a_file_or_arrays() -> None:
    path = Path(RELU).with_suffix(".npz")
    arrays = dict(np.load(path))
    by_file = assert_trainable(RELU, path, loss="cross-entropy", threads=1)
    by_name = assert_trainable(RELU, arrays, loss="cross-entropy", threads=1)
    assert by_file.layers == by_name.layers
    with pytest.raises(gradlint.DataError, match="given arrays: the model has no input 'images'"):
        assert_trainable(RELU, {"images": arrays["target"]})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "l2"}, "loss: 'l2' is none of linear, cross-entropy, bce, mse"),
        ({"mode": "training"}, "mode: 'training' is none of train, eval"),
        ({"stage": "done"}, "stage: 'done' is none of init, trained"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is none of sgd, adam"),
        ({"batch": 0}, "batch: 0 is not a whole number of at least 1"),
        ({"batch": True}, "batch: True is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"lr": 0}, "lr: 0 is not a number above 0"),
        ({"select": "GL2"}, "select: 'GL2' is one text: give a tuple"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, says: str) -> None:
    with pytest.raises(gradlint.UsageError, match=says):
        gradlint.check(RELU, **settings)


def test_pytest_shows_the_message_and_the_tests_own_line(tmp_path: Path) -> None:
    test = tmp_path / "test_net.py"
    test.write_text(
        "from gradlint.testing import assert_trainable\n\n\n"
        f"def test_net():\n    assert_trainable({SIGMOID!r}, probe=False)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        cwd=tmp_path, env=environment(COLUMNS=os.environ.get("COLUMNS", "80")), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "test_net.py:5: AssertionError" in run.stdout
    assert "digits_sigmoid.onnx is not trainable: fail, risk 1.00, " in run.stdout
    assert "raise AssertionError(_complaint" not in run.stdout
