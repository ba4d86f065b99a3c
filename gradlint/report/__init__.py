"""Renderers: pure functions from reports to text, one file each, found by name in `FORMATS`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from gradlint.exceptions import UsageError
from gradlint.report.headline import headline
from gradlint.results import Fault, Report

__all__ = ["FORMATS", "TELL_FAULTS", "headline", "render"]

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
# Read where nobody sees standard error: they name the models that there is no report of.
TELL_FAULTS = frozenset({"html", "sarif", "github", "gitlab", "junit", "markdown"})


def render(
    reports: Sequence[Report], format: str, *, faults: Sequence[Fault] = (), color: bool = False, width: int = 80
) -> str:
    """The reports as text in one of `FORMATS`.

    `faults` matter to `TELL_FAULTS`; `color` and `width` (in columns) to `full` alone. The text ends with a newline and
    is the same for the same reports. Raises UsageError for an unknown format.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    renderer = import_module(f"gradlint.report.{FORMATS[format]}")
    options: dict[str, Any] = {"color": color, "width": width} if format == "full" else {}
    if format in TELL_FAULTS:
        options["faults"] = faults
    text: str = renderer.render(reports, **options)
    return text
