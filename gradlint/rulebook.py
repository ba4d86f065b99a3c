"""Rules are pages: one Markdown file holds a rule's definition, its documentation and the examples that prove it.

A page is `# rule-name`, one sentence, a fenced `toml` block with the definition, then the sections of `SECTIONS`, the
last two with examples: a fenced `onnx` block (ONNX text) or `python` block (a builder call), and `Expect: rule-name`.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

from gradlint.condition import Condition, Limits, near, parse_condition
from gradlint.exceptions import UsageError
from gradlint.fact_table import SCOPES, Scope
from gradlint.message import check_message
from gradlint.remedies import REMEDIES
from gradlint.results import LEVELS, Level

Status = Literal["stable", "preview"]
Way = Literal["backward", "forward"]

SECTIONS = (
    "Why it matters",
    "How to fix it",
    "When to ignore it",
    "References",
    "Triggers",
    "Does not trigger",
)
_REQUIRED = ("code", "status", "scope", "since", "when", "message")
_OPTIONAL = ("level", "where", "rank", "places", "fixes", "explains", "travels", "limits")
_PLACES = 3  # places a rule names one by one; more of them share a cause, and a finding
_MARKDOWN = MarkdownIt("commonmark").disable("inline")  # blocks, and the text as it stands in each
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_CODE = re.compile(r"[A-Z]{2,8}[0-9]{3,4}")


@dataclass(frozen=True)
class Example:
    """A model in words and what a rule's page expects of it.

    `kind` is `onnx` (ONNX text) or `python` (a builder call); `options` are the settings it is checked with. A
    `triggers` example yields its rule and all of `expect`; the others don't yield the rule; an empty `expect` says
    that nothing above a note is found.
    """

    kind: Literal["onnx", "python"]
    text: str
    triggers: bool
    expect: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A rule as its page defines it.

    `conditions` are tried strongest level first, on the subjects of `scope` for which `where` holds; `rank` (larger =
    worse) picks the subject that speaks for a group of layers; where there are more groups than `places` they are one.
    Findings of the rules in `explains` point here where what is wrong here reaches them: towards the inputs if it
    `travels` backward, as gradients do, towards the outputs if forward. `forced_level` replaces the level of every
    finding.
    """

    name: str
    code: str
    status: Status
    scope: Scope
    since: str
    conditions: Mapping[Level, Condition]
    message: str
    where: Condition | None
    rank: Condition | None
    places: int
    fixes: tuple[str, ...]
    explains: tuple[str, ...]
    travels: Way
    limits: Limits
    title: str
    sections: Mapping[str, str]
    examples: tuple[Example, ...]
    path: str
    forced_level: Level | None = None


@dataclass(frozen=True)
class Rulebook:
    """All rules, by code."""

    rules: tuple[Rule, ...]

    def find(self, name: str) -> Rule:
        """The rule of this name or code; UsageError with near names when there is none."""
        for rule in self.rules:
            if name in (rule.name, rule.code):
                return rule
        known = [word for rule in self.rules for word in (rule.name, rule.code)]
        raise UsageError(f"no rule {name!r}{near(name, known)}")


def load_rules(extra_dirs: Sequence[Path] = ()) -> Rulebook:
    """The packaged rules and the pages in `extra_dirs`.

    Raises UsageError for a page that is wrong, a folder that holds none, and a code or name used twice.
    """
    packaged = resources.files("gradlint.rules")
    names = sorted(item.name for item in packaged.iterdir() if _is_page(item.name))
    pages = {f"rules/{name}": packaged.joinpath(name).read_text("utf-8") for name in names}
    for folder in extra_dirs:
        if not folder.is_dir():
            raise UsageError(f"rules: {folder} is not a folder")
        own = {str(path): path.read_text("utf-8") for path in sorted(folder.iterdir()) if _is_page(path.name)}
        if not own:
            raise UsageError(f"rules: no page (*.md) in {folder}")
        pages |= own
    rules: list[Rule] = []
    for path, text in pages.items():
        rule = parse_page(text, path)
        for other in rules:
            if rule.name == other.name or rule.code == other.code:
                raise UsageError(f"{path}: {rule.name} ({rule.code}) has the name or code of {other.path}")
        rules.append(rule)
    known = {rule.name for rule in rules}
    for rule in rules:
        for explained in rule.explains:
            if explained not in known:
                raise UsageError(f"{rule.path}: explains: no rule {explained!r}{near(explained, known)}")
    return Rulebook(tuple(sorted(rules, key=lambda rule: rule.code)))


def configure(rulebook: Rulebook, settings: Mapping[str, Mapping[str, Any]]) -> Rulebook:
    """The rulebook with other levels and limits: `{"dead-relu": {"level": "warning", "limits": {"share": 0.4}}}`.

    Raises UsageError for a rule, key, level or limit that doesn't exist.
    """
    changed: dict[str, Rule] = {}
    for name, setting in settings.items():
        rule = rulebook.find(name)
        rule = changed.get(rule.name, rule)
        where = f"settings of {rule.name}"
        for key in setting:
            if key not in ("level", "limits"):
                raise UsageError(f"{where}: no key {key!r}{near(key, ('level', 'limits'))}")
        if "level" in setting:
            rule = replace(rule, forced_level=_choice(setting["level"], LEVELS, f"{where}: level"))
        limits = _limits(setting.get("limits", {}), where)
        for limit in limits:
            if limit not in rule.limits:
                raise UsageError(f"{where}: no limit {limit!r}{near(limit, rule.limits)}")
        changed[rule.name] = replace(rule, limits={**rule.limits, **limits})
    return Rulebook(tuple(changed.get(rule.name, rule) for rule in rulebook.rules))


def configured_rules(
    extra_dirs: Sequence[Path], levels: Mapping[str, str], limits: Mapping[str, Mapping[str, float]]
) -> Rulebook:
    """`load_rules` with `levels` and `limits` by rule, as `configure` takes them."""
    rulebook = configure(load_rules(extra_dirs), {name: {"level": level} for name, level in levels.items()})
    return configure(rulebook, {name: {"limits": table} for name, table in limits.items()})


def explain(rule: Rule, width: int = 80) -> str:
    """The page as plain text for the terminal: definition, limits, and the sections written for people."""
    levels = " / ".join(rule.conditions)
    lines = [f"{rule.name} ({rule.code}, {levels}, {rule.status})", "=" * width]
    lines += [*textwrap.wrap(rule.title, width), ""]
    if rule.where is not None:
        lines += textwrap.wrap(f"judged where: {rule.where.text}", width, subsequent_indent="    ")
    for level, condition in rule.conditions.items():
        lines += textwrap.wrap(f"{level} when: {condition.text}", width, subsequent_indent="    ")
    lines += [f"limits.{name} = {value:g}" for name, value in rule.limits.items()]
    for title, body in rule.sections.items():
        if title not in ("Triggers", "Does not trigger"):
            lines += ["", title, "-" * len(title), *_plain(body, width)]
    return "\n".join(lines) + "\n"


def _plain(markdown: str, width: int) -> list[str]:
    """Paragraphs and list items wrapped, code indented, links as `text (address)`."""
    lines: list[str] = []
    bullet = ""
    for token in _MARKDOWN.parse(markdown):
        if token.type in ("fence", "code_block"):
            lines += [
                *([""] if lines and lines[-1] else []),
                *textwrap.indent(token.content.rstrip(), "    ").splitlines(),
                "",
            ]
        elif token.type == "list_item_open":
            bullet = "- "
        elif token.type == "inline":
            text = re.sub(r"\[([^\]]*)\]\(([^)]*)\)", r"\1 (\2)", " ".join(token.content.split()))
            indent = "  " if token.level > 1 else ""
            lines += textwrap.wrap(text, width, initial_indent=bullet or indent, subsequent_indent=indent)
            bullet = ""
        elif token.type == "paragraph_close" and token.level == 0:
            lines.append("")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def parse_page(text: str, path: str) -> Rule:
    """The rule on one page; UsageError naming `path` and what is wrong."""
    tokens = _MARKDOWN.parse(text)
    headings = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.level == 0]
    if not headings or tokens[headings[0]].tag != "h1" or headings[0] != 0:
        raise UsageError(f"{path}: a rule page starts with `# rule-name`")
    name = tokens[1].content
    if not _NAME.fullmatch(name) or name != Path(path).stem:
        raise UsageError(f"{path}: the heading {name!r} must be the file's name in kebab-case")
    if len(tokens) < 7 or tokens[3].type != "paragraph_open" or tokens[6].type != "fence" or tokens[6].info != "toml":
        raise UsageError(f"{path}: one sentence and a fenced toml block follow the heading")
    sections, examples = _sections(tokens, text.splitlines(), headings[1:], path)
    try:
        table = tomllib.loads(tokens[6].content)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: toml block: {error}") from error
    return _rule(name, " ".join(tokens[4].content.split()), table, sections, examples, path)


def _rule(
    name: str, title: str, table: dict[str, Any], sections: dict[str, str], examples: list[Example], path: str
) -> Rule:
    for key in table:
        if key not in _REQUIRED + _OPTIONAL:
            raise UsageError(f"{path}: no key {key!r}{near(key, _REQUIRED + _OPTIONAL)}")
    for key in _REQUIRED:
        if key not in table:
            raise UsageError(f"{path}: the key {key!r} is missing")
    for key in ("code", "since", "message", "where", "rank"):
        if not isinstance(table.get(key, ""), str):
            raise UsageError(f"{path}: {key} must be a text")
    if not _CODE.fullmatch(table["code"]):
        raise UsageError(f"{path}: the code {table['code']!r} must be capitals and three or four digits, as GL101")
    scope: Scope = _choice(table["scope"], SCOPES, f"{path}: scope")
    limits = _limits(table.get("limits", {}), path)
    check_message(table["message"], scope, limits, f"{path}: message")
    rank, where = table.get("rank"), table.get("where")
    return Rule(
        name=name,
        code=table["code"],
        status=_choice(table["status"], ("stable", "preview"), f"{path}: status"),
        scope=scope,
        since=table["since"],
        conditions=_conditions(table, scope, limits, path),
        message=table["message"],
        where=None if where is None else parse_condition(where, scope, limits, f"{path}: where"),
        rank=None if rank is None else parse_condition(rank, scope, limits, f"{path}: rank", "number"),
        places=_places(table.get("places", _PLACES), path),
        fixes=tuple(_choice(fix, tuple(REMEDIES), f"{path}: fixes") for fix in _texts(table, "fixes", path)),
        explains=_texts(table, "explains", path),
        travels=_choice(table.get("travels", "backward"), ("backward", "forward"), f"{path}: travels"),
        limits=limits,
        title=title,
        sections=sections,
        examples=tuple(examples),
        path=path,
    )


def _conditions(table: dict[str, Any], scope: Scope, limits: Limits, path: str) -> dict[Level, Condition]:
    when = table["when"]
    if isinstance(when, str):
        if "level" not in table:
            raise UsageError(f"{path}: the key 'level' is missing (or write when.error, when.warning, when.note)")
        when = {_choice(table["level"], LEVELS, f"{path}: level"): when}
    elif not isinstance(when, dict) or "level" in table or not when:
        raise UsageError(f"{path}: when is a text with a level beside it, or a table of error, warning, note")
    for level, text in when.items():
        _choice(level, LEVELS, f"{path}: when")
        if not isinstance(text, str):
            raise UsageError(f"{path}: when.{level} must be a text")
    return {
        level: parse_condition(when[level], scope, limits, f"{path}: when.{level}") for level in LEVELS if level in when
    }


def _sections(
    tokens: list[Token], lines: list[str], headings: list[int], path: str
) -> tuple[dict[str, str], list[Example]]:
    sections: dict[str, str] = {}
    examples: list[Example] = []
    starts = [i for i in headings if tokens[i].tag == "h2"]
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        title, body = tokens[start + 1].content, tokens[start + 3 : stop]
        _choice(title, SECTIONS, f"{path}: section")
        first = (tokens[start].map or [0, 0])[1]
        last = (tokens[stop].map or [0, 0])[0] if stop < len(tokens) else len(lines)
        sections[title] = "\n".join(lines[first:last]).strip()
        if title in ("Triggers", "Does not trigger"):
            examples += _examples(body, title == "Triggers", path)
    for title in SECTIONS:
        if not sections.get(title):
            raise UsageError(f"{path}: the section '## {title}' is missing or empty")
    for triggers, title in ((True, "Triggers"), (False, "Does not trigger")):
        if not any(example.triggers is triggers for example in examples):
            raise UsageError(f"{path}: '## {title}' has no example")
    return sections, examples


def _examples(body: list[Token], triggers: bool, path: str) -> list[Example]:
    found: list[Example] = []
    for position, token in enumerate(body):
        if token.type != "fence":
            continue
        kind, _, settings = token.info.partition(" ")
        if kind not in ("onnx", "python"):
            raise UsageError(f"{path}: an example is a fenced onnx or python block, not {kind or 'a plain one'}")
        after = body[position + 2].content if position + 2 < len(body) else ""
        if not after.startswith("Expect:"):
            raise UsageError(f"{path}: `Expect: rule-name, ...` (or `Expect: nothing`) must follow each example")
        names = after.removeprefix("Expect:").strip().rstrip(".")
        expect = () if names == "nothing" else tuple(name.strip() for name in names.split(","))
        try:
            options = tomllib.loads("\n".join(settings.split()))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path}: settings of an example: {error} in `{settings}`") from error
        found.append(Example("onnx" if kind == "onnx" else "python", token.content, triggers, expect, options))
    return found


def _is_page(name: str) -> bool:
    return name.endswith(".md") and name != "README.md"


def _choice(value: Any, known: Sequence[Any], where: str) -> Any:
    if value not in known:
        raise UsageError(f"{where}: {value!r} is none of {', '.join(known)}{near(str(value), known)}")
    return value


def _texts(table: dict[str, Any], key: str, path: str) -> tuple[str, ...]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{path}: {key} must be a list of texts")
    return tuple(values)


def _places(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{path}: places must be a whole number from 1")
    return value


def _limits(table: Any, where: str) -> dict[str, float]:
    if not isinstance(table, dict):
        raise UsageError(f"{where}: limits must be a table of numbers")
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{where}: limits.{name} must be a number")
    return dict(table)
