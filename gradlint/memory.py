"""Pages a command keeps, and has ready: Linux takes 2 microseconds to hand over one, a tenth of a probe's time.

Elsewhere than on glibc, and in a program that imports gradlint, memory is left alone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

# glibc's names for the size from which an allocation is a mapping of its own, and for what it returns to the kernel.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGE = 32 << 20  # bytes; glibc refuses a higher one
_BLOCK = 1 << 20  # bytes the kernel is asked for at once: others that want memory wait that long
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE

_libc: Any = None  # glibc, once a command has begun


def keep() -> None:
    """From here on, what the process frees stays with it: what an estimate has freed serves the probe."""
    global _libc
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_TRIM_THRESHOLD, 8 * LARGE)
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        _libc = libc


@contextmanager
def at_hand(size: int) -> Iterator[None]:
    """While the body runs, another thread has the kernel hand over the pages of `size` bytes that are free after it."""
    if _libc is None:
        yield
        return
    libc, page = _libc, mmap.PAGESIZE
    blocks = [block for _ in range(size // _BLOCK) if (block := libc.malloc(_BLOCK))]

    def touch() -> None:
        for block in blocks:  # its whole pages; a kernel that doesn't know the advice leaves them for later
            libc.madvise(-(-block // page) * page, _BLOCK - page, _POPULATE_WRITE)

    thread = Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for block in blocks:
            libc.free(block)
