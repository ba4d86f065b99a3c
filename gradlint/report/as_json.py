"""The JSON form: one object for one report, a list for several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gradlint.results import Report


def render(reports: Sequence[Report]) -> str:
    """ASCII JSON, so that no control or direction character of a name reaches a terminal."""
    return _text(reports[0].to_dict()) if len(reports) == 1 else render_list(reports)


def render_list(reports: Sequence[Report]) -> str:
    """A list, also of one report or none: what is left of a run on several models."""
    return _text([report.to_dict() for report in reports])


def _text(value: Any) -> str:
    text = json.dumps(value, indent=1, allow_nan=False)
    return text.replace("\x7f", "\\u007f") + "\n"
