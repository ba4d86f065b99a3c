"""Attention: found behind masks and scales, with its scale, the spread of its logits, and its place in series."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import mlp, transformer
from onnx import helper, numpy_helper

from gradlint.anatomy import anatomy
from gradlint.attention_facts import attention_subjects, attentions
from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.constants import evaluator, varying
from gradlint.estimate import estimate
from gradlint.fact_table import FACTS, Subject
from gradlint.load import from_proto
from gradlint.structure import bypasses


def subjects(proto: onnx.ModelProto, measured: dict[str, dict[str, float]] | None = None) -> list[Subject]:
    model = from_proto(proto, "model", Path("."))
    canonicalize(model, Dims(batch=4))
    parts = anatomy(model.graph)
    array = evaluator(parts.graph, varying(parts.graph))
    guess = estimate(parts.graph, batch=4)
    found = attention_subjects(parts, attentions(parts.graph), bypasses(parts), guess, measured or {}, array)
    assert {name for s in found for name in s.facts} <= set(FACTS)
    return found


def test_scaled_attention() -> None:
    first, second = subjects(transformer(depth=2, tokens=16, dim=32))
    assert first.layer == "attention.0.softmax"
    assert (first.facts["keys"], first.facts["head_dim"], first.facts["is_scaled"]) == (16, 32, True)
    assert first.facts["logit_std"] == pytest.approx(1, rel=0.2)
    assert first.facts["has_skip"] is True
    assert second.order > first.order


def test_unscaled_attention() -> None:
    facts = subjects(transformer(depth=1, scaled=False))[0].facts
    assert facts["is_scaled"] is False
    assert facts["logit_std"] == pytest.approx(math.sqrt(32), rel=0.2)


def test_scale_folded_into_the_query_weights() -> None:
    assert subjects(transformer(depth=1, scaled=False, query_gain=1 / math.sqrt(32)))[0].facts["is_scaled"] is True


def test_large_queries_are_no_missing_scale() -> None:
    facts = subjects(transformer(depth=1, query_gain=20.0))[0].facts
    assert facts["is_scaled"] is True
    assert facts["logit_std"] == pytest.approx(20, rel=0.2)


def test_measured_spread_is_scaled_and_stands_first() -> None:
    (found,) = subjects(transformer(depth=1), {"attention.0.softmax.out": {"logit_std": 8.0, "max_probability": 0.7}})
    assert found.facts["logit_std"] == 8.0
    assert found.facts["max_probability"] == 0.7
    assert found.evidence == {"logit_std": "measured", "max_probability": "measured"}


def test_scale_on_both_factors_and_a_mask() -> None:
    """What torch writes for scaled_dot_product_attention: d^(-1/4) on queries and on keys, then an additive mask."""
    proto = transformer(depth=1, scaled=False)
    nodes = list(proto.graph.node)
    product = next(k for k, n in enumerate(nodes) if n.name == "attention.0.qk")
    query, key = nodes[product].input
    mask = np.where(np.tri(16) > 0, 0, -3e38).astype(np.float32)[None]
    proto.graph.initializer.extend(
        [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(np.float32(32**-0.25), "root")]
    )
    nodes[product].input[:] = ["q.scaled", "k.scaled"]
    softmax = next(n for n in nodes if n.name == "attention.0.softmax")
    softmax.input[0] = "masked"
    nodes[product + 1 : product + 1] = [helper.make_node("Add", ["attention.0.qk.out", "mask"], ["masked"], "add")]
    nodes[product:product] = [
        helper.make_node("Mul", [query, "root"], ["q.scaled"], "q.scale"),
        helper.make_node("Mul", [key, "root"], ["k.scaled"], "k.scale"),
    ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    facts = subjects(proto)[0].facts
    assert facts["is_scaled"] is True
    assert facts["logit_std"] == pytest.approx(1, rel=0.2)


def test_attentions_in_series_count_up_only_without_skips() -> None:
    bare = subjects(transformer(depth=4, skip=False, norm="none"))
    assert [s.facts["attention_index"] for s in bare] == [1, 2, 3, 4]
    assert {s.facts["attention_index"] for s in subjects(transformer(depth=4))} == {0}


def test_softmax_over_a_layer_is_no_attention() -> None:
    assert subjects(mlp(depth=2, activation="Softmax")) == []
