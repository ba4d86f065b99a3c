"""One line per finding, for grep and editors: `path: LAYER: level CODE rule-name message`."""

from __future__ import annotations

from collections.abc import Sequence

from gradlint.report.headline import counts_phrase, ranked, risk_phrase
from gradlint.report.text import escape, label, prose
from gradlint.results import Report


def render(reports: Sequence[Report]) -> str:
    """Findings with the worst first, then one summary line per model; `-` stands for the model as a whole."""
    lines = []
    for report in reports:
        path = escape(report.model.path)
        for finding in ranked(report.findings):
            place = label(finding.layer or finding.weight or "-")
            rule = f"{label(finding.code)} {label(finding.rule)}"
            lines.append(f"{path}: {place}: {finding.level} {rule} {prose(finding.message)}")
        lines.append(f"{path}: {report.summary.verdict}, {risk_phrase(report)}, {counts_phrase(report)}")
    return "".join(line + "\n" for line in lines)
