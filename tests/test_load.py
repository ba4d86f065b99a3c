"""Foreign files: what is sound loads, what is wrong gives one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import gradlint
from gradlint.exceptions import ModelError
from gradlint.load import MappedTensor, read

SAMPLES = Path(__file__).parent.parent / "sample_models"


def linear(*, external: str | None = None, opset: int = 17) -> onnx.ModelProto:
    """x (N, 4) -> Gemm -> y; the weight outside the file where `external` names one."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": external, "offset": "0", "length": "48"}.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="fc")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def write(folder: Path, content: bytes, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_sample_loads() -> None:
    source = read(SAMPLES / "digits_relu.onnx")
    assert source.opset == 17
    assert source.nodes == sum(1 for _ in source.model.graph)
    assert len(source.sha256) == 64


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "model.onnx")


def test_directory_names_the_model_inside(tmp_path: Path) -> None:
    folder = tmp_path / "export.onnx"
    folder.mkdir()
    write(folder, linear().SerializeToString())
    assert "model.onnx" in refused(folder)


def test_empty_file(tmp_path: Path) -> None:
    assert "empty" in refused(write(tmp_path, b""))


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(tmp_path: Path, seed: int) -> None:
    assert refused(write(tmp_path, np.random.default_rng(seed).bytes(4096)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    content = (SAMPLES / "digits_relu.onnx").read_bytes()
    assert refused(write(tmp_path, content[: int(len(content) * share)]))


def test_git_lfs_pointer(tmp_path: Path) -> None:
    message = refused(write(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"))
    assert "git lfs pull" in message
    assert "lfs: true" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("net.pt", b"PK\x03\x04" + bytes(64), "torch.onnx.export"),
        ("net.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "tf2onnx"),
        ("net.tflite", bytes(4) + b"TFL3" + bytes(64), "--tflite"),
        ("net.pth", b"\x80\x02" + bytes(64), "torch.onnx.export"),
        ("net.safetensors", bytes(8) + b'{"a": 1}', "safetensors"),
    ],
)
def test_other_formats_say_how_to_export(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path, content, name))


@pytest.mark.parametrize("opset", [6, 29])
def test_opsets_outside_the_supported_range(tmp_path: Path, opset: int) -> None:
    assert f"opset {opset}" in refused(write(tmp_path, linear(opset=opset).SerializeToString()))


def test_undefined_input(tmp_path: Path) -> None:
    model = linear()
    model.graph.node[0].input[1] = "nowhere"
    assert "'nowhere'" in refused(write(tmp_path, model.SerializeToString()))


def test_value_defined_twice(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    assert "twice" in refused(write(tmp_path, model.SerializeToString()))


def test_cycle(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.append(helper.make_node("Relu", ["b"], ["a"]))
    model.graph.node.append(helper.make_node("Relu", ["a"], ["b"]))
    assert "cycle" in refused(write(tmp_path, model.SerializeToString()))


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"]))
    model.graph.output[0].name = "z"
    loaded = read(write(tmp_path, model.SerializeToString())).model
    assert [n.op_type for n in loaded.graph] == ["Gemm", "Relu"]


def test_tensor_shorter_than_its_shape(tmp_path: Path) -> None:
    model = linear()
    model.graph.initializer[0].dims[0] = 400
    assert "damaged" in refused(write(tmp_path, model.SerializeToString()))


def test_tensor_that_claims_more_than_the_file(tmp_path: Path) -> None:
    model = linear()
    model.graph.initializer[0].dims[0] = 1 << 40
    assert "damaged" in refused(write(tmp_path, model.SerializeToString()))


def test_external_data_is_mapped(tmp_path: Path) -> None:
    path = write(tmp_path, linear(external="w.bin").SerializeToString())
    write(tmp_path, np.arange(12, dtype=np.float32).tobytes(), "w.bin")
    tensor = read(path).model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    np.testing.assert_array_equal(tensor.numpy(), np.arange(12).reshape(4, 3))


def test_external_data_missing(tmp_path: Path) -> None:
    message = refused(write(tmp_path, linear(external="w.bin").SerializeToString()))
    assert "missing" in message


def test_external_data_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, linear(external="w.bin").SerializeToString())
    write(tmp_path, bytes(40), "w.bin")
    assert "truncated" in refused(path)


def test_external_data_is_a_lfs_pointer(tmp_path: Path) -> None:
    path = write(tmp_path, linear(external="w.bin").SerializeToString())
    write(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "w.bin")
    assert "git lfs pull" in refused(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin", ""])
def test_external_data_that_climbs_out(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, bytes(48), "w.bin")
    assert "outside" in refused(write(folder, linear(external=location).SerializeToString()))


def test_a_link_out_of_the_folder_to_the_model_beside_its_data(tmp_path: Path) -> None:
    """A Hugging Face cache: the model and its data are links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write(blobs, linear(external="w.bin").SerializeToString(), "aaaa")
    write(blobs, np.ones(12, np.float32).tobytes(), "bbbb")
    (snapshot / "model.onnx").symlink_to(blobs / "aaaa")
    (snapshot / "w.bin").symlink_to(blobs / "bbbb")
    tensor = read(snapshot / "model.onnx").model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().sum() == 12


def test_hard_linked_data(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    path = write(tmp_path, linear(external="w.bin").SerializeToString())
    os.link(write(store, np.ones(12, np.float32).tobytes(), "data"), tmp_path / "w.bin")
    tensor = read(path).model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().sum() == 12


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])
def test_other_precisions(tmp_path: Path, dtype: ir.DataType) -> None:
    model = linear()
    array = np.arange(12).reshape(4, 3).astype(dtype.numpy())
    model.graph.initializer[0].CopyFrom(ir.to_proto(ir.tensor(array, name="w")))
    tensor = read(write(tmp_path, model.SerializeToString())).model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.dtype == dtype
    assert float(tensor.numpy().astype(np.float64).sum()) == 66


def test_subgraphs_are_checked_too(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["missing"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    model = linear()
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    assert "'missing'" in refused(write(tmp_path, model.SerializeToString()))


@pytest.mark.parametrize(
    ("outputs", "inputs", "branches", "said"),
    [
        (["z"], ["c"], ("then_branch",), "If 'z' has no else_branch"),
        (["z", "q"], ["c"], ("then_branch", "else_branch"), "If 'z': its then_branch gives 1 outputs, the node has 2"),
        (["z"], ["", "c", "y"], ("body",), "Loop 'z': its body takes 0 inputs, not 3"),
    ],
)
def test_bodies_that_do_not_fit_their_node(
    tmp_path: Path, outputs: list[str], inputs: list[str], branches: tuple[str, ...], said: str
) -> None:
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Relu", ["y"], ["r"])], "b", [], [result])
    model = linear()
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    op = "If" if "then_branch" in branches else "Loop"
    model.graph.node.append(helper.make_node(op, inputs, outputs, **dict.fromkeys(branches, body)))
    assert said in refused(write(tmp_path, model.SerializeToString()))


def test_a_model_with_external_data_is_measured_like_one_without(tmp_path: Path) -> None:
    inside = write(tmp_path, linear().SerializeToString(), "inside.onnx")
    outside = write(tmp_path, linear(external="w.bin").SerializeToString(), "outside.onnx")
    write(tmp_path, np.arange(12, dtype=np.float32).tobytes(), "w.bin")
    reports = [gradlint.check(path) for path in (inside, outside)]
    measured = [[w.measured for w in report.weights] for report in reports]
    assert measured[0]
    assert measured[0][0]["grad_rms"] > 0
    assert measured[0] == measured[1]


def test_maps_are_no_tensors(tmp_path: Path) -> None:
    """What converters make of a classifier that names its classes."""
    model = linear()
    probabilities = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    )
    model.graph.node.append(helper.make_node("ZipMap", ["y"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]))
    model.graph.output.append(helper.make_value_info("p", probabilities))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(ModelError, match=r"'p' holds maps, not tensors: export without ZipMap"):
        read(write(tmp_path, model.SerializeToString()))


def test_what_the_reader_can_not_take_is_one_line(tmp_path: Path) -> None:
    model = linear()
    model.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(ModelError, match=r"the graph can't be read: [^\n]+$"):
        read(write(tmp_path, model.SerializeToString()))


HELD = """
import sys
from gradlint.load import read
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
source = read(sys.argv[1])
print(resident() - before)
"""


def test_weights_are_held_once_though_a_node_holds_a_tensor_too(tmp_path: Path) -> None:
    """A part of a protobuf keeps all of it in memory."""
    size = 16 << 20
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(1, np.float32))),
            helper.make_node("Gemm", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "one"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((4, size // 4), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = write(tmp_path, model.SerializeToString())
    done = subprocess.run([sys.executable, "-c", HELD, str(path)], capture_output=True, text=True, check=True)
    assert 4 * size <= int(done.stdout) < 6 * size
