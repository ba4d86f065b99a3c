"""Choosing remedies for a finding and writing them out for the layer it names.

A rule lists remedies by name, most effective first; `choose_fixes` moves those that treat what the blame names to the
front: activation slopes call for another activation, weights for another initialisation, time steps for a gated cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradlint.fact_table import Subject
from gradlint.remedies import REMEDIES, Cause, places
from gradlint.results import Blame, Fix

_OPERATORS: Mapping[Cause, str] = {
    "activation": "Sigmoid Tanh Relu LeakyRelu PRelu Elu Selu Celu Gelu Swish Mish Softplus Softsign HardSigmoid "
    "HardSwish ThresholdedRelu Clip Erf Exp Softmax LogSoftmax",
    "weights": "MatMul Gemm Conv ConvTranspose Einsum",
    "time": "RNN LSTM GRU Scan Loop",
    "norm": "BatchNormalization LayerNormalization InstanceNormalization GroupNormalization RMSNormalization "
    "LpNormalization",
}
_CAUSE_OF: Mapping[str, Cause] = {op: cause for cause, operators in _OPERATORS.items() for op in operators.split()}


def main_cause(blame: Sequence[Blame]) -> Cause:
    """What took the larger part of the decay (or of the growth, where the blame sums to growth)."""
    total = sum(item.decades for item in blame)
    sums: dict[Cause, float] = {}
    for item in blame:
        cause = _CAUSE_OF.get(item.op_type, "other")
        sums[cause] = sums.get(cause, 0.0) + math.copysign(1, total) * item.decades
    return max(sums, key=lambda cause: sums[cause]) if sums else "other"


def choose_fixes(names: Sequence[str], subject: Subject) -> tuple[Fix, ...]:
    """The named remedies for this subject, those that treat the main cause first, else in the rule's order."""
    cause = main_cause(subject.blame) if subject.blame else None
    ordered = sorted(names, key=lambda name: REMEDIES[name].treats != cause)
    return tuple(Fix(name, write_fix(name, subject)) for name in ordered)


def write_fix(name: str, subject: Subject) -> str:
    """The remedy's text for this subject: what and where, then the line for PyTorch and for Keras."""
    remedy = REMEDIES[name]
    values = places(subject) | (remedy.values(subject) if remedy.values else {})
    text, pytorch, keras = (part.format(**values) for part in (remedy.text, remedy.pytorch, remedy.keras))
    return f"{text}. PyTorch: `{pytorch}`. Keras: `{keras}`."
