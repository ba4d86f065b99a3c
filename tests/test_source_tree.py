"""Findings land on the user's Python line, by paths of this machine, whatever the exporting machine's were.

`exports/sigmoid_net.onnx` is what torch.onnx.export makes of `exports/net.py` by default (torch 2.13), but for the
folders in its stack traces: the network lay in /home/ada/proj/models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from command import ROOT, gradlint

from gradlint import check
from gradlint.exceptions import UsageError
from gradlint.graph import source
from gradlint.report import FORMATS, render
from gradlint.results import Source
from gradlint.source_tree import locate_sources

EXPORTS = ROOT / "tests" / "exports"
MODEL = EXPORTS / "sigmoid_net.onnx"
_SIGMOID = 1 + next(
    k for k, line in enumerate((EXPORTS / "net.py").read_text().splitlines()) if "torch.sigmoid(" in line
)


def _graph(*frames: tuple[str, int]) -> ir.Graph:
    node = ir.Node("", "Relu", [ir.Value(name="x")])
    stack = "\n  ".join(f'File "{path}", line {line}, in forward\n    y = f(x)' for path, line in frames)
    node.metadata_props["pkg.torch.onnx.stack_trace"] = stack
    return ir.Graph([], node.outputs, nodes=[node])


def _found(root: Path | None, *frames: tuple[str, int]) -> Source | None:
    graph = _graph(*frames)
    locate_sources(graph, root)
    return source(graph[0])


def _write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_a_real_export_gets_its_sarif_results_on_the_line_of_its_forward(tmp_path: Path) -> None:
    """A checkout in another place than the exporter's, as in CI."""
    _write(tmp_path, "train/models/__init__.py")
    shutil.copy(EXPORTS / "net.py", tmp_path / "train" / "models")
    run = gradlint(MODEL, "--source-root", ".", "--format", "sarif", cwd=tmp_path)
    results = json.loads(run.stdout)["runs"][0]["results"]
    of_layers = [result for result in results if "logicalLocations" in result["locations"][0]]
    assert {"GL102", "GL201"} <= {result["ruleId"] for result in of_layers}
    for result in of_layers:
        assert result["locations"][0]["physicalLocation"] == {
            "artifactLocation": {"uri": "train/models/net.py"},
            "region": {"startLine": _SIGMOID},
        }


def test_no_path_of_the_exporting_machine_gets_out(tmp_path: Path) -> None:
    for root in (tmp_path, EXPORTS):
        report = check(MODEL, source_root=root, probe=False)
        assert report.findings
        for format in FORMATS:
            assert "ada/" not in render([report], format)


def test_the_longest_common_end_of_the_paths_decides(tmp_path: Path) -> None:
    _write(tmp_path, "net.py", "old/models/net.py", "new/models/net.py", "new/net.py")
    assert _found(tmp_path, ("/home/ada/new/models/net.py", 3)) == Source("new/models/net.py", 3)
    assert _found(tmp_path, ("C:\\ada\\old\\models\\net.py", 3)) == Source("old/models/net.py", 3)
    assert _found(tmp_path, ("/ci/models/net.py", 3)) is None, "two files share as much"
    assert _found(tmp_path, (f"/ci/{tmp_path.name}/net.py", 3)) == Source("net.py", 3)
    assert _found(tmp_path, ("/ci/other.py", 3)) is None


def test_the_innermost_frame_under_the_root_is_the_users(tmp_path: Path) -> None:
    _write(tmp_path, "net.py", "blocks.py", "module.py", ".venv/lib.py", "env/pyvenv.cfg", "env/hidden.py")
    frames = [
        ("/ci/net.py", 1),
        ("/ci/blocks.py", 2),
        ("/elsewhere/shared.py", 3),
        ("/ci/lib/python3.12/site-packages/torch/nn/modules/module.py", 4),
    ]
    assert _found(tmp_path, *frames) == Source("blocks.py", 2)
    assert _found(tmp_path, ("/ci/lib.py", 1), ("/ci/hidden.py", 2)) is None


def test_files_are_named_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "src/pkg/net.py")
    monkeypatch.chdir(tmp_path)
    for root in (None, Path("."), Path("src"), Path("src/pkg"), tmp_path):
        assert _found(root, ("/ci/pkg/net.py", 7)) == Source("src/pkg/net.py", 7)
    monkeypatch.chdir("/")
    assert _found(tmp_path / "src", ("/ci/pkg/net.py", 7)) == Source("pkg/net.py", 7)


@pytest.mark.parametrize("path", ["..", "/", "../../net.py/..", "net.py\0", "a" * 5000, "<string>", "/etc/passwd"])
def test_hostile_paths_find_nothing(path: str, tmp_path: Path) -> None:
    _write(tmp_path, "net.py")
    assert _found(tmp_path, (path, 1)) is None


def test_a_line_of_thousands_of_digits_is_none(tmp_path: Path) -> None:
    _write(tmp_path, "net.py")
    assert _found(tmp_path, ("/ci/net.py", int("9" * 4000))) is None


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: not a folder"):
        _found(tmp_path / "nowhere", ("/ci/net.py", 1))
