"""Markdown for a pull-request comment or a job summary, with the ladder as text."""

from __future__ import annotations

import re
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
from gradlint.report.terminal import ladder
from gradlint.report.text import count, label, prose
from gradlint.results import Fault, Finding, Report

# A comment holds 65,536 characters: this many findings are told per model, this many models in full, this many faults.
MOST_FINDINGS = 12
MOST_MODELS = 8
MOST_FAULTS = 20
_SIGNS = {"fail": "❌", "warn": "⚠️", "pass": "✅"}


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """A section per model, with one note per rule; of several models those that pass take one line each, at the end.

    Models that were not checked come first.
    """
    told = [report for report in reports if len(reports) == 1 or report.summary.verdict != "pass"]
    lines = [f"- 🛑 **not checked** {inert(prose(fault.message))}" for fault in faults[:MOST_FAULTS]]
    if len(faults) > MOST_FAULTS:
        lines.append(f"- and {count(len(faults) - MOST_FAULTS, 'more model')} not checked")
    lines += [""] if faults else []
    for report in told[:MOST_MODELS]:
        lines += _section(report)
    for report in [r for r in reports if r not in told] + told[MOST_MODELS:]:
        lines.append(f"- {_title(report)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def inert(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no mention, no link, no reference."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;").replace("://", ":&#47;/")
    text = re.sub(r"#(?=\d)(?<!&#)", "&#35;", text)
    return re.sub(r"([\\`*_\[\]|~>$])", r"\\\1", text)


def _quoting(text: str) -> str:
    """Inert text in which what stands between two backticks stays code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return inert(text)
    return "".join(f"`{part}`" if i % 2 and part.strip() else inert(part) for i, part in enumerate(parts))


def _title(report: Report) -> str:
    verdict = report.summary.verdict
    return f"{_SIGNS[verdict]} **{verdict}** {inert(label(report.model.path))} ({risk_phrase(report)})"


def _section(report: Report) -> list[str]:
    lines = [f"### {_title(report)}", "", inert(headline(report)), ""]
    if report.findings:
        notes: set[str] = set()
        told: list[Finding] = []
        for finding in ranked(report.findings):
            if len(told) < MOST_FINDINGS and (finding.level != "note" or finding.rule not in notes):
                told.append(finding)
                notes.add(finding.rule)
        for finding in told:
            lines += _finding(report, finding)
        if rest := len(report.findings) - len(told):
            lines.append(f"- and {count(rest, 'more finding')} ({counts_phrase(report)} in all)")
        lines.append("")
    if text := ladder(report, 80):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", "\n".join(text)))])
        lines += [
            "<details><summary>Gradient by layer</summary>",
            "",
            f"{fence}text",
            *text,
            fence,
            "",
            "</details>",
            "",
        ]
    facts = [*verdict_facts(report), *(prose(text) for text in report.settings.assumptions), *coverage_gaps(report)]
    if known := report.summary.baselined:
        facts.append(f"{count(known, 'finding')} in the baseline")
    return [*lines, f"<sub>{inert('; '.join(facts))}</sub>", ""]


def _finding(report: Report, finding: Finding) -> list[str]:
    place = label(finding.layer or finding.weight or "the model", 80)
    head = f"- **{finding.level} {inert(label(finding.code, 20))}** {inert(label(finding.rule, 60))} at {inert(place)}"
    source = f", {inert(label(finding.source.file))}:{finding.source.line}" if finding.source else ""
    lines = [f"{head}{source} ({finding.evidence}): {inert(prose(finding.message))}"]
    if blame := blame_summary(finding_blame(report, finding)):
        lines.append(f"  - blame: {inert(blame)}")
    if finding.fixes and finding.level != "note":
        lines.append(f"  - fix: {_quoting(prose(finding.fixes[0].text))}")
    return lines
