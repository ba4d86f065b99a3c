"""The loss of a training step: its gradient at the outputs, built in the graph."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.data import Arrays, Data, labels, linear_targets
from gradlint.exceptions import DataError
from gradlint.graph import dims, is_float, op
from gradlint.options import Loss


def seeds_of(
    b: Backward, graph: ir.Graph, data: Data, loss: Loss, seed: int, scale: ir.Value, batch: int, chunks: int
) -> tuple[dict[ir.Value, ir.Value], Arrays, list[ir.Value]]:
    """The cotangent of each output under the loss, built in the graph; the arrays to feed (all chunks); and the
    cross-entropy itself, per output that has a target."""
    outputs = [o for o in dict.fromkeys(graph.outputs) if is_float(o)]
    seeds: dict[ir.Value, ir.Value] = {}
    feeds: Arrays = dict(data.inputs)
    if loss == "linear":
        shapes = {str(o.name): _whole(dims(o), chunks) for o in outputs}
        for output, (name, target) in zip(outputs, linear_targets(shapes, data, seed).items(), strict=True):
            feeds[f"gradlint.target.{name}"] = np.asarray(target / np.float32(math.sqrt(batch * chunks)))
            seeds[output] = b.op("Mul", _target(graph, name, dims(output) or (), ir.DataType.FLOAT), scale)
        return seeds, feeds, []
    pairs = [
        (o, t)
        for k, o in enumerate(outputs)
        if (t := data.targets.get(str(o.name), data.targets.get("") if k == 0 else None)) is not None
    ]
    if not pairs:
        raise DataError(f"the loss {loss} needs a target: put an array 'target' into --data (or 'target.OUTPUT')")
    losses = []
    for output, given in pairs:
        logits = _logits(output, loss)
        shape = dims(logits) or ()
        whole = _whole(shape, chunks)
        kind = ir.DataType.INT64 if loss == "cross-entropy" else ir.DataType.FLOAT
        feeds[f"gradlint.target.{output.name}"] = labels(given, whole, data.origin, loss=loss)
        wanted = _target(graph, str(output.name), shape[:-1] if loss == "cross-entropy" else shape, kind)
        if loss == "cross-entropy":
            hot = _onehot(b, wanted, whole[-1])
            count = b.scalar(float((feeds[f"gradlint.target.{output.name}"] < whole[-1]).sum()), logits)
            gradient = b.op("Div", _cross_entropy_gradient(b, logits, hot), count)
            losses.append(b.op("Div", _cross_entropy(b, logits, hot), count))
        else:
            gradient = _loss_gradient(b, loss, logits, wanted, math.prod(whole))
        seeds[logits] = b.op("Mul", gradient, scale)
    return seeds, feeds, losses


def _whole(shape: tuple[int, ...] | None, chunks: int) -> tuple[int, ...]:
    assert shape is not None
    return (shape[0] * chunks, *shape[1:]) if shape else shape


def _target(graph: ir.Graph, name: str, shape: tuple[int, ...], kind: ir.DataType) -> ir.Value:
    value = ir.Value(name=f"gradlint.target.{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))
    graph.inputs.append(value)
    return value


def _logits(output: ir.Value, loss: Loss) -> ir.Value:
    """What the loss acts on: the model is cut before a final Softmax or Sigmoid (never the log of a softmax)."""
    node = output.producer()
    heads = {"cross-entropy": ("Softmax", "LogSoftmax"), "bce": ("Sigmoid",)}.get(loss, ())
    return node.inputs[0] if node is not None and op(node) in heads and node.inputs[0] is not None else output


def _loss_gradient(b: Backward, loss: Loss, y: ir.Value, target: ir.Value, count: int) -> ir.Value:
    """dL/dy of a mean over `count` elements: sigmoid(y) - t, or 2 (y - t)."""
    if loss == "bce":
        return b.op("Div", b.op("Sub", b.op("Sigmoid", y), target), b.scalar(float(max(1, count)), y))
    return b.op("Mul", b.op("Sub", y, target), b.scalar(2.0 / max(1, count), y))


def _onehot(b: Backward, target: ir.Value, classes: int) -> ir.Value:
    """All zeros for a label that doesn't count: it lies beyond the classes."""
    depth, ends = b.constant([classes]), b.constant([0.0, 1.0], np.float32)
    return b.op("OneHot", target, depth, ends, dtype=ir.DataType.FLOAT, axis=-1)


def _cross_entropy(b: Backward, y: ir.Value, hot: ir.Value) -> ir.Value:
    """-log softmax(y)[target], summed over this run's labels."""
    return b.op("Neg", b.op("ReduceSum", b.op("Mul", b.op("LogSoftmax", y, axis=-1), hot), keepdims=0))


def _cross_entropy_gradient(b: Backward, y: ir.Value, hot: ir.Value) -> ir.Value:
    """softmax(y) - onehot, where the label counts."""
    counts = b.op("ReduceSum", hot, b.constant([-1]), keepdims=1)
    return b.op("Sub", b.op("Mul", b.op("Softmax", y, axis=-1), counts), hot)
