"""What a graph says about itself: weights, the framework's names, roles."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.graph import batch_size, frames, is_gate, is_head, main_output, module, trainable
from gradlint.load import from_proto, read
from gradlint.parameters import split_merged, weight_uses

GOLDEN = Path(__file__).parent / "golden"
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def load(model: onnx.ModelProto) -> ir.Graph:
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims())
    return loaded.graph


def text(body: str, weights: str = "", signature: str = "(float[N, 4] x) => (float[N, 4] y)") -> ir.Graph:
    return load(onnx.parser.parse_model(f"{HEADER} net {signature} {weights} {{ {body} }}"))


def golden(name: str) -> ir.Graph:
    loaded = read(GOLDEN / f"{name}.onnx").model
    canonicalize(loaded, Dims())
    split_merged(loaded)
    return loaded.graph


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnx")), ids=lambda p: p.stem)
def test_every_parameter_of_pytorch_is_found(path: Path) -> None:
    keys = [k for k in np.load(path.with_suffix(".npz")).files if k.count(".") > 1]
    truth = {".".join(k.split(".")[2:]) for k in keys}
    uses = weight_uses(golden(path.stem))
    names = {n for u in uses for n in ([u.parameter] if isinstance(u.parameter, str) else u.parameter or [])}
    assert truth <= names | {u.initializer for u in uses}


def test_statistics_settings_and_masks_are_no_weights() -> None:
    graph = text(
        """a = BatchNormalization(x, g, b, m, v)
           c = Pow(a, p)
           k = Mul(c, mask)
           y = Clip(k, low)""",
        """<float[4] g = {1, 1, 1, 1}, float[4] b = {0, 0, 0, 0}, float[4] m = {0, 0, 0, 0}, float[4] v = {1, 1, 1, 1},
            float[1] p = {2}, float[2, 4] mask = {0, 0, 1, 1, 1, 1, 0, 0}, float low = {-1}>""",
        "(float[2, 4] x) => (float[2, 4] y)",
    )
    assert {v.name for v in graph.initializers.values() if trainable(v)} == {"g", "b"}


def test_a_weight_is_seen_through_moves() -> None:
    graph = text(
        "t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)",
        "<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>",
    )
    (use,) = weight_uses(graph)
    assert (use.initializer, use.layer.op_type, use.index) == ("w", "MatMul", 1)


def test_merged_initializers_are_told_apart() -> None:
    """The exporter keeps one tensor of ones for two norms; each parameter gets its own row again."""
    shared = ir.tensor(np.ones(4, np.float32), name="ones")
    value = ir.Value(name="ones", const_value=shared, shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = []
    for k in (1, 2):
        node = ir.node("LayerNormalization", [x if k == 1 else nodes[0].outputs[0], value], name=f"norm{k}")
        node.metadata_props["pkg.torch.onnx.fx_node"] = f"%n = call(args = (%x, [4], %p_blocks_norm{k}_weight))"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'blocks.norm{k}', 'layer_norm']"
        node.outputs[0].dtype = ir.DataType.FLOAT
        nodes.append(node)
    graph = ir.Graph([x], [nodes[1].outputs[0]], nodes=nodes, initializers=[value], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    split_merged(model)
    uses = weight_uses(graph)
    assert [(u.initializer, u.parameter) for u in uses] == [
        ("ones", "blocks.norm1.weight"),
        ("ones", "blocks.norm2.weight"),
    ]
    assert uses[0].value is not uses[1].value
    assert uses[0].value.const_value is uses[1].value.const_value


def test_a_renamed_parameter_is_not_the_one_its_neighbour_reads_by_name() -> None:
    """addcmul(beta, alpha, x) becomes Mul(folded alpha, x) and Add(beta, .), both of which mention both parameters."""
    graph = text(
        "h = Relu(x)  s = Mul(folded, h)  y = Add(beta, s)",
        "<float[4] folded = {1, 2, 3, 4}, float[4] beta = {4, 3, 2, 1}>",
    )
    for node in list(graph)[1:]:
        node.metadata_props["pkg.torch.onnx.fx_node"] = "%a = call(args = (%p_beta, %p_norm_alpha, %x))"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'norm', 'addcmul']"
    assert {(u.initializer, u.parameter) for u in weight_uses(graph)} == {("folded", "norm.alpha"), ("beta", "beta")}


def test_a_parameter_of_one_module_under_several_names_has_them_all() -> None:
    graph = text("h = MatMul(x, w) y = MatMul(h, w)", f"<float[4, 4] w = {{{', '.join(map(str, range(16)))}}}>")
    (value,) = graph.initializers.values()
    value.name = "mlp4.weight"
    for k, node in enumerate(graph):
        node.metadata_props["pkg.torch.onnx.fx_node"] = "%linear : (args = (%x, %p_mlp4_weight))"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'mlp{3 + k}', 'linear']"
    first, second = weight_uses(graph)
    assert first.parameter == ["mlp4.weight", "mlp3.weight"]
    assert second.parameter == "mlp4.weight"


def test_a_kernel_keeps_its_name_when_a_batchnorm_is_folded_into_it() -> None:
    """Its node is now called after the BatchNormalization, and so is the bias that the exporter had to add."""
    graph = text(
        "h = Conv(x, k1, b1)  y = Conv(h, k2, b2)",
        """<float[2, 2, 1] k1 = {1, 2, 3, 4}, float[2] b1 = {1, 2},
            float[2, 2, 1] k2 = {4, 3, 2, 1}, float[2] b2 = {2, 1}>""",
        "(float[2, 2, 4] x) => (float[2, 2, 4] y)",
    )
    names = {"k1": "0.weight", "b1": "0.bias", "k2": "2.conv.weight", "b2": "2.conv.weight_bias"}
    for value in list(graph.initializers.values()):
        value.name = names[str(value.name)]
    for node, norm in zip(graph, ("1", "2.norm"), strict=True):
        told = f"%n : (args = (%conv, %p_{norm.replace('.', '_')}_weight, %p_{norm.replace('.', '_')}_bias, %m, %v))"
        node.metadata_props["pkg.torch.onnx.fx_node"] = told
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{norm}', 'batch_norm']"
        node.metadata_props["pkg.onnxscript.rewriter.rule_name"] = "FuseBatchNormIntoConv"
    assert [u.parameter for u in weight_uses(graph)] == ["0.weight", "0.bias", "2.conv.weight", "2.norm.bias"]


def test_a_merged_parameter_whose_module_never_ran_is_called_like_its_twin() -> None:
    """MultiheadAttention reads its projection's weight itself: no scope spells `out_proj.weight`."""
    graph = text("h = MatMul(x, w) y = MatMul(h, w)", f"<float[4, 4] w = {{{', '.join(map(str, range(16)))}}}>")
    (value,) = graph.initializers.values()
    value.name = "layers.0.attn.out_proj.weight"
    for k, node in enumerate(graph):
        node.metadata_props["pkg.torch.onnx.fx_node"] = f"%linear : (args = (%x, %p_layers_{k}_attn_out_proj_weight))"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'layers.{k}', 'layers.{k}.attn', 'linear']"
    assert [u.parameter for u in weight_uses(graph)] == [f"layers.{k}.attn.out_proj.weight" for k in (0, 1)]


def test_modules_and_frames_come_from_the_exporter() -> None:
    graph = golden("attention")
    modules = {module(n) for n in graph}
    assert {"norm", "qkv", "mlp.1"} <= modules
    assert {path for n in graph for path, _ in frames(n)[:1]} == {"golden.py"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/layers/layers.0/Gemm", "layers.0"),
        ("/features/features.0/features.0.1/conv/Conv", "features.0.1.conv"),
        ("/block/layers/layers.0/Gemm", "block.layers.0"),
        ("/Relu", None),
        ("sequential/dense_1/MatMul", "sequential.dense_1"),
        ("StatefulPartitionedCall/sequential/dense_1/BiasAdd", "sequential.dense_1"),
        ("StatefulPartitionedCall_1/MatMul", None),
        ("dense", None),
    ],
)
def test_names_of_torchscript_and_tf2onnx_give_the_module(name: str, path: str | None) -> None:
    (node,) = text("y = Relu(x)")
    node.name = name
    assert module(node) == path


def test_malformed_metadata_is_ignored() -> None:
    graph = text("y = Relu(x)")
    (node,) = graph
    for bad in ("[", "import os", "{'a': 1}", "[1, 2]", "(" * 500):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = bad
        node.metadata_props["pkg.torch.onnx.stack_trace"] = bad
        assert module(node) is None
        assert frames(node) == []


GATES = {
    "silu": ("s = Sigmoid(x)  y = Mul(x, s)", "Sigmoid", True),
    "squeeze-excite": ("m = ReduceMean(x)  s = Sigmoid(m)  y = Mul(x, s)", "Sigmoid", True),
    "erf gelu": ("e = Erf(x)  one = Constant<value_float = 1.0>()  a = Add(e, one)  y = Mul(x, a)", "Erf", True),
    "mish": ("p = Softplus(x)  t = Tanh(p)  y = Mul(x, t)", "Tanh", True),
    "cell by hand": ("s = Sigmoid(x)  t = Tanh(x)  y = Mul(s, t)", "Tanh", False),
    "plain": ("s = Sigmoid(x)  y = Relu(s)", "Sigmoid", False),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    body, op_type, expected = GATES[name]
    node = next(n for n in text(body) if n.op_type == op_type)
    assert is_gate(node) is expected


def test_heads() -> None:
    weights = "<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>"
    graph = text("a = Sigmoid(x)  b = MatMul(a, w)  y = Sigmoid(b)", weights)
    layers = {u.layer for u in weight_uses(graph)}
    assert [is_head(n, layers) for n in graph if n.op_type == "Sigmoid"] == [False, True]


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ("a = MatMul(x, w) y = Add(a, b)", "y"),
        ("a = MatMul(x, w) y = Add(b, a)", "y"),
        ("a = MatMul(x, w) s = Add(a, p) y = Relu(s)", "a"),  # numbers of their own for every example: no bias
        ("a = MatMul(x, w) s = Add(a, b) r = Relu(a) y = Add(r, s)", "a"),  # also read without it
        ("a = Relu(x) y = Add(a, b)", "a"),
    ],
)
def test_a_product_gives_the_sum_with_its_bias(body: str, given: str) -> None:
    weights = (
        "<float[4, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] b = {1,2,3,4}, float[2, 4] p = {1,2,3,4,5,6,7,8}>"
    )
    graph = text(body, weights, "(float[2, 4] x) => (float[2, 4] y)")
    assert main_output(graph[0]).name == given


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "batch"),
    [
        ("float[12, 4, 3] x", "float[4, 3] y", "y = ReduceMean<keepdims=0>(x, axes)", 4),  # (T, B, I)
        ("float[12, 4, 3] x", "float[12, 4] y", "y = ReduceMean<keepdims=0>(x, last)", 12),
        ("int64[5] n, float[2, 8] x", "float[2, 8] y", "y = Relu(x)", 2),
    ],
)
def test_examples_lie_along_the_axis_that_the_outputs_share(inputs: str, outputs: str, body: str, batch: int) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g ({inputs}) => ({outputs}) '
        f"<int64[1] axes = {{0}}, int64[1] last = {{2}}> {{ {body} }}"
    )
    assert batch_size(ir.from_proto(model).graph) == batch
