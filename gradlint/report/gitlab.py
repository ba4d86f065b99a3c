"""GitLab's code quality report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradlint.report.location import digest, located
from gradlint.report.text import escape, label, prose
from gradlint.results import Fault, Report

_SEVERITY = {"error": "major", "warning": "minor", "note": "info"}


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """Models that were not checked, then the findings, the worst first.

    What has no Python line is shown at the model file's first.
    """
    issues = [
        {
            "description": prose(fault.message),
            "check_name": "not-checked",
            "fingerprint": digest(fault.path, "not-checked"),
            "severity": "blocker",
            "location": {"path": escape(fault.path), "lines": {"begin": 1}},
        }
        for fault in faults
    ]
    issues += [
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
