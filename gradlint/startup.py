"""What lets a command start and end at once: a third of a small model's time would go to neither finding nor figure."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType
from typing import NoReturn

# onnx_ir calculates symbolic sizes with sympy, which takes a fifth of a second to import and few models need.
_SELDOM_USED = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
# glibc's names for the size from which an allocation is a mapping of its own, and for what it returns to the kernel.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 << 20  # bytes
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
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let what an estimate has freed serve the probe: new pages take a tenth of its time. Elsewhere than on glibc: no
    change."""
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, 8 * _LARGE)


def end(code: int) -> NoReturn:
    """End the process with its exit code, without taking apart what is loaded: that takes a quarter of a second.

    After an interrupt inside an import this is also the only way not to end by the signal.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or its reader has gone
            stream.flush()
    os._exit(code)
