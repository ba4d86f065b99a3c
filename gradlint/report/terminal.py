"""The report for a terminal: verdict, findings with blame and fix, and the gradient ladder."""

from __future__ import annotations

from collections.abc import Sequence

from gradlint.report.headline import (
    blame_summary,
    counts_phrase,
    coverage_gaps,
    finding_blame,
    headline,
    ranked,
    risk_phrase,
    verdict_facts,
)
from gradlint.report.ladder import STARVED, Fold, Rung, axis, fold, rungs
from gradlint.report.text import cells, clip, count, label, pad, prose, wrap
from gradlint.results import Finding, Report

LADDER_LINES = {"pass": 24, "warn": 60, "fail": 60}
_MINIMUM = 40
_STYLES = {"error": "31", "warning": "33", "note": "36", "good": "32", "bold": "1", "dim": "2"}
_VERDICT_STYLES = {"pass": "good", "warn": "warning", "fail": "error"}
_OTHERS = 6


class _Page:
    """Lines of a fixed width, styled with ANSI sequences where colour is wanted."""

    def __init__(self, color: bool, width: int) -> None:
        self.color = color
        self.width = max(width, _MINIMUM)
        self.lines: list[str] = []

    def style(self, text: str, *styles: str) -> str:
        if not self.color or not text:
            return text
        return f"\x1b[{';'.join(_STYLES[s] for s in styles)}m{text}\x1b[0m"

    def add(self, *parts: tuple[str, str] | str) -> None:
        """One line of (text, style) parts, cut at the page's width."""
        room, line, gap = self.width, "", ""
        for part in parts:
            text, styles = (part, "") if isinstance(part, str) else part
            text = clip(text, room) if room > 0 else ""
            room -= cells(text)
            shown = text.rstrip()
            if shown:
                line += gap + (self.style(shown, *styles.split()) if styles else shown)
                gap = ""
            gap += text[len(shown) :]
        self.lines.append(line)

    def field(self, name: str, text: str, indent: int = 0) -> None:
        """A name and its wrapped text, further lines hanging; a line's own indent (code) is kept."""
        lead = " " * indent + (f"{name:<7} " if name else "")
        text = prose(text.rstrip())
        inset = min(len(text) - len(text.lstrip(" ")), 12)
        for line in wrap(text.lstrip(" "), self.width - len(lead) - inset):
            self.add((lead, "dim"), " " * inset + line)
            lead = " " * len(lead)


def render(reports: Sequence[Report], *, color: bool = False, width: int = 80) -> str:
    """Reports one under the other, each line at most `width` columns (at least 40); several end with their tally."""
    page = _Page(color, width)
    for report in reports:
        _report(page, report)
    if len(reports) > 1:
        verdicts = [report.summary.verdict for report in reports]
        tally = ", ".join(f"{n} {v}" for v in ("fail", "warn", "pass") if (n := verdicts.count(v)))
        page.add((f"{len(reports)} models: {tally}", "bold"))
    return "\n".join(page.lines).rstrip("\n") + "\n"


def _report(page: _Page, report: Report) -> None:
    verdict = report.summary.verdict
    tail = f"  {risk_phrase(report)}"
    path = label(report.model.path, page.width - 6 - len(tail))
    page.add((verdict.upper(), f"bold {_VERDICT_STYLES[verdict]}"), "  ", (path, "bold"), tail)
    page.field("", headline(report))
    for line in verdict_facts(report):
        for part in wrap(line, page.width):
            page.add((part, "dim"))
    for assumption in report.settings.assumptions:
        page.field("assumed", assumption)
    for gap in coverage_gaps(report):
        page.field("missed", gap)
    _findings(page, report)
    _ladder(page, report)
    if report.findings or report.summary.baselined:
        page.lines.append("")
        page.add((counts_phrase(report), "bold"))
    page.lines.append("")


def _findings(page: _Page, report: Report) -> None:
    """The first finding of each rule and level in full, the others of it by their layer."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in ranked(report.findings):
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    for first, *others in groups.values():
        page.lines.append("")
        _finding(page, report, first)
        if others:
            names = [_place(finding, 30) for finding in others[:_OTHERS]]
            more = f" and {len(others) - _OTHERS} more" if len(others) > _OTHERS else ""
            page.field("also", ", ".join(names) + more, 2)


def _place(finding: Finding, columns: int) -> str:
    name = finding.layer or finding.weight
    return label(name, columns) if name else "the model"


def _finding(page: _Page, report: Report, finding: Finding) -> None:
    head = f"{finding.level} {label(finding.code, 10)}"
    rule = label(finding.rule, 40)
    room = page.width - len(head) - len(rule) - len(finding.evidence) - 8
    parts: list[tuple[str, str] | str] = [(head, f"bold {finding.level}"), " ", (rule, "bold")]
    parts += [f" at {_place(finding, max(room, 12))}", (f" ({finding.evidence})", "dim")]
    page.add(*parts)
    page.field("", finding.message, 2)
    blame = blame_summary(finding_blame(report, finding))
    if blame and blame.split(", ")[0].removesuffix(" decades") not in finding.message:
        page.field("blame", blame, 2)
    for fix in finding.fixes[: 1 if finding.level == "note" else 2]:
        for i, line in enumerate(fix.text.expandtabs(4).split("\n")):
            page.field("" if i else "fix", line, 10 if i else 2)
    if finding.source:
        page.field("source", f"{label(finding.source.file)}:{finding.source.line}", 2)


def ladder(report: Report, width: int) -> list[str]:
    """The ladder's lines without colour."""
    page = _Page(False, width)
    _ladder(page, report)
    return page.lines[1:]


def _ladder(page: _Page, report: Report) -> None:
    every = rungs(report)
    if not every:
        return
    lines = fold(every, LADDER_LINES[report.summary.verdict], report.summary.worst_layer)
    low, high = axis(every)
    ops = min(max(cells(label(rung.row.op_type)) for rung in every), 14)
    names = max(cells(_name(line)) - (ops + 1 if isinstance(line, Fold) else 0) for line in lines)
    names = min(max(names, 8), max(page.width - ops - 2 - 7 - 24, 10))
    bar = min(page.width - names - ops - 2 - 7, 48)
    page.lines.append("")
    title = "Gradient, in decades of the output's" + ("  (~ estimated)" if _guessed(every) else "")
    page.add((title, "dim"))
    scale = _scale(low, high, bar)
    page.add((" " * (names + ops + 2) + scale, "dim"))
    for line in lines:
        style = line.level if line.level in ("error", "warning") else "good"
        if isinstance(line, Fold):
            low_value = min(line.values, default=None)
            left, value = clip(_name(line), names + 1 + ops), ""
        else:
            low_value = line.decades
            left, value = pad(label(line.row.name, names), names + 1) + clip(label(line.row.op_type), ops), line.figure
        drawn = _bar(low_value, low, high, bar)
        filled = drawn.rstrip(" :")
        page.add(pad(left, names + ops + 2), (filled, style), (drawn[len(filled) :], "dim"), f"{value:>7}")


def _guessed(every: Sequence[Rung]) -> bool:
    return any(rung.measured is None and rung.estimated is not None for rung in every)


def _name(line: Rung | Fold) -> str:
    return f"… {count(len(line.rungs), 'layer')}, {line.range}" if isinstance(line, Fold) else label(line.row.name)


def _bar(value: float | None, low: float, high: float, columns: int) -> str:
    """A bar from the axis's low end to `value`, at least a sliver; a colon where the line of a starved layer runs."""
    cell = [" "] * columns
    cell[min(round((STARVED - low) / (high - low) * columns), columns - 1)] = ":"
    if value is not None:
        halves = max(round((min(max(value, low), high) - low) / (high - low) * columns * 2), 1)
        cell[: halves // 2] = "█" * (halves // 2)
        if halves % 2:
            cell[halves // 2] = "▌"
    return "".join(cell[:columns])


def _scale(low: float, high: float, columns: int) -> str:
    """The axis: its low end, the starved line and the output's own gradient, as far as they fit side by side."""
    line = [" "] * (columns + 7)

    def put(value: float) -> None:
        text = f"{value:+.0f}" if value else "0"
        at = round((value - low) / (high - low) * columns)
        at = max(0, at - len(text) + 1 if value == high else at)
        if all(c == " " for c in line[max(at - 1, 0) : at + len(text) + 1]):
            line[at : at + len(text)] = text

    for value in (0.0, STARVED, low, high):
        put(value)
    return "".join(line).rstrip()
