"""Where text goes: standard output, files, the terminal's progress line and messages for people."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradlint.exceptions import UsageError
from gradlint.report.text import clip_left, prose

_PATIENCE = 2.0
_BAR = 20


def emit(text: str) -> None:
    """Write to standard output. A reader that has gone away is no error."""
    if sys.stdout is None:
        return
    try:
        # An encoding that lacks a character shows its number.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
    except OSError as error:
        mute()
        raise UsageError(f"can't write to standard output: {error.strerror}") from None


def mute() -> None:
    """Send what is still buffered nowhere, so that the interpreter doesn't complain about it on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(kind: str, message: str) -> None:
    """One line on standard error, safe to show."""
    print(f"gradlint: {kind}: {prose(message)}", file=sys.stderr)


def check_target(path: str, models: Iterable[str] = ()) -> None:
    """Raises UsageError where a file can't be written for certain, or is one of the models: known before the work."""
    target = Path(path)
    if target.exists() and any(os.path.exists(model) and target.samefile(model) for model in models):
        raise UsageError(f"can't write {path}: it is the model itself: give another file")
    if target.is_dir():
        raise UsageError(f"can't write {path}: it is a folder: give a file")
    if not target.parent.is_dir():
        raise UsageError(f"can't write {path}: there is no folder {target.parent}")


def write_file(path: str, content: str | bytes) -> None:
    """Write a whole file or none: under another name first, then renamed. Raises UsageError."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file()
    place = target if special else target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        place.write_bytes(data)
        if not special:
            place.replace(target)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
    finally:
        # Where nothing could be written (a read-only disk) nothing is left to remove either.
        if not special:
            with suppress(OSError):
                place.unlink()


def add_step_summary(markdown: str) -> None:
    """Append to the job summary of GitHub Actions, where there is one."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(markdown)
    except OSError as error:
        raise UsageError(f"can't write {path} ($GITHUB_STEP_SUMMARY): {error.strerror}") from None


def is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def use_color() -> bool:
    """Colour on standard output: NO_COLOR says no, FORCE_COLOR yes, else on a terminal that can show it."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return is_terminal() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return max(shutil.get_terminal_size().columns, 40) if is_terminal() else 80


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A line on standard error that shows what is being done, once it takes over two seconds; only on a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, name: None
        return
    state = (0, "")
    stop = threading.Event()

    def show(done: int, name: str) -> None:
        nonlocal state
        state = (done, name)

    def draw() -> None:
        began = time.monotonic()
        pause = _PATIENCE
        while not stop.wait(pause):
            print(f"\r\x1b[K{_line(*state, total, time.monotonic() - began)}", end="", file=sys.stderr, flush=True)
            pause = 0.5
        if pause != _PATIENCE:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield show
    finally:
        stop.set()
        thread.join()


def _line(done: int, name: str, total: int, seconds: float) -> str:
    name = clip_left(prose(name), 30)
    if total == 1:
        return f"checking {name}, {seconds:.0f} s"
    filled = _BAR * done // total
    return f"[{'#' * filled}{'-' * (_BAR - filled)}] {done} of {total} models, {name}, {seconds:.0f} s"
