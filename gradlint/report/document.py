"""HTML documents that load nothing: a template with its style and script inline, allowed by their hashes alone."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradlint.report.pictures import HIGH, WIDE
from gradlint.report.text import label

_HERE = Path(__file__).parent


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(label=label, pct=lambda value: f"{value:.4g}%")
    made.globals.update(wide=WIDE, high=HIGH)
    return made


def _inline(name: str) -> tuple[Markup, str]:
    """A file's text for an inline element, and its hash for the Content-Security-Policy."""
    text = (_HERE / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def document(template: str, **content: Any) -> str:
    """The template's text with `style`, `script` and the `policy` that allows them; it ends with a newline."""
    style, style_hash = _inline("page.css")
    script, script_hash = _inline("page.js")
    policy = (
        f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; base-uri 'none'; form-action 'none'"
    )
    page = environment().get_template(template).render(style=style, script=script, policy=policy, **content)
    return page.strip() + "\n"


def position(value: float, low: float, high: float) -> float:
    """Where a value lies on an axis, in per cent of its length."""
    return 100 * min(max((value - low) / (high - low), 0.0), 1.0)
