"""Resize: every mode, transformation and rounding."""

import numpy as np
import onnx
import pytest

from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op, session

X = Activation((2, 3, 6, 5), mean=0.5)
NONE = np.array([], np.float32)


def scales(*factors: float) -> np.ndarray:
    return np.array(factors, np.float32)


def sizes(*counts: int) -> np.ndarray:
    return np.array(counts, np.int64)


@pytest.mark.parametrize("factors", [(1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 0.5, 0.6), (1, 1, 1.5, 2.6)])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_by_scales(factors: tuple[float, ...], mode: str) -> None:
    check_op("Resize", X, None, scales(*factors), wrt=(0,), mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "transformation",
    ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"],
)
@pytest.mark.parametrize("size", [(2, 3, 9, 13), (2, 3, 4, 3)])
def test_resize_to_sizes(mode: str, transformation: str, size: tuple[int, ...]) -> None:
    given = sizes(*size)
    check_op("Resize", X, None, None, given, wrt=(0,), mode=mode, coordinate_transformation_mode=transformation)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_nearest_rounds(rounding: str, factor: float) -> None:
    given = scales(1, 1, factor, factor)
    check_op("Resize", X, NONE, given, wrt=(0,), coordinate_transformation_mode="asymmetric", nearest_mode=rounding)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(3, 3), (9, 2)])
@pytest.mark.parametrize("exclude", [0, 1])
def test_antialias(mode: str, size: tuple[int, ...], exclude: int) -> None:
    check_op("Resize", X, None, None, sizes(2, 3, *size), wrt=(0,), mode=mode, antialias=1, exclude_outside=exclude)


def test_cubic_with_its_own_coefficient() -> None:
    given = scales(1, 1, 1.5, 0.8)
    check_op("Resize", X, None, given, wrt=(0,), mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_axes_and_aspect_ratio(policy: str) -> None:
    given = sizes(9, 12)
    check_op("Resize", X, None, None, given, wrt=(0,), mode="linear", axes=[2, 3], keep_aspect_ratio_policy=policy)


def test_crop_and_resize() -> None:
    roi = np.array([0, 0, 0.2, -0.3, 1, 1, 0.9, 1.2], np.float32)
    mode = "tf_crop_and_resize"
    check_op("Resize", X, roi, None, sizes(2, 3, 7, 8), wrt=(0,), mode="linear", coordinate_transformation_mode=mode)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 2, 3, 4, 5)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    given = scales(1, 1, *(2.0 for _ in shape[2:]))
    for mode in ("nearest", "linear"):
        check_op("Resize", Activation(shape), None, given, wrt=(0,), mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_symbolic_sizes(mode: str, by: str) -> None:
    """The same gradient whether sizes are static or only known when it runs."""
    given = scales(1, 1, 1.5, 2) if by == "scales" else sizes(2, 3, 9, 10)
    weights = [onnx.numpy_helper.from_array(given, by)]
    names = ["x", "", by] if by == "scales" else ["x", "", "", by]
    node = onnx.helper.make_node("Resize", names, ["y"], mode=mode)
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((2, 3, 6, 5)), "y.cotangent": rng.standard_normal((2, 3, 9, 10))}
    found = []
    for shape in ([2, 3, 6, 5], ["n", "c", "h", "w"]):
        x = onnx.helper.make_tensor_value_info("x", 1, shape)
        y = onnx.helper.make_tensor_value_info("y", 1, [None] * 4)
        graph = onnx.helper.make_graph([node], "resize", [x], [y], weights)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        back = session(differentiate(model, wrt=["x"]))
        found.append(back.run(["x.grad"], {k: v.astype(np.float32) for k, v in feed.items()})[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
