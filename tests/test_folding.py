"""BatchNormalization that an exporter folded away: put back where it was fresh, for training."""

from typing import Any

import numpy as np
import onnx
import pytest
from builders import FOLDED, _Graph, cnn
from onnx import numpy_helper

import gradlint


def risk(model: onnx.ModelProto, **settings: Any) -> float:
    found = gradlint.check(model, **settings).summary.risk
    assert found is not None
    return found


def chain(*, names: bool) -> onnx.ModelProto:
    """Sigmoid layers with a fresh BatchNormalization between, as TensorFlow's exporters leave them."""
    graph, value = _Graph(0), "x"
    for i in range(4):
        kernel = graph.normal(f"dense.{i}", (32, 32), 0.18)
        scale = graph.weight(f"scale.{i}", np.full(32, 0.9995))
        value = graph.node("MatMul", [value, kernel], f"dense_{i}")
        value = graph.node("Mul", [value, scale], f"norm_{i}/batchnorm/mul_1")
        if names:
            value = graph.nodes[-1].output[0] = f"norm_{i}/batchnorm/mul_1:0"
        value = graph.node("Sigmoid", [value], f"act.{i}")
    return graph.model(["N", 32], graph.dense(value, "head", graph.rng.standard_normal((4, 32)) / 6), ["N", 4])


@pytest.mark.parametrize("probe", [True, False])
def test_a_fresh_batchnorm_is_put_back_for_training(probe: bool) -> None:
    folded = cnn(depth=6, activation="Sigmoid", folded=True)
    whole = risk(cnn(depth=6, activation="Sigmoid", norm=True), probe=probe)
    assert risk(folded, probe=probe) == pytest.approx(whole, rel=0.05)
    assert risk(folded, probe=probe, mode="eval") > 0.9 > 0.2 > whole


def test_figures_are_those_of_the_network_before_it_was_folded() -> None:
    reports = [gradlint.check(cnn(depth=4, folded=f, norm=not f), loss="linear") for f in (True, False)]
    folded, whole = ({w.name: w.measured["grad_rms"] for w in r.weights} for r in reports)
    for name in ("conv.0.weight", "conv.3.weight", "head.weight"):
        assert folded[name] == pytest.approx(whole[name], rel=1e-2)


def test_one_that_was_trained_is_not_put_back() -> None:
    model = cnn(depth=6, activation="Sigmoid", folded=True)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("conv") and tensor.name.endswith("bias"):
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 0.01, np.float32), tensor.name))
    report = gradlint.check(model, probe=False)
    assert report.summary.verdict == "fail"
    assert "eval mode" in next(f.message for f in report.findings if f.rule == "normalization-folded")


def test_names_of_tensorflow_tell_what_was_folded() -> None:
    assert risk(chain(names=True), probe=False) < 0.3 < 0.6 < risk(chain(names=False), probe=False)


def test_the_mark_of_a_fold_on_a_node_without_constants_is_passed_over() -> None:
    graph = _Graph(0)
    value = graph.node("Mul", ["x", "x"], "square")
    graph.nodes[-1].metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value=FOLDED)
    model = graph.model(["N", 8], graph.dense(value, "head", graph.rng.standard_normal((4, 8)) / 3), ["N", 4])
    assert "eval mode" in next(f.message for f in gradlint.check(model).findings if f.rule == "normalization-folded")


def test_a_kernel_that_took_a_batchnorm_is_a_parameter_though_its_mark_is_lost() -> None:
    model = cnn(depth=2, folded=True)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("head"):
            kind = {"key": "pkg.torch.export.graph_signature.InputSpec.kind", "value": "InputKind.PARAMETER"}
            tensor.metadata_props.add(**kind)
    weights = gradlint.check(model, probe=False).weights
    assert {"conv.0.weight", "conv.1.weight", "head.weight"} <= {w.name for w in weights if w.trainable}


def test_what_is_put_back_is_no_weight() -> None:
    report = gradlint.check(cnn(depth=2, folded=True), probe=False)
    assert {w.name.split(".")[0] for w in report.weights} == {"conv", "head"}
