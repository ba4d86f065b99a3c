"""The canonical form: another spelling of the same function."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.exceptions import DataError
from gradlint.graph import dims
from gradlint.load import from_proto
from gradlint.patterns import normalisations
from gradlint.reverse import differentiate
from gradlint.testing import session

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 4, 6)).astype(np.float32)


def single(
    op: str, opset: int, *constants: np.ndarray, outputs: int = 1, shape=X.shape, **attributes
) -> onnx.ModelProto:
    names = [f"c{k}" for k in range(len(constants))]
    node = helper.make_node(op, ["x", *names], [f"y{k}" for k in range(outputs)], **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(f"y{k}") for k in range(outputs)],
        [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def canonical(model: onnx.ModelProto, bound: Dims | None = None) -> ir.Model:
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, bound or Dims())
    return loaded


OLD_FORMS = {
    "softmax flattens": single("Softmax", 11, axis=1),
    "softmax on the last axis": single("Softmax", 11, axis=3),
    "logsoftmax": single("LogSoftmax", 7, axis=2),
    "squeeze axes": single("Squeeze", 11, shape=(2, 1, 4), axes=[1]),
    "unsqueeze axes": single("Unsqueeze", 11, axes=[0, 2]),
    "reduce axes": single("ReduceMean", 13, axes=[1, 3], keepdims=0),
    "reduce sum axes": single("ReduceSum", 11, axes=[-1]),
    "split sizes": single("Split", 11, outputs=2, axis=3, split=[2, 4]),
    "slice attributes": single("Slice", 9, starts=[0, 1], ends=[2, 3], axes=[0, 2]),
    "clip attributes": single("Clip", 7, min=-0.5, max=0.3),
    "clip one side": single("Clip", 7, min=-0.5),
    "pad attributes": single("Pad", 7, pads=[0, 0, 1, 2, 0, 0, 3, 0], value=1.5),
    "pad without value": single("Pad", 7, pads=[0, 0, 1, 2, 0, 0, 3, 0]),
    "top k attribute": single("TopK", 7, outputs=2, k=2),
    "upsample": single("Upsample", 9, np.array([1, 1, 2, 3], np.float32), mode="nearest"),
    "resize ten": single("Resize", 10, np.array([1, 1, 2, 2], np.float32), mode="linear"),
    "resize ten shrinks": single("Resize", 10, np.array([1, 1, 0.6, 0.7], np.float32)),
    "resize ten shrinks and grows": single("Resize", 10, np.array([1, 1, 0.6, 1.8], np.float32), mode="nearest"),
    "resize as tensorflow": single(
        "Resize", 11, np.array([], np.float32), np.array([1, 1, 1.7, 0.6], np.float32), mode="nearest",
        coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="floor",
    ),
    "grid sample": single("GridSample", 16, RNG.uniform(-1.2, 1.2, (2, 5, 4, 2)).astype(np.float32)),
    "grid sample bicubic": single(
        "GridSample", 16, RNG.uniform(-1.2, 1.2, (2, 5, 4, 2)).astype(np.float32), mode="bicubic"
    ),
    "regions of interest": single(
        "RoiAlign", 10, np.array([[0, 0, 4, 3], [1, 0.5, 5, 3]], np.float32), np.array([0, 1]),
        output_height=2, output_width=3,
    ),
    "dropout ratio": single("Dropout", 7, ratio=0.3),
    "batch normalisation": single(
        "BatchNormalization", 7, *(np.abs(RNG.standard_normal(3)).astype(np.float32) for _ in range(4))
    ),
    "auto pad upper": single(
        "Conv", 11, RNG.standard_normal((5, 3, 3, 2)).astype(np.float32), auto_pad="SAME_UPPER", strides=[2, 1]
    ),
    "auto pad lower": single("MaxPool", 11, auto_pad="SAME_LOWER", kernel_shape=[2, 3], strides=[1, 2]),
    "auto pad valid": single("AveragePool", 11, auto_pad="VALID", kernel_shape=[2, 3]),
    "transposed auto pad": single(
        "ConvTranspose", 11, RNG.standard_normal((3, 5, 3, 2)).astype(np.float32), auto_pad="SAME_UPPER", strides=[2, 2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_FORMS)
def test_lifting_keeps_the_function(name: str) -> None:
    model = OLD_FORMS[name]
    x = RNG.standard_normal([d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]).astype(np.float32)
    before = session(model).run(None, {"x": x})
    lifted = ir.to_proto(canonical(onnx.ModelProto.FromString(model.SerializeToString())))
    onnx.checker.check_model(lifted)
    assert {o.version for o in lifted.opset_import if o.domain == ""} == {21}
    after = session(lifted).run(None, {"x": x})
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def text(source: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(source)


HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def test_shape_arithmetic_is_folded_and_the_batch_bound() -> None:
    model = text(
        f"""{HEADER} flat (float[N, 3, 4] x) => (float[a, b] y) {{
            s = Shape(x)  i = Constant<value_int = 0>()  n = Gather(s, i)
            axes = Constant<value_ints = [0]>()  head = Unsqueeze(n, axes)
            rest = Constant<value_ints = [-1]>()  shape = Concat<axis = 0>(head, rest)
            y = Reshape(x, shape) }}"""
    )
    loaded = canonical(model, Dims(batch=5))
    assert [n.op_type for n in loaded.graph] == ["Reshape"]
    assert dims(loaded.graph.outputs[0]) == (5, 12)


def test_what_is_computed_from_a_kept_value_is_not_folded() -> None:
    """A scalar is no weight unless it is asked for: its gradient is, and that of what is computed from it."""
    model = text(
        f"""{HEADER} scaled (float[2, 3] x) => (float[2, 3] y)
        <float[1] log_scale = {{0.5}}, float[1] bias = {{-0.25}}> {{
            shifted = Add(log_scale, bias)  scale = Exp(shifted)  y = Mul(x, scale) }}"""
    )
    feed = {"x": X[0, 0, :2, :3], "y.cotangent": X[0, 1, :2, :3]}
    back = differentiate(model, wrt=["log_scale", "shifted"])
    found = session(back).run(["log_scale.grad", "shifted.grad"], feed)
    expected = np.sum(feed["x"] * feed["y.cotangent"]) * np.exp(0.25)
    np.testing.assert_allclose(found, [[expected]] * 2, rtol=1e-5)


@pytest.mark.parametrize("copy", ["Identity", "Dropout"])
@pytest.mark.parametrize("source", ["x", "h"])
@pytest.mark.parametrize("output", ["", ", float[2, 3] c", ", float[2, 3] h"])
def test_the_gradient_of_a_copy_is_what_its_own_readers_send(copy: str, source: str, output: str) -> None:
    """And not what those of its source do, or its source's name would."""
    model = text(
        f"""{HEADER} net (float[2, 3] x) => (float[2, 3] y{output}) {{
            h = Tanh(x) c = {copy}({source}) a = Exp(c) b = Sin({source}) y = Mul(a, b) }}"""
    )
    feed = {"x": X[0, 0, :2, :3], "y.cotangent": X[0, 1, :2, :3]}
    if output:
        feed[f"{output[-1]}.cotangent"] = X[0, 2, :2, :3]
    c = feed["x"] if source == "x" else np.tanh(feed["x"])
    expected = feed["y.cotangent"] * np.exp(c) * np.sin(c) + feed.get("c.cotangent", 0)
    (found,) = session(differentiate(model, wrt=["c"])).run(["c.grad"], feed)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_is_never_folded() -> None:
    model = text(
        f"""{HEADER} net (float[N, 3] x) => (float[N, 2] y) <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}> {{
            t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }}"""
    )
    loaded = canonical(model)
    assert [n.op_type for n in loaded.graph] == ["Transpose", "MatMul"]
    assert "w" in loaded.graph.initializers


def test_functions_are_inlined() -> None:
    model = text(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> net (float[N, 3] x) => (float[N, 3] y) {
            y = local.twice(x) }
        <domain: "local", opset_import: ["" : 17]> twice (a) => (b) { h = Relu(a)  b = Relu(h) }"""
    )
    assert [n.op_type for n in canonical(model).graph] == ["Relu", "Relu"]


def test_nodes_get_unique_names() -> None:
    model = text(f"{HEADER} net (float[N, 3] x) => (float[N, 3] y) {{ h = Relu(x)  y = Relu(h) }}")
    for node in model.graph.node:
        node.name = "same"
    names = [n.name for n in canonical(model).graph]
    assert names == ["same", "same#2"]


def test_dimensions_by_name_and_by_position() -> None:
    model = text(f"{HEADER} net (float[N, T, 4] x) => (float[N, T, 4] y) {{ y = Relu(x) }}")
    loaded = from_proto(model, "model", Path("."))
    said = canonicalize(loaded, Dims(batch=3, names={"T": 7}))
    assert dims(loaded.graph.inputs[0]) == (3, 7, 4)
    assert said == ("N = 3",)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"x": (2, 5)}, "dimensions"),
        ({"x": (2, 3, 5)}, "axis 2 must be 4"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    model = text(f"{HEADER} net (float[N, 3, 4] x) => (float[N, 3, 4] y) {{ y = Relu(x) }}")
    with pytest.raises(DataError, match=said):
        canonical(model, Dims(shapes=shapes))


def test_an_input_of_unknown_rank_needs_a_shape() -> None:
    model = text(f"{HEADER} net (float x) => (float[N, 4] y) {{ y = Relu(x) }}")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(DataError, match=r"input 'x' has no shape in the file: give one with --input-shape x:N,N"):
        canonical(model)
    assert dims(canonical(model, Dims(shapes={"x": (2, 4)})).graph.outputs[0]) == (2, 4)


def test_a_folding_bomb_is_left_alone() -> None:
    model = text(
        f"""{HEADER} bomb (float[N, 3] x) => (float[N, 3] y, float[k] z) {{
            n = Constant<value_ints = [4000000000]>()  one = Constant<value_float = 1.0>()
            z = Expand(one, n)  y = Relu(x) }}"""
    )
    assert "Expand" in [n.op_type for n in canonical(model).graph]


def test_sizes_are_found_that_hold_a_window() -> None:
    """A window longer than what it slides over gives nothing, and no error."""
    model = text(
        f"""{HEADER} net (float[N, 1, L] x) => (float[N, 1, M] y) {{
            a = AveragePool<kernel_shape = [400]>(x)  y = Relu(a) }}"""
    )
    assert dims(canonical(model, Dims(batch=2)).graph.outputs[0]) == (2, 1, 113)


def test_sizes_are_found_that_the_graph_accepts() -> None:
    model = text(
        f"""{HEADER} net (float[N, 3, H, W] x) => (float[N, 6] y) <int64[2] s = {{0, 6}}> {{
            a = AveragePool<kernel_shape = [64, 32], strides = [64, 32]>(x)  y = Reshape(a, s) }}"""
    )
    assert dims(canonical(model, Dims(batch=2)).graph.outputs[0]) == (2, 6)


def rewritten(text: str, **feeds: np.ndarray) -> ir.Graph:
    """The canonical graph of a model in ONNX text, once it has been seen to compute the same."""
    proto = onnx.parser.parse_model(text)
    loaded = canonical(proto, Dims(batch=2))
    for expected, got in zip(
        session(proto).run(None, feeds), session(ir.to_proto(loaded)).run(None, feeds), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    return loaded.graph


def test_equal_parts_of_a_split_are_counted() -> None:
    text = '<ir_version: 8, opset_import: ["": 13]> g (float[N, 6] x) => (float[N, 2] a, float[N, 2] b, float[N, 2] c)'
    graph = rewritten(f"{text} {{ a, b, c = Split<axis = 1>(x) }}", x=X.reshape(-1, 6)[:2])
    assert [dims(o) for o in graph.node(0).outputs] == [(2, 2)] * 3


@pytest.mark.parametrize("sides", ["p, q", "q, p"])
def test_a_selection_spelled_with_products_is_one(sides: str) -> None:
    graph = rewritten(
        f"""<ir_version: 8, opset_import: ["": 13]> g (bool[N, 1] m, float[N, 6] x, float[N, 6] z) => (float[N, 6] y)
        {{ no = Not(m) on = Cast<to = 1>(m) off = Cast<to = 1>(no)
           p = Mul(on, x) q = Mul(z, off) y = Add({sides}) }}""",
        m=np.array([[True], [False]]),
        x=X.reshape(-1, 6)[:2],
        z=X.reshape(-1, 6)[2:4],
    )
    assert [n.op_type for n in graph] == ["Where"]


@pytest.mark.parametrize(
    "shift", ["n = Neg(m) c = Mul(n, s) t = Add(c, beta)", "c = Mul(m, s) t = Sub(beta, c)"], ids=["neg", "sub"]
)
def test_a_normalisation_begins_with_what_it_subtracts(shift: str) -> None:
    """As Keras writes it: x s + (beta - mean s), where s = gamma / sqrt(var + eps)."""
    graph = rewritten(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[N, 6] x) => (float[N, 6] y)
        <float[6] gamma = {{1, 2, 1, 2, 1, 2}}, float[6] beta = {{0, 1, 0, 1, 0, 1}}, float[1] eps = {{0.001}}>
        {{ m = ReduceMean<axes = [1]>(x) d = Sub(x, m) dd = Mul(d, d) v = ReduceMean<axes = [1]>(dd) ve = Add(v, eps)
           root = Sqrt(ve) r = Reciprocal(root) s = Mul(r, gamma) xs = Mul(x, s) {shift} y = Add(xs, t) }}""",
        x=X.reshape(-1, 6)[:2],
    )
    assert [n.op_type for n in graph][-3:] == ["Mul", "Mul", "Add"]
    assert len(normalisations(graph)) == 1
