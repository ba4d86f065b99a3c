"""RNN, GRU and LSTM: gradients against finite differences of the specification in float64, estimates by Monte Carlo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Gradient, Moments
from gradlint.estimate import context
from gradlint.load import from_proto
from gradlint.ops.recurrent import contraction, step_norms
from gradlint.reverse import backward, differentiate
from gradlint.testing import Activation, check_op, session

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DEFAULT = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
Arrays = dict[str, np.ndarray]


def activation(name: str, a: float, b: float) -> Any:
    return {
        "Sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "Tanh": np.tanh,
        "Relu": lambda z: np.maximum(z, 0),
        "Affine": lambda z: a * z + b,
        "LeakyRelu": lambda z: np.where(z > 0, z, a * z),
        "ThresholdedRelu": lambda z: np.where(z > a, z, 0),
        "ScaledTanh": lambda z: a * np.tanh(b * z),
        "HardSigmoid": lambda z: np.clip(a * z + b, 0, 1),
        "Elu": lambda z: np.where(z > 0, z, a * np.expm1(z)),
        "Softsign": lambda z: z / (1 + np.abs(z)),
        "Softplus": lambda z: np.log1p(np.exp(z)),
    }[name]


def specification(op: str, v: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    """Y, Y_h (and Y_c) as ONNX's operator pages define them, for layout 0."""
    width, hidden = v["W"].shape[0], v["R"].shape[2]
    steps, batch, _ = v["X"].shape
    names = attributes.get("activations", DEFAULT[op] * width)
    alpha = attributes.get("activation_alpha", [0.0] * len(names))
    beta = attributes.get("activation_beta", [0.0] * len(names))
    lens = v.get("lens", np.full(batch, steps))
    functions = [activation(*each) for each in zip(names, alpha, beta, strict=True)]
    y = np.zeros((steps, width, batch, hidden))
    last_h, last_c = [], []
    for k in range(width):
        fs = functions[k * len(DEFAULT[op]) : (k + 1) * len(DEFAULT[op])]
        h = v["h0"][k].copy() if "h0" in v else np.zeros((batch, hidden))
        c = v["c0"][k].copy() if "c0" in v else np.zeros((batch, hidden))
        reverse = k == 1 or attributes.get("direction") == "reverse"
        for s in range(steps):
            for b in np.flatnonzero(s < lens):
                t = lens[b] - 1 - s if reverse else s
                h[b], c[b] = step(op, v, k, v["X"][t, b], h[b], c[b], fs, attributes)
                y[t, k, b] = h[b]
        last_h.append(h)
        last_c.append(c)
    return [y, np.stack(last_h), np.stack(last_c)][: 3 if op == "LSTM" else 2]


def step(op: str, v: Arrays, k: int, x: Any, h: Any, c: Any, fs: Any, attributes: Mapping[str, Any]) -> tuple[Any, Any]:
    w, r, n = v["W"][k], v["R"][k], GATES[op]
    wb, rb = np.split(v["B"][k], 2) if "B" in v else (np.zeros(len(w)), np.zeros(len(w)))
    limit = attributes.get("clip", np.inf)

    def bounded(z: Any) -> Any:
        return np.clip(z, -limit, limit)

    if op == "RNN":
        return fs[0](bounded(w @ x + r @ h + wb + rb)), c
    ws, rs = np.split(w @ x + wb, n), np.split(r, n)
    rbs = np.split(rb, n)
    if op == "LSTM":
        pi, po, pf = np.split(v["P"][k], 3) if "P" in v else (0, 0, 0)
        i, o, f, g = (a + m @ h + e for a, m, e in zip(ws, rs, rbs, strict=True))
        i = fs[0](bounded(i + pi * c))
        f = 1 - i if attributes.get("input_forget") else fs[0](bounded(f + pf * c))
        c = f * c + i * fs[1](bounded(g))
        return fs[0](bounded(o + po * c)) * fs[2](c), c
    z, reset = (fs[0](bounded(ws[j] + rs[j] @ h + rbs[j])) for j in (0, 1))
    if attributes.get("linear_before_reset"):
        candidate = fs[1](bounded(ws[2] + reset * (rs[2] @ h + rbs[2])))
    else:
        candidate = fs[1](bounded(ws[2] + rs[2] @ (reset * h) + rbs[2]))
    return (1 - z) * candidate + z * h, c


INPUTS = ("X", "W", "R", "B", "lens", "h0", "c0", "P")


def case(op: str, given: str, attributes: Mapping[str, Any], *, steps: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    batch, size, hidden, width = 3, 4, 5, 2 if attributes.get("direction") == "bidirectional" else 1
    n = GATES[op]
    shapes = {
        "X": (steps, batch, size), "W": (width, n * hidden, size), "R": (width, n * hidden, hidden),
        "B": (width, 2 * n * hidden), "h0": (width, batch, hidden), "c0": (width, batch, hidden),
        "P": (width, 3 * hidden),
    }  # fmt: skip
    arrays = {k: 0.6 * rng.standard_normal(shapes[k]) for k in ["X", "W", "R", *given.split()] if k != "lens"}
    if "lens" in given:
        arrays["lens"] = np.array([steps, 1, max(1, steps - 2)], np.int32)
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}


def model(op: str, arrays: Arrays, attributes: Mapping[str, Any], *, outputs: str, symbolic: bool) -> onnx.ModelProto:
    shape: dict[str, list[Any]] = {k: list(v.shape) for k, v in arrays.items()}
    if symbolic:
        shape["X"] = ["T", "B", shape["X"][2]]
        for name in ("h0", "c0"):
            if name in shape:
                shape[name][1] = "B"
        if "lens" in shape:
            shape["lens"] = ["B"]
    kinds = {k: TensorProto.INT32 if k == "lens" else TensorProto.FLOAT for k in arrays}
    last = max(INPUTS.index(k) for k in arrays)
    node = helper.make_node(
        op,
        [k if k in arrays else "" for k in INPUTS[: last + 1]],
        [o if o in outputs.split() else "" for o in ("Y", "Y_h", "Y_c")[: 3 if op == "LSTM" else 2]],
        name=op,
        hidden_size=arrays["R"].shape[2],
        **attributes,
    )
    infos = [helper.make_tensor_value_info(k, kinds[k], shape[k]) for k in arrays]
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info(o) for o in outputs.split()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def check(
    op: str, given: str = "", *, steps: int = 5, outputs: str = "Y Y_h", symbolic: bool = False, **attributes: Any
) -> None:
    """The gradient of every float input, in onnxruntime, against differences of the specification in float64."""
    arrays = case(op, given, attributes, steps=steps)
    names = [k for k, v in arrays.items() if v.dtype == np.float32]
    proto = model(op, arrays, attributes, outputs=outputs, symbolic=symbolic)
    back = differentiate(proto, wrt=names)
    onnx.checker.check_model(back, full_check=True)
    exact = {k: v.astype(np.float64) if k in names else v for k, v in arrays.items()}
    chosen = [("Y", "Y_h", "Y_c").index(o) for o in outputs.split()]
    values = [specification(op, exact, attributes)[k] for k in chosen]
    rng = np.random.default_rng(7)
    cotangents = [rng.standard_normal(v.shape) for v in values]
    feed = dict(arrays)
    for o, t in zip(outputs.split(), cotangents, strict=True):
        feed[f"{o}.cotangent"] = t.astype(np.float32)
    results = session(back).run([*outputs.split(), *(f"{n}.grad" for n in names)], feed)
    for got, expected in zip(results, values, strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-5)

    def loss(changed: Arrays) -> float:
        found = specification(op, exact | changed, attributes)
        return sum(float(np.sum(found[k] * t)) for k, t in zip(chosen, cotangents, strict=True))

    for name, grad in zip(names, results[len(chosen) :], strict=True):
        x, h = exact[name], 1e-6
        for _ in range(3):
            d = rng.standard_normal(x.shape)
            numeric = (loss({name: x + h * d}) - loss({name: x - h * d})) / (2 * h)
            scale = np.linalg.norm(grad) * np.linalg.norm(d) / np.sqrt(x.size) + 1e-3
            assert abs(numeric - np.sum(grad * d)) / scale < 1e-4, (name, numeric, np.sum(grad * d))


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("given", ["", "B h0", "B lens h0"])
def test_gradients_of_directions_and_lengths(op: str, direction: str, given: str) -> None:
    check(op, given + (" c0" if "h0" in given and op == "LSTM" else ""), direction=direction)


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("outputs", ["Y", "Y_h"])
@pytest.mark.parametrize("symbolic", [False, True])
def test_gradients_when_not_every_output_is_used(op: str, outputs: str, symbolic: bool) -> None:
    check(op, "B", outputs=outputs, symbolic=symbolic)


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_short_sequences(op: str, steps: int) -> None:
    check(op, "B h0" + (" c0" if op == "LSTM" else ""), steps=steps)


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_a_clipped_activation_has_no_slope(op: str) -> None:
    check(op, "B h0", clip=0.7)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradients_through_lengths_with_symbolic_sizes(symbolic: bool, direction: str) -> None:
    check("LSTM", "B lens h0 c0 P", outputs="Y Y_h Y_c", symbolic=symbolic, direction=direction)


@pytest.mark.parametrize("given", ["P", "B P h0 c0"])
@pytest.mark.parametrize("attributes", [{}, {"clip": 0.8}, {"input_forget": 1}, {"direction": "bidirectional"}])
def test_lstm_with_peepholes(given: str, attributes: dict[str, Any]) -> None:
    check("LSTM", given, outputs="Y Y_h Y_c", **attributes)


def test_lstm_with_coupled_gates() -> None:
    check("LSTM", "B h0 c0", input_forget=1)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_gru_that_resets_after_the_product(direction: str) -> None:
    check("GRU", "B lens h0", linear_before_reset=1, direction=direction)
    check("GRU", "", linear_before_reset=1, direction=direction)


ALPHA_BETA = {
    "Affine": (0.8, 0.1), "LeakyRelu": (0.2, 0), "ThresholdedRelu": (0.3, 0), "ScaledTanh": (1.3, 0.6),
    "HardSigmoid": (0.4, 0.45), "Elu": (0.7, 0), "Relu": (0, 0), "Softsign": (0, 0), "Softplus": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ALPHA_BETA)
def test_other_activations(name: str) -> None:
    alpha, beta = ALPHA_BETA[name]
    check("RNN", "B", activations=[name], activation_alpha=[float(alpha)], activation_beta=[float(beta)])


def test_activations_of_gates_and_cell() -> None:
    scaled = {"activation_alpha": [0.3, 1.2, 0.9], "activation_beta": [0.5, 0.7, 0.1]}
    check("LSTM", "B P h0 c0", activations=["HardSigmoid", "ScaledTanh", "Affine"], **scaled)
    check("GRU", "B h0", activations=["Sigmoid", "Softsign"])


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_batch_first(op: str) -> None:
    """Layout 1 gives the transposed gradients of layout 0."""
    arrays = case(op, "B h0", {}, steps=4)
    rng = np.random.default_rng(0)
    ty, th = (rng.standard_normal(s).astype(np.float32) for s in ((4, 1, 3, 5), (1, 3, 5)))
    names = list(arrays)
    results = []
    for layout in (0, 1):
        turned = {"X", "h0"} if layout else set()
        given = {k: np.swapaxes(v, 0, 1).copy() if k in turned else v for k, v in arrays.items()}
        cotangents = {
            "Y.cotangent": ty.transpose(2, 0, 1, 3).copy() if layout else ty,
            "Y_h.cotangent": th.transpose(1, 0, 2).copy() if layout else th,
        }
        proto = model(op, given, {"layout": layout}, outputs="Y Y_h", symbolic=False)
        grads = session(differentiate(proto, wrt=names)).run([f"{n}.grad" for n in names], given | cotangents)
        results.append([np.swapaxes(g, 0, 1) if n in turned else g for n, g in zip(names, grads, strict=True)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_arrives_at_every_step_is_a_byproduct() -> None:
    """From Y and from later steps. At the last step it is the cotangent itself; an LSTM's c gets nothing there."""
    for op, direction, last in (("LSTM", "forward", -1), ("GRU", "reverse", 0), ("RNN", "forward", -1)):
        arrays = case(op, "B", {}, steps=4)
        loaded = from_proto(
            model(op, arrays, {"direction": direction}, outputs="Y", symbolic=False), "model", Path(".")
        )
        canonicalize(loaded, Dims())
        graph = loaded.graph
        seed = ir.Value(name="t", shape=graph.outputs[0].shape, type=graph.outputs[0].type)
        graph.inputs.append(seed)
        b, found, _ = backward(graph, {graph.outputs[0]: seed}, [v for v in graph.inputs if v.name == "W"])
        assert len(found) == 1
        (arriving,) = (v for (_, name), v in b.byproducts.items() if name == "arriving")
        graph.outputs.append(arriving)
        t = np.random.default_rng(0).standard_normal((4, 1, 3, 5)).astype(np.float32)
        got = session(ir.to_proto(loaded)).run([arriving.name], arrays | {"t": t})[0]
        assert got.shape == (3,)
        np.testing.assert_allclose(got[-1], np.square(t[last]).sum(), rtol=1e-5)


# -- estimates ---------------------------------------------------------------------------------------------------------


def uniform(hidden: int, *shape: int) -> np.ndarray:
    """The default initialisation of every framework: uniform within 1 / sqrt(hidden)."""
    return (np.random.default_rng(0).uniform(-1, 1, shape) / np.sqrt(hidden)).astype(np.float32)


def check_estimate(op: str, steps: int, size: int, hidden: int, *, outputs: int = 1, **attributes: Any) -> None:
    """As many examples as steps: `check_op` takes axis 0 for the examples."""
    width, n = 2 if attributes.get("direction") == "bidirectional" else 1, GATES[op] * hidden
    weights = [uniform(hidden, width, n, size), uniform(hidden, width, n, hidden), uniform(hidden, width, 2 * n)]
    x = Activation((steps, steps, size))
    check_op(op, x, *weights, outputs=outputs, hidden_size=hidden, draws=30, **attributes)


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_estimates(op: str) -> None:
    check_estimate(op, 8, 6, 10)
    check_estimate(op, 8, 6, 10, direction="bidirectional", outputs=2)
    check_estimate(op, 30, 12, 16, direction="reverse")


def test_estimates_of_a_gru_that_resets_after_the_product() -> None:
    check_estimate("GRU", 8, 6, 10, linear_before_reset=1)


def test_estimates_with_initial_states_and_peepholes() -> None:
    given = [uniform(10, 1, 40, 6), uniform(10, 1, 40, 10), uniform(10, 1, 80)]
    states = [Activation((1, 8, 10), mean=0.2, std=0.5), Activation((1, 8, 10))]
    x = Activation((8, 8, 6), mean=0.3)
    check_op("LSTM", x, *given, None, *states, uniform(10, 1, 30), hidden_size=10, draws=400, outputs=3)


@pytest.mark.parametrize("name", ALPHA_BETA)
def test_estimates_of_other_activations(name: str) -> None:
    alpha, beta = map(float, ALPHA_BETA[name])
    weights = [uniform(6, 1, 6, 5), uniform(6, 1, 6, 6), uniform(6, 1, 12)]
    chosen = {"activations": [name], "activation_alpha": [alpha], "activation_beta": [beta], "clip": 0.8}
    x = Activation((8, 8, 5))
    check_op("RNN", x, *weights, vjp=False, pullback=None, hidden_size=6, draws=100, **chosen)


@pytest.mark.parametrize(("op", "decades"), [("RNN", 10), ("GRU", 4), ("LSTM", 4)])
def test_step_norms_are_those_of_the_states_gradient(op: str, decades: int) -> None:
    """From the last state only the gradient decays through 40 steps by decades; what leaves one step arrives at the one
    before, and the estimate follows the measurement."""
    steps, batch, size, hidden = 40, 32, 4, 12
    n = GATES[op] * hidden
    weights = {
        "W": uniform(hidden, 1, n, size), "R": uniform(hidden, 1, n, hidden), "B": uniform(hidden, 1, 2 * n)
    }  # fmt: skip
    rng = np.random.default_rng(1)
    x, t = (rng.standard_normal(s).astype(np.float32) for s in ((steps, batch, size), (1, batch, hidden)))
    loaded = from_proto(model(op, weights | {"X": x}, {}, outputs="Y_h", symbolic=False), "model", Path("."))
    for name, array in weights.items():
        loaded.graph.inputs.remove(next(v for v in loaded.graph.inputs if v.name == name))
        value = ir.Value(
            name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        for node in loaded.graph:
            for k, v in enumerate(node.inputs):
                if v is not None and v.name == name:
                    node.replace_input_with(k, value)
        loaded.graph.register_initializer(value)
    canonicalize(loaded, Dims())
    graph = loaded.graph
    node = graph.node(0)
    ctx = context(graph, batch=batch, mode="train")
    one = np.ones((1, 1, 1))
    gs = [None if i == 0 else Gradient(0 * one, one) for i in range(2)]
    norms = step_norms(ctx, node, [Moments.normal(3), *[None] * 3], gs)
    assert norms is not None
    seed = ir.Value(name="t", shape=graph.outputs[0].shape, type=graph.outputs[0].type)
    graph.inputs.append(seed)
    b, _, _ = backward(graph, {graph.outputs[0]: seed}, [v for v in graph.initializers.values() if v.name == "W"])
    graph.outputs.extend([b.byproducts[node, name] for name in ("leaving", "arriving")])
    names = [o.name for o in graph.outputs[1:]]
    squares = np.array(session(ir.to_proto(loaded)).run(names, {"X": x, "t": t}), np.float64)
    leaving, arriving = np.sqrt(squares / batch)
    assert len(leaving) == steps - 1
    np.testing.assert_allclose(leaving[1:], arriving[:-1], rtol=1e-4)
    assert np.log10(arriving[-1] / leaving[0]) > decades
    np.testing.assert_allclose(np.log10(norms), np.log10([leaving, arriving]), atol=0.2)


def test_contraction_bounds_the_step_of_a_plain_rnn() -> None:
    r = np.stack([np.diag([0.5, -0.9]), np.diag([0.3, 1.2])])

    def node(op: str, **attributes: Any) -> ir.Node:
        inputs = [ir.Value(name=n) for n in "xwr"]
        return ir.node(op, inputs, {"direction": "bidirectional", **attributes})

    assert contraction(node("RNN"), r) == pytest.approx(1.2)
    assert contraction(node("RNN", activations=["Sigmoid", "Sigmoid"]), r) == pytest.approx(0.3)
    assert contraction(node("LSTM"), np.stack([r[0]] * 2)) is None
