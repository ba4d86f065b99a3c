"""The probe: what it measures, on which data, and what it says when it can't."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import mlp, transformer
from onnx import TensorProto, helper, numpy_helper

import gradlint
from gradlint.exceptions import DataError, ModelError
from gradlint.results import Report
from gradlint.testing import session

GOLDEN = Path(__file__).parent / "golden"


def fixed_batch(batch: int) -> onnx.ModelProto:
    """x (batch, 4) -> Gemm -> Tanh -> Gemm, the batch fixed by the exporter."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 5)), "v": rng.standard_normal((5, 3))}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w"], ["a"], name="first"),
            helper.make_node("Tanh", ["a"], ["h"], name="act"),
            helper.make_node("Gemm", ["h", "v"], ["y"], name="head"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("loss", ["linear", "cross-entropy", "mse"])
def test_a_batch_fixed_at_one_runs_example_by_example(loss: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    target = rng.integers(0, 3, 6) if loss == "cross-entropy" else rng.standard_normal((6, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((6, 4)).astype(np.float32), target=target)
    one, whole = (gradlint.check(fixed_batch(n), data=tmp_path / "d.npz", loss=loss) for n in (1, 6))
    for a, b in zip(one.weights, whole.weights, strict=True):
        assert a.measured == pytest.approx(b.measured, rel=1e-5)
    for a, b in zip(one.layers, whole.layers, strict=True):
        assert a.measured["grad_norm"] == pytest.approx(b.measured["grad_norm"], rel=1e-5)
    assert one.settings.batch == whole.settings.batch == 6


@pytest.mark.parametrize("batch", [1, 6])
def test_labels_of_padding_do_not_count(batch: int) -> None:
    """As in PyTorch: an ignored label takes no part in the mean, wherever it lies."""
    rng = np.random.default_rng(1)
    x, target = rng.standard_normal((6, 4)).astype(np.float32), rng.integers(0, 3, 6)
    padded = np.where(np.arange(6) % 3 == 1, -100, target)
    counted = padded != -100
    part = gradlint.check(fixed_batch(4), data={"x": x[counted], "target": target[counted]}, loss="cross-entropy")
    whole = gradlint.check(fixed_batch(batch), data={"x": x, "target": padded}, loss="cross-entropy")
    for a, b in zip(whole.weights, part.weights, strict=True):
        assert a.measured == pytest.approx(b.measured, rel=1e-5)


def test_examples_that_do_not_fill_the_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((7, 4), np.float32))
    with pytest.raises(DataError, match=r"axis 0 must be 6|must have shape"):
        gradlint.check(fixed_batch(6), data=tmp_path / "d.npz")


def test_a_loss_without_its_target(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((6, 4), np.float32))
    with pytest.raises(DataError, match="needs a target"):
        gradlint.check(fixed_batch(6), data=tmp_path / "d.npz", loss="cross-entropy")


def norms(report: Report) -> list[float]:
    return [row.measured["grad_norm"] for row in report.layers]


def test_norms_do_not_depend_on_the_batch_in_expectation() -> None:
    few, many = (norms(gradlint.check(mlp(), batch=n)) for n in (64, 512))
    np.testing.assert_allclose(few, many, rtol=0.2)


def test_the_seed_draws_data_and_targets() -> None:
    first, again, other = (norms(gradlint.check(mlp(), seed=s)) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_weight_used_twice_has_the_sum_of_both_gradients() -> None:
    report = gradlint.check(GOLDEN / "tied.onnx")
    names = [w.name for w in report.weights if "embed" in str(w.parameter)]
    rows = [w.measured["grad_rms"] for w in report.weights if w.name in names]
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_a_custom_operator_skips_the_probe_and_keeps_the_report() -> None:
    model = fixed_batch(4)
    model.graph.node[1].domain = "my.company"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    report = gradlint.check(model)
    assert [f.rule for f in report.findings if f.code == "GL902"] == ["probe-skipped"]
    assert report.coverage.unmodelled == {"my.company:Tanh": 1}
    assert all("grad_norm" in row.estimated for row in report.layers)


def test_a_model_of_integer_outputs_is_told_to_export_its_logits() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[N, 4] x) => (int64[N] y) <float[4, 3] w = {%s}>
    { logits = MatMul(x, w)
      y = ArgMax <axis = 1, keepdims = 0> (logits) }"""
    report = gradlint.check(onnx.parser.parse_model(text % ", ".join(f"{k}.5" for k in range(12))))
    (fix,) = next(finding.fixes for finding in report.findings if finding.code == "GL902")
    assert fix.text.startswith("Export the model up to its logits. PyTorch: `torch.onnx.export(")


def test_half_precision_models_run_in_single_precision() -> None:
    plain, half = gradlint.check(mlp(seed=3)), gradlint.check(mlp(seed=3, half=True))
    np.testing.assert_allclose(norms(plain), norms(half), rtol=0.02)


def test_what_the_model_rejects_is_said_with_what_to_give() -> None:
    """A reshape that fits only one size of the unknown axis."""
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "shape"], ["r"]),
            helper.make_node("MatMul", ["r", "w"], ["y"], name="fc"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "T"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [
            numpy_helper.from_array(np.array([-1, 7], np.int64), "shape"),
            numpy_helper.from_array(np.ones((7, 3), np.float32), "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    report = gradlint.check(model)
    skipped = next(f for f in report.findings if f.rule == "probe-skipped")
    assert "choose other sizes than T = 16 with --dim NAME=SIZE, or give real inputs with --data" in skipped.message
    assert skipped.fixes[0].text.startswith("Choose other sizes than T = 16 with --dim")
    assert "probe-skipped" not in {f.rule for f in gradlint.check(model, dims={"T": 7}).findings}
    sized = gradlint.check(model, shapes={"x": (2, 14)})
    assert "probe-skipped" not in {f.rule for f in sized.findings}
    assert sized.weights[0].measured["grad_rms"] > 0


@pytest.mark.parametrize("signature", ["(float x) => (float y)", "(float[N, 3] x) => (float y)"])
def test_an_output_of_one_number_is_measured(signature: str) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> net %s { h = Tanh(x) y = ReduceMean <keepdims = 0> (h) }'
    report = gradlint.check(onnx.parser.parse_model(text % signature))
    assert report.findings == ()
    assert 0 < report.layers[0].measured["grad_norm"] < 10


def test_gradients_that_stop_are_listed_not_zero() -> None:
    """Det has no derivative here: what lies before it has no measured gradient at all."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
            helper.make_node("Det", ["h"], ["y"], name="det"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32) + 0.1, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    report = gradlint.check(model)
    assert report.weights[0].measured == {}
    assert "gradient-cut" in {f.rule for f in report.findings}
    backward = gradlint.differentiate(model)
    assert "w.grad" not in {o.name for o in backward.graph.output}
    assert '"w"' in {p.key: p.value for p in backward.metadata_props}["gradlint.cut"]


def test_an_activation_behind_a_cut_keeps_its_slopes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[8, 16] x) => (float[8, 16] y)
      <int64[3] sh = {-1, 4, 4}, int64[1] last = {1}>
    { a = MatMul(x, w)
      square = Reshape(a, sh)
      d = Det(square)
      column = Unsqueeze(d, last)
      h = Mul(column, a)
      y = Tanh(h) }"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) / 4
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    report = gradlint.check(model)
    assert "gradient-cut" in {f.rule for f in report.findings}
    assert 0 < next(row.measured["slope"] for row in report.layers if row.op_type == "Tanh") < 1


def test_differentiate_takes_weights_inputs_and_values_and_names_near_ones() -> None:
    model = transformer(depth=1)
    value = model.graph.node[3].output[0]
    weight = model.graph.initializer[0].name
    backward = gradlint.differentiate(model, wrt=["x", weight, value])
    assert [o.name for o in backward.graph.output][1:] == ["x.grad", f"{weight}.grad", f"{value}.grad"]
    with pytest.raises(gradlint.UsageError, match="did you mean"):
        gradlint.differentiate(model, wrt=[weight + "s"])


def test_a_weight_indexed_out_of_its_range_skips_the_probe() -> None:
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), "w")
    index = numpy_helper.from_array(np.full(64, 99), "index")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["w", "index"], ["v"], name="rows"),
            helper.make_node("MatMul", ["x", "v"], ["y"], name="product"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 64])],
        [w, index],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    skipped = [f.message for f in gradlint.check(model).findings if f.rule == "probe-skipped"]
    assert len(skipped) == 1
    assert "out of data bounds" in skipped[0]


def test_running_statistics_stay_as_they_are(tmp_path: Path) -> None:
    """Weights are read in place, and onnxruntime writes a batch's statistics over those it is given."""
    channels = 2048  # larger than what travels in the model
    one = np.ones(channels, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node(
                "BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "new_mean", "new_var"], name="norm",
                training_mode=1,
            )
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, channels])],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)
            for n, shape in (("y", [4, channels]), ("new_mean", [channels]), ("new_var", [channels]))
        ],
        [numpy_helper.from_array(a, n) for n, a in {"s": 2 * one, "b": 3 * one, "m": 4 * one, "v": 5 * one}.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    before = (tmp_path / "m.data").read_bytes()
    reports = [gradlint.check(tmp_path / "m.onnx", mode="train") for _ in range(2)]
    assert reports[0].weights == reports[1].weights
    assert (tmp_path / "m.data").read_bytes() == before


def rows_of(model: onnx.ModelProto, wrt: str, **inputs: np.ndarray) -> np.ndarray:
    """The gradient of the sum of `y`."""
    backward = gradlint.differentiate(model, wrt=[wrt])
    run = session(backward)
    (shape,) = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output]
    return np.asarray(run.run([f"{wrt}.grad"], {**inputs, "y.cotangent": np.ones(shape, np.float32)})[0])


def test_the_row_that_pads_an_embedding_is_not_trained() -> None:
    """By the exporter's word: torch's `padding_idx` leaves no other trace."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> net (int64[2, 3] x) => (float[2, 3, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Gather(w, x) }"""
    )
    ids = np.array([[1, 0, 3], [1, 1, 3]])
    plain = rows_of(model, "w", x=ids)
    told = "%embedding : (target=torch.ops.aten.embedding.default](args = (%p_w, %x, 1), kwargs = {})"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.fx_node", value=told)
    assert plain[:, 0].tolist() == [1, 3, 0, 2]
    assert rows_of(model, "w", x=ids)[:, 0].tolist() == [1, 0, 0, 2]


def test_a_kernel_behind_a_transposition_that_swaps_nothing() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> net (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { v = Tanh(w)  t = Transpose<perm = [0, 1]>(v)  y = MatMul(x, t) }"""
    )
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    w = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    assert rows_of(model, "x", x=x) == pytest.approx(np.tile(np.tanh(w).sum(1), (2, 1)), rel=1e-5)


def test_an_unrolled_recurrence_over_steps_first_has_the_examples_of_its_output() -> None:
    """(T, B, I) without a recurrent operator: the outputs have B rows."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> net (float[3, 2, 4] x) => (float[2, 4] y)
        <int64 last = {2}, float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
        { s = Gather(x, last)  y = MatMul(s, w) }"""
    )
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    target = np.ones((2, 4), np.float32)
    (row,) = gradlint.check(model, data={"x": x, "target": target}).weights
    expected = np.sqrt(np.mean((x[2].sum(0) / np.sqrt(2)) ** 2))
    assert row.measured["grad_rms"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("body", "weights", "said"),
    [
        ("y = Conv(x, k, b)", "float[2, 3, 1] k = {1, 2, 3, 4, 5, 6}, float[2, 1] b = {1, 2}", "'b' has (2, 1)"),
        (
            "y = RNN<hidden_size = 1>(x, w, r, , , h)",
            "float[1, 1, 5] w = {1, 2, 3, 4, 5}, float[1, 1, 1] r = {1}, float[1, 3, 2] h = {1, 2, 3, 4, 5, 6}",
            "'h' has (1, 3, 2)",
        ),
    ],
)
def test_an_operand_of_a_shape_that_no_runtime_takes_is_said(body: str, weights: str, said: str) -> None:
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    model = onnx.parser.parse_model(f"{header} net (float[2, 3, 5] x) => (float[N, M, K] y) <{weights}> {{ {body} }}")
    with pytest.raises(ModelError, match=re.escape(said)):
        gradlint.check(model)


def test_an_operator_without_inputs_is_no_obstacle() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> net (float[2, 3] x) => (float[N, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}>
        { h = MatMul(x, w)  none = SequenceEmpty()  one = SequenceInsert(none, h)
          y = ConcatFromSequence<axis = 0>(one) }"""
    )
    assert [row.name for row in gradlint.check(model).weights] == ["w"]
