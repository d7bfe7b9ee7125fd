"""Exit statuses, one-line errors, tables, bars; and that a command's help loads no torch."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from usaf.console import (
    LateBar,
    Parser,
    cells_wide,
    is_out_of_memory,
    phase,
    run_command,
    say,
    side_by_side,
    table,
    visible,
    wrapped,
)  # fmt: skip
from usaf.errors import RunError, UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def raising(error: BaseException) -> Any:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("STEPS=0: must be at least 1"), 2, "error: STEPS=0: must be at least 1\n"),
        (RunError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_status(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_exit_status_of_success_is_the_commands_own() -> None:
    assert run_command(lambda: 0) == 0
    assert run_command(lambda: 130) == 130


OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.\nC++ trace"
    ),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_is_one_line_with_remedies(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error)) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.match(r"error: out of memory \(.+\); .*RESUME=auto .* lower MICROBATCH, .*TRAIN_FROM\n", line)


def test_out_of_memory_as_torch_says_it_on_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape"), ValueError("out of memory"), OSError(errno.EIO, "I/O"), AssertionError("x")],
    ids=repr,
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        run_command(raising(error))


@pytest.mark.skipif(os.name == "nt", reason="Windows kills at once")
def test_sigterm_ends_a_command_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleared = []

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleared.append(True)
        return 0

    assert run_command(command) == 130
    assert cleared == [True]
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_may_run_in_another_thread() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run_command(lambda: 7)))
    thread.start()
    thread.join()
    assert statuses == [7]


def test_characters_that_the_console_lacks_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="cp1252"))

    def command() -> int:
        say("C:\\模型\\é")
        return 0

    assert run_command(command) == 0
    assert buffer.getvalue().decode("cp1252").splitlines() == ["C:\\\\u6a21\\u578b\\é"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = "import sys\nfrom usaf.console import run_command, say\n" \
             "sys.exit(run_command(lambda: [say('x' * 999) for _ in range(999)] and 0))"  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1


def test_table() -> None:
    assert table([["perplexity", "1.0"], ["x", "12.25"]], ["", "before"]) == (
        "            before\n"
        "----------  ------\n"
        "perplexity     1.0\n"
        "x            12.25"
    )  # fmt: skip


def test_parser_errors_are_one_line_and_flags_are_never_abbreviated() -> None:
    parser = Parser("python -m usaf.x", "Does x.")
    parser.add_argument("--group-size", type=int)
    with pytest.raises(UserError, match=r"^python -m usaf\.x: unrecognized arguments: --group 3; see --help$"):
        parser.parse_args(["--group", "3"])
    with pytest.raises(UserError, match="argument --group-size: invalid int value: 'x'"):
        parser.parse_args(["--group-size", "x"])
    with pytest.raises(UserError, match="unrecognized arguments: a b; see"):
        parser.parse_args(["a\nb"])
    assert parser.parse_args(["--group-size", "3"]).group_size == 3


def test_late_bar_is_silent_until_there_is_work(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[tuple[str, float]] = []
    bar = LateBar("quantise", "expert", lambda name, seconds: ended.append((name, seconds)))
    assert capsys.readouterr() == ("", "")
    for finished in (1, 3):
        bar(finished, 4, "layer 0")
        assert ended == []
    bar(4, 4, "layer 1")
    assert [name for name, _ in ended] == ["quantise"]
    assert ended[0][1] >= 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "quantise" in err
    assert "4.00/4.00" in err


def test_a_phase_that_fails_tells_nobody_that_it_is_done() -> None:
    ended: list[str] = []
    with pytest.raises(ValueError, match="x"), phase("train", 3, "step", lambda name, _: ended.append(name)):
        raise ValueError("x")
    assert ended == []


def test_two_texts_side_by_side() -> None:
    shown = side_by_side(("base", "tuned"), ("one\n  two", "a" * 50), 90)
    assert shown.splitlines() == [
        f"{'base':<43} | tuned",
        f"{'-' * 43} | {'-' * 43}",
        f"{'one':<43} | {'a' * 43}",
        f"{'  two':<43} | {'a' * 7}",
    ]
    assert side_by_side(("base", "tuned"), ("one\n  two", "x"), 60) == "base\n----\none\n  two\n\ntuned\n-----\nx"


def test_texts_are_wrapped_at_spaces_by_what_a_terminal_shows() -> None:
    assert wrapped("aa bb cc", 5) == ["aa bb", "cc"]
    assert wrapped("aa bbb cc", 5) == ["aa", "bbb", "cc"]
    assert wrapped("abcdefg", 3) == ["abc", "def", "g"]
    assert wrapped("    indented\n\nx", 8) == ["    inde", "nted", "", "x"]
    assert wrapped("漢字漢字", 5) == ["漢字", "漢字"]
    assert all(cells_wide(line) <= 7 for line in wrapped("e\u0301té 漢字 and more of it " * 5, 7))
    assert "".join(wrapped("e\u0301té漢字" * 9, 7)) == "e\u0301té漢字" * 9


def test_control_characters_are_spelt_out() -> None:
    assert visible("a\x1b[31m\r\n\tb\u3000漢") == "a\\x1b[31m\\r\n\tb\u3000漢"


@pytest.mark.parametrize("command", ["usaf.quantize", "usaf.evaluate", "usaf.generate"])
def test_help_answers_without_loading_torch(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, "--help"],
        cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--json" in done.stdout
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)
