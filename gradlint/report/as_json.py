"""The JSON form: one object for one report, a list for several."""

from __future__ import annotations

from collections.abc import Sequence

from gradlint.results import Report, to_text


def render(reports: Sequence[Report]) -> str:
    """What programs read, by `report.schema.json`."""
    return reports[0].to_json() if len(reports) == 1 else render_list(reports)


def render_list(reports: Sequence[Report]) -> str:
    """A list, also of one report or none: what is left of a run on several models."""
    return to_text([report.to_dict() for report in reports])
