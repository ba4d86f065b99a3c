"""The explanation of a rule for a report: the parts of its page that a reader of a finding wants."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from markdown_it import MarkdownIt
from markupsafe import Markup

_SECTIONS = ("Why it matters", "How to fix it", "When to ignore it", "References")


def slug(rule: str) -> str:
    """A rule's name as an HTML identifier."""
    return re.sub(r"[^a-z0-9-]", "-", rule.lower())[:60]


@cache
def markdown(rule: str) -> str | None:
    """The one-sentence summary and the explaining sections of a shipped rule's page, None for any other rule."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,60}", rule):
        return None
    page = resources.files("gradlint.rules") / f"{rule}.md"
    if not page.is_file():
        return None
    text = page.read_text(encoding="utf-8")
    head, *sections = re.split(r"^## +", text, flags=re.MULTILINE)
    summary = re.sub(r"^# [^\n]*$|^```toml$.*?^```$", "", head, flags=re.MULTILINE | re.DOTALL).strip()
    kept = [section.strip() for section in sections if section.startswith(_SECTIONS)]
    return "\n\n".join([summary, *(f"### {section}" for section in kept)]) + "\n"


@cache
def markup(rule: str) -> Markup | None:
    """The same as HTML; markup in the page itself is shown as text."""
    text = markdown(rule)
    if text is None:
        return None
    text = re.sub("^### ", "#### ", text, flags=re.MULTILINE)
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


def summary(rule: str) -> str | None:
    """The page's first paragraph on one line."""
    text = markdown(rule)
    return " ".join(text.split("\n\n")[0].split()) if text else None
