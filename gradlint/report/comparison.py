"""The page of a difference: both ladders on one axis, findings new, gone and the same, and how far weights moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradlint.compare import NOTABLE, Difference, Move
from gradlint.report.document import document, position
from gradlint.report.headline import headline, ranked, risk_phrase
from gradlint.report.ladder import Rung, axis, rungs
from gradlint.report.page import fix_blocks, grid, ticks
from gradlint.report.text import count, decades, label, prose, share
from gradlint.results import Finding

_OPEN_ROWS = 80  # layers up to which all are shown
_RUN = 4  # neighbours, hardly changed, that are folded beyond it
_STILL, _FAR = -6.0, 1.0  # ends of the axis of movement: log10 of |w' - w| / |w|


@dataclass(frozen=True)
class Pair:
    """A layer in both models, or in one: its gradient before and after, in decades and in per cent of the axis."""

    name: str
    op_type: str
    level: str
    state: str
    before: str
    after: str
    change: str
    spoken: str
    base: float | None
    head: float | None


@dataclass(frozen=True)
class Run:
    """Neighbouring pairs shown together; folded where nothing about them changed."""

    pairs: tuple[Pair, ...]
    title: str | None = None


def render(differences: Sequence[Difference]) -> str:
    """One page for all differences."""
    return document("comparison.html", models=[_model(item, f"m{i}") for i, item in enumerate(differences)])


def _model(item: Difference, anchor: str) -> dict[str, Any]:
    before = rungs(item.base) if item.base is not None else []
    after = rungs(item.head)
    low, high = axis([*before, *after])
    pairs = [_pair(old, new, low, high) for old, new in _aligned(before, after)]
    groups = (("new", item.new), ("gone", item.gone), ("the same", item.same))
    return {
        "anchor": anchor,
        "path": label(item.head.model.path),
        "sides": [
            (name, report.summary.verdict, label(report.model.path), risk_phrase(report), headline(report))
            for name, report in (("Base", item.base), ("Head", item.head))
            if report is not None
        ],
        "verdict": item.head.summary.verdict,
        "counts": f"{count(len(item.new), 'new finding')}, {len(item.gone)} gone, {len(item.same)} the same",
        "layers": _layers(item),
        "runs": list(_runs(pairs)),
        "grid": [(position(v, low, high), kind) for v, kind in grid(low, high)],
        "scale": [(position(v, low, high), f"{v:+.0f}" if v else "0") for v in ticks(low, high)],
        "groups": [(title, [_card(finding) for finding in ranked(some)]) for title, some in groups if some],
        "moves": [_move(move) for move in item.moves],
        "move_scale": [(position(v, _STILL, _FAR), f"{v:+.0f}" if v else "0") for v in ticks(_STILL, _FAR)],
    }


def _layers(item: Difference) -> str:
    parts = [count(len(item.shifts), "layer") + f" changed by a factor of {10**NOTABLE:.0f} or more"]
    if item.base is not None and (item.layers_added or item.layers_removed):
        parts.append(f"{item.layers_added} added, {item.layers_removed} removed")
    return "; ".join(parts)


def _card(finding: Finding) -> dict[str, Any]:
    return {
        "level": finding.level,
        "title": f"{label(finding.code, 20)} {label(finding.rule, 60)}",
        "place": label(finding.weight or finding.layer or "the model"),
        "message": prose(finding.message),
        "fix": fix_blocks(finding.fixes[0].text) if finding.fixes else [],
    }


# -- layers ------------------------------------------------------------------------------------------------------------


def _aligned(before: Sequence[Rung], after: Sequence[Rung]) -> Iterator[tuple[Rung | None, Rung | None]]:
    """Layers of the same name together, in head's order; those that only base has stand where they stood."""
    old = {rung.row.name: rung for rung in before}
    kept = {rung.row.name for rung in after}
    waiting = list(before)
    for rung in after:
        if rung.row.name in old:
            while waiting and waiting[0].row.name not in kept:
                yield waiting.pop(0), None
            waiting = [other for other in waiting if other.row.name != rung.row.name]
        yield old.get(rung.row.name), rung
    yield from ((rung, None) for rung in waiting if rung.row.name not in kept)


def _pair(old: Rung | None, new: Rung | None, low: float, high: float) -> Pair:
    shown = new or old
    assert shown is not None
    state = "removed" if new is None else "added" if old is None else "both"
    values = [None if rung is None else rung.decades for rung in (old, new)]
    figures = ["-" if rung is None else rung.figure for rung in (old, new)]
    change = ""
    if values[0] is not None and values[1] is not None:
        change = decades(values[1] - values[0])
    places = [None if value is None else max(position(value, low, high), 0.6) for value in values]
    spoken = f"before {figures[0]}, after {figures[1]}"
    level = (new.level if new is not None else None) or "good"
    name, op_type = label(shown.row.name), label(shown.row.op_type, 40)
    return Pair(name, op_type, level, state, figures[0], figures[1], change or state, spoken, places[0], places[1])


def _runs(pairs: Sequence[Pair]) -> Iterator[Run]:
    """All in one run while they are few; else what hardly changed is folded."""
    if len(pairs) <= _OPEN_ROWS:
        yield Run(tuple(pairs))
        return
    start = 0
    while start < len(pairs):
        calm, end = _is_calm(pairs[start]), start
        while end < len(pairs) and _is_calm(pairs[end]) == calm:
            end += 1
        part = tuple(pairs[start:end])
        title = f"{count(len(part), 'layer')} that changed by less" if calm and len(part) >= _RUN else None
        yield Run(part, title)
        start = end


def _is_calm(pair: Pair) -> bool:
    if pair.state != "both" or pair.level in ("error", "warning"):
        return False
    try:
        return abs(float(pair.change)) < NOTABLE
    except ValueError:
        return pair.before == pair.after


# -- weights -----------------------------------------------------------------------------------------------------------


def _move(move: Move) -> tuple[str, str, str, float]:
    """Name, layer, figure and place of the bar."""
    level = math.log10(move.moved) if move.moved > 0 else _STILL
    return label(move.weight), label(move.layer), share(move.moved), position(level, _STILL, _FAR)
