"""The command line: `gradlint MODEL...` and its other commands.

Exit codes: 0 nothing found at or above --fail-on, 1 something, 2 wrong usage, an unreadable model or an internal error,
130 interrupted. What a command doesn't need isn't imported, so that it starts at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlint import flags, output, startup
from gradlint.batch import check_models, find_models, guarded
from gradlint.exceptions import UsageError
from gradlint.options import Options, Task
from gradlint.report import TELL_FAULTS, render
from gradlint.results import LEVELS, Fault, Finding, Report

if TYPE_CHECKING:
    from gradlint.baseline import Entry
    from gradlint.config import Config
    from gradlint.rulebook import Rule

_INTERRUPTED = 130


class _Commands(click.Group):
    """A group whose command `check` needn't be named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            raise UsageError("no model given: gradlint MODEL.onnx, or see gradlint --help")
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args[0] not in self.commands and args[0] not in own:
            args = ["check", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Commands,
    context_settings=flags.CONTEXT | {"auto_envvar_prefix": "GRADLINT"},
    epilog="`gradlint MODEL...` is `gradlint check MODEL...`.",
)
@click.version_option(
    package_name="gradlint-onnx",
    prog_name="gradlint",
    message="%(prog)s %(version)s",
    # What a pipeline calls GRADLINT_VERSION says which one to install.
    allow_from_autoenv=False,
)
def cli() -> None:
    """Say which layers of an exported ONNX model will not learn, why, and what to change.

    Every option is also an environment variable: --fail-on is GRADLINT_FAIL_ON. Those of one command alone carry its
    name: --max-loss is GRADLINT_DIFF_MAX_LOSS.
    """


@cli.command(context_settings=flags.CONTEXT)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@flags.output_options
@flags.verdict_options
@flags.analysis_options
@flags.baseline_options
@click.pass_context
def check(ctx: click.Context, models: Sequence[str], **_: Any) -> int:
    """Check models: files, folders, or quoted globs.

    Exit code: 0 nothing found at or above --fail-on, 1 something, 2 an error, 130 interrupted.
    """
    config, settings = _settings(ctx, models)
    files = {kind: settings[kind] for kind in ("html", "json", "sarif") if settings[kind]}
    paths = _models(models)
    for target in filter(None, (settings["output"], *files.values())):
        output.check_target(target, paths)
    wants_page = "html" in files or settings["format"] == "html"
    known = settings.get("baseline")
    rules = _rules_checked(flags.to_options(settings), config, paths, known is not None)
    tasks = _tasks(paths, config, settings, pictures=wants_page)
    reports, faults = _check(tasks, settings)
    stale: list[tuple[Report, Entry]] = []
    if known:
        reports, stale = _hide(reports, known, rules)
    several = len(paths) > 1
    if reports or settings["format"] in TELL_FAULTS:
        _write(reports, several, settings["format"], settings["output"], faults)
    for kind, target in files.items():
        if reports or kind in TELL_FAULTS:
            output.write_file(target, _text(reports, several, kind, faults=faults))
    if settings["format"] == "github":
        output.add_step_summary(render(reports, "markdown", faults=faults))
    for report, entry in stale:
        output.tell("baseline", f"{report.model.path}: no longer occurs: {entry.describe()}")
    if faults:
        return 2
    found = _fails((f for report in reports for f in report.findings), settings["fail-on"])
    return int(found or bool(stale and settings["strict-baseline"]))


@cli.command(context_settings=flags.CONTEXT)
@click.argument("base")
@click.argument("head")
@click.option("--format", type=flags.Word(("full", "json", "markdown", "html")), default="full", show_default=True)
@click.option("-o", "--output", metavar="FILE", help="Write to FILE instead of standard output.")
@click.option("--html", metavar="FILE", help="Write the page as well.")
@click.option("--max-loss", type=click.FloatRange(min=0), metavar="DECADES", help="Exit code 1 if a layer lost more.")
@flags.verdict_options
@flags.analysis_options
@click.pass_context
def diff(ctx: click.Context, base: str, head: str, max_loss: float | None, **_: Any) -> int:
    """Compare two models, or reports of --format json. Of two models it also says how far each weight moved.

    Exit code 1: new findings at or above --fail-on, or a layer's gradient lost more decades than --max-loss.
    """
    from gradlint.compare import compare_all, read_reports
    from gradlint.report.difference import render_difference

    config, settings = _settings(ctx, [side for side in (base, head) if not side.endswith(".json")])
    target, page = ctx.params["output"], ctx.params["html"]
    for file in filter(None, (target, page)):
        output.check_target(file, (base, head))
    sides: list[list[Report]] = []
    paths = {side: _models([side]) for side in (base, head) if not side.endswith(".json")}
    tasks = _tasks(list(dict.fromkeys(path for some in paths.values() for path in some)), config, settings)
    for side in (base, head):
        if side not in paths:
            sides.append(read_reports(side))
            continue
        reports, faults = _check([task for task in tasks if task[0] in paths[side]], settings)
        if faults:
            return 2
        sides.append(reports)
    differences = compare_all(*sides)
    if {base, head} == paths.keys():
        from gradlint.movement import movements

        differences = [replace(d, moves=movements(d.base, d.head)) if d.base else d for d in differences]
    _put(render_difference(differences, settings["format"]), target)
    if page:
        output.write_file(page, render_difference(differences, "html"))
    worse = _fails((f for item in differences for f in item.new), settings["fail-on"])
    lost = max_loss is not None and any(s.change < -max_loss for item in differences for s in item.shifts)
    return int(worse or lost)


@cli.command(context_settings=flags.CONTEXT)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("-o", "--output", metavar="FILE", required=True, help="The baseline's file.")
@flags.analysis_options
@click.pass_context
def baseline(ctx: click.Context, models: Sequence[str], **_: Any) -> int:
    """Write a file of known findings for --baseline."""
    from gradlint.baseline import to_baseline

    config, settings = _settings(ctx, models)
    target, paths = ctx.params["output"], _models(models)
    output.check_target(target, paths)
    reports, faults = _check(_tasks(paths, config, settings), settings)
    if faults:
        return 2
    output.write_file(target, to_baseline(reports, Path(target).parent))
    return 0


@cli.command("render", context_settings=flags.CONTEXT)
@click.argument("report")
@flags.output_options
@click.pass_context
def render_command(ctx: click.Context, report: str, **_: Any) -> int:
    """Write a report of --format json in another format."""
    from gradlint.compare import read_reports

    params = flags.effective(ctx, {})
    reports = read_reports(report)
    several = len(reports) != 1
    _write(reports, several, params["format"], params["output"])
    for kind in ("html", "json", "sarif"):
        if params[kind]:
            output.write_file(params[kind], _text(reports, several, kind))
    return 0


@cli.command(context_settings=flags.CONTEXT)
@click.argument("model")
@click.option("-o", "--output", metavar="FILE", required=True, help="The backward model's file.")
@click.option("--wrt", multiple=True, metavar="NAME", help="An input, weight or value (default: inputs and weights).")
def differentiate(model: str, output: str, wrt: Sequence[str]) -> int:
    """Write an ONNX model that computes gradients.

    The inputs of this backward model are those of MODEL and OUTPUT.cotangent for each float output; its outputs are
    those of MODEL and NAME.grad.
    """
    from gradlint.external import write_beside

    write_beside(model, list(wrt) or None, output)
    return 0


@cli.command(context_settings=flags.CONTEXT)
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Every rule's page.")
@flags.rules_option
@flags.configuration_options
@click.pass_context
def rule(ctx: click.Context, name: str | None, everything: bool, **_: Any) -> int:
    """Explain a rule; without a name, list all."""
    from gradlint import listing
    from gradlint.rulebook import configured_rules, explain

    settings = _settings(ctx, ())[1]
    folders = [Path(folder) for folder in settings.get("rules") or ()]
    book = configured_rules(folders, settings.get("levels") or {}, settings.get("limits") or {})
    width = min(output.terminal_width(), 100)
    if name is not None:
        output.emit(explain(book.find(name), width))
    elif everything:
        output.emit("\n\n".join(explain(item, width) for item in book.rules))
    else:
        output.emit(listing.rules(book.rules))
    return 0


@cli.command(context_settings=flags.CONTEXT)
def ops() -> int:
    """List the operators and their analyses."""
    from gradlint import listing

    output.emit(listing.operators())
    return 0


@cli.command(context_settings=flags.CONTEXT)
def facts() -> int:
    """List the facts that rules may use."""
    from gradlint import listing

    output.emit(listing.facts(min(output.terminal_width(), 100)))
    return 0


@cli.command("config", context_settings=flags.CONTEXT)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@flags.verdict_options
@flags.analysis_options
@flags.baseline_options
@flags.format_option
@click.pass_context
def config_command(ctx: click.Context, models: Sequence[str], **_: Any) -> int:
    """Print the settings in force as TOML.

    They come from the defaults, the configuration file, the environment and the options, the last ones winning.
    """
    from gradlint.config import schema, to_toml

    config, settings = _settings(ctx, models)
    shown = {key: settings[key] for key in schema()["properties"] if key in settings}
    origin = f"# from {config.file}\n" if config.file else "# no configuration file\n"
    output.emit(origin + to_toml(shown))
    return 0


def main() -> None:
    """The `gradlint` command."""
    startup.begin()
    startup.end(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    try:
        outcome = guarded(lambda: _invoke(list(arguments)))
    except KeyboardInterrupt:
        return _INTERRUPTED
    if isinstance(outcome, Fault):
        output.tell("error", outcome.message)
        return 2
    return outcome


def _invoke(arguments: list[str]) -> int:
    try:
        with cli.make_context("gradlint", arguments) as ctx:
            return int(cli.invoke(ctx) or 0)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        command = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        message = " ".join(error.format_message().split())
        raise UsageError(f"{message.rstrip('.')}; see {command}" if command else message) from None
    except BrokenPipeError:
        output.mute()
        return 0
    except OSError as error:
        # Help is written by click.
        if error.errno != errno.ENOSPC:
            raise
        output.mute()
        raise UsageError(f"can't write to standard output: {error.strerror}") from None


def _settings(ctx: click.Context, models: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    from gradlint.config import load_config

    start = Path(models[0]).absolute().parent if models else None
    config = load_config(ctx.params["config"], start=start, isolated=ctx.params["isolated"])
    return config, flags.effective(ctx, config.settings)


def _models(given: Sequence[str]) -> list[str]:
    if not (os.path.exists(given[0]) or Path(given[0]).suffix):
        # Imported here: an error is the only thing that needs it.
        from gradlint.condition import near

        if hint := near(given[0], cli.commands):
            raise UsageError(f"{given[0]}: no such file or command{hint}")
    return find_models(given)


def _rules_checked(options: Options, config: Config, paths: Sequence[str], wanted: bool) -> list[Rule]:
    """The rules that will run, where anything about them was said: a wrong name is told before the work."""
    per_model = {selector for path in paths for selector in config.model_ignores(path)}
    spoken = (options.select, options.ignore, options.extend_select, options.rules, options.levels, options.limits)
    if not (wanted or per_model or options.layer_ignores or any(spoken)):
        return []
    from gradlint.judge import check_selectors, chosen
    from gradlint.rulebook import configured_rules

    book = configured_rules(options.rules, options.levels, options.limits)
    check_selectors(book, [*per_model, *(s for some in options.layer_ignores.values() for s in some)])
    return chosen(
        book,
        preview=options.preview,
        select=options.select,
        ignore=options.ignore,
        extend_select=options.extend_select,
    )


def _tasks(paths: Sequence[str], config: Config, settings: dict[str, Any], *, pictures: bool = False) -> list[Task]:
    """The models with their options. What a configuration says by name is for those models that have the name."""
    options = replace(flags.to_options(settings), pictures=pictures)
    tasks = [(path, replace(options, ignore=(*options.ignore, *config.model_ignores(path)))) for path in paths]
    named = {key: table for key, table in flags.BY_NAME.items() if settings.get(key)}
    configured = {table for key, table in named.items() if settings[key] is config.settings.get(key)}
    if not named or (len(tasks) == 1 and not configured):
        return tasks  # a name that is wrong is told when the model is read
    from gradlint.naming import shared

    return shared(tasks, lenient=configured)


def _check(tasks: Sequence[Task], settings: dict[str, Any]) -> tuple[list[Report], list[Fault]]:
    """Check the models; the faults are told on standard error."""
    with output.progress(len(tasks)) as watch:
        outcomes = check_models(tasks, jobs=settings["jobs"], timeout=settings["timeout"], watch=watch)
    faults = [outcome for outcome in outcomes if isinstance(outcome, Fault)]
    for fault in faults:
        output.tell("error", fault.message)
    return [outcome for outcome in outcomes if isinstance(outcome, Report)], faults


def _hide(
    reports: Sequence[Report], path: str, rules: Sequence[Rule]
) -> tuple[list[Report], list[tuple[Report, Entry]]]:
    from gradlint.baseline import hide_known, read_baseline

    known = read_baseline(path)
    names = {item.name for item in rules}
    pairs = [hide_known(report, known, names) for report in reports]
    return [report for report, _ in pairs], [(report, entry) for report, stale in pairs for entry in stale]


def _fails(findings: Any, fail_on: str) -> bool:
    if fail_on == "never":
        return False
    failing = LEVELS[: LEVELS.index(fail_on) + 1]
    some: list[Finding] = list(findings)
    return any(finding.level in failing for finding in some)


def _text(reports: Sequence[Report], several: bool, format: str, **options: Any) -> str:
    if format == "json" and several:
        from gradlint.report.as_json import render_list

        return render_list(reports)
    return render(reports, format, **options)


def _write(
    reports: Sequence[Report], several: bool, format: str, target: str | None, faults: Sequence[Fault] = ()
) -> None:
    screen = {} if target else {"color": output.use_color(), "width": output.terminal_width()}
    _put(_text(reports, several, format, faults=faults, **screen), target)


def _put(text: str, target: str | None) -> None:
    if target:
        output.write_file(target, text)
    else:
        output.emit(text)
