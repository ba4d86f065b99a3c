"""What settings speak of by name: a model's inputs, and the dimensions it leaves open."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from gradlint.binding import open_dimensions
from gradlint.condition import near
from gradlint.exceptions import ModelError, UsageError
from gradlint.load import read
from gradlint.options import Options, Task

# Options that are tables by name, and what they name.
TABLES = {"dims": "dimension", "values": "input", "shapes": "input", "ranges": "input", "stats": "input"}
_NONE = {"dimension": ": every size is fixed", "input": ": there is none"}
_TOLD = 12

Names = Mapping[str, Sequence[str]]  # by what they name


def check_names(graph: ir.Graph, options: Options) -> None:
    """Raises UsageError for a name that the model doesn't have; `graph` is as it was read."""
    _check("the model has no", [options], _names(graph), TABLES)


def shared(tasks: Sequence[Task], lenient: Collection[str] = ()) -> list[Task]:
    """Several models with the same settings: each keeps those that name something of it.

    Raises UsageError for a name that no model has, unless a model can't be read; in the tables of `lenient` none has
    to.
    """
    own = [_names_in(path) for path, _ in tasks]
    if None not in own:
        every = {kind: [name for names in own if names for name in names[kind]] for kind in _NONE}
        _check("no model has the", [options for _, options in tasks], every, TABLES.keys() - set(lenient))
    return [
        (path, options if names is None else _kept(options, names))
        for (path, options), names in zip(tasks, own, strict=True)
    ]


def _names(graph: ir.Graph) -> Names:
    inputs = [str(v.name) for v in graph.inputs if v.name not in graph.initializers]
    return {"input": inputs, "dimension": open_dimensions(graph)}


def _names_in(path: str) -> Names | None:
    """None for a model that can't be read: its check says why."""
    try:
        return _names(read(path).model.graph)
    except ModelError:
        return None


def _kept(options: Options, names: Names) -> Options:
    own: dict[str, Any] = {}
    for table, kind in TABLES.items():
        own[table] = {name: value for name, value in getattr(options, table).items() if name in names[kind]}
    return replace(options, **own)


def _check(what: str, asked: Sequence[Options], names: Names, tables: Collection[str]) -> None:
    for table, kind in TABLES.items():
        known = list(dict.fromkeys(names[kind]))
        for name in (name for options in asked for name in getattr(options, table)):
            if table in tables and name not in known:
                more = f" and {len(known) - _TOLD} more" if len(known) > _TOLD else ""
                listed = f" ({kind}s: {', '.join(known[:_TOLD])}{more})" if known else _NONE[kind]
                raise UsageError(f"{what} {kind} {name!r}{listed}{near(name, known)}")
