"""gradlint: a static gradient-flow analyzer and linter for exported ONNX models.

import gradlint

report = gradlint.check("model.onnx")
backward = gradlint.differentiate("model.onnx")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradlint.exceptions import DataError, GradlintError, ModelError, UsageError
from gradlint.options import Options
from gradlint.results import Report

if TYPE_CHECKING:
    import onnx

__version__ = "0.1.0"
__all__ = ["DataError", "GradlintError", "ModelError", "Options", "Report", "UsageError", "check", "differentiate"]


def check(model: str | os.PathLike[str] | onnx.ModelProto, options: Options | None = None, **changes: Any) -> Report:
    """Analyse one model and judge it.

    model: a path, or a ModelProto. changes: fields of `Options` by name. Raises ModelError, DataError, UsageError.
    """
    from gradlint.analysis import analyse

    return analyse(model, replace(options or Options(), **changes))


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
