"""One session of onnxruntime for a graph, and its runs.

Gradients that are too small (or too large) for their squares to be float32 numbers are measured again with the
cotangent scaled by a power of two: the backward pass is linear in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from gradlint.data import Arrays
from gradlint.graph import attribute, constant_array, op
from gradlint.taps import Taps

SCALE = "gradlint.scale"
_SCALES = (60, 100, -60)  # powers of two the cotangent is tried with where 1 won't do
# Blocks of channels: to reorder every kernel takes longer than one run gains, and as much memory as the kernels.
_BLOCKED = "NchwcTransformer"
_INLINE = 4096  # bytes of a weight that travels in the model
_SAFE = (1e-24, 1e30)  # sums of squares that float32 holds with full precision


def _onnxruntime() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def runtime_errors() -> tuple[type[Exception], ...]:
    errors = _onnxruntime().capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "NotImplemented",
        "RuntimeException",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "EPFail",
    )
    return tuple(getattr(errors, n) for n in names if hasattr(errors, n))


def session_of(model: ir.Model, graph: ir.Graph, threads: int) -> Any:
    """A session for `graph` that reads its weights where they lie.

    onnxruntime copies what it is given as external initializers, unless it is given them once more as its own.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # it would take pages of its own; the process has freed ones
    options.enable_mem_pattern = False  # a plan for further runs: most sessions have one
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    for node in list(reversed(graph)):  # onnxruntime runs what nothing reads
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    _rearrange_weights(graph)
    read = {v for n in graph.all_nodes() for v in n.inputs} | set(graph.outputs)
    for name in [n for n, v in graph.initializers.items() if v not in read]:
        del graph.initializers[name]  # onnxruntime refuses a weight handed over for nothing
    arrays: dict[str, np.ndarray] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _INLINE:
            arrays[str(value.name)] = np.ascontiguousarray(tensor.numpy())
        elif isinstance(tensor, ir.ExternalTensor):  # small: onnxruntime wants it in the model
            value.const_value = ir.Tensor(np.array(tensor.numpy()), name=value.name)
    proto = _proto(model, graph, arrays)
    held = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    written = {str(v.name) for n in graph.all_nodes() if op(n) == "BatchNormalization" for v in n.inputs if v}
    for name in held.keys() - written:  # in training mode onnxruntime writes statistics over the running ones
        options.add_initializer(name, held[name])
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_BLOCKED]
    )
    session.weights = held  # the session reads them, but does not keep them
    return session


def _rearrange_weights(graph: ir.Graph) -> None:
    """Weights as the backward pass reads them, transposed and flipped: onnxruntime would keep a copy of every step."""
    for node in list(graph):
        arrays = [a for v in node.inputs if (a := constant_array(v)) is not None]
        rearranged = _REARRANGED.get(op(node))
        if rearranged is None or len(arrays) < len(node.inputs) or arrays[0].nbytes <= _INLINE:
            continue
        old = node.outputs[0]
        try:
            tensor = ir.Tensor(rearranged(node, *arrays), name=old.name)
        except (IndexError, ValueError):
            continue  # onnxruntime says what is wrong with it
        new = ir.Value(name=old.name, const_value=tensor, shape=tensor.shape, type=old.type)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        graph.register_initializer(new)


def _gathered(node: ir.Node, data: np.ndarray, index: np.ndarray) -> np.ndarray:
    axis = attribute(node, "axis", 0)
    reversal = np.array_equal(index, np.arange(data.shape[axis])[::-1])
    return np.flip(data, axis) if reversal else np.take(data, index, axis)


def _reshaped(node: ir.Node, data: np.ndarray, shape: np.ndarray) -> np.ndarray:
    keep = attribute(node, "allowzero", 0) == 0
    return data.reshape([data.shape[k] if n == 0 and keep else int(n) for k, n in enumerate(shape)])


_REARRANGED: Mapping[str, Callable[..., np.ndarray]] = {
    "Transpose": lambda node, data: np.transpose(data, attribute(node, "perm")),
    "Gather": _gathered,
    "Reshape": _reshaped,
    "Flatten": lambda node, data: data.reshape(math.prod(data.shape[: attribute(node, "axis", 1)]), -1),
}


def _proto(model: ir.Model, graph: ir.Graph, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with large weights declared external: they come by reference."""
    for name, array in arrays.items():
        value = graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.ExternalTensor(
            "weights", 0, array.nbytes, value.const_value.dtype, shape=ir.Shape(array.shape), name=name
        )
    return ir.to_proto(ir.Model(graph, ir_version=max(10, model.ir_version or 10)))


def run(session: Any, taps: Taps, feeds: Arrays, chunks: int) -> dict[tuple[str, str], np.ndarray]:
    """Every tap in float64; squares that left float32's safe range come from a run with scaled cotangent."""
    best = got = _run_once(session, taps, feeds, chunks, 0)
    doubtful = [key for key in got if key[0] in _DEGREE]
    for power in _SCALES:
        if not doubtful or not _out_of_range(np.concatenate([got[key].reshape(-1) for key in doubtful])):
            break
        doubtful = [key for key in doubtful if not _held(got[key])]
        got = _run_once(session, taps, feeds, chunks, power)
        best = best | {k: got[k] * 2.0 ** (-power * _DEGREE[k[0]]) for k in doubtful if _held(got[k])}
    return best


def _run_once(session: Any, taps: Taps, feeds: Arrays, chunks: int, power: int) -> dict[tuple[str, str], np.ndarray]:
    """Every tap in float64, summed over chunks."""
    total: dict[tuple[str, str], np.ndarray] = {}
    shapes = {i.name: i.shape for i in session.get_inputs()}
    for k in range(chunks):
        feed = {n: part(a, k, shapes[n]) for n, a in feeds.items() if n in shapes}
        if SCALE in shapes:
            feed[SCALE] = np.asarray(2.0**power, np.float32)
        got = _finished(taps.by_key(session.run(None, feed)))
        total = {key: total[key] + a for key, a in got.items()} if total else got
    return total


def _finished(got: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """In float64, with the reductions that are completed here: rows of a weight are summed, small averages over
    examples reduced."""
    found: dict[tuple[str, str], Any] = {}  # numpy's scalars are arrays, if not to a type checker
    for (kind, name), array in got.items():
        wide = np.asarray(array, np.float64)
        if kind == "average":
            found["mean", name], found["common", name] = wide.mean(), np.vdot(wide, wide)
        else:
            found[kind, name] = wide.sum() if kind in ("wgrad", "wabs") and wide.ndim else wide
    return found


# How a tap grows with the cotangent: squares by its square.
_DEGREE = {"grad": 2, "wgrad": 2, "wabs": 1, "arriving": 2, "leaving": 2, "seed": 2, "shift": 1, "whole": 1}


def _held(array: np.ndarray) -> bool:
    """Is every number one that float32 squares hold?"""
    return bool(
        np.isfinite(array).all() and array.size and np.abs(array).min() >= _SAFE[0] and np.abs(array).max() <= _SAFE[1]
    )


def _out_of_range(array: np.ndarray) -> bool:
    """Is there a sign of underflow or overflow? (Exact zeros alone are no sign: many gradients are zero.)"""
    size = np.abs(array)
    return bool((~np.isfinite(array)).any() or ((size > 0) & (size < _SAFE[0])).any() or (size > _SAFE[1]).any())


def part(array: np.ndarray, k: int, shape: Sequence[int | str]) -> np.ndarray:
    for axis, want in enumerate(shape):
        if isinstance(want, int) and array.shape[axis] != want:
            return np.take(array, range(k * want, (k + 1) * want), axis=axis)
    return array
