"""The JSON form: one object for one report, a list for several."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradlint.results import Report


def render(reports: Sequence[Report]) -> str:
    """ASCII JSON, so that no control or direction character of a name reaches a terminal."""
    objects = [report.to_dict() for report in reports]
    text = json.dumps(objects[0] if len(objects) == 1 else objects, indent=1, allow_nan=False)
    return text.replace("\x7f", "\\u007f") + "\n"
