"""The user's Python lines: frames that torch recorded on the exporting machine, found again under a folder of this one.

A recorded path never reaches a report: only a file that is found is named, by its path here.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from gradlint.exceptions import UsageError
from gradlint.graph import frames, place
from gradlint.results import Source

_MOST_FOLDERS = 10_000  # looked into, nearest first: the current folder may be the root of a disk
_FOREIGN = frozenset({"site-packages", "dist-packages", "node_modules", "__pycache__"})
_LIBRARY = re.compile(r"(site|dist)-packages|[\\/]lib[\\/]python3|\\Lib\\")


def locate_sources(graph: ir.Graph, root: Path | None) -> None:
    """Give each node the innermost of its frames whose file lies under `root` (default: the current folder).

    Frames of installed packages and of the standard library are no one's own. Raises UsageError where root is no
    folder.
    """
    if root is not None and not root.is_dir():
        raise UsageError(f"source-root {root}: not a folder: give the one that holds the models' Python sources")
    recorded = {
        node: own for node in graph.all_nodes() if (own := [f for f in frames(node) if not _LIBRARY.search(f[0])])
    }
    if not recorded:
        return
    top = Path(os.path.abspath(root or Path()))
    files = _python_files(top)
    found = {path: _match(path, files) for own in recorded.values() for path, _ in own}
    for node, own in recorded.items():
        here = [Source(_shown(file, top), line) for path, line in own if (file := found[path]) is not None]
        if here:
            place(node, here[-1])


def _python_files(top: Path) -> Mapping[str, Sequence[Path]]:
    """The files under `top` by name, without hidden folders, installed packages and links."""
    found: dict[str, list[Path]] = defaultdict(list)
    pending = deque([top])
    looked = 0
    while pending and looked < _MOST_FOLDERS:
        folder = pending.popleft()
        looked += 1
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if folder != top and any(entry.name == "pyvenv.cfg" for entry in entries):
            continue
        for entry in entries:
            if entry.name.endswith(".py"):
                found[entry.name].append(folder / entry.name)
            elif not entry.name.startswith(".") and entry.name not in _FOREIGN and entry.is_dir(follow_symlinks=False):
                pending.append(folder / entry.name)
    return found


def _match(recorded: str, files: Mapping[str, Sequence[Path]]) -> Path | None:
    """The file that shares the most of its path's end with the recorded path; None where two share as much."""
    parts = [part for part in re.split(r"[\\/]+", recorded) if part]
    ranked = sorted(
        ((_shared(parts, file.parts), file) for file in files.get(parts[-1] if parts else "", ())), reverse=True
    )
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        return None
    return ranked[0][1]


def _shown(file: Path, top: Path) -> str:
    """The path from the current folder where that holds the file (a disk as a whole tells nothing), else from `top`."""
    here = Path.cwd()
    return file.relative_to(here if file.is_relative_to(here) and here.name else top).as_posix()


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts at the end of two paths are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
