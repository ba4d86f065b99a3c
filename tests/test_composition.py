"""Functions of one value that several operators compute: moments and gradient of the whole."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Moments
from gradlint.estimate import estimate
from gradlint.load import from_proto
from gradlint.reverse import differentiate
from gradlint.testing import session

COMPOSED = {
    "silu": "s = Sigmoid(x) y = Mul(x, s)",
    "square": "y = Mul(x, x)",
    "cube": "q = Mul(x, x) y = Mul(q, x)",
    "twice": "y = Add(x, x)",
    "gelu": """a = Div(x, root) e = Erf(a) p = Add(e, one) h = Mul(x, p) y = Mul(h, half)""",
    "gelu_half_first": """a = Div(x, root) e = Erf(a) p = Add(e, one) h = Mul(x, half) y = Mul(h, p)""",
    "gelu_tanh": """q = Pow(x, three) r = Mul(q, small) t = Add(x, r) u = Mul(t, scale) v = Tanh(u) w = Add(v, one)
                    h = Mul(x, half) y = Mul(h, w)""",
    "mish": "p = Softplus(x) t = Tanh(p) y = Mul(x, t)",
    "hard_swish": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "softsign": "a = Abs(x) d = Add(a, one) y = Div(x, d)",
    "leaky": "c = Greater(x, zero) m = Mul(x, small) y = Where(c, x, m)",
    "leaky_by_max": "m = Mul(x, small) y = Max(x, m)",
    "residual": "t = Tanh(x) y = Add(x, t)",
    "swish_per_channel": "z = Mul(x, gain) s = Sigmoid(z) y = Mul(x, s)",
}
NUMBERS = {
    "root": 2**0.5,
    "one": 1,
    "half": 0.5,
    "three": 3,
    "small": 0.044715,
    "scale": (2 / np.pi) ** 0.5,
    "zero": 0,
    "six": 6,
}


def model(body: str, width: int = 5) -> onnx.ModelProto:
    numbers = ", ".join(f"float {name} = {{{float(value)!r}}}" for name, value in NUMBERS.items())
    gain = "float[5] gain = {0.3, 0.6, 1.0, 1.7, 2.5}"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    f (float[256, {width}] x) => (float[256, {width}] y) <{numbers}, {gain}> {{ {body} }}"""
    return parser.parse_model(text)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.7), (0.5, 2.5)])
def test_moments_and_gradient_are_those_of_the_whole(name: str, mean: float, std: float) -> None:
    loaded = from_proto(model(COMPOSED[name]), "composed", Path("."))
    canonicalize(loaded, Dims())
    x, y = loaded.graph.inputs[0], loaded.graph.outputs[0]
    found = estimate(loaded.graph, batch=256, inputs={"x": Moments.normal(2, mean, std**2)})
    assert not found.unmodelled
    runner = session(differentiate(model(COMPOSED[name]), wrt=["x"]))
    rng = np.random.default_rng(5)
    ys, gs = [], []
    for _ in range(100):
        feed = {"x": rng.normal(mean, std, (256, 5)), "y.cotangent": rng.standard_normal((256, 5))}
        values = runner.run(["y", "x.grad"], {k: v.astype(np.float32) for k, v in feed.items()})
        ys.append(values[0])
        gs.append(values[1])
    expected = np.sqrt(np.square(ys, dtype=np.float64).mean(axis=(0, 1)))
    np.testing.assert_allclose(np.sqrt(found.moments[y].second)[0] * np.ones(5), expected, rtol=0.05)
    np.testing.assert_allclose(
        found.moments[y].mean[0] * np.ones(5), np.mean(ys, axis=(0, 1)), atol=0.03 * expected.max()
    )
    expected = np.sqrt(np.square(gs, dtype=np.float64).mean(axis=(0, 1)))
    np.testing.assert_allclose(np.sqrt(found.gradients[x].total)[0] * np.ones(5), expected, rtol=0.05)


def _second_moments(name: str, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loaded = from_proto(model(COMPOSED[name], mean.size), "composed", Path("."))
    canonicalize(loaded, Dims())
    x, y = loaded.graph.inputs[0], loaded.graph.outputs[0]
    found = estimate(loaded.graph, batch=256, inputs={"x": Moments(mean, 0 * mean, 0 * mean, var)})
    return found.moments[y].second[0], found.gradients[x].total[0]


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "hard_swish"])
def test_wide_layers_agree_with_narrow_ones(name: str) -> None:
    rng = np.random.default_rng(6)
    mean, var = rng.normal(0, 0.5, (1, 4096)), rng.uniform(0.3, 1.5, (1, 4096))
    wide, narrow = _second_moments(name, mean, var), _second_moments(name, mean[:, :5], var[:, :5])
    np.testing.assert_allclose(wide[0][:5], narrow[0], rtol=0.02)
    np.testing.assert_allclose(wide[1][:5], narrow[1], rtol=0.02)
