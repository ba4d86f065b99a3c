"""Pages of the sample models, and a browser to open them in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from report_fixtures import faults, healthy_resnet, hostile, with_pictures

from gradlint.report import render

SAMPLES = Path(__file__).parents[2] / "sample_models"
MODELS = [path.stem for path in sorted(SAMPLES.glob("*.onnx"))]


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of each sample's page; of one for all of them under `all`, of what changed from one to another under
    `changed`, of a thousand layers under `deep`, and of hostile names under `hostile`."""
    folder = tmp_path_factory.mktemp("pages")
    for model in MODELS:
        _gradlint(SAMPLES / f"{model}.onnx", "--html", folder / f"{model}.html", "--format", "concise")
    _gradlint(SAMPLES, "--html", folder / "all.html", "--format", "concise")
    sides = SAMPLES / "digits_relu.onnx", SAMPLES / "digits_sigmoid.onnx"
    _gradlint("diff", *sides, "--html", folder / "changed.html")
    (folder / "deep.html").write_text(render([with_pictures(healthy_resnet(200), each=3)], "html"), "utf-8")
    (folder / "hostile.html").write_text(render([hostile()], "html", faults=faults()), "utf-8")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


def _gradlint(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "gradlint", *map(str, arguments), "--fail-on", "never"]
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
