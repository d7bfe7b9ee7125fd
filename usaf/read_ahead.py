"""Asking the system to read parts of files that will be used soon, while something else computes.

The 4-bit experts are mapped, so a layer's first use would wait for the disk, page after page. Where the system takes
advice (`posix_fadvise`), it reads the parts into its cache by itself, and copies nothing; elsewhere (Windows, macOS) a
thread reads them, which has the same effect. Either way it is advice only: what could not be read ahead is read, and
reported if it cannot be, where it is used.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

READ_BYTES = 4 << 20


class Span(NamedTuple):
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int


def read_ahead(spans: Sequence[Span]) -> Future[int] | None:
    """Begin to read `spans` and return at once; the future, where a thread reads, gives the bytes that it read."""
    if not hasattr(os, "posix_fadvise"):
        return _reader().submit(read_through, list(spans))
    for span in spans:
        try:
            file = os.open(span.path, os.O_RDONLY)
        except OSError:
            return None  # whoever uses the file will say why
        try:
            os.posix_fadvise(file, span.start, span.end - span.start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
    return None


def read_through(spans: Sequence[Span]) -> int:
    """Read the spans once, a piece at a time, for the system's cache; gives the bytes that were there."""
    total, buffer = 0, bytearray(READ_BYTES)
    for path, start, end in spans:
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                while start < end:
                    count = file.readinto(memoryview(buffer)[: min(READ_BYTES, end - start)])
                    if not count:
                        break
                    start, total = start + count, total + count
        except OSError:
            return total  # whoever uses the file will say why
    return total


@functools.cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
