"""The command line's options, and how they and a configuration file become the settings of a run.

Settings are plain data by the configuration's keys. The command line wins over `GRADLINT_*` variables, those over the
configuration file, that over the defaults here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from gradlint.exceptions import UsageError
from gradlint.options import Loss, Mode, Options
from gradlint.report import FORMATS

Command = TypeVar("Command", bound=Callable[..., Any])
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Word(click.Choice[str]):
    """One of a few words; a misspelt one is told its neighbours."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.choices:
            return str(value)
        # Imported here: an error is the only thing that needs it.
        from gradlint.condition import near

        raise click.BadParameter(f"{value!r} is none of {', '.join(self.choices)}{near(str(value), self.choices)}")


def _words(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[str] | None:
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    return words or None


def _pairs(separator: str, hint: str, read: Callable[[str], Any]) -> Callable[..., dict[str, Any] | None]:
    """A callback that turns `name<separator>value` texts into a dict; names may hold the separator themselves."""

    def convert(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, Any] | None:
        table = {}
        for text in values:
            name, found, value = text.rpartition(separator)
            try:
                if not found or not name:
                    raise ValueError
                table[name] = read(value)
            except ValueError:
                raise click.BadParameter(f"{text!r} is not {hint}") from None
        return table or None

    return convert


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _numbers(text: str) -> list[float]:
    return [_number(part) for part in text.split(",")]


def _range(text: str) -> list[float]:
    low, high = _numbers(text)
    return [low, high]


def _size(text: str) -> int:
    size = int(text)
    if size < 1:
        raise ValueError
    return size


def _shape(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if any(size < 0 for size in sizes):
        raise ValueError
    return sizes


_POSITIVE = click.FloatRange(min=0, min_open=True)


def _option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option of `check`, wherever else it is: the variable GRADLINT_<NAME> on all commands alike.

    What a command has for itself is GRADLINT_<COMMAND>_<NAME>, by click's convention: no variable that is meant for
    `check` names the file that `differentiate` writes.
    """
    name = next(name for name in names if name.startswith("--"))
    return click.option(*names, envvar=f"GRADLINT_{name.removeprefix('--').replace('-', '_').upper()}", **settings)


_CONFIGURATION = (
    _option("--config", multiple=True, metavar="FILE|KEY=VALUE", help="A configuration file, or one setting of it."),
    _option("--isolated", is_flag=True, help="Read no configuration file."),
)

_RULES = _option(
    "--rules",
    multiple=True,
    metavar="DIR",
    callback=lambda ctx, param, values: list(values) or None,
    help="A folder with rule pages of your own.",
)

_ANALYSIS = (
    _option("--data", metavar="FILE", help="Examples for the probe: .npz, .npy, a folder of .npy or of .pb."),
    _option("--input", multiple=True, metavar="NAME=VALUE", help="Fill an input with a number.",
            callback=_pairs("=", "NAME=NUMBER", _number)),
    _option("--loss", type=Word(get_args(Loss)), default="linear", show_default=True,
            help="linear needs no targets; the others take them from the data."),
    _option("--mode", type=Word(get_args(Mode)), default="train", show_default=True,
            help="BatchNormalization as in training, or by its running statistics."),
    _option("--no-probe", is_flag=True, help="Estimate only: don't run the backward model."),
    _option("--at-init", is_flag=True, help="The weights are untrained (guessed by default)."),
    _option("--trained", is_flag=True, help="The weights are trained (guessed by default)."),
    _option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
            help="Of the data and targets that are drawn."),
    _option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
            help="Examples in a synthetic batch."),
    _option("--threads", type=click.IntRange(min=0), default=0, metavar="N",
            help="Threads of the probe (one per core; several models: 1)."),
    _option("--dim", multiple=True, metavar="NAME=N", help="Size of a symbolic dimension; give --dim once for each.",
            callback=_pairs("=", "NAME=SIZE, such as batch=4", _size)),
    _option("--input-shape", multiple=True, metavar="NAME:N,N,...", help="Shape of an input.",
            callback=_pairs(":", "NAME:SIZES, such as x:1,3,224,224", _shape)),
    _option("--input-range", multiple=True, metavar="NAME:LOW,HIGH", help="Range of an input.",
            callback=_pairs(":", "NAME:LOW,HIGH, such as x:0,1", _range)),
    _option("--input-stats", multiple=True, metavar="NAME:MEAN,STD",
            help="Mean and standard deviation of an input; or all its channels' means, then their deviations.",
            callback=_pairs(":", "NAME:MEAN,STD, such as x:0,1", _numbers)),
    _option("--optimizer", type=Word(("sgd", "adam")), help="The optimizer the advice is for."),
    _option("--lr", type=_POSITIVE, metavar="X", help="The learning rate of the training to come."),
    _option("--source-root", metavar="DIR",
            help="The folder that holds the Python sources of the models (default: the current one)."),
    _option("--select", multiple=True, metavar="RULES", callback=_words,
            help="Rules to run: names, codes or beginnings of codes, comma-separated (default: all stable ones)."),
    _option("--ignore", multiple=True, metavar="RULES", callback=_words, help="Rules not to run."),
    _option("--extend-select", multiple=True, metavar="RULES", callback=_words, help="Rules to run as well."),
    _option("--preview", is_flag=True, help="Run the rules in preview too."),
    _RULES,
    _option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
            help="Models checked at the same time."),
    _option("--timeout", type=_POSITIVE, metavar="S", help="Seconds after which a model is given up."),
)  # fmt: skip

_VERDICT = (
    _option("--fail-on", type=Word(("error", "warning", "never")), default="error", show_default=True,
            help="The level from which a finding makes the exit code 1."),
)  # fmt: skip

_FORMAT = _option("--format", type=Word(tuple(FORMATS)), default="full", show_default=True, help="Form of the report.")

_OUTPUT = (
    _FORMAT,
    _option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the report to FILE instead of standard output; .html, .json, .sarif and .md are formats.",
    ),
    _option("--html", metavar="FILE", help="Write the page, with pictures of each layer, as well."),
    _option("--json", metavar="FILE", help="Write JSON as well."),
    _option("--sarif", metavar="FILE", help="Write SARIF as well."),
)

_BASELINE = (
    _option("--baseline", metavar="FILE", help="Known findings, which are not reported."),
    _option("--strict-baseline", is_flag=True,
            help="Exit code 1 when an entry of the baseline no longer occurs."),
)  # fmt: skip


def configuration_options(command: Command) -> Command:
    return _apply(command, _CONFIGURATION)


def analysis_options(command: Command) -> Command:
    return _apply(command, (*_ANALYSIS, *_CONFIGURATION))


def verdict_options(command: Command) -> Command:
    return _apply(command, _VERDICT)


def rules_option(command: Command) -> Command:
    return _RULES(command)


def format_option(command: Command) -> Command:
    return _FORMAT(command)


def output_options(command: Command) -> Command:
    return _apply(command, _OUTPUT)


def baseline_options(command: Command) -> Command:
    return _apply(command, _BASELINE)


def _apply(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def effective(ctx: click.Context, configured: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in force for this command, by configuration key. Raises UsageError for --at-init with --trained."""
    settings: dict[str, Any] = {}
    for name, value in ctx.params.items():
        key = name.replace("_", "-")
        chosen = ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
        settings[key] = value if chosen or key not in configured else configured[key]
    if ctx.get_parameter_source("format") is ParameterSource.DEFAULT and "format" not in configured:
        settings["format"] = _format_by_name(ctx, settings.get("output")) or settings["format"]
    if settings.pop("at-init", False):
        if settings.get("trained"):
            raise UsageError("--at-init and --trained exclude each other: give one of them")
        settings["stage"] = "init"
    elif settings.get("trained"):
        settings["stage"] = "trained"
    settings.pop("trained", None)
    settings["probe"] = not settings.pop("no-probe", False) and configured.get("probe", True)
    return {**configured, **settings}


_FORMATS_BY_NAME = {".html": "html", ".json": "json", ".sarif": "sarif", ".md": "markdown"}


def _format_by_name(ctx: click.Context, file: str | None) -> str | None:
    """The format that an output file's name asks for, where no --format is given. UsageError: the command has none."""
    name = _FORMATS_BY_NAME.get(Path(file).suffix.lower()) if file else None
    kinds = next(param.type for param in ctx.command.params if param.name == "format")
    if name and isinstance(kinds, Word) and name not in kinds.choices:
        raise UsageError(
            f"{file}: {ctx.command_path} doesn't write {name}: --format is one of {', '.join(kinds.choices)}"
        )
    return name


# What is said of inputs and dimensions by their name, and the field of Options that holds it.
BY_NAME = {"dim": "dims", "input": "values", "input-shape": "shapes", "input-range": "ranges", "input-stats": "stats"}


def to_options(settings: Mapping[str, Any]) -> Options:
    """The analysis's part of the settings."""
    data, root, select = settings.get("data"), settings.get("source-root"), settings.get("select")
    return Options(
        data=Path(data) if data else None,
        values=settings.get("input") or {},
        loss=settings["loss"],
        mode=settings["mode"],
        probe=settings["probe"],
        stage=settings.get("stage"),
        seed=settings["seed"],
        batch=settings["batch"],
        threads=settings["threads"],
        dims=settings.get("dim") or {},
        shapes={name: tuple(sizes) for name, sizes in (settings.get("input-shape") or {}).items()},
        ranges={name: _bounds(name, values) for name, values in (settings.get("input-range") or {}).items()},
        stats={name: _moments(name, values) for name, values in (settings.get("input-stats") or {}).items()},
        optimizer=settings.get("optimizer"),
        lr=settings.get("lr"),
        source_root=Path(root) if root else None,
        select=None if select is None else tuple(select),
        ignore=tuple(settings.get("ignore") or ()),
        extend_select=tuple(settings.get("extend-select") or ()),
        preview=settings["preview"],
        rules=tuple(Path(folder) for folder in settings.get("rules") or ()),
        levels=settings.get("levels") or {},
        limits=settings.get("limits") or {},
        layer_ignores={glob: tuple(some) for glob, some in (settings.get("per-layer-ignores") or {}).items()},
    )


def _bounds(name: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    if low > high:
        raise UsageError(f"input-range of {name!r}: {low:g} to {high:g} is upside down: give the lower end first")
    return low, high


def _moments(name: str, values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    half = len(values) // 2
    means, deviations = tuple(values[:half]), tuple(values[half:])
    if len(means) != len(deviations) or any(deviation < 0 for deviation in deviations):
        raise UsageError(f"input-stats of {name!r}: give all means, then as many standard deviations, none negative")
    return means, deviations
