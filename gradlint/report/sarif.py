"""SARIF 2.1.0, as code scanning services read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from gradlint.report import explain
from gradlint.report.location import Located, located
from gradlint.report.text import escape, label, prose
from gradlint.results import Fault, Report

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
# Code scanning shows this many results of a run, and refuses runs with more than five times as many.
MOST_RESULTS = 5000
_SEVERITY = {"error": "error", "warning": "warning", "note": "recommendation"}


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """One run with the findings of all reports, the worst first; it failed where a model was not checked.

    Alerts are told apart by a fingerprint of ours: hashes of lines are alike for every finding in a binary file.
    """
    places = located(reports)[:MOST_RESULTS]
    codes = sorted({place.finding.code for place in places})
    run = {
        "tool": {
            "driver": {
                "name": "gradlint",
                "semanticVersion": version("gradlint-onnx"),
                "rules": [_rule(next(p for p in places if p.finding.code == code)) for code in codes],
            }
        },
        "columnKind": "utf16CodeUnits",
        "invocations": [_invocation(faults)],
        "artifacts": [_artifact(report) for report in reports],
        "results": [_result(place, codes.index(place.finding.code)) for place in places],
    }
    log = {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1, allow_nan=False).replace("\x7f", "\\u007f") + "\n"


def _invocation(faults: Sequence[Fault]) -> dict[str, Any]:
    told = [
        {
            "level": "error",
            "message": {"text": prose(fault.message)},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(fault.path)}}}],
        }
        for fault in faults
    ]
    return {"executionSuccessful": not faults} | ({"toolExecutionNotifications": told} if told else {})


def _artifact(report: Report) -> dict[str, Any]:
    """Findings in the baseline are a number here: code scanning opens alerts for suppressed results too."""
    known = report.summary.baselined
    own = {} if known is None else {"properties": {"baselined": known}}
    return {"location": {"uri": _uri(report.model.path)}} | own


def _rule(place: Located) -> dict[str, Any]:
    """A rule as its first, worst finding shows it."""
    finding = place.finding
    name = label(finding.rule)
    text = explain.markdown(finding.rule)
    rule: dict[str, Any] = {
        "id": escape(finding.code),
        "name": name,
        "shortDescription": {"text": explain.summary(finding.rule) or name},
        "defaultConfiguration": {"level": finding.level},
        "properties": {
            "precision": "high",
            "problem.severity": _SEVERITY[finding.level],
            "tags": ["gradient-flow", "onnx"],
        },
    }
    if text:
        rule["help"] = {"text": text, "markdown": text}
    return rule


def _result(place: Located, rule_index: int) -> dict[str, Any]:
    finding = place.finding
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(place.path)}}
    if place.line is not None:
        physical["region"] = {"startLine": place.line}
    location: dict[str, Any] = {"physicalLocation": physical}
    logical = [(finding.layer, "element"), (finding.weight, "parameter")]
    if names := [{"fullyQualifiedName": label(name), "kind": kind} for name, kind in logical if name]:
        location["logicalLocations"] = names
    message = prose(finding.message)
    if finding.fixes:
        message += "\n\n" + prose(finding.fixes[0].text)
    return {
        "ruleId": escape(finding.code),
        "ruleIndex": rule_index,
        "level": finding.level,
        "message": {"text": message},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": place.identity},
        "properties": {"evidence": finding.evidence, "model": label(place.report.model.path)},
    }


def _uri(path: str) -> str:
    """A relative reference, or a file URI for an absolute path."""
    quoted = quote(path, safe="/", errors="replace")
    return f"file://{quoted}" if PurePosixPath(path).is_absolute() else quoted
