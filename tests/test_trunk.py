"""The trunk at every depth, and blame that sums to the decay."""

import math

import onnx_ir as ir
import pytest
from builders import _Graph, mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlint import check
from gradlint.trunk import blame, crossing, depths, levels


def network(edges: list[tuple[int, ...]]) -> tuple[ir.Graph, list[ir.Value]]:
    """Node k reads the values `edges[k]` (0 is the input) and makes value k + 1; the last value is the output."""
    values = [ir.Value(name="v0", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))]
    nodes = []
    for k, reads in enumerate(edges):
        node = ir.node("Sum", [values[r] for r in reads], name=f"n{k + 1}")
        node.outputs[0].name = f"v{k + 1}"
        node.outputs[0].dtype = ir.DataType.FLOAT
        values.append(node.outputs[0])
        nodes.append(node)
    return ir.Graph([values[0]], [values[-1]], nodes=nodes, opset_imports={"": 21}), values


def test_a_skip_carries_the_trunk() -> None:
    graph, values = network([(0,), (1,), (2,), (1, 3)])
    figures = {values[1]: 1.0, values[2]: 1e-6, values[3]: 1e-3, values[4]: 1.0}
    assert list(crossing(levels(graph), figures).values()) == [1.0, 1.0, 1.0, 1.0]


def test_a_chain_has_no_bypass() -> None:
    graph, values = network([(0,), (1,), (2,)])
    figures = {values[1]: 1e-6, values[2]: 1e-3, values[3]: 1.0}
    assert list(crossing(levels(graph), figures).values()) == [1e-6, 1e-3, 1.0]


def test_depth_runs_from_input_to_output() -> None:
    graph, _ = network([(0,), (1,), (2,), (1, 3)])
    depth = depths(graph)
    assert [round(depth(n), 2) for n in graph] == [0.0, 0.33, 0.67, 1.0]


@st.composite
def flows(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[float], int]:
    """A random graph, the squared norm each edge sends back, and which norms are known."""
    count = draw(st.integers(2, 10))
    edges = [tuple({draw(st.integers(0, k)), k}) for k in range(count)]
    sent = draw(st.lists(st.floats(-12, 3), min_size=2 * count, max_size=2 * count))
    return edges, sent, draw(st.integers(0, 2**count - 1))


@settings(max_examples=100, deadline=None)
@given(flows())
def test_blame_sums_to_the_decay(flow: tuple[list[tuple[int, ...]], list[float], int]) -> None:
    edges, exponents, known = flow
    graph, values = network(edges)
    sent: dict[tuple[ir.Node, int], float] = {}
    exponent = iter(exponents)
    for node in graph:
        for k, _ in enumerate(node.inputs):
            sent[node, k] = 10.0 ** next(exponent)
    norms = {values[-1]: 2.0}
    for k, value in enumerate(values[1:-1]):
        total = sum(sent[u.node, u.idx] for u in value.uses())
        if known >> k & 1 and total > 0:
            norms[value] = math.sqrt(total)
    found = blame(graph, norms, sent, 2.0, list(norms))
    for value, parts in found.items():
        expected = math.log10(norms[value] / 2.0)
        assert sum(p.decades for p in parts) == pytest.approx(expected, abs=1e-3), value.name


def test_blame_of_a_deep_chain_leaves_nothing_out() -> None:
    graph, values = network([(k,) for k in range(1500)])
    gain = 10.0**-0.004
    sent = {(node, 0): gain ** (2 * (1500 - k)) for k, node in enumerate(graph)}
    norms = {value: gain ** (1500 - k) for k, value in enumerate(values)}
    found = blame(graph, norms, sent, 1.0, [values[1]])[values[1]]
    assert len(found) == 1499
    assert sum(part.decades for part in found) == pytest.approx(-0.004 * 1499)


def test_a_report_on_a_deep_network_is_small_and_blames_what_is_spoken_of() -> None:
    report = check(mlp(depth=300, width=8, activation="Tanh"), probe=False)
    rows = {row.name: row for row in report.layers}
    told = {finding.layer for finding in report.findings} | {report.summary.worst_layer}
    assert {name for name, row in rows.items() if row.blame is not None} == told - {None}
    worst = rows[str(report.summary.worst_layer)]
    assert sum(part.decades for part in worst.blame or ()) == pytest.approx(worst.estimated["decades"], abs=1e-3)
    assert len(report.to_json()) < 3000 * len(rows)


def test_blame_names_the_node_that_takes_the_gradient() -> None:
    graph, values = network([(0,), (1,), (2,)])
    nodes = list(graph)
    sent = {(nodes[1], 0): 1e-8, (nodes[2], 0): 1.0, (nodes[0], 0): 1e-8}
    norms = {values[1]: 1e-4, values[2]: 1.0, values[3]: 1.0}
    (part,) = blame(graph, norms, sent, 1.0, [values[1]])[values[1]]
    assert (part.node, part.decades) == ("n2", pytest.approx(-4.0))


def test_a_skip_that_pools_carries_the_trunk_past_a_branch_that_starts_at_zero() -> None:
    graph = _Graph(0)
    stem = graph.node("Relu", [graph.conv("x", "stem", 3, 8, math.sqrt(2))], "stem.act")
    branch = graph.batchnorm(graph.conv(stem, "branch", 8, 8, 1.0), "branch.bn", 8, gamma=0.0)
    pooled = graph.node("AveragePool", [stem], "skip.pool", kernel_shape=[3, 3], pads=[1] * 4)
    skip = graph.batchnorm(graph.conv(pooled, "skip", 8, 8, 1.0, size=1), "skip.bn", 8)
    features = graph.node("Relu", [graph.node("Add", [branch, skip], "add")], "act")
    flat = graph.node("Flatten", [graph.node("GlobalAveragePool", [features], "gap")], "flat")
    value = graph.dense(flat, "head", graph.rng.standard_normal((4, 8)) / math.sqrt(8))
    report = check(graph.model(["N", 3, 16, 16], value, ["N", 4]), mode="train")
    assert report.summary.risk is not None
    assert report.summary.risk < 0.1
    assert "vanishing-gradient" not in {f.rule for f in report.findings}
