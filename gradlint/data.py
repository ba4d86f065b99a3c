"""The examples the probe runs on: read from files, or drawn to fit the model's inputs.

Files are foreign: every array is checked against the model (name, shape, dtype, finite) before anything runs.
"""

from __future__ import annotations

import difflib
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from gradlint.exceptions import DataError
from gradlint.graph import FLOATS, dims, op
from gradlint.lookups import id_limit, table_rows

Arrays = dict[str, np.ndarray]
_CLIP = 6.0  # standard deviations: the declared range of synthetic floats
IGNORED = -100  # a label that doesn't count: padding
_MOST = 1 << 30  # elements of an input that are made up, or read from an archive


@dataclass(frozen=True)
class Data:
    """Arrays by input name, targets by output name ("" where the file has one `target`), and where they came from."""

    inputs: Arrays
    targets: Arrays = field(default_factory=dict)
    origin: str = "synthetic"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_data(
    given: str | Path | Mapping[str, np.ndarray], inputs: Mapping[str, ir.Value], outputs: tuple[str, ...]
) -> Data:
    """Read .npz, .npy, a folder of .npy, or an ONNX test_data_set folder of .pb; or take arrays by name.

    inputs: the model's inputs by name; outputs: names of its outputs. Raises DataError.
    """
    if isinstance(given, Mapping):
        return _sorted({str(name): np.asarray(array) for name, array in given.items()}, inputs, outputs, "given arrays")
    path = Path(given)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    arrays = _folder(path, inputs, outputs) if path.is_dir() else _file(path, inputs)
    return _sorted(arrays, inputs, outputs, str(path))


def _sorted(arrays: Arrays, inputs: Mapping[str, ir.Value], outputs: tuple[str, ...], origin: str) -> Data:
    """Inputs and targets told apart by their names."""
    given: Arrays = {}
    targets: Arrays = {}
    for name, array in arrays.items():
        if name in inputs:
            given[name] = array
        elif name == "target" or name.startswith("target."):
            targets[name.removeprefix("target").removeprefix(".")] = array
        else:
            known = {n.lower(): n for n in [*inputs, "target"]}
            near = difflib.get_close_matches(name.lower(), known, 1)
            hint = f"; did you mean {known[near[0]]!r}?" if near else ""
            raise DataError(f"{origin}: the model has no input {name!r} (inputs: {', '.join(inputs)}){hint}")
    for name in targets:
        if name and name not in outputs:
            raise DataError(
                f"{origin}: 'target.{name}': the model has no output {name!r} (outputs: {', '.join(outputs)})"
            )
    return Data(given, targets, origin)


def _file(path: Path, inputs: Mapping[str, ir.Value]) -> Arrays:
    try:
        loaded = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{path}: not a readable .npz or .npy file of numbers") from None
    if isinstance(loaded, np.ndarray):
        if len(inputs) != 1:
            raise DataError(
                f"{path}: a .npy file fits a model of one input; this one has {', '.join(inputs)}: use .npz"
            )
        return {next(iter(inputs)): loaded}
    unpacked = sum(entry.file_size for entry in loaded.zip.infolist())
    if unpacked > 4 * _MOST:
        raise DataError(f"{path}: the archive holds {unpacked} bytes: a short batch is enough")
    try:
        return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path}: the archive is damaged ({str(error).splitlines()[0]})") from None


def _folder(path: Path, inputs: Mapping[str, ir.Value], outputs: tuple[str, ...]) -> Arrays:
    """A folder of NAME.npy, or an ONNX test data set: input_K.pb in the order of the model's inputs."""
    tensors = sorted(path.glob("*.pb"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)] or [0])
    if not tensors:
        found = sorted(path.glob("*.npy"))
        if not found:
            raise DataError(f"{path}: no .npy and no .pb files in this folder")
        return {p.stem: next(iter(_file(p, {"_": ir.Value()}).values())) for p in found}
    arrays: Arrays = {}
    names = list(inputs)
    for k, file in enumerate(p for p in tensors if p.name.startswith("input_")):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{file}: keeps its data in another file: refused")
            array = numpy_helper.to_array(tensor)
        except (DecodeError, ValueError, TypeError) as error:
            raise DataError(f"{file}: not a readable tensor ({str(error).splitlines()[0]})") from None
        name = tensor.name if tensor.name in inputs else names[k] if k < len(names) else tensor.name
        arrays[name] = array
    return arrays


def check_inputs(data: Data, inputs: Mapping[str, ir.Value]) -> Data:
    """Every array of the right dtype and rank, finite, ids in range; returns it with safe casts done."""
    checked = {}
    for name, array in data.inputs.items():
        value = inputs[name]
        if value.dtype == ir.DataType.STRING:
            if array.dtype.kind not in "US":
                raise DataError(f"{data.origin}: input {name!r} must be text, got {array.dtype.name}")
            checked[name] = array.astype(object)
        elif value.dtype is not None and value.dtype not in FLOATS:
            expected = value.dtype.numpy()
            if array.dtype.kind not in "iub" or (expected == np.bool_) != (array.dtype == np.bool_):
                raise DataError(
                    f"{data.origin}: input {name!r} must be {np.dtype(expected).name}, got {array.dtype.name}"
                )
            low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
            if (count := table_rows(value)) is not None and not -count <= low <= high < count:
                raise DataError(f"{data.origin}: input {name!r} must lie in [0, {count}), got {low} to {high}")
            checked[name] = array.astype(expected)
            if (checked[name] != array).any():
                kind = np.dtype(expected).name
                raise DataError(f"{data.origin}: input {name!r} must be {kind}, which does not hold {low} to {high}")
        else:
            if array.dtype.kind not in "fiu":
                raise DataError(f"{data.origin}: input {name!r} must be a float array, got {array.dtype.name}")
            if not np.isfinite(array).all():
                bad = int(array.size - np.isfinite(array).sum())
                raise DataError(f"{data.origin}: input {name!r} holds {bad} non-finite values")
            with np.errstate(over="ignore"):
                checked[name] = array.astype(np.float32)
            if not np.isfinite(checked[name]).all():
                largest = float(np.abs(array).max())
                raise DataError(f"{data.origin}: input {name!r} holds values that float32 does not ({largest:.3g})")
        if not array.size and array.ndim and not array.shape[0]:
            raise DataError(f"{data.origin}: input {name!r} holds no example: its shape is {array.shape}")
        if value.shape is not None and array.ndim != len(value.shape):
            shape = "(" + ", ".join(str(d if isinstance(d, int) else d.value or "?") for d in value.shape) + ")"
            raise DataError(f"{data.origin}: input {name!r} must have shape {shape}, got {array.shape}")
    return Data(checked, data.targets, data.origin)


# -- drawing -----------------------------------------------------------------------------------------------------------

_STATE = re.compile(
    r"(^|[._])(h|c|h0|c0|hidden|state|cell|past|cache|mem|memory)([._0-9n]|$)|past_key|past_value", re.I
)
_RATE = re.compile(r"^(sr|sample_?rate|sampling_?rate|rate)$", re.I)


def synthetic(graph: ir.Graph, seed: int, given: Mapping[str, np.ndarray]) -> Arrays:
    """Arrays for the inputs not `given`, by the kind of each input; dimensions of `graph` must be bound.

    Floats: standard normal clipped to 6 (images: 1/f-correlated, since white noise averages out in a deep CNN);
    integers that index a table: uniform over its rows; masks: ones; states and caches: zeros; lengths: the longest.
    Raises DataError for an input whose size is not known, or beyond measure.
    """
    arrays: Arrays = {}
    for k, value in enumerate(graph.inputs):
        name = str(value.name)
        if name in given:
            continue
        shape = dims(value)
        if shape is None or value.dtype is None:
            raise DataError(f"input {name!r} has no known size or type: give --input-shape {name}:... or --data")
        if math.prod(shape) > _MOST:
            raise DataError(f"input {name!r} of shape {shape} is too large to be made up")
        rng = np.random.default_rng([seed, k])
        arrays[name] = np.asarray(_draw(value, name, shape, rng))  # numpy gives a number for shape ()
    return arrays


def setting(value: ir.Value, seed: int, given: float | None) -> np.ndarray:
    """The constant for an input of one integer or truth: as given, else as `synthetic` would draw it."""
    assert value.dtype is not None
    shape = (1,) * len(value.shape or ())
    if given is not None:
        return np.full(shape, given, value.dtype.numpy())
    return _draw(value, str(value.name), shape, np.random.default_rng(seed))


def _draw(value: ir.Value, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    assert value.dtype is not None
    kind = value.dtype.numpy()
    if value.dtype in FLOATS:
        if _STATE.search(name) or _feeds_state(value):
            return np.zeros(shape, np.float32)
        if "mask" in name.lower():
            return np.ones(shape, np.float32)
        if (ids := id_limit(value)) is not None:
            return _ids(ids, shape, rng).astype(np.float32)
        if len(shape) == 4 and min(shape[2:]) >= 8 and shape[1] <= 16:
            return _image(shape, rng)
        return np.clip(rng.standard_normal(shape), -_CLIP, _CLIP).astype(np.float32)
    if kind == np.bool_ or "mask" in name.lower():
        return np.ones(shape, kind)
    if _RATE.search(name):
        return np.full(shape, 16000, kind)
    if (ids := id_limit(value)) is not None:
        return _ids(ids, shape, rng).astype(kind)
    if "position" in name.lower() and len(shape) >= 1:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(kind)
    if "len" in name.lower() and len(shape) <= 1:
        return np.full(shape, _longest(value), kind)
    return np.zeros(shape, kind) if "type" in name.lower() else np.ones(shape, kind)


def _ids(count: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(min(2, count - 1), count, shape)  # 0 and 1 are often padding


def _image(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Noise with the 1/f amplitude spectrum of natural images (Field 1987), mean 0 and variance 1 per image."""
    height, width = shape[2:]
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij"))
    frequency[0, 0] = 1.0 / max(height, width)
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / frequency
    image = np.fft.irfft2(spectrum, s=(height, width))
    scale = image.std(axis=(0, 2, 3), keepdims=True)
    mean = image.mean(axis=(0, 2, 3), keepdims=True)
    return np.clip((image - mean) / np.where(scale > 0, scale, 1.0), -_CLIP, _CLIP).astype(np.float32)


def _feeds_state(value: ir.Value) -> bool:
    return any(op(u.node) in ("LSTM", "GRU", "RNN") and u.idx >= 5 for u in value.uses())


def _longest(value: ir.Value) -> int:
    """The longest axis but the first over the graph's other inputs: what a length counts."""
    graph = value.graph
    sizes = [d for v in (graph.inputs if graph is not None else ()) if v is not value for d in (dims(v) or ())[1:]]
    return max(sizes, default=1)


# -- targets -----------------------------------------------------------------------------------------------------------


def linear_targets(shapes: Mapping[str, tuple[int, ...]], data: Data, seed: int) -> Arrays:
    """The linear loss's targets by output: the data's own, else standard normal."""
    found: Arrays = {}
    for k, (name, shape) in enumerate(shapes.items()):
        own = data.targets.get(name, data.targets.get("") if k == 0 or len(shapes) == 1 else None)
        if own is not None and own.dtype.kind == "f":
            if own.shape != shape:
                raise DataError(f"{data.origin}: target of output {name!r} must have shape {shape}, got {own.shape}")
            if not np.isfinite(own).all():
                raise DataError(f"{data.origin}: target of output {name!r} holds non-finite values")
            found[name] = own.astype(np.float32)
        else:
            rng = np.random.default_rng([seed, 1000 + k])
            found[name] = rng.standard_normal(shape).astype(np.float32)
    return found


def labels(target: np.ndarray, logits: tuple[int, ...], origin: str, *, loss: str) -> np.ndarray:
    """The target of a loss other than linear, checked against the logits' shape (class axis last).

    Labels that don't count (PyTorch's ignore_index) become the number of classes.
    """
    if loss != "cross-entropy":
        if not _same_sizes(target.shape, logits):
            raise DataError(f"{origin}: the target of {loss} must have shape {logits}, got {target.shape}")
        if target.dtype.kind not in "fiub":
            raise DataError(f"{origin}: the target of {loss} must be numbers, got {target.dtype.name}")
        if not np.isfinite(target).all():
            raise DataError(f"{origin}: the target holds non-finite values")
        if loss == "bce" and (target.min(initial=0) < 0 or target.max(initial=1) > 1):
            raise DataError(f"{origin}: the target of bce must lie in [0, 1], got {target.min()} to {target.max()}")
        return target.reshape(logits).astype(np.float32)
    if target.dtype.kind not in "iu":
        raise DataError(f"{origin}: cross-entropy needs integer class labels, got {target.dtype.name}")
    if not _same_sizes(target.shape, logits[:-1]):
        raise DataError(
            f"{origin}: cross-entropy needs labels of shape {logits[:-1]} for logits {logits}, got {target.shape}"
        )
    classes = logits[-1]
    told = target[target != IGNORED]
    if not told.size:
        raise DataError(f"{origin}: every label is {IGNORED}: there is no loss")
    if told.min() < 0 or told.max() >= classes:
        raise DataError(
            f"{origin}: labels must lie in [0, {classes}), or be {IGNORED} (ignored), got {told.min()} to {told.max()}"
        )
    return np.where(target == IGNORED, classes, target).reshape(logits[:-1]).astype(np.int64)


def _same_sizes(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Are two shapes the same, but for axes of one element?"""
    return [n for n in one if n != 1] == [n for n in other if n != 1]
