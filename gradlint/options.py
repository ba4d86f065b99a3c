"""What a check is asked to do, as plain data: command line, configuration file and Python callers all make one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Loss = Literal["linear", "cross-entropy", "bce", "mse"]
Mode = Literal["train", "eval"]
Stage = Literal["init", "trained"]


@dataclass(frozen=True)
class Options:
    """Settings of one check; every default is the command line's.

    values: scalars to fill integer or float inputs with, by input name; dims, shapes: sizes of symbolic dimensions, by
    dimension and by input name; ranges: (lo, hi), stats: (means, standard deviations; one each, or one per channel), by
    input name. stage None: guess from the weights. threads 0: as many as the machine has. levels, limits: by rule;
    layer_ignores: rules (as in `ignore`) that stay quiet on layers and weights, by a glob on their names.
    pictures: histograms and curves of each layer, for a page.
    """

    data: Path | None = None
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
    optimizer: Literal["sgd", "adam"] | None = None
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
    timeout: float | None = None
    pictures: bool = False
