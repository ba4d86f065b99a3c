"""Text for terminals, logs and markup: escaping of hostile names, display width, wrapping, numbers."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

# Control characters (C0, C1), format characters (bidirectional overrides and isolates, zero-width marks, tags),
# non-characters, lone surrogates, line and paragraph separators: none of them may reach an output as it is.
_HOSTILE = frozenset({"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"})
NAME_LIMIT = 160


def escape(text: str) -> str:
    r"""Write every control, format and separator character of `text` as `\xNN`, `\uNNNN` or `\UNNNNNNNN`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(c) if unicodedata.category(c) in _HOSTILE else c for c in text)


def _visible(character: str) -> str:
    point = ord(character)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def label(name: str, columns: int = NAME_LIMIT) -> str:
    """An escaped name of at most `columns` columns; a longer one loses its left, which says the least."""
    name = escape(name)
    if len(name) <= columns and name.isascii():
        return name
    return clip_left(name, columns)


def prose(text: str) -> str:
    """Escaped running text on one line; a name too long for a line within it is shortened like any name."""
    text = escape(text)
    return " ".join(label(word) for word in text.split(" ")) if len(text) > NAME_LIMIT else text


def cells(text: str) -> int:
    """Columns that escaped `text` takes in a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_cell(c) for c in text)


def _cell(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip_left(text: str, columns: int) -> str:
    """`text` cut from the left to `columns`, with an ellipsis; the cut falls behind a separator where one is near."""
    if cells(text) <= columns:
        return text
    kept, width = len(text), 1
    while kept and width + _cell(text[kept - 1]) <= columns:
        kept -= 1
        width += _cell(text[kept])
    tail = text[kept:]
    cut = min((i for i in (tail.find("."), tail.find("/")) if 0 <= i < len(tail) // 3), default=-1)
    return "…" + tail[cut + 1 :]


def clip(text: str, columns: int) -> str:
    """`text` cut from the right to `columns`, with an ellipsis."""
    if cells(text) <= columns:
        return text
    kept, width = 0, 1
    while width + _cell(text[kept]) <= columns:
        width += _cell(text[kept])
        kept += 1
    return text[:kept] + "…"


def pad(text: str, columns: int) -> str:
    return text + " " * (columns - cells(text))


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` columns, broken at spaces, inside a word only where it is too long for a line."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and cells(line) + 1 + cells(word) > columns:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
        while cells(line) > columns:
            head = clip(line, columns + 1)[:-1]
            lines.append(head)
            line = line[len(head) :]
    return [*lines, line] if line or not lines else lines


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def decades(value: float) -> str:
    """Decades with a sign and one digit; a zero has no sign."""
    if abs(value) >= 1e4:
        return f"{value:+.0e}"
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def figure(value: float) -> str:
    """A number in at most three significant digits."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def share(value: float) -> str:
    """A part of a whole in per cent, as a multiple where it is many times that."""
    if value >= 10:
        return f"{figure(value)} times"
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.2g} %"


def number(facts: Mapping[str, Any], key: str) -> float | None:
    """The finite number at `key`, None where it is not known, not applicable or not finite."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
