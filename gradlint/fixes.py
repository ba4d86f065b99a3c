"""Choosing remedies for a finding and writing them out for the layer it names.

A rule lists remedies by name, most effective first; `choose_fixes` moves those that treat what the blame names to the
front: activation slopes call for another activation, weights for another initialisation, time steps for a gated cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradlint.fact_table import Subject
from gradlint.remedies import REMEDIES, Cause
from gradlint.remedy_values import VARIANCES, places, present_activation, weight_factor
from gradlint.results import Blame, Fix

# A Softmax inside is most often an attention's: no activation can take its place.
_OPERATORS: Mapping[Cause, str] = {
    "activation": "Sigmoid Tanh Relu LeakyRelu PRelu Elu Selu Celu Gelu Swish Mish Softplus Softsign HardSigmoid "
    "HardSwish ThresholdedRelu Clip Erf Exp",
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
_SCHEMES: Mapping[str, str] = {"he-init": "He", "xavier-init": "Xavier", "lecun-init": "LeCun"}
_MARKED = 1.0  # decades from which on a decay or growth decides what helps
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
    chain = subject.scope != "activation"  # a rule about an activation has named the cause itself
    cause = main_cause(subject.blame) if chain and abs(_change(subject)) >= _MARKED else None
    ordered = sorted(names, key=lambda name: REMEDIES[name].treats != cause)
    return tuple(Fix(name, write_fix(name, subject, span)) for name in ordered if _applies(name, subject))


def _applies(name: str, subject: Subject) -> bool:
    """False for what is there already, for what would make it worse, and for what has no place here."""
    facts = subject.facts
    if REMEDIES[name].treats == "time":
        return _applies_to_time(name, subject)
    if name in _ACTIVATIONS:
        present = _replaceable(subject)
        known = facts.get("activation") or facts.get("next_activation")
        return present != _ACTIVATIONS[name] and (present is not None or known is None)
    if name in ("sigmoid-head", "straight-through"):
        return ("Softmax" in str(facts.get("blocking_ops"))) == (name == "sigmoid-head")
    if name == "layer-wise-rate":
        return facts.get("optimizer") != "adam"  # which has one per weight
    if name in ("batch-norm", "layer-norm"):
        return facts.get("follows_norm") is not True and facts.get("before_norm") is not True
    if name == "skip-connections":
        return facts.get("has_skip") is not True
    if name == "log-softmax":
        return facts.get("op_type") not in ("Sqrt", "Div", "Reciprocal", "Pow")
    if name == "standard-operators":  # those of ONNX itself are it already
        return any(":" in str(facts.get(named, "")) for named in ("unmodelled_ops", "cut_ops"))
    if name == "repair-weights":
        return facts.get("non_finite") != 0
    if name == "residual-scale":
        return facts.get("residual_additions") != 0
    if name in ("scale-init", *VARIANCES):
        return _rescales(name, subject)
    return True


def _applies_to_time(name: str, subject: Subject) -> bool:
    """Time passes here, and the cell is not the one that is advised, but is the one whose gate is spoken of."""
    cells = {str(subject.facts.get(fact)) for fact in ("cell", "op_type")} | {item.op_type for item in subject.blame}
    passing = subject.scope == "recurrent" or any(_CAUSE_OF.get(op) == "time" for op in cells)
    wanted = {"forget-bias": "LSTM", "update-bias": "GRU"}.get(name)
    return passing and name.upper() not in cells and (wanted is None or wanted in cells)


def _replaceable(subject: Subject) -> str | None:
    """The activation that another could take the place of: the one here, or, of those blamed, the worst."""
    here = present_activation(subject)
    if subject.scope == "activation" or here not in (None, "Relu") or main_cause(subject.blame) != "activation":
        return here
    return _blamed(subject, "activation")[0].op_type


def _blamed(subject: Subject, cause: Cause) -> list[Blame]:
    """What is blamed of the operator with the largest share among those of a cause, in the graph's order."""
    sums: dict[str, float] = {}
    for item in subject.blame:
        if _CAUSE_OF.get(item.op_type) == cause:
            sums[item.op_type] = sums.get(item.op_type, 0.0) + abs(item.decades)
    worst = max(sums, key=lambda op: sums[op], default=None)
    return [item for item in subject.blame if item.op_type == worst]


def _rescales(name: str, subject: Subject) -> bool:
    """Another scale by more than a tenth, and towards the other side: larger weights where the gradient shrinks."""
    factor, change = weight_factor(subject, name), _change(subject)
    if subject.scope != "recurrent" and _CAUSE_OF.get(str(subject.facts.get("op_type"))) == "time":
        return False
    if factor is None:
        return name != "scale-init"
    if name in _SCHEMES and subject.facts.get("init_scheme") not in (None, _SCHEMES[name]):
        return False
    return not (0.9 < factor < 1.1 or (change <= -_MARKED and factor < 1) or (change >= _MARKED and factor > 1))


def _change(subject: Subject) -> float:
    """Decades between the outputs and here."""
    return sum(item.decades for item in subject.blame)


def write_fix(name: str, subject: Subject, span: tuple[str, str] | None = None) -> str:
    """The remedy's text for this subject: what and where, then the line for PyTorch and for Keras."""
    remedy = REMEDIES[name]
    layer = None if span is None else _from_to(*span)
    replaced = None
    if remedy.treats in ("activation", "time") and subject.scope not in ("activation", "recurrent"):
        blamed = _blamed(subject, remedy.treats)
        if blamed and (remedy.treats == "time" or _replaceable(subject) != present_activation(subject)):
            layer, replaced = _from_to(blamed[0].node, blamed[-1].node), blamed[0].op_type
    blamed = _blamed(subject, "weights")
    others = f", and likewise those of {_from_to(blamed[0].node, blamed[-1].node)}" if len(blamed) > 1 else ""
    values = {"others": others} | places(subject, layer) | (remedy.values(subject) if remedy.values else {})
    if replaced is not None:
        values["activation"] = replaced
    text, pytorch, keras = (part.format(**values) for part in (remedy.text, remedy.pytorch, remedy.keras))
    return f"{text[:1].upper()}{text[1:]}. PyTorch: `{pytorch}`. Keras: `{keras}`."


def _from_to(first: str, last: str) -> str:
    return f"`{first}`" if first == last else f"`{first}` to `{last}`"
