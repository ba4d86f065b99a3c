"""Configuration files: where they are found, what they may hold, and what wins."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from command import RELU, SIGMOID, gradlint

from gradlint.config import Config, find_config, load_config, read_config, schema, to_toml
from gradlint.exceptions import UsageError
from gradlint.flags import to_options
from gradlint.options import Options


def _write(folder: Path, text: str, name: str = "gradlint.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_nearest_file_that_speaks_of_gradlint_is_found(tmp_path: Path) -> None:
    outer = _write(tmp_path, '[tool.gradlint]\nfail-on = "never"\n', "pyproject.toml")
    _write(tmp_path / "nets", "[tool.other]\nx = 1\n", "pyproject.toml")
    (tmp_path / "nets" / "deep").mkdir()
    assert find_config(tmp_path / "nets" / "deep") == outer
    assert read_config(outer) == {"fail-on": "never"}
    inner = _write(tmp_path / "nets", "seed = 3\n")
    assert find_config(tmp_path / "nets" / "deep") == inner


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gradlint.toml"
    path.write_bytes(b'\xef\xbb\xbffail-on = "warning"\r\nignore = ["GL8"]\r\n')
    assert read_config(path) == {"fail-on": "warning", "ignore": ["GL8"]}


def test_paths_start_at_the_folder_of_their_file(tmp_path: Path) -> None:
    path = _write(tmp_path, 'rules = ["own", "/elsewhere"]\nbaseline = "known.json"\n')
    assert read_config(path) == {
        "rules": [str(tmp_path / "own"), "/elsewhere"],
        "baseline": str(tmp_path / "known.json"),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fail_on = 'never'", "no key 'fail_on'; did you mean fail-on?"),
        ("html = 'x.html'", "no key 'html'"),
        ("fail-on = 'warn'", "fail-on: 'warn' is none of error, warning, never; did you mean warning?"),
        ("seed = true", "seed: True is not a whole number"),
        ("batch = 0", "batch: 0 is under 1"),
        ("lr = 0", "lr: 0 is not above 0"),
        ("lr = nan", "lr: nan is not finite"),
        ("select = 'GL2'", "select: 'GL2' is not a list"),
        ("select = [2]", "select[0]: 2 is not a text"),
        ("input-range = { x = [1] }", "input-range: x: 1 values, expected 2"),
        ("levels = { dead-relu = 'fatal' }", "levels: dead-relu: 'fatal' is none of error, warning, note"),
        ("limits = { dead-relu = 3 }", "limits: dead-relu: 3 is not a table"),
        ("[a", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name_and_place(text: str, says: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_config(path)
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)


def test_given_settings_lie_over_the_files(tmp_path: Path) -> None:
    path = _write(tmp_path, "seed = 1\n[limits]\ndead-relu = { share = 0.4 }\n")
    config = load_config([str(path), "seed=2", "fail-on=never", "limits.dead-relu.other=1"], start=tmp_path)
    assert config.settings["seed"] == 2
    assert config.settings["fail-on"] == "never"
    assert config.settings["limits"] == {"dead-relu": {"share": 0.4, "other": 1}}
    assert load_config(start=tmp_path).settings["seed"] == 1
    assert load_config(start=tmp_path, isolated=True) == Config()


def test_models_are_matched_by_path_and_by_name(tmp_path: Path) -> None:
    config = Config({"per-model-ignores": {"old/*": ["GL3"], "tiny.onnx": ["dead-relu"]}}, folder=tmp_path)
    assert config.model_ignores(str(tmp_path / "old" / "tiny.onnx")) == ("GL3", "dead-relu")
    assert config.model_ignores(str(tmp_path / "new" / "net.onnx")) == ()


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    settings = {
        "select": ["GL2", 'a"b\\c\x7f\n'],
        "lr": 1e-3,
        "preview": True,
        "stage": None,
        "levels": {"odd key.x": "note"},
        "limits": {"dead-relu": {"share": 0.25}},
    }
    printed = to_toml(settings)
    assert tomllib.loads(printed) == {key: value for key, value in settings.items() if value is not None}


def test_the_defaults_printed_are_those_of_the_python_api() -> None:
    printed = tomllib.loads(gradlint("config", "--isolated").stdout)
    assert set(printed) <= set(schema()["properties"])
    assert to_options(printed) == Options()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    _write(tmp_path, "seed = 1\nbatch = 2\nthreads = 3\nprobe = false\n")
    shown = gradlint("config", "--seed", "7", cwd=tmp_path, env={"GRADLINT_SEED": "6", "GRADLINT_BATCH": "5"}).stdout
    settings = tomllib.loads(shown)
    assert (settings["seed"], settings["batch"], settings["threads"], settings["probe"]) == (7, 5, 3, False)
    assert shown.startswith(f"# from {tmp_path / 'gradlint.toml'}\n")


def test_every_analysis_setting_reaches_the_options() -> None:
    arguments = (
        "config --isolated --data d.npz --input a=2 --dim n=3 --input-shape a:0:1,2 --input-range b:-1,1 "
        "--input-stats c:1,2,3,4 --loss mse --mode eval --no-probe --trained --seed 1 --batch 2 --threads 3 "
        "--optimizer adam --lr 0.1 --source-root src --select GL1,GL2 --ignore GL3 --extend-select GL4 "
        "--preview --rules own"
    )
    options = to_options(tomllib.loads(gradlint(*arguments.split()).stdout))
    assert options == Options(
        data=Path("d.npz"), values={"a": 2.0}, loss="mse", mode="eval", probe=False, stage="trained", seed=1, batch=2,
        threads=3, dims={"n": 3}, shapes={"a:0": (1, 2)}, ranges={"b": (-1.0, 1.0)},
        stats={"c": ((1.0, 2.0), (3.0, 4.0))}, optimizer="adam", lr=0.1, source_root=Path("src"),
        select=("GL1", "GL2"), ignore=("GL3",), extend_select=("GL4",), preview=True, rules=(Path("own"),),
    )  # fmt: skip


def _rules(run_json: str) -> dict[str, str]:
    return {finding["rule"]: finding["level"] for finding in json.loads(run_json)["findings"]}


def test_levels_limits_and_ignores_change_the_findings(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(Path(SIGMOID).read_bytes())
    report = ("--no-probe", "--format", "json", "--select", "GL201")
    assert _rules(gradlint(model, *report).stdout) == {"vanishing-gradient": "error"}
    _write(tmp_path, '[levels]\nvanishing-gradient = "note"\n')
    assert _rules(gradlint(model, *report).stdout) == {"vanishing-gradient": "note"}
    _write(tmp_path, '[per-model-ignores]\n"net.onnx" = ["GL2"]\n')
    assert _rules(gradlint(model, *report).stdout) == {}
    _write(tmp_path, '[per-layer-ignores]\n"layers.0.*" = ["vanishing-gradient"]\n')
    run = gradlint(model, *report)
    assert [finding["layer"] for finding in json.loads(run.stdout)["findings"]] == ["layers.1.linear"]


def test_wrong_names_of_rules_in_a_file_are_told_before_the_work(tmp_path: Path) -> None:
    for text in (
        "[levels]\nvanishing = 'note'",
        "[per-layer-ignores]\nx = ['GLX']",
        "[per-model-ignores]\n'*' = ['nope']",
    ):
        _write(tmp_path, text)
        run = gradlint(RELU, "--config", tmp_path / "gradlint.toml")
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
        assert "no rule" in run.stderr
