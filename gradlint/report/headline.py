"""A report in one plain sentence, and the blame for a decay in one phrase."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradlint.report.ladder import EXPLODING, IN_TIME, STARVED, STRONG, VANISHING, WEAK, Rung, rungs
from gradlint.report.text import count, decades, figure, label, number, prose
from gradlint.results import LEVELS, Blame, Finding, LayerRow, Report

# Activations, whose share of a decay is that of their slopes.
_SLOPED = frozenset(
    {"Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish", "PRelu"}
    | {"Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu"}
)
_PARTS = {WEAK: "a hundredth", STARVED: "a thousandth"}


@dataclass(frozen=True)
class Share:
    """The share of a decay that all nodes of one operator take together, in decades."""

    op_type: str
    nodes: int
    decades: float

    @property
    def noun(self) -> str:
        """`30 Sigmoid slopes` for activations, `1 MatMul` for the rest."""
        op_type = label(self.op_type, 40)
        if self.op_type in _SLOPED:
            return count(self.nodes, f"{op_type} slope")
        return count(self.nodes, op_type)


def shares(blame: Sequence[Blame]) -> list[Share]:
    """Blame summed by operator, the largest share first."""
    sums: dict[str, tuple[int, float]] = {}
    for part in blame:
        if math.isfinite(part.decades):
            nodes, total = sums.get(part.op_type, (0, 0.0))
            sums[part.op_type] = nodes + 1, total + part.decades
    result = [Share(op_type, nodes, total) for op_type, (nodes, total) in sums.items()]
    return sorted(result, key=lambda share: (-abs(share.decades), share.op_type))


def blame_summary(blame: Sequence[Blame], most: int = 3) -> str:
    """`30 Sigmoid -18.1, 30 MatMul +2.0, 4 others +0.1 decades`; empty without blame."""
    parts = shares(blame)
    named = [f"{s.nodes} {label(s.op_type, 40)} {decades(s.decades)}" for s in parts[:most]]
    if rest := parts[most:]:
        named.append(f"{count(sum(s.nodes for s in rest), 'other')} {decades(sum(s.decades for s in rest))}")
    return ", ".join(named) + " decades" if named else ""


def finding_blame(report: Report, finding: Finding) -> tuple[Blame, ...]:
    """The blame of the layer a chain rule (GL2xx) speaks of; nothing for rules about one place."""
    if not finding.code.startswith("GL2") or finding.layer is None:
        return ()
    return next((row.blame or () for row in report.layers if row.name == finding.layer), ())


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Findings with the worst level first, otherwise in the report's order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def headline(report: Report) -> str:
    """What the report says, in one or two plain sentences, from the report alone."""
    ladder = rungs(report)
    if not any(rung.row.weights for rung in ladder):
        return "There is nothing to train here: no layer has weights."
    serious = [finding for finding in ranked(report.findings) if finding.level != "note"]
    if not serious and (known := report.summary.baselined):
        return f"Nothing new: {count(known, 'finding')} {'is' if known == 1 else 'are'} in the baseline."
    if not serious:
        return _calm(report, ladder)
    top = [finding for finding in serious if finding.level == serious[0].level]
    for finding in top:
        sentence = ""
        if finding.rule in VANISHING:
            sentence = _vanishing(report, finding, ladder)
        elif finding.rule in EXPLODING:
            sentence = _exploding(report, finding, ladder)
        elif finding.rule in IN_TIME:
            sentence = _in_time(finding)
        if sentence:
            return sentence
    message = prose(top[0].message)
    more = len(serious) - 1
    return _sentence(message) + (f" {count(more, 'more finding')} below." if more else "")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _calm(report: Report, ladder: Sequence[Rung]) -> str:
    if report.summary.risk is None:
        return "Not judged: training this model as it stands makes no sense."
    values = [rung.decades for rung in ladder if rung.decades is not None]
    if not values:
        return "No finding, but neither estimate nor measurement reached a layer."
    low, high = 10 ** min(min(values), 0.0), 10 ** max(max(values), 0.0)
    if low < 10**WEAK or high > 10**STRONG:
        return "The gradient reaches the layers; those that get little of it are branches beside a healthy trunk."
    if f"{low:.2g}" == f"{high:.2g}":
        return "Every layer gets a gradient to learn from, as large as that of the output."
    return f"Every layer gets a gradient to learn from: {low:.2g} to {high:.2g} times that of the output."


def _weighted(ladder: Sequence[Rung]) -> list[Rung]:
    return [rung for rung in ladder if rung.row.weights and rung.decades is not None]


def _vanishing(report: Report, finding: Finding, ladder: Sequence[Rung]) -> str:
    line = STARVED if any((r.decades or 0) < STARVED for r in _weighted(ladder)) else WEAK
    layers = _weighted(ladder)
    starved = [(rung.decades or 0) < line for rung in layers]
    if not any(starved):
        return ""
    first = starved.index(False) if False in starved else len(starved)
    if first == len(starved):
        subject = f"All {first} layers get" if first > 1 else "The only layer gets"
    elif first > 1 or (first == 1 and sum(starved) == 1):
        subject = f"The first {first} layers get" if first > 1 else "The first layer gets"
    else:
        total = sum(starved)
        subject = f"{total} of {len(starved)} layers {'get' if total > 1 else 'gets'}"
    sentence = f"{subject} less than {_PARTS[line]} of the gradient"
    culprits = [s for s in shares(_blame(report, finding)) if s.decades < -0.5]
    if not culprits:
        return sentence + "."
    verb = "takes" if culprits[0].nodes == 1 and len(culprits) == 1 else "take"
    names = [culprits[0].noun]
    if len(culprits) > 1 and culprits[1].decades < culprits[0].decades / 3:
        names.append(culprits[1].noun)
        verb = "take"
    elif culprits[0].nodes == 1:
        verb = "takes"
    return f"{sentence}; {' and '.join(names)} {verb} it."


def _exploding(report: Report, finding: Finding, ladder: Sequence[Rung]) -> str:
    layers = _weighted(ladder)
    worst = max(layers, key=lambda rung: rung.decades or 0, default=None)
    if worst is None or (worst.decades or 0) < STRONG:
        return ""
    sentence = f"The gradient grows {figure(10 ** min(worst.decades or 0, 300))}-fold on its way from the output to "
    sentence += label(worst.row.name, 60)
    culprits = [s for s in shares(_blame(report, finding)) if s.decades > 0.5]
    return f"{sentence}; {culprits[0].noun} multiply it." if culprits else sentence + "."


def _in_time(finding: Finding) -> str:
    """What is left of the last step's gradient at the first: a recurrent layer can starve in time and not in norm."""
    change, steps = number(finding.metrics, "time_decades"), number(finding.metrics, "steps")
    if steps is None or finding.layer is None:
        return ""
    over = f"over the {steps:.0f} time steps of {label(finding.layer, 60)}"
    if (finding.metrics.get("time_decades") or change or 0) > 0:
        return f"The gradient grows {over}" + (
            f", {figure(10 ** min(change, 300))}-fold." if change else " without limit."
        )
    left = "nothing" if change is None else figure(10 ** max(change, -300))
    return f"The gradient dies {over}: {left} of it reaches the first."


def _blame(report: Report, finding: Finding) -> tuple[Blame, ...]:
    """The blame of the finding's layer, else of the worst layer."""
    rows: dict[str | None, LayerRow] = {row.name: row for row in report.layers}
    for name in (finding.layer, report.summary.worst_layer):
        if name in rows and (blame := rows[name].blame):
            return blame
    return ()


def first_fix(report: Report) -> str:
    """The first sentence of the worst finding's first fix; empty when nothing above a note asks for a change."""
    for finding in ranked(report.findings):
        if finding.level != "note" and finding.fixes:
            return prose(re.split(r"(?<=[.:;])\s|\n", finding.fixes[0].text)[0].replace("`", ""))
    return ""


def verdict_facts(report: Report) -> tuple[str, str]:
    """The model in a line, and the evidence in a line: what was looked at, and how."""
    model, settings, coverage = report.model, report.settings, report.coverage
    trained = "at initialisation" if report.summary.stage == "init" else "trained"
    facts = [label(model.producer, 40)] if model.producer else []
    facts += [f"opset {model.opset}", count(model.nodes, "node"), count(model.parameters, "parameter"), trained]
    how = "measured and estimated" if coverage.measured else "estimated from the file alone"
    evidence = f"{how}, {settings.mode} mode, {label(settings.loss, 40)} loss"
    if coverage.measured:
        evidence += f", data: {prose(settings.data)}, batch {settings.batch}, seed {settings.seed}"
    return ", ".join(facts), evidence


def coverage_gaps(report: Report) -> list[str]:
    """What the analyses did not reach, a phrase each; empty when they reached everything."""
    coverage = report.coverage
    gaps = []
    if coverage.estimated < coverage.nodes:
        gaps.append(f"the estimate reached {coverage.estimated} of {count(coverage.nodes, 'node')}")
    if 0 < coverage.measured < coverage.nodes:
        gaps.append(f"the probe reached {coverage.measured} of {count(coverage.nodes, 'node')}")
    if coverage.unmodelled:
        operators = sorted(coverage.unmodelled.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{label(op, 40)} ({n})" for op, n in operators[:6])
        gaps.append(f"not modelled: {named}" + (f" and {len(operators) - 6} more" if len(operators) > 6 else ""))
    return gaps


def counts_phrase(report: Report) -> str:
    """`1 error, 2 warnings` without the levels that have none, and `(3 in the baseline)`."""
    named = [count(n, level) for level in LEVELS if (n := report.summary.counts.get(level, 0))]
    known = report.summary.baselined
    return (", ".join(named) or "no findings") + (f" ({known} in the baseline)" if known else "")


def risk_phrase(report: Report) -> str:
    risk = report.summary.risk
    return "risk not judged" if risk is None or not math.isfinite(risk) else f"risk {risk:.2f}"


def layer_ratio(report: Report) -> dict[str, float]:
    """grad_rms / weight_rms of each layer's largest weight, measured before estimated."""
    ratios: dict[str, tuple[int, float]] = {}
    for weight in report.weights:
        gradient = number(weight.measured, "grad_rms")
        gradient = number(weight.estimated, "grad_rms") if gradient is None else gradient
        size = math.prod(weight.shape)
        if gradient is None or not weight.weight_rms > 0 or size <= ratios.get(weight.layer, (-1, 0.0))[0]:
            continue
        ratios[weight.layer] = size, gradient / weight.weight_rms
    return {layer: ratio for layer, (_, ratio) in ratios.items()}
