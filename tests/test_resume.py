"""A run that stops at any moment goes on with RESUME, and ends with the bits of the run that did not stop."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import write_checkpoint, write_tokens
from runs import (
    World,
    copy_run,
    curve,
    die_at,
    events,
    lasting,
    on_event,
    read_json,
    same_delta,
    signal_at_step,
    start,
    wait,
)

from usaf import job as job_module
from usaf.data import Rows
from usaf.loss import loss_sum
from usaf.prefix import BoundaryStates
from usaf.run import RunFolder, find_resumable, list_checkpoints, load_checkpoint
from usaf.trainer import StepResult, Trainer

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals to another process")


def assert_as_undisturbed(world: World, folder: Path) -> None:
    plain = world.finished("plain")
    assert same_delta(plain, folder)
    assert curve(folder) == curve(plain)
    assert lasting(read_json(folder / "summary.json")) == lasting(read_json(plain / "summary.json"))


def interrupted(world: World, monkeypatch: pytest.MonkeyPatch, tag: str, step: int, **changes: object) -> Path:
    """The folder of a run that SIGTERM stopped after `step`."""
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, step)
        assert world.train(tag, **changes) == 130
    return world.runs / tag


@pytest.fixture
def stopped(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run stopped after step 5, under a tag of the test's own."""
    if not (world.runs / "stopped").is_dir():
        interrupted(world, monkeypatch, "stopped", 5)
    return copy_run(world.runs / "stopped", world.runs / tmp_path.name)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def errors_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


# ---- Ctrl-C and SIGTERM ---------------------------------------------------------------------------------------------


# Steps 3 and 7 lie in capture windows, after 4 and 8 come reselection and evaluation, 12 is the last.
@pytest.mark.parametrize(
    ("number", "step"), [("SIGTERM", 1), ("SIGINT", 3), ("SIGTERM", 4), ("SIGINT", 6), ("SIGTERM", 7), ("SIGTERM", 12)]
)
def test_interrupted_and_resumed(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str, step: int
) -> None:
    tag = f"interrupted-{step}"
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.Signals[number], step)
        assert world.train(tag) == 130
    folder = world.runs / tag
    assert list_checkpoints(folder)[-1].name == f"step-{step:06d}"
    captured = load_checkpoint(list_checkpoints(folder)[-1]).about["captured"]
    assert any(captured.values()) == (step in (3, 7))
    assert not (folder / "summary.json").exists()
    assert f"go on with RESUME={folder}" in capsys.readouterr().out
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


def test_interrupted_at_every_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve processes, one step each."""
    for step in range(1, 13):
        with monkeypatch.context() as patch:
            signal_at_step(patch, signal.SIGTERM, step)
            assert world.train("every-step", RESUME="auto") == 130
    assert world.train("every-step", RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / "every-step")


def test_a_second_signal_stops_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        on_event(patch, lambda event, v: event == "step" and v["step"] == 5, twice)
        assert world.train("twice") == 130
    folder = world.runs / "twice"
    assert list_checkpoints(folder)[-1].name == "step-000004"
    assert world.train("twice", RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


@pytest.mark.parametrize(("signals", "save_every", "saved"), [(1, 3, 4), (2, 3, 4), (1, 100, 4), (2, 100, 0)])
def test_stopped_in_an_evaluation(
    world: World, monkeypatch: pytest.MonkeyPatch, signals: int, save_every: int, saved: int
) -> None:
    """The one after step 4, in its first chunk of two. The steps are on the disk before it, or once it is given up."""
    tag = f"evaluating-{signals}-{save_every}"
    chunks: list[Any] = []

    def interrupts(*args: Any) -> Any:
        chunks.append(args)
        if len(chunks) == 3:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        return loss_sum(*args)

    with monkeypatch.context() as patch:
        patch.setattr("usaf.evaluation.loss_sum", interrupts)
        assert world.train(tag, SAVE_EVERY=save_every) == 130
    folder = world.runs / tag
    assert len(chunks) == 3
    assert {event["step"] for event in events(folder, "eval")} == {0}
    assert list_checkpoints(folder)[-1].name == f"step-{saved:06d}"
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


@pytest.mark.parametrize("phase", ["load", "frozen prefix", "evaluate", "importance"])
def test_stopped_before_the_first_step(world: World, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """At once, and without a checkpoint: what RESUME goes on with is the beginning."""
    tag = f"early-{phase.replace(' ', '-')}"
    changes = {"PREFIX_CACHE_DIR": world.root / tag}
    with monkeypatch.context() as patch:
        on_event(
            patch, lambda event, v: event == "phase" and v["name"] == phase, lambda: signal.raise_signal(signal.SIGTERM)
        )  # fmt: skip
        assert world.train(tag, **changes) == 130
    assert list_checkpoints(world.runs / tag) == []
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / tag)


def test_stopped_while_the_end_is_evaluated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        on_event(
            patch, lambda event, v: event == "eval" and v["step"] == 12, lambda: signal.raise_signal(signal.SIGTERM)
        )  # fmt: skip
        assert world.train("at-the-end") == 130
    assert world.train("at-the-end", RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / "at-the-end")


def _slow_steps(seconds: float) -> None:
    train_step = Trainer.train_step

    def slow(self: Trainer) -> StepResult:
        time.sleep(seconds)
        return train_step(self)

    Trainer.train_step = slow  # type: ignore[method-assign]


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_from_outside(world: World, tmp_path: Path, number: signal.Signals) -> None:
    tag = f"outside-{number.name}"
    folder = world.runs / tag
    process = start(world.environ(tag), tmp_path / "log", _slow_steps, [0.3])
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or not events_so_far(folder):
        assert time.monotonic() < deadline
        assert process.is_alive(), (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert wait(process) == 130, (tmp_path / "log").read_text(encoding="utf-8")
    assert not (folder / "summary.json").exists()
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


def events_so_far(folder: Path) -> bool:
    """Whether a step was logged, by a process that may be writing the next line."""
    return '"event": "step"' in (folder / "metrics.jsonl").read_text(encoding="utf-8")


# ---- which run goes on, and with which settings ---------------------------------------------------------------------


def test_resume_by_folder(world: World, stopped: Path) -> None:
    assert world.train(None, RESUME=stopped) == 0
    assert_as_undisturbed(world, stopped)


def test_a_resumed_run_keeps_its_own_settings(world: World, stopped: Path) -> None:
    """Nothing but the folder needs to be said."""
    from usaf.train import main

    assert main(["--resume", str(stopped)], {}) == 0
    assert_as_undisturbed(world, stopped)


@pytest.mark.parametrize(
    "changes",
    [{"SAVE_EVERY": "1"}, {"EVAL_EVERY": "6"}, {"USE_RESIDENT": "0"}, {"USE_RESIDENT": "1"}, {"USE_FROZEN_CACHE": "0"},
     {"KEEP_CHECKPOINTS": "1"}],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)  # fmt: skip
def test_settings_that_shape_no_result_may_change(world: World, stopped: Path, changes: dict[str, str]) -> None:
    assert world.train(None, RESUME=stopped, **changes) == 0
    assert same_delta(world.finished("plain"), stopped)
    saved = read_json(stopped / "settings.json")["settings"]
    for name, value in changes.items():
        assert str(saved[name]["value"]).lower() in (value, str(value == "1").lower())


@pytest.mark.parametrize(
    ("name", "value"),
    [("SEED", "1"), ("STEPS", "13"), ("LR_PEAK", "1e-3"), ("FRAC", "0.06"), ("MICROBATCH", "1"), ("ACCUM", "2"),
     ("RESELECT_EVERY", "6"), ("TRAIN_FROM", "1"), ("GRAD_CLIP", "0.5"), ("CACHE_DTYPE", "fp32"),
     ("IMPORTANCE_SAMPLES", "4"), ("EVAL_SAMPLES", "3"), ("CPU_THREADS", "1"), ("PREFIX_CHUNK_TOKENS", "50")],
)  # fmt: skip
def test_settings_that_shape_the_result_are_refused_by_name(
    world: World, stopped: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    before = contents(stopped)
    assert world.train(None, RESUME=stopped, **{name: value}) == 2
    error = errors_of(capsys)
    assert f"{name}: was" in error
    assert str(stopped) in error
    assert contents(stopped) == before


def test_auto_with_nothing_to_resume_begins(world: World, tmp_path: Path) -> None:
    assert world.train("anew", RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / "anew")
    assert world.train(None, RESUME="auto", OUTPUT_DIR=tmp_path / "empty", STEPS="1") == 0
    assert len([p for p in (tmp_path / "empty").iterdir() if p.name != "cache"]) == 1


def test_auto_takes_the_newest_unfinished_run(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = {"OUTPUT_DIR": tmp_path / "runs"}
    assert world.train("done", **place) == 0
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 5)
        assert world.train("open", **place) == 130
    assert world.train(None, RESUME="auto", **place) == 0
    assert_as_undisturbed(world, tmp_path / "runs" / "open")
    assert not [p for p in (tmp_path / "runs").iterdir() if p.name not in ("done", "open", "cache")]


def test_a_finished_run_can_be_resumed(world: World, tmp_path: Path) -> None:
    folder = copy_run(world.finished("plain"), world.runs / tmp_path.name)
    assert world.train(None, RESUME=folder) == 0
    assert_as_undisturbed(world, folder)


def test_finishing_again_computes_nothing_for_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache is gone, and only evaluation needs one."""
    folder = copy_run(world.finished("plain"), world.runs / tmp_path.name)
    computed: list[Rows] = []
    compute = BoundaryStates._compute
    monkeypatch.setattr(BoundaryStates, "_compute", lambda self, *a: (computed.append(self.rows), compute(self, *a))[1])
    assert world.train(None, RESUME=folder, PREFIX_CACHE_DIR=tmp_path / "cache") == 0
    assert_as_undisturbed(world, folder)
    longest = max(len(rows) for rows in computed)
    assert 0 < longest < 24


def test_a_run_interrupted_while_it_is_finished_again_is_unfinished(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its summary would be of another result."""
    folder = tmp_path / "runs" / "again"
    copy_run(world.finished("plain"), folder)
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "summarise", lambda *_: signal.raise_signal(signal.SIGINT))
        assert world.train(None, RESUME=folder, DELTA_SCALE="0.5") == 130
    assert not (folder / "summary.json").exists()
    assert find_resumable(folder.parent, None) == folder
    assert world.train(None, RESUME="auto", OUTPUT_DIR=folder.parent) == 0
    assert read_json(folder / "summary.json")["delta_scale"] == 0.5


def test_totals_go_on(world: World, stopped: Path) -> None:
    before = load_checkpoint(list_checkpoints(stopped)[-1]).about["totals"]
    assert world.train(None, RESUME=stopped) == 0
    summary = read_json(stopped / "summary.json")
    assert summary["seconds_total"] > before["seconds"]
    assert summary["phase_seconds"]["importance"] == round(before["phase_seconds"]["importance"], 3)
    assert summary["phase_seconds"]["load"] > round(before["phase_seconds"]["load"], 3)
    assert summary["peak_memory_bytes"] >= before["peak_private_bytes"] > 0
    after = load_checkpoint(list_checkpoints(stopped)[-1]).about["totals"]
    assert after["tokens"] == 12 * 48


def test_a_tag_that_is_taken_is_refused_without_resume(
    world: World, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(stopped)
    assert world.train(stopped.name) == 2
    error = errors_of(capsys)
    assert f"RUN_TAG={stopped.name}" in error
    assert f"RESUME={stopped}" in error
    assert contents(stopped) == before


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_two_runs_in_one_folder(world: World, stopped: Path, capsys: pytest.CaptureFixture[str], resume: bool) -> None:
    folder = stopped if resume else world.runs / f"{stopped.name}-new"
    first = RunFolder(folder)
    before = contents(folder)
    try:
        assert world.train(folder.name, RESUME="auto" if resume else None) == 2
    finally:
        first.close()
    assert "another run is using this folder" in errors_of(capsys)
    assert contents(folder) == before
    assert world.train(folder.name, RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


# ---- what it began with is no longer there --------------------------------------------------------------------------


@pytest.fixture
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world of its own, to be damaged, with a run stopped after step 2."""
    own = World(tmp_path)
    interrupted(own, monkeypatch, "run", 2)
    return own


@pytest.mark.parametrize("which", ["data", "heldout"])
def test_changed_data_is_refused(own_world: World, capsys: pytest.CaptureFixture[str], which: str) -> None:
    path = own_world.data if which == "data" else own_world.other
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):  # whichever lines are trained on
        sample = json.loads(line)
        sample["input_ids"][3] = sample["labels"][3] = 5
        lines[i] = json.dumps(sample)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = contents(own_world.runs / "run")
    assert own_world.train("run", RESUME="auto") == 2
    assert "the data is no longer what this run began with" in errors_of(capsys)
    assert contents(own_world.runs / "run") == before


@pytest.mark.parametrize("with_quantised", [False, True], ids=["weights", "weights-and-4-bit-file"])
def test_a_changed_model_is_refused(own_world: World, capsys: pytest.CaptureFixture[str], with_quantised: bool) -> None:
    write_checkpoint(own_world.model, seed=9)
    if with_quantised:
        (own_world.model / "experts_q4.safetensors").unlink()
    before = contents(own_world.runs / "run")
    assert own_world.train("run", RESUME="auto") == 2
    expected = "the model is no longer what this run began with" if with_quantised else "was made from other weights"
    assert expected in errors_of(capsys)
    assert contents(own_world.runs / "run") == before


def test_more_data_at_the_end_is_other_data(own_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(own_world.data, samples=60)
    assert own_world.train("run", RESUME="auto") == 2
    assert "the data is no longer" in errors_of(capsys)


# ---- full disk, no memory -------------------------------------------------------------------------------------------


def test_disk_full_while_saving(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third checkpoint finds no room: it is absent, those before it are whole, and the run goes on from them."""
    save, calls = RunFolder._write_state, []

    def full(self: RunFolder, folder: Path, state: Any) -> None:
        calls.append(folder)
        save(self, folder, state)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_write_state", full)
        assert world.train("full") == 1
    error = errors_of(capsys)
    assert os.strerror(errno.ENOSPC) in error
    assert "RESUME=auto" in error
    folder = world.runs / "full"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000000", "step-000004"]
    assert world.train("full", RESUME="auto") == 0
    assert_as_undisturbed(world, folder)


def _limit_files(limit_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@POSIX
def test_files_that_cannot_grow(world: World, tmp_path: Path) -> None:
    """The system's own refusal of a file above a limit that checkpoints pass."""
    world.finished("plain")
    tag = "cannot-grow"
    process = start(world.environ(tag), tmp_path / "log", _limit_files, [100_000])
    assert wait(process) in (1, 2)
    text = (tmp_path / "log").read_text(encoding="utf-8").replace("\r", "\n")
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if "error: " in line]) == 1, text
    assert not list(world.runs.rglob(".partial-*"))
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / tag)


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("error", [RuntimeError(ALLOCATOR), MemoryError()], ids=["torch", "python"])
def test_out_of_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    train_step = Trainer.train_step

    def fails(self: Trainer) -> StepResult:
        if self.step == 5:
            raise error
        return train_step(self)

    tag = f"memory-{type(error).__name__}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fails)
        assert world.train(tag) == 1
    line = errors_of(capsys)
    assert "out of memory" in line
    assert "MICROBATCH" in line
    assert "RESUME=auto" in line
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / tag)


def test_a_fault_of_ours_is_not_hidden(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Trainer) -> StepResult:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "train_step", fails)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        world.train("fault")


# ---- killed ---------------------------------------------------------------------------------------------------------


def killed_until_finished(world: World, tag: str, log: Path, counts: list[int], **changes: object) -> int:
    """Processes that die at the given file operations, one after the other, then one that lives. Returns the deaths."""
    for deaths, count in enumerate([*counts, sys.maxsize]):
        process = start(world.environ(tag, RESUME="auto", **changes), log, die_at, [str(world.root), count])
        status = wait(process)
        if status == 0:
            return deaths
        assert status < 0, log.read_text(encoding="utf-8")
    raise AssertionError("the last process was not to die")


@POSIX
def test_killed_twice(world: World, tmp_path: Path) -> None:
    """Once in the middle of a save (a state is written, not yet renamed), once somewhere in what follows."""
    world.finished("plain")
    counts = [random.Random(5).randrange(25, 60), random.Random(6).randrange(30, 60)]
    deaths = killed_until_finished(world, "killed", tmp_path / "log", counts)
    assert deaths == 2
    assert_as_undisturbed(world, world.runs / "killed")


@POSIX
@pytest.mark.slow
def test_killed_before_every_operation_on_a_file(world: World, tmp_path: Path) -> None:
    """SAVE_EVERY=1: most of them belong to saving. Each time a fresh run, killed once, ends as if nothing had been."""
    plain = world.finished("plain-1", SAVE_EVERY="1")
    for count in range(1, 10_000):
        tag = f"killed-at-{count}"
        environ = world.environ(tag, SAVE_EVERY="1")
        status = wait(start(environ, tmp_path / "log", die_at, [str(world.runs / tag), count]))
        if status != 0:
            assert status < 0, (tmp_path / "log").read_text(encoding="utf-8")
            assert world.train(tag, SAVE_EVERY="1", RESUME="auto") == 0, count
        assert same_delta(plain, world.runs / tag), count
        assert curve(world.runs / tag) == curve(plain), count
        if status == 0:
            assert count > 100
            return


@POSIX
@pytest.mark.slow
def test_killed_while_the_model_is_quantised_and_cached(tmp_path: Path) -> None:
    plain = World(tmp_path / "plain").finished("run")
    rng = random.Random(0)
    for round_number in range(6):
        world = World(tmp_path / str(round_number))
        counts = [rng.randrange(1, 25) for _ in range(4)]
        assert killed_until_finished(world, "run", tmp_path / "log", counts) >= 1
        assert same_delta(plain, world.runs / "run")
        assert not [p for p in world.root.rglob("*.partial") if "q4" in p.name]


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_times(world: World, tmp_path: Path, seed: int) -> None:
    world.finished("plain")
    rng = random.Random(seed)
    tag = f"random-{seed}"
    for _ in range(40):
        process = start(world.environ(tag, RESUME="auto"), tmp_path / "log", _slow_steps, [0.02])
        process.join(rng.uniform(0.1, 1.5))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        status = wait(process)
        if status == 0:
            break
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text(encoding="utf-8")
    assert world.train(tag, RESUME="auto") == 0
    assert_as_undisturbed(world, world.runs / tag)


# ---- moved, or on another device ------------------------------------------------------------------------------------


def test_data_that_moved_unchanged_goes_on(own_world: World) -> None:
    """Its content is what counts, not its path."""
    moved = own_world.data.rename(own_world.root / "elsewhere.jsonl")
    assert own_world.train("run", RESUME="auto", DATASET_PATH=moved) == 0
    assert (own_world.runs / "run" / "summary.json").is_file()


@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("compute", "bfloat16")])
def test_another_device_is_refused(own_world: World, capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    for state in (own_world.runs / "run" / "checkpoints").glob("*/state.json"):
        about = read_json(state)
        about["decisions"][name] = value
        state.write_text(json.dumps(about), encoding="utf-8")
    before = contents(own_world.runs / "run")
    assert own_world.train("run", RESUME="auto") == 2
    error = errors_of(capsys)
    assert value in error
    assert "would go on on cpu in float32" in error
    assert contents(own_world.runs / "run") == before


def test_without_a_checkpoint_rates_are_measured_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were for the old settings. One that is given now is not measured."""
    unset: dict[str, object] = {"LR_PEAK": None, "STEPS": 2}
    with monkeypatch.context() as patch:
        on_event(
            patch, lambda event, v: event == "learning_rate" and v["name"] == "HEAD_LR",
            lambda: signal.raise_signal(signal.SIGTERM),
        )  # fmt: skip
        assert world.train("old-rates", **unset, FRAC="0.02") == 130
    folder = world.runs / "old-rates"
    assert list_checkpoints(folder) == []
    assert world.train("new-rates", **unset, FRAC="0.2") == 0
    assert world.train("old-rates", **unset, FRAC="0.2", RESUME="auto") == 0
    assert same_delta(world.runs / "new-rates", folder)
    told = [
        [(e["name"], e["rate"]) for e in events(run, "learning_rate")] for run in (world.runs / "new-rates", folder)
    ]
    assert told[0] == told[1]
    assert [name for name, _ in told[0]] == ["LR_PEAK", "HEAD_LR"]
    settings = read_json(folder / "settings.json")["settings"]
    assert settings["HEAD_LR"] == {"value": told[0][1][1], "source": "measured"}
    for step in list_checkpoints(folder):
        shutil.rmtree(step)
    assert world.train("old-rates", STEPS=None, LR_PEAK=None, HEAD_LR="1e-3", RESUME="auto") == 0
    assert [e["name"] for e in events(folder, "learning_rate")] == ["LR_PEAK"]
    assert read_json(folder / "settings.json")["settings"]["HEAD_LR"] == {"value": 1e-3, "source": "environment"}


def test_without_a_checkpoint_settings_may_change(own_world: World) -> None:
    """Out of memory in importance: lower the setting it names and go on."""
    shutil.rmtree(own_world.runs / "run" / "checkpoints")
    assert own_world.train("run", RESUME="auto", IMPORTANCE_SAMPLES="2") == 0
    assert read_json(own_world.runs / "run" / "settings.json")["settings"]["IMPORTANCE_SAMPLES"]["value"] == 2
