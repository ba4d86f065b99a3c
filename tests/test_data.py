"""Data for the probe: read, checked, drawn."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.data import Data, check_inputs, labels, linear_targets, read_data, synthetic
from gradlint.exceptions import DataError
from gradlint.load import from_proto

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def graph_of(signature: str, body: str = "y = Relu(x)", weights: str = "") -> ir.Graph:
    model = onnx.parser.parse_model(f"{HEADER} net {signature} {weights} {{ {body} }}")
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims(batch=4))
    return loaded.graph


PLAIN = "(float[N, 3] x) => (float[N, 3] y)"
TWO = "(float[N, 3] x, float[N, 3] z) => (float[N, 3] y)"


def inputs_of(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(v.name): v for v in graph.inputs}


def read(path: Path, graph: ir.Graph) -> Data:
    inputs = inputs_of(graph)
    return check_inputs(read_data(path, inputs, tuple(str(o.name) for o in graph.outputs)), inputs)


def test_npz_with_inputs_and_targets(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((4, 3)), target=np.arange(4), **{"target.y": np.ones((4, 3))})
    data = read(tmp_path / "d.npz", graph_of(PLAIN))
    assert data.inputs["x"].dtype == np.float32
    assert set(data.targets) == {"", "y"}


def test_npy_for_a_single_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((4, 3), np.float32))
    assert read(tmp_path / "d.npy", graph_of(PLAIN)).inputs["x"].shape == (4, 3)
    with pytest.raises(DataError, match=r"use \.npz"):
        read(tmp_path / "d.npy", graph_of(TWO, "y = Add(x, z)"))


def test_folder_of_npy(tmp_path: Path) -> None:
    for name in ("x", "z", "target"):
        np.save(tmp_path / f"{name}.npy", np.ones((4, 3), np.float32))
    data = read(tmp_path, graph_of(TWO, "y = Add(x, z)"))
    assert set(data.inputs) == {"x", "z"}
    assert set(data.targets) == {""}


def test_onnx_test_data_set(tmp_path: Path) -> None:
    for k, name in enumerate(("x", "")):
        tensor = numpy_helper.from_array(np.full((4, 3), k, np.float32), name)
        (tmp_path / f"input_{k}.pb").write_bytes(tensor.SerializeToString())
    (tmp_path / "output_0.pb").write_bytes(
        numpy_helper.from_array(np.ones((4, 3), np.float32), "y").SerializeToString()
    )
    data = read(tmp_path, graph_of(TWO, "y = Add(x, z)"))
    assert data.inputs["z"].mean() == 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"X": np.ones((4, 3))}, "did you mean 'x'"),
        ({"x": np.ones((4, 3)), "target.z": np.ones(4)}, "no output 'z'"),
        ({"x": np.ones((4, 3, 1))}, r"must have shape \(4, 3\)"),
        ({"x": np.array([["a"] * 3] * 4)}, "must be a float array"),
        ({"x": np.full((4, 3), np.nan)}, "12 non-finite values"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "d.npz", graph_of(PLAIN))


def test_integer_inputs_take_integers_only(tmp_path: Path) -> None:
    graph = graph_of(
        "(int64[N, 3] x) => (float[N, 3, 2] y)", "y = Gather(w, x)", "<float[3, 2] w = {1, 2, 3, 4, 5, 6}>"
    )
    np.savez(tmp_path / "d.npz", x=np.ones((4, 3), np.float32))
    with pytest.raises(DataError, match="must be int64, got float32"):
        read(tmp_path / "d.npz", graph)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY broken", b"text"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz"):
        read(tmp_path / "d.npz", graph_of(PLAIN))


def test_a_pickle_in_the_archive_is_not_executed(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "d.npz", graph_of(PLAIN))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nothing.npz", graph_of(PLAIN))


def test_synthetic_floats_are_seeded_and_clipped() -> None:
    graph = graph_of(PLAIN)
    first, second = (synthetic(graph, 0, {})["x"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (synthetic(graph, 1, {})["x"] != first).any()
    assert np.abs(first).max() <= 6


def test_synthetic_images_are_correlated() -> None:
    x = synthetic(graph_of("(float[N, 3, 32, 32] x) => (float[N, 3, 32, 32] y)"), 0, {})["x"]
    assert x.std() == pytest.approx(1, abs=0.05)
    neighbours = np.mean(x[..., 1:] * x[..., :-1])
    assert neighbours > 0.5


def test_synthetic_ids_stay_inside_the_table() -> None:
    graph = graph_of(
        "(int64[N, 50] x) => (float[N, 50, 2] y)",
        "y = Gather(w, x)",
        "<float[5, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0}>",
    )
    ids = synthetic(graph, 0, {})["x"]
    assert ids.min() >= 0
    assert ids.max() == 4


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("attention_mask", "int64", 1), ("sr", "int64", 16000), ("token_type_ids", "int64", 0), ("mask", "bool", True)],
)
def test_synthetic_settings(name: str, kind: str, expected: int) -> None:
    graph = graph_of(
        f"(float[N, 3] x, {kind}[N, 3] {name}) => (float[N, 3] y, float[N, 3] z)",
        f"y = Relu(x) z = Cast<to = 1>({name})",
    )
    assert (synthetic(graph, 0, {})[name] == expected).all()


def test_synthetic_states_are_zero() -> None:
    graph = graph_of("(float[N, 3] x, float[N, 3] past_state) => (float[N, 3] y)", "y = Add(x, past_state)")
    assert not synthetic(graph, 0, {})["past_state"].any()


def test_a_number_is_drawn_as_an_array() -> None:
    (array,) = synthetic(graph_of("(float x) => (float y)"), 0, {}).values()
    assert isinstance(array, np.ndarray)
    assert array.shape == ()


def test_sizes_beyond_measure_are_not_drawn() -> None:
    graph = graph_of("(float[1000000000000, 3] x) => (float[1000000000000, 3] y)")
    with pytest.raises(DataError, match=r"input 'x' of shape \(1000000000000, 3\) is too large to be made up"):
        synthetic(graph, 0, {})


def test_given_arrays_are_kept() -> None:
    assert not synthetic(graph_of(PLAIN), 0, {"x": np.zeros(1)})


def test_targets_of_the_linear_loss() -> None:
    own = Data({}, {"": np.ones((4, 3), np.float32)})
    assert linear_targets({"y": (4, 3)}, own, 0)["y"].sum() == 12
    drawn = linear_targets({"y": (4, 3)}, Data({}, {"": np.arange(4)}), 0)["y"]
    assert drawn.shape == (4, 3)
    with pytest.raises(DataError, match="shape"):
        linear_targets({"y": (4, 5)}, own, 0)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (np.array([0, 1, 2, 3]), r"labels must lie in \[0, 3\), or be -100 \(ignored\), got 0 to 3"),
        (np.array([-1, 1, 2, 0]), r"got -1 to 2"),
        (np.array([0.0, 1.0, 2.0, 0.0]), "integer class labels"),
        (np.array([0, 1]), r"labels of shape \(4,\)"),
        (np.full(4, -100), "every label is -100"),
    ],
)
def test_labels_are_checked(target: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        labels(target, (4, 3), "d.npz", loss="cross-entropy")


def test_token_labels() -> None:
    assert labels(np.zeros((4, 5), np.int32), (4, 5, 3), "d.npz", loss="cross-entropy").shape == (4, 5)


def test_a_one_hot_code_written_out_bounds_its_ids() -> None:
    graph = graph_of(
        "(int64[N, 50] ids) => (float[N, 50, 7] y)",
        "u = Unsqueeze(ids, last) e = Equal(u, classes) y = Cast<to = 1>(e)",
        "<int64[1] last = {2}, int64[1, 1, 7] classes = {0, 1, 2, 3, 4, 5, 6}>",
    )
    assert set(synthetic(graph, 0, {})["ids"].reshape(-1)) == {2, 3, 4, 5, 6}


TABLE = "float[5, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0}"


@pytest.mark.parametrize(
    ("body", "constants", "limit"),
    [
        ("n = Less(x, zero) m = Add(x, rows) i = Where(n, m, x)", "int64 zero = {0}, int64 rows = {5}", 5),  # wrapped
        ("i = Add(x, offset)", "int64[3] offset = {0, 1, 3}", 2),  # a part of the table per column
        ("i = Clip(x, zero, four)", "int64 zero = {0}, int64 four = {4}", 5),
    ],
)
def test_ids_stay_inside_the_table_whatever_is_computed_from_them(body: str, constants: str, limit: int) -> None:
    graph = graph_of("(int64[N, 3] x) => (float[N, 3, 2] y)", f"{body} y = Gather(w, i)", f"<{TABLE}, {constants}>")
    ids = [synthetic(graph, seed, {})["x"] for seed in range(20)]
    assert min(i.min() for i in ids) >= 0
    assert max(i.max() for i in ids) == limit - 1


def test_floats_that_are_only_cast_to_ids_are_drawn_as_ids() -> None:
    graph = graph_of("(float[N, 50] x) => (float[N, 50, 2] y)", "i = Cast<to = 6>(x) y = Gather(w, i)", f"<{TABLE}>")
    assert set(synthetic(graph, 0, {})["x"].reshape(-1)) == {2.0, 3.0, 4.0}
    both = graph_of(
        "(float[N, 50] x) => (float[N, 50, 2] y, float[N, 50] z)",
        "i = Cast<to = 6>(x) y = Gather(w, i) z = Tanh(x)",
        f"<{TABLE}>",
    )
    assert synthetic(both, 0, {})["x"].min() < 0


def test_a_file_of_another_kind_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"d\.npz: not a readable \.npz or \.npy file of numbers$"):
        read(tmp_path / "d.npz", graph_of(PLAIN))
    assert labels(np.zeros((4, 5, 1), np.int32), (4, 5, 3), "d.npz", loss="cross-entropy").shape == (4, 5)
    with pytest.raises(DataError, match=r"labels of shape \(4, 5\) for logits \(4, 5, 3\), got \(5, 4\)"):
        labels(np.zeros((5, 4), np.int32), (4, 5, 3), "d.npz", loss="cross-entropy")


@pytest.mark.parametrize(
    ("loss", "target", "said"),
    [
        ("bce", np.full((4, 3), 1.5), r"must lie in \[0, 1\], got 1.5 to 1.5"),
        ("bce", np.zeros((3, 4)), r"must have shape \(4, 3\), got \(3, 4\)"),
        ("mse", np.full((4, 3), np.nan), "non-finite"),
        ("mse", np.zeros((4, 3), complex), "must be numbers, got complex128"),
    ],
)
def test_targets_are_checked(loss: str, target: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        labels(target, (4, 3), "d.npz", loss=loss)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.ones((0, 3), np.float32), r"input 'x' holds no example: its shape is \(0, 3\)"),
        (np.full((2, 3), 1e300), r"input 'x' holds values that float32 does not \(1e\+300\)"),
    ],
)
def test_inputs_that_say_nothing(x: np.ndarray, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "d.npz", graph_of(PLAIN))


@pytest.mark.parametrize("ids", [[0, 5], [-6, 0]])
def test_ids_beyond_their_table(ids: list[int], tmp_path: Path) -> None:
    graph = graph_of(
        "(int64[N, 2] x) => (float[N, 2, 2] y)",
        "flat = Identity(x) y = Gather(w, flat)",
        "<float[5, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0}>",
    )
    np.savez(tmp_path / "d.npz", x=np.array([ids]))
    with pytest.raises(DataError, match=rf"input 'x' must lie in \[0, 5\), got {min(ids)} to {max(ids)}"):
        read(tmp_path / "d.npz", graph)


def test_integers_that_the_input_does_not_hold(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[1, 2, 300]]))
    graph = graph_of("(int8[N, 3] x) => (float[N, 3] y)", "y = Cast <to = 1> (x)")
    with pytest.raises(DataError, match="input 'x' must be int8, which does not hold 1 to 300"):
        read(tmp_path / "d.npz", graph)


def test_a_tensor_file_that_points_at_another(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.ones((2, 3), np.float32), "x")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(DataError, match=r"input_0\.pb: keeps its data in another file: refused"):
        read(tmp_path, graph_of(PLAIN))
