"""Read an ONNX file: the one place that touches foreign model bytes.

Files are hostile: paths may climb, sizes may lie, graphs may loop. Everything that is wrong with a file becomes one
`ModelError` line. Nothing is executed; external data is memory-mapped and never read whole.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from gradlint.exceptions import ModelError

OPSETS = range(7, 29)

# How each format is recognised (offset, magic), and how to get ONNX out of it.
_FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive (a PyTorch .pt/.pth or Keras .keras file?)", "torch.onnx.export or tf2onnx"),
    (
        0,
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file (Keras .h5?)",
        "python -m tf2onnx.convert --keras MODEL.h5 --output MODEL.onnx",
    ),
    (4, b"TFL3", "a TensorFlow Lite model", "python -m tf2onnx.convert --tflite MODEL.tflite --output MODEL.onnx"),
    (4, b"ORTM", "an onnxruntime .ort model", "the .onnx file it was converted from"),
    (0, b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)", "torch.onnx.export(model, args, 'model.onnx')"),
    (0, b"\x80\x04", "a Python pickle", "torch.onnx.export(model, args, 'model.onnx')"),
    (0, b"\x93NUMPY", "a NumPy array", "the model itself; arrays go to --data"),
    (8, b'{"', "a safetensors file (weights without a graph)", "torch.onnx.export on the model that reads it"),
    (0, b"GGUF", "a GGUF file (weights without a graph)", "torch.onnx.export on the original model"),
)


@dataclass(frozen=True)
class Source:
    """A model as it came: the IR with lazy tensors, and what the report says about the file."""

    model: ir.Model
    path: str
    sha256: str
    nodes: int
    opset: int


class MappedTensor(ir.ExternalTensor):
    """External data, memory-mapped. Links are allowed where the file or its target lies in the model's folder.

    (A Hugging Face cache is all symbolic links, and package managers hard-link; onnx_ir refuses both.)
    """

    def _check_path_containment(self) -> None:
        _inside(Path(self.base_dir), str(self.location), str(self.name))


def read(path: str | os.PathLike[str]) -> Source:
    """Read and validate one model file.

    Raises ModelError for anything that is not a sound ONNX graph of opset 7 to 28.
    """
    path = Path(path)
    data = _bytes(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{path}: not a valid ONNX protobuf: the file is truncated or of another format") from None
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    del data
    model = from_proto(proto, str(path), path.parent, size)
    return source(model, str(path), digest, proto)


def source(model: ir.Model, path: str, digest: str, proto: onnx.ModelProto) -> Source:
    """A source with what the file itself says (the canonical form changes nodes and opset)."""
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return Source(model, path, digest, _count_nodes(proto.graph), opset)


def from_proto(proto: onnx.ModelProto, where: str, folder: Path, size: int | None = None) -> ir.Model:
    """Validate a parsed model and turn it into IR.

    `folder` holds its external data, `where` names it in errors, `size` is the file's length in bytes where there is
    one.
    """
    _check_header(proto, where)
    inside = sum(_check_tensor(tensor, where, folder) for tensor in _tensors(proto))
    if size is not None and inside > size:
        raise ModelError(f"{where}: the tensors need {inside} bytes, the file has {size}: the file is damaged")
    _check_names(proto.graph, where)
    _check_types(proto.graph, where)
    for graph in (proto.graph, *proto.functions):
        _check_bodies(graph, where)
    try:
        model = ir.from_proto(proto)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what the reader says around it quotes the file
            cause = cause.__cause__
        raise ModelError(f"{where}: the graph can't be read: {_line(cause)}") from None
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError as error:
        raise ModelError(f"{where}: the graph has a cycle: {_line(error)}") from None
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _own(value.const_value, folder)
    for node in chain(model.graph.all_nodes(), *(f.all_nodes() for f in model.functions.values())):
        for name, told in node.attributes.items():
            if told.type == ir.AttributeType.TENSOR and not told.is_ref():
                node.attributes[name] = ir.AttrTensor(name, _own(told.as_tensor(), folder))
    return model


def _own(tensor: ir.TensorProtocol, folder: Path) -> ir.TensorProtocol:
    """A tensor that keeps no protobuf alive: a part of one keeps the whole, all its weights."""
    if isinstance(tensor, ir.ExternalTensor):
        return _mapped(tensor, folder)
    if isinstance(tensor, ir.TensorProtoTensor):
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    return tensor


def release(tensor: ir.TensorProtocol | None) -> None:
    """Give back the pages of a memory-mapped tensor: they count as resident memory once read."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, mmap.mmap):
        raw.madvise(mmap.MADV_DONTNEED)


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.onnx"))
        hint = f"; did you mean {path / inside[0]}?" if inside else ": give the .onnx file"
        raise ModelError(f"{path}: is a directory{hint}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from None
    if not data:
        raise ModelError(f"{path}: the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path}: a Git LFS pointer, not the model: run `git lfs pull` (GitHub Actions: checkout with `lfs: true`)"
        )
    for offset, magic, what, remedy in _FOREIGN:
        if data[offset : offset + len(magic)] == magic:
            raise ModelError(f"{path}: {what}, not ONNX: export it first ({remedy})")
    return data


def _check_header(proto: onnx.ModelProto, where: str) -> None:
    if not proto.opset_import and not proto.graph.node:
        raise ModelError(f"{where}: not an ONNX model: no graph and no opset in it")
    if not proto.graph.node:
        raise ModelError(f"{where}: the graph is empty: there is nothing to analyse")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is not None and opset not in OPSETS:
        raise ModelError(
            f"{where}: opset {opset} is not supported ({OPSETS[0]} to {OPSETS[-1]}): "
            "convert it with onnx.version_converter, or export it again"
        )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in the model: initializers and Constant attributes, in subgraphs and functions too."""
    graphs = [proto.graph]
    nodes = [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


_BITS: dict[int, int] = {
    onnx.TensorProto.BOOL: 8, onnx.TensorProto.UINT8: 8, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT16: 16,
    onnx.TensorProto.INT16: 16, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16, onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.INT32: 32, onnx.TensorProto.UINT32: 32, onnx.TensorProto.DOUBLE: 64, onnx.TensorProto.INT64: 64,
    onnx.TensorProto.UINT64: 64, onnx.TensorProto.COMPLEX64: 64, onnx.TensorProto.COMPLEX128: 128,
    onnx.TensorProto.FLOAT8E4M3FN: 8, onnx.TensorProto.FLOAT8E4M3FNUZ: 8, onnx.TensorProto.FLOAT8E5M2: 8,
    onnx.TensorProto.FLOAT8E5M2FNUZ: 8, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}  # fmt: skip


def _check_tensor(tensor: onnx.TensorProto, where: str, folder: Path) -> int:
    """The stored size must be what dims and data type say: a short buffer is a truncated file or a lie.

    Returns the bytes the tensor must take inside the file.
    """
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where}: tensor {tensor.name!r} has a negative dimension")
    bits = _BITS.get(tensor.data_type)
    expected = None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, expected, where, folder)
    elif tensor.HasField("raw_data"):
        # Looking at raw_data copies it: large tensors are checked by their sum against the file's size.
        if expected is not None and expected <= 1 << 16 and len(tensor.raw_data) != expected:
            raise ModelError(
                f"{where}: tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes, its shape says {expected}: "
                "the file is damaged"
            )
        return expected or 0
    elif expected:
        stored = sum(
            len(getattr(tensor, f)) for f in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        )
        if stored == 0:
            raise ModelError(f"{where}: tensor {tensor.name!r} has a shape but no data: the file is damaged")
    return 0


def _check_external(tensor: onnx.TensorProto, expected: int | None, where: str, folder: Path) -> None:
    info = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(info.get("offset") or 0)
        length = int(info["length"]) if info.get("length") else expected or 0
    except ValueError:
        raise ModelError(f"{where}: tensor {tensor.name!r}: external offset or length is no number") from None
    path = _inside(folder, info.get("location", ""), tensor.name, where)
    if not path.is_file():
        raise ModelError(f"{where}: external data {path} is missing: copy it beside the model")
    size = path.stat().st_size
    if size < 200 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise ModelError(f"{where}: external data {path} is a Git LFS pointer: run `git lfs pull` (CI: `lfs: true`)")
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"{where}: external data {path} is truncated: tensor {tensor.name!r} needs bytes {offset} to "
            f"{offset + length}, the file has {size}"
        )
    if expected is not None and length != expected:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} has {length} bytes of external data, its shape says {expected}"
        )


def _inside(folder: Path, location: str, name: str, where: str = "") -> Path:
    """The data file's path; its logical or its physical parent must be the model's folder (or lie inside it)."""
    prefix = f"{where}: " if where else ""
    if not location or os.path.isabs(location) or ".." in Path(location.replace("\\", "/")).parts:
        raise ModelError(f"{prefix}external data of {name!r} points outside the model's folder ({location!r}): refused")
    path = folder / location
    home = Path(os.path.realpath(folder))
    logical = Path(os.path.realpath(path.parent))
    physical = Path(os.path.realpath(path)).parent
    if not any(p == home or home in p.parents for p in (logical, physical)):
        raise ModelError(f"{prefix}external data of {name!r} points outside the model's folder ({location!r}): refused")
    return path


def _mapped(tensor: ir.ExternalTensor, folder: Path) -> MappedTensor:
    return MappedTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=folder,
    )


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    """Every input is defined somewhere in scope and nothing is defined twice (order is repaired later)."""
    pending: list[tuple[onnx.GraphProto, frozenset[str]]] = [(graph, frozenset())]
    while pending:
        current, outer = pending.pop()
        defined = {i.name for i in current.input} | {i.name for i in current.initializer}
        defined |= {s.values.name for s in current.sparse_initializer}
        for node in current.node:
            for output in filter(None, node.output):
                if output in defined:
                    raise ModelError(f"{where}: value {output!r} is defined twice (node {node.name or node.op_type!r})")
                defined.add(output)
        scope = outer | defined
        for node in current.node:
            for name in node.input:
                if name and name not in scope:
                    raise ModelError(
                        f"{where}: node {node.name or node.op_type!r} reads {name!r}, which nothing defines"
                    )
            for attribute in node.attribute:
                pending.extend((g, scope) for g in ([attribute.g] if attribute.HasField("g") else attribute.graphs))
        for value in current.output:
            if value.name not in scope:
                raise ModelError(f"{where}: output {value.name!r} is not defined by any node")


# The bodies of an operator, and how many outputs they give beyond its own.
_BODIES: dict[str, dict[str, int]] = {
    "If": {"then_branch": 0, "else_branch": 0},
    "Loop": {"body": 1},
    "Scan": {"body": 0},
}


def _check_bodies(graph: onnx.GraphProto | onnx.FunctionProto, where: str) -> None:
    """If, Loop and Scan have their bodies, which take and give what the node does (it may leave outputs out)."""
    for node in graph.node:
        bodies = {a.name: a.g for a in node.attribute if a.HasField("g")}
        for body in bodies.values():
            _check_bodies(body, where)
        if node.domain not in ("", "ai.onnx") or node.op_type not in _BODIES:
            continue
        name = f"{where}: {node.op_type} {node.name or next(iter(node.output), '')!r}"
        for part, beyond in _BODIES[node.op_type].items():
            if part not in bodies:
                raise ModelError(f"{name} has no {part}")
            takes, gives = len(bodies[part].input), len(bodies[part].output) - beyond
            given = 0 if node.op_type == "If" else len(node.input)
            batched = node.op_type == "Scan" and takes == given - 1  # as opset 8 had it
            if takes != given and not batched:
                raise ModelError(f"{name}: its {part} takes {takes} inputs, not {given}")
            if gives < len(node.output):
                raise ModelError(f"{name}: its {part} gives {gives} outputs, the node has {len(node.output)}")
        if len({len(body.output) for body in bodies.values()}) > 1:
            raise ModelError(f"{name}: its branches give different numbers of outputs")


def _count_nodes(graph: onnx.GraphProto) -> int:
    return len(graph.node) + sum(
        _count_nodes(g) for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)
    )


def _check_types(graph: onnx.GraphProto, where: str) -> None:
    """Maps, as the ZipMap of converted classifiers gives them, are no tensors."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type
        while (form := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
            kind = getattr(kind, form).elem_type
        if form == "map_type":
            raise ModelError(
                f"{where}: {value.name!r} holds maps, not tensors: export without ZipMap (skl2onnx: zipmap=False)"
            )


def _line(error: BaseException) -> str:
    """The first line of a library's message, short enough for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
