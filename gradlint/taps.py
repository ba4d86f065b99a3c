"""Reductions asked of the session: what leaves it, and what each is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.graph import REORDERS, dims, is_float, op
from gradlint.ops.activation import FLAT, LOST
from gradlint.transfer import VJP, derivative

_SAMPLE = 1 << 16  # elements that shares of an activation are counted on
_FEW = 1 << 12  # those of a weight's gradient, whose share of zeros is known to 0.01 from them
_SMALL = 1 << 12  # elements of a gradient that three reductions would cost more than it does
_LONG = 1 << 22  # elements whose squares one float32 sums up to 1e-4 of them


@dataclass
class Taps:
    """Reductions asked of the session, by what they measure; a value that is asked for twice leaves it once."""

    b: Backward
    outputs: dict[tuple[str, str], ir.Value] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)  # elements per unit of an activation

    def add(self, kind: str, name: str, value: ir.Value) -> None:
        self.outputs[kind, name] = value

    def distinct(self) -> list[ir.Value]:
        """What leaves the session, in this order."""
        return list(dict.fromkeys(self.outputs.values()))

    def by_key(self, results: Sequence[np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        """The session's results, given in the order of `distinct`, by what they measure."""
        found = dict(zip(self.distinct(), results, strict=True))
        return {key: found[value] for key, value in self.outputs.items()}


def tap_value(taps: Taps, name: str, value: ir.Value, g: ir.Value | None, batch: int) -> None:
    b = taps.b
    if g is not None:
        taps.add("grad", name, b.op("ReduceSumSquare", g, keepdims=0))
    shape = dims(value)
    if not is_float(value) or shape is None or 0 in shape or value.is_graph_input():
        return
    taps.add("square", name, b.op("ReduceSumSquare", value, keepdims=0))
    axis = batch_axis(shape, batch)
    if axis is None or batch == 1:
        taps.add("mean", name, b.op("ReduceMean", value, keepdims=0))
        return
    if axis == 0:  # a row of ones times a matrix takes a tenth of ReduceMean's time
        rows = b.op("Reshape", value, b.constant([batch, -1]))
        average = b.op("MatMul", b.constant(np.full(batch, 1 / batch), np.float32), rows)
    else:
        average = b.op("ReduceMean", value, b.constant([axis]), keepdims=0)
    if math.prod(shape) <= batch * _SMALL:
        taps.add("average", name, average)
        return
    taps.add("mean", name, b.op("ReduceMean", average, keepdims=0))
    taps.add("common", name, b.op("ReduceSumSquare", average, keepdims=0))


def tap_attention(taps: Taps, name: str, weights: ir.Value, logits: ir.Value) -> None:
    """Per query the largest weight, and the mean and mean square of the logits over keys; averaged over queries."""
    b, last, shape = taps.b, taps.b.constant([-1]), dims(logits)
    if not shape:
        return
    taps.add("peak", name, b.op("ReduceMean", b.op("ReduceMax", weights, last, keepdims=0), keepdims=0))
    center = b.op("ReduceMean", logits, last, keepdims=0)
    for kind, value, size in (("center", center, math.prod(shape[:-1])), ("logits", logits, math.prod(shape))):
        square = b.op("ReduceSumSquare", value, keepdims=0)
        taps.add(kind, name, b.op("Mul", square, b.scalar(1 / max(1, size), value)))


def tap_gram(taps: Taps, value: ir.Value, batch: int) -> None:
    """Inner products of the examples' values, (B, B)."""
    b, shape = taps.b, dims(value)
    axis = None if shape is None else batch_axis(shape, batch)
    if axis is None or shape is None:
        return
    if axis == 1:
        value = b.op("Transpose", value, perm=[1, 0, *range(2, len(shape))])
    rows = b.op("Reshape", value, b.constant([batch, -1]))
    taps.add("gram", "features", b.op("Gemm", rows, rows, transB=1))


def tap_positions(taps: Taps, value: ir.Value, axes: tuple[int, ...]) -> None:
    """Squares of all elements, and of their differences from the mean over positions."""
    b = taps.b
    apart = b.op("Sub", value, b.op("ReduceMean", value, b.constant(list(axes)), keepdims=1))
    taps.add("energy", "features", b.op("ReduceSumSquare", value, keepdims=0))
    taps.add("apart", "features", b.op("ReduceSumSquare", apart, keepdims=0))


def tap_seed(taps: Taps, name: str, cotangent: ir.Value, axis: int | None) -> None:
    """The square of the gradient at an output, and the gradient of a shift that all examples' outputs share."""
    taps.add("seed", name, taps.b.op("ReduceSumSquare", cotangent, keepdims=0))
    if axis is not None:
        taps.add("shift", name, taps.b.op("ReduceSum", cotangent, taps.b.constant([axis]), keepdims=0))


def batch_axis(shape: tuple[int, ...], batch: int) -> int | None:
    """The axis examples lie along: the one of the batch's size, else axis 0 where the batch is folded into it."""
    for axis in (0, 1):
        if axis < len(shape) and shape[axis] == batch:
            return axis
    return 0 if shape and batch > 0 and shape[0] % batch == 0 else None


def tap_weight(taps: Taps, name: str, weight: ir.Value, g: ir.Value, *, whole: bool) -> None:
    """Squares and absolute values of all elements, and a sample of them; a small gradient leaves as it is."""
    b = taps.b
    if whole or math.prod(dims(weight) or ()) <= _SMALL:
        taps.add("whole", name, g)
        return
    while (node := g.producer()) is not None and op(node) in REORDERS and node.inputs[0] is not None:
        g = node.inputs[0]  # in whatever order: the sums are the same
    size = math.prod(dims(weight) or ())
    # Sums per row keep the digits of long ones; onnxruntime takes five times as long for them.
    rows = b.constant([-1]) if size > _LONG else None
    taps.add("wgrad", name, b.op("ReduceSumSquare", g, rows, keepdims=0))
    taps.add("wabs", name, b.op("ReduceL1", g, rows, keepdims=0))
    if size > _FEW:
        step = math.ceil(size / _FEW)
        while math.gcd(step, size) > 1:  # one that divided a row would meet the same columns in each
            step += 1
        g = b.op("Slice", b.op("Reshape", g, b.constant([-1])), *(b.constant([k]) for k in (0, size, 0, step)))
    taps.add("sample", name, g)


def tap_activation(taps: Taps, name: str, node: ir.Node, unit_axis: int) -> None:
    """Per unit: the sum of squared slopes, the numbers of saturated and of flat ones, on a sample of the positions."""
    b, z = taps.b, node.inputs[0]
    shape = dims(z)
    if z is None or not shape:
        return
    axis = unit_axis % len(shape)
    slopes = b.slopes.get(node) or _slopes(b, node, z)
    if slopes is None:
        return
    sample = _some_positions(b, slopes, shape, axis)
    seen = dims(sample) or shape
    before, after = math.prod(seen[:axis]), math.prod(seen[axis + 1 :])
    taps.samples[name] = before * after
    slopes = b.op("Reshape", sample, b.constant([before, seen[axis], after] if after > 1 else [before, seen[axis]]))
    taps.add("slope", name, _per_unit(b, b.op("Mul", slopes, slopes), before, after))
    steepest = derivative(op(node), node)[2]
    for kind, threshold in (("saturated", FLAT * (steepest or 0.0)), ("flat", LOST)):
        low = b.op("Less", b.op("Abs", slopes), b.scalar(threshold, z), dtype=ir.DataType.BOOL)
        taps.add(kind, name, _per_unit(b, b.op("Cast", low, dtype=ir.DataType.FLOAT, to=1), before, after))


def _slopes(b: Backward, node: ir.Node, z: ir.Value) -> ir.Value | None:
    """f'(z) of an activation that no gradient has come through, f being what the node computes of its input z."""
    b.needs.add(z)
    return VJP[op(node)](b, node, [b.scalar(1.0, z)])[0]


def _per_unit(b: Backward, value: ir.Value, before: int, after: int) -> ir.Value:
    """Sums over what lies before and after the units: onnxruntime is ten times as quick to multiply rows by ones."""
    if after > 1:
        value = b.sum_over(value, [2])
    return b.op("MatMul", b.constant(np.ones(before), np.float32), value)


def _some_positions(b: Backward, z: ir.Value, shape: tuple[int, ...], axis: int) -> ir.Value:
    """z at evenly spaced positions, all examples and units, so that about _SAMPLE elements remain."""
    excess = math.prod(shape) / _SAMPLE
    steps = [1] * len(shape)
    for a in reversed(range(1, len(shape))):
        if a != axis and excess > 1:
            steps[a] = min(shape[a], math.ceil(excess ** (1.0 / max(1, sum(k not in (0, axis) for k in range(a + 1))))))
            excess /= steps[a]
    cut = [a for a, step in enumerate(steps) if step > 1]
    if not cut:
        return z
    starts, ends = b.constant([0] * len(cut)), b.constant([shape[a] for a in cut])
    sample = b.op("Slice", z, starts, ends, b.constant(cut), b.constant([steps[a] for a in cut]))
    sample.shape = ir.Shape([-(-n // step) for n, step in zip(shape, steps, strict=True)])
    return sample
