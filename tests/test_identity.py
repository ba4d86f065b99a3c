"""Fingerprints: the same finding in the next export, whatever its nodes are numbered and its weights hold."""

from __future__ import annotations

import math
from pathlib import Path

import builders
import numpy as np
import onnx
import pytest
from command import ROOT, SAMPLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import gradlint
from gradlint.results import Report

EXPORT = ROOT / "tests" / "exports" / "sigmoid_net.onnx"
MODELS = [EXPORT, SAMPLES / "digits_sigmoid.onnx", SAMPLES / "dead_relu.onnx", SAMPLES / "rnn_200.onnx"]


def _prints(model: onnx.ModelProto) -> set[tuple[str, str]]:
    report = _check(model)
    prints = [finding.fingerprint for finding in report.findings]
    assert len(set(prints)) == len(prints)
    return {(finding.rule, finding.fingerprint) for finding in report.findings}


def _check(model: onnx.ModelProto) -> Report:
    return gradlint.check(model, probe=False, preview=True)


def _renumber(model: onnx.ModelProto, numbers: list[int], prefix: str) -> None:
    """Nodes and the values between them get other names, as when an exporter counts from elsewhere."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)} | {""}
    values = {name for node in model.graph.node for name in node.output} - kept
    others = [name for number in numbers if (name := f"{prefix}{number}") not in kept]
    renamed = dict(zip(sorted(values), others, strict=False))
    for node, number in zip(model.graph.node, reversed(numbers), strict=False):
        node.name = f"{prefix}_node_{number}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del model.graph.value_info[:]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_they_outlive_renumbered_nodes_and_small_changes_of_the_weights(path: Path, data: st.DataObject) -> None:
    model = onnx.load(path)
    before = _prints(model)
    assert before
    numbers = data.draw(st.permutations(range(200)))
    _renumber(model, numbers, data.draw(st.sampled_from(["val_", "linear_", "onnx::Gemm_"])))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32:
            moved = (array * (1 + 1e-4 * rng.standard_normal(array.shape))).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(moved, weight.name))
    assert _prints(model) == before


@pytest.mark.parametrize(
    "network",
    [
        {"depth": 12, "activation": "Sigmoid"},
        {"depth": 20, "activation": "Tanh", "gain": 0.5},
        {"depth": 30, "gain": 3.0},
        {"depth": 8, "bias": -1.2},
        {"depth": 6, "kernels": ("normal", "duplicate", "normal", "duplicate")},
    ],
    ids=str,
)
def test_they_outlive_other_weights_of_the_same_network(network: dict) -> None:
    """Drawn again, a finding begins or ends a layer earlier and another layer is its worst; it stays the same one."""
    reports = [gradlint.check(builders.mlp(seed=seed, **network), threads=1) for seed in range(3)]
    serious = [[finding for finding in report.findings if finding.level != "note"] for report in reports]
    by_rule: dict[str, set[frozenset[str]]] = {}
    for findings in serious:
        for rule in {finding.rule for finding in findings}:
            prints = frozenset(finding.fingerprint for finding in findings if finding.rule == rule)
            by_rule.setdefault(rule, set()).add(prints)
    assert by_rule
    assert {rule: len(prints) for rule, prints in by_rule.items()} == dict.fromkeys(by_rule, 1)


def test_a_layer_more_changes_no_other_layers() -> None:
    """A dead layer behind, whose nodes take numbers: what was known stays known."""
    few, more = (builders.mlp(depth=depth, kernels=("constant",), gain=math.sqrt(2)) for depth in (4, 6))
    constant = ("constant-weights", "GL302")
    prints = [{f.fingerprint for f in _check(model).findings if (f.rule, f.code) == constant} for model in (few, more)]
    assert len(prints[0]) == 1
    assert prints[0] == prints[1]


def test_different_places_and_rules_differ() -> None:
    model = builders.mlp(depth=6, kernels=("duplicate", "normal", "duplicate"))
    findings = [finding for finding in _check(model).findings if finding.rule == "duplicate-units"]
    assert len({finding.fingerprint for finding in findings}) == len(findings) == 2
