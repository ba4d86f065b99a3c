"""What a check is asked to do, as plain data: command line, configuration file and Python callers all make one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gradlint.exceptions import UsageError

Loss = Literal["linear", "cross-entropy", "bce", "mse"]
Mode = Literal["train", "eval"]
Stage = Literal["init", "trained"]
Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Options:
    """Settings of one check; every default is the command line's. Raises UsageError for a value that can't be.

    data: a file or folder of examples, or arrays by input name (and `target`, `target.<output>` for the loss). values:
    scalars to fill integer or float inputs with, by input name; dims, shapes: sizes of symbolic dimensions, by
    dimension and by input name; ranges: (lo, hi), stats: (means, standard deviations; one each, or one per channel), by
    input name. stage None: guess from the weights. threads 0: as many as the machine has. levels, limits: by rule;
    layer_ignores: rules (as in `ignore`) that stay quiet on layers and weights, by a glob on their names.
    pictures: histograms and curves of each layer, for a page.
    """

    data: Path | Mapping[str, Any] | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    loss: Loss = "linear"
    mode: Mode = "train"
    probe: bool = True
    stage: Stage | None = None
    seed: int = 0
    batch: int = 8
    threads: int = 0
    dims: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    stats: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    lr: float | None = None
    source_root: Path | None = None
    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    preview: bool = False
    rules: tuple[Path, ...] = ()
    levels: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layer_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pictures: bool = False

    def __post_init__(self) -> None:
        self._check_words()
        self._check_numbers()
        for name in ("data", "source_root"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        for name in ("select", "ignore", "extend_select", "rules"):
            value = getattr(self, name)
            if isinstance(value, str | Path):
                raise UsageError(f"{name}: {str(value)!r} is one text: give a tuple of them")
            if value is not None:
                object.__setattr__(self, name, tuple(Path(item) if name == "rules" else item for item in value))

    def _check_words(self) -> None:
        for name, words, optional in (
            ("loss", get_args(Loss), False),
            ("mode", get_args(Mode), False),
            ("stage", get_args(Stage), True),
            ("optimizer", get_args(Optimizer), True),
        ):
            value = getattr(self, name)
            if value not in words and not (optional and value is None):
                raise UsageError(f"{name}: {value!r} is none of {', '.join(words)}")

    def _check_numbers(self) -> None:
        for name, least in (("seed", 0), ("batch", 1), ("threads", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name}: {value!r} is not a whole number of at least {least}")
        if self.lr is not None and not (isinstance(self.lr, int | float) and 0 < self.lr < float("inf")):
            raise UsageError(f"lr: {self.lr!r} is not a number above 0")


Task = tuple[str, Options]  # a model's path, and how to check it
