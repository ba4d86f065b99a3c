"""Writing a backward model beside the weights it shares: external data stays external."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

import gradlint
from gradlint import output
from gradlint.exceptions import UsageError


def write_beside(model: str, wrt: Sequence[str] | None, target: str) -> None:
    """Differentiate `model` and write the result to `target`.

    External data is not taken into the file: where `target` lies in another folder, its files are copied there. Raises
    UsageError where that would overwrite another file.
    """
    output.check_target(target, [model])
    result = gradlint.differentiate(model, wrt)
    source, folder = Path(model).parent, Path(target).parent
    for location in sorted(_locations(result)):
        if not folder.samefile(source):
            _copy(source / location, folder / location)
    output.write_file(target, result.SerializeToString(deterministic=True))


def _locations(model: onnx.ModelProto) -> set[str]:
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        if filecmp.cmp(source, target, shallow=False):
            return
        raise UsageError(f"can't copy the weights to {target}: another file has that name: choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UsageError(f"can't copy the weights to {target}: {error.strerror}") from None
    output.tell("note", f"copied {source} to {target}: the weights stay outside the model's file")
