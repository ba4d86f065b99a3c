"""What lets a command start and end at once: a third of a small model's time would go to neither finding nor figure."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType
from typing import NoReturn

from gradlint import memory

# onnx_ir calculates symbolic sizes with sympy, which takes a fifth of a second to import and few models need.
_SELDOM_USED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
_GARBAGE = 100_000  # objects between two searches for garbage: what a command builds, it needs


class _Lazily:
    """Finds the modules that are loaded when something of theirs is first asked for."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _SELDOM_USED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def begin() -> None:
    """Before a command imports what it needs."""
    sys.meta_path.insert(0, _Lazily)
    gc.set_threshold(_GARBAGE)
    memory.keep()


def end(code: int) -> NoReturn:
    """End the process with its exit code, without taking apart what is loaded: that takes a quarter of a second.

    After an interrupt inside an import this is also the only way not to end by the signal.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or its reader has gone
            stream.flush()
    os._exit(code)
