"""A large file that is written in steps and goes on after an interruption, even SIGKILL or a power loss.

Beside `x` lie, while it is made, `.x.partial` (of full size from the beginning) and `.x.journal`: a line that says what
is made, then one for each flush with the number of steps that are in the file for certain. The data are flushed to the
disk before the line that counts them, so the journal never promises what a power loss took away; a line that was cut
short itself is not counted. Steps must give the same bytes each time. Flushing costs some milliseconds, so it happens
every few seconds only, and what is lost is that much work.

The operating system's lock on the journal keeps a second process out; a killed one leaves none behind.

Left out: a check that the bytes on the disk are still those that were written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from usaf.errors import RunError, UserError
from usaf.files import FULL_DISK, flush, flush_folder, locked

FLUSH_SECONDS = 5.0


class Partial:
    """The file under way. `file`: open for writing; `done`: steps that it holds, to begin with those found there;
    `discarded`: whether there was one of another content (or a damaged one), which went."""

    def __init__(self, file: IO[bytes], journal: IO[bytes], done: int, discarded: bool) -> None:
        self.file, self.done, self.discarded = file, done, discarded
        self._journal, self._recorded, self._flushed = journal, done, time.monotonic()

    def step(self) -> None:
        """One more is written."""
        self.done += 1
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.record()

    def record(self) -> None:
        """Down to the disk: first the data, then the line that counts them."""
        if self.done > self._recorded:
            flush(self.file)
            self._journal.write(json.dumps({"done": self.done}).encode() + b"\n")
            flush(self._journal)
            self._recorded = self.done
        self._flushed = time.monotonic()


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def journal_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def steps_done(path: Path, journal: bytes, identity: str, size_bytes: int) -> int | None:
    """How many steps an interrupted work left for this very file; None where there is nothing that it could go on from.

    journal: the content of the journal; identity: what tells one content from another.
    """
    lines = journal.split(b"\n")[:-1]  # the last one is empty, or was cut short
    try:
        if partial_path(path).stat().st_size != size_bytes or json.loads(lines[0]) != {"identity": identity}:
            return None
        return max((int(json.loads(line)["done"]) for line in lines[1:]), default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def allocated_bytes(path: Path) -> int:
    """What the partial file takes on the disk already; nearly nothing at the beginning where holes take no space."""
    try:
        stat = partial_path(path).stat()
    except OSError:
        return 0
    return min(stat.st_size, 512 * stat.st_blocks) if hasattr(stat, "st_blocks") else stat.st_size


@contextmanager
def continued(path: Path, identity: str, size_bytes: int) -> Iterator[Partial | None]:
    """The partial file for `path`, as an earlier process left it or new; when the block ends well, it becomes `path`.

    None where another process finished `path` meanwhile. What is done is kept when the block is interrupted, and
    cleared away when it raises a `UserError` that is no `RunError`: then going on would lead to the same end.

    Raises:
        UserError: another process is at work on it; no rights, not a folder.
        RunError: full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        busy = Busy(f"{path}: another process is making this file; wait until it has finished, and it will be used as "
                    "it is")  # fmt: skip
        with locked(journal_path(path), busy) as journal:
            if path.exists():
                clear(path)
                yield None
                return
            with open_partial(path, journal, identity, size_bytes) as partial:
                try:
                    yield partial
                    partial.record()
                except BaseException as error:
                    if isinstance(error, UserError) and not isinstance(error, RunError):
                        raise
                    with suppress(OSError):  # on a full disk the last flush counts
                        partial.record()
                    raise
            os.replace(partial_path(path), path)  # closed by now, as Windows wants it
            flush_folder(path.parent)
    except UserError as error:
        if not isinstance(error, RunError) and not isinstance(error, Busy):
            clear(path)
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise RunError(f"{path}: the disk takes no more ({error.strerror or error}); what is done is kept in "
                           f"{partial_path(path).name}: free some space, and the same command goes on from there"
                           ) from error  # fmt: skip
        raise UserError(f"{path}: could not be written ({error.strerror or error}); check the rights of {path.parent}"
                        ) from error  # fmt: skip
    with suppress(OSError):
        journal_path(path).unlink()


class Busy(UserError):
    """Another process is making the file."""


@contextmanager
def open_partial(path: Path, journal: IO[bytes], identity: str, size_bytes: int) -> Iterator[Partial]:
    """An earlier process's partial file where it fits, else an empty one of full size, journalled as such."""
    journal.seek(0)
    done = steps_done(path, journal.read(), identity, size_bytes)
    discarded = done is None and partial_path(path).exists()
    if discarded:
        partial_path(path).unlink()
    with open(partial_path(path), "w+b" if done is None else "r+b") as file:
        lines = [json.dumps({"identity": identity})]
        if done is None:
            file.truncate(size_bytes)
            flush(file)
        else:
            lines.append(json.dumps({"done": done}))
        journal.seek(0)
        journal.truncate(0)  # what follows a line that was cut short would not count
        journal.write(("\n".join(lines) + "\n").encode())
        flush(journal)
        flush_folder(path.parent)
        yield Partial(file, journal, done or 0, discarded)


def clear(path: Path) -> None:
    for left in (partial_path(path), journal_path(path)):
        with suppress(OSError):
            left.unlink()
