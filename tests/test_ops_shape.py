"""Operators that rearrange, retype or repeat elements."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

RNG = np.random.default_rng(2)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_identity_and_dropout() -> None:
    check_op("Identity", Activation((8, 6), mean=0.5))
    check_op("Dropout", Activation((8, 6), mean=0.5))


def test_cast_between_floats() -> None:
    check_op("Cast", Activation((8, 6)), to=onnx.TensorProto.FLOAT, vjp=False)
    check_op("CastLike", Activation((8, 6)), normal(1), wrt=(0,))


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ((8, 4, 6), (8, 24)),
        ((8, 24), (8, 4, 6)),
        ((8, 5, 6), (40, 6)),
        ((40, 6), (8, 5, 6)),
        ((8, 12, 3), (-1, 4, 3, 0 + 3)),
        ((8, 4, 6, 6), (8, 4, 3, 2, 3, 2)),
        ((8, 3, 2), (2, 24)),
        ((8, 1, 5), (8, 5, 1, 1)),
    ],
)
def test_reshape(src: tuple[int, ...], dst: tuple[int, ...]) -> None:
    check_op("Reshape", Activation(src, mean=0.5), ints(*dst))


def test_reshape_copies_sizes_and_keeps_empty_ones() -> None:
    check_op("Reshape", Activation((8, 4, 6), mean=0.5), ints(0, -1))
    check_op("Reshape", Activation((8, 0, 6)), ints(8, 6, 0), allowzero=1, moments=None, pullback=None)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_flatten(axis: int) -> None:
    check_op("Flatten", Activation((8, 3, 4), mean=0.5), axis=axis)


def test_squeeze_and_unsqueeze() -> None:
    check_op("Squeeze", Activation((8, 1, 4, 1), mean=0.5), ints(1, -1))
    check_op("Squeeze", Activation((8, 1, 4, 1), mean=0.5))
    check_op("Unsqueeze", Activation((8, 4), mean=0.5), ints(0, -1))


@pytest.mark.parametrize("perm", [[0, 2, 1, 3], [3, 1, 0, 2], None])
def test_transpose(perm: list[int] | None) -> None:
    check_op("Transpose", Activation((8, 2, 3, 4), mean=0.5), **({} if perm is None else {"perm": perm}))


def test_expand() -> None:
    check_op("Expand", Activation((8, 1, 4), mean=0.5), ints(8, 5, 4))
    check_op("Expand", Activation((8, 1), mean=0.5), ints(8, 6))
    check_op("Expand", Activation((8, 4), mean=0.5), ints(3, 1, 1))


@pytest.mark.parametrize("repeats", [(1, 3, 2), (1, 1, 4), (2, 1, 1)])
def test_tile(repeats: tuple[int, ...]) -> None:
    check_op("Tile", Activation((8, 2, 3), mean=0.5), ints(*repeats))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    check_op("DepthToSpace", Activation((4, 12, 3, 2), mean=0.5), blocksize=2, mode=mode)


def test_space_to_depth() -> None:
    check_op("SpaceToDepth", Activation((4, 3, 4, 6), mean=0.5), blocksize=2)


def test_space_to_depth_with_the_channels_outside() -> None:
    check_op(
        "SpaceToDepth", Activation((4, 3, 4, 6), mean=0.5), moments=None, pullback=None, proof=False,
        opset=28, blocksize=2, mode="CRD",
    )  # fmt: skip


# -- cutting, joining, padding -----------------------------------------------------------------------------------------


def test_concat() -> None:
    check_op("Concat", Activation((8, 3), mean=0.5), Activation((8, 4), mean=-1, std=2), axis=1)
    check_op("Concat", Activation((8, 3, 5), mean=0.5), Activation((8, 3, 4)), normal(8, 3, 1), axis=-1)
    check_op("Concat", Activation((8, 3)), axis=1)


def test_concat_with_one_part_wanted() -> None:
    check_op("Concat", Activation((8, 3)), Activation((8, 4)), Activation((8, 2)), axis=1, wrt=(1,))


@pytest.mark.parametrize(("settings", "attributes"), [((ints(2, 3, 1),), {}), ((), {"num_outputs": 3})])
def test_split(settings: tuple[np.ndarray, ...], attributes: dict[str, int]) -> None:
    check_op("Split", Activation((8, 6), mean=0.5), *settings, outputs=3, axis=1, **attributes)


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ((1,), (4,), (1,), None),
        ((0, 1), (8, -1), (0, -1), None),
        ((1, 0), (1 << 40, 6), (1, 2), (2, 3)),
        ((-1,), (-(1 << 40),), (1,), (-1,)),
        ((-1, 4), (-(1 << 40), 0), (1, 2), (-2, -3)),
        ((5,), (1,), (2,), (-1,)),
        ((2,), (3,), (1,), None),
    ],
)
def test_slice(starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    extra = () if steps is None else (ints(*steps),)
    check_op("Slice", Activation((8, 5, 7), mean=0.5), ints(*starts), ints(*ends), ints(*axes), *extra)


def test_slice_of_nothing() -> None:
    """The backward pass is all zeros, of the input's shape."""
    nothing = [ints(2, -1), ints(-1, -6), ints(1, 2), ints(-2, 1)]
    check_op("Slice", Activation((8, 2, 4)), *nothing, moments=None, pullback=None, proof=False)


def test_slice_of_leading_axes() -> None:
    check_op("Slice", Activation((8, 5, 7), mean=0.5), ints(0, 1), ints(8, 3))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(0, 2, 1, 0, 0, 3), (0, 0, 1, 0, 4, 0)])
def test_pad(mode: str, pads: tuple[int, ...]) -> None:
    check_op("Pad", Activation((8, 5, 6), mean=0.5), ints(*pads), mode=mode)


def test_pad_with_a_value_on_chosen_axes() -> None:
    check_op("Pad", Activation((8, 5, 6), mean=0.5), ints(2, 1), np.float32(1.5).reshape(()), ints(-1), wrt=(0,))


def test_pad_by_a_value_that_is_differentiated() -> None:
    value = np.array(1.5, np.float32)
    check_op("Pad", Activation((8, 5, 6)), ints(2, 1), value, ints(-1), pullback=None)


@pytest.mark.parametrize("axes", [[1, 2], [-1], None])
def test_center_crop_pad(axes: list[int] | None) -> None:
    target = {2: (8, 2), 1: (3,)}.get(len(axes) if axes else 0, (8, 8, 3))
    check_op(
        "CenterCropPad", Activation((8, 5, 6), mean=0.5), ints(*target), **({} if axes is None else {"axes": axes})
    )


@pytest.mark.parametrize("upper", [0, 1])
def test_trilu(upper: int) -> None:
    check_op("Trilu", Activation((8, 5, 6), mean=0.5), upper=upper)
    check_op("Trilu", Activation((8, 5, 6), mean=0.5), np.array(-1, np.int64), upper=upper)


def test_reverse_sequence() -> None:
    check_op(
        "ReverseSequence", Activation((8, 5, 2), mean=0.5), ints(5, 1, 3, 2, 5, 4, 2, 1), batch_axis=0, time_axis=1
    )


@pytest.mark.parametrize("attributes", [{}, {"strides": [2, 2]}, {"pads": [1, 1, 1, 1], "dilations": [1, 2]}])
def test_col2im(attributes: dict[str, list[int]]) -> None:
    size = {"strides": 9, "pads": 42}.get(next(iter(attributes), ""), 25)
    check_op(
        "Col2Im", Activation((4, 8, size), mean=0.2), ints(6, 6), ints(2, 2), moments=0.2, pullback=0.2, **attributes
    )


# -- fewer passes ------------------------------------------------------------------------------------------------------


def backward_ops(body: str, wrt: list[str], weights: str = "") -> list[str]:
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[4,6] x) => (float[4,6] y) {weights} {{ {body} }}'
    return [
        n.op_type for n in differentiate(parser.parse_model(text), wrt=wrt).graph.node if n.name.startswith("grad/")
    ]


def test_a_transposed_weight_is_read_and_differentiated_without_a_transpose() -> None:
    weight = f"<float[6,6] w = {{{','.join(map(str, range(36)))}}}>"
    ops = backward_ops("t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t)", ["x", "w"], weight)
    assert ops == ["Gemm", "Gemm"]


def test_transposes_that_cancel_are_left_out() -> None:
    body = "a = Relu(x) t = Transpose<perm=[1, 0]>(a) s = Sigmoid(t) u = Transpose<perm=[1, 0]>(s) y = Identity(u)"
    assert backward_ops(body, ["x"]).count("Transpose") == 2


def test_neighbouring_slices_are_put_back_side_by_side() -> None:
    body = """zero = Constant<value_ints=[0]>() two = Constant<value_ints=[2]>() six = Constant<value_ints=[6]>()
    axis = Constant<value_ints=[1]>() a = Slice(x, zero, two, axis) b = Slice(x, two, six, axis)
    c = Sigmoid(a) d = Tanh(b) y = Concat<axis=1>(c, d)"""
    ops = backward_ops(body, ["x"])
    assert "Pad" not in ops
    assert "Add" not in ops
    assert "Concat" in ops


def test_a_case_without_a_derivative_is_listed_as_a_cut() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[4,6] x, int64[1] step) => (float[4,N] y) {
    zero = Constant<value_ints=[0]>() six = Constant<value_ints=[6]>() axis = Constant<value_ints=[1]>()
    y = Slice(x, zero, six, axis, step) }"""
    back = differentiate(parser.parse_model(text), wrt=["x"])
    assert [o.name for o in back.graph.output] == ["y"]
    assert "Slice" in {p.key: p.value for p in back.metadata_props}["gradlint.cut"]


# -- symbolic sizes ----------------------------------------------------------------------------------------------------


def gradients(text: str, sizes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx of a model with symbolic sizes, beside finite differences of <t, y> along one direction."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    rng = np.random.default_rng(seed)
    x, d = rng.standard_normal((2, *sizes)).astype(np.float32)
    y = session(model).run(None, {"x": x})[0]
    t = rng.standard_normal(y.shape).astype(np.float32)
    back = differentiate(model, wrt=["x"])
    onnx.checker.check_model(back)
    grad = session(back).run(["x.grad"], {"x": x, "y.cotangent": t})[0]
    run = session(model)
    ahead, behind = (run.run(None, {"x": x + k * 0.5 * d})[0].astype(np.float64) for k in (1, -1))
    return grad, np.sum((ahead - behind) * t), np.sum(grad.astype(np.float64) * d)


@pytest.mark.parametrize(
    "body",
    [
        "h = Cast<to=11>(x) y = Cast<to=1>(h)",
        "shape = Constant<value_ints=[0, -1]>() y = Reshape(x, shape)",
        "y = Flatten<axis=2>(x)",
        "a = Constant<value_ints=[1]>() u = Unsqueeze(x, a) y = Squeeze(u, a)",
        "y = Transpose<perm=[2, 0, 1]>(x)",
        "one = Constant<value_ints=[2, 1, 1, 1]>() y = Expand(x, one)",
        "m = ReduceMean<keepdims=1>(x) s = Shape(x) y = Expand(m, s)",
        "y = Concat<axis=-1>(x, x, x)",
        "y = Concat<axis=1>(x, x)",
        "a = Constant<value_ints=[1]>() e = Constant<value_ints=[-1]>() y = Slice(x, a, e, a)",
        "a = Constant<value_ints=[-3]>() e = Constant<value_ints=[9999]>() k = Constant<value_ints=[-2]>()"
        " y = Slice(x, a, e, k)",
        "a = Constant<value_ints=[-1]>() e = Constant<value_ints=[-9999]>() k = Constant<value_ints=[1]>()"
        " s = Constant<value_ints=[-2]>() y = Slice(x, a, e, k, s)",
        "i = Constant<value_int=-1>() y = Gather<axis=1>(x, i)",
        "i = Constant<value_ints=[0, 2, 0, -1]>() y = Gather<axis=1>(x, i)",
        "i = Constant<value_ints=[0, 1]>() y = Gather<axis=0>(x, i)",
        "r = Constant<value_ints=[1, 2, 3]>() y = Tile(x, r)",
        "y, z = Split<axis=2, num_outputs=2>(x)",
        "p = Constant<value_ints=[0, 1, 2, 0, 1, 0]>() y = Pad(x, p)",
        "p = Constant<value_ints=[0, -1, 2, 0, 1, -2]>() y = Pad(x, p)",
        "p = Constant<value_ints=[0, 1, 2, 0, 1, 0]>() y = Pad<mode=\"reflect\">(x, p)",
    ],
)  # fmt: skip
def test_symbolic_sizes(body: str) -> None:
    grad, numeric, exact = gradients(f"g (float[N, T, D] x) => (float y) {{ {body} }}", (3, 4, 6))
    assert grad.shape == (3, 4, 6)
    assert numeric == pytest.approx(exact, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "body", ["a = Constant<value_ints=[1, 2]>() y = ReduceMean<keepdims=0>(x, a)", "y = GlobalAveragePool(x)"]
)
def test_a_batch_without_examples(body: str) -> None:
    """Of no example the gradient is empty."""
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    model = parser.parse_model(f"{header} g (float[N, T, D] x) => (float y) {{ {body} }}")
    back = differentiate(model, wrt=["x"])
    x = np.zeros((0, 4, 6), np.float32)
    y = session(model).run(None, {"x": x})[0]
    assert session(back).run(["x.grad"], {"x": x, "y.cotangent": y})[0].shape == (0, 4, 6)
