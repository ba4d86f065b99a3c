"""Running the `gradlint` command in a process of its own, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_models"
SIGMOID = str(SAMPLES / "digits_sigmoid.onnx")
RELU = str(SAMPLES / "digits_relu.onnx")
DEAD = str(SAMPLES / "dead_relu.onnx")

_OURS = ("GRADLINT_", "NO_COLOR", "FORCE_COLOR", "GITHUB_", "COLUMNS")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would change gradlint's behaviour."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_OURS)} | more


def gradlint(
    *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m gradlint` with these arguments and catch what it prints."""
    command = [sys.executable, "-m", "gradlint", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        command, cwd=cwd, env=environment(**(env or {})), text=True, timeout=120, check=False, **streams
    )
