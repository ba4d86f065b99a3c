"""Losses in the graph."""

import numpy as np
import pytest

from gradlint.testing import Activation, check_op

RNG = np.random.default_rng(3)
CLASSES = RNG.uniform(0.5, 2.0, 5).astype(np.float32)
REDUCTIONS = ["none", "sum", "mean"]


def labels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 5, shape)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"])
class TestEachLoss:
    def test_one_label_per_example(self, op: str, reduction: str) -> None:
        check_op(op, Activation((64, 5), mean=-1.0), labels(64), reduction=reduction, wrt=(0,))

    def test_labels_at_every_position(self, op: str, reduction: str) -> None:
        check_op(op, Activation((8, 5, 3, 4)), labels(8, 3, 4), reduction=reduction, wrt=(0,))

    def test_weighted_classes(self, op: str, reduction: str) -> None:
        # 200 labels: their actual frequencies are not quite uniform
        check_op(op, Activation((200, 5)), labels(200), CLASSES, reduction=reduction, wrt=(0,), moments=0.15)

    def test_gradient_of_the_class_weights(self, op: str, reduction: str) -> None:
        check_op(
            op, Activation((8, 5, 3)), labels(8, 3), CLASSES, reduction=reduction, wrt=(2,), moments=None, pullback=None
        )

    @pytest.mark.parametrize("ignored", [-100, 2, -1])
    def test_ignored_labels_have_no_gradient(self, op: str, reduction: str, ignored: int) -> None:
        target = labels(8, 3)
        target[0, :2] = target[5, 1] = ignored
        check_op(
            op, Activation((8, 5, 3)), target, CLASSES, reduction=reduction, ignore_index=ignored, wrt=(0,),
            moments=None, pullback=None,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_with_its_log_probabilities(reduction: str) -> None:
    check_op("SoftmaxCrossEntropyLoss", Activation((64, 5)), labels(64), reduction=reduction, wrt=(0,), outputs=2)


def test_labels_may_be_int32() -> None:
    check_op("SoftmaxCrossEntropyLoss", Activation((64, 5)), labels(64).astype(np.int32), wrt=(0,))
