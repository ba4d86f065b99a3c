"""Facts from a weight's numbers: size, spread, duplicates, the scale that its layer's activation asks for.

Weights may be memory-mapped and large: they are read in blocks that fit the cache, and their pages are given back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.fact_table import Fact
from gradlint.graph import attribute, constant_array, dims, op
from gradlint.init_fit import Fit, best_fit
from gradlint.load import release
from gradlint.parameters import WeightUse
from gradlint.patterns import NORMALISATIONS, array_behind, divides_by_deviation

_BLOCK = 1 << 18  # elements read at a time
_ROWS_BLOCK = 1 << 24  # elements of a matrix copied at a time: 64 MB
_NEAR_ZERO, _OVERSIZED = 1e-5, 5.0
_SAME = 1e-6  # 1 - cosine under which two units count as the same
_PROJECTIONS = 8
_MOST_UNITS = 1 << 16

# Operators whose weights are kernels, with the axis of the output units: of the stored weight as the layer reads it.
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


@dataclass(frozen=True)
class Spread:
    """Statistics of the finite elements; the rest are counted."""

    mean: float
    std: float
    rms: float
    largest: float
    constant: bool
    near_zero: float
    oversized: float
    non_finite: int
    elements: int


def spread(array: np.ndarray) -> Spread:
    """One pass over a float array of any shape, in blocks."""
    count = lost = near = over = 0
    total = square = 0.0
    low, high = math.inf, -math.inf
    for block in _blocks(array):
        with np.errstate(all="ignore"):
            energy = float(np.dot(block, block))
        if not math.isfinite(energy):
            finite = block[np.isfinite(block)].astype(np.float64)
            lost += block.size - finite.size
            block, energy = finite, float(np.dot(finite, finite))
            if not block.size:
                continue
        count += block.size
        total += float(block.sum())
        square += energy
        least, most = float(block.min()), float(block.max())
        low, high = min(low, least), max(high, most)
        if least < _NEAR_ZERO and most > -_NEAR_ZERO:
            near += int(np.count_nonzero(np.abs(block) < _NEAR_ZERO))
        if most > _OVERSIZED or least < -_OVERSIZED:
            over += int(np.count_nonzero(np.abs(block) > _OVERSIZED))
    if not count:
        return Spread(math.nan, math.nan, math.nan, math.nan, False, math.nan, math.nan, lost, array.size)
    mean = total / count
    std = 0.0 if low == high else math.sqrt(max(0.0, square / count - mean**2))
    largest = max(abs(low), abs(high))
    return Spread(
        mean, std, math.sqrt(square / count), largest, low == high, near / count, over / count, lost, array.size
    )


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Flat pieces in single or double precision."""
    flat = array.reshape(-1)
    for k in range(0, flat.size, _BLOCK):
        block = flat[k : k + _BLOCK]
        yield block if block.dtype in (np.float32, np.float64) else block.astype(np.float32)


# -- what a weight is -------------------------------------------------------------------------------------------------


def role(use: WeightUse) -> str:
    """What a weight is to its layer."""
    kind, index = op(use.layer), use.index
    if kind in NORMALISATIONS:
        return "gamma" if index == 1 else "beta"
    if kind == "Gather":
        return "embedding"
    if kind in _RECURRENT:
        return {1: "kernel", 2: "recurrent"}.get(index, "bias")
    if kind in ("Add", "Sub") or (kind in ("Conv", "Gemm", "ConvTranspose") and index == 2):
        return "bias" if max(dims(use.value) or (1,)) == math.prod(dims(use.value) or (1,)) else "position"
    if kind == "PRelu":
        return "gamma"
    if kind in ("Mul", "Div"):
        return "gamma" if any(_normalises(v) for v in use.layer.inputs) else "residual-scale"
    return "kernel"


def _normalises(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and divides_by_deviation(node)


# -- geometry ----------------------------------------------------------------------------------------------------------


def fans(layer: ir.Node, index: int) -> tuple[float, float] | None:
    """(fan_in, fan_out): kernel elements per output unit and per input unit; None for what is no kernel.

    An embedding passes one row at a time: fan_in 1, fan_out its width. Gates of a recurrent operator count apart.
    """
    shape = dims(layer.inputs[index])
    kind = op(layer)
    if shape is None or len(shape) < 2:
        return None
    if kind == "Conv" and index == 1:
        window = math.prod(shape[2:])
        return shape[1] * window, shape[0] * window / (attribute(layer, "group", 1) or 1)
    if kind == "ConvTranspose" and index == 1:
        window = math.prod(shape[2:])
        return shape[0] * window / (attribute(layer, "group", 1) or 1), shape[1] * window
    if kind == "Gemm" and index < 2:
        rows_in = bool(attribute(layer, "transB", 0)) if index == 1 else not attribute(layer, "transA", 0)
        return (shape[1], shape[0]) if rows_in else (shape[0], shape[1])
    if kind == "MatMul":
        return (shape[-2], shape[-1]) if index == 1 else (shape[-1], shape[-2])
    if kind in _RECURRENT and index in (1, 2):
        return shape[-1], attribute(layer, "hidden_size", 0) or shape[-2]
    if kind == "Gather" and index == 0:
        return 1, shape[-1]
    return None


def unit_axis(use: WeightUse) -> int | None:
    """The axis of the stored weight along which the output units lie; None where moves have mixed it up."""
    layer, kind = use.layer, op(use.layer)
    value = layer.inputs[use.index]
    shape = dims(value)
    if shape is None or fans(layer, use.index) is None or kind == "Gather":
        return None
    rank = len(shape)
    axis = {"Conv": 0, "ConvTranspose": 1}.get(kind, rank - 1 if use.index == 1 else rank - 2)
    if kind == "Gemm":
        flipped = attribute(layer, "transB" if use.index == 1 else "transA", 0)
        axis = int(use.index == 1) ^ int(bool(flipped))
    if kind in _RECURRENT:
        axis = rank - 2
    while value is not use.value:
        node = value.producer() if value is not None else None
        if node is None:
            return None
        moved = _before(node, axis)
        if moved is None:
            return None
        axis = moved
        value = next((v for v in node.inputs if array_behind(v) is use.value), None)
    return axis


def _before(node: ir.Node, axis: int) -> int | None:
    """The axis of a move's input that becomes `axis` of its output."""
    into, out = dims(node.inputs[0]), dims(node.outputs[0])
    if op(node) == "Transpose":
        perm = attribute(node, "perm")
        return perm[axis] if perm else len(out or ()) - 1 - axis
    if into is None or out is None:
        return None
    if op(node) in ("Unsqueeze", "Squeeze", "Reshape", "Flatten"):
        for k, size in enumerate(into):  # the axis of the same size with as many elements before it
            if size == out[axis] and math.prod(into[:k]) == math.prod(out[:axis]) and size > 1:
                return k
        return None
    return axis if len(into) == len(out) else None


# -- duplicates --------------------------------------------------------------------------------------------------------


def duplicate_units(matrix: np.ndarray, axis: int, bias: np.ndarray | None = None) -> int:
    """Units (slices along `axis`, with their bias) whose direction has cosine > 1 - 1e-6 with another's.

    Directions are compared through a few random projections, sorted; what comes close is then compared in full. Units
    of fewer than four numbers point the same way by chance: they count only where they are equal. All-zero units don't
    count.
    """
    units = matrix.shape[axis]
    if units < 2 or units > _MOST_UNITS:
        return 0
    rows = np.moveaxis(matrix, axis, 0)
    rows = rows.reshape(units, -1) if axis == 0 or matrix.ndim > 2 else rows
    offset = None if bias is None or bias.size != units else bias.reshape(-1)
    if rows.shape[1] + (offset is not None) < 4:
        whole = rows if offset is None else np.column_stack([rows, offset])
        whole = whole[np.any(whole != 0, axis=1)]
        _, counts = np.unique(whole, axis=0, return_counts=True)
        return int(counts[counts > 1].sum())
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((rows.shape[1] + 1, _PROJECTIONS), dtype=np.float32)
    lengths = np.empty(units)
    seen: np.ndarray = np.empty((units, _PROJECTIONS), np.float32)
    step = max(1, _ROWS_BLOCK // rows.shape[1])
    for k in range(0, units, step):
        block = rows[k : k + step]
        block = block if block.dtype == np.float32 else block.astype(np.float32)
        shift = None if offset is None else offset[k : k + step].astype(np.float32)
        seen[k : k + step] = block @ directions[:-1]
        square = np.einsum("ij,ij->i", block, block)
        if shift is not None:
            seen[k : k + step] += shift[:, None] * directions[-1]
            square = square + shift**2
        lengths[k : k + step] = np.sqrt(square)
    alive = np.flatnonzero((lengths > 0) & np.isfinite(lengths))
    seen = seen[alive] / lengths[alive, None].astype(np.float32)
    same = _close_pairs(seen, lambda a, b: _cosine_above(rows, offset, alive[a], alive[b]))
    return int(np.count_nonzero(same))


def _close_pairs(points: np.ndarray, confirm: object) -> np.ndarray:
    """Which points have another one nearby, in a sorted order of their first coordinate, confirmed in full."""
    assert callable(confirm)
    order = np.argsort(points[:, 0], kind="stable")
    ranked = points[order]
    same = np.zeros(len(points), bool)
    reach = 4 * math.sqrt(2 * _SAME)  # four standard deviations of a projection of the difference
    for shift in range(1, min(len(points), 33)):
        near = np.flatnonzero(
            (ranked[shift:, 0] - ranked[:-shift, 0] < reach) & ~(same[order[shift:]] & same[order[:-shift]])
        )
        if not near.size:
            if shift > 1 and not np.any(ranked[shift:, 0] - ranked[:-shift, 0] < reach):
                break
            continue
        distance = np.square(ranked[near + shift] - ranked[near]).mean(axis=1)
        near = near[distance < 8 * _SAME]
        if near.size:
            a, b = order[near], order[near + shift]
            hit = confirm(a, b)
            same[a[hit]] = same[b[hit]] = True
    return same


def _cosine_above(rows: np.ndarray, offset: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of pairs of rows, and with their bias too, > 1 - 1e-6, in double precision, in blocks.

    Both: a bias of one beside weights that start near zero (a spatial gate) would make all rows alike.
    """
    found = np.zeros(len(a), bool)
    step = max(1, _ROWS_BLOCK // 4 // max(1, rows.shape[1]))
    for k in range(0, len(a), step):
        left, right = (rows[i[k : k + step]].astype(np.float64) for i in (a, b))
        found[k : k + step] = _parallel(left, right)
        if offset is not None:
            left = np.column_stack([left, offset[a[k : k + step]]])
            right = np.column_stack([right, offset[b[k : k + step]]])
            found[k : k + step] &= _parallel(left, right)
    return found


def _parallel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    dot = np.einsum("ij,ij->i", left, right)
    size = np.sqrt(np.einsum("ij,ij->i", left, left) * np.einsum("ij,ij->i", right, right))
    return dot > (1 - _SAME) * size


# -- initialisation ----------------------------------------------------------------------------------------------------

# gain^2 that keeps the forward scale (torch.nn.init.calculate_gain; He et al. 2015). SELU's fixed point is that of
# LeCun's 1 / fan_in (Klambauer et al. 2017); smooth relatives of ReLU are started like it.
_GAINS = {
    "Relu": 2.0, "Gelu": 2.0, "Silu": 2.0, "Mish": 2.0, "HardSwish": 2.0, "PRelu": 2.0, "LeakyRelu": 2.0, "Elu": 2.0,
    "Celu": 2.0, "ThresholdedRelu": 2.0, "Clip": 2.0, "Tanh": 25 / 9,
}  # fmt: skip


def gain(activation: str, alpha: float = 0.0) -> tuple[float, str]:
    """gain^2 of an activation (`alpha`: the slope of a LeakyRelu's negative side), and the scheme named after it."""
    square = _GAINS.get(activation, 1.0) / (1 + alpha**2)
    scheme = "LeCun" if activation == "Selu" else "He" if activation in _GAINS and activation != "Tanh" else "Xavier"
    return square, scheme


def weight_facts(
    use: WeightUse,
    *,
    role: str,
    bias: ir.Value | None = None,
    activation: str = "Identity",
    alpha: float = 0.0,
    normalised: bool = False,
) -> dict[str, Fact]:
    """Facts of one weight in one layer.

    bias: the layer's own; activation: what follows the layer, alpha the slope of a LeakyRelu's negative side;
    normalised: a normalisation follows, and takes any scale away (then init_ratio and init_factor are absent).
    """
    array = constant_array(use.value)
    assert array is not None
    numbers = spread(array)
    sizes = fans(use.layer, use.index)
    facts: dict[str, Fact] = {
        "elements": numbers.elements,
        "weight_rms": numbers.rms,
        "weight_mean": numbers.mean,
        "weight_std": numbers.std,
        "weight_max": numbers.largest,
        "distinct_values": 1 if numbers.constant else 2,
        "near_zero_share": numbers.near_zero,
        "oversized_share": numbers.oversized,
        "non_finite": numbers.non_finite,
        "op_type": op(use.layer),
    }
    if sizes is not None:
        facts |= {"fan_in": sizes[0], "fan_out": sizes[1]}
    if role in ("kernel", "recurrent") and sizes is not None:
        facts |= _unit_facts(use, array, bias, numbers)
        facts |= _fit_facts(best_fit(array, sizes, numbers.mean, numbers.rms))
        if role == "kernel" and op(use.layer) not in _RECURRENT:
            facts |= _scale_facts(numbers.rms, sizes[0], activation, alpha, normalised)
        else:
            facts |= {"init_scheme": "orthogonal", "init_std": math.sqrt(1 / max(sizes))}
    release(use.value.const_value)
    return facts


def _unit_facts(use: WeightUse, array: np.ndarray, bias: ir.Value | None, numbers: Spread) -> dict[str, Fact]:
    axis = unit_axis(use)
    if axis is None or numbers.largest == 0 or numbers.non_finite:
        return {}
    units, groups = array.shape[axis], int(attribute(use.layer, "group", 1) or 1)
    offset = constant_array(bias)
    if numbers.constant and bias is None:
        same = units if units > groups else 0
    elif groups == 1 or axis != 0 or units % groups:
        same = duplicate_units(array, axis, offset)
    else:  # units of different groups read different channels
        size = units // groups
        parts = [slice(k, k + size) for k in range(0, units, size)] if size > 1 else []
        same = sum(duplicate_units(array[p], 0, None if offset is None else offset[p]) for p in parts)
    return {"duplicate_units": same, "duplicate_share": same / units}


def _fit_facts(fit: Fit | None) -> dict[str, Fact]:
    return {} if fit is None else {"init_fit": fit.name, "init_fit_p": fit.p}


def _scale_facts(rms: float, fan_in: float, activation: str, alpha: float, normalised: bool) -> dict[str, Fact]:
    square, scheme = gain(activation, alpha)
    facts: dict[str, Fact] = {"init_scheme": scheme, "init_std": math.sqrt(square / fan_in)}
    if normalised or not rms > 0:
        return facts
    ratio = fan_in * rms**2 / square
    return facts | {"init_ratio": ratio, "init_factor": 1 / math.sqrt(ratio)}


def trained_share(facts: Sequence[Mapping[str, Fact]], least: int = 500) -> float | None:
    """Share of the kernels of at least `least` elements that match no initial distribution; None where there are
    none."""
    matches = [
        p > 0.05
        for f in facts
        if isinstance(p := f.get("init_fit_p"), float) and float(f.get("elements") or 0) >= least
    ]
    return 1 - sum(matches) / len(matches) if matches else None


def norm_facts(node: ir.Node) -> dict[str, Fact]:
    """Running variance, epsilon and scale of a normalisation."""
    arrays = [constant_array(array_behind(v)) for v in node.inputs[1:5]]
    gamma = arrays[0] if arrays else None
    eps = float(attribute(node, "epsilon", 1e-5))
    facts: dict[str, Fact] = {"norm_eps": eps}
    if gamma is not None and gamma.size:
        facts["gamma_near_zero"] = float(np.mean(np.abs(gamma.astype(np.float64)) < 1e-6))
    if op(node) == "BatchNormalization" and len(arrays) == 4 and arrays[3] is not None and gamma is not None:
        var = arrays[3].astype(np.float64)
        facts["running_var_min"] = float(var.min())
        facts["norm_scale_max"] = float(np.max(np.abs(gamma.astype(np.float64)) / np.sqrt(np.maximum(var, 0) + eps)))
    return facts
