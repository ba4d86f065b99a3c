"""Many models in one run: worker processes, time limits, and faults that don't take the other models along.

Each worker checks one model at a time with one thread, whatever the number of workers, so that the reports are the same
for any number; they come back in the order of the models.
"""

from __future__ import annotations

import glob
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from gradlint.exceptions import GradlintError, UsageError
from gradlint.options import Options, Task
from gradlint.results import Fault, Report

Result = TypeVar("Result")
# Called with the number of models done and the name of one in work.
Watch = Callable[[int, str], None]
_TICK = 0.2


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: int
    deadline: float


def find_models(given: Sequence[str]) -> list[str]:
    """Files as given; of folders and globs the models inside, sorted; each once. Raises UsageError where none is."""
    paths: list[str] = []
    for name in given:
        if not name:
            raise UsageError("a model's name is empty: give a file or a folder")
        inside = [name]
        if os.path.isdir(name):
            inside = sorted(str(path) for path in Path(name).rglob("*.onnx") if path.is_file())
            if not inside:
                raise UsageError(f"{name}: is a directory without .onnx files: give a model")
        elif not os.path.exists(name) and glob.has_magic(name):
            inside = sorted(glob.glob(name, recursive=True))
            if not inside:
                raise UsageError(f"{name}: no file matches")
        paths += inside
    return list(dict.fromkeys(paths))


def guarded(work: Callable[[], Result]) -> Result | Fault:
    """The result of `work`, or what stopped it. The top of every process: nothing above could tell the user."""
    try:
        return work()
    except GradlintError as error:
        return Fault(str(error))
    except MemoryError:
        return Fault("out of memory: try a smaller --batch, or --no-probe")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip().splitlines() or [""])[0][:200]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Fault(f"internal error, please report it: {type(error).__name__} at {where}: {text}")


def check_models(
    tasks: Sequence[Task], *, jobs: int = 1, timeout: float | None = None, watch: Watch = lambda done, name: None
) -> list[Report | Fault]:
    """Check each model with its options; a report or a fault for each, in order.

    One model without a time limit is checked in this process; otherwise `jobs` processes share the models. `timeout`
    (seconds) is for each model. A model whose process dies or runs out of time is a fault; the others go on.
    """
    if len(tasks) == 1 and timeout is None:
        watch(0, tasks[0][0])
        return [_check(*tasks[0])]
    return _share([(path, replace(options, threads=1)) for path, options in tasks], jobs, timeout, watch)


def _check(path: str, options: Options) -> Report | Fault:
    from gradlint import check

    outcome = guarded(lambda: check(path, options=options))
    return _fault(path, outcome.message) if isinstance(outcome, Fault) else outcome


def _fault(path: str, message: str) -> Fault:
    return Fault(message if path in message else f"{path}: {message}", path)


def _share(tasks: Sequence[Task], jobs: int, timeout: float | None, watch: Watch) -> list[Report | Fault]:
    outcomes: dict[int, Report | Fault] = {}
    pending = deque(range(len(tasks)))
    limit = math.inf if timeout is None else timeout
    busy: list[_Worker] = []
    idle: list[_Worker] = []
    try:
        while len(outcomes) < len(tasks):
            while pending and len(busy) < jobs:
                worker = idle.pop() if idle else _start()
                worker.task, worker.deadline = pending.popleft(), math.inf
                worker.pipe.send(tasks[worker.task])
                busy.append(worker)
            watch(len(outcomes), tasks[busy[0].task][0])
            ready = wait([worker.pipe for worker in busy], _TICK)
            for worker in list(busy):
                outcome = _outcome(worker, worker.pipe in ready, limit)
                if outcome is None:
                    continue
                if isinstance(outcome, str):
                    outcome = _fault(tasks[worker.task][0], outcome)
                    _stop(worker)
                else:
                    idle.append(worker)
                outcomes[worker.task] = outcome
                busy.remove(worker)
    finally:
        for worker in (*busy, *idle):
            _stop(worker)
    return [outcomes[index] for index in range(len(tasks))]


def _outcome(worker: _Worker, ready: bool, limit: float) -> Report | Fault | str | None:
    """What the worker sent, or how it ended; None while it works."""
    if not ready:
        late = time.monotonic() >= worker.deadline
        return f"not done after {limit:g} s (--timeout), given up" if late else None
    try:
        outcome: Report | Fault | None = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode or 0
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the process that checked it {died}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    if outcome is None:
        worker.deadline = time.monotonic() + limit
    return outcome


def _start() -> _Worker:
    # A fresh interpreter: forking a process that may have threads isn't safe.
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    # Ctrl-C is this process's to handle: the worker inherits that it is blocked, from its first instruction on. (The
    # resource tracker, which the first start would start too, lifts the block.)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, pipe, -1, 0.0)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection) -> None:
    """A worker: check what arrives until the other end closes; None says that it begins."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    # The time to import belongs to no model; what goes wrong with it is told with the first.
    guarded(lambda: import_module("gradlint.analysis"))
    while True:
        try:
            path, options = pipe.recv()
        except EOFError:
            return
        pipe.send(None)
        pipe.send(_check(path, options=options))
