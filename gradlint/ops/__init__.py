"""One file per operator family; importing this package fills the tables in `gradlint.transfer`."""

from gradlint.ops import (
    activation,
    linear,
)

__all__ = [
    "activation",
    "linear",
]
