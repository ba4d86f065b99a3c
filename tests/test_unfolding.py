"""Parameters that torch's exporters stored twice, once for several, or as what was looked up in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gradlint

_FX = "pkg.torch.onnx.fx_node"
_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
RNG = np.random.default_rng(0)
X, TARGET = RNG.standard_normal((3, 4, 6), np.float32), RNG.standard_normal((3, 4, 5), np.float32)


def exported(
    nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray], folded: Mapping[str, list[str]]
) -> onnx.ModelProto:
    """As torch exports it: `folded` says what a constant was computed from; the rest are parameters."""
    infos = []
    for name in weights:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, weights[name].shape)
        key, value = (_FOLDED, str(folded[name])) if name in folded else (_KIND, "PARAMETER")
        info.metadata_props.add(key=key, value=value)
        infos.append(info)
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in (("x", X), ("y", TARGET))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors, value_info=infos)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="pytorch")


def node(op: str, inputs: str, output: str, fx: str = "", scopes: tuple[str, ...] = (), **attributes: Any) -> Any:
    made = helper.make_node(op, inputs.split(), [output], name=f"node_{output}", **attributes)
    if fx:
        made.metadata_props.add(key=_FX, value=fx)
        made.metadata_props.add(key=_SCOPES, value=str(["", *scopes, output]))
    return made


def measured(model: onnx.ModelProto) -> dict[str, float]:
    """grad_rms by parameter (several: joined by a space); one that has several rows has the same figure in all."""
    report = gradlint.check(model, data={"x": X, "target": TARGET}, loss="linear", mode="eval")
    found: dict[str, set[float]] = {}
    for row in report.weights:
        names = row.parameter if isinstance(row.parameter, str) else " ".join(row.parameter or ["?"])
        assert row.measured is not None
        found.setdefault(names, set()).add(row.measured["grad_rms"])
    assert all(len(figures) == 1 for figures in found.values()), found
    return {name: figures.pop() for name, figures in found.items()}


def rms(gradient: np.ndarray) -> Any:
    return pytest.approx(np.sqrt(np.mean(np.square(gradient, dtype=np.float64))) / np.sqrt(len(X)), rel=1e-5)


def tokens(gradient: np.ndarray) -> np.ndarray:
    return gradient.reshape(-1, gradient.shape[-1])


def test_a_transposed_copy_of_a_tied_weight_is_the_weight() -> None:
    w, b = RNG.standard_normal((6, 6)), RNG.standard_normal((6, 5))
    model = exported(
        [
            node("MatMul", "x tied.weight", "h"),
            node("MatMul", "h val_0", "k", "%linear : (args = (%h, %p_tied_weight))"),
            node("MatMul", "k head", "y"),
        ],
        {"tied.weight": w, "val_0": w.T, "head": b},
        {"val_0": ["tied.weight"]},
    )
    g = TARGET @ b.T
    assert measured(model)["tied.weight"] == rms(tokens(X).T @ tokens(g @ w) + tokens(g).T @ tokens(X @ w))


def test_a_parameter_that_was_stored_once_for_each_of_its_uses_is_one() -> None:
    w, b = RNG.standard_normal((6, 6)), RNG.standard_normal((6, 5))
    fx = "%linear : (args = (%h, %p_shared_weight))"
    model = exported(
        [node("MatMul", "x val_0", "h", fx), node("MatMul", "h val_1", "k", fx), node("MatMul", "k head", "y")],
        {"val_0": w, "val_1": w, "head": b},
        {"val_0": ["shared.weight"], "val_1": ["shared.weight"]},
    )
    g = TARGET @ b.T
    assert measured(model)["shared.weight"] == rms(tokens(X).T @ tokens(g @ w.T) + tokens(X @ w).T @ tokens(g))


def test_a_repeated_copy_of_a_parameter_is_the_parameter() -> None:
    w, b = RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    model = exported(
        [node("MatMul", "x w", "h"), node("Add", "h expand", "k"), node("Add", "k layer.bias", "y")],
        {"w": w, "expand": np.tile(b, (3, 4, 1)), "layer.bias": b},
        {"expand": ["layer.bias", "val_3"]},
    )
    assert measured(model)["layer.bias"] == rms(2 * TARGET.sum((0, 1)))


def test_what_was_looked_up_in_a_table_is_the_table_again() -> None:
    """Heads in front, one column of the table for each relative position: equal columns are one row."""
    w, table = RNG.standard_normal((6, 5)), RNG.standard_normal((4, 5))
    where = np.array([[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1]])
    model = exported(
        [node("MatMul", "x w", "h"), node("Add", "h unsqueeze", "y", "%add : (args = (%h, %unsqueeze))")],
        {"w": w, "unsqueeze": table[where]},
        {"unsqueeze": ["index", "attn.relative_position_index", "attn.bias_table", "val_1"]},
    )
    summed = np.zeros_like(table)
    np.add.at(summed, where, TARGET)
    assert measured(model)["attn.bias_table"] == rms(summed)


def test_rows_that_are_alike_but_were_not_looked_up_are_rows_of_their_own() -> None:
    w, row = RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    model = exported(
        [node("MatMul", "x w", "h"), node("Mul", "h neg", "y", "%mul : (args = (%h, %neg))")],
        {"w": w, "neg": np.tile(row, (4, 1))},
        {"neg": ["mixer.A_log", "exp"]},
    )
    assert measured(model)["mixer.A_log"] == rms((TARGET * (X @ w)).sum(0))


def test_a_constant_shared_by_layers_that_hold_the_same_numbers_is_each_layers_own() -> None:
    w, scale = RNG.standard_normal((6, 5)), RNG.uniform(0.5, 2, 5)
    model = exported(
        [
            node("MatMul", "x w", "h"),
            node("Mul", "h add_4", "k", "%mul : (args = (%h, %add_4))", ("layers.0.norm",)),
            node("Mul", "k add_4", "y", "%mul_1 : (args = (%k, %add_4))", ("layers.1.norm",)),
        ],
        {"w": w, "add_4": scale},
        {"add_4": ["layers.0.norm.weight", "val_3"]},
    )
    expected = rms((TARGET * (X @ w) * scale).sum((0, 1)))
    assert {k: v for k, v in measured(model).items() if "norm" in k} == {
        "layers.0.norm.weight": expected,
        "layers.1.norm.weight": expected,
    }


@pytest.mark.parametrize(
    ("made_of", "found"),
    [
        (["net.model.norm.weight", "val_3"], True),  # 1 + weight
        (["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1", "div"], True),
        (["cls_token", "expand"], True),
        (["net.rotary_emb.inv_freq", "cos", "val_1"], False),
        (["attn.relative_position_index", "where"], False),
        (["arange", "sin", "mul_1"], False),
    ],
)
def test_constants_made_of_parameters_are_weights_and_those_made_of_buffers_are_not(
    made_of: list[str], found: bool
) -> None:
    model = exported(
        [node("MatMul", "x w", "h"), node("Mul", "h mul_7", "y", "%mul_8 : (args = (%h, %mul_7))")],
        {"w": RNG.standard_normal((6, 5)), "mul_7": RNG.standard_normal(5)},
        {"mul_7": made_of},
    )
    names = [name for name in made_of if "." in name or "token" in name]
    assert (" ".join(names) in measured(model)) == found


# -- TorchScript -------------------------------------------------------------------------------------------------------


def scripted(nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """As torch's old exporter has it: no metadata, nodes called by their modules."""
    model = exported(nodes, weights, {})
    del model.graph.value_info[:]
    return model


def test_copied_layers_whose_weights_torchscript_stored_once_are_told_apart() -> None:
    w, b = RNG.standard_normal((6, 6)), RNG.standard_normal((6, 5))
    model = scripted(
        [
            helper.make_node("Identity", ["layers.0.weight"], ["layers.1.weight"], name="Identity_1"),
            helper.make_node("MatMul", ["x", "layers.0.weight"], ["h"], name="/layers.0/MatMul"),
            helper.make_node("MatMul", ["h", "layers.1.weight"], ["k"], name="/layers.1/MatMul"),
            helper.make_node("MatMul", ["k", "head.weight"], ["y"], name="/head/MatMul"),
        ],
        {"layers.0.weight": w, "head.weight": b},
    )
    g, found = TARGET @ b.T, measured(model)
    assert found["layers.0.weight"] == rms(tokens(X).T @ tokens(g @ w.T))
    assert found["layers.1.weight"] == rms(tokens(X @ w).T @ tokens(g))


def test_the_transposed_copy_that_torchscript_made_of_a_tied_weight_is_the_weight() -> None:
    w, b = RNG.standard_normal((6, 6)), RNG.standard_normal((6, 5))
    model = scripted(
        [
            helper.make_node("MatMul", ["x", "embed.weight"], ["h"], name="/embed/MatMul"),
            helper.make_node("MatMul", ["h", "onnx::MatMul_42"], ["k"], name="/head/MatMul"),
            helper.make_node("MatMul", ["k", "out.weight"], ["y"], name="/out/MatMul"),
        ],
        {"embed.weight": w, "onnx::MatMul_42": w.T, "out.weight": b},
    )
    g = TARGET @ b.T
    assert measured(model)["embed.weight"] == rms(tokens(X).T @ tokens(g @ w) + tokens(g).T @ tokens(X @ w))


def test_a_nameless_weight_is_called_after_the_bias_beside_it_or_else_its_node() -> None:
    model = scripted(
        [
            helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["h"], name="/attn/MatMul"),
            helper.make_node("Add", ["attn.in_proj_bias", "h"], ["k"], name="/attn/Add"),
            helper.make_node("MatMul", ["k", "onnx::MatMul_2"], ["y"], name="/layer1/layer1.0/head/MatMul"),
        ],
        {
            "onnx::MatMul_1": RNG.standard_normal((6, 6)),
            "attn.in_proj_bias": RNG.standard_normal(6),
            "onnx::MatMul_2": RNG.standard_normal((6, 5)),
        },
    )
    assert measured(model).keys() == {"attn.in_proj_weight", "attn.in_proj_bias", "layer1.0.head.weight"}


def test_what_torchscript_packs_into_a_recurrent_layer_has_torchs_names() -> None:
    shapes = {"onnx::LSTM_1": (2, 20, 6), "onnx::LSTM_2": (2, 20, 5), "onnx::LSTM_3": (2, 40)}
    model = scripted(
        [
            helper.make_node(
                "LSTM", ["x", *shapes], ["both"], name="/rnn/LSTM_1", hidden_size=5, direction="bidirectional"
            ),
            helper.make_node("ReduceMean", ["both", "axes"], ["y"], name="/ReduceMean", keepdims=0),
        ],
        {name: 0.3 * RNG.standard_normal(shape) for name, shape in shapes.items()},
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 4, 5)))
    report = gradlint.check(model, data={"x": X}, mode="eval")
    assert [row.parameter for row in report.weights] == [
        ["rnn.weight_ih_l1", "rnn.weight_ih_l1_reverse"],
        ["rnn.weight_hh_l1", "rnn.weight_hh_l1_reverse"],
        ["rnn.bias_ih_l1", "rnn.bias_hh_l1", "rnn.bias_ih_l1_reverse", "rnn.bias_hh_l1_reverse"],
    ]
