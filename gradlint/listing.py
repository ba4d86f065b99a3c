"""What gradlint knows, as text: its operators, the facts of its rules, its rules."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from gradlint.fact_table import FACTS, SCOPES
from gradlint.rulebook import Rule


def operators() -> str:
    """A row per operator: which analyses have a row for it."""
    # Imported here: the other lists need not wait for numpy.
    import gradlint.ops  # noqa: F401  (fills the tables)
    from gradlint.transfer import BLOCKED, TABLES

    names = sorted({name for table in TABLES.values() for name in table} | BLOCKED)
    wide = max(len(name) for name in names)
    lines = [f"{'operator':{wide}}  " + "  ".join(TABLES)]
    for name in names:
        blocked = name in BLOCKED
        cells = [
            "none" if blocked and title in ("pullback", "bound", "vjp") else "yes" if name in table else "-"
            for title, table in TABLES.items()
        ]
        padded = (f"{cell:{len(title)}}" for cell, title in zip(cells, TABLES, strict=True))
        lines.append(f"{name:{wide}}  {'  '.join(padded)}".rstrip())
    lines += ["", f"{len(names)} operators; none: no gradient by nature; -: not modelled"]
    return "\n".join(lines) + "\n"


def facts(width: int) -> str:
    """The facts with their units, scopes and meanings, in lines of `width` columns."""
    text = []
    for spec in FACTS.values():
        scopes = "all" if spec.scopes == set(SCOPES) else " ".join(s for s in SCOPES if s in spec.scopes)
        meaning = textwrap.fill(spec.meaning, width, initial_indent="    ", subsequent_indent="    ")
        text.append(f"{spec.name} [{spec.unit}] {scopes}\n{meaning}\n")
    return "".join(text)


def rules(book: Sequence[Rule]) -> str:
    """A line per rule: its code, name and levels."""
    return "".join(_rule(item) for item in book)


def _rule(item: Rule) -> str:
    levels = "/".join(item.conditions)
    preview = " (preview)" if item.status == "preview" else ""
    return f"{item.code}  {item.name:28}  {levels}{preview}\n"
