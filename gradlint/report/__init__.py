"""Renderers: pure functions from reports to text, one file each, found by name in `FORMATS`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from gradlint.exceptions import UsageError
from gradlint.report.headline import headline
from gradlint.results import Report

__all__ = ["FORMATS", "headline", "render"]

# The module of each format; it is imported when it is asked for, so that the command starts fast.
FORMATS = {
    "full": "terminal",
    "concise": "concise",
    "json": "as_json",
    "html": "page",
    "sarif": "sarif",
    "github": "github",
    "gitlab": "gitlab",
    "junit": "junit",
    "markdown": "markdown",
}


def render(reports: Sequence[Report], format: str, *, color: bool = False, width: int = 80) -> str:
    """The reports as text in one of `FORMATS`; `color` and `width` (in columns) matter to `full` alone.

    The text ends with a newline and is the same for the same reports. Raises UsageError for an unknown format.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    renderer = import_module(f"gradlint.report.{FORMATS[format]}")
    options = {"color": color, "width": width} if format == "full" else {}
    text: str = renderer.render(reports, **options)
    return text
