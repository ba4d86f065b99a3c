"""One file per operator family; importing this package fills the tables in `gradlint.transfer`."""

from gradlint.ops import (
    activation,
    indexing,
    linear,
    recurrent,
    reduction,
    shape,
    slicing,
    softmax,
)

__all__ = [
    "activation",
    "indexing",
    "linear",
    "recurrent",
    "reduction",
    "shape",
    "slicing",
    "softmax",
]
