"""What a user sees: progress bars for every phase, plain tables, one-line errors; and the exit status of every command.

Exit status: 0 success, 2 bad input (a `UserError`), 1 anything else, 130 Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from usaf.errors import RunError, UserError

OUT_OF_MEMORY_MARKS = ("out of memory", "not enough memory", "can't allocate memory")


def say(line: str = "") -> None:
    """A line for the user, between progress bars."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def phase(name: str, total: int, unit: str, done: Callable[[str, float], None] | None = None) -> Iterator[tqdm]:
    """A progress bar over one phase; `done(name, seconds)` is told when it ends. Off a terminal it speaks seldom."""
    began = time.perf_counter()
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=total, desc=f"{name:<14}", unit=unit, mininterval=interval, maxinterval=interval, unit_scale=True,
              dynamic_ncols=True, smoothing=0.1) as bar:  # fmt: skip
        yield bar
    if done is not None:
        done(name, time.perf_counter() - began)


class LateBar:
    """A progress bar that appears with the first piece of work, for work that may not be needed at all."""

    def __init__(self, name: str, unit: str, done: Callable[[str, float], None] | None = None) -> None:
        self._make = lambda total: phase(name, total, unit, done)
        self._context: AbstractContextManager[tqdm] | None = None
        self._bar: tqdm | None = None

    def __call__(self, finished: int, total: int, what: str) -> None:
        """`finished` of `total` pieces are done, the last in `what`."""
        if self._context is None:
            self._context = self._make(total)
            self._bar = self._context.__enter__()
        assert self._bar is not None
        self._bar.update(finished - self._bar.n)
        if finished == total:
            self._context.__exit__(None, None, None)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Plain text in columns: the first to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        lines.append(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it in several ways: by a class of its own on GPUs, by a plain RuntimeError on the host."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(mark in text for mark in OUT_OF_MEMORY_MARKS)


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command; every error that a user can cause is one line on stderr."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; nothing to tell it
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"error: out of memory ({first}); lower MICROBATCH, SEQ_LEN, IMPORTANCE_SAMPLES or CAPTURE_STEPS, or raise "
              "TRAIN_FROM; finished work is kept: go on with RESUME=auto", file=sys.stderr)  # fmt: skip
        return 1
