"""Pages of the sample models, and a browser to open them in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

SAMPLES = Path(__file__).parents[2] / "sample_models"
MODELS = [path.stem for path in sorted(SAMPLES.glob("*.onnx"))]


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of each sample's page, and of one page for all of them under `all`."""
    folder = tmp_path_factory.mktemp("pages")
    for model in MODELS:
        _check(SAMPLES / f"{model}.onnx", folder / f"{model}.html")
    _check(SAMPLES, folder / "all.html")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


def _check(model: Path, page: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "gradlint",
        str(model),
        "--fail-on",
        "never",
        "--format",
        "concise",
        "--html",
        str(page),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    quiet = ["background-networking", "component-update", "sync", "gpu"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()
