"""From facts to findings: which rules hold where, one finding per cause, and the verdict.

A rule judges the subjects of its scope one by one. Subjects it holds for, with no subject between that it judged sound,
share one finding, which the worst of them speaks for; where more findings would be left than the rule's `places`, they
are one. Consequences name their cause and stand behind it. What can't be decided for want of a fact counts as not
judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from gradlint.condition import evaluate, names_in, near
from gradlint.exceptions import UsageError
from gradlint.fact_table import FACTS, Scope, Subject
from gradlint.fixes import choose_fixes
from gradlint.message import decades, message_facts, render_message
from gradlint.results import LEVELS, Blame, Evidence, Finding, Level, Verdict
from gradlint.rulebook import Rule, Rulebook

_APART = 2.0  # decades between a measurement and its estimate that are worth a word
_NOUNS: dict[Scope, str] = {
    "model": "model",
    "layer": "layer",
    "activation": "activation",
    "weight": "weight",
    "recurrent": "recurrent layer",
    "attention": "attention layer",
}


@dataclass(frozen=True)
class Tally:
    """Subjects a rule was about, and could or couldn't decide."""

    judged: int
    not_judged: int


@dataclass(frozen=True)
class Judgement:
    """Findings, worst first, and per rule name (rules that ran only) how many subjects were judged."""

    findings: tuple[Finding, ...]
    tallies: Mapping[str, Tally]


@dataclass(frozen=True)
class _Hit:
    """A subject that a rule holds for, at which level, and the facts that made it hold."""

    subject: Subject
    condition: Level
    level: Level
    used: frozenset[str]
    rank: float


@dataclass(frozen=True)
class _Placed:
    """A finding with its rule, and the graph positions of the place that speaks for it and of the group's ends."""

    finding: Finding
    rule: Rule
    order: int
    first: int
    last: int

    @property
    def is_consequence(self) -> bool:
        return "cause" in self.finding.metrics


def judge(
    subjects: Sequence[Subject],
    rulebook: Rulebook,
    *,
    preview: bool = False,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extend_select: Sequence[str] = (),
    layer_ignores: Mapping[str, Sequence[str]] = MappingProxyType({}),
    identities: Mapping[str, str] = MappingProxyType({}),
) -> Judgement:
    """Judge all subjects by the chosen rules.

    `select` (default: every rule), `extend_select` and `ignore` take codes, the beginnings of codes (`GL2`) and names.
    Preview rules take part with `preview`, or when named in full. `layer_ignores` holds selectors by a glob on the
    names of layers and weights they don't judge; `identities` what fingerprints know a layer by (default: its name).
    Raises UsageError for a selector that fits no rule.
    """
    known = _with_model_facts(subjects)
    check_selectors(rulebook, [selector for some in layer_ignores.values() for selector in some])
    tallies: dict[str, Tally] = {}
    placed: list[_Placed] = []
    for rule in chosen(rulebook, preview=preview, select=select, ignore=ignore, extend_select=extend_select):
        quiet = [glob for glob, some in layer_ignores.items() if any(_matches(selector, rule) for selector in some)]
        scope = [subject for subject in known if subject.scope == rule.scope and not _is_named(subject, quiet)]
        groups, tallies[rule.name] = _hits(rule, scope)
        if len(groups) > rule.places:
            groups = [[hit for group in groups for hit in group]]
        placed += [_finding(rule, group, _fingerprint(rule, group, scope, identities)) for group in groups]
    placed = _point_to_causes(placed)
    placed.sort(key=lambda p: (LEVELS.index(p.finding.level), p.is_consequence, p.finding.code, p.order))
    return Judgement(tuple(item.finding for item in placed), tallies)


def verdict(findings: Iterable[Finding], risk: float | None) -> Verdict:
    """fail: an error, and risk >= 0.5 or not judged. warn: any other error or warning, or risk >= 0.25. Else pass."""
    levels = {finding.level for finding in findings}
    if "error" in levels and (risk is None or risk >= 0.5):
        return "fail"
    if levels & {"error", "warning"} or (risk is not None and risk >= 0.25):
        return "warn"
    return "pass"


def fingerprint(code: str, layer: str | None, weight: str | None) -> str:
    """16 hex digits that stay the same as long as the rule's code and what the layer and the weight are known by do."""
    text = "\0".join((code, layer or "", weight or ""))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _with_model_facts(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects in graph order. Facts of the model are known everywhere; a subject's own come first."""
    model = next((subject for subject in subjects if subject.scope == "model"), Subject("model"))
    return [
        replace(subject, facts={**model.facts, **subject.facts}, evidence={**model.evidence, **subject.evidence})
        for subject in sorted(subjects, key=lambda subject: subject.order)
    ]


def chosen(
    rulebook: Rulebook,
    *,
    preview: bool = False,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extend_select: Sequence[str] = (),
) -> list[Rule]:
    """The rules that `judge` runs with these settings. Raises UsageError for a selector that fits no rule."""
    check_selectors(rulebook, (*(select or ()), *ignore, *extend_select))
    wanted = (*(select or ()), *extend_select)
    running = []
    for rule in rulebook.rules:
        on = select is None or any(_matches(selector, rule) for selector in wanted)
        shown = rule.status == "stable" or preview or rule.name in wanted or rule.code in wanted
        if on and shown and not any(_matches(selector, rule) for selector in ignore):
            running.append(rule)
    return running


def check_selectors(rulebook: Rulebook, selectors: Iterable[str]) -> None:
    """Raises UsageError for a selector that fits no rule."""
    for selector in selectors:
        if not any(_matches(selector, rule) for rule in rulebook.rules):
            words = [word for rule in rulebook.rules for word in (rule.name, rule.code)]
            raise UsageError(f"no rule matches {selector!r}{near(selector, words)}")


def _matches(selector: str, rule: Rule) -> bool:
    return selector == rule.name or (selector != "" and rule.code.startswith(selector))


def _is_named(subject: Subject, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in (subject.layer, subject.weight) if name for glob in globs)


def _hits(rule: Rule, subjects: list[Subject]) -> tuple[list[list[_Hit]], Tally]:
    """The rule's hits, grouped where no subject judged sound stands between; subjects in graph order."""
    groups: list[list[_Hit]] = []
    judged = not_judged = 0
    joined = False
    for subject in subjects:
        if rule.where is not None:
            applies = evaluate(rule.where, subject.facts, rule.limits).value
            not_judged += applies is None
            if not applies:
                continue
        hit, decided = _decide(rule, subject)
        judged += decided
        not_judged += not decided
        if hit is None:
            joined = joined and not decided
        elif joined:
            groups[-1].append(hit)
        else:
            groups.append([hit])
            joined = True
    return groups, Tally(judged, not_judged)


def _decide(rule: Rule, subject: Subject) -> tuple[_Hit | None, bool]:
    """The strongest level whose condition is true; and whether the subject is decided: a hit, or all false."""
    open_question = False
    for level, condition in rule.conditions.items():
        outcome = evaluate(condition, subject.facts, rule.limits)
        if outcome.value:
            ranked = evaluate(rule.rank, subject.facts, rule.limits).value if rule.rank else None
            rank = float("-inf") if ranked is None else float(ranked)
            return _Hit(subject, level, rule.forced_level or level, outcome.used, rank), True
        open_question |= outcome.value is None
    return None, not open_question


def _finding(rule: Rule, group: list[_Hit], fingerprint: str) -> _Placed:
    worst = min(group, key=lambda hit: (LEVELS.index(hit.level), -hit.rank, hit.subject.order))
    subject = worst.subject
    context = {
        **subject.facts,
        "limits": rule.limits,
        "layer": subject.layer,
        "weight": subject.weight,
        "blame": blame_in_words(subject.blame),
    }
    message = render_message(rule.message, context, rule.path)
    metrics = _metrics(rule, subject)
    span = None
    if len(group) > 1:
        span = first, last = _name(group[0].subject), _name(group[-1].subject)
        noun = _NOUNS[rule.scope] + ("s" if len(group) > 2 else "")
        message += f"; and {len(group) - 1} more {noun}, {first} to {last}" if first != last else ""
        metrics |= {"layers": len(group), "first": first, "last": last}
    evidence = _evidence(subject, worst.used)
    proved = _holds_by_proof(rule, worst)
    if proved and "every input" not in message:
        message += "; proved for every input in range"
    message += _disagreement(subject, worst.used)
    level = worst.level if proved else _capped(worst.level, evidence, subject)
    if level != worst.level:
        message += "; judged on made-up inputs, which a trained model need not be at home with: give real ones (--data)"
    finding = Finding(
        rule=rule.name,
        code=rule.code,
        level=level,
        layer=subject.layer,
        weight=subject.weight,
        message=message,
        evidence=evidence,
        metrics=metrics,
        fixes=choose_fixes(rule.fixes, subject, span),
        source=subject.source,
        fingerprint=fingerprint,
    )
    return _Placed(finding, rule, subject.order, group[0].subject.order, group[-1].subject.order)


def _holds_by_proof(rule: Rule, hit: _Hit) -> bool:
    """Does the finding follow from bounds alone, in place of what was estimated or measured?"""
    facts = {name: fact for name, fact in hit.subject.facts.items() if _kind(hit.subject, name) in (None, "proved")}
    bounds = {name.removeprefix("proved_"): fact for name, fact in facts.items() if name.startswith("proved_")}
    outcome = evaluate(rule.conditions[hit.condition], {**facts, **bounds}, rule.limits)
    return bool(outcome.value) and any(name.removeprefix("proved_") in bounds for name in outcome.used)


def _disagreement(subject: Subject, used: frozenset[str]) -> str:
    """What the estimate says where it is more than two decades from the measurement that decided."""
    for name in sorted(fact for fact in used if FACTS[fact].unit == "decades"):
        measured, estimated = (subject.facts.get(f"{kind}_{name}") for kind in ("measured", "estimated"))
        if isinstance(measured, float) and isinstance(estimated, float) and abs(measured - estimated) > _APART:
            return f"; the estimate differs: {decades(estimated)}"
    return ""


def _fingerprint(rule: Rule, group: list[_Hit], scope: Sequence[Subject], identities: Mapping[str, str]) -> str:
    """Of several subjects, the first or the last, whichever is nearer to its end of the network.

    Other weights move a group's inner end, and which of its subjects is the worst; the outer end stays.
    """
    position = {id(subject): k for k, subject in enumerate(scope)}
    first, last = group[0].subject, group[-1].subject
    outer = first if position[id(first)] < len(scope) - 1 - position[id(last)] else last
    weight = outer.weight and str(outer.facts.get("parameter") or outer.weight)
    return fingerprint(rule.code, identities.get(outer.layer or "", None if weight else outer.layer), weight)


def _capped(level: Level, evidence: Evidence, subject: Subject) -> Level:
    """A trained model is at home on its own data: on made-up inputs what is not proved counts one level less."""
    foreign = subject.facts.get("stage") == "trained" and not subject.facts.get("data_given")
    if not foreign or evidence == "proved" or level == "note":
        return level
    return "warning" if level == "error" else "note"


def blame_in_words(blame: Sequence[Blame]) -> str:
    """The decay by operator, largest first: `30 Sigmoid -18.1, 30 MatMul +2.0`; at most four."""
    sums: dict[str, tuple[int, float]] = {}
    for item in blame:
        count, total = sums.get(item.op_type, (0, 0.0))
        sums[item.op_type] = (count + 1, total + item.decades)
    ordered = sorted(sums.items(), key=lambda entry: (-abs(entry[1][1]), entry[0]))[:4]
    return ", ".join(f"{count} {op} {total:+.1f}" for op, (count, total) in ordered if abs(total) >= 0.05)


def _evidence(subject: Subject, used: frozenset[str]) -> Evidence:
    """Measured if a measured fact decided; proved if all that decided is proved or read from the file."""
    kinds = {kind for fact in used if (kind := _kind(subject, fact)) is not None}
    if "measured" in kinds:
        return "measured"
    return "estimated" if "estimated" in kinds else "proved"


def _kind(subject: Subject, fact: str) -> Evidence | None:
    prefixes: tuple[Evidence, ...] = ("proved", "estimated", "measured")
    implied = next((kind for kind in prefixes if fact.startswith(f"{kind}_")), None)
    return implied or subject.evidence.get(fact)


def _metrics(rule: Rule, subject: Subject) -> dict[str, Any]:
    """The numbers that the rule's conditions and message speak of, by fact name."""
    names = message_facts(rule.message).union(*(names_in(condition) for condition in rule.conditions.values()))
    numbers = (name for name in sorted(names) if FACTS[name].kind == "number")
    return {name: subject.facts[name] for name in numbers if subject.facts.get(name) is not None}


def _name(subject: Subject) -> str:
    return subject.weight or subject.layer or "the model"


def _point_to_causes(placed: list[_Placed]) -> list[_Placed]:
    """A finding that one of another rule, at least as severe, explains and reaches says so.

    Causes that have a cause themselves give way to it.
    """
    pointed = []
    for item in placed:
        cause = _root(item, placed)
        if cause is not None:
            place = cause.finding.layer or "the model"
            finding = replace(
                item.finding,
                message=f"{item.finding.message}; a consequence of {cause.rule.name} at {place}",
                metrics={**item.finding.metrics, "cause": cause.rule.name, "cause_layer": place},
            )
            item = replace(item, finding=finding)
        pointed.append(item)
    return pointed


def _root(item: _Placed, placed: Sequence[_Placed]) -> _Placed | None:
    """The cause that has none itself; their number bounds the way where pages explain each other in a circle."""
    found = None
    for _ in placed:
        deeper = next((other for other in placed if other is not item and _explains(other, found or item)), None)
        if deeper is None:
            break
        found = deeper
    return found


def _explains(cause: _Placed, item: _Placed) -> bool:
    levels = (cause.finding.level, item.finding.level)
    if (
        item.rule.name not in cause.rule.explains
        or "note" in levels
        or LEVELS.index(levels[0]) > LEVELS.index(levels[1])
    ):
        return False
    if item.rule.scope == "model":
        return True
    return cause.first <= item.last if item.rule.travels == "forward" else item.first <= cause.last
