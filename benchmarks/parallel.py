"""How much faster many models go in two processes: the same reports, in less time.

python benchmarks/parallel.py [MODELS]

Copies the samples to MODELS files (default 40) and checks them with `-j 1` and with `-j 2`, twice each in turn; every
worker has one thread. Prints the best time of each, their ratio, and whether the reports are the same but for `timing`;
and the processor's seconds, which say on a busy machine what -j 2 costs more.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES = Path(__file__).parents[1] / "sample_models"
JOBS = (1, 2)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        for number, sample in zip(range(count), itertools.cycle(sorted(SAMPLES.glob("*.onnx"))), strict=False):
            shutil.copy(sample, Path(folder) / f"{number:03}-{sample.name}")
        runs = [(jobs, *_run(jobs, folder)) for jobs in JOBS * 2]
    times = {jobs: min(seconds for n, seconds, _, _ in runs if n == jobs) for jobs in JOBS}
    spent = {jobs: min(seconds for n, _, seconds, _ in runs if n == jobs) for jobs in JOBS}
    same = all(reports == runs[0][3] for _, _, _, reports in runs)
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    print(f"{count} models: -j 1 {times[1]:.1f} s, -j 2 {times[2]:.1f} s, {times[1] / times[2]:.2f} times faster")
    print(f"processor: -j 1 {spent[1]:.1f} s, -j 2 {spent[2]:.1f} s")
    print(f"reports the same but for timing: {'yes' if same else 'NO'}; load average {load}, {os.cpu_count()} cores")


def _run(jobs: int, folder: str) -> tuple[float, float, list[dict[str, object]]]:
    """Seconds of the whole command, those of the processor, and the reports without `timing`."""
    command = [sys.executable, "-m", "gradlint", ".", "-j", str(jobs), "--format", "json", "--fail-on", "never"]
    began, before = time.perf_counter(), _spent()
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    return seconds, _spent() - before, [{**report, "timing": None} for report in json.loads(done.stdout)]


def _spent() -> float:
    """Seconds of the processor by all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
