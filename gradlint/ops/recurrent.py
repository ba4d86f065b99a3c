"""Recurrent layers: RNN, GRU, LSTM."""

from __future__ import annotations

from gradlint.ops.recurrent_vjp import recurrent_vjp
from gradlint.transfer import row

for _cell in ("RNN", "GRU", "LSTM"):
    row(_cell, vjp=recurrent_vjp)
