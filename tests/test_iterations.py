"""Recurrences as Keras leaves them: a Loop with a counter, weights carried along, masks as products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import gradlint
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.graph import dims
from gradlint.iterations import loop_parts, steps
from gradlint.load import from_proto
from gradlint.testing import session

SIZE, HIDDEN = 4, 16
RNG = np.random.default_rng(0)
node = helper.make_node


def keras_rnn(length: int = 40, *, scale: float = 1.0, gated: bool = False, stop: int | None = None) -> onnx.ModelProto:
    """x (N, T, 4) through tanh(x W + h R), or h = z h + (1 - z) of that; the last of the stacked states to one output.

    W, R and the slices' source are read as the exporter writes them: W and R as states that no step changes. stop: the
    condition ends the loop there, before its limit.
    """
    w = (RNG.standard_normal((SIZE, HIDDEN)) / 2).astype(np.float32)
    r = (np.linalg.qr(RNG.standard_normal((HIDDEN, HIDDEN)))[0] * scale).astype(np.float32)
    stored = {
        "w": w, "r": r, "gate": np.eye(HIDDEN, dtype=np.float32) * 0.1, "head": np.ones((HIDDEN, 1), np.float32),
        "limit": np.array(length), "go": np.array(True), "none": np.array(0), "one": np.array(1),
        "end": np.array(length if stop is None else stop), "zero": np.array(0, np.float32), "last": np.array(-1),
        "units": np.array([HIDDEN]),
    }  # fmt: skip
    body = [
        node("Gather", ["sequence", "k"], ["x_k"]),
        node("MatMul", ["x_k", "w_in"], ["xw"]),
        node("MatMul", ["h_in", "r_in"], ["hr"]),
        node("Add", ["xw", "hr"], ["pre"]),
        node("Tanh", ["pre"], ["new"]),
        node("Add", ["k", "one"], ["k_out"]),
        node("Less", ["k_out", "end"], ["before_end"]),
        node("Less", ["t", "limit"], ["before_limit"]),
        node("And", ["before_end", "before_limit"], ["going"]),
        node("Identity", ["w_in"], ["w_out"]),
        node("Identity", ["r_in"], ["r_out"]),
    ]
    if gated:
        body += [
            node("MatMul", ["new", "gate"], ["zz"]),
            node("Sigmoid", ["zz"], ["z"]),
            node("Mul", ["z", "h_in"], ["old"]),
            node("Sub", ["new", "old"], ["h_out"]),
        ]
    else:
        body.append(node("Identity", ["new"], ["h_out"]))
    body.append(node("Identity", ["h_out"], ["stacked"]))

    def value(name: str, kind: int, shape: list[int | str] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inside = helper.make_graph(
        body,
        "body",
        [
            value("t", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("k", TensorProto.INT64, []),
            value("h_in", TensorProto.FLOAT, ["unk", HIDDEN]), value("w_in", TensorProto.FLOAT, [SIZE, HIDDEN]),
            value("r_in", TensorProto.FLOAT, [HIDDEN, HIDDEN]),
        ],
        [
            value("going", TensorProto.BOOL, []), value("k_out", TensorProto.INT64, []),
            value("h_out", TensorProto.FLOAT, ["unk", HIDDEN]), value("w_out", TensorProto.FLOAT, [SIZE, HIDDEN]),
            value("r_out", TensorProto.FLOAT, [HIDDEN, HIDDEN]), value("stacked", TensorProto.FLOAT, ["unk", HIDDEN]),
        ],
    )  # fmt: skip
    nodes = [
        node("Transpose", ["x"], ["sequence"], "time_major", perm=[1, 0, 2]),
        node("Shape", ["x"], ["batch"], "batch", start=0, end=1),
        node("Concat", ["batch", "units"], ["state_shape"], "state_shape", axis=0),
        node("Expand", ["zero", "state_shape"], ["h0"], "h0"),
        node(
            "Loop",
            ["limit", "go", "none", "h0", "w", "r"],
            ["k_last", "h_last", "w_last", "r_last", "states"],
            "rnn",
            body=inside,
        ),
        node("Gather", ["states", "last"], ["h"], "pick", axis=0),
        node("MatMul", ["h", "head"], ["y"], "dense"),
    ]
    graph = helper.make_graph(
        nodes,
        "keras",
        [value("x", TensorProto.FLOAT, ["N", length, SIZE])],
        [value("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def canonical(proto: onnx.ModelProto) -> ir.Model:
    loaded = from_proto(proto, "model", Path("."))
    canonicalize(loaded, Dims(batch=8))
    return loaded


def test_a_loop_is_read_with_its_weights_its_steps_and_its_shapes() -> None:
    loaded = canonical(keras_rnn(40))
    loop = next(n for n in loaded.graph if n.op_type == "Loop")
    assert len(loop.inputs) == 4  # the weights are no states
    parts = loop_parts(loop)
    assert steps(parts) == 40
    assert [dims(s.into) for s in parts.states] == [(), (8, HIDDEN)]
    assert dims(parts.outputs[0].whole) == (40, 8, HIDDEN)
    assert estimate(loaded.graph, batch=8).unmodelled == ()


@pytest.mark.parametrize("stop", [1, 7, 40, 99])
def test_steps_are_those_that_are_made(stop: int) -> None:
    proto = keras_rnn(40, stop=stop)
    loop = next(n for n in canonical(proto).graph if n.op_type == "Loop")
    proto.graph.output.append(helper.make_tensor_value_info("states", TensorProto.FLOAT, [None, None, HIDDEN]))
    x = RNG.standard_normal((2, 40, SIZE)).astype(np.float32)
    states = session(proto).run(["states"], {"x": x})[0]
    assert steps(loop_parts(loop)) == len(states) == min(stop, 40)


def test_the_canonical_loop_computes_the_same() -> None:
    proto = keras_rnn(12, gated=True)
    x = RNG.standard_normal((8, 12, SIZE)).astype(np.float32)
    expected, got = (session(p).run(None, {"x": x})[0] for p in (proto, ir.to_proto(canonical(proto))))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("scale", "code"), [(0.1, "GL401"), (3.0, "GL402")])
@pytest.mark.parametrize("probe", [True, False])
def test_time_is_judged_in_loops(scale: float, code: str, probe: bool) -> None:
    report = gradlint.check(keras_rnn(40, scale=scale), probe=probe)
    assert code in {f.code for f in report.findings if f.layer == "rnn" and f.level == "error"}
    assert report.summary.verdict == "fail"
    assert "rnn" in {row.name for row in report.layers}


def test_an_orthogonal_loop_passes() -> None:
    report = gradlint.check(keras_rnn(20, scale=1.2))
    assert not [f for f in report.findings if f.code in ("GL401", "GL402") and f.level == "error"]


def test_a_gate_makes_it_a_gated_cell() -> None:
    """Which is told of its decay in a milder way."""
    plain, gated = (gradlint.check(keras_rnn(40, scale=0.1, gated=g), select=("GL401",)) for g in (False, True))
    assert [f.level for f in plain.findings] == ["error"]
    assert [(f.level, f.metrics["time_decades"] < -7) for f in gated.findings] == [("note", True)]


def test_a_condition_of_many_operators_is_read_at_once() -> None:
    """And of a value with itself, over and over: as many ways through it as there are numbers of 200 bits."""
    copies = "".join(f"g{k + 1} = And(g{k}, g{k}) " for k in range(200))
    graph = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        m (float[2,3] x) => (float[2,3] y) <int64 limit = {{7}}, bool start = {{1}}> {{
          y = Loop <body = b (int64 i, bool going, float[2,3] h) => (bool more, float[2,3] next) {{
            g0 = Identity(going) {copies} more = Identity(g200) next = Tanh(h)
          }}> (limit, start, x)
        }}"""
    ).graph
    assert steps(loop_parts(graph[0])) == 7
