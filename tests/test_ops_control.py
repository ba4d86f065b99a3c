"""If, Loop and Scan: gradients of weights their bodies capture or hold, of states and of slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.graph import dims
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import session

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def parsed(text: str, weights: Arrays, dtype: type) -> onnx.ModelProto:
    """`T` in the text is the type of all floats; weights become initializers of the main graph."""
    name = {np.float64: "double", np.float32: "float"}[dtype]
    header = '<ir_version: 10, opset_import: ["" : 21]>\n'
    model = onnx.parser.parse_model(header + text.replace("T[", f"{name}["))
    for key, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), key))
    return model


def check(text: str, feed: Arrays, weights: Arrays, *, wrt: list[str], zero: frozenset[str] = frozenset()) -> None:
    """Gradients of `wrt` against finite differences, all in float64 in onnxruntime; those of the float32 model, too.

    (ONNX's reference stacks the scan outputs of a Loop along an axis they have already.)
    """
    exact = parsed(text, weights, np.float64)
    given = {k: v if v.dtype.kind in "bi" else v.astype(np.float64) for k, v in feed.items()}
    outputs = [o.name for o in exact.graph.output]
    values = session(exact).run(outputs, given)
    cotangents = {
        f"{o}.cotangent": np.random.default_rng(1).standard_normal(v.shape)
        for o, v in zip(outputs, values, strict=True)
    }
    back = differentiate(exact, wrt=wrt)
    onnx.checker.check_model(back)
    names = [f"{n}.grad" for n in wrt]
    assert {o.name for o in back.graph.output} >= set(names)
    grads = dict(zip(wrt, session(back).run(names, given | cotangents), strict=True))

    def loss(name: str, x: np.ndarray) -> float:
        if name in given:
            found = session(exact).run(outputs, given | {name: x})
        else:
            found = session(parsed(text, weights | {name: x}, np.float64)).run(outputs, given)
        return sum(float(np.sum(v * cotangents[f"{o}.cotangent"])) for o, v in zip(outputs, found, strict=True))

    for name, grad in grads.items():
        x = given[name] if name in given else weights[name]
        assert grad.shape == x.shape
        assert np.any(grad) != (name in zero), name
        d = np.random.default_rng(2).standard_normal(x.shape)
        numeric = (loss(name, x + 1e-6 * d) - loss(name, x - 1e-6 * d)) / 2e-6
        assert numeric == pytest.approx(float(np.sum(grad * d)), rel=1e-5, abs=1e-7), name
    single = differentiate(parsed(text, weights, np.float32), wrt=wrt)
    f32 = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in (given | cotangents).items()}
    for name, value in zip(wrt, session(single).run(names, f32), strict=True):
        np.testing.assert_allclose(value, grads[name], rtol=1e-3, atol=1e-4)


# -- If ----------------------------------------------------------------------------------------------------------------

BRANCHES = """
    m (T[3, 4] x, bool c) => (T[3, 4] y) {
        h = Tanh(x)
        y = If (c) <
            then_branch = a () => (T[3, 4] ya) { z = MatMul(h, w) ya = Mul(z, x) },
            else_branch = b () => (T[3, 4] yb) { u = Sigmoid(h) v = MatMul(u, w) yb = Add(v, s) }
        >
    }
"""


@pytest.mark.parametrize("taken", [True, False])
def test_if_differentiates_the_branch_that_is_taken(taken: bool) -> None:
    """Both branches read w and h; x is read by one only, s by the other: its gradient is zero where it is not used."""
    weights = {"w": normal(4, 4), "s": normal(4)}
    check(
        BRANCHES, {"x": normal(3, 4), "c": np.array(taken)}, weights, wrt=["x", "w", "s"],
        zero=frozenset({"s"} if taken else ()),
    )  # fmt: skip


NESTED = """
    m (T[3, 4] x, bool c, bool d) => (T[3, 4] y) {
        y = If (c) <
            then_branch = a () => (T[3, 4] ya) {
                t = Tanh(x)
                i = If (d) <
                    then_branch = e () => (T[3, 4] ye) { ye = MatMul(t, w) },
                    else_branch = f () => (T[3, 4] yf) { yf = Mul(t, t) }
                >
                ya = Mul(i, t)
            },
            else_branch = b () => (T[3, 4] yb) { yb = Sigmoid(x) }
        >
    }
"""


@pytest.mark.parametrize("inner", [True, False])
def test_nested_if(inner: bool) -> None:
    feed = {"x": normal(3, 4), "c": np.array(True), "d": np.array(inner)}
    check(NESTED, feed, {"w": normal(4, 4)}, wrt=["x", "w"], zero=frozenset(() if inner else {"w"}))


def test_weights_inside_a_branch_have_gradients_by_their_own_names() -> None:
    """Weights held by the branch move to the main graph; two of the same name stay apart."""
    text = """
        m (T[3, 4] x, bool c) => (T[3, 4] y) {
            y = If (c) <
                then_branch = a () => (T[3, 4] ya) { ya = MatMul(x, w) },
                else_branch = b () => (T[3, 4] yb) { yb = MatMul(x, w) }
            >
        }
    """
    model = parsed(text, {}, np.float32)
    held = [normal(4, 4).astype(np.float32) for _ in range(2)]
    for attribute, array in zip(model.graph.node[0].attribute, held, strict=True):
        attribute.g.initializer.append(numpy_helper.from_array(array, "w"))
    back = differentiate(model)
    x, t = normal(3, 4).astype(np.float32), normal(3, 4).astype(np.float32)
    feed = {"x": x, "c": np.array(False), "y.cotangent": t}
    grads = dict(zip(("x", "w", "w_1"), session(back).run(["x.grad", "w.grad", "w_1.grad"], feed), strict=True))
    np.testing.assert_allclose(grads["x"], t @ held[1].T, rtol=1e-4)
    assert not grads["w"].any()
    np.testing.assert_allclose(grads["w_1"], x.T @ t, rtol=1e-4, atol=1e-5)


def test_a_cut_inside_a_branch_is_listed_and_no_zero() -> None:
    text = """
        m (T[3, 4] x, T[3, 4] z, bool c) => (T[3, 4] y) {
            y = If (c) <
                then_branch = a () => (T[3, 4] ya) { u = Unheard.Of(x) ya = Add(u, z) },
                else_branch = b () => (T[3, 4] yb) { yb = Mul(x, z) }
            >
        }
    """.replace("Unheard.Of", "Det2")
    model = parsed(text.replace("Det2(x)", "Bernoulli(x)"), {}, np.float32)
    model.graph.node[0].attribute[0].g.node[0].op_type = "Custom"
    model.graph.node[0].attribute[0].g.node[0].domain = "unheard.of"
    model.opset_import.append(onnx.helper.make_opsetid("unheard.of", 1))
    back = differentiate(model, wrt=["x", "z"])
    assert [o.name for o in back.graph.output] == ["y", "z.grad"]
    assert any(p.key == "gradlint.cut" and "Custom" in p.value for p in back.metadata_props)


# -- Scan and Loop -----------------------------------------------------------------------------------------------------

RECURRENCE = """
    m (T[5, 2, 3] x, T[2, 4] h0) => (T[2, 4] hn, T[5, 2, 4] ys) {
        hn, ys = Scan <num_scan_inputs = 1, body = step (T[2, 4] h, T[2, 3] xt) => (T[2, 4] g, T[2, 4] yt) {
            a = MatMul(xt, w) b = MatMul(h, r) c = Add(a, b) g = Tanh(c) yt = Mul(g, s)
        }> (h0, x)
    }
"""


def test_scan_sums_the_gradients_of_captured_weights_over_the_steps() -> None:
    weights = {"w": normal(3, 4), "r": 0.5 * normal(4, 4), "s": normal(4)}
    check(RECURRENCE, {"x": normal(5, 2, 3), "h0": normal(2, 4)}, weights, wrt=["x", "h0", "w", "r", "s"])


def test_scan_that_reads_and_writes_backwards_along_other_axes() -> None:
    """onnxruntime alone knows directions and axes: against the same recurrence on transposed, reversed data."""
    weights = {"w": normal(3, 4), "r": 0.5 * normal(4, 4), "s": normal(4)}
    x, h0 = normal(5, 2, 3).astype(np.float32), normal(2, 4).astype(np.float32)
    tn, ts = normal(2, 4).astype(np.float32), normal(5, 2, 4).astype(np.float32)
    plain = parsed(RECURRENCE, weights, np.float32)
    turned = parsed(
        RECURRENCE.replace("T[5, 2, 3] x", "T[2, 5, 3] x").replace("T[5, 2, 4] ys", "T[2, 5, 4] ys"),
        weights,
        np.float32,
    )
    for kind in ("input_axes", "input_directions", "output_axes", "output_directions"):
        turned.graph.node[0].attribute.append(onnx.helper.make_attribute(f"scan_{kind}", [1]))
    names = ["x.grad", "h0.grad", "w.grad", "r.grad", "s.grad"]
    wrt = [n.removesuffix(".grad") for n in names]
    feed = {"x": x, "h0": h0, "hn.cotangent": tn, "ys.cotangent": ts}
    expected = session(differentiate(plain, wrt=wrt)).run(names, feed)

    def turn(v: np.ndarray) -> np.ndarray:
        return v[::-1].swapaxes(0, 1).copy()

    found = session(differentiate(turned, wrt=wrt)).run(names, feed | {"x": turn(x), "ys.cotangent": turn(ts)})
    np.testing.assert_allclose(found[0], turn(expected[0]), rtol=1e-3, atol=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


LOOP = """
    m (T[2, 4] x, int64 n) => (T[2, 4] y, T[steps, 2, 4] all) {
        go = Constant <value = bool {1}> ()
        y, all = Loop (n, go, x) <body = step (int64 i, bool c, T[2, 4] h) => (bool k, T[2, 4] g, T[2, 4] each) {
            k = Identity(c)
            a = MatMul(h, w)
            one = Constant <value = int64 {1}> ()
            j = Add(i, one)
            f = CastLike(j, a)
            b = Mul(a, f)
            g = Tanh(b)
            each = Add(g, x)
        }>
    }
"""


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_loop_whose_length_is_known_only_when_it_runs(steps: int) -> None:
    """The body reads the step's number, a captured weight and the captured input."""
    check(
        LOOP,
        {"x": normal(2, 4), "n": np.array(steps)},
        {"w": normal(4, 4)},
        wrt=["x", "w"],
        zero=frozenset({"w"} if steps == 0 else ()),
    )


@pytest.mark.parametrize("left_out", [["h"], ["all"], ["h", "all"]])
def test_a_loop_whose_outputs_are_left_out(left_out: list[str]) -> None:
    """A name for each: onnxruntime crashes where one is missing before another, and refuses one missing at the end."""
    text = """
        m (T[2, 4] x) => (T[2, 4] y) <int64 n = {3}> {
            h, y, all = Loop (n, , x, x) <body = step (int64 i, bool c, T[2, 4] a, T[2, 4] b) =>
                    (bool k, T[2, 4] p, T[2, 4] q, T[2, 4] each) {
                k = Identity(c) d = MatMul(a, w) p = Tanh(d) q = Mul(p, b) each = Add(p, q)
            }>
        }
    """
    weights = {"w": normal(4, 4)}
    found = []
    for gone in ([], left_out):
        model = parsed(text, weights, np.float32)
        loop = model.graph.node[0]
        loop.output[:] = ["" if o in gone else o for o in loop.output]
        while not loop.output[-1]:
            loop.output.pop()
        feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4) / 8, "y.cotangent": np.ones((2, 4), np.float32)}
        found.append(session(differentiate(model)).run(["y", "x.grad", "w.grad"], feed))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_state_that_grows_is_cut() -> None:
    text = """
        m (T[2, 4] x, int64 n) => (T[rows, 4] y) {
            go = Constant <value = bool {1}> ()
            y = Loop (n, go, x) <body = step (int64 i, bool c, T[2, 4] h) => (bool k, T[4, 4] g) {
                k = Identity(c)
                g = Concat <axis = 0> (h, h)
            }>
        }
    """
    back = differentiate(parsed(text, {}, np.float32), wrt=["x"])
    assert [o.name for o in back.graph.output] == ["y"]


# -- estimates ---------------------------------------------------------------------------------------------------------


def sized(text: str, sizes: dict[str, str]) -> str:
    for small, large in sizes.items():
        text = text.replace(small, large)
    return text


def loaded(model: onnx.ModelProto) -> ir.Graph:
    made = from_proto(model, "model", Path("."))
    canonicalize(made, Dims())
    return made.graph


def measured(model: onnx.ModelProto, wrt: list[str], fixed: Arrays, batch: int) -> dict[str, float]:
    """RMS over 40 draws of standard normal inputs and cotangents: outputs and, per example, gradients."""
    runner, rng = session(differentiate(model, wrt=wrt)), np.random.default_rng(3)
    names = [o.name for o in runner.get_outputs()]
    squares = dict.fromkeys(names, 0.0)
    for _ in range(40):
        feed = dict(fixed)
        for i in runner.get_inputs():
            if i.name not in fixed:
                scale = 1 / np.sqrt(batch) if i.name.endswith(".cotangent") else 1.0
                feed[i.name] = (scale * rng.standard_normal(i.shape)).astype(np.float32)
        for name, value in zip(names, runner.run(names, feed), strict=True):
            squares[name] += float(np.mean(np.square(value, dtype=np.float64))) / 40
    return {n: float(np.sqrt(s)) for n, s in squares.items()}


def compare(text: str, weights: Arrays, fixed: Arrays, *, batch: int, inputs: list[str], decades: float) -> None:
    model = parsed(text, weights, np.float32)
    graph = loaded(model)
    found = estimate(graph, batch=batch)
    assert not found.unmodelled
    truth = measured(model, [*inputs, *weights], fixed, batch)
    values = {str(v.name): v for v in [*graph.inputs, *graph.initializers.values(), *graph.outputs]}
    for name, rms in truth.items():
        value = values[name.removesuffix(".grad")]
        if name.endswith(".grad"):
            expected = found.grad_rms(value)
            rms *= np.sqrt(batch) if value in found.varies else 1.0
        else:
            expected = float(np.sqrt(np.mean(found.moments[value].second)))
        assert expected is not None
        assert abs(np.log10(expected / rms)) < decades, f"{name}: measured {rms:.3g}, estimated {expected:.3g}"


def test_estimate_of_a_scan_follows_its_steps() -> None:
    sizes = {"[5, 2, 3]": "[12, 32, 8]", "[5, 2, 4]": "[12, 32, 16]", "[2, 4]": "[32, 16]", "[2, 3]": "[32, 8]"}
    weights = {"w": normal(8, 16) / np.sqrt(8), "r": 0.7 * normal(16, 16) / 4, "s": normal(16)}
    compare(sized(RECURRENCE, sizes), weights, {}, batch=32, inputs=["x", "h0"], decades=0.1)


def test_estimate_of_a_loop_follows_its_steps() -> None:
    """The number of steps is a constant here; where it is not, 100 are assumed."""
    text = """
        m (T[32, 16] x) => (T[32, 16] y) {
            n = Constant <value = int64 {6}> ()
            go = Constant <value = bool {1}> ()
            y = Loop (n, go, x) <body = step (int64 i, bool c, T[32, 16] h) => (bool k, T[32, 16] g) {
                k = Identity(c)
                a = MatMul(h, w)
                g = Tanh(a)
            }>
        }
    """
    compare(text, {"w": normal(16, 16) / 4}, {}, batch=32, inputs=["x"], decades=0.2)


def test_estimate_of_an_if_is_that_of_the_worse_branch() -> None:
    """The Sigmoid branch passes the smaller gradient: x is estimated as if it were taken; s has its gradient there."""
    text = sized(BRANCHES, {"[3, 4]": "[32, 24]"})
    weights = {"w": normal(24, 24) / np.sqrt(24), "s": normal(24)}
    model = parsed(text, weights, np.float32)
    graph = loaded(model)
    found = estimate(graph, batch=32)
    assert not found.unmodelled
    truth = measured(model, ["x", "w", "s"], {"c": np.array(False)}, 32)
    values = {str(v.name): v for v in [*graph.inputs, *graph.initializers.values()]}
    for name in ("x", "w", "s"):
        expected = found.grad_rms(values[name])
        assert expected is not None
        scale = np.sqrt(32) if name == "x" else 1.0
        assert abs(np.log10(expected / (truth[f"{name}.grad"] * scale))) < 0.1, name


def test_shapes_inside_a_branch_rest_on_settings_outside_it() -> None:
    """Axes shared by both branches stand in the main graph; each branch gets a copy, so that its shapes are known."""
    text = """
        m (T[3, 1, 4] x, bool c) => (T[3, 4] y) {
            y = If (c) <
                then_branch = a () => (T[n, m] ya) { u = Squeeze(x, axes) ya = MatMul(u, w) },
                else_branch = b () => (T[n, m] yb) { yb = Squeeze(x, axes) }
            >
        }
    """
    model = parsed(text, {"w": normal(4, 4)}, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    graph = loaded(model)
    then = next(n for n in graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert [dims(n.outputs[0]) for n in then] == [(3, 4), (3, 4)]
    assert not estimate(graph, batch=3).unmodelled


# -- Sequences ---------------------------------------------------------------------------------------------------------


def test_what_goes_through_an_optional() -> None:
    text = """
        m (T[2, 4] x) => (T[2, 4] y) { a = Tanh(x) o = Optional(a) b = OptionalGetElement(o) y = Mul(a, b) }
    """
    check(text, {"x": normal(2, 4)}, {}, wrt=["x"])


def test_a_way_through_a_sequence_that_stays_is_a_cut_and_no_zero() -> None:
    """A loop that gathers its steps: nothing is said of x, though half of its gradient is known."""
    text = """
        m (T[2, 4] x) => (T[r, 4] y) <int64 n = {3}> {
            made = SequenceConstruct(x) first = Constant <value = int64 {0}> () empty = SequenceErase(made, first)
            h, all = Loop (n, , x, empty) <body = step (int64 i, bool c, T[2, 4] a, seq(T[2, 4]) s) =>
                    (bool k, T[2, 4] b, seq(T[2, 4]) r) { k = Identity(c) b = MatMul(a, w) r = SequenceInsert(s, b) }>
            z = ConcatFromSequence <axis = 0> (all) y = Add(z, v)
        }
    """
    model = parsed(text, {"w": normal(4, 4), "v": normal(6, 4)}, np.float32)
    back = differentiate(model)
    assert [o.name for o in back.graph.output] == ["y", "v.grad"]
    assert any("ConcatFromSequence" in p.value for p in back.metadata_props if p.key == "gradlint.cut")
    feed = {"x": normal(2, 4).astype(np.float32), "y.cotangent": np.ones((6, 4), np.float32)}
    session(back).run(None, feed)
