"""The gradient ladder: one rung per layer from input to output, folded where a model is deep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from gradlint.report.text import decades, number
from gradlint.results import LEVELS, LayerRow, Level, Report

# Lines of the ladder, in decades of the output's gradient: those of the rules that judge the trunk.
STARVED, WEAK = -3.0, -2.0
STRONG, EXPLODED = math.log10(70), 3.0

VANISHING = frozenset({"vanishing-gradient", "vanishing-for-every-input"})
EXPLODING = frozenset({"exploding-gradient"})
IN_TIME = frozenset({"rnn-vanishing-in-time", "rnn-exploding-in-time"})


@dataclass(frozen=True)
class Rung:
    """A layer with its level and its gradient in decades of the output's, by each kind of evidence."""

    row: LayerRow
    level: Level | None
    measured: float | None
    estimated: float | None
    bound: float | None

    @property
    def decades(self) -> float | None:
        return self.estimated if self.measured is None else self.measured

    @cached_property
    def figure(self) -> str:
        """The gradient as text: decades, `~` for an estimate, `zero`, `nan` where not finite, `-` where not known."""
        if self.decades is not None:
            return decades(self.decades) if self.measured is not None else "~" + decades(self.decades)
        facts = self.row.measured if "grad_norm" in self.row.measured else self.row.estimated
        if "grad_norm" not in facts:
            return "-"
        return "zero" if facts["grad_norm"] == 0 else "nan"


def worse(first: Level | None, second: Level | None) -> Level | None:
    """The more severe of two levels, None being the least."""
    return min((level for level in (first, second) if level), key=LEVELS.index, default=None)


def rungs(report: Report) -> list[Rung]:
    """One rung per layer in the graph's order. A layer has the level of its worst finding; where a finding says
    that the gradient vanishes or explodes, so have the layers beyond the rule's line."""
    levels: dict[str, Level | None] = {}
    for finding in report.findings:
        if finding.layer is not None:
            levels[finding.layer] = worse(levels.get(finding.layer), finding.level)
    vanishing = _level_of(report, VANISHING)
    exploding = _level_of(report, EXPLODING)
    cotangent = _cotangent_norm(report)
    result = []
    for row in report.layers:
        measured, estimated = number(row.measured, "decades"), number(row.estimated, "decades")
        best = estimated if measured is None else measured
        level = levels.get(row.name)
        if best is not None and vanishing and best < WEAK:
            level = worse(level, vanishing if best < STARVED else "warning")
        if best is not None and exploding and best > STRONG:
            level = worse(level, exploding if best > EXPLODED else "warning")
        result.append(Rung(row, level, measured, estimated, _bound(row.proved, cotangent)))
    return result


def _level_of(report: Report, rules: frozenset[str]) -> Level | None:
    level: Level | None = None
    for finding in report.findings:
        if finding.rule in rules and finding.level != "note":
            level = worse(level, finding.level)
    return level


def _cotangent_norm(report: Report) -> float | None:
    """The norm of the outputs' cotangent that decades are relative to: grad_norm / 10^decades of any layer."""
    norms = []
    for row in report.layers:
        facts = row.measured if number(row.measured, "decades") is not None else row.estimated
        norm, relative = number(facts, "grad_norm"), number(facts, "decades")
        if norm and relative is not None and abs(relative) < 300:
            norms.append(norm / 10**relative)
    return median(norms) if norms else None


def _bound(proved: Mapping[str, Any], cotangent: float | None) -> float | None:
    norm = number(proved, "grad_norm")
    return math.log10(norm / cotangent) if norm and cotangent and norm > 0 else None


def axis(ladder: Sequence[Rung]) -> tuple[float, float]:
    """Whole decades at both ends of the ladder's axis; at least -4 to 1, so that a healthy ladder looks calm, and at
    most what double precision can hold."""
    values = [max(-400.0, min(v, 400.0)) for r in ladder for v in (r.measured, r.estimated) if v is not None]
    return float(min(-4, math.floor(min(values, default=0)))), float(max(1, math.ceil(max(values, default=0))))


@dataclass(frozen=True)
class Fold:
    """Neighbouring rungs shown as one line."""

    rungs: tuple[Rung, ...]

    @cached_property
    def values(self) -> list[float]:
        return [rung.decades for rung in self.rungs if rung.decades is not None]

    @cached_property
    def level(self) -> Level | None:
        level: Level | None = None
        for rung in self.rungs:
            level = worse(level, rung.level)
        return level

    @cached_property
    def range(self) -> str:
        """`-0.1 to +0.3`, or the one figure the rungs share."""
        if not self.values:
            figures = {rung.figure for rung in self.rungs}
            return figures.pop() if len(figures) == 1 else "-"
        low, high = decades(min(self.values)), decades(max(self.values))
        return low if low == high else f"{low} to {high}"


def fold(ladder: Sequence[Rung], limit: int, worst: str | None = None) -> list[Rung | Fold]:
    """The ladder in about `limit` lines: runs of three or more neighbours alike become one line.

    What counts as alike widens until it fits: first within a fraction of a decade, between layers with findings of
    their own, then over ever more decades, at last over those layers too. Both ends and the worst layer stay.
    """
    lines: list[Rung | Fold] = list(ladder)
    ends = {0, len(ladder) - 1} | {i for i, rung in enumerate(ladder) if rung.row.name == worst}
    flagged = {i for i, rung in enumerate(ladder) if rung.level in ("error", "warning")}
    for kept, by_level in ((ends | flagged, True), (ends, True), (ends, False)):
        for spread in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0, 16.0, math.inf):
            if len(lines) <= limit:
                return lines
            lines = _folded(ladder, kept, spread, by_level)
    return lines


def _folded(ladder: Sequence[Rung], kept: set[int], spread: float, by_level: bool) -> list[Rung | Fold]:
    lines: list[Rung | Fold] = []
    run: list[Rung] = []

    def close() -> None:
        lines.extend([Fold(tuple(run))] if len(run) > 2 else run)
        run.clear()

    for i, rung in enumerate(ladder):
        if i in kept:
            close()
            lines.append(rung)
            continue
        values = [r.decades for r in [*run, rung] if r.decades is not None]
        if run and ((by_level and run[0].level != rung.level) or (values and max(values) - min(values) > spread)):
            close()
        run.append(rung)
    close()
    return lines
