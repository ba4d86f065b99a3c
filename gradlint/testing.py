"""What tests say: that a network can be trained (`assert_trainable`), and that an operator's rows are right.

`check_op` compares all five tables of an operator with what it really does.
Gradients are compared with finite differences in float64 (ONNX's reference evaluator), and once more in onnxruntime;
moments and pullback with Monte Carlo; ranges and bounds with samples, which must never leave them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import gradlint
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.domain import Array, Moments, Range
from gradlint.estimate import Estimate, estimate, prove
from gradlint.load import from_proto
from gradlint.quadrature import erf
from gradlint.reference import CORRECTED
from gradlint.report.headline import counts_phrase, ranked, risk_phrase
from gradlint.report.text import label, prose
from gradlint.results import LEVELS, Finding, Report
from gradlint.reverse import differentiate

Arrays = dict[str, np.ndarray]
_NOWHERE = Path(".")  # these models have no external data


def assert_trainable(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    fail_on: Literal["error", "warning"] = "error",
    **settings: Any,
) -> Report:
    """The report of `gradlint.check`, whose arguments these are, where it has no finding at or above `fail_on`.

    Raises AssertionError with the verdict, these findings and their fixes otherwise: what the command fails on by
    `--fail-on`, a test fails on.
    """
    __tracebackhide__ = True
    report = gradlint.check(model, data, **settings)
    failing = LEVELS[: LEVELS.index(fail_on) + 1]
    found = [finding for finding in ranked(report.findings) if finding.level in failing]
    if found:
        raise AssertionError(_complaint(report, found))
    return report


def _complaint(report: Report, found: list[Finding]) -> str:
    path = label(report.model.path)
    lines = [f"{path} is not trainable: {report.summary.verdict}, {risk_phrase(report)}, {counts_phrase(report)}"]
    for finding in found:
        place = label(finding.layer or finding.weight or "the model")
        source = f" ({label(finding.source.file)}:{finding.source.line})" if finding.source else ""
        lines.append(f"{finding.level} {label(finding.code)} {label(finding.rule)} at {place}{source}:")
        lines.append(f"  {prose(finding.message)} ({finding.evidence})")
        lines += [f"  fix: {prose(fix.text)}" for fix in finding.fixes]
    return "\n".join(lines)


@dataclass(frozen=True)
class Activation:
    """A float input that varies: drawn normal with `mean` and `std`, clipped to [low, high] where given."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0
    low: float = -6.0
    high: float = 6.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return np.clip(rng.normal(self.mean, self.std, self.shape), self.low, self.high)


Input = Activation | np.ndarray | None


def check_op(
    op: str,
    *inputs: Input,
    moments: float | None = 0.1,
    pullback: float | None = 0.1,
    vjp: bool = True,
    proof: bool = True,
    outputs: int = 1,
    wrt: tuple[int, ...] | None = None,
    opset: int = 21,
    domain: str = "",
    seed: int = 0,
    draws: int = 200,
    analysis_mode: str = "train",
    **attributes: Any,
) -> None:
    """Check every row of one operator on one case; raises AssertionError where a row is wrong.

    inputs: `Activation` for what varies (axis 0: examples), arrays for weights and settings, None for an omitted input.
    moments, pullback: the relative error allowed against Monte Carlo, per unit (None: the operator has no such row).
    wrt: indices of the inputs to differentiate (default: all floats); analysis_mode: `mode` of `estimate`.
    """
    single = _model(op, inputs, outputs, opset, domain, attributes, np.float32)
    rng = np.random.default_rng(seed)
    if wrt is None:
        wrt = tuple(
            k for k, v in enumerate(inputs) if isinstance(v, Activation) or (v is not None and v.dtype.kind == "f")
        )
    names = [f"x{k}" for k in wrt]
    if vjp and names:
        double = single if domain else _model(op, inputs, outputs, opset, domain, attributes, np.float64)
        _check_vjp(double, single, inputs, names, rng)
    if moments is not None or pullback is not None:
        _check_moments(single, inputs, names if vjp else [], moments, pullback, draws, analysis_mode, rng)
    if proof:
        _check_proof(single, inputs, names if vjp else [], rng)


def _model(
    op: str,
    inputs: tuple[Input, ...],
    outputs: int,
    opset: int,
    domain: str,
    attributes: Mapping[str, Any],
    dtype: type,
) -> onnx.ModelProto:
    """One node as a model; weights are initializers, their names x0, x1 ..; outputs y0, y1 .."""
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.DOUBLE
    graph_inputs, initializers = [], []
    for k, value in enumerate(inputs):
        if isinstance(value, Activation):
            graph_inputs.append(helper.make_tensor_value_info(f"x{k}", kind, value.shape))
        elif value is not None:
            single = value.dtype.kind != "f" or (op == "Resize" and k == 2)  # scales are float32 whatever x is
            array = value if single else value.astype(dtype)
            initializers.append(onnx.numpy_helper.from_array(array, f"x{k}"))
    node = helper.make_node(
        op,
        ["" if v is None else f"x{k}" for k, v in enumerate(inputs)],
        [f"y{k}" for k in range(outputs)],
        domain=domain,
        name=op,
        **attributes,
    )
    results = [helper.make_empty_tensor_value_info(f"y{k}") for k in range(outputs)]
    graph = helper.make_graph([node], op, graph_inputs, results, initializers)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if not domain:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for y in model.graph.output:
        if y.type.tensor_type.elem_type:  # inferred
            continue
        y.type.tensor_type.elem_type = kind
        shape = next(v.shape for v in inputs if isinstance(v, Activation))
        y.type.tensor_type.shape.CopyFrom(helper.make_tensor_value_info("", kind, shape).type.tensor_type.shape)
    return model


def session(model: onnx.ModelProto) -> Any:
    """An onnxruntime session for a model, quiet and without telemetry."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feed(inputs: tuple[Input, ...], rng: np.random.Generator, dtype: type) -> Arrays:
    return {f"x{k}": v.draw(rng).astype(dtype) for k, v in enumerate(inputs) if isinstance(v, Activation)}


def _cotangents(model: onnx.ModelProto, rng: np.random.Generator, dtype: type) -> Arrays:
    found: Arrays = {}
    for y in model.graph.output:
        if y.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE):
            shape = [d.dim_value for d in y.type.tensor_type.shape.dim]
            found[f"{y.name}.cotangent"] = rng.standard_normal(shape).astype(dtype)
    return found


class Erf(OpRun):
    """The error function in the type of its input (the reference's own rounds to float32)."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (erf(x.astype(np.float64)).astype(x.dtype),)


class Gelu(OpRun):
    """z Phi(z), or its approximation by tanh, in the type of its input."""

    op_domain = ""

    def _run(self, z: np.ndarray, approximate: str | None = None) -> tuple[np.ndarray]:
        tanh = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
        gate = tanh if approximate == "tanh" else erf(z.astype(np.float64) * np.sqrt(0.5))
        return ((0.5 * z * (1 + gate)).astype(z.dtype),)


def _run(model: onnx.ModelProto, feed: Arrays) -> Arrays:
    """Float64 in ONNX's reference; operators it does not know (com.microsoft) in onnxruntime."""
    foreign = any(o.domain not in ("", "ai.onnx") for o in model.opset_import)
    names = [o.name for o in model.graph.output]
    results = (
        session(model).run(names, feed)
        if foreign
        else ReferenceEvaluator(model, new_ops=[Erf, Gelu, *CORRECTED]).run(names, feed)
    )
    return dict(zip(names, results, strict=True))


def _check_vjp(
    model: onnx.ModelProto,
    single: onnx.ModelProto,
    inputs: tuple[Input, ...],
    names: list[str],
    rng: np.random.Generator,
) -> None:
    dtype = np.float64 if model is not single else np.float32
    step, tolerance = (1e-6, 1e-5) if dtype is np.float64 else (1e-2, 2e-2)
    feed, cotangents = _feed(inputs, rng, dtype), _cotangents(model, rng, dtype)
    back = differentiate(model, wrt=names)
    missing = {f"{n}.grad" for n in names} - {o.name for o in back.graph.output}
    assert not missing, f"no gradient: {sorted(missing)}"
    grads = _run(back, feed | cotangents)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    for name in names:
        grad = grads[f"{name}.grad"].astype(np.float64)
        x = (feed | weights)[name]
        assert grad.shape == x.shape, f"d{name} has shape {grad.shape}, {name} has {x.shape}"
        for _ in range(3):
            direction = rng.standard_normal(x.shape)
            numeric = _slope(model, feed, cotangents, name, x, direction, step)
            scale = np.linalg.norm(grad) * np.linalg.norm(direction) / np.sqrt(max(1, x.size)) + 1e-6
            error = abs(numeric - float(np.sum(grad * direction))) / scale
            assert error < tolerance, f"d{name}: finite differences {numeric:.6g}, vjp {np.sum(grad * direction):.6g}"
    f32 = {k: v.astype(np.float32) for k, v in (feed | cotangents).items()}
    again = differentiate(single, wrt=names)
    onnx.checker.check_model(again)
    for name, value in zip(names, session(again).run([f"{n}.grad" for n in names], f32), strict=True):
        expected = grads[f"{name}.grad"]
        error = np.abs(value - expected).max(initial=0) / (np.abs(expected).max(initial=0) + 1e-6)
        assert error < 1e-3, f"d{name}: onnxruntime differs from the reference by {error:.1e}"


def _slope(
    model: onnx.ModelProto,
    feed: Arrays,
    cotangents: Arrays,
    name: str,
    x: np.ndarray,
    direction: np.ndarray,
    step: float,
) -> float:
    """(L(x + h d) - L(x - h d)) / 2h for L = sum <cotangent, output>."""
    losses = []
    for sign in (1, -1):
        moved = (x + sign * step * direction).astype(x.dtype)
        shifted = onnx.ModelProto()
        shifted.CopyFrom(model)
        values = dict(feed)
        if name in feed:
            values[name] = moved
        for tensor in shifted.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(onnx.numpy_helper.from_array(moved, name))
        results = _run(shifted, values)
        losses.append(sum(float(np.sum(results[k.removesuffix(".cotangent")] * t)) for k, t in cotangents.items()))
    return (losses[0] - losses[1]) / (2 * step)


def _estimated(model: onnx.ModelProto, inputs: tuple[Input, ...], mode: str) -> tuple[Any, Estimate]:
    loaded = from_proto(_copy(model), "model", _NOWHERE)
    canonicalize(loaded, Dims())
    given = {
        f"x{k}": Moments.normal(len(v.shape), v.mean, v.std**2)
        for k, v in enumerate(inputs)
        if isinstance(v, Activation)
    }
    batch = next((v.shape[0] for v in inputs if isinstance(v, Activation)), 1)
    return loaded.graph, estimate(loaded.graph, batch=batch, mode=mode, inputs=given)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def _check_moments(
    model: onnx.ModelProto,
    inputs: tuple[Input, ...],
    names: list[str],
    moments: float | None,
    pullback: float | None,
    draws: int,
    mode: str,
    rng: np.random.Generator,
) -> None:
    graph, found = _estimated(model, inputs, mode)
    assert not found.unmodelled, f"no moments row, or it gave up: {[n.op_type for n in found.unmodelled]}"
    runner = session(differentiate(_copy(model), wrt=names)) if names else session(model)
    outputs = [o.name for o in runner.get_outputs()]
    sums: dict[str, list[np.ndarray]] = {}
    for _ in range(draws):
        feed = _feed(inputs, rng, np.float32) | (_cotangents(model, rng, np.float32) if names else {})
        scale = 1.0 / np.sqrt(found.batch)
        feed = {k: np.asarray(v * np.float32(scale)) if k.endswith(".cotangent") else v for k, v in feed.items()}
        for name, value in zip(outputs, runner.run(outputs, feed), strict=True):
            sums.setdefault(name, []).append(np.asarray(value))
    values = {str(v.name): v for v in [*graph.inputs, *graph.initializers.values(), *graph.outputs]}
    for name, samples in sums.items():
        stack = np.stack(samples).astype(np.float64)
        if name.endswith(".grad") and pullback is not None:
            value = values[name.removesuffix(".grad")]
            g = found.gradients.get(value)
            assert g is not None, f"no pullback to {value.name}"
            per_example = found.batch if value in found.varies else 1
            _agree(f"E[d{value.name}^2]", np.square(stack) * per_example, g.total, pullback)
        elif name in values and moments is not None and values[name] in found.moments:
            x = found.moments[values[name]]
            _agree(f"E[{name}^2]", np.square(stack), x.second, moments)
            deviation = float(np.sqrt(np.mean(x.second))) + 1e-12
            error = np.abs(_reduced(stack, x.mean) - x.mean).mean() / deviation
            assert error < max(moments, 0.02), f"E[{name}]: off by {error:.3f} of its RMS"


def _reduced(stack: Array, like: Array) -> Array:
    """Mean over draws and over every axis that `like` does not resolve."""
    axes = tuple(k + 1 for k, n in enumerate(like.shape) if n == 1 and stack.shape[k + 1] > 1)
    return stack.mean(axis=(0, *axes), keepdims=True)[0]


def _agree(what: str, squares: Array, expected: Array, tolerance: float) -> None:
    """RMS per unit within the tolerance, in the mean over units and overall."""
    measured = np.sqrt(_reduced(squares, expected))
    predicted = np.sqrt(np.broadcast_to(expected, measured.shape))
    overall = abs(np.sqrt(np.mean(predicted**2)) / (np.sqrt(np.mean(measured**2)) + 1e-12) - 1)
    if np.mean(measured**2) == 0:
        assert np.mean(predicted**2) == 0, f"{what}: measured 0, predicted {np.mean(predicted**2):.3g}"
        return
    assert overall < tolerance, (
        f"sqrt {what}: measured {np.sqrt(np.mean(measured**2)):.4g}, predicted off by {overall:.3f}"
    )
    spread = float(np.mean(np.abs(predicted - measured)) / np.sqrt(np.mean(measured**2)))
    assert spread < 2 * tolerance + 0.05, f"sqrt {what}: units differ by {spread:.3f} on average"


def _check_proof(model: onnx.ModelProto, inputs: tuple[Input, ...], names: list[str], rng: np.random.Generator) -> None:
    """Samples never leave a proved range, gradients never exceed a proved bound."""
    loaded = from_proto(_copy(model), "model", _NOWHERE)
    canonicalize(loaded, Dims())
    boxes = {
        f"x{k}": Range(np.full((1,) * len(v.shape), v.low), np.full((1,) * len(v.shape), v.high))
        for k, v in enumerate(inputs)
        if isinstance(v, Activation)
    }
    batch = next((v.shape[0] for v in inputs if isinstance(v, Activation)), 1)
    proof = prove(loaded.graph, boxes, batch=batch, mode="eval")
    back = differentiate(_copy(model), wrt=names) if names else model
    runner = session(back)
    outputs = [o.name for o in runner.get_outputs()]
    for k in range(20):
        feed = {
            f"x{i}": (rng.uniform(v.low, v.high, v.shape) if k % 2 else v.draw(rng)).astype(np.float32)
            for i, v in enumerate(inputs)
            if isinstance(v, Activation)
        }
        cotangents = _cotangents(model, rng, np.float32) if names else {}
        norm = np.sqrt(sum(float(np.sum(np.square(t, dtype=np.float64))) for t in cotangents.values()))
        got = dict(zip(outputs, runner.run(outputs, feed | cotangents), strict=True))
        for value in [*loaded.graph.inputs, *loaded.graph.outputs]:
            if value in proof.ranges and value.name in got:
                box, y = proof.ranges[value], got[value.name]
                slack = 1e-5 * (1 + np.abs(y))
                assert np.all(y >= box.lo - slack), f"{value.name} leaves its proved range"
                assert np.all(y <= box.hi + slack), f"{value.name} leaves its proved range"
            if value in proof.bounds and f"{value.name}.grad" in got:
                reach = float(np.linalg.norm(got[f"{value.name}.grad"].astype(np.float64)))
                assert reach <= proof.bounds[value] * norm * (1 + 1e-5), f"d{value.name} exceeds its proved bound"
