"""Attention as exporters spell it, estimated and differentiated: projections, logits, softmax, mixture, projection."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.estimate import context, estimate
from gradlint.load import from_proto
from gradlint.ops.attention_products import keys_seen, makes_logits, mixes, weighs
from gradlint.reverse import differentiate
from gradlint.testing import session

BATCH, WEIGHTS = 4, ("Wq", "Wk", "Wv", "Wo")


def attention(
    tokens: int, width: int, heads: int, std: float, head: str = "none", causal: bool = False
) -> onnx.ModelProto:
    """LayerNorm, one attention block and a head on it: none, the mean over tokens, or the first token."""
    rng, size = np.random.default_rng(0), width // heads
    constants = {
        "gamma": np.ones(width, np.float32), "split": np.array([0, 0, heads, size]), "merge": np.array([0, 0, width]),
        "one": np.array([1]), "zero": np.array([0]),
        "mask": np.where(np.tril(np.ones((tokens, tokens))), 0, -np.inf).astype(np.float32)[None, None],
    }  # fmt: skip
    for name in WEIGHTS:
        scale = std**0.5 * size**-0.25 if name in ("Wq", "Wk") else 1.0
        constants[name] = (scale * rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
    body = """
      h = LayerNormalization(x, gamma)
      q0 = MatMul(h, Wq)  q1 = Reshape(q0, split)  q = Transpose<perm = [0, 2, 1, 3]>(q1)
      k0 = MatMul(h, Wk)  k1 = Reshape(k0, split)  k = Transpose<perm = [0, 2, 3, 1]>(k1)
      v0 = MatMul(h, Wv)  v1 = Reshape(v0, split)  v = Transpose<perm = [0, 2, 1, 3]>(v1)
      s = MatMul(q, k)
    """
    body += "m = Add(s, mask)  p = Softmax(m)" if causal else "p = Softmax(s)"
    body += "o = MatMul(p, v)  o1 = Transpose<perm = [0, 2, 1, 3]>(o)  o2 = Reshape(o1, merge)  z = MatMul(o2, Wo)"
    body += {"none": "y = Identity(z)", "mean": "y = ReduceMean(z, one)", "first": "y = Slice(z, zero, one, one)"}[head]
    nodes = onnx.parser.parse_graph(f"g (float[B] x) => (float[B] y) {{ {body} }}").node
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (BATCH, tokens, width))
    used = {name for node in nodes for name in node.input}
    given = [numpy_helper.from_array(a, n) for n, a in constants.items() if n in used]
    graph = helper.make_graph(nodes, "attention", [x], [helper.make_empty_tensor_value_info("y")], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def measured(model: onnx.ModelProto, draws: int = 30) -> dict[str, float]:
    """Root mean square of each weight's gradient, and of o, over inputs and targets."""
    back = differentiate(model, wrt=WEIGHTS)
    back.graph.output.append(helper.make_empty_tensor_value_info("o"))
    names = [*(f"{w}.grad" for w in WEIGHTS), "o"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in back.graph.input}
    runner, rng = session(back), np.random.default_rng(1)
    squares = []
    for _ in range(draws):
        feed = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        feed["y.cotangent"] /= np.sqrt(BATCH)
        found = runner.run(names, {k: v.astype(np.float32) for k, v in feed.items()})
        squares.append([np.mean(np.square(g, dtype=np.float64)) for g in found])
    return dict(zip([*WEIGHTS, "o"], np.sqrt(np.mean(squares, axis=0)), strict=True))


@pytest.mark.parametrize("head", ["none", "mean", "first"])
@pytest.mark.parametrize(("tokens", "width", "std"), [(16, 48, 0.1), (48, 96, 1.0), (64, 48, 0.3), (32, 48, 2.0)])
def test_estimate_agrees_with_sampled_gradients(tokens: int, width: int, std: float, head: str) -> None:
    check(attention(tokens, width, 2, std, head), 0.17)


def test_estimate_of_causal_attention() -> None:
    check(attention(32, 48, 2, 0.5, causal=True), 0.25)


def check(model: onnx.ModelProto, tolerance: float) -> None:
    truth = measured(model)
    loaded = from_proto(model, "attention", Path("."))
    canonicalize(loaded, Dims())
    found = estimate(loaded.graph, batch=BATCH)
    values = {str(v.name): v for n in loaded.graph for v in [*n.inputs, *n.outputs] if v is not None}
    assert not found.unmodelled
    assert np.sqrt(np.mean(found.moments[values["o"]].second)) == pytest.approx(truth["o"], rel=tolerance)
    for name in WEIGHTS:
        assert found.grad_rms(values[name]) == pytest.approx(truth[name], rel=tolerance), name


def test_gradients_agree_with_finite_differences() -> None:
    model = attention(5, 8, 2, 1.0)
    rng = np.random.default_rng(2)
    x, t = rng.standard_normal((2, BATCH, 5, 8)).astype(np.float32)
    grads = session(differentiate(model, wrt=["x", *WEIGHTS])).run(None, {"x": x, "y.cotangent": t})[1:]
    forward = session(model)
    direction = rng.standard_normal(x.shape).astype(np.float32)
    up, down = (forward.run(None, {"x": x + h * direction})[0].astype(np.float64) for h in (1e-2, -1e-2))
    slope = float(np.sum((up - down) * t)) / 2e-2
    assert float(np.sum(grads[0] * direction)) == pytest.approx(slope, rel=1e-2)


def test_the_parts_are_recognised() -> None:
    loaded = from_proto(attention(4, 8, 2, 1.0, causal=True), "attention", Path("."))
    canonicalize(loaded, Dims())
    by_output = {str(n.outputs[0].name): n for n in loaded.graph}
    assert makes_logits(by_output["s"])
    assert weighs(by_output["p"])
    assert mixes(by_output["o"])
    assert not makes_logits(by_output["o"])
    assert not mixes(by_output["k0"])


def test_masks_tell_how_many_keys_a_query_sees() -> None:
    loaded = from_proto(attention(4, 8, 2, 1.0, causal=True), "attention", Path("."))
    canonicalize(loaded, Dims())
    softmax = next(n for n in loaded.graph if n.op_type == "Softmax")
    seen = keys_seen(context(loaded.graph, batch=BATCH, mode="eval"), softmax)
    assert seen is not None
    assert seen.tolist() == [1, 2, 3, 4]
