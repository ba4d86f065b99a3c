"""Workflow commands of GitHub Actions: an annotation per finding, on the Python line where it is known."""

from __future__ import annotations

from collections.abc import Sequence

from gradlint.report.headline import counts_phrase, risk_phrase
from gradlint.report.location import Located, located
from gradlint.report.text import count, escape, label, prose
from gradlint.results import LEVELS, Fault, Report

# A step shows no more annotations of a level.
MOST = 10
_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """At most `MOST` annotations per level, the worst first, then a line per model for the log.

    A model that was not checked is worse than an error found.
    """
    places = located(reports)
    lines = []
    for level in LEVELS:
        commands = [_fault(fault) for fault in faults] if level == "error" else []
        commands += [_command(place) for place in places if place.finding.level == level]
        lines += commands[:MOST]
        if len(commands) > MOST:
            lines.append(f"gradlint: {count(len(commands) - MOST, f'more {level}')} without an annotation")
    for report in reports:
        facts = f"{report.summary.verdict}, {risk_phrase(report)}, {counts_phrase(report)}"
        lines.append(f"gradlint: {_inert(label(report.model.path))}: {facts}")
    lines += [f"gradlint: {_inert(label(fault.path))}: not checked" for fault in faults]
    return "".join(line + "\n" for line in lines)


def _fault(fault: Fault) -> str:
    return f"::error file={_property(fault.path)},title=not checked::{_data(prose(fault.message))}"


def _command(place: Located) -> str:
    finding = place.finding
    properties = [f"file={_property(place.path)}"]
    if place.line is not None:
        properties.append(f"line={place.line}")
    properties.append(f"title={_property(label(f'{finding.code} {finding.rule}'))}")
    where = label(finding.layer or finding.weight or "the model")
    text = f"{label(place.report.model.path)}, {where}: {prose(finding.message)}"
    if finding.fixes:
        text += f"\n{prose(finding.fixes[0].text)}"
    return f"::{_COMMANDS[finding.level]} {','.join(properties)}::{_data(text)}"


def _data(text: str) -> str:
    return _inert(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(escape(text)).replace(":", "%3A").replace(",", "%2C")


def _inert(text: str) -> str:
    """The older form of a command is read anywhere in a line: its opening is broken up."""
    return text.replace("##[", "# #[")
