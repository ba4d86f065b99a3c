"""Configuration files: `gradlint.toml`, or the table `[tool.gradlint]` of `pyproject.toml`.

`config.schema.json` says which keys there are and what they hold; it ships with the package, editors can use it, and
files are checked against it here. Nothing in a file makes gradlint write to a path: a model's folder may be foreign.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gradlint.condition import near
from gradlint.exceptions import UsageError

FILES = ("gradlint.toml", "pyproject.toml")
# Keys whose texts are paths; relative ones start at the folder of the file that holds them.
_PATHS = ("baseline", "data", "rules", "source-root")


@dataclass(frozen=True)
class Config:
    """Settings by key, checked; the file they came from, and the folder that their globs on paths start at."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    folder: Path = Path()

    def model_ignores(self, model: str) -> tuple[str, ...]:
        """The selectors that `per-model-ignores` holds for this model's path."""
        absolute = Path(model).absolute()
        folder = self.folder.absolute()
        names = [absolute.name, Path(model).as_posix()]
        if absolute.is_relative_to(folder):
            names.append(absolute.relative_to(folder).as_posix())
        globs = self.settings.get("per-model-ignores", {})
        return tuple(s for glob, some in globs.items() if any(fnmatchcase(n, glob) for n in names) for s in some)


def load_config(given: Sequence[str] = (), *, start: Path | None = None, isolated: bool = False) -> Config:
    """The configuration in force.

    `given` holds files and `key=value` texts (TOML), later ones win. Without a file among them, the first of `FILES`
    that speaks of gradlint is taken, upward from `start` (the first model's folder), then from the current folder;
    with `isolated` none is. Raises UsageError for a file that can't be read or holds an unknown key or a wrong value.
    """
    settings: dict[str, Any] = {}
    found: Path | None = None
    if not isolated and not any(_is_file(text) for text in given):
        found = (find_config(start) if start else None) or find_config(Path())
        if found is not None:
            settings |= read_config(found)
    for text in given:
        if _is_file(text):
            found = Path(text)
            _update(settings, read_config(found))
        else:
            _update(settings, _check(_inline(text), f"--config {text}"))
    return Config(settings, found, found.parent if found else Path())


def find_config(start: Path) -> Path | None:
    """The nearest file that configures gradlint, in `start` or a folder above it."""
    start = start.absolute()
    for folder in (start, *start.parents):
        for name in FILES:
            path = folder / name
            if path.is_file() and (name == "gradlint.toml" or "gradlint" in _toml(path).get("tool", {})):
                return path
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The settings in one file, checked, with its paths made to start at its folder."""
    table = _toml(path)
    where = str(path)
    if path.name == "pyproject.toml":
        table = table.get("tool", {}).get("gradlint", {})
        where = f"{path}: tool.gradlint"
    settings = _check(table, where)
    for key in _PATHS:
        if isinstance(value := settings.get(key), str):
            settings[key] = str(path.parent / value)
        elif value is not None:
            settings[key] = [str(path.parent / item) for item in value]
    return settings


@cache
def schema() -> Mapping[str, Any]:
    """The JSON schema of the configuration."""
    text = resources.files("gradlint").joinpath("config.schema.json").read_text("utf-8")
    loaded: Mapping[str, Any] = json.loads(text)
    return loaded


def to_toml(settings: Mapping[str, Any]) -> str:
    """Settings as a TOML document that `read_config` reads back; None is left out."""
    scalars = {key: value for key, value in settings.items() if value is not None and not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_toml_value(value)}" for key, value in scalars.items()]
    for key, table in settings.items():
        if isinstance(table, Mapping) and table:
            lines += ["", f"[{_key(key)}]", *(f"{_key(name)} = {_toml_value(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _is_file(text: str) -> bool:
    return "=" not in text or Path(text).is_file()


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def _inline(text: str) -> dict[str, Any]:
    """`key=value` as TOML; a bare word is taken for a text."""
    key, _, value = text.partition("=")
    for document in (text, f"{key}={_toml_value(value.strip())}"):
        try:
            return tomllib.loads(document)
        except tomllib.TOMLDecodeError:
            continue
    raise UsageError(f"--config {text}: neither a file nor a TOML line such as `fail-on=warning`")


def _update(settings: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lay `more` over `settings`; tables merge, one rule's limits too."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(old := settings.get(key), Mapping):
            merged = dict(old)
            _update(merged, value)
            settings[key] = merged
        else:
            settings[key] = value


# -- checking against the schema: the few keywords it uses -------------------------------------------------------------

_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "object": (Mapping, "a table"),
    "array": (list, "a list"),
    "string": (str, "a text"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
}


def _check(table: Any, where: str) -> dict[str, Any]:
    _validate(table, schema(), where)
    return dict(table)


def _validate(value: Any, rule: Mapping[str, Any], where: str) -> None:
    if "enum" in rule and value not in rule["enum"]:
        hint = near(value, rule["enum"]) if isinstance(value, str) else ""
        raise UsageError(f"{where}: {value!r} is none of {', '.join(rule['enum'])}{hint}")
    if "type" in rule:
        kind, noun = _TYPES[rule["type"]]
        if not isinstance(value, kind) or (isinstance(value, bool) and rule["type"] != "boolean"):
            raise UsageError(f"{where}: {value!r} is not {noun}")
    if isinstance(value, Mapping):
        _validate_table(value, rule, where)
    elif isinstance(value, list):
        _validate_list(value, rule, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _validate_number(value, rule, where)


def _validate_table(table: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> None:
    known = rule.get("properties", {})
    others = rule["additionalProperties"]
    for key, value in table.items():
        if key not in known and not others:
            raise UsageError(f"{where}: no key {key!r}{near(key, known) or ': see gradlint config'}")
        _validate(value, known.get(key, others), f"{where}: {key}")


def _validate_list(items: Sequence[Any], rule: Mapping[str, Any], where: str) -> None:
    if not rule.get("minItems", 0) <= len(items) <= rule.get("maxItems", math.inf):
        raise UsageError(f"{where}: {len(items)} values, expected {rule.get('minItems', 0)}")
    for index, item in enumerate(items):
        _validate(item, rule["items"], f"{where}[{index}]")


def _validate_number(number: float, rule: Mapping[str, Any], where: str) -> None:
    if not math.isfinite(number):
        raise UsageError(f"{where}: {number} is not finite")
    if number < rule.get("minimum", -math.inf):
        raise UsageError(f"{where}: {number} is under {rule['minimum']}")
    if number <= rule.get("exclusiveMinimum", -math.inf):
        raise UsageError(f"{where}: {number} is not above {rule['exclusiveMinimum']}")


# -- writing -----------------------------------------------------------------------------------------------------------


def _key(key: str) -> str:
    bare = key != "" and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
