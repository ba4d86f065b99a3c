"""Operators without rows of their own are written out by the standard's function bodies."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.load import from_proto
from gradlint.testing import session


def test_a_written_out_model_computes_the_same() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[2, 5, 8] x) => (float[2, 5, 8] y) {
      a = Relu(x)
      b = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(a, x, a)
      y = Add(b, a)
    }
    """
    model = onnx.parser.parse_model(text)
    written = from_proto(onnx.parser.parse_model(text), "g", Path("."))
    canonicalize(written, Dims())
    assert all(n.op_type != "Attention" for n in written.graph)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(session(ir.to_proto(written)).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_a_fused_product_becomes_what_it_fuses() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    g (float[2, 5, 8] x, float[2, 6, 8] z) => (float[2, 5, 6] y) {
      y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, z)
    }
    """
    loaded = from_proto(onnx.parser.parse_model(text), "g", Path("."))
    canonicalize(loaded, Dims())
    assert [n.op_type for n in loaded.graph] == ["Transpose", "MatMul", "Mul"]
    assert loaded.graph.outputs[0].name == "y"
