"""Where a finding is shown in a repository, and what tells it from every other finding."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from gradlint.results import LEVELS, Finding, Report


@dataclass(frozen=True)
class Located:
    """A finding with the file to show it at (a line only in Python files) and an identity unique in the output."""

    report: Report
    finding: Finding
    path: str
    line: int | None
    identity: str


def located(reports: Sequence[Report]) -> list[Located]:
    """All findings, the worst level first, then by model and in the report's order.

    The place is the Python line where the report has one inside the repository (a relative path that doesn't climb),
    else the model file. The identity hashes the model's path and the finding's fingerprint; a repeated one is numbered.
    """
    return sorted(_all(reports), key=lambda place: LEVELS.index(place.finding.level))


def _all(reports: Sequence[Report]) -> Iterator[Located]:
    seen: Counter[str] = Counter()
    for report in reports:
        for finding in report.findings:
            identity = digest(report.model.path, finding.code, finding.fingerprint)
            seen[identity] += 1
            source = finding.source
            inside = source is not None and source.line > 0 and _is_inside(source.file)
            path, line = (source.file, source.line) if source and inside else (report.model.path, None)
            yield Located(report, finding, path, line, f"{identity}:{seen[identity]}")


def digest(*parts: str) -> str:
    """What tells texts from others, in 32 digits."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _is_inside(path: str) -> bool:
    windows = PureWindowsPath(path)
    return bool(path) and not PurePosixPath(path).is_absolute() and not windows.anchor and ".." not in windows.parts
