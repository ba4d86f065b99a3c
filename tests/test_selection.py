"""What picks one piece of a Concat reads the piece: the values stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from gradlint.binding import Dims
from gradlint.canonical import canonicalize
from gradlint.graph import op
from gradlint.load import from_proto
from gradlint.testing import session

STAY, TURN = "moved = Identity(both)", "moved = Transpose<perm = [1, 0, 2]>(both)"


def picking(index: str, move: str, axis: int) -> onnx.ModelProto:
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        pick (float[2, 1, 3] a, float[2, 2, 3] b) => (float[A, B, C] y)
        <int64[{index.count(",") + 1}] k = {{{index}}}>
        {{
          p = Exp(a)
          q = Tanh(b)
          both = Concat<axis = 1>(p, q)
          {move}
          y = Gather<axis = {axis}>(moved, k)
        }}""")


@pytest.mark.parametrize(
    ("index", "move", "axis", "left"),
    [
        ("-1", STAY, 1, {"Tanh", "Gather"}),
        ("0", STAY, 1, {"Exp", "Gather"}),
        ("2, 1", STAY, 1, {"Tanh", "Gather"}),
        ("-1", TURN, 0, {"Tanh", "Transpose", "Gather"}),
        ("0, 1", STAY, 1, {"Exp", "Tanh", "Concat", "Gather"}),
        ("1", STAY, 0, {"Exp", "Tanh", "Concat", "Gather"}),
        ("1", TURN, 1, {"Exp", "Tanh", "Concat", "Transpose", "Gather"}),
    ],
)
def test_a_pick_from_one_piece_reads_that_piece(index: str, move: str, axis: int, left: set[str]) -> None:
    model, rng = picking(index, move, axis), np.random.default_rng(0)
    feeds = {"a": rng.standard_normal((2, 1, 3), np.float32), "b": rng.standard_normal((2, 2, 3), np.float32)}
    loaded = from_proto(model, "model", Path("."))
    canonicalize(loaded, Dims())
    assert {op(node) for node in loaded.graph} == left
    after = ir.serde.serialize_model(loaded)
    kept = {name: feeds[name] for name in feeds if name in {i.name for i in after.graph.input}}
    (wanted,), (found,) = session(model).run(None, feeds), session(after).run(None, kept)
    np.testing.assert_array_equal(found, wanted)
