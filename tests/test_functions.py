"""Functions of a model's own: written out in the opset they were written for, however they call each other."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import inliner

from gradlint.exceptions import ModelError
from gradlint.reverse import differentiate
from gradlint.testing import session

MODEL = """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
    g (float[2, 3] x) => (float[2, 3] y) <float[3] w = {1, -2, 3}> {
        h = own.outer <slope = 0.3> (x, w) y = own.inner(h, w) }
    <domain: "own", opset_import: ["" : 18, "own" : 1]>
    outer <slope> (a, b) => (c) { t = LeakyRelu <alpha: float = @slope> (a) c = own.inner(t, b) }
    <domain: "own", opset_import: ["" : OPSET]> inner (a, b) => (c) { s = Mul(a, b) BODY }
"""
X = np.array([[0.5, -1.0, 2.0], [-0.3, 0.7, 0.1]], np.float32)


def model(opset: int, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(MODEL.replace("OPSET", str(opset)).replace("BODY", body))


def test_nested_functions_with_attributes_by_reference() -> None:
    own = model(18, "c = Tanh(s)")
    plain = inliner.inline_local_functions(own)
    names, feed = ["x.grad", "w.grad"], {"x": X, "y.cotangent": X}
    found, expected = (session(differentiate(m)).run(names, feed) for m in (own, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("opset", "old", "new"),
    [
        (
            11,
            "c = Softmax <axis = 0> (s)",
            "r = Constant <value_ints = [1, -1]> () f = Reshape(s, r) n = Softmax(f) p = Shape(s) c = Reshape(n, p)",
        ),
        (
            13,
            "m = ReduceMax <axes = [1], keepdims = 1> (s) c = Sub(s, m)",
            "k = Constant <value_ints = [1]> () m = ReduceMax <keepdims = 1> (s, k) c = Sub(s, m)",
        ),
    ],
)
def test_a_function_keeps_its_opset(opset: int, old: str, new: str) -> None:
    """Opset 11 flattens before it normalises; opset 13 has axes as an attribute, 18 as an input."""
    names, feed = ["y", "x.grad", "w.grad"], {"x": X, "y.cotangent": X}
    found, expected = (
        session(differentiate(model(version, body))).run(names, feed) for version, body in ((opset, old), (18, new))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_functions_that_call_each_other_in_a_circle() -> None:
    with pytest.raises(ModelError, match=r"call each other in a circle \(among own:inner, own:outer\)"):
        differentiate(model(18, "c = own.outer <slope = 0.1> (s, b)"))


def test_functions_that_double_with_every_level() -> None:
    header = '<domain: "own", opset_import: ["" : 18, "own" : 1]>'
    levels = [f"{header} f{k + 1} (a) => (c) {{ b = own.f{k}(a) c = own.f{k}(b) }}" for k in range(40)]
    text = f"""<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) {{ y = own.f40(x) }} {header} f0 (a) => (c) {{ c = Tanh(a) }}"""
    with pytest.raises(ModelError, match=r"the functions become \d+ nodes"):
        differentiate(onnx.parser.parse_model("\n".join([text, *levels])))
