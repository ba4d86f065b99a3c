"""Normalisations: by batch statistics, by running ones, within an example."""

from collections.abc import Mapping

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(2)


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return (mean + std * RNG.standard_normal(shape)).astype(np.float32)


def running(channels: int) -> tuple[np.ndarray, ...]:
    """gamma, beta, running mean, running variance."""
    return (
        normal(channels, mean=1, std=0.3),
        normal(channels),
        normal(channels),
        RNG.uniform(0.5, 2, channels).astype(np.float32),
    )


SHAPES = [(16, 5), (8, 5, 6), (8, 5, 4, 4), (4, 3, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_normalization_by_batch_statistics(shape: tuple[int, ...]) -> None:
    x = Activation(shape, mean=0.7, std=1.5)
    check_op("BatchNormalization", x, *running(shape[1]), training_mode=1, momentum=0.0, outputs=3, wrt=(0, 1, 2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updated_running_statistics_have_gradients_too(momentum: float) -> None:
    check_op(
        "BatchNormalization",
        Activation((6, 5, 4, 4), mean=0.7),
        *running(5),
        training_mode=1,
        momentum=momentum,
        outputs=3,
        wrt=(0, 1, 2, 3, 4) if momentum else (0, 1, 2),
        moments=None,
        pullback=None,
        proof=False,
    )


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 12), -1), ((8, 5, 12), -1), ((8, 5, 12), 2), ((8, 3, 4, 6), -2), ((8, 3, 4), 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(shape: tuple[int, ...], axis: int, bias: bool) -> None:
    last = shape[axis:]
    weights = (normal(*last, mean=1, std=0.3), normal(*last) if bias else None)
    check_op("LayerNormalization", Activation(shape, mean=0.5, std=2), *weights, axis=axis)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_normalization_by_running_statistics(shape: tuple[int, ...]) -> None:
    check_op("BatchNormalization", Activation(shape, mean=0.7, std=1.5), *running(shape[1]), wrt=(0, 1, 2), mode="eval")


def test_one_value_per_channel_is_normalised_by_running_statistics() -> None:
    check_op("BatchNormalization", Activation((1, 5)), *running(5), wrt=(0, 1, 2), mode="train")


def test_layer_normalization_hands_out_its_statistics() -> None:
    check_op("LayerNormalization", Activation((6, 4, 8)), normal(8), normal(8), outputs=3, moments=None, pullback=None)


@pytest.mark.parametrize("shape", [(8, 5, 12), (8, 12)])
def test_rms_normalization(shape: tuple[int, ...]) -> None:
    check_op("RMSNormalization", Activation(shape, mean=0.5), normal(12, mean=1, std=0.3), axis=-1, opset=23)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_instance_normalization(shape: tuple[int, ...]) -> None:
    check_op("InstanceNormalization", Activation(shape, mean=0.5, std=2), *running(shape[1])[:2])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("spatial", [(5,), (4, 3)])
def test_group_normalization(groups: int, spatial: tuple[int, ...]) -> None:
    check_op(
        "GroupNormalization",
        Activation((8, 6, *spatial), mean=0.5, std=2),
        *running(6)[:2],
        num_groups=groups,
        stash_type=11,
    )


@pytest.mark.parametrize("extra", [True, False])
def test_layer_normalization_of_a_residual_sum(extra: bool) -> None:
    check_op(
        "SkipLayerNormalization",
        Activation((4, 6, 16)),
        Activation((4, 6, 16), std=0.5),
        normal(16, mean=1, std=0.3),
        normal(16),
        normal(16) if extra else None,
        domain="com.microsoft",
        epsilon=1e-5,
    )


def test_rms_normalization_of_a_residual_sum() -> None:
    check_op(
        "SkipSimplifiedLayerNormalization",
        Activation((4, 6, 16)),
        Activation((4, 6, 16), std=0.5),
        normal(16, mean=1, std=0.3),
        domain="com.microsoft",
        epsilon=1e-5,
    )


def test_running_statistics_have_gradients_where_asked() -> None:
    check_op("BatchNormalization", Activation((6, 5, 4)), *running(5), moments=None, pullback=None)


@pytest.mark.parametrize("axes", [[0, 2, 3], [2, 3], [1, 2, 3], [0, 1, 2, 3]])
def test_mean_variance_normalization(axes: list[int]) -> None:
    check_op("MeanVarianceNormalization", Activation((8, 5, 4, 4), mean=0.5, std=2), axes=axes)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [1, -1])
def test_lp_normalization(p: int, axis: int) -> None:
    check_op("LpNormalization", Activation((8, 12, 10), mean=0.5), p=p, axis=axis)


@pytest.mark.parametrize("size", [3, 5])
def test_local_response_normalization(size: int) -> None:
    check_op("LRN", Activation((4, 6, 3, 3), mean=0.5), size=size, alpha=0.05, beta=0.75, bias=1.0)


def test_local_response_normalization_has_an_exact_vjp() -> None:
    check_op("LRN", Activation((4, 6, 3, 3)), size=3, alpha=2.0, beta=0.6, bias=1.5, moments=None, pullback=None)
