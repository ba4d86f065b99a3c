"""The report: what the analyses found, as plain frozen data. The JSON form is a public contract.

In JSON an absent key means "not known", null means "not applicable" (a non-finite number is null too);
`report.schema.json` beside this module describes it.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from gradlint.exceptions import UsageError

SCHEMA = "gradlint-report/1"

Level = Literal["error", "warning", "note"]
Evidence = Literal["proved", "estimated", "measured"]
Verdict = Literal["pass", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Source:
    """A line of the Python file the layer was written in, as the exporter recorded it."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)  # a deep network has millions
class Blame:
    """The share of a decay that one node takes: `decades` (log10, negative shrinks) of `op_type` at `node`."""

    node: str
    op_type: str
    decades: float


@dataclass(frozen=True)
class Fix:
    """A remedy: a name from the catalogue and the text that says what to change here."""

    name: str
    text: str


@dataclass(frozen=True)
class Finding:
    """One statement of one rule about one place."""

    rule: str
    code: str
    level: Level
    layer: str | None
    weight: str | None
    message: str
    evidence: Evidence
    metrics: Mapping[str, Any] = field(default_factory=dict)
    fixes: tuple[Fix, ...] = ()
    source: Source | None = None
    fingerprint: str = ""


PictureKind = Literal["input", "weight", "gradient", "time", "logits", "entropy"]


@dataclass(frozen=True)
class Picture:
    """A histogram or a curve of a layer; only reports made for a page have them.

    kind: what it shows of `subject` (a value, weight or node): the `input` of an activation, a `weight`, the `gradient`
    of a weight (on an axis of log10 of the elements' size), the gradient's norm over the `time` steps (log10), the
    `logits` of an attention (centred per query), the `entropy` of its weights as a share of that of uniform ones.
    low, high: the ends of the horizontal axis. counts: a sample's elements in equal bins between them; left_out: how
    many had no place there (not finite, or zero where the axis is logarithmic). curve: at evenly spaced points, for
    `input` |f'| over its largest in each bin, for `time` the norm at the steps. scheme, std: the initialisation that a
    weight should have, and its standard deviation; of logits std alone.
    """

    kind: PictureKind
    subject: str
    low: float
    high: float
    counts: tuple[int, ...] = ()
    left_out: int = 0
    curve: tuple[float, ...] = ()
    evidence: Evidence | None = None
    scheme: str | None = None
    std: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """A layer and what each kind of evidence says of its output. `inputs` names the layers it reads."""

    name: str
    op_type: str
    module: str | None = None
    source: Source | None = None
    shape: tuple[int | str, ...] = ()
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    proved: Mapping[str, Any] = field(default_factory=dict)
    estimated: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    blame: tuple[Blame, ...] | None = ()  # None: left out, in a deep network where no finding speaks of the layer
    pictures: tuple[Picture, ...] | None = None  # None: not asked for


@dataclass(frozen=True)
class WeightRow:
    """One use of a weight by one layer. `parameter` is the framework's name, a list if an initializer packs several."""

    name: str
    layer: str
    shape: tuple[int, ...]
    weight_rms: float
    trainable: bool
    parameter: str | list[str] | None = None
    estimated: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """`risk` in [0, 1]: a score that the network won't train as it stands; None where it can't be judged.

    baselined: findings left out because the baseline knows them (None: there is no baseline); counts and verdict are
    without them.
    """

    verdict: Verdict
    risk: float | None
    stage: Literal["init", "trained"]
    counts: Mapping[str, int]
    worst_layer: str | None = None
    baselined: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    path: str
    sha256: str
    producer: str
    opset: int
    nodes: int
    parameters: int
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Settings:
    """`data` says where the probe's data came from; `assumptions` lists in words what was not given but chosen."""

    mode: Literal["train", "eval"]
    loss: str
    seed: int
    batch: int
    data: str
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """Nodes in the canonical graph, how many the estimate and the probe reached, and the operators without a row."""

    nodes: int
    estimated: int
    measured: int
    unmodelled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """Why there is no report, in one line for the user. path: the model's, empty where it is no model's."""

    message: str
    path: str = ""


@dataclass(frozen=True)
class Report:
    """Everything gradlint has to say about one model; every renderer is a pure function of it."""

    summary: Summary
    model: ModelInfo
    settings: Settings
    coverage: Coverage
    layers: tuple[LayerRow, ...]
    weights: tuple[WeightRow, ...]
    findings: tuple[Finding, ...]
    timing: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the contract; layers and weights in the graph's order."""
        return {"schema": SCHEMA, **_plain(self)}

    def to_json(self) -> str:
        """The same as text, as `--format json` writes it."""
        return to_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report of a text that `to_json` or `--format json` wrote for one model. Raises UsageError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError("not a report: not JSON") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The report of a JSON object; keys it doesn't know are left out, numbers that were not finite stay None.

        Raises UsageError, naming the place, where the object is no report of this schema.
        """
        if not isinstance(data, Mapping):
            raise UsageError(f"not a report: expected a JSON object, found {_kind(data)}")
        if data.get("schema") != SCHEMA:
            raise UsageError(f"not a report: schema is {str(data.get('schema'))[:60]!r}, expected {SCHEMA!r}")
        report = _read(cls, data, "report")
        assert isinstance(report, cls)
        return report


def to_text(value: Any) -> str:
    """ASCII JSON, so that no control or direction character of a name reaches a terminal."""
    return json.dumps(value, indent=1, allow_nan=False).replace("\x7f", "\\u007f") + "\n"


# Keys whose None is meaningful in JSON ("not applicable"); elsewhere None means "not known" and the key is left out.
_NULLABLE = {"risk", "source", "layer", "weight", "worst_layer"}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(v) for name, v in pairs if v is not None or name in _NULLABLE}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _read(kind: Any, value: Any, place: str) -> Any:
    """`value` from JSON as a value of the annotated type `kind`; what the annotations say is all that is checked."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _read_fields(kind, value, place)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{place}: {str(value)[:60]!r} is none of {', '.join(map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, place)
    if origin in (tuple, list):
        _expect(isinstance(value, list), "a list", value, place)
        return origin(_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        _expect(isinstance(value, Mapping), "an object", value, place)
        return {str(key): _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if kind is float:
        # A number that was not finite is null in JSON.
        number = math.nan if value is None else value
        _expect(isinstance(number, int | float) and not isinstance(number, bool), "a number", value, place)
        return float(number)
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), _NAMES[kind], value, place)
    return value


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    _expect(isinstance(value, Mapping), "an object", value, place)
    hints = typing.get_type_hints(kind)
    read = {}
    for item in fields(kind):
        if item.name in value:
            read[item.name] = _read(hints[item.name], value[item.name], f"{place}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise UsageError(f"{place}: {item.name!r} is missing")
    return kind(**read)


def _read_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        stored = _STORED.get(plain, Mapping if is_dataclass(plain) else plain)
        if isinstance(value, stored):
            return _read(kind, value, place)
    names = " or ".join(_NAMES.get(typing.get_origin(kind) or kind, "an object") for kind in kinds)
    raise UsageError(f"{place}: expected {names}, found {_kind(value)}")


# How JSON holds a type, where not as itself.
_STORED: Mapping[Any, Any] = {float: (int, float), tuple: list, Literal: str}
_NAMES: Mapping[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    types.NoneType: "null",
}


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, Mapping) else _NAMES.get(type(value), type(value).__name__)


def _expect(holds: bool, expected: str, value: Any, place: str) -> None:
    if not holds:
        raise UsageError(f"{place}: expected {expected}, found {_kind(value)}")
