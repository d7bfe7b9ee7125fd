"""scripts/check_plan.py: the plan is that of the run, and what a run's events do not say is not said."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import World, copy_run, events, read_json

from usaf import plan_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import check_plan
from check_plan import Line, Planned, Run, main, moments, plan_run, prefix_share, read_run

GB = 10**9


@pytest.fixture(scope="module")
def folder(world: World) -> Path:
    """Of a run that planned itself: 12 steps with reselections after 4 and 8, evaluated there and before and after."""
    return world.finished("checked", MEMORY_LIMIT="100GB")


# ---- what a run measured --------------------------------------------------------------------------------------------


def phase(name: str, seconds: float, peak: int) -> dict[str, Any]:
    return {"event": "phase", "time": 0.0, "name": name, "seconds": seconds, "peak_memory_bytes": peak}


def step(number: int, time: float, peak: int) -> dict[str, Any]:
    return {"event": "step", "time": time, "step": number, "tokens": 10, "tokens_per_second": 5.0,
            "peak_memory_bytes": peak}  # fmt: skip


def test_only_what_raises_the_maximum_is_known() -> None:
    found = moments([
        phase("quantise", 3.0, 5), phase("load", 1.0, 5), phase("frozen prefix", 9.0, 8), phase("evaluate", 2.0, 8),
        phase("importance", 4.0, 20), {"event": "save", "time": 0.0, "step": 0}, step(1, 10.0, 20), step(2, 12.0, 21),
        phase("evaluate", 2.5, 30), phase("train", 99.0, 30), phase("evaluate", 2.5, 30),
    ])  # fmt: skip
    known = {name: (m.own_bytes, m.bound_bytes) for name, m in found.items() if m.bound_bytes}
    assert known == {
        "load": (5, 5), "frozen prefix": (8, 8), "evaluate before": (0, 8), "importance": (20, 20),
        "steps": (21, 30), "evaluate": (30, 30),
    }  # fmt: skip
    assert {name: m.seconds for name, m in found.items() if m.seconds} == {
        "quantise": [3.0], "load": [1.0], "frozen prefix": [9.0], "evaluate before": [2.0], "importance": [4.0],
        "steps": [2.0, 2.0], "evaluate": [2.5, 2.5],
    }  # fmt: skip
    assert (found["checkpoints"].times, found["quantise"].times) == (1, 1)


def test_each_process_has_a_maximum_of_its_own() -> None:
    found = moments([phase("load", 1.0, 50), step(1, 2.0, 50), phase("load", 1.0, 7), step(2, 5.0, 9)])
    assert (found["load"].times, found["load"].own_bytes) == (2, 50)
    assert (found["steps"].own_bytes, found["steps"].bound_bytes) == (9, 50)


def test_a_reselection_takes_what_passes_beside_its_step() -> None:
    """Each step takes 2 s. After a save the time is not its own; a warning comes between a step and its line."""
    found = moments([
        phase("load", 1.0, 5), step(1, 10.0, 5), {"event": "warning", "time": 14.9, "step": 2}, step(2, 15.0, 6),
        {"event": "reselect", "time": 15.0, "step": 2}, step(3, 17.0, 6), {"event": "save", "time": 17.0, "step": 3},
        step(4, 23.0, 6), {"event": "reselect", "time": 23.0, "step": 4},
    ])  # fmt: skip
    assert found["reselections"].seconds == [pytest.approx(3.0)]
    assert found["reselections"].times == 2
    assert (found["reselections"].own_bytes, found["reselections"].bound_bytes) == (6, 6)
    assert len(found["steps"].seconds) == 4


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "most", "said", "ratio", "within"), [
    (10, 10, "10.00", "1.00", True), (11, 11, "11.00", "1.10", True), (12, 12, "12.00", "1.20", False),
    (8, 8, "8.00", "0.80", False), (0, 10, "at most 10.00", "at most 1.00", None),
    (0, 8, "at most 8.00", "at most 0.80", False), (9, 11, "9.00 to 11.00", "0.90 to 1.10", True),
    (9, 20, "9.00 to 20.00", "0.90 to 2.00", None), (12, 20, "12.00 to 20.00", "1.20 to 2.00", False),
])  # fmt: skip
def test_memory_is_judged_by_what_is_known(least: int, most: int, said: str, ratio: str, within: bool | None) -> None:
    line = Line("x", 1, 10 * GB, least * GB, most * GB, None, None)
    assert line.cells()[2:6] == ["10.00", said, ratio, {None: "-", True: "yes", False: "NO"}[within]]
    assert line.memory_within is within
    assert line.cells()[6:] == ["-"] * 4
    assert check_plan.within([line]) is (within is not False)


@pytest.mark.parametrize(("measured", "within"), [(1.0, True), (1.29, True), (1.4, False), (0.6, False)])
def test_time_is_judged(measured: float, within: bool) -> None:
    line = Line("x", 1, None, 0, None, 1.0, measured)
    assert line.seconds_within is within
    assert line.cells()[2:] == ["-", "-", "-", "-", "1.00", f"{measured:.2f}", f"{measured:.2f}",
                                "yes" if within else "NO"]  # fmt: skip
    assert check_plan.within([line]) is within


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_the_plan_is_that_of_the_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The run said its own; the two differ by what the process holds beside the model."""
    folder = world.finished("said", MEMORY_LIMIT="100GB", USE_RESIDENT="0")
    said = float(capsys.readouterr().out.split("memory: at most ")[1].split(" ")[0])
    planned = plan_run(read_run(folder), measured=False)
    assert planned.memory.peak_bytes / GB == pytest.approx(said, rel=0.1)
    assert planned.work.train_tokens % 24 == 0  # rows of 24 tokens, as they are, not of SEQ_LEN
    assert planned.work.train_row == planned.work.eval_row == 24
    assert (planned.work.capture_steps, planned.work.importance_rows) == (2, 8)
    assert planned.seconds is None
    assert planned.notes == []


def test_decisions_of_the_run_are_planned_for(folder: Path) -> None:
    run = read_run(folder)
    run.stored["decisions"] |= {"stretch_bytes": 4 << 20, "mapped_buffers": ["captured"], "resident": True}
    planned = plan_run(run, measured=False)
    assert (planned.work.stretch_bytes, planned.work.spilled) == (4 << 20, {"captured"})
    assert planned.work.resident
    assert planned.memory.always["resident experts"] > 0
    del run.stored["decisions"]["stretch_bytes"], run.stored["decisions"]["mapped_buffers"]  # no MEMORY_LIMIT
    run.stored["decisions"]["resident"] = False
    plain = plan_run(run, measured=False)
    assert plain.work == dataclasses.replace(planned.work, stretch_bytes=512 << 20, spilled=frozenset(), resident=False)


def test_every_phase_is_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_time, "FILE_BYTES", 1 << 22)
    monkeypatch.setattr(plan_time, "ROWS", (1, 16))
    assert main(["--run", str(folder), "--json", str(tmp_path / "check.json")]) == 0
    found = read_json(tmp_path / "check.json")
    lines = {line["name"]: line for line in found["lines"]}
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in lines)
    saves = len(events(folder, "save"))
    assert {name: line["times"] for name, line in lines.items() if name not in ("quantise", "frozen prefix")} == {
        "load": 1, "evaluate before": 1, "importance": 1, "learning rates": 1, "steps": 12, "reselections": 2,
        "delta scale": 1, "evaluate": 3,
        "checkpoints": saves, "whole run": 1,
    }  # fmt: skip
    timed = [line for name, line in lines.items() if name not in ("load", "whole run")]
    assert all(line["planned_seconds"] > 0 and line["measured_seconds"] > 0 for line in timed)
    assert lines["whole run"]["planned_seconds"] == pytest.approx(sum(line["planned_seconds"] for line in timed))
    summary = read_json(folder / "summary.json")
    assert lines["whole run"]["measured_seconds"] == summary["seconds_total"]
    assert lines["whole run"]["least_bytes"] == lines["whole run"]["most_bytes"] == summary["peak_memory_bytes"]
    highest = max(phase["peak_memory_bytes"] for phase in found["phases"])
    assert lines["whole run"]["planned_bytes"] == highest
    inside = lines["steps"]["measured_seconds"] + lines["reselections"]["measured_seconds"]
    assert inside < summary["phase_seconds"]["train"] + 0.02  # events' times are in whole milliseconds
    assert found["measured_tokens_per_second"] == summary["tokens_per_second"]
    assert found["planned_tokens_per_second"] == pytest.approx(12 * 48 / lines["steps"]["planned_seconds"])


def test_strict_alone_has_a_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_plan, "MEMORY_TOLERANCE", 1e6)
    assert main(["--run", str(folder), "--no-times", "--strict"]) == 0
    monkeypatch.setattr(check_plan, "MEMORY_TOLERANCE", -1)
    assert main(["--run", str(folder), "--no-times"]) == 0
    assert main(["--run", str(folder), "--no-times", "--strict"]) == 1


def test_other_data_are_told(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copy_run(folder, world.runs / "other-data")
    stored = read_json(copy / "settings.json")
    stored["settings"]["DATASET_PATH"]["value"] = str(world.other)
    stored["device"]["description"] = "another machine"
    (copy / "settings.json").write_text(json.dumps(stored), encoding="utf-8")
    assert main(["--run", str(copy), "--no-times"]) == 0
    out = capsys.readouterr().out
    assert "the data are no longer those of the run" in out
    assert "the run was made on another machine, and this is " in out


def test_a_prefix_that_was_cached_in_part() -> None:
    def share(computed_per_second: float | None) -> float:
        run = Run(Path(), SimpleNamespace(), {}, [phase("frozen prefix", 2.0, 1)],  # type: ignore[arg-type]
                  {"prefix_tokens_per_second": computed_per_second})  # fmt: skip
        work: Any = SimpleNamespace(train_tokens=80, eval_tokens=20)
        return prefix_share(run, work)

    assert share(25.0) == 0.5
    assert share(49.5) == share(51.0) == 1.0
    assert share(None) == 0.0


def test_a_run_on_a_gpu_has_no_planned_times(folder: Path) -> None:
    run = read_run(folder)
    run.stored["decisions"]["device"] = run.stored["device"]["name"] = "cuda"
    planned: Planned = plan_run(run, measured=True)
    assert planned.seconds is None
    assert planned.work.on_device
    assert "the run was made on cuda, for which no times are planned" in planned.notes


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = copy_run(folder, world.runs / "unfinished")
    (unfinished / "summary.json").unlink()
    torn = copy_run(folder, world.runs / "torn")
    (torn / "metrics.jsonl").write_text('{"event": "pha', encoding="utf-8")
    for arguments, said in (
        (["--run", str(world.root / "none")], "give the folder of a run"), (["--run", str(unfinished)], "summary.json"),
        (["--run", str(torn)], "metrics.jsonl cannot be read"), ([], "--run"),
        (["--run", str(folder), "--json", "/"], "--json"),
    ):  # fmt: skip
        assert main(arguments) == 2
        err = capsys.readouterr().err.strip()
        assert len(err.splitlines()) == 1
        assert said in err
