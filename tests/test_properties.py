"""What must hold for every model: measured stays under proved, and the spelling of a graph does not matter."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import cnn, mlp, rnn, transformer
from hypothesis import given, settings
from hypothesis import strategies as st

import gradlint
from gradlint.results import Report

SAMPLES = sorted((Path(__file__).parent.parent / "sample_models").glob("*.onnx"))
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus")


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Small random networks of several families."""
    seed, gain = draw(st.integers(0, 1000)), draw(st.sampled_from([0.3, 1.0, 1.5]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    depth = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["mlp", "cnn"]))
    residual = draw(st.booleans())
    if kind == "mlp":
        return mlp(depth=depth, width=12, inputs=6, activation=activation, gain=gain, residual=residual, seed=seed)
    return cnn(depth=depth, channels=4, image=8, activation=activation, gain=gain, residual=residual, seed=seed)


def below(report: Report) -> None:
    """Every measured norm is under the proved bound, every measured mean inside the proved range."""
    for layer in report.layers:
        bound, norm = layer.proved.get("grad_norm"), layer.measured.get("grad_norm")
        if bound is not None and norm is not None:
            # the bound counts per unit of the expected cotangent; the drawn one scatters about it
            assert norm <= bound * scatter(report) * (1 + 1e-5), layer.name
        box, mean = layer.proved.get("output_range"), layer.measured.get("output_mean")
        if box is not None and mean is not None:
            assert box[0] - 1e-5 <= mean <= box[1] + 1e-5, layer.name


def scatter(report: Report) -> float:
    """The cotangent that was drawn against its expectation, from a layer whose measured decades are known."""
    ratios = [
        row.measured["grad_norm"]
        / 10 ** row.measured["decades"]
        / (row.estimated["grad_norm"] / 10 ** row.estimated["decades"])
        for row in report.layers
        if row.measured.get("grad_norm") and row.estimated.get("grad_norm") and math.isfinite(row.measured["decades"])
    ]
    return ratios[0] if ratios else 1.0


@settings(max_examples=25, deadline=None)
@given(networks())
def test_measured_is_under_proved(model: onnx.ModelProto) -> None:
    report = gradlint.check(model, mode="eval")
    assert any("grad_norm" in layer.measured for layer in report.layers)
    below(report)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_measured_is_under_proved_on_the_samples(path: Path) -> None:
    below(gradlint.check(path, data=path.with_suffix(".npz"), mode="eval"))


def figures(report: Report) -> list[tuple[float, ...]]:
    """What must not change: per layer, in depth order of the figures themselves."""
    rows = []
    for layer in report.layers:
        known = [layer.estimated.get("grad_norm"), layer.measured.get("grad_norm"), layer.proved.get("grad_norm")]
        rows.append(tuple(0.0 if x is None else x for x in known))
    return sorted(rows)


def same(one: Report, other: Report) -> None:
    assert one.summary.verdict == other.summary.verdict
    assert one.summary.risk == pytest.approx(other.summary.risk, abs=1e-4)
    assert {f.rule for f in one.findings} == {f.rule for f in other.findings}
    np.testing.assert_allclose(figures(one), figures(other), rtol=1e-4, atol=1e-9)


MODELS = {
    "mlp": lambda: mlp(depth=6, activation="Sigmoid"),
    "residual": lambda: mlp(depth=4, residual=True, norm=True),
    "cnn": lambda: cnn(depth=3, norm=True, residual=True, image=8),
    "rnn": lambda: rnn(steps=12),
    "transformer": lambda: transformer(depth=1, tokens=6, dim=16),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_do_not_matter(name: str) -> None:
    model = MODELS[name]()
    renamed = onnx.ModelProto.FromString(model.SerializeToString())
    inputs = {i.name for i in renamed.graph.input} | {o.name for o in renamed.graph.output}
    new: dict[str, str] = {}

    def rename(old: str) -> str:
        return old if old in inputs or not old else new.setdefault(old, f"v{len(new)}")

    for k, node in enumerate(renamed.graph.node):
        node.name = f"node {k}"
        node.input[:] = [rename(n) for n in node.input]
        node.output[:] = [rename(n) for n in node.output]
    for initializer in renamed.graph.initializer:
        initializer.name = rename(initializer.name)
    del renamed.graph.value_info[:]
    same(gradlint.check(model), gradlint.check(renamed))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_nodes_does_not_matter(name: str, seed: int) -> None:
    model = MODELS[name]()
    shuffled = onnx.ModelProto.FromString(model.SerializeToString())
    order = np.random.default_rng(seed).permutation(len(shuffled.graph.node))
    nodes = [model.graph.node[int(k)] for k in order]
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    same(gradlint.check(model), gradlint.check(shuffled))


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_size_does_not_matter_to_the_estimate(name: str) -> None:
    model = MODELS[name]()
    one, other = (gradlint.check(model, batch=n, probe=False, mode="eval") for n in (4, 32))
    np.testing.assert_allclose(figures(one), figures(other), rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_input_gives_the_same_report(name: str) -> None:
    one, other = (gradlint.check(MODELS[name]()).to_dict() for _ in range(2))
    one.pop("timing")
    other.pop("timing")
    assert one == other
