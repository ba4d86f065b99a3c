"""Histograms counted inside the session: of a sample of each tensor, in equal bins between its extremes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.data import Arrays
from gradlint.session import SCALE, part, session_of

BINS = 32
_SAMPLE = 1 << 12  # elements of a tensor that are counted
_LARGEST = 3e38  # what is not below it is no number in float32
_DECADES = 6.0  # how far below its largest element the logarithm of a gradient is shown


View = Literal["plain", "log", "centered", "entropy"]


@dataclass(frozen=True)
class Wanted:
    """A tensor to count, by its name in the graph, as it stands or in another view.

    View `log`: log10 of the elements' size; `centered`: less their mean along the last axis; `entropy`: of the
    distributions along the last axis, as a share of that of a uniform one.
    """

    value: str
    shape: tuple[int, ...]
    view: View = "plain"


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins from `low` to `high`, of which 0 is an edge where it lies between.

    left_out: elements of the sample that are not finite, or zero where a logarithm was counted.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    left_out: int

    @classmethod
    def of(cls, numbers: np.ndarray, bins: int = BINS) -> Histogram | None:
        """The histogram of an array's elements; None where none of them is finite."""
        finite = numbers[np.isfinite(numbers)].astype(np.float64)
        if not finite.size:
            return None
        low, high = float(finite.min()), float(finite.max())
        width = max((high - low) / (bins - 1), 1e-6 * max(abs(low), abs(high)), 1e-30)
        first = math.floor(low / width)
        at = np.clip(np.floor(finite / width) - first, 0, bins - 1).astype(int)
        counts = np.bincount(at, minlength=bins)
        return cls(first * width, (first + bins) * width, tuple(counts.tolist()), numbers.size - finite.size)


def stride(shape: Sequence[int], most: int = _SAMPLE) -> int:
    """Every how-manieth element of a flattened tensor to take: no factor in common with the last axis, so that all of
    its positions take part."""
    step = max(1, math.prod(shape) // most)
    while step > 1 and math.gcd(step, shape[-1] if shape else 1) > 1:
        step -= 1
    return step


def measure(
    model: ir.Model, graph: ir.Graph, wanted: Sequence[Wanted], feeds: Arrays, threads: int
) -> list[Histogram | None]:
    """Run `graph` (it is changed) on the first part of `feeds`, and count. None where no element was finite."""
    values = {str(o.name): o for node in graph for o in node.outputs}
    b = Backward("eval", set(), prefix="histogram")
    outputs = _counts(b, values, wanted)
    b.emit(graph)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    session = session_of(model, graph, threads)
    given = {**feeds, SCALE: np.ones((), np.float32)}
    feed = {i.name: part(given[i.name], 0, i.shape) for i in session.get_inputs()}
    return _read(*session.run(None, feed))


def _counts(b: Backward, values: Mapping[str, ir.Value], wanted: Sequence[Wanted]) -> list[ir.Value]:
    """Count all samples at once: lowest edge and width of a bin per tensor, (N,), and counts, (N, BINS + 1), of which
    the last are those left out."""
    samples, rows = [], []
    for k, item in enumerate(wanted):
        sample, size = _sample(b, *_seen(b, values[item.value], item))
        if item.view == "log":
            sample = b.op("Mul", b.op("Log", b.op("Abs", sample)), b.scalar(1 / math.log(10), sample))
        samples.append(sample)
        rows.append(np.full(size, k))
    row = b.constant(np.concatenate(rows))
    x = b.op("Concat", *samples, axis=0)
    low, width = _bins(b, x, row, np.array([_DECADES if w.view == "log" else _LARGEST for w in wanted]))
    counted = b.op("Less", b.op("Abs", x), b.scalar(_LARGEST, x), dtype=ir.DataType.BOOL)
    at = b.op("Floor", b.op("Div", b.op("Sub", x, b.op("Gather", low, row)), b.op("Gather", width, row)))
    at = b.op("Clip", at, b.scalar(0, x), b.scalar(BINS - 1, x))
    at = b.op("Where", counted, at, b.scalar(BINS, x), dtype=x.dtype)
    at = b.op("Add", b.op("Cast", at, to=7, dtype=ir.DataType.INT64), b.op("Mul", row, b.constant(BINS + 1)))
    zeros = b.constant(np.zeros(len(wanted) * (BINS + 1)), np.float32)
    ones = b.constant(np.ones(sum(map(len, rows))), np.float32)
    counts = b.op("ScatterElements", zeros, at, ones, reduction="add")
    return [low, width, b.op("Reshape", counts, b.constant([len(wanted), BINS + 1]))]


def _seen(b: Backward, x: ir.Value, item: Wanted) -> tuple[ir.Value, tuple[int, ...]]:
    """The tensor in its view, and the view's shape."""
    last = b.constant([-1])
    if item.view == "centered":
        return b.op("Sub", x, b.op("ReduceMean", x, last, keepdims=1)), item.shape
    if item.view == "entropy":
        terms = b.op("Mul", x, b.op("Log", b.op("Max", x, b.scalar(1e-30, x))))
        uniform = b.scalar(-math.log(max(2, item.shape[-1])), x)
        return b.op("Div", b.op("ReduceSum", terms, last, keepdims=0), uniform), item.shape[:-1]
    return x, item.shape


def _sample(b: Backward, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, int]:
    """At most _SAMPLE elements of a tensor, flat, and how many they are."""
    size, step = math.prod(shape), stride(shape)
    flat = b.op("Reshape", x, b.constant([-1]))
    if step == 1 and size <= _SAMPLE:
        return flat, size
    size = min(-(-size // step), _SAMPLE)
    return b.op("Slice", flat, *(b.constant([n]) for n in (0, size * step, 0, step))), size


def _bins(b: Backward, x: ir.Value, row: ir.Value, spans: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """Lowest edge and width per row: over its finite elements, at most `spans` wide."""
    finite = b.op("Less", b.op("Abs", x), b.scalar(_LARGEST, x), dtype=ir.DataType.BOOL)
    ends = []
    for reduction, nothing in (("min", _LARGEST), ("max", -_LARGEST)):
        start = b.constant(np.full(len(spans), nothing), np.float32)
        known = b.op("Where", finite, x, b.scalar(nothing, x), dtype=x.dtype)
        ends.append(b.op("ScatterElements", start, row, known, reduction=reduction))
    low, high = ends
    low = b.op("Max", low, b.op("Sub", high, b.constant(spans, np.float32)))
    size = b.op("Max", b.op("Abs", low), b.op("Abs", high))
    width = b.op("Div", b.op("Sub", high, low), b.scalar(BINS - 1, x))
    width = b.op("Max", width, b.op("Mul", size, b.scalar(1e-6, x)), b.scalar(1e-30, x))
    return b.op("Mul", b.op("Floor", b.op("Div", low, width)), width), width


def _read(low: np.ndarray, width: np.ndarray, counts: np.ndarray) -> list[Histogram | None]:
    found: list[Histogram | None] = []
    for first, step, row in zip(low.tolist(), width.tolist(), counts.astype(int).tolist(), strict=True):
        known = sum(row[:-1]) and math.isfinite(first) and math.isfinite(step)
        found.append(Histogram(first, first + BINS * step, tuple(row[:-1]), row[-1]) if known else None)
    return found
