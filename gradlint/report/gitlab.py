"""GitLab's code quality report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradlint.report.location import located
from gradlint.report.text import escape, label, prose
from gradlint.results import Report

_SEVERITY = {"error": "major", "warning": "minor", "note": "info"}


def render(reports: Sequence[Report]) -> str:
    """A list of findings, the worst first; those without a Python line are shown at the model file's first."""
    issues = [
        {
            "description": f"{label(place.finding.layer or place.finding.weight or 'the model')}: "
            + prose(place.finding.message),
            "check_name": label(place.finding.rule),
            "fingerprint": place.identity,
            "severity": _SEVERITY[place.finding.level],
            "location": {"path": escape(place.path), "lines": {"begin": place.line or 1}},
        }
        for place in located(reports)
    ]
    return json.dumps(issues, indent=1).replace("\x7f", "\\u007f") + "\n"
