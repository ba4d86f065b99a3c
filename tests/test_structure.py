"""Facts from walks over the graph: skips, chains, what follows what, what the gradient can reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import cnn, mlp, transformer

from gradlint.anatomy import Anatomy, anatomy
from gradlint.attention_facts import attentions
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.fact_table import FACTS, Fact
from gradlint.load import from_proto
from gradlint.patterns import compositions, normalisations
from gradlint.reach import blocked, disconnected_weights, draw_zero_heads, reaching_layers, structural_zeros
from gradlint.structure import bypasses, structure


def parts_of(proto: onnx.ModelProto) -> Anatomy:
    model = from_proto(proto, "model", Path("."))
    canonicalize(model, Dims(batch=4))
    return anatomy(model.graph)


def text(body: str, weights: str = "", outputs: str = "float[N, 8] y", inputs: str = "float[N, 8] x") -> Anatomy:
    """A graph of opset 20 with matrices w0, w1, w2 of 8 x 8 and a bias b of 8 beside the weights given."""
    drawn = np.random.default_rng(0).standard_normal((3, 64)).round(3)
    given = [f"float[8, 8] w{k} = {{{', '.join(map(str, row))}}}" for k, row in enumerate(drawn)]
    given.append("float[8] b = {0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.8}")
    stored = ", ".join([*given, *([weights] if weights else [])])
    return parts_of(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 20]> net ({inputs}) => ({outputs}) <{stored}> {{ {body} }}'
        )
    )


def facts_of(parts: Anatomy) -> dict[str, dict[str, Fact]]:
    """Facts by node name; nodes of a parsed graph are named after their output."""
    found = structure(parts, estimate(parts.graph, batch=4), bypasses(parts))
    return {str(node.name): facts for node, facts in found.items()}


def names(nodes: object) -> set[str]:
    return {str(n.name) for n in nodes}  # type: ignore[attr-defined]


# -- skips -------------------------------------------------------------------------------------------------------------


def test_branch_beside_identity_is_bypassed_and_stem_is_not() -> None:
    parts = text("s = MatMul(x, w0) a = MatMul(s, w1) r = Relu(a) z = Add(s, r) y = MatMul(z, w2)")
    around = bypasses(parts)
    assert names(around.bypassed) == {"a", "r"}
    assert names(around.joins) == {"z"}


def test_concatenation_bypasses_too() -> None:
    parts = text("a = MatMul(x, w0) c = Concat<axis = 1>(x, a) y = Relu(c)", outputs="float[N, 16] y")
    assert names(bypasses(parts).bypassed) == {"a"}


def test_towers_of_equal_depth_are_no_skips() -> None:
    parts = text("a = MatMul(x, w0) b0 = MatMul(x, w1) z = Add(a, b0) y = MatMul(z, w2)")
    assert not bypasses(parts).bypassed


def test_sum_of_two_inputs_bypasses_nothing() -> None:
    parts = text("a = MatMul(x, w0) r = Relu(a) y = Add(r, u)", inputs="float[N, 8] x, float[N, 8] u")
    assert not bypasses(parts).bypassed


def test_gate_is_no_skip() -> None:
    parts = text("a = MatMul(x, w0) g = Sigmoid(a) y = Mul(a, g)")
    assert not bypasses(parts).bypassed


def test_mask_in_attention_is_no_skip() -> None:
    assert not bypasses(parts_of(transformer(depth=2, skip=False, norm="none"))).bypassed


# -- chains ------------------------------------------------------------------------------------------------------------


def test_chain_counts_layers_in_a_row_and_starts_again_behind_a_skip() -> None:
    plain = facts_of(parts_of(mlp(depth=6)))
    assert [plain[f"layers.{k}"]["chain_without_skip"] for k in range(6)] == [1, 2, 3, 4, 5, 6]
    residual = facts_of(parts_of(mlp(depth=6, residual=True)))
    assert residual["layers.5"]["chain_without_skip"] == 0
    assert residual["head"]["chain_without_skip"] == 1


def test_sigmoids_in_series() -> None:
    assert facts_of(parts_of(mlp(depth=8, activation="Sigmoid")))["act.7"]["sigmoid_chain"] == 8
    assert facts_of(parts_of(mlp(depth=8, activation="Sigmoid", norm=True)))["act.7"]["sigmoid_chain"] == 1
    assert facts_of(parts_of(mlp(depth=8, activation="Sigmoid", residual=True)))["act.7"]["sigmoid_chain"] == 0
    gates = facts_of(parts_of(cnn(depth=6, gate=True)))
    assert {gates[f"gate.{k}"]["sigmoid_chain"] for k in range(6)} == {0}


def test_sum_of_inverse_widths() -> None:
    assert facts_of(parts_of(mlp(depth=10, width=5)))["head"]["narrow_sum"] == pytest.approx(2.0)
    assert facts_of(parts_of(mlp(depth=10, width=5, norm=True)))["head"]["narrow_sum"] == pytest.approx(0.2)
    assert facts_of(parts_of(mlp(depth=10, width=5, activation="Tanh")))["head"]["narrow_sum"] == 0


def test_batchnorm_pairs_in_a_row() -> None:
    found = facts_of(parts_of(mlp(depth=7, norm=True)))
    assert found["norm.6"]["batchnorm_chain"] == 7
    assert facts_of(parts_of(mlp(depth=7, norm=True, residual=True)))["norm.6"]["batchnorm_chain"] == 0


def test_residual_additions_are_counted_and_their_variance_compared_with_the_first() -> None:
    found = facts_of(parts_of(mlp(depth=9, gain=1.414, residual=True)))
    assert [found[f"add.{k}"]["residual_index"] for k in range(1, 9)] == list(range(1, 9))
    growth = [found[f"add.{k}"]["residual_growth"] for k in range(1, 9)]
    assert growth[0] == 1
    assert growth == sorted(growth)  # type: ignore[type-var]
    assert "residual_index" not in found["layers.3"]


def test_post_norm_counts_and_pre_norm_does_not() -> None:
    post = facts_of(parts_of(transformer(depth=3, norm="post")))
    assert post["mlp.2.norm"]["post_norm_blocks"] == 6
    pre = facts_of(parts_of(transformer(depth=3, norm="pre")))
    assert {pre[n]["post_norm_blocks"] for n in pre if n.endswith("norm")} == {0}


# -- neighbours --------------------------------------------------------------------------------------------------------

SILU = "g = Sigmoid(a) y = Mul(a, g)"
GELU = "d = Div(a, r) e = Erf(d) f = Add(e, one) h = Mul(a, f) y = Mul(h, half)"
GELU_HALVED = "h = Mul(a, half) d = Div(a, r) e = Erf(d) f = Add(e, one) y = Mul(h, f)"
GELU_TANH = (
    "p = Pow(a, three) q = Mul(p, c) s = Add(a, q) t = Mul(s, k) u = Tanh(t) f = Add(u, one) "
    "h = Mul(a, half) y = Mul(h, f)"
)
MISH = "s = Softplus(a) t = Tanh(s) y = Mul(a, t)"
HARD_SWISH = "t = Add(a, three) g = Clip(t, zero, six) h = Mul(a, g) y = Div(h, six)"
SOFTSIGN = "s = Abs(a) t = Add(s, one) y = Div(a, t)"
SCALARS = (
    "float r = {1.41421356}, float one = {1}, float half = {0.5}, float three = {3}, float zero = {0}, "
    "float six = {6}, float c = {0.044715}, float k = {0.7978846}"
)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("Silu", SILU), ("Gelu", GELU), ("Gelu", GELU_HALVED), ("Gelu", GELU_TANH), ("Mish", MISH),
        ("HardSwish", HARD_SWISH), ("Softsign", SOFTSIGN),
    ],
)  # fmt: skip
def test_composed_activations_are_recognised(name: str, body: str) -> None:
    parts = text(f"a = MatMul(x, w0) {body}", SCALARS)
    found = {c.name: c for c in compositions(parts.graph).values()}
    assert set(found) == {name}
    assert found[name].source.name == "a"
    assert found[name].output.name == "y"
    facts = facts_of(parts)
    assert facts["a"]["next_activation"] == name
    for node in parts.activations:
        assert facts[str(node.name)]["activation"] == name
        assert facts[str(node.name)]["second_activation"] is False
        assert float(facts[str(node.name)]["max_slope"] or 0) == pytest.approx(
            {"Silu": 1.0998, "Gelu": 1.129, "Mish": 1.0885, "HardSwish": 1.5}[name], abs=1e-3
        )


def test_squeeze_excite_is_no_composed_activation() -> None:
    assert not compositions(parts_of(cnn(depth=2, gate=True)).graph)


def test_written_out_norm_is_a_normalisation() -> None:
    parts = text(
        "a = MatMul(x, w0) p = Mul(a, a) m = ReduceMean<keepdims = 1>(p, last) e = Add(m, eps) s = Sqrt(e) "
        "i = Reciprocal(s) n = Mul(a, i) g = Mul(n, b) y = MatMul(g, w1)",
        "int64[1] last = {-1}, float eps = {0.00001}",
    )
    assert names(normalisations(parts.graph)) == {"n"}
    assert facts_of(parts)["y"]["follows_norm"] is True
    assert facts_of(parts)["a"]["follows_norm"] is False


def test_next_activation_looks_through_bias_norm_and_sum() -> None:
    found = facts_of(parts_of(mlp(depth=3, activation="Tanh", norm=True)))
    assert [found[n]["next_activation"] for n in ("layers.0", "norm.0", "head")] == ["Tanh", "Tanh", "Identity"]


def test_second_activation() -> None:
    assert facts_of(text("a = MatMul(x, w0) r = Tanh(a) y = Sigmoid(r)"))["y"]["second_activation"] is True
    assert (
        facts_of(text("a = MatMul(x, w0) r = Relu(a) c = MatMul(r, w1) y = Sigmoid(c)"))["y"]["second_activation"]
        is False
    )
    clamp = facts_of(text("a = MatMul(x, w0) r = Relu(a) y = Clip(r, , six)", "float six = {6}"))
    assert clamp["y"]["second_activation"] is False


def test_softmax_between_layers_is_hidden_and_that_of_attention_is_not() -> None:
    assert facts_of(parts_of(mlp(depth=3, activation="Softmax")))["act.1"]["hidden_softmax"] is True
    found = facts_of(parts_of(transformer(depth=2)))
    assert {f["hidden_softmax"] for f in found.values() if "hidden_softmax" in f} == {False}


def test_softmax_over_keys_whose_heads_are_mixed_is_not_hidden() -> None:
    found = facts_of(
        text(
            "p = Softmax<axis = -1>(x) t = Transpose<perm = [0, 2, 1]>(p) m = MatMul(t, w0) y = MatMul(m, w1)",
            "",
            "float[N, 5, 8] y",
            "float[N, 8, 5] x",
        )
    )
    assert found["p"]["hidden_softmax"] is False


def test_branch_without_the_input_is_constant() -> None:
    found = facts_of(text("c = MatMul(w1, w2) a = MatMul(x, w0) y = MatMul(a, c)"))
    assert found["c"]["constant_branch"] is True
    assert found["a"]["constant_branch"] is False


# -- what the gradient reaches -----------------------------------------------------------------------------------------


def zeros_of(parts: Anatomy, mode: str = "train") -> tuple[set[str], set[tuple[str, int]]]:
    found = structural_zeros(parts, bypasses(parts), attentions(parts.graph), mode)
    return names(found.layers), {(str(n.name), k) for n, k in found.weights}


def test_branch_behind_a_zero_residual_scale_has_no_gradient_and_the_scale_has() -> None:
    zero = "float[8] z = {0, 0, 0, 0, 0, 0, 0, 0}"
    layers, weights = zeros_of(
        text("a = MatMul(x, w0) r = Relu(a) s = Mul(r, z) t = Add(x, s) y = MatMul(t, w1)", zero)
    )
    assert layers == {"a", "r"}
    assert weights == {("a", 1)}
    small = "float[8] z = {1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6}"
    assert zeros_of(text("a = MatMul(x, w0) s = Mul(a, z) t = Add(x, s) y = MatMul(t, w1)", small))[0] == {"a"}


def test_zero_scale_in_the_trunk_is_no_structural_zero() -> None:
    zero = "float[8] z = {0, 0, 0, 0, 0, 0, 0, 0}"
    assert zeros_of(text("a = MatMul(x, w0) s = Mul(a, z) y = MatMul(s, w1)", zero))[0] == set()


def test_zero_heads_are_drawn_small_and_other_kernels_of_zeros_are_not() -> None:
    zero = "float[8, 8] {} = {{" + ", ".join("0" * 64) + "}}"
    parts = text("a = MatMul(x, h0) r = Relu(a) y = MatMul(r, h1)", f"{zero.format('h0')}, {zero.format('h1')}")
    assert draw_zero_heads(parts, seed=0)
    inner, head = (use.value.const_value.numpy() for use in parts.uses)
    assert not inner.any()
    assert 0.005 < head.std() < 0.02
    assert not draw_zero_heads(parts, seed=0)


def test_bias_before_batchnorm_has_no_gradient_in_train_mode() -> None:
    parts = parts_of(cnn(depth=2, norm=True))
    assert zeros_of(parts)[1] == {("conv.0", 2), ("conv.1", 2)}
    assert zeros_of(parts, "eval")[1] == set()


def test_key_bias_has_no_gradient() -> None:
    parts = text(
        "q0 = MatMul(x, w0) q = Add(q0, b) k0 = MatMul(x, w1) k = Add(k0, bk) t = Transpose<perm = [0, 2, 1]>(k) "
        "l = MatMul(q, t) s = Mul(l, c) p = Softmax<axis = -1>(s) v = MatMul(x, w2) y = MatMul(p, v)",
        "float[8] bk = {1, 2, 3, 4, 5, 6, 7, 8}, float c = {0.354}",
        "float[N, 5, 8] y",
        "float[N, 5, 8] x",
    )
    assert zeros_of(parts)[1] == {("k", 1)}


def test_weights_behind_an_operator_without_gradient() -> None:
    body = "a = MatMul(x, w0) i = Cast<to = 7>(a) f = Cast<to = 1>(i) {} y = MatMul(s, w1)"
    found = {str(n.name): f for n, f in blocked(text(body.format("s = Relu(f)"))).items()}
    assert found["a"] == {"blocked_everywhere": True, "blocked_somewhere": True, "blocking_ops": "Cast"}
    assert found["y"]["blocked_somewhere"] is False
    beside = {str(n.name): f for n, f in blocked(text(body.format("s = Add(a, f)"))).items()}
    assert beside["a"] == {"blocked_everywhere": False, "blocked_somewhere": True, "blocking_ops": "Cast"}


def test_comparison_that_only_chooses_blocks_nothing() -> None:
    parts = text("a = MatMul(x, w0) m = Greater(a, zero) s = Where(m, a, zero) y = MatMul(s, w1)", "float zero = {0}")
    assert not any(f["blocked_somewhere"] for f in blocked(parts).values())


def test_layer_times_a_zero_that_is_no_weight_reaches_nothing() -> None:
    parts = text("a = MatMul(x, w0) z = Mul(a, zero) c = MatMul(x, w1) y = Add(c, z)", "float zero = {0}")
    assert names(reaching_layers(parts)) == {"c"}


def test_disconnected_weight_is_found_before_the_canonical_form_drops_it() -> None:
    proto = mlp(depth=2)
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x", "lost"], ["nowhere"], "nowhere"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32), "lost"))
    model = from_proto(proto, "model", Path("."))
    assert [v.name for v in disconnected_weights(model.graph)] == ["lost"]


@pytest.mark.parametrize("proto", [mlp(depth=3, residual=True, norm=True), cnn(gate=True), transformer()])
def test_every_fact_is_in_the_table(proto: onnx.ModelProto) -> None:
    parts = parts_of(proto)
    known = {name for facts in facts_of(parts).values() for name in facts}
    assert known <= set(FACTS)


def test_a_deep_graph_is_walked_without_recursion() -> None:
    nodes = [ir.node("Relu", [ir.val("x", ir.DataType.FLOAT, [4, 8])])]
    for k in range(3000):
        before = nodes[-1].outputs[0]
        before.dtype, before.shape = ir.DataType.FLOAT, ir.Shape([4, 8])
        nodes.append(ir.node("Add", [before, nodes[max(0, k - 3)].outputs[0]]))
    nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([nodes[0].inputs[0]], nodes[-1].outputs, nodes=nodes, opset_imports={"": 21})  # type: ignore[list-item]
    assert not bypasses(Anatomy(graph, (), (), (), frozenset())).bypassed
