"""The package as a whole: what the wheel holds, who imports whom, and what is ready for other tools."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from command import ROOT, SAMPLES, environment

from gradlint.rulebook import load_rules

PACKAGE = ROOT / "gradlint"
PAGES = sorted(path.name for path in (ROOT / "rules").glob("*.md"))
_NOT_OURS = shutil.ignore_patterns(
    ".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", ".venv"
)


# -- the wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=_NOT_OURS)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(command, cwd=folder / "tree", check=True, capture_output=True, env=environment())
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_rule_and_data_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(PAGES) >= 40
    assert sorted(Path(name).name for name in names if fnmatchcase(name, "gradlint/rules/*.md")) == PAGES
    packaged = {name for name in names if name.startswith("gradlint/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == wanted | {f"gradlint/rules/{name}" for name in (*PAGES, "__init__.py")}


def test_the_wheel_works_where_there_is_no_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys, gradlint, gradlint.rules; from gradlint.cli import run\n"
        "print(gradlint.__file__); print(gradlint.rules.__file__)\n"
        "sys.exit(run(['rule']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment(PYTHONPATH=str(tmp_path / "site")),
    )  # fmt: skip
    assert run.stdout.count(str(tmp_path / "site")) == 2
    assert run.stdout.count("\nGL") == len(PAGES)


def test_the_name_on_the_index_is_not_the_commands() -> None:
    texts = (path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("*.y*ml")))
    assert not [text for text in texts if re.search(r"pip install (-\S+ )*gradlint(?!-onnx)\b", text)]


# -- who imports whom --------------------------------------------------------------------------------------------------

_RULES = {"condition", "exceptions", "fact_table", "message", "remedies", "remedy_values", "results", "rulebook"}
_TABLES = {"backward", "broadcasting", "composition", "constants", "domain", "exceptions", "graph", "quadrature",
           "iterations", "results", "runs", "subgraphs", "transfer", "ops", "ops.*"}  # fmt: skip
# Modules (globs), and all that they may import of ours.
MAY_IMPORT: dict[str, set[str]] = {
    "exceptions": set(),
    "domain": set(),
    "options": {"exceptions"},
    "results": {"exceptions"},
    "graph": {"results"},
    "parameters": {"graph"},
    "load": {"exceptions", "graph"},
    "source_tree": {"exceptions", "graph", "results"},
    "iterations": {"graph"},
    "operands": {"exceptions", "graph"},
    "unfolding": {"graph"},
    "lookups": {"constants", "graph"},
    "data": {"exceptions", "graph", "lookups"},
    "transfer": _TABLES - {"ops", "ops.*"},
    "ops": _TABLES,
    "ops.*": _TABLES,
    "estimate": {*_TABLES, "load"},
    "reverse": {*_TABLES, "canonical", "load"},
    "positions": {"anatomy", "domain", "estimate", "figures", "graph", "structure"},
    "alignment": {"domain", "exceptions", "graph", "results"},
    "losses": {"backward", "data", "exceptions", "graph", "options"},
    "taps": _TABLES,
    "session": {"data", "graph", "taps"},
    "figures": {"graph", "taps"},
    "memory": set(),
    "histograms": {"backward", "data", "session"},
    "probe": {
        *_TABLES,
        "alignment",
        "data",
        "figures",
        "histograms",
        "losses",
        "memory",
        "options",
        "reverse",
        "session",
        "taps",
    },
    "fact_table": {"results"},
    "condition": _RULES,
    "message": _RULES,
    "remedies": _RULES,
    "rulebook": _RULES,
    "fixes": _RULES,
    "judge": {*_RULES, "fixes"},
    "report": {"exceptions", "report.*", "results"},
    "report.difference": {"compare", "report.*", "results"},
    "report.comparison": {"compare", "report.*", "results"},
    "movement": {"compare", "graph", "load", "results"},
    "report.*": {"report", "report.*", "results"},
    "config": {"condition", "exceptions"},
    "baseline": {"exceptions", "judge", "results"},
    "compare": {"exceptions", "results"},
}
# What only the modules named here may import: the top of the program, and what serves one purpose.
ONLY_FOR: dict[str, set[str]] = {
    "analysis": {""},
    "cli": {"__main__"},
    "batch": {"cli"},
    "listing": {"cli"},
    "flags": {"cli"},
    "config": {"cli"},
    "external": {"cli"},
    "baseline": {"cli"},
    "compare": {"cli", "movement", "report.comparison", "report.difference"},
    "movement": {"cli"},
    "pictures": {"analysis"},
    "output": {"cli", "external"},
    "testing": set(),
}


@cache
def _modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths)
    trees = (ast.parse(path.read_text("utf-8")) for path in paths)
    return tuple(
        (name.removesuffix("__init__").removesuffix("."), tree) for name, tree in zip(names, trees, strict=True)
    )


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports anywhere, without `gradlint.`; the package itself is ''."""
    ours = {name for name, _ in _modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name[9:] for alias in node.names if f"{alias.name}.".startswith("gradlint."))
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("gradlint."):
            base = (node.module or "")[9:]
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in ours else base


def _row(module: str) -> set[str] | None:
    return MAY_IMPORT.get(module, next((some for glob, some in MAY_IMPORT.items() if fnmatchcase(module, glob)), None))


def test_every_module_imports_only_what_lies_below_it() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, tree in _modules()
        if (allowed := _row(module)) is not None
        for imported in _imports(tree)
        if not any(fnmatchcase(imported, glob) for glob in allowed)
    ]
    wrong += [
        f"{module} imports {imported}"
        for module, tree in _modules()
        for imported in _imports(tree)
        if imported in ONLY_FOR and module not in ONLY_FOR[imported]
    ]
    assert wrong == []


def test_only_load_and_data_read_foreign_bytes() -> None:
    readers = {"ParseFromString", "load_model", "load_external_data_for_model"}
    found = {
        module
        for module, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (node.attr in readers or (node.attr == "load" and ast.unparse(node.value) in ("np", "onnx", "ir")))
    }
    # `expansion` parses the function bodies that onnx itself ships.
    assert found <= {"load", "data", "expansion", "testing"}


def test_the_broad_handler_is_one() -> None:
    broad = [
        module
        for module, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert broad == ["batch"]


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_no_file_names_a_place_on_this_machine() -> None:
    places = [f"{place}{os.sep}".encode() for place in {ROOT, Path.home()}]
    files = [
        path
        for folder in ("gradlint", "rules", "tests", "sample_models", "benchmarks", ".ci")
        for path in (ROOT / folder).rglob("*")
    ]
    files += ROOT.glob("*")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts and any(place in path.read_bytes() for place in places)
    ]
    assert found == []


def _script(step: str) -> str:
    """The shell script of a step of the action, as the runner would write it to a file."""
    text = (ROOT / "action.yml").read_text()
    after = text[text.index(f"- name: {step}\n") :]
    block = re.search(r"^ {6}run: \|\n((?: {8}.*\n|\n)+)", after, re.MULTILINE)
    assert block
    return textwrap.dedent(block[1])


@pytest.mark.parametrize(("fail_on", "more", "code"), [("error", "", 1), ("never", "", 0), ("never", " bad.onnx", 2)])
def test_the_actions_script_runs_as_a_workflow_runs_it(fail_on: str, more: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    (tmp_path / "script.sh").write_text(_script("Check"))
    (tmp_path / "gradlint").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gradlint "$@"\n')
    (tmp_path / "gradlint").chmod(0o755)
    env = environment(
        INPUT_MODELS=f"{SAMPLES}/digits_s*.onnx {SAMPLES}/digits_relu.onnx{more}", INPUT_ARGS="--no-probe --seed 1",
        INPUT_FAIL_ON=fail_on, INPUT_SOURCE_ROOT=".", INPUT_BASELINE="", RUNNER_TEMP=str(tmp_path / "temp"),
        GITHUB_OUTPUT=str(tmp_path / "output"), GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"),
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(tmp_path / "script.sh")]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert run.stderr.startswith("gradlint: error: bad.onnx: ") if more else run.stderr == ""
    assert run.stdout.startswith("::error ")
    sarif = tmp_path / "temp" / "gradlint" / "report.sarif"
    written = f"exit-code={code}\n" + ("" if code == 2 else f"sarif={sarif}\n")
    assert (tmp_path / "output").read_text() == written
    assert (tmp_path / "summary.md").read_text().startswith("- 🛑 **not checked** bad.onnx: " if more else "### ")
    assert {path.name for path in sarif.parent.iterdir()} == {"report.html", "report.json", "report.sarif"}


@pytest.mark.parametrize(("model", "code"), [("digits_relu", 0), ("digits_sigmoid", 1)])
def test_the_hook_checks_the_models_of_a_commit(model: str, code: int, tmp_path: Path) -> None:
    """The hook as it is published, but run from this environment: installing it would need the network."""
    hook = (ROOT / ".pre-commit-hooks.yaml").read_text()
    local = hook.replace("entry: gradlint", f"entry: {sys.executable} -m gradlint").replace("python\n", "system\n")
    config = f"repos:\n- repo: local\n  hooks:\n{textwrap.indent(local, '  ')}"
    (tmp_path / ".pre-commit-config.yaml").write_text(config)
    shutil.copy(SAMPLES / f"{model}.onnx", tmp_path)
    env = environment(PRE_COMMIT_HOME=str(tmp_path / ".cache"), GIT_CONFIG_GLOBAL=os.devnull)
    for command in (["git", "init", "--quiet"], ["git", "add", ".pre-commit-config.yaml", f"{model}.onnx"]):
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
    command = [sys.executable, "-m", "pre_commit", "run", "--verbose", "--color", "never"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout
    assert f"{model}.onnx: {'fail' if code else 'pass'}" in run.stdout


def test_the_readme_lists_every_rule() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    for rule in load_rules().rules:
        levels = ", ".join(rule.conditions) + (" (preview)" if rule.status == "preview" else "")
        assert f"| {rule.code} | [{rule.name}](rules/{rule.name}.md) | {levels} | {rule.title} |" in lines


def test_the_first_two_blocks_of_the_readme_run_it_and_test_it() -> None:
    run, test = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[:2]
    samples = re.findall(r"sample_models/\S+", run)
    assert run.startswith("pip install . && gradlint sample_models/")
    assert all((ROOT / sample).is_file() for sample in samples)
    assert test == "pip install -e '.[test]' && pytest\n"
