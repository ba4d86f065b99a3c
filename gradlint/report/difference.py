"""The difference of two reports, as text, JSON, Markdown or a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from gradlint.compare import Difference, Move, Shift
from gradlint.report.headline import ranked, risk_phrase
from gradlint.report.markdown import inert
from gradlint.report.text import count, decades, label, prose, share
from gradlint.results import Finding, Report

FORMATS = ("full", "json", "markdown", "html")
SCHEMA = "gradlint-diff/1"
_MOST_SHIFTS = 20


def render_difference(differences: Sequence[Difference], format: str) -> str:
    """The differences in one of `FORMATS`; the text ends with a newline."""
    if format == "json":
        text = json.dumps({"schema": SCHEMA, "models": [_plain(item) for item in differences]}, indent=1)
        return text.replace("\x7f", "\\u007f") + "\n"
    if format == "html":
        # Imported here: only the page needs it.
        from gradlint.report.comparison import render

        return render(differences)
    section = _markdown if format == "markdown" else _text
    return "\n".join("\n".join(section(item)) + "\n" for item in differences)


def _plain(item: Difference) -> dict[str, Any]:
    def findings(some: Sequence[Finding]) -> list[dict[str, Any]]:
        keys = ("rule", "code", "level", "layer", "weight", "message", "fingerprint")
        return [{key: getattr(finding, key) for key in keys} for finding in some]

    summary = {side: _summary(report) for side, report in (("base", item.base), ("head", item.head))}
    shifts = [
        {"layer": s.layer, "op_type": s.op_type, "evidence": s.evidence, "before": s.before, "after": s.after}
        for s in item.shifts
    ]
    return {
        **summary,
        "new": findings(item.new),
        "gone": findings(item.gone),
        "same": findings(item.same),
        "layers": {"added": item.layers_added, "removed": item.layers_removed, "changed": shifts},
        "weights": [{"weight": m.weight, "layer": m.layer, "moved": m.moved} for m in item.moves],
    }


def _summary(report: Report | None) -> dict[str, Any] | None:
    if report is None:
        return None
    risk = report.summary.risk
    finite = risk is not None and math.isfinite(risk)
    return {"path": report.model.path, "verdict": report.summary.verdict, "risk": risk if finite else None}


def _verdicts(item: Difference) -> str:
    head = f"{item.head.summary.verdict}, {risk_phrase(item.head)}"
    if item.base is None:
        return f"{head} (a new model)"
    return f"{item.base.summary.verdict}, {risk_phrase(item.base)} -> {head}"


def _counts(item: Difference) -> str:
    return f"{count(len(item.new), 'new finding')}, {len(item.gone)} gone, {len(item.same)} the same"


def _finding(finding: Finding) -> str:
    place = label(finding.weight or finding.layer or "the model", 60)
    return f"{finding.level} {label(finding.code, 20)} {label(finding.rule, 60)} at {place}: {prose(finding.message)}"


def _shift(shift: Shift) -> str:
    figures = f"{decades(shift.before)} -> {decades(shift.after)} ({decades(shift.change)} decades, {shift.evidence})"
    return f"{label(shift.layer, 60)} ({label(shift.op_type, 40)}): {figures}"


def _layers(item: Difference) -> list[str]:
    """The lines on layers: the changed ones, and how many came and went."""
    lines = [_shift(shift) for shift in item.shifts[:_MOST_SHIFTS]]
    if rest := len(item.shifts) - len(lines):
        lines.append(f"and {count(rest, 'more layer')}")
    if item.base is not None and (item.layers_added or item.layers_removed):
        lines.append(f"layers: {item.layers_added} added, {item.layers_removed} removed")
    if item.moves:
        least, most = (pick(item.moves, key=lambda move: move.moved) for pick in (min, max))
        lines.append(f"weights moved by {_moved(least)} to {_moved(most)}" if most.moved else "no weight moved")
    return lines


def _moved(move: Move) -> str:
    return f"{share(move.moved)} ({label(move.weight, 60)})"


def _text(item: Difference) -> list[str]:
    lines = [label(item.head.model.path), f"  {_verdicts(item)}", f"  {_counts(item)}"]
    lines += [f"  + {_finding(finding)}" for finding in ranked(item.new)]
    lines += [f"  - {_finding(finding)}" for finding in ranked(item.gone)]
    return lines + [f"  ~ {line}" for line in _layers(item)]


def _markdown(item: Difference) -> list[str]:
    lines = [f"### {inert(label(item.head.model.path))}", "", f"{inert(_verdicts(item))}; {_counts(item)}", ""]
    for title, some in (("New", item.new), ("Gone", item.gone)):
        if some:
            lines += [f"**{title}**", "", *(f"- {inert(_finding(finding))}" for finding in ranked(some)), ""]
    if layers := _layers(item):
        lines += ["**Gradient by layer**", "", *(f"- {inert(line)}" for line in layers), ""]
    return lines
