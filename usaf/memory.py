"""How much memory the process used: its peak, sampled by a thread, with and without mapped files.

Mapped 4-bit experts are the system's page cache, given back under pressure; what a run truly needs is its private
memory. Linux counts it as RssAnon (+ swap); Windows as the private working set's commit; macOS as the unique set.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05
M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 1 << 20  # mallopt's number for it, and what it is set to


def private_bytes() -> int:
    """Private memory now: without mapped files and shared libraries."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap") if name in fields)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().private)
    return int(psutil.Process().memory_full_info().uss)


def resident_bytes() -> int:
    """All resident memory now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    return int(psutil.virtual_memory().available)


def return_freed() -> None:
    """Give freed memory back to the system where the allocator (glibc's) would keep it for later."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def return_at_once() -> None:
    """From now on tensors of `MAPPED_FROM_BYTES` and more go back to the system when they are freed.

    glibc raises its threshold for that to 32 MB as such blocks are freed, and then keeps holes between smaller ones: a
    run held 1.2 GB where its tensors took 0.4 (docs/decisions.md). The price is that pages are cleared anew.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


class PeakMemory:
    """Samples until `stop`. `private` and `resident` are the peaks so far, in bytes."""

    def __init__(self) -> None:
        self.private = self.resident = 0
        self._stopped = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        self.private = max(self.private, private_bytes())
        self.resident = max(self.resident, resident_bytes())

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._sample()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._sample()
