"""The command line: exit codes, where text goes, and one line for every error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import onnx
import pytest
from command import DEAD, RELU, SAMPLES, SIGMOID, environment, gradlint

from gradlint.cli import cli
from gradlint.report import FORMATS, TELL_FAULTS

HEAVY = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "numpy")


def _error(run: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error: exit 2, nothing on standard output, no traceback."""
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr.startswith("gradlint: error: ")
    assert run.stderr.count("\n") == 1
    return run.stderr


def _when_opened(folder: Path, act: str) -> dict[str, str]:
    """An environment in which a process of Python does `act` when it opens `marked.onnx`."""
    hook = (
        "import os, signal, sys\n"
        "def audit(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('marked.onnx'):\n"
        f"        {act}\n"
        "sys.addaudithook(audit)\n"
    )
    (folder / "sitecustomize.py").write_text(hook)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def _interruptible() -> None:
    """A shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fail_on", "code"),
    [(SIGMOID, "error", 1), (SIGMOID, "never", 0), (RELU, "error", 0), (DEAD, "warning", 1)],
)
def test_exit_follows_the_findings(model: str, fail_on: str, code: int) -> None:
    run = gradlint(model, "--fail-on", fail_on)
    assert run.returncode == code
    assert run.stderr == ""
    assert Path(model).name in run.stdout


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_same_exit_code(format: str) -> None:
    run = gradlint(SIGMOID, "--no-probe", "--format", format)
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.endswith("\n")


def test_check_is_the_default_command() -> None:
    assert gradlint("check", RELU, "--no-probe").stdout == gradlint("--no-probe", RELU).stdout


def test_a_closed_pipe_is_quiet() -> None:
    command = f"'{sys.executable}' -m gradlint '{SIGMOID}' --format html | head -c 20"
    run = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    assert run.stdout.endswith("\n1\n") or run.stdout.endswith("1\n")


@pytest.mark.parametrize("more", [(), ("-j", "2", RELU)])
def test_an_interrupt_exits_130_without_a_traceback(more: tuple[str, ...], tmp_path: Path) -> None:
    """The terminal's Ctrl-C goes to every process of the group; here it comes as soon as the model is opened."""
    model = tmp_path / "marked.onnx"
    shutil.copy(SAMPLES / "resnet_bn.onnx", model)
    env = _when_opened(tmp_path, "os.killpg(0, signal.SIGINT)")
    run = gradlint(model, *more, env=env, start_new_session=True, preexec_fn=_interruptible)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


# -- wrong usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "no model given"),
        ("m.onnx --fromat json", "Did you mean '--format'"),
        ("m.onnx --format jsn", "'jsn' is none of full, concise, json"),
        ("m.onnx --format jsn", "did you mean json?"),
        ("m.onnx --fail-on warn", "did you mean warning?"),
        ("m.onnx --dim batch", "'batch' is not NAME=SIZE, such as batch=4"),
        ("m.onnx --dim batch=0", "'batch=0' is not NAME=SIZE"),
        ("m.onnx --input-shape x:a,b", "such as x:1,3,224,224"),
        ("m.onnx --input-range x:1,0", "upside down"),
        ("m.onnx --input-range x:1,nan", "such as x:0,1"),
        ("m.onnx --input-stats x:1,2,3", "give all means, then as many standard deviations"),
        ("m.onnx --lr 0", "--lr"),
        ("m.onnx --at-init --trained", "exclude each other"),
        ("m.onnx --select vanishing-gradien", "did you mean vanishing-gradient"),
        ("m.onnx --rules nowhere", "nowhere is not a folder"),
        ("m.onnx --html nowhere/x.html", "there is no folder nowhere"),
        ("m.onnx", "m.onnx: no such file"),
        ("rul", "did you mean rule?"),
        ("chek m.onnx", "did you mean check?"),
        ("diff m.onnx n.onnx -o d.sarif", "d.sarif: gradlint diff doesn't write sarif: --format is one of full"),
        ("*.onnx", "no file matches"),
        (".", "is a directory without .onnx files"),
        ("rule vanishing", "did you mean vanishing-gradient"),
        ("render m.json", "m.json: can't be read"),
        ("differentiate m.onnx", "Missing option '-o'"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_to_do(arguments: str, says: str, tmp_path: Path) -> None:
    assert says in _error(gradlint(*arguments.split(), cwd=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--dim zz=3", "digits_relu.onnx: the model has no dimension 'zz' (dimensions: batch)"),
        ("--dim batsh=3", "'batsh' (dimensions: batch); did you mean batch?"),
        ("--input-shape inptu:4,64", "the model has no input 'inptu' (inputs: input); did you mean input?"),
        ("--input-range z:0,1", "the model has no input 'z'"),
        ("--input-stats z:0,1", "the model has no input 'z'"),
        ("--input z=1", "the model has no input 'z'"),
        (f"{SIGMOID} --dim zz=3", "error: no model has the dimension 'zz' (dimensions: batch)"),
        (f"{SIGMOID} --input z=3", "error: no model has the input 'z' (inputs: input)"),
    ],
)
def test_a_name_that_no_model_has_is_an_error(arguments: str, says: str) -> None:
    assert says in _error(gradlint(RELU, "--no-probe", *arguments.split()))


@pytest.mark.parametrize("command", [("diff", RELU, SIGMOID), ("baseline", RELU, "-o", "known.json")])
def test_every_command_on_models_checks_names(command: tuple[str, ...], tmp_path: Path) -> None:
    assert " dimension 'zz' (dimensions: batch)" in _error(gradlint(*command, "--dim", "zz=3", cwd=tmp_path))


def test_several_models_need_not_all_have_a_name(tmp_path: Path) -> None:
    for name in ("N", "M"):
        text = f'<ir_version: 8, opset_import: ["" : 17]> net (float[{name}, 8] x{name}) => (float[{name}, 8] y)'
        onnx.save(onnx.parser.parse_model(f"{text} {{ y = Tanh(x{name}) }}"), tmp_path / f"{name}.onnx")
    concise = ("--format", "concise", "--no-probe")
    both = gradlint("N.onnx", "M.onnx", "--dim", "N=3", "--input-range", "xM:0,1", *concise, cwd=tmp_path)
    assert (both.returncode, both.stderr) == (0, "")
    (tmp_path / "gradlint.toml").write_text("dim = { N = 3 }\n")
    # What a configuration says by name is for the models that have it.
    assert gradlint("M.onnx", *concise, cwd=tmp_path).returncode == 0
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    run = gradlint("M.onnx", "bad.onnx", "--dim", "K=3", *concise, cwd=tmp_path)
    assert run.returncode == 2
    assert [line.split(":")[0] for line in run.stdout.splitlines()] == ["M.onnx"]  # bad.onnx might have had it


def test_an_empty_name_is_no_folder(tmp_path: Path) -> None:
    assert "a model's name is empty" in _error(gradlint("", cwd=tmp_path))
    assert "a model's name is empty" in _error(gradlint(RELU, "", cwd=tmp_path))


@pytest.mark.parametrize(
    "arguments",
    ["m.onnx -o", "m.onnx --html", "nets -o", "baseline m.onnx -o", "diff m.onnx n.onnx -o", "differentiate m.onnx -o"],
)
def test_a_model_is_never_written_over(arguments: str, tmp_path: Path) -> None:
    for name in ("m.onnx", "n.onnx", "nets/m.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(RELU, tmp_path / name)
    target = "nets/../nets/m.onnx" if arguments.startswith("nets") else "./m.onnx"
    assert "it is the model itself" in _error(gradlint(*arguments.split(), target, cwd=tmp_path))
    assert (tmp_path / target).read_bytes() == Path(RELU).read_bytes()


def test_names_from_outside_reach_the_terminal_escaped(tmp_path: Path) -> None:
    name = "net\x1b[31m\u202e.onnx"
    (tmp_path / name).write_bytes(b"")
    assert "net\\x1b[31m\\u202e.onnx: the file is empty" in _error(gradlint(name, cwd=tmp_path))


def test_a_fault_of_gradlint_itself_asks_to_be_reported() -> None:
    program = "import sys\nfrom gradlint import cli, output\noutput.terminal_width = None\nsys.exit(cli.run(['rule']))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "internal error, please report it: TypeError at cli.py:" in _error(run)


# -- several models ----------------------------------------------------------------------------------------------------


def _without_timing(text: str) -> list[dict[str, object]]:
    return [{**report, "timing": None} for report in json.loads(text)]


def test_any_number_of_processes_gives_the_same_bytes() -> None:
    runs = [gradlint(SAMPLES, "-j", n, "--no-probe", "--format", "json") for n in ("1", "2")]
    assert [run.returncode for run in runs] == [1, 1]
    one, two = (_without_timing(run.stdout) for run in runs)
    assert one == two
    paths = [report["model"]["path"] for report in one]  # type: ignore[index]
    assert paths == sorted(paths)
    assert len(paths) == len(list(SAMPLES.glob("*.onnx")))


def test_one_bad_model_does_not_take_the_others_along(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08")
    run = gradlint(SIGMOID, bad, RELU, "--format", "json", "--no-probe", "-o", tmp_path / "out.json")
    assert _error(run).startswith(f"gradlint: error: {bad}: ")
    reports = json.loads((tmp_path / "out.json").read_text())
    assert [report["model"]["path"] for report in reports] == [SIGMOID, RELU]


@pytest.mark.parametrize("format", sorted(TELL_FAULTS))
def test_a_bad_model_is_told_in_the_file_that_ci_reads(format: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    run = gradlint("bad.onnx", "--format", format, "--no-probe", "-o", "out", cwd=tmp_path)
    assert _error(run).startswith("gradlint: error: bad.onnx: ")
    assert run.stderr.removeprefix("gradlint: error: ").strip() in (tmp_path / "out").read_text()


def test_a_bad_model_is_told_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    run = gradlint("bad.onnx", SIGMOID, "--format", "junit", "--no-probe", "-o", "out", cwd=tmp_path)
    assert run.stderr.removeprefix("gradlint: error: ").strip() in (tmp_path / "out").read_text()
    assert "digits_sigmoid.onnx" in (tmp_path / "out").read_text()


def test_json_is_a_list_whenever_several_models_were_asked_for(tmp_path: Path) -> None:
    run = gradlint(RELU, tmp_path / "missing.onnx", "--format", "json", "--no-probe")
    assert run.returncode == 2
    assert [report["model"]["path"] for report in json.loads(run.stdout)] == [RELU]


def test_folders_and_quoted_globs_stand_for_the_models_inside(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.onnx", "a.onnx", "deep/c.onnx"):
        (tmp_path / name).write_bytes(Path(RELU).read_bytes())
    concise = ("--no-probe", "--format", "concise")
    listed = gradlint(".", *concise, cwd=tmp_path).stdout
    assert [line.split(":")[0] for line in listed.splitlines()] == ["a.onnx", "b.onnx", "deep/c.onnx"]
    assert gradlint("*.onnx", "deep/c.onnx", *concise, cwd=tmp_path).stdout == listed


def test_a_model_that_takes_too_long_is_given_up_alone() -> None:
    run = gradlint(SIGMOID, RELU, "--timeout", "0.001")
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"gradlint: error: {path}: not done after 0.001 s (--timeout), given up" for path in (SIGMOID, RELU)
    ]


def test_a_killed_worker_is_an_error_of_its_model(tmp_path: Path) -> None:
    model = tmp_path / "marked.onnx"
    shutil.copy(RELU, model)
    env = _when_opened(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    run = gradlint(model, RELU, "--no-probe", "--format", "concise", env=env)
    assert run.returncode == 2
    assert "marked.onnx: the process that checked it was killed by SIGKILL" in run.stderr
    assert "digits_relu.onnx: pass" in run.stdout


# -- where text goes ---------------------------------------------------------------------------------------------------


def test_several_outputs_in_one_run(tmp_path: Path) -> None:
    names = {kind: tmp_path / f"report.{kind}" for kind in ("html", "json", "sarif")}
    run = gradlint(SIGMOID, *(part for kind, path in names.items() for part in (f"--{kind}", path)))
    assert run.stdout.startswith("FAIL")
    assert names["html"].read_text().startswith("<!DOCTYPE html>")
    assert json.loads(names["json"].read_text())["schema"] == "gradlint-report/1"
    assert json.loads(names["sarif"].read_text())["version"] == "2.1.0"
    assert sorted(tmp_path.iterdir()) == sorted(names.values())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    assert "No space left" in _error(gradlint(RELU, "--no-probe", "-o", "/dev/full"))
    with open("/dev/full", "w") as full:
        for arguments in ((RELU, "--no-probe"), ("check", "--help")):
            run = gradlint(*arguments, stdout=full)
            assert (run.returncode, run.stderr.count("\n")) == (2, 1)
            assert "can't write to standard output: No space left" in run.stderr
    (tmp_path / "report.json").mkdir()
    assert "it is a folder" in _error(gradlint(RELU, "-o", tmp_path / "report.json"))
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


@pytest.mark.parametrize("arguments", ["--format json -o", "--html", "--json", "--sarif"])
def test_what_a_disk_has_no_room_for_leaves_the_old_report(arguments: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle."""
    target = tmp_path / "report"
    target.write_text("old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    run = gradlint(SIGMOID, "--no-probe", *arguments.split(), target, preexec_fn=limit)
    assert run.returncode == 2
    assert run.stderr == f"gradlint: error: can't write {target}: File too large\n"
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("command", ["check --format json", "baseline"])
def test_a_folder_that_takes_no_files_is_one_clear_line(command: str) -> None:
    """/proc takes none from anyone, root included."""
    error = _error(gradlint(*command.split(), RELU, "--no-probe", "-o", "/proc/report.json"))
    assert error.startswith("gradlint: error: can't write /proc/report.json: ")


def test_colour_only_on_terminals_or_by_force() -> None:
    assert "\x1b" not in gradlint(SIGMOID, "--no-probe").stdout
    assert "\x1b[" in gradlint(SIGMOID, "--no-probe", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b" not in gradlint(SIGMOID, "--no-probe", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout


def test_lines_fit_80_columns_where_there_is_no_terminal() -> None:
    run = gradlint(SIGMOID, env={"COLUMNS": "200"}, cwd=SAMPLES)
    assert max(len(line) for line in run.stdout.splitlines()) <= 80


def test_the_job_summary_of_a_workflow_is_appended_to(tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    run = gradlint(SIGMOID, "--format", "github", env={"GITHUB_STEP_SUMMARY": str(summary)})
    assert run.stdout.startswith("::error ")
    assert summary.read_text().startswith("before\n### ")


def test_settings_come_from_the_environment() -> None:
    options = {"FORMAT": "concise", "FAIL_ON": "never", "NO_PROBE": "1", "SELECT": "GL2"}
    run = gradlint(SIGMOID, env={f"GRADLINT_{name}": value for name, value in options.items()})
    assert run.returncode == 0
    findings = run.stdout.splitlines()[:-1]
    assert findings
    assert {line.split()[3] for line in findings} <= {"GL201", "GL203", "GL204", "GL207"}


# What a variable may hold, and what it comes to where that is not the same; lists are separated by spaces.
_VARIABLES: dict[str, tuple[str, object]] = {
    "input": ("a=2 b=3", {"a": 2.0, "b": 3.0}),
    "dim": ("n=3 m=4", {"n": 3, "m": 4}),
    "input_shape": ("a:1,2 b:3", {"a": [1, 2], "b": [3]}),
    "input_range": ("a:0,1", {"a": [0.0, 1.0]}),
    "input_stats": ("a:0,1", {"a": [0.0, 1.0]}),
    "select": ("GL1,GL2 GL3", ["GL1", "GL2", "GL3"]),
    "ignore": ("GL3 GL4", ["GL3", "GL4"]),
    "extend_select": ("GL801", ["GL801"]),
    "rules": ("one two", ["one", "two"]),
    "config": ("fail-on=warning gradlint.toml", ("fail-on=warning", "gradlint.toml")),
    "loss": ("mse", "mse"),
    "mode": ("eval", "eval"),
    "optimizer": ("adam", "adam"),
    "format": ("junit", "junit"),
    "fail_on": ("never", "never"),
    "jobs": ("3", 3),
}


@pytest.mark.parametrize(
    "option", [param for param in cli.commands["check"].params if param.param_type_name == "option"]
)
def test_every_option_is_an_environment_variable(option: click.Option, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = _VARIABLES.get(str(option.name), ("1", None))
    monkeypatch.setenv(f"GRADLINT_{str(option.name).upper()}", text)
    params = cli.commands["check"].make_context("check", ["net.onnx"]).params
    assert params[str(option.name)] == (option.type.convert("1", option, None) if value is None else value)
    assert params[str(option.name)] != option.get_default(click.Context(cli))


def test_a_variable_for_check_says_nothing_of_what_other_commands_write(tmp_path: Path) -> None:
    env = {"GRADLINT_FORMAT": "sarif", "GRADLINT_OUTPUT": "report.sarif", "GRADLINT_NO_PROBE": "1"}
    run = gradlint("diff", RELU, RELU, env=env, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(RELU)
    assert "Missing option" in _error(gradlint("differentiate", RELU, env=env, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
    own = {"GRADLINT_DIFF_FORMAT": "json", "GRADLINT_DIFF_MAX_LOSS": "1", "GRADLINT_NO_PROBE": "1"}
    run = gradlint("diff", RELU, SIGMOID, env=own)
    assert run.returncode == 1
    assert json.loads(run.stdout)
    assert gradlint("ops", env={"GRADLINT_VERSION": "0.1.0"}).stdout.startswith("operator")


# -- the other commands ------------------------------------------------------------------------------------------------


def test_it_starts_without_the_heavy_libraries() -> None:
    program = (
        "import sys\nfrom gradlint.cli import run\nfor arguments in (['--help'], ['check', '--help'], ['--version'], "
        "['rule', 'GL201'], ['facts']):\n    assert run(arguments) == 0\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment()
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "vanishing-gradient (GL201" in run.stdout


def test_help_names_every_command() -> None:
    shown = gradlint("--help").stdout
    assert all(f"  {name} " in shown for name in cli.commands)


def test_rule_explains_lists_and_prints_all() -> None:
    listed = gradlint("rule").stdout.splitlines()
    assert any(line.startswith("GL201  vanishing-gradient") for line in listed)
    pages = gradlint("rule", "--all").stdout
    assert all(line.split()[1] in pages for line in listed)


def test_ops_is_printed_from_the_tables() -> None:
    from gradlint.transfer import BLOCKED, TABLES

    lines = {line.split()[0]: line.split()[1:] for line in gradlint("ops").stdout.splitlines() if line}
    assert lines["operator"] == list(TABLES)
    for name in {name for table in TABLES.values() for name in table}:
        for cell, (title, table) in zip(lines[name], TABLES.items(), strict=True):
            blocked = name in BLOCKED and title in ("pullback", "bound", "vjp")
            assert cell == ("none" if blocked else "yes" if name in table else "-")


def test_facts_are_all_listed() -> None:
    from gradlint.fact_table import FACTS

    lines = gradlint("facts").stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(FACTS)


def test_render_turns_a_stored_report_into_the_same_text(tmp_path: Path) -> None:
    stored = tmp_path / "report.json"
    direct = gradlint(SIGMOID, "--json", stored)
    assert gradlint("render", stored).stdout == direct.stdout
    assert gradlint("render", stored, "--format", "json").stdout == stored.read_text()
    stored.write_text('{"schema": "other"}')
    assert "schema is 'other'" in _error(gradlint("render", stored))


def test_differentiate_writes_a_valid_model(tmp_path: Path) -> None:
    out = tmp_path / "backward.onnx"
    name = onnx.load(RELU).graph.input[0].name
    assert gradlint("differentiate", RELU, "-o", out, "--wrt", name).returncode == 0
    onnx.checker.check_model(str(out), full_check=True)
    model = onnx.load(out)
    assert [value.name for value in model.graph.output][-1] == f"{name}.grad"
    assert "did you mean" in _error(gradlint("differentiate", RELU, "-o", out, "--wrt", "layers.0.linear.weigt"))
    assert "it is the model itself" in _error(gradlint("differentiate", out, "-o", out))


def test_differentiate_keeps_external_data_external(tmp_path: Path) -> None:
    model, out = tmp_path / "net.onnx", tmp_path / "other" / "backward.onnx"
    onnx.save_model(
        onnx.load(RELU),
        model,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    out.parent.mkdir()
    run = gradlint("differentiate", model, "-o", out)
    assert (run.returncode, run.stdout) == (0, "")
    onnx.checker.check_model(str(out))
    assert (out.parent / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    assert out.stat().st_size < (tmp_path / "weights.bin").stat().st_size


def test_diff_fails_on_what_is_new(tmp_path: Path) -> None:
    base, head = tmp_path / "base.json", tmp_path / "head.json"
    gradlint(RELU, "--no-probe", "--json", base)
    gradlint(SIGMOID, "--no-probe", "--json", head)
    run = gradlint("diff", base, head)
    assert run.returncode == 1
    assert "+ error GL201 vanishing-gradient at layers.0.linear" in run.stdout
    assert gradlint("diff", head, base).returncode == 0
    assert gradlint("diff", base, RELU, "--no-probe").returncode == 0
    assert gradlint("diff", base, head, "--fail-on", "never", "--max-loss", "1").returncode == 1
    assert json.loads(gradlint("diff", base, head, "--format", "json").stdout)["models"][0]["gone"] == []
    page = gradlint("diff", base, head, "--format", "markdown", "--html", tmp_path / "page.html").stdout
    assert "GL201" in page
    assert "GL201" in (tmp_path / "page.html").read_text()


def test_what_few_models_need_is_not_imported() -> None:
    """onnx_ir calculates symbolic sizes with sympy, which takes longer to import than a small model to check."""
    model = SAMPLES / "resnet_bn.onnx"
    command = [sys.executable, "-X", "importtime", "-m", "gradlint", str(model), "--fail-on", "never"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert "onnx_ir._core" in done.stderr
    assert "sympy.core" not in done.stderr
