"""What changed between two reports: findings by fingerprint, and the gradient of the layers they share."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradlint.exceptions import UsageError
from gradlint.results import LEVELS, Evidence, Finding, LayerRow, Report

# Decades of change from which a layer is listed: a factor of two.
NOTABLE = 0.3


@dataclass(frozen=True)
class Shift:
    """A layer whose gradient changed: decades before and after, by the same kind of evidence."""

    layer: str
    op_type: str
    evidence: Evidence
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Move:
    """How far a weight moved: |w' - w| / |w|."""

    weight: str
    layer: str
    moved: float


@dataclass(frozen=True)
class Difference:
    """`new` holds head's findings that base lacks or has at a lower level, `gone` those of base that head lacks.

    `shifts`: layers of both that changed by at least `NOTABLE` decades, the largest loss first. `base` is None for a
    model that only head has. moves: of the weights of both, where both model files were at hand.
    """

    base: Report | None
    head: Report
    new: tuple[Finding, ...]
    gone: tuple[Finding, ...]
    same: tuple[Finding, ...]
    shifts: tuple[Shift, ...]
    layers_added: int
    layers_removed: int
    moves: tuple[Move, ...] = ()


def compare(base: Report | None, head: Report) -> Difference:
    """The difference from `base` to `head`; without base everything is new."""
    before = {finding.fingerprint: finding for finding in base.findings} if base else {}
    after = {finding.fingerprint for finding in head.findings}
    known = [finding for finding in head.findings if _is_known(finding, before.get(finding.fingerprint))]
    old = _layers(base) if base else {}
    now = _layers(head)
    shifts = [shift for key, row in now.items() if key in old and (shift := _shift(old[key], row)) is not None]
    return Difference(
        base=base,
        head=head,
        new=tuple(finding for finding in head.findings if finding not in known),
        gone=tuple(finding for finding in before.values() if finding.fingerprint not in after),
        same=tuple(known),
        shifts=tuple(sorted((s for s in shifts if abs(s.change) >= NOTABLE), key=lambda s: s.change)),
        layers_added=len(now.keys() - old.keys()),
        layers_removed=len(old.keys() - now.keys()),
    )


def compare_all(bases: Sequence[Report], heads: Sequence[Report]) -> list[Difference]:
    """One report against one, whatever their models are called; of several, those of the same path, or of the same
    path below the folder that holds a side's models.
    """
    if len(bases) == len(heads) == 1:
        return [compare(bases[0], heads[0])]
    by_path = {report.model.path: report for report in bases}
    by_place = dict(zip(_places(bases), bases, strict=True))
    return [
        compare(by_path.get(head.model.path) or by_place.get(place), head)
        for head, place in zip(heads, _places(heads), strict=True)
    ]


def _places(reports: Sequence[Report]) -> list[str]:
    """The models' paths below the folder common to all."""
    folders = [os.path.dirname(os.path.abspath(report.model.path)) for report in reports]
    common = os.path.commonpath(folders) if folders else ""
    return [os.path.relpath(os.path.abspath(report.model.path), common) for report in reports]


def read_reports(path: str | Path) -> list[Report]:
    """The reports in a file of `--format json`. Raises UsageError for anything else."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not JSON: give a report that `gradlint --format json` wrote") from None
    reports = []
    for item in data if isinstance(data, list) else [data]:
        try:
            reports.append(Report.from_dict(item))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return reports


def _layers(report: Report) -> dict[str, LayerRow]:
    """Layers by their first parameter, those without by their operator and the layer before: nodes are renumbered."""
    parameters: dict[str, str] = {}
    for weight in report.weights:
        parameters.setdefault(weight.layer, str(weight.parameter or weight.name))
    keys: dict[str, str] = {}
    found: dict[str, LayerRow] = {}
    seen: Counter[str] = Counter()
    for row in report.layers:
        before = next((keys[name] for name in row.inputs if name in keys), "")
        keys[row.name] = parameters.get(row.name, before)
        key = parameters.get(row.name) or f"{row.op_type} after {before}"
        seen[key] += 1
        found[f"{key}#{seen[key]}"] = row
    return found


def _is_known(finding: Finding, before: Finding | None) -> bool:
    return before is not None and LEVELS.index(finding.level) >= LEVELS.index(before.level)


def _shift(before: LayerRow, after: LayerRow) -> Shift | None:
    """By measurement where both have one, else by estimate."""
    pairs: tuple[tuple[Evidence, object, object], ...] = (
        ("measured", before.measured.get("decades"), after.measured.get("decades")),
        ("estimated", before.estimated.get("decades"), after.estimated.get("decades")),
    )
    for evidence, old, new in pairs:
        if isinstance(old, int | float) and isinstance(new, int | float) and math.isfinite(old) and math.isfinite(new):
            return Shift(after.name, after.op_type, evidence, float(old), float(new))
    return None
