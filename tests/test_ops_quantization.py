"""Quantised operators block the gradient and say so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from gradlint import check
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Moments, Range
from gradlint.estimate import estimate, prove
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import Activation, check_op
from gradlint.transfer import BLOCKED

SCALE, ZERO = np.array(0.05, np.float32), np.array(3, np.int8)


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger"])
def test_declared_to_have_no_gradient(op: str) -> None:
    assert op in BLOCKED


def test_quantize() -> None:
    check_op("QuantizeLinear", Activation((4, 8)), SCALE, ZERO, moments=None, pullback=None, vjp=False, wrt=())


def test_dynamic_quantize() -> None:
    check_op("DynamicQuantizeLinear", Activation((4, 8)), outputs=3, moments=None, pullback=None, vjp=False, wrt=())


PAIR = """
<ir_version: 10, opset_import: ["": 21]>
pair (float[8, 4] x) => (float[8, 4] y)
<float[4] scale = {0.02, 0.02, 0.03, 0.02}, uint8[4] zero = {128, 128, 100, 0}> {
  q = QuantizeLinear<axis: int = 1>(x, scale, zero)
  y = DequantizeLinear<axis: int = 1>(q, scale, zero)
}
"""


def test_what_is_dequantised_lies_within_the_levels_of_its_channel() -> None:
    model = from_proto(onnx.parser.parse_model(PAIR), "pair", Path("."))
    canonicalize(model, Dims())
    y = model.graph.outputs[0]
    box = prove(model.graph, {"x": Range(np.full((1, 1), -6.0), np.full((1, 1), 6.0))}, batch=8, mode="eval").ranges[y]
    np.testing.assert_allclose(box.lo, [[-2.56, -2.56, -3.0, 0.0]], rtol=1e-3)
    np.testing.assert_allclose(box.hi, [[2.54, 2.54, 4.65, 5.1]], rtol=1e-3)
    found = estimate(model.graph, batch=8, inputs={"x": Moments.normal(2)})
    assert not found.unmodelled
    assert 0.5 < np.sqrt(found.moments[y].local[0, 0]) < 1.0


@pytest.mark.parametrize(
    ("scale", "zero", "attributes"),
    [
        (np.array(0.1), None, {}),
        (np.array(0.1), np.array(3, np.int8), {}),
        (np.linspace(0.1, 0.5, 5), np.arange(5, dtype=np.int8), {"axis": 1}),
        (np.linspace(0.1, 0.5, 4), None, {"axis": -3}),
        (np.linspace(0.1, 0.9, 4 * 3 * 6).reshape(4, 3, 6), None, {"axis": 1, "block_size": 2}),
    ],
)
def test_scale(scale: np.ndarray, zero: np.ndarray | None, attributes: dict[str, int]) -> None:
    x = np.random.default_rng(0).integers(-128, 127, (4, 5, 6)).astype(np.int8)
    check_op(
        "DequantizeLinear", x, scale.astype(np.float32), zero, moments=None, pullback=None, proof=False, **attributes
    )


def test_no_gradient_is_invented_before_a_quantiser() -> None:
    back = differentiate(onnx.parser.parse_model(PAIR), wrt=["x"])
    assert "x.grad" not in {o.name for o in back.graph.output}


QUANTISED = """
<ir_version: 10, opset_import: ["" : 21]>
quantised (float[N, 4] x) => (float[N, 2] y)
<float s = {0.05}, int8 z = {0}, int8[4, 2] stored = {9, -9, 8, 7, -8, 9, -7, 8},
 float[4, 4] first = {0.5, -0.5, 0.4, 0.5, 0.5, 0.3, -0.5, 0.5, -0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5, -0.2}>
{
  a = MatMul(x, first)
  q = QuantizeLinear(a, s, z)
  d = DequantizeLinear(q, s, z)
  head = DequantizeLinear(stored, s, z)
  y = MatMul(d, head)
}
"""


def test_what_lies_before_a_quantiser_has_no_gradient_and_the_model_is_not_judged() -> None:
    proto = onnx.parser.parse_model(QUANTISED)
    listed = {p.key: p.value for p in differentiate(proto).metadata_props}["gradlint.cut"]
    assert json.loads(listed) == {"names": ["x", "first"], "operators": ["QuantizeLinear"]}
    report = check(proto)
    assert report.summary.risk is None
    assert "3 quantised operators" in next(f.message for f in report.findings if f.code == "GL602")
    (weight,) = report.weights
    assert (weight.name, weight.estimated, weight.measured) == ("first", {}, {})
