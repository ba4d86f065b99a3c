"""The messages of rule pages: sandboxed Jinja templates over the facts that conditions use, with rounding filters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from gradlint.condition import Limits, check_fact, near
from gradlint.exceptions import UsageError
from gradlint.fact_table import Fact, Scope

# Names a message may use beside facts: where the finding is, and the blame in words.
PLACES = frozenset({"layer", "weight", "blame", "limits"})


def decades(value: float | None) -> str:
    """-3.21 -> `-3.2 decades`."""
    return "unknown" if value is None else f"{value:+.1f} decades"


def times(value: float | None) -> str:
    """The factor that a number of decades stands for, without its sign: -3.2 -> `1,600 times`, -18 -> `10^18 times`."""
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return "infinitely many times"
    if abs(value) >= 6:
        return f"10^{abs(value):.0f} times"
    factor = 10 ** abs(value)
    digits = max(0, math.floor(abs(value)) - 1)
    return f"{round(factor, -digits):,.0f} times" if factor >= 10 else f"{factor:.1f} times"


def percent(value: float | None) -> str:
    """0.532 -> `53 %`."""
    return "unknown" if value is None else f"{100 * value:.0f} %"


def short(value: float | None) -> str:
    """Three significant digits."""
    return "unknown" if value is None else f"{value:.3g}"


def _finalize(value: Any) -> Any:
    """Counts arrive as floats, and print without a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return "unknown" if value is None else value


_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters.update({"decades": decades, "times": times, "percent": percent, "short": short})


@lru_cache(maxsize=512)
def _template(text: str) -> Template:
    return _ENVIRONMENT.from_string(text)


def check_message(text: str, scope: Scope, limits: Limits, where: str) -> None:
    """Raise UsageError for a template that doesn't parse or names what is no fact of `scope` and no limit."""
    try:
        tree = _ENVIRONMENT.parse(text)
    except TemplateSyntaxError as error:
        raise UsageError(f"{where}: {error.message}") from error
    for kind, known in ((nodes.Filter, _ENVIRONMENT.filters), (nodes.Test, _ENVIRONMENT.tests)):
        for used in tree.find_all(kind):
            if used.name not in known:
                raise UsageError(f"{where}: no {kind.__name__.lower()} {used.name!r}{near(used.name, known)}")
    for name in sorted(meta.find_undeclared_variables(tree) - PLACES):
        check_fact(name, scope, where)
    for attribute in tree.find_all(nodes.Getattr):
        if not (isinstance(attribute.node, nodes.Name) and attribute.node.name == "limits"):
            raise UsageError(f"{where}: only `limits` has attributes, not {attribute.attr!r}'s owner")
        if attribute.attr not in limits:
            raise UsageError(f"{where}: no limit named {attribute.attr!r}{near(attribute.attr, limits)}")


@lru_cache(maxsize=512)
def message_facts(text: str) -> frozenset[str]:
    """The facts a message names."""
    return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) - PLACES)


def render_message(text: str, context: Mapping[str, Fact | Limits], where: str) -> str:
    """One line of text; facts that are not in `context` are unknown (None). UsageError when the template can't run."""
    known = dict.fromkeys(message_facts(text) | PLACES) | dict(context)
    try:
        return " ".join(_template(text).render(known).split())
    except (TypeError, ValueError, ArithmeticError, SecurityError) as error:
        raise UsageError(f"{where}: the message can't be rendered: {error}") from error
