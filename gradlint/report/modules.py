"""Layers grouped by the module they belong to, so that a deep model's ladder folds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from gradlint.report.ladder import Fold, Rung

FLAT = 40
_SPLIT = 12
_CHUNK = 25


@dataclass(frozen=True)
class Group:
    """Neighbouring layers of one module, in order, some of them grouped further."""

    name: str
    items: tuple[Rung | Group, ...]
    fold: Fold


def tree(ladder: Sequence[Rung]) -> tuple[Rung | Group, ...]:
    """The ladder as nested groups by module; as it is when it has at most `FLAT` layers."""
    if len(ladder) <= FLAT:
        return tuple(ladder)
    return _nest([(_path(rung), rung) for rung in ladder], 0)


def _path(rung: Rung) -> tuple[str, ...]:
    """The module's path; without one, that of the layer's name but for its own part."""
    if rung.row.module:
        return tuple(re.split(r"[./]", rung.row.module.strip("./"))[:8])
    return tuple(re.split(r"[./]", rung.row.name.strip("./"))[:-1][:8])


def _nest(layers: list[tuple[tuple[str, ...], Rung]], depth: int) -> tuple[Rung | Group, ...]:
    items: list[Rung | Group] = []
    runs = [list(run) for _, run in groupby(layers, key=lambda layer: layer[0][depth : depth + 1])]
    if len(runs) == 1 and len(layers[0][0]) > depth:
        return _nest(layers, depth + 1)
    for run in runs:
        path = run[0][0]
        if len(run) < 3 or len(path) <= depth:
            items.extend(rung for _, rung in run)
            continue
        inner = _nest(run, depth + 1) if len(run) > _SPLIT else tuple(rung for _, rung in run)
        items.append(Group(".".join(path[: depth + 1]), inner, Fold(tuple(rung for _, rung in run))))
    return _chunks(items) if sum(isinstance(item, Rung) for item in items) > FLAT else tuple(items)


def _chunks(items: list[Rung | Group]) -> tuple[Rung | Group, ...]:
    """Long runs of layers that no module groups, in groups of `_CHUNK`."""
    result: list[Rung | Group] = []
    for single, run in groupby(items, key=lambda item: isinstance(item, Rung)):
        members = list(run)
        if not single or len(members) <= FLAT:
            result.extend(members)
            continue
        for start in range(0, len(members), _CHUNK):
            part = tuple(item for item in members[start : start + _CHUNK] if isinstance(item, Rung))
            result.append(Group(f"{part[0].row.name} to {part[-1].row.name}", part, Fold(part)))
    return tuple(result)
