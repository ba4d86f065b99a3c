"""The fixes are right: done as they say, the finding goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builders import mlp, rnn
from onnx import numpy_helper

import gradlint
from gradlint.results import Finding


def found(model: onnx.ModelProto, rule: str) -> Finding | None:
    return next((f for f in gradlint.check(model, threads=1).findings if f.rule == rule), None)


def fix(finding: Finding | None, name: str) -> str:
    assert finding is not None
    return next(fix.text for fix in finding.fixes if fix.name == name)


def number(text: str, before: str) -> float:
    match = re.search(re.escape(before) + r"([0-9.e+-]*[0-9])", text)
    assert match, text
    return float(match[1])


def rewrite(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    stored = next(w for w in model.graph.initializer if w.name == name)
    array = change(numpy_helper.to_array(stored).copy())
    stored.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def he(fan_out: int, fan_in: int) -> float:
    return math.sqrt(2 / fan_in)


def xavier(fan_out: int, fan_in: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize(
    ("activation", "gain", "rule", "remedy", "scheme"),
    [
        ("Relu", 2.5, "exploding-gradient", "scale-init", he),
        ("Relu", 2.5, "exploding-gradient", "he-init", he),
        ("Relu", 0.3, "vanishing-gradient", "he-init", he),
        ("Tanh", 0.3, "vanishing-gradient", "xavier-init", xavier),
    ],
)
def test_weights_multiplied_by_their_factors_let_the_gradient_through(
    activation: str, gain: float, rule: str, remedy: str, scheme: Callable[[int, int], float]
) -> None:
    model = mlp(depth=16, activation=activation, gain=gain)
    text = fix(found(model, rule), remedy)
    assert "and likewise those of `layers.1` to `head`" in text
    for i in range(16):
        stored = next(w for w in model.graph.initializer if w.name == f"layers.{i}.weight")
        array = numpy_helper.to_array(stored)
        factor = scheme(*array.shape) / float(np.sqrt(np.mean(np.square(array))))
        if i == 0:
            assert number(text, "ultiply `layers.0.weight` by ") == pytest.approx(factor, rel=0.01)
        rewrite(model, stored.name, lambda w, by=factor: by * w)
    assert found(model, rule) is None


@pytest.mark.parametrize(
    ("cell", "rule", "remedy", "start"),
    [("LSTM", "lstm-forget-bias", "forget-bias", 2), ("GRU", "gru-update-bias", "update-bias", 0)],
)
def test_a_gate_that_starts_at_the_bias_given_remembers(cell: str, rule: str, remedy: str, start: int) -> None:
    model = rnn(cell=cell, steps=100)
    text = fix(found(model, rule), remedy)
    assert text.startswith(f"Start the {remedy.split('-')[0]} bias at 4.6 for 100 steps")
    hidden = slice(16 * start, 16 * (start + 1))

    def set_gate(bias: np.ndarray) -> np.ndarray:
        bias[0, hidden] = 4.6
        return bias

    rewrite(model, "rnn.B", set_gate)
    assert found(model, rule) is None
    assert found(model, "rnn-vanishing-in-time") is None


def test_weights_before_saturated_units_shrink_by_the_factor() -> None:
    model = mlp(depth=4, activation="Tanh", gain=20.0)
    factor = number(fix(found(model, "saturated-activation"), "smaller-init"), "by ")
    for i in range(4):
        rewrite(model, f"layers.{i}.weight", lambda w: factor * w)
    assert found(model, "saturated-activation") is None
