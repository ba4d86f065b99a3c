"""The HTML page: one file with the verdict, the ladder, the findings and the rules they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradlint.report import explain
from gradlint.report.arcs import Rail, rails
from gradlint.report.document import document, environment, position
from gradlint.report.headline import (
    counts_phrase,
    coverage_gaps,
    finding_blame,
    first_fix,
    headline,
    layer_ratio,
    ranked,
    risk_phrase,
    shares,
    verdict_facts,
)
from gradlint.report.ladder import STARVED, STRONG, WEAK, Fold, Rung, axis, rungs
from gradlint.report.modules import Group, tree
from gradlint.report.pictures import Drawing, drawings, legend, pictured, ridges
from gradlint.report.text import count, decades, figure, label, number, prose
from gradlint.results import Fault, Finding, Report, WeightRow

# Rows up to which groups are unfolded at first.
_OPEN_ROWS = 80
_SHOWN_CARDS = 5
_STEPS = 6
COLUMNS = {
    "signal": "how much the examples differ here, 0 to 1",
    "slope": "root mean square derivative of the activation",
    "saturated": "share of units where the slope is under 5 % of its maximum",
    "dead": "share of units whose slope is zero on every example",
    "grad/weight": "gradient over weight, both as root mean square",
}


@dataclass(frozen=True)
class Line:
    """A layer's row as text and as positions in per cent of the ladder's axis."""

    anchor: str
    rung: Rung
    rail: Rail
    name: str
    op_type: str
    shape: str
    spoken: str
    bar: float | None
    tick: float | None
    bound: float | None
    columns: Mapping[str, str]
    drawings: Sequence[Drawing]

    @property
    def level(self) -> str:
        return self.rung.level or "good"


@dataclass(frozen=True)
class Part:
    """A group of lines that folds, with the range of its decades as a position and a width in per cent."""

    name: str
    fold: Fold
    items: tuple[Line | Part, ...]
    start: float | None
    width: float
    open: bool

    @property
    def level(self) -> str:
        return self.fold.level or "good"

    @property
    def title(self) -> str:
        return count(len(self.fold.rungs), "layer")


@dataclass(frozen=True)
class Step:
    """One bar of a blame waterfall: where it starts and how wide it is, in per cent, and its text."""

    name: str
    figure: str
    start: float
    width: float
    kind: str


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """One page for all reports; it loads nothing, and everything on it can be read without its script."""
    codes = {finding.rule: finding.code for report in reports for finding in report.findings}
    rules = sorted((label(code, 20), rule) for rule, code in codes.items())
    return document(
        "page.html",
        models=[_model(report, f"m{i}") for i, report in enumerate(reports)],
        faults=[prose(fault.message) for fault in faults],
        total=count(len(reports) + len(faults), "model"),
        explanations=[(code, rule, explain.slug(rule), text) for code, rule in rules if (text := explain.markup(rule))],
    )


def _model(report: Report, anchor: str) -> dict[str, Any]:
    ladder = rungs(report)
    low, high = axis(ladder)
    shown = pictured(ladder)
    lines, dropped = _lines(report, ladder, shown, anchor, low, high)
    columns = [key for key in COLUMNS if any(line.columns[key] for line in lines)]
    model_facts, evidence = verdict_facts(report)
    anchors = {line.rung.row.name: line.anchor for line in lines}
    ridge, *ends = ridges(ladder, shown, {i: line.anchor for i, line in enumerate(lines)})
    return {
        "pictured": len(shown),
        "fewer": legend(len(shown), sum(bool(rung.row.pictures) for rung in ladder)),
        "ridges": ridge,
        "ridge_ends": [decades(v) for v in ends],
        "ridge_scale": [(position(v, *ends), f"{v:+.0f}" if v else "0") for v in ticks(*ends)] if ridge else [],
        "anchor": anchor,
        "report": report,
        "path": label(report.model.path),
        "headline": headline(report),
        "first_fix": first_fix(report),
        "risk": risk_phrase(report),
        "risk_value": number({"risk": report.summary.risk}, "risk"),
        "counts": counts_phrase(report),
        "model_facts": model_facts,
        "evidence": evidence,
        "assumptions": [prose(text) for text in report.settings.assumptions],
        "gaps": coverage_gaps(report),
        "ports": [(kind, _port(port)) for kind, port in _ports(report)],
        "items": _parts(tree(ladder), {id(line.rung): line for line in lines}, low, high),
        "layers": len(ladder),
        "measured": any(rung.measured is not None for rung in ladder),
        "estimated": any(rung.estimated is not None for rung in ladder),
        "bounded": any(line.bound is not None for line in lines),
        "lanes": max((lane + 1 for line in lines for lane in line.rail.starts), default=0),
        "dropped": dropped,
        "grid": [(position(v, low, high), kind) for v, kind in grid(low, high)],
        "scale": [(position(v, low, high), f"{v:+.0f}" if v else "0") for v in ticks(low, high)],
        "columns": [(key, key.replace("/", "-"), COLUMNS[key]) for key in columns],
        "findings": list(_cards(report, anchors)),
        "levels": [level for level in ("error", "warning", "note") if report.summary.counts.get(level)],
        "weights": [(_parameter(weight), weight) for weight in report.weights],
    }


def _ports(report: Report) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from (("input", port) for port in report.model.inputs)
    yield from (("output", port) for port in report.model.outputs)


def _port(port: Mapping[str, Any]) -> str:
    shape = port.get("shape")
    dims = _shape(shape) if isinstance(shape, list | tuple) else ""
    parts = [str(port.get("name", "")), str(port.get("dtype", "")), dims]
    return " ".join(label(part, 60) for part in parts if part)


def _shape(shape: Sequence[Any]) -> str:
    return "×".join(label(str(dim), 16) for dim in shape)


def _plain(value: Any) -> str:
    finite = number({"": value}, "")
    return "" if finite is None else figure(finite)


def _parameter(weight: WeightRow) -> str:
    """The framework's name of a weight where it is known, else the initializer's."""
    if isinstance(weight.parameter, list):
        return ", ".join(label(name) for name in weight.parameter)
    return label(weight.parameter or weight.name)


def grid(low: float, high: float) -> list[tuple[float, str]]:
    lines = [(0.0, "zero"), (WEAK, "weak"), (STARVED, "starved")]
    return lines + ([(STRONG, "weak"), (-STARVED, "starved")] if high > -STARVED else [])


def ticks(low: float, high: float) -> list[float]:
    """At most nine round values on the axis, zero among them."""
    step = next((s * 10**e for e in range(4) for s in (1, 2, 5) if (high - low) / (s * 10**e) <= 8), 1000)
    return [float(v) for v in range(math.ceil(low / step) * step, math.floor(high / step) * step + 1, step)][:9]


def _lines(
    report: Report, ladder: Sequence[Rung], shown: set[int], anchor: str, low: float, high: float
) -> tuple[list[Line], int]:
    rail, dropped = rails(ladder)
    ratios = layer_ratio(report)
    lines = []
    for i, rung in enumerate(ladder):
        row = rung.row

        def place(value: float | None) -> float | None:
            return None if value is None else position(value, low, high)

        lines.append(
            Line(
                anchor=f"{anchor}-l{i}",
                rung=rung,
                rail=rail[i],
                name=label(row.name),
                op_type=label(row.op_type, 40),
                shape=_shape(row.shape),
                spoken=_spoken(rung),
                bar=place(rung.decades),
                tick=place(rung.estimated) if rung.measured is not None else None,
                bound=place(rung.bound) if rung.bound is not None and rung.bound < high else None,
                columns=_columns(rung, ratios.get(row.name)),
                drawings=drawings(rung) if i in shown else (),
            )
        )
    return lines, dropped


def _spoken(rung: Rung) -> str:
    parts = [f"{kind} {decades(value)}" for kind, value in
             (("measured", rung.measured), ("estimated", rung.estimated), ("at most", rung.bound))
             if value is not None]  # fmt: skip
    return ", ".join(parts) or {"zero": "no gradient", "nan": "not finite"}.get(rung.figure, "not known")


def _columns(rung: Rung, ratio: float | None) -> dict[str, str]:
    texts = {}
    for key in COLUMNS:
        facts = rung.row.measured if key in rung.row.measured else rung.row.estimated
        value = ratio if key == "grad/weight" else number(facts, key)
        share = key in ("saturated", "dead")
        texts[key] = "" if value is None else f"{100 * value:.0f} %" if share else figure(float(f"{value:.2g}"))
    return texts


def _parts(
    items: Sequence[Rung | Group], lines: Mapping[int, Line], low: float, high: float, shown: list[int] | None = None
) -> tuple[Line | Part, ...]:
    """Groups as parts that fold: open, while few layers are shown, where a finding of their own lies, and those that
    are most of the model, which would hide it."""
    shown = [0] if shown is None else shown
    result: list[Line | Part] = []
    for item in items:
        if isinstance(item, Rung):
            shown[0] += 1
            result.append(lines[id(item)])
            continue
        most_of_it = 2 * len(item.fold.rungs) > len(lines)
        wanted = most_of_it or item.fold.level in ("error", "warning")
        is_open = wanted and shown[0] + len(item.items) <= _OPEN_ROWS
        start = position(min(item.fold.values), low, high) if item.fold.values else None
        end = position(max(item.fold.values), low, high) if item.fold.values else 0.0
        inner = _parts(item.items, lines, low, high, shown if is_open else [_OPEN_ROWS])
        result.append(Part(label(item.name), item.fold, inner, start, max(end - (start or 0.0), 0.6), is_open))
    return tuple(result)


def _cards(report: Report, anchors: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Findings by level and rule: the first few of a rule in full view, the others folded."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in ranked(report.findings):
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    for (level, rule), findings in groups.items():
        cards = [
            {
                "finding": finding,
                "place": label(finding.layer or finding.weight or "the model"),
                "href": anchors.get(finding.layer or ""),
                "source": f"{label(finding.source.file)}:{finding.source.line}" if finding.source else "",
                "message": prose(finding.message),
                "steps": waterfall(report, finding),
            }
            for finding in findings
        ]
        first = 1 if level == "note" else _SHOWN_CARDS
        yield {
            "level": level,
            "code": label(findings[0].code, 20),
            "rule": label(rule, 60),
            "explained": explain.markup(rule) is not None,
            "slug": explain.slug(rule),
            "cards": cards[:first],
            "more": cards[first:],
        }


def waterfall(report: Report, finding: Finding) -> list[Step]:
    """The decay from the output to the finding's layer as steps by operator, the largest first, ending in the sum."""
    parts = shares(finding_blame(report, finding))
    if not parts:
        return []
    named, rest = parts[:_STEPS], parts[_STEPS:]
    deltas = [(s.noun, s.decades) for s in named]
    if rest:
        deltas.append((count(sum(s.nodes for s in rest), "other node"), sum(s.decades for s in rest)))
    levels = [0.0]
    for _, delta in deltas:
        levels.append(levels[-1] + delta)
    low, high = min(levels), max(levels)
    span = (high - low) or 1.0
    if not span < 1e4:  # not a decay that a number can have
        return []
    steps = []
    for (name, delta), before in zip(deltas, levels, strict=False):
        start = 100 * (min(before, before + delta) - low) / span
        kind = "loss" if delta < 0 else "gain"
        steps.append(Step(name, decades(delta), start, max(100 * abs(delta) / span, 0.5), kind))
    start = 100 * (min(levels[-1], 0.0) - low) / span
    steps.append(Step("together", decades(levels[-1]), start, max(100 * abs(levels[-1]) / span, 0.5), "sum"))
    return steps


def fix_blocks(text: str) -> list[tuple[str, str]]:
    """A fix's text as (kind, text) pieces: `prose`, `word` for a short quotation in it, `code` for a line to write.

    A quotation in backticks after a colon, and a line that starts with four spaces, is a line to write.
    """
    pieces: list[tuple[str, str]] = []
    for line in text.expandtabs(4).split("\n"):
        if line.startswith("    ") and line.strip():
            if pieces and pieces[-1][0] == "code":
                pieces[-1] = "code", pieces[-1][1] + "\n" + prose(line[4:].rstrip())
            else:
                pieces.append(("code", prose(line[4:].rstrip())))
            continue
        for i, part in enumerate(line.split("`")):
            before, lead = pieces[-1] if pieces and i else ("", "")
            kind = "prose" if i % 2 == 0 else "code" if lead.rstrip().endswith(":") else "word"
            pieces.append((kind, prose(part.removeprefix(".") if before == "code" else part)))
    return [(kind, part) for kind, part in pieces if part.strip(" .")]


environment().filters.update(blocks=fix_blocks, shape=_shape, plain=_plain)
environment().tests.update(part=lambda item: isinstance(item, Part))
