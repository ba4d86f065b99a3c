"""What RNN, GRU and LSTM nodes say about themselves: directions, inputs, activations with their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gradlint.graph import attribute, constant_array, op

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}

# Which of (alpha, beta) an activation reads, with the defaults; the others read none.
_PARAMETERS: dict[str, tuple[float, ...]] = {
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}


@dataclass(frozen=True)
class Activation:
    """One activation function of a cell: its name in lower case (the operator's names are case-insensitive)."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


def activations(node: ir.Node) -> list[tuple[Activation, ...]]:
    """The activations of each direction: (f,), (f, g) or (f, g, h).

    alpha and beta are lists consumed in order by the functions that have such a parameter.
    """
    default = _DEFAULTS[op(node)]
    count = directions(node)
    names = [str(n).lower() for n in attribute(node, "activations", ()) or default * count]
    names = names[: len(default) * count]
    alphas, betas = (list(attribute(node, f"activation_{k}", ()) or ()) for k in ("alpha", "beta"))
    found = []
    for name in names:
        values = list(_PARAMETERS.get(name, ()))
        for k, given in enumerate((alphas, betas)):
            if k < len(values) and given:
                values[k] = float(given.pop(0))
        found.append(Activation(name, *values))
    return [tuple(found[k : k + len(default)]) for k in range(0, len(found), len(default))]


def directions(node: ir.Node) -> int:
    return 2 if attribute(node, "direction", "forward") == "bidirectional" else 1


def backwards(node: ir.Node, k: int) -> bool:
    """Does direction k run from the last step to the first?"""
    return k == 1 or attribute(node, "direction", "forward") == "reverse"


def optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def lengths(node: ir.Node) -> ir.Value | None:
    """sequence_lens, unless they say that every sequence is whole."""
    given, x = optional(node, 4), node.inputs[0]
    array = constant_array(given)
    steps = x.shape[0] if x is not None and x.shape is not None else None
    if array is not None and isinstance(steps, int) and (array >= steps).all():
        return None
    return given
