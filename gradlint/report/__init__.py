"""Renderers: pure functions from reports to text, one file each, found by name in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradlint.exceptions import UsageError
from gradlint.report import as_json, concise, page, terminal
from gradlint.report.headline import headline
from gradlint.results import Report

__all__ = ["FORMATS", "headline", "render"]

FORMATS: dict[str, Callable[..., str]] = {
    "full": terminal.render,
    "concise": concise.render,
    "json": as_json.render,
    "html": page.render,
}


def render(reports: Sequence[Report], format: str, *, color: bool = False, width: int = 80) -> str:
    """The reports as text in one of `FORMATS`; `color` and `width` (in columns) matter to `full` alone.

    The text ends with a newline and is the same for the same reports. Raises UsageError for an unknown format.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    if format == "full":
        return terminal.render(reports, color=color, width=width)
    return FORMATS[format](reports)
