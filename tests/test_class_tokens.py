"""Groups of positions: a class token among patches is estimated apart from them, at the cost of one token more."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import Estimate, estimate
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.runs import Runs
from gradlint.testing import session

BATCH, PATCHES, WIDTH = 4, 36, 48

VISION_TRANSFORMER = """
  e = MatMul(x, We)  t = Expand(token, copies)  c = Concat<axis = 1>(t, e)  z0 = Add(c, positions)
  h = LayerNormalization(z0, gamma)
  q0 = MatMul(h, Wq)  q1 = Reshape(q0, split)  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(h, Wk)  k1 = Reshape(k0, split)  k = Transpose<perm = [0, 2, 3, 1]>(k1)
  v0 = MatMul(h, Wv)  v1 = Reshape(v0, split)  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)
  o1 = Transpose<perm = [0, 2, 1, 3]>(o)  o2 = Reshape(o1, merge)  a = MatMul(o2, Wo)
  z1 = Add(z0, a)  h2 = LayerNormalization(z1, gamma2)  m0 = MatMul(h2, W1)  m1 = Add(m0, b1)  m2 = Gelu(m1)
  m3 = MatMul(m2, W2)  z2 = Add(z1, m3)  y0 = LayerNormalization(z2, gamma3)
"""
CLASS_ONLY = "y = Slice(y0, zero, one, one)"
ALL_TOKENS = "y = Identity(y0)"
CROSS_COVARIANCE = """
  h = LayerNormalization(x, gamma)
  q0 = MatMul(h, Wq)  q = Transpose<perm = [0, 2, 1]>(q0)
  k = MatMul(h, Wk)
  v0 = MatMul(h, Wv)  v = Transpose<perm = [0, 2, 1]>(v0)
  s0 = MatMul(q, k)  s = Mul(s0, scale)  p = Softmax(s)  o = MatMul(p, v)
  o1 = Transpose<perm = [0, 2, 1]>(o)  y = MatMul(o1, Wo)
"""


def built(body: str) -> tuple[onnx.ModelProto, list[str]]:
    """A model of patches, and the names of its weights."""
    rng, width = np.random.default_rng(0), WIDTH
    weights = {
        name: rng.standard_normal((width, width)) / width**0.5 for name in ("We", "Wq", "Wk", "Wv", "Wo", "W1", "W2")
    }
    weights |= {
        "token": 0.2 * rng.standard_normal((1, 1, width)), "b1": 0.1 * rng.standard_normal(width),
        "positions": 0.1 * rng.standard_normal((1, PATCHES + 1, width)),
        **{name: 0.5 + rng.random(width) for name in ("gamma", "gamma2", "gamma3")},
    }  # fmt: skip
    constants = {
        "split": np.array([0, 0, 2, width // 2]), "merge": np.array([0, 0, width]),
        "copies": np.array([BATCH, 1, width]), "one": np.array([1]), "zero": np.array([0]),
        "scale": np.float32(1 / PATCHES),
    }  # fmt: skip
    nodes = onnx.parser.parse_graph(f"g (float[B] x) => (float[B] y) {{ {body} }}").node
    used = {name for node in nodes for name in node.input}
    given = {**constants, **{name: array.astype(np.float32) for name, array in weights.items()}}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (BATCH, PATCHES, width))
    tensors = [numpy_helper.from_array(array, name) for name, array in given.items() if name in used]
    graph = helper.make_graph(nodes, "patches", [x], [helper.make_empty_tensor_value_info("y")], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True), [n for n in weights if n in used]


def sampled(model: onnx.ModelProto, weights: list[str], draws: int = 40) -> dict[str, float]:
    """Root mean square of each weight's gradient over inputs and targets."""
    back = differentiate(model, wrt=weights)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in back.graph.input}
    runner, rng, squares = session(back), np.random.default_rng(1), []
    for _ in range(draws):
        feed = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        feed["y.cotangent"] /= np.sqrt(BATCH)
        found = runner.run([f"{w}.grad" for w in weights], {k: v.astype(np.float32) for k, v in feed.items()})
        squares.append([np.mean(np.square(g, dtype=np.float64)) for g in found])
    return dict(zip(weights, np.sqrt(np.mean(squares, axis=0)), strict=True))


def estimated(model: onnx.ModelProto) -> tuple[Estimate, dict[str, object]]:
    loaded = from_proto(model, "patches", Path("."))
    canonicalize(loaded, Dims())
    values = {str(v.name): v for n in loaded.graph for v in [*n.inputs, *n.outputs] if v is not None}
    return estimate(loaded.graph, batch=BATCH), values


@pytest.mark.parametrize(
    ("body", "tolerance"),
    [(VISION_TRANSFORMER + CLASS_ONLY, 0.25), (VISION_TRANSFORMER + ALL_TOKENS, 0.25), (CROSS_COVARIANCE, 0.35)],
    ids=["class token read", "all tokens read", "cross-covariance attention"],
)
def test_estimate_agrees_with_sampled_gradients(body: str, tolerance: float) -> None:
    model, weights = built(body)
    truth, (found, values) = sampled(model, weights), estimated(model)
    ratios = {w: found.grad_rms(values[w]) / truth[w] for w in weights}
    assert not found.unmodelled
    assert ratios == pytest.approx(dict.fromkeys(weights, 1.0), rel=tolerance)


def test_the_class_token_keeps_its_own_moments() -> None:
    model, _ = built(VISION_TRANSFORMER + CLASS_ONLY)
    found, values = estimated(model)
    joined = found.moments[values["c"]]
    second = np.asarray(joined.second).mean(axis=-1).ravel()
    assert len(second) == PATCHES + 1
    assert second[0] == pytest.approx(0.04, rel=0.5)
    np.testing.assert_allclose(second[1:], 1.0, rtol=0.1)


def test_patches_are_one_entry_all_the_way() -> None:
    model, _ = built(VISION_TRANSFORMER + CLASS_ONLY)
    found, values = estimated(model)
    for name in ("z0", "h", "q", "k", "v", "o", "z1", "m2", "z2"):
        moments, gradient = found.moments[values[name]], found.gradients[values[name]]
        for array in (moments.mean, moments.local, gradient.local):
            assert not isinstance(array, np.ndarray) or PATCHES + 1 not in array.shape, name
    assert isinstance(found.moments[values["p"]].mean, Runs)
