"""Judge the gradients of ONNX's own node tests by finite differences in float64.

A case is one node with at least one float input and output. Its float inputs vary (settings such as the scales of
Resize do not), all others become initializers. `judge` differentiates it, runs the result in onnxruntime (in ONNX's
reference evaluator where onnxruntime does not know the operator) and compares entries of the gradient with finite
differences.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from gradlint.exceptions import GradlintError
from gradlint.reference import CORRECTED
from gradlint.reverse import differentiate
from gradlint.testing import Erf, Gelu, session

Arrays = dict[str, np.ndarray]

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Float inputs that are settings: what they say (sizes, a probability) is not computed with.
SETTINGS = {"Resize": {1, 2}, "Upsample": {1}, "Dropout": {1}, "OneHot": {0, 1}}
RANDOM = {"Bernoulli", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
ENTRIES = 16  # of each input's gradient
STEPS = (1e-5, 2e-3)  # the second for operators that compute in float32 whatever their inputs are
JUMP = 0.1  # a change of the loss over the first step that only a jump makes
TOLERANCE = 2e-3
ORT_FAILURES = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented, ort.RuntimeException)
REFERENCE_FAILURES = (
    ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A node test: the model with what does not vary as initializers, the values of its float inputs."""

    name: str
    op: str
    model: onnx.ModelProto
    feed: Arrays
    expected: list[Any]


@dataclass(frozen=True)
class Verdict:
    """right, wrong, refused, none (no derivative, rightly none given), reference (no finite differences), random.

    `detail` says what was found.
    """

    kind: str
    detail: str = ""


def cases(only: str | None = None) -> Iterator[Case]:
    """The node tests in ONNX's order, those of the operator `only` where given."""
    with warnings.catch_warnings():  # making the expected results divides by zero
        warnings.simplefilter("ignore")
        tests = collect_testcases(None)
    for test in tests:
        if test.model is None or not test.data_sets:
            continue
        nodes = [n for n in test.model.graph.node if n.op_type != "Constant"]
        if len(nodes) == 1 and (only is None or nodes[0].op_type == only):
            case = _case(test, nodes[0])
            if case is not None:
                yield case


def _case(test: Any, node: onnx.NodeProto) -> Case | None:
    """The test with float32 floats; None without a float input that varies or a float output."""
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    graph = model.graph
    inputs, outputs = test.data_sets[0]
    settings = {node.input[k] for k in SETTINGS.get(node.op_type, ()) if k < len(node.input)}
    feed: Arrays = {}
    varying, constant = [], []
    for info, value in zip(graph.input, inputs, strict=False):
        kind = info.type.tensor_type.elem_type
        array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        if kind in FLOATS and info.name not in settings:
            feed[info.name] = np.asarray(array).astype(np.float32)
            varying.append(info)
        elif isinstance(array, np.ndarray) or np.isscalar(array):
            tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(array), info.name)
            given = TensorProto()
            given.CopyFrom(tensor)
            given.name = info.name
            constant.append(given)
        else:
            return None
    if not varying or not any(o.type.tensor_type.elem_type in FLOATS for o in graph.output):
        return None
    del graph.input[:]
    graph.input.extend(varying)
    graph.initializer.extend(constant)
    _retype(model, TensorProto.FLOAT)
    domain = f"{node.domain}:" if node.domain else ""
    return Case(test.name, domain + node.op_type, model, feed, list(outputs))


def _retype(model: onnx.ModelProto, kind: int) -> None:
    """Every float of the model in one type: inputs, outputs, and what nodes are told to compute in."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    settings = {n.input[k] for n in model.graph.node for k in SETTINGS.get(n.op_type, ()) if k < len(n.input)}
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type in FLOATS:
                info.type.tensor_type.elem_type = kind
        tensors = [t for t in graph.initializer if t.name not in settings]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype", "stash_type", "softmax_precision") and attribute.i in FLOATS:
                    attribute.i = kind
                if attribute.HasField("t"):
                    tensors.append(attribute.t)
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
        for tensor in tensors:
            if tensor.data_type in FLOATS:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))


class Loss:
    """sum <cotangent, output> of a case in float64; outputs that are not finite get no cotangent."""

    def __init__(self, case: Case, seed: int) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        _retype(model, TensorProto.DOUBLE)
        for node in model.graph.node:
            node.op_type = {"Scatter": "ScatterElements"}.get(node.op_type, node.op_type)  # its later name
        self.runner = ReferenceEvaluator(model, new_ops=[Erf, Gelu, *CORRECTED])
        self.floats = [o.type.tensor_type.elem_type in FLOATS for o in case.model.graph.output]
        self.names = [o.name for o in case.model.graph.output]
        rng = np.random.default_rng(seed)
        found = zip(self.names, self.outputs(case.feed), self.floats, strict=True)
        floats = {name: y for name, y, is_float in found if is_float}
        self.finite = all(np.isfinite(y).all() for y in floats.values())
        self.cotangents = {
            name: np.where(np.isfinite(y), rng.standard_normal(np.shape(y)), 0.0) for name, y in floats.items()
        }

    def outputs(self, feed: Arrays) -> list[Any]:
        with np.errstate(all="ignore"):
            return list(self.runner.run(None, {k: v.astype(np.float64) for k, v in feed.items()}))

    def __call__(self, feed: Arrays) -> float:
        found = dict(zip(self.names, self.outputs(feed), strict=True))
        return float(sum(np.sum(np.where(c == 0, 0.0, found[k]) * c) for k, c in self.cotangents.items()))


def judge(case: Case, seed: int = 0) -> Verdict:
    """Compare a case's gradients with finite differences: at its own values, and, where they differ, beside them.

    (The values of a case may lie on a kink: ties of MaxPool, ReLU at 0.)
    """
    if case.op in RANDOM or (case.op == "Dropout" and _training(case)):
        return Verdict("random")
    try:
        loss = Loss(case, seed)
    except REFERENCE_FAILURES as error:
        return Verdict("reference", f"{type(error).__name__}: {str(error)[:80]}")
    try:
        back = differentiate(case.model, wrt=list(case.feed))
    except GradlintError as error:
        return Verdict("refused", str(error)[:120])
    given = {o.name.removesuffix(".grad") for o in back.graph.output if o.name.endswith(".grad")}
    run, where = _runner(back)
    rng = np.random.default_rng(seed)
    found = Verdict("none")
    for attempt in range(3):
        feed = case.feed if attempt == 0 else {k: _beside(v, rng) for k, v in case.feed.items()}
        for step in STEPS:
            found = _compare(loss, feed, given, run, where, step, rng)
            if found.kind not in ("wrong", "reference"):
                return found
    if found.kind == "wrong" and (other := _disagreement(case, loss)):
        return Verdict("reference", other)
    return found


def _training(case: Case) -> bool:
    node = case.model.graph.node[-1]
    return any(len(node.input) > 2 and t.name == node.input[2] for t in case.model.graph.initializer)


def _beside(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    scale = float(np.abs(x[np.isfinite(x)]).mean()) if np.isfinite(x).any() else 1.0
    moved = x * (1 - 0.02 * rng.random(x.shape)) + 0.005 * scale * rng.standard_normal(x.shape)
    return np.asarray(moved, x.dtype)


def _runner(model: onnx.ModelProto) -> tuple[Any, str]:
    try:
        return session(model), "onnxruntime"
    except ORT_FAILURES as error:
        return ReferenceEvaluator(model, new_ops=[Erf, Gelu, *CORRECTED]), f"reference ({str(error)[:60]})"


def _compare(
    loss: Loss, feed: Arrays, given: set[str], run: Any, where: str, step: float, rng: np.random.Generator
) -> Verdict:
    names = [k for k in feed if k in given]
    cotangents = {f"{k}.cotangent": np.asarray(c, np.float32) for k, c in loss.cotangents.items()}
    try:
        with np.errstate(all="ignore"):
            got = run.run([f"{k}.grad" for k in names], feed | cotangents) if names else []
    except (*ORT_FAILURES, *REFERENCE_FAILURES) as error:
        return Verdict("wrong", f"does not run in {where}: {str(error)[-160:]}")
    grads = dict(zip(names, got, strict=True))
    checked = 0
    refused = []
    for name, x in feed.items():
        if x.size == 0:
            continue
        if name in grads and grads[name].shape != x.shape:
            return Verdict("wrong", f"d{name}: shape {grads[name].shape} for {x.shape}")
        try:
            entries, numeric = _differences(loss, feed, name, step, rng)
        except REFERENCE_FAILURES as error:
            return Verdict("reference", f"{type(error).__name__}: {str(error)[:80]}")
        if name not in grads:
            if np.abs(numeric).max(initial=0) > 1e-6:
                refused.append(name)
            continue
        exact = grads[name].reshape(-1)[entries].astype(np.float64)
        if not loss.finite:  # what only moves outputs that are not finite has no derivative
            defined = ~(np.isnan(exact) & (numeric == 0))
            entries, exact, numeric = entries[defined], exact[defined], numeric[defined]
        scale = max(np.abs(numeric).max(initial=0), 1e-2)
        error = np.abs(exact - numeric).max(initial=0) / scale
        if not error < TOLERANCE and len(entries):
            worst = int(np.argmax(np.nan_to_num(np.abs(exact - numeric), nan=np.inf)))
            return Verdict("wrong", f"d{name}: {exact[worst]:.5g}, by differences {numeric[worst]:.5g} ({where})")
        checked += len(entries)
    if refused:
        return Verdict("refused", ", ".join(refused))
    if checked or not names:
        return Verdict("right" if checked else "none")
    return Verdict("reference", "no derivative: all entries at kinks, or no entries")


def _differences(
    loss: Loss, feed: Arrays, name: str, step: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of an input and the loss's derivative towards each; those at a kink or a jump are left out."""
    x = feed[name].astype(np.float64)
    entries = np.sort(rng.permutation(x.size)[:ENTRIES])
    middle = loss(feed)
    kept, numeric = [], []
    for k in entries:
        h = step * max(1.0, abs(float(x.flat[k])))
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved.flat[k] += sign * h
            ends.append(loss(feed | {name: moved}))
        with np.errstate(all="ignore"):
            up, down, both = (ends[0] - middle) / h, (middle - ends[1]) / h, (ends[0] - ends[1]) / (2 * h)
            smooth = abs(up - down) <= 50 * step * max(abs(up), abs(down), 1.0) and (
                step > STEPS[0] or abs(ends[0] - ends[1]) < JUMP
            )
        if np.isfinite(both) and np.isfinite(middle) and smooth:
            kept.append(k)
            numeric.append(both)
    return np.array(kept, np.int64), np.array(numeric)


def _disagreement(case: Case, loss: Loss) -> str:
    """Where the reference's own result is not onnxruntime's (or the test's): there differences prove nothing."""
    expected = [numpy_helper.to_array(y) if isinstance(y, TensorProto) else y for y in case.expected]
    with contextlib.suppress(ORT_FAILURES):  # some operators it does not know
        expected = session(case.model).run(None, case.feed)
    for name, y, ours in zip(loss.names, expected, loss.outputs(case.feed), strict=True):
        ours = np.asarray(ours)
        if ours.dtype.kind != "f":
            continue
        y = np.asarray(y, np.float64)
        if y.shape != ours.shape or not np.allclose(y, ours, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"{name}: the reference evaluator and onnxruntime disagree"
    return ""
