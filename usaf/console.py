"""What a user sees: flags, progress bars for every phase, plain tables, one-line errors; and a command's exit status.

Exit status: 0 success, 2 bad input (a `UserError`), 1 anything else, 130 Ctrl-C or SIGTERM. No torch here: `--help` of
every command comes this way and is to answer at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from usaf.errors import RunError, UserError

OUT_OF_MEMORY_MARKS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")

NARROWEST_COLUMN, COLUMN_GAP = 36, " | "


class Parser(argparse.ArgumentParser):
    """Flags of a command; an error is one line for people, and a flag is never abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {' '.join(message.split())}; see --help")


def add_delta_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags of every command on a saved delta; `session.settings_of_run` turns them into settings.

    required: --delta must be given.
    """
    parser.add_argument("--delta", type=Path, required=required, help="delta.safetensors of a run")
    parser.add_argument("--model", help="the base model, if it has moved since the run")
    parser.add_argument("--quant", metavar="PATH", help="the 4-bit experts, if they have moved since the run")
    parser.add_argument("--use-cuda", choices=("0", "1"), help="another device than the run's; its bits may differ")


def add_scale_flag(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Gives a list of numbers, of one unless `several`."""
    parser.add_argument(
        "--scale", type=partial(scales_of, several=several), default="1", metavar="X,..." if several else "X",
        help="how much of what was saved counts, above 0 and at most 2 (default 1): below 1, more of the base is kept"
        + ("; several, comma-separated, are evaluated one after the other" if several else ""),
    )  # fmt: skip


def scales_of(text: str, several: bool) -> list[float]:
    """What --scale says. Raises UserError."""
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale <= 2 for scale in scales) or (len(scales) > 1 and not several):
        numbers = "numbers above 0 and at most 2, comma-separated" if several else "a number above 0 and at most 2"
        raise UserError(f"--scale {text}: must be {numbers}; 1 is the model as it was saved, 0.8 a usual other")
    return scales


def refuse_scaled_base(arguments: argparse.Namespace) -> None:
    """Of a command with both flags."""
    if arguments.base and arguments.scale != [1.0]:
        raise UserError("--scale contradicts --base, which leaves the delta out; leave one of them out")


def add_base_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", action="store_true", help="leave the delta out: the 4-bit base alone")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the figures to this file")


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
            self._bar = None

    def abandon(self) -> None:
        """Close a bar that did not come to its end, so that an error has a line of its own."""
        if self._bar is not None:
            self._bar.close()


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


def side_by_side(titles: tuple[str, str], texts: tuple[str, str], width: int) -> str:
    """Two texts in two columns of a terminal `width` wide, or one under the other where a column would be narrow."""
    column = (width - len(COLUMN_GAP)) // 2
    if column < NARROWEST_COLUMN:
        pairs = zip(titles, texts, strict=True)
        return "\n\n".join(f"{title}\n{'-' * len(title)}\n{visible(text)}" for title, text in pairs)
    shown = [visible(text.expandtabs(4)) for text in texts]
    cells = [[title, "-" * column, *wrapped(text, column)] for title, text in zip(titles, shown, strict=True)]
    return "\n".join(
        f"{left}{' ' * (column - cells_wide(left))}{COLUMN_GAP}{right}".rstrip()
        for left, right in zip_longest(*cells, fillvalue="")
    )


def visible(text: str) -> str:
    """Control characters spelt out, save line breaks and tabs: a model may write any, and a terminal would obey."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where there are any; line breaks and indentation stay."""
    lines = []
    for line in text.split("\n"):
        while cells_wide(line) > width:
            end = next(n for n in range(len(line), 0, -1) if cells_wide(line[:n]) <= width)
            space = line.rfind(" ", 0, end + 1)
            at = space if space > 0 and line[:space].strip() else end
            lines.append(line[:at])
            line = line[at:].removeprefix(" ")
        lines.append(line)
    return lines


def cells_wide(text: str) -> int:
    """Cells of a terminal: two for the wide characters of East Asian scripts, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it in several ways: by a class of its own on GPUs, by a plain RuntimeError on the host."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in OUT_OF_MEMORY_MARKS)


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command; every error that a user can cause is one line on stderr.

    SIGTERM ends it the way Ctrl-C does, so that half-written files are cleared away.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that a Windows code page lacks must not end a run
    with terminable():
        return exit_status(command)


def exit_status(command: Callable[[], int]) -> int:
    try:
        return command()
    except RunError as error:
        return fail(str(error), 1)
    except UserError as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; nothing to tell it
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return fail(f"out of memory ({first}); finished work is kept: go on with RESUME=auto when more is free, or "
                    "begin anew with a lower MICROBATCH, SEQ_LEN, IMPORTANCE_SAMPLES or CAPTURE_STEPS, or a higher "
                    "TRAIN_FROM", 1)  # fmt: skip


def fail(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return status


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt while the block runs. Only the main thread may set signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if previous is not None:  # else it was not set by Python and cannot be put back
            signal.signal(signal.SIGTERM, previous)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
