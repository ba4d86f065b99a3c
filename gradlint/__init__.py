"""gradlint: a static gradient-flow analyzer and linter for exported ONNX models.

import gradlint

report = gradlint.check("model.onnx")
backward = gradlint.differentiate("model.onnx")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradlint.exceptions import DataError, GradlintError, ModelError, UsageError
from gradlint.options import Options
from gradlint.results import Report

if TYPE_CHECKING:
    import onnx

__version__ = "0.1.0"
__all__ = ["DataError", "GradlintError", "ModelError", "Options", "Report", "UsageError", "check", "differentiate"]


def check(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    options: Options | None = None,
    **settings: Any,
) -> Report:
    """Analyse one model and judge it; prints nothing, writes nothing.

    model: a path, or a ModelProto. data: examples for the probe, a path as for `--data` or arrays by input name
    (`target` or `target.<output>` for the loss); without, they are drawn. settings: fields of `Options` by name, such
    as `loss="cross-entropy"`. Raises ModelError, DataError or UsageError, all of them GradlintError.
    """
    from gradlint.analysis import analyse

    if data is not None:
        settings["data"] = data if isinstance(data, Mapping) else Path(data)
    return analyse(model, replace(options or Options(), **settings))


def differentiate(
    model: str | os.PathLike[str] | onnx.ModelProto,
    wrt: Sequence[str] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> onnx.ModelProto:
    """The backward model of `model`: a plain ONNX model that computes its gradients.

    Inputs: the model's own and `<output>.cotangent` for each float output. Outputs: the model's own, then `<name>.grad`
    for each name in `wrt` (inputs, initializers or intermediate values; default: float inputs and weights). A name
    whose gradient is cut gets no output and is listed in the metadata. Raises ModelError, UsageError.
    """
    from gradlint import reverse

    return reverse.differentiate(model, wrt, base_dir)
