"""A signal that explodes stays describable: no warning, nothing that is not a number."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import estimate
from gradlint.load import from_proto

OPERATORS = [
    "Relu(a)", "Sigmoid(a)", "Tanh(a)", "Exp(a)", "Gelu(a)", "Sinh(a)", "Log(a)", "Reciprocal(a)", "Softmax(a)",
    "LogSoftmax(a)", "Mul(a, a)", "Div(a, a)", "Sub(a, a)", "Max(a, x)", "MatMul(a, w)", "LayerNormalization(a, v)",
    "RMSNormalization(a, v)", "BatchNormalization(a, v, v, v, v)", "InstanceNormalization(r, v, v)",
    "LpNormalization(a)", "ReduceL2(a)", "ReduceLogSumExp(a)", "ReduceProd(a)", "GlobalAveragePool(r)",
    "LRN<size=3>(r)",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("scale", ["1e30", "-1e30", "1e-30"])
@pytest.mark.parametrize("call", OPERATORS)
def test_no_estimate_is_nan(call: str, scale: str, mode: str) -> None:
    up = "\n".join(f"a{k + 1} = Mul(a{k}, s)" for k in range(8))
    down = "\n".join(f"y{k + 1} = Mul(y{k}, s)" for k in range(8))
    text = f"""
        <ir_version: 10, opset_import: ["": 23]>
        g (float[4, 3] x) => (float[d0, d1] y)
        <float s = {{{scale}}}, float[3] v = {{1, 1, 1}}, float[3, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}},
         int64[3] shape = {{4, 3, 1}}>
        {{
            a0 = Identity(x)
            {up}
            a = Identity(a8)
            r = Reshape(a, shape)
            y0 = {call}
            {down}
            y = Identity(y8)
        }}
    """
    text = text.replace("float[d0, d1] y", "float[d0, d1, 1] y") if "(r" in call else text
    model = from_proto(onnx.parser.parse_model(text), "model", Path("."))
    canonicalize(model, Dims())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate(model.graph, batch=4, mode=mode)
    assert found.moments
    for x in found.moments.values():
        assert all(np.isfinite(a).all() for a in (x.mean, x.fixed, x.shared, x.local))
    assert found.gradients
    assert all(np.isfinite(g.total).all() for g in found.gradients.values())
