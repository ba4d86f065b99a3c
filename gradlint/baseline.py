"""Baselines: known findings in a file that a team reviews, so that only what is new is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradlint.exceptions import UsageError
from gradlint.judge import verdict
from gradlint.results import LEVELS, Finding, Level, Report

SCHEMA = "gradlint-baseline/1"


@dataclass(frozen=True)
class Entry:
    """A known finding. It hides findings of its fingerprint as long as their level isn't worse."""

    fingerprint: str
    code: str
    rule: str
    level: Level
    layer: str | None
    weight: str | None

    def describe(self) -> str:
        return f"{self.code} {self.rule} at {self.weight or self.layer or 'the model'}"


@dataclass(frozen=True)
class Baseline:
    """Entries by model; a model's path starts at the folder of the baseline's file."""

    folder: Path
    models: Mapping[str, tuple[Entry, ...]]


def to_baseline(reports: Sequence[Report], folder: Path) -> str:
    """The text of a baseline with all findings of the reports, sorted, for a file in `folder`."""
    models = {
        _key(report, folder): [asdict(_entry(finding)) for finding in sorted(report.findings, key=_order)]
        for report in sorted(reports, key=lambda report: _key(report, folder))
    }
    return json.dumps({"schema": SCHEMA, "models": models}, indent=1) + "\n"


def read_baseline(path: str | Path) -> Baseline:
    """Raises UsageError for a file that can't be read or is no baseline."""
    path = Path(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"baseline {path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"baseline {path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("models"), dict):
        raise UsageError(f"baseline {path}: not a baseline of schema {SCHEMA}: write one with `gradlint baseline`")
    models = {
        model: tuple(_read_entry(item, path) for item in _list(items, path)) for model, items in data["models"].items()
    }
    return Baseline(path.parent, models)


def hide_known(report: Report, baseline: Baseline, rules: Collection[str]) -> tuple[Report, tuple[Entry, ...]]:
    """The report without the findings that the baseline knows, and the entries that no longer occur.

    Counts and verdict are those of the findings that stay. Only entries of `rules`, the names of the rules that ran,
    can be found missing.
    """
    known = {entry.fingerprint: entry for entry in baseline.models.get(_key(report, baseline.folder), ())}
    kept = tuple(finding for finding in report.findings if not _covers(known.get(finding.fingerprint), finding))
    counts: dict[str, int] = {level: sum(finding.level == level for finding in kept) for level in LEVELS}
    summary = replace(
        report.summary,
        counts=counts,
        verdict=verdict(kept, report.summary.risk),
        baselined=len(report.findings) - len(kept),
    )
    occurring = {finding.fingerprint for finding in report.findings}
    stale = tuple(e for e in known.values() if e.rule in rules and e.fingerprint not in occurring)
    return replace(report, findings=kept, summary=summary), stale


def _covers(entry: Entry | None, finding: Finding) -> bool:
    return entry is not None and LEVELS.index(finding.level) >= LEVELS.index(entry.level)


def _key(report: Report, folder: Path) -> str:
    return Path(os.path.relpath(os.path.abspath(report.model.path), os.path.abspath(folder))).as_posix()


def _order(finding: Finding) -> tuple[str, str, str]:
    return finding.code, finding.layer or "", finding.weight or ""


def _entry(finding: Finding) -> Entry:
    return Entry(finding.fingerprint, finding.code, finding.rule, finding.level, finding.layer, finding.weight)


def _list(items: Any, path: Path) -> list[Any]:
    if not isinstance(items, list):
        raise UsageError(f"baseline {path}: each model holds a list of findings")
    return items


def _read_entry(item: Any, path: Path) -> Entry:
    texts = ("fingerprint", "code", "rule", "level")
    sound = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in texts)
    if not sound or item["level"] not in LEVELS:
        raise UsageError(f"baseline {path}: a finding holds texts {', '.join(texts)}, layer and weight")
    layer, weight = (item[key] if isinstance(item.get(key), str) else None for key in ("layer", "weight"))
    return Entry(item["fingerprint"], item["code"], item["rule"], item["level"], layer, weight)
