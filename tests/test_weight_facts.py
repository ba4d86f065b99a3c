"""Facts from a weight's numbers: statistics, geometry, duplicates, fit to initial distributions; and the stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import cnn, mlp, rnn, transformer
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gradlint.anatomy import Anatomy, anatomy
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.fact_table import FACTS
from gradlint.init_fit import Fit, best_fit, looks_drawn, p_value
from gradlint.load import from_proto, read
from gradlint.stage import guess_stage
from gradlint.weight_facts import duplicate_units, fans, gain, norm_facts, role, spread, trained_share, weight_facts

SAMPLES = sorted((Path(__file__).parent.parent / "sample_models").glob("*.onnx"))
RNG = np.random.default_rng(3)


def parts_of(proto: onnx.ModelProto) -> Anatomy:
    model = from_proto(proto, "model", Path("."))
    canonicalize(model, Dims(batch=4))
    return anatomy(model.graph)


# -- statistics --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 1000, 300_000]))
def test_statistics_are_those_of_the_whole_array(seed: int, size: int) -> None:
    array = np.random.default_rng(seed).normal(0.3, 2.0, size).astype(np.float32)
    found = spread(array)
    assert found.mean == pytest.approx(array.mean(dtype=np.float64), abs=1e-5)
    assert found.std == pytest.approx(array.std(dtype=np.float64), rel=1e-4, abs=1e-6)
    assert found.rms == pytest.approx(np.sqrt(np.mean(np.square(array, dtype=np.float64))), rel=1e-5)
    assert found.largest == np.abs(array).max()
    assert found.near_zero == np.mean(np.abs(array) < 1e-5)
    assert found.oversized == np.mean(np.abs(array) > 5)
    assert (found.non_finite, found.elements) == (0, size)


def test_non_finite_elements_are_counted_and_left_out() -> None:
    found = spread(np.array([1.0, np.nan, 3.0, np.inf, -np.inf], np.float32))
    assert (found.non_finite, found.mean, found.largest) == (3, 2.0, 3.0)
    assert spread(np.full(4, np.nan, np.float32)).non_finite == 4


def test_huge_and_half_precision_elements() -> None:
    assert spread(np.full(4, 1e30, np.float32)).rms == pytest.approx(1e30, rel=1e-6)
    assert spread(np.full(4, 1e-3, np.float16)).mean == pytest.approx(1e-3, rel=1e-3)


def test_constant_weights_have_no_spread() -> None:
    found = spread(np.full((300, 1000), 0.1, np.float32))
    assert (found.constant, found.std) == (True, 0.0)


# -- geometry ----------------------------------------------------------------------------------------------------------


def test_fans_of_each_kind_of_kernel() -> None:
    def sizes(proto: onnx.ModelProto, name: str, index: int = 1) -> tuple[float, float] | None:
        return next(fans(u.layer, u.index) for u in parts_of(proto).uses if u.layer.name == name and u.index == index)

    assert sizes(mlp(width=64, inputs=32), "layers.0") == (32, 64)  # Gemm with transB
    assert sizes(cnn(channels=16), "conv.0") == (3 * 9, 16 * 9)
    assert sizes(transformer(dim=32), "mlp.0.up") == (32, 64)  # MatMul
    assert sizes(rnn(cell="LSTM", inputs=8, hidden=16), "rnn") == (8, 16)
    assert sizes(rnn(cell="LSTM", inputs=8, hidden=16), "rnn", 2) == (16, 16)


def test_depthwise_convolution_sees_one_channel() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "dw", group=6)
    weight = numpy_helper.from_array(np.ones((6, 1, 3, 3), np.float32), "w")
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 6, 8, 8]), ("y", [1, 6, 6, 6]))
    )
    proto = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 20)]
    )
    use = parts_of(proto).uses[0]
    assert fans(use.layer, 1) == (9, 9)
    assert weight_facts(use, role="kernel")["duplicate_units"] == 0  # each reads another channel


def test_roles() -> None:
    found = {(u.layer.name, u.index): role(u) for u in parts_of(cnn(depth=1, norm=True)).uses}
    assert found[("conv.0", 1)] == "kernel"
    assert found[("conv.0", 2)] == "bias"
    assert found[("norm.0", 1)] == "gamma"
    assert found[("norm.0", 2)] == "beta"
    assert {role(u) for u in parts_of(rnn(cell="GRU")).uses if u.layer.name == "rnn"} == {"kernel", "recurrent", "bias"}


# -- duplicates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_repeated_units_are_found_along_either_axis(axis: int) -> None:
    rows = RNG.standard_normal((400, 60)).astype(np.float32)
    rows[[5, 77, 300]] = rows[[10, 10, 11]]
    rows[20] = 3 * rows[21]
    matrix = rows if axis == 0 else rows.T
    assert duplicate_units(matrix, axis) == 7  # 5, 10, 77; 11, 300; 20, 21


def test_all_equal_units() -> None:
    assert duplicate_units(np.ones((3000, 10), np.float32), 0) == 3000


def test_bias_tells_units_apart() -> None:
    rows = np.repeat(RNG.standard_normal((10, 8)), 2, axis=0).astype(np.float32)
    assert duplicate_units(rows, 0, np.zeros(20, np.float32)) == 20
    assert duplicate_units(rows, 0, np.arange(20, dtype=np.float32)) == 0


def test_equal_biases_beside_weights_near_zero_make_no_duplicates() -> None:
    rows = 1e-6 * RNG.standard_normal((16, 16)).astype(np.float32)
    assert duplicate_units(rows, 0, np.ones(16, np.float32)) == 0


def test_nearly_parallel_units_count_by_their_cosine() -> None:
    rows = RNG.standard_normal((50, 200))
    direction = RNG.standard_normal(200)
    direction -= rows[0] * (direction @ rows[0]) / (rows[0] @ rows[0])
    direction *= np.linalg.norm(rows[0]) / np.linalg.norm(direction)
    for angle, count in ((1.2e-3, 2), (1.6e-3, 0)):  # cosine 1 - 0.72e-6 and 1 - 1.28e-6
        rows[1] = rows[0] + angle * direction
        assert duplicate_units(rows.astype(np.float32), 0) == count


def test_random_units_and_those_of_one_input_are_no_duplicates() -> None:
    assert duplicate_units(RNG.standard_normal((20_000, 6)).astype(np.float32), 0) == 0
    assert duplicate_units(RNG.standard_normal((64, 1)).astype(np.float32), 0, np.ones(64, np.float32)) == 0
    assert duplicate_units(np.zeros((64, 8), np.float32), 0) == 0


# -- initial distributions ---------------------------------------------------------------------------------------------


def truncated(shape: tuple[int, ...]) -> np.ndarray:
    draws = RNG.standard_normal((*shape, 8))
    return np.take_along_axis(draws, np.argmax(np.abs(draws) < 2, axis=-1)[..., None], axis=-1)[..., 0] / 0.8796


FAN_IN, FAN_OUT = 300, 200
SCHEMES = {
    "torch default": RNG.uniform(-1, 1, (FAN_OUT, FAN_IN)) / np.sqrt(FAN_IN),
    "He normal": RNG.standard_normal((FAN_OUT, FAN_IN)) * np.sqrt(2 / FAN_IN),
    "He uniform": RNG.uniform(-1, 1, (FAN_OUT, FAN_IN)) * np.sqrt(6 / FAN_IN),
    "He truncated normal": truncated((FAN_OUT, FAN_IN)) * np.sqrt(2 / FAN_IN),
    "Xavier uniform": RNG.uniform(-1, 1, (FAN_OUT, FAN_IN)) * np.sqrt(6 / (FAN_IN + FAN_OUT)),
    "LeCun normal": RNG.standard_normal((FAN_OUT, FAN_IN)) * np.sqrt(1 / FAN_IN),
    "std 0.02 normal": RNG.standard_normal((FAN_OUT, FAN_IN)) * 0.02,
}


def fit_of(array: np.ndarray) -> Fit | None:
    return best_fit(array, (FAN_IN, FAN_OUT), float(array.mean()), float(np.sqrt(np.mean(array**2))))


@pytest.mark.parametrize("name", SCHEMES)
def test_best_fit_names_the_scheme(name: str) -> None:
    fit = fit_of(SCHEMES[name])
    assert fit is not None
    assert fit.name == name
    assert fit.p > 0.01


def test_trained_weights_fit_nothing() -> None:
    strong = RNG.standard_normal((FAN_OUT, 2)) @ RNG.standard_normal((2, FAN_IN)) / np.sqrt(FAN_IN)
    fit = fit_of(0.3 * SCHEMES["He normal"] + strong)
    assert fit is not None
    assert fit.p < 1e-4


@pytest.mark.parametrize(("size", "wrong"), [(100, 0.6), (5000, 1e-6)])
def test_p_value_is_uniform_under_the_null_and_small_off_it(size: int, wrong: float) -> None:
    draws = [np.sort(np.random.default_rng(k).random(size)) for k in range(200)]
    p = np.array([p_value(d, lambda x: np.clip(x, 0, 1)) for d in draws])
    assert np.mean(p < 0.2) == pytest.approx(0.2, abs=0.08)
    assert p_value(draws[0], lambda x: np.clip(x * 1.1, 0, 1)) < wrong


def test_any_scale_looks_drawn_until_units_differ_in_strength() -> None:
    for array in SCHEMES.values():
        assert looks_drawn(7.3 * array)
    uneven = SCHEMES["He normal"] * np.exp(0.5 * RNG.standard_normal((FAN_OUT, 1)))
    assert not looks_drawn(uneven)
    assert looks_drawn(np.ones((30, 30))) is None
    assert looks_drawn(np.ones((3, 3))) is None


# -- whole facts -------------------------------------------------------------------------------------------------------


def test_init_ratio_is_one_for_the_scheme_of_the_activation() -> None:
    for activation, factor in (("Relu", 1.414), ("Tanh", 5 / 3), ("Sigmoid", 1.0)):
        use = parts_of(mlp(depth=1, width=400, inputs=300, gain=factor)).uses[0]
        facts = weight_facts(use, role="kernel", activation=activation)
        assert facts["init_ratio"] == pytest.approx(1, rel=0.03)
        assert facts["init_factor"] == pytest.approx(1, rel=0.02)
    assert weight_facts(use, role="kernel", activation="Relu", normalised=True).get("init_ratio") is None
    assert gain("LeakyRelu", 1.0) == (1.0, "He")
    assert gain("Selu") == (1.0, "LeCun")


def test_facts_are_in_the_table_and_share_of_trained_layers_counts_large_kernels() -> None:
    kinds = ["trained", "trained", "trained", "normal"]
    uses = [u for u in parts_of(mlp(depth=4, width=64, gain=1.414, kernels=kinds)).uses if role(u) == "kernel"]
    facts = [weight_facts(u, role="kernel") for u in uses]
    assert {name for f in facts for name in f} <= set(FACTS)
    assert trained_share(facts) == pytest.approx(3 / 5)
    assert trained_share([]) is None


def test_norm_facts() -> None:
    node = next(n for n in parts_of(cnn(depth=1, norm=True, gamma=1e-8)).graph if n.op_type == "BatchNormalization")
    facts = norm_facts(node)
    assert facts["gamma_near_zero"] == 1
    assert facts["running_var_min"] == 1
    assert facts["norm_scale_max"] == pytest.approx(1e-8, rel=1e-3)


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_samples_are_at_initialisation(path: Path) -> None:
    model = read(path).model
    canonicalize(model, Dims(), str(path))
    assert guess_stage(anatomy(model.graph).uses) == "init"


def test_networks_of_trained_kernels_are_trained() -> None:
    assert guess_stage(parts_of(mlp(depth=3, gain=1.414, kernels=["trained"] * 3)).uses) == "trained"
    assert guess_stage(parts_of(mlp(depth=3, gain=1.414)).uses) == "init"
    assert guess_stage(parts_of(mlp(depth=3, gain=0.01, kernels=["uniform"] * 3)).uses) == "init"
    assert guess_stage(parts_of(rnn(cell="LSTM", gate_bias=1.0)).uses) == "init"  # of two numbers, no draw
