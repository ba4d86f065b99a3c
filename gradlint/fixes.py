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
_ACTIVATIONS: Mapping[str, str] = {
    "relu": "Relu",
    "leaky-relu": "LeakyRelu",
    "prelu": "PRelu",
    "elu": "Elu",
    "selu": "Selu",
    "swish": "Silu",
    "gelu": "Gelu",
    "tanh": "Tanh",
    "softplus": "Softplus",
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


def choose_fixes(names: Sequence[str], subject: Subject, span: tuple[str, str] | None = None) -> tuple[Fix, ...]:
    """The named remedies that can apply here: those that treat the main cause first, else in the rule's order.

    `span` names the first and last layer where the finding is about several.
    """
    cause = main_cause(subject.blame) if subject.blame else None
    ordered = sorted(names, key=lambda name: REMEDIES[name].treats != cause)
    return tuple(Fix(name, write_fix(name, subject, span)) for name in ordered if _applies(name, subject))


def _applies(name: str, subject: Subject) -> bool:
    """False for what is there already, and for time where none passes."""
    facts = subject.facts
    if REMEDIES[name].treats == "time":
        operators = {str(facts.get("op_type")), *(item.op_type for item in subject.blame)}
        return subject.scope == "recurrent" or any(_CAUSE_OF.get(op) == "time" for op in operators)
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name] not in (facts.get("activation"), facts.get("next_activation"))
    if name in ("batch-norm", "layer-norm"):
        return facts.get("follows_norm") is not True
    if name == "skip-connections":
        return facts.get("has_skip") is not True
    if name == "scale-init":
        return facts.get("init_factor") is not None
    return True


def write_fix(name: str, subject: Subject, span: tuple[str, str] | None = None) -> str:
    """The remedy's text for this subject: what and where, then the line for PyTorch and for Keras."""
    remedy = REMEDIES[name]
    values = places(subject) | (remedy.values(subject) if remedy.values else {})
    if span is not None:
        values["layer"] = f"`{span[0]}` to `{span[1]}`"
    text, pytorch, keras = (part.format(**values) for part in (remedy.text, remedy.pytorch, remedy.keras))
    return f"{text[:1].upper()}{text[1:]}. PyTorch: `{pytorch}`. Keras: `{keras}`."
