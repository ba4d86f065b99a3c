"""Risk: the decades that are lost, added up; what is fatal fails, and what trains passes."""

import math

import pytest
from builders import build

import gradlint
from gradlint.fact_table import Subject
from gradlint.risk import CAPS, HALF, evidence, lost

FATAL = [
    'mlp(depth=3, kernels=["constant", "constant", "constant", "constant"])',
    "mlp(depth=4, bias=-50.0)",
    'mlp(depth=12, activation="Sigmoid")',
    "mlp(depth=12, gain=0.1)",
    "mlp(depth=12, gain=8.0)",
    'rnn(cell="RNN", steps=60, gain=0.6)',
    "transformer(depth=6, skip=False)",
]
SOUND = [
    "mlp(depth=4, gain=1.414)",
    'mlp(depth=8, activation="Tanh", gain=1.0)',
    "mlp(depth=24, gain=1.414, residual=True, norm=True)",
    'rnn(cell="LSTM", steps=60)',
    "cnn()",
    "transformer(depth=6)",
]


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("call", FATAL)
def test_what_cannot_train_fails(call: str, probe: bool) -> None:
    summary = gradlint.check(build(call), probe=probe).summary
    assert summary.verdict == "fail"


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("call", SOUND)
def test_what_trains_does_not(call: str, probe: bool) -> None:
    summary = gradlint.check(build(call), probe=probe).summary
    assert summary.verdict != "fail"
    assert summary.risk is not None
    assert summary.risk < 0.25


def test_chaos_shows_as_nonlinearity_where_scales_are_steady() -> None:
    """Saturated tanh layers keep the scale and grow the gradient: the map is far from linear."""
    steady, chaotic = (
        gradlint.check(build(f'mlp(depth=30, width=64, activation="Tanh", gain={gain})')).summary.risk or 0.0
        for gain in (1.0, 3.0)
    )
    assert steady < 0.25 < 0.5 < chaotic


def test_each_loss_is_cut_off_and_all_are_added() -> None:
    assert lost(dict.fromkeys(CAPS, 0.5)) == pytest.approx(0.5 * len(CAPS))
    assert lost(dict.fromkeys(CAPS, math.inf)) == sum(CAPS.values())


def test_one_fatal_loss_is_enough() -> None:
    assert min(CAPS["decay"], CAPS["symmetry"], CAPS["steepness"], CAPS["time_growth"]) > HALF


def test_what_training_made_is_no_loss() -> None:
    facts = {"nonlinearity": 1.0, "alignment": 1e-3, "trunk_min_decades": -1.5, "sharpness": 6.0}
    signal = [Subject("layer", "fc", facts={"trunk_signal": 0.01})]
    fresh, trained = (evidence({**facts, "stage": stage}, signal) for stage in ("init", "trained"))
    assert all(fresh[name] > 0 for name in ("decay", "nonlinearity", "steepness", "collapse"))
    assert fresh["nonlinearity"] == pytest.approx(2.0)
    assert {name: decades for name, decades in trained.items() if decades} == {"decay": 1.5}
    on_data = evidence({**facts, "stage": "trained", "data_given": True}, signal)
    assert on_data["collapse"] == pytest.approx(2.0)
