"""Recurrences: gates, norms, decay over time; operators and chains that were unrolled."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import rnn
from onnx import TensorProto, helper, numpy_helper

import gradlint
from gradlint.anatomy import Anatomy, anatomy
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.constants import evaluator, varying
from gradlint.fact_table import FACTS, Subject
from gradlint.iteration_facts import spectral_radius
from gradlint.load import from_proto
from gradlint.recurrent_facts import recurrent_subjects, time_decades, unknown_lengths, unrolled


def parts_of(proto: onnx.ModelProto) -> Anatomy:
    model = from_proto(proto, "model", Path("."))
    canonicalize(model, Dims(batch=3))
    return anatomy(model.graph)


def subject(proto: onnx.ModelProto, **settings: object) -> Subject:
    parts = parts_of(proto)
    array = evaluator(parts.graph, varying(parts.graph))
    (found,) = recurrent_subjects(parts, array, **{"profiles": {}, "norms": {}, **settings})  # type: ignore[arg-type]
    assert set(found.facts) <= set(FACTS)
    return found


def test_plain_cell_is_bounded_by_the_norm_of_its_matrix() -> None:
    facts = subject(rnn(cell="RNN", steps=40, gain=0.6)).facts
    assert (facts["cell"], facts["steps"], facts["steps_assumed"], facts["hidden_size"]) == ("RNN", 40, False, 16)
    assert facts["recurrent_norm"] == pytest.approx(0.6, rel=1e-5)
    assert facts["recurrent_radius"] == pytest.approx(0.6, rel=1e-2)
    assert facts["proved_time_decades"] == pytest.approx(39 * math.log10(0.6), rel=1e-4)


def test_growth_is_not_proved_by_an_upper_bound() -> None:
    assert "time_decades" not in subject(rnn(cell="RNN", gain=1.2)).facts


def test_loss_on_every_step_proves_nothing() -> None:
    proto = rnn(cell="RNN", gain=0.6)
    proto.graph.node[0].output[0] = "all"
    proto.graph.output.append(helper.make_tensor_value_info("all", TensorProto.FLOAT, [50, 1, "N", 16]))
    assert "proved_time_decades" not in subject(proto).facts


def test_gates_in_the_order_of_onnx() -> None:
    lstm = subject(rnn(cell="LSTM", gate_bias=2.0)).facts
    assert lstm["forget_bias"] == 2.0
    assert lstm["forget_gate"] == pytest.approx(1 / (1 + math.exp(-2)))
    gru = subject(rnn(cell="GRU", gate_bias=-1.0)).facts
    assert gru["update_bias"] == -1.0
    assert gru["update_gate"] == pytest.approx(1 / (1 + math.e))


def test_measured_profile_stands_before_the_estimate() -> None:
    curve = np.geomspace(1e-8, 1.0, 50)
    found = subject(rnn(), profiles={"estimated": {"rnn": curve**0.5}, "measured": {"rnn": curve}})
    assert found.facts["estimated_time_decades"] == pytest.approx(-4)
    assert found.facts["time_decades"] == found.facts["measured_time_decades"] == pytest.approx(-8)
    assert found.evidence == {"time_decades": "measured"}


def test_unknown_length_is_taken_as_a_hundred_steps() -> None:
    curve = np.geomspace(1e-2, 1.0, 21)
    found = subject(rnn(steps=20), profiles={"measured": {"rnn": curve}}, assumed=frozenset({"x"}))
    assert (found.facts["steps"], found.facts["steps_assumed"]) == (100, True)
    assert found.facts["time_decades"] == pytest.approx(-2 * 99 / 20)


@pytest.mark.parametrize(
    ("shape", "unknown"),
    [([50, "N", 8], False), (["T", "N", 8], True), (["N", 8, 16], False), (["N", "T", 16], True)],
)
def test_lengths_nobody_gave(shape: list[int | str], unknown: bool) -> None:
    proto = rnn()
    if shape[0] == "N":
        proto.graph.node[0].op_type = "Relu"
        del proto.graph.node[0].attribute[:], proto.graph.node[0].input[1:], proto.graph.node[0].output[1:]
        proto.graph.node[0].output[0] = "rnn.last"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    proto.graph.input[0].CopyFrom(x)
    graph = from_proto(proto, "model", Path(".")).graph
    assert unknown_lengths(graph) == (frozenset({"x"}) if unknown else frozenset())
    assert unknown_lengths(graph, frozenset({"T"})) == frozenset()


def test_decay_is_judged_on_the_level_part() -> None:
    level = np.r_[np.full(190, 1e-2), np.geomspace(1e-2, 1.0, 10)]  # the head reads the last states directly
    assert time_decades(level) == pytest.approx(0, abs=0.01)
    assert time_decades(np.geomspace(1e-6, 1, 31)) == pytest.approx(-6)
    assert time_decades(np.r_[np.zeros(10), np.geomspace(1e-30, 1, 21)]) == pytest.approx(-45, rel=0.02)
    assert time_decades(np.array([np.inf, 1.0, 1.0])) == math.inf
    assert time_decades(np.array([1.0, 1.0])) is None
    assert time_decades(np.zeros(5)) is None


def test_spectral_radius() -> None:
    matrix = np.random.default_rng(0).standard_normal((30, 30))
    assert spectral_radius(matrix) == pytest.approx(np.abs(np.linalg.eigvals(matrix)).max(), rel=5e-3)
    assert spectral_radius(np.triu(np.ones((4, 4)), 1)) == 0
    assert spectral_radius(np.ones((2, 3))) is None


def chain(steps: int, *, skip: bool = False, shared: bool = True) -> onnx.ModelProto:
    """h = tanh(x_t W + h U), unrolled; with `skip` the state is added to itself (layers that share their weights)."""
    rng = np.random.default_rng(1)
    nodes, weights, state = [], [("W", rng.standard_normal((4, 8)))], "h"
    for t in range(steps):
        name = "U" if shared else f"U{t}"
        if not shared or t == 0:
            weights.append((name, 0.5 * np.linalg.qr(rng.standard_normal((8, 8)))[0]))
        nodes += [
            helper.make_node("Gather", ["x", f"t{t}"], [f"x{t}"], f"x{t}", axis=1),
            helper.make_node("MatMul", [f"x{t}", "W"], [f"i{t}"], f"i{t}"),
            helper.make_node("MatMul", [state, name], [f"r{t}"], f"r{t}"),
            helper.make_node("Add", [f"r{t}", f"i{t}"], [f"z{t}"], f"z{t}"),
            helper.make_node("Tanh", [f"z{t}"], [f"h{t}"], f"h{t}"),
        ]
        if skip:
            nodes.append(helper.make_node("Add", [state, f"h{t}"], [f"s{t}"], f"s{t}"))
        state = f"s{t}" if skip else f"h{t}"
    nodes[-1].output[0] = "y"
    stored = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights]
    stored += [numpy_helper.from_array(np.array(t), f"t{t}") for t in range(steps)]
    shapes = {"x": ["N", steps, 4], "h": ["N", 8]}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(nodes, "g", inputs, [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_unrolled_recurrence_is_found_and_bounded() -> None:
    norms = {f"r{t}": 10.0 ** (t - 11) for t in range(12)}
    found = subject(chain(12), norms={"measured": norms})
    assert found.layer == "r0"
    assert (found.facts["cell"], found.facts["steps"], found.facts["hidden_size"]) == ("unrolled", 12, 8)
    assert found.facts["proved_time_decades"] == pytest.approx(11 * math.log10(0.5), rel=1e-3)
    assert found.facts["time_decades"] == pytest.approx(-11)


def test_the_last_of_all_states_gets_the_gradient_alone() -> None:
    """As torch unrolls nn.RNN: the states side by side, of which the head reads the last."""
    proto = chain(30)
    states = [f"h{t}" for t in range(30)]
    proto.graph.node[-1].output[0] = states[-1]
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(-1), "last"))
    rows = [helper.make_node("Unsqueeze", [h, "one"], [f"row.{h}"], f"row.{h}") for h in states]
    rows.append(helper.make_node("Concat", [f"row.{h}" for h in states], ["all"], "all", axis=1))
    rows.append(helper.make_node("Gather", ["all", "last"], ["y"], "pick", axis=1))
    proto.graph.node.extend(rows)
    (found,) = gradlint.check(proto, select=("GL401",), probe=False).findings
    (measured,) = gradlint.check(proto, select=("GL401",)).findings
    assert found.metrics["time_decades"] == pytest.approx(measured.metrics["time_decades"], abs=0.5)
    assert measured.metrics["time_decades"] < -8


def test_layers_that_share_weights_beside_a_skip_are_no_recurrence() -> None:
    assert unrolled(parts_of(chain(12, skip=True))) == []
    assert unrolled(parts_of(chain(12, shared=False))) == []
