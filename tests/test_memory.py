"""Memory a command has ready: measured in a process of its own, by the pages that are new to it."""

import subprocess
import sys

FILL = """
import resource, sys
from gradlint import memory
memory.keep()
with memory.at_hand(int(sys.argv[1])):
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks = [bytearray(4 << 20) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _new_pages(ready: int) -> int:
    """The pages the kernel hands over while 32 MB are filled."""
    done = subprocess.run([sys.executable, "-c", FILL, str(ready)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_at_hand_is_there_when_it_is_wanted() -> None:
    assert _new_pages(64 << 20) < 100 < 4000 < _new_pages(0)
