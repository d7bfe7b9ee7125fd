"""How good a plan is: what `usaf.plan` says of a finished run, phase by phase, beside what the run measured.

    python scripts/check_plan.py --run runs/TAG
    python scripts/check_plan.py --run runs/TAG --no-times --strict --json check.json

The plan is made anew from the run's own settings and decisions (threads, stretch, buffers in mapped files, resident
copies) and from the rows that it read, by the functions that plan a run for its MEMORY_LIMIT. Model and data must still
be where the run found them. Planned seconds come from a few that are measured now: on the run's machine, with nothing
else at work on it, or they compare nothing.

    measured GB   metrics.jsonl has the highest private memory of the run up to each event. What a phase itself reached
                  is known only where it raised that; else there is a bound, and the table says "at most". The whole
                  run's peak is always known. A phase counts with what follows it and logs no memory of its own: a
                  checkpoint, the delta. The first phase counts with what went before it: imports, data.
    measured s    of a reselection: what passes between two steps beside the second step. Those that share that time
                  with a checkpoint are not counted.
    ratio         measured / planned: above 1, the plan was too low

Every figure is for as many steps, evaluations and so on as the run logged. Left out: times of runs on a GPU, which
`plan_time` does not plan, and peaks shorter than the 0.05 s between two samples of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import benchmark

from usaf.console import Parser, add_json_flag, run_command, say, table
from usaf.errors import UserError
from usaf.files import require_writable

if TYPE_CHECKING:
    from usaf.budget import MemoryPlan, Work
    from usaf.model_shape import ModelShape
    from usaf.session import Session
    from usaf.settings import ResolvedSettings

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.30
WHOLE_SHARE = 0.98  # of the prefix's tokens: less, and a part came from an earlier run's cache
ROWS = {
    "quantise": ((), "quantise"), "load": (("load",), None), "frozen prefix": (("prefix",), "prefix"),
    "evaluate before": (("evaluate before",), "evaluations"), "importance": (("importance",), "importance"),
    "learning rates": (("learning rates",), "learning rates"),
    "steps": (("step", "checkpoint"), "steps"), "reselections": (("step", "reselection"), "reselections"),
    "delta scale": (("delta scale",), "delta scale"),
    "evaluate": (("evaluate", "checkpoint"), "evaluations"), "checkpoints": ((), "checkpoints"),
}  # fmt: skip
"""Row of the table -> the phases of the memory plan that it stands for, up to a comma in their names; that of times."""


# ---- what the run measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The files of a finished run."""

    folder: Path
    settings: ResolvedSettings
    stored: dict[str, Any]  # settings.json
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def measured_scale(self) -> bool:
        """Of DELTA_SCALE; where the data have no sequences for it, nothing is measured."""
        return any(event["event"] == "delta_scale" and event["sequences"] for event in self.events)


def read_run(folder: Path) -> Run:
    from usaf.run import read_settings
    from usaf.settings import ResolvedSettings

    stored = read_settings(folder)
    if not (folder / "summary.json").is_file():
        raise UserError(f"--run {folder}: has no summary.json; a run is checked when it is finished: go on with "
                        f"RESUME={folder}")  # fmt: skip
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--run {folder}: summary.json or metrics.jsonl cannot be read ({error}); give the folder as "
                        "the run left it") from None  # fmt: skip
    return Run(folder, ResolvedSettings.from_json(stored["settings"]), stored, events, summary)


@dataclass
class Moments:
    """What the events of a run say of one row. own: the highest maximum that it raised itself; bound: the highest that
    it did not pass; times: how often there was one; seconds: of those whose time is known."""

    own_bytes: int = 0
    bound_bytes: int = 0
    times: int = 0
    seconds: list[float] = field(default_factory=list)


def moments(events: Sequence[dict[str, Any]]) -> dict[str, Moments]:
    """By row. In a run that was resumed each process has a maximum of its own, which begins with its model."""
    found: dict[str, Moments] = {name: Moments() for name in ROWS}
    reselected = {event["step"] for event in events if event["event"] == "reselect"}
    peak, stepped = 0, False
    before: dict[str, Any] = {}
    for event in events:
        if event["event"] in ("phase", "step"):
            begins = event.get("name") in ("quantise", "load") and before.get("name") != "quantise"
            peak = 0 if begins else peak
            stepped |= event["event"] == "step"
            raised = event["peak_memory_bytes"] if event["peak_memory_bytes"] > peak else 0
            peak = event["peak_memory_bytes"]
            memory = found[memory_row(event, stepped, reselected)]
            memory.own_bytes, memory.bound_bytes = max(memory.own_bytes, raised), max(memory.bound_bytes, peak)
            add_seconds(found, event, before, stepped, reselected)
        if event["event"] != "warning":  # that of a skipped step comes before the step's own line
            before = event
    found["checkpoints"].times = sum(event["event"] == "save" for event in events)
    return found


def memory_row(event: dict[str, Any], stepped: bool, reselected: set[int]) -> str:
    """The row whose memory an event tells: all that passed since the event before it."""
    if event["event"] == "step":
        return "reselections" if event["step"] in reselected else "steps"
    if event["name"] == "evaluate":
        return "evaluate" if stepped else "evaluate before"
    # The time of quantising is told when the model is there too; what follows the last step is its checkpoint.
    return {"quantise": "load", "train": "steps"}.get(event["name"], event["name"])


def add_seconds(
    found: dict[str, Moments], event: dict[str, Any], before: dict[str, Any], stepped: bool, reselected: set[int]
) -> None:
    if event["event"] == "phase":
        if event["name"] != "train":  # it holds steps, reselections, evaluations and checkpoints
            row = event["name"] if event["name"] == "quantise" else memory_row(event, stepped, reselected)
            found[row].times += 1
            found[row].seconds.append(event["seconds"])
        return
    seconds = event["tokens"] / event["tokens_per_second"]
    found["steps"].times += 1
    found["steps"].seconds.append(seconds)
    if event["step"] in reselected:
        found["reselections"].times += 1
        if before.get("event") in ("step", "eval"):
            found["reselections"].seconds.append(max(0.0, event["time"] - before["time"] - seconds))


# ---- what would have been planned -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """seconds: of one of each kind, by the name of the plan; None where times are not planned."""

    work: Work
    memory: MemoryPlan
    seconds: dict[str, float] | None
    notes: list[str]


def plan_run(run: Run, measured: bool) -> Planned:
    """The plan of a run from what it stored and what it read; measured: times too, which takes some seconds."""
    from usaf.budget import memory_plan
    from usaf.memory import private_bytes, return_freed
    from usaf.memory_limit import masked, work_of_run
    from usaf.model_shape import shape_of_checkpoint
    from usaf.prefix import STRETCH_BYTES
    from usaf.session import prepare

    chosen = run.stored["decisions"]
    on_device = chosen["device"] != "cpu"
    settings = run.settings.replace("run", memory_limit=None)  # what it chose is stored; it would be planned for again
    session = prepare(settings, dict(chosen))
    return_freed()
    baseline = private_bytes()
    shape = shape_of_checkpoint(
        session.checkpoint, settings.values.group_size, settings.values.quant_bits, masked(session.data)
    )
    quantises = any(event.get("name") == "quantise" for event in run.events)
    work = dataclasses.replace(
        work_of_run(session.settings, session.data, chosen["threads"], quantises, on_device),
        resident=bool(chosen["resident"]), stretch_bytes=chosen.get("stretch_bytes") or STRETCH_BYTES,
        spilled=frozenset(chosen.get("mapped_buffers", ())),
        measured_rates=sum(event["event"] == "learning_rate" for event in run.events),
        delta_scale=None if run.measured_scale else session.settings.values.delta_scale,
    )  # fmt: skip
    memory = memory_plan(shape, work, baseline)
    seconds = plan_seconds(session, shape, work) if measured and not on_device else None
    return Planned(work, memory, seconds, differences(run, session, work, measured))


def plan_seconds(session: Session, shape: ModelShape, work: Work) -> dict[str, float]:
    from usaf.plan_time import measure, time_plan
    from usaf.session import cache_folder

    say("measuring this machine for a few seconds ...")
    files = [path for path in session.checkpoint.folder.glob("*.safetensors") if path.stat().st_size > 1 << 28]
    folder = cache_folder(session.settings.values)
    rates = measure(session.checkpoint.model, shape, work, folder, max(files, default=None))
    return {time.name: time.each for time in time_plan(shape, rates, work, 1, 1, 1, 1)}


def differences(run: Run, session: Session, work: Work, times: bool) -> list[str]:
    """What stands between plan and run, beside errors of the plan."""
    notes = []
    if session.data_fingerprint != run.stored["data_fingerprint"]:
        notes.append("the data are no longer those of the run: rows may be more or longer")
    device = run.stored["device"]
    if session.backend.description != device["description"]:
        notes.append(f"the run was made on {device['description']}, and this is {session.backend.description}")
    if times and work.on_device:
        notes.append(f"the run was made on {device['name']}, for which no times are planned")
    if times and work.resident and not work.on_device:
        notes.append("the run kept decoded copies of its experts; planned times decode them in every product")
    if run.settings.values.memory_limit is None:
        notes.append("the run had no MEMORY_LIMIT: its allocator may have kept what was freed, which is not planned")
    loads = sum(event.get("name") == "load" for event in run.events)
    if loads > 1:
        notes.append(f"the run was made by {loads} processes")
    return notes


# ---- both -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row of the table. Memory was measured from `least_bytes` to `most_bytes`, the same where it is known."""

    name: str
    times: int
    planned_bytes: int | None
    least_bytes: int
    most_bytes: int | None
    planned_seconds: float | None
    measured_seconds: float | None

    @property
    def memory_within(self) -> bool | None:
        """None: not known."""
        if self.planned_bytes is None or self.most_bytes is None:
            return None
        least, most = self.least_bytes / self.planned_bytes, self.most_bytes / self.planned_bytes
        if most < 1 - MEMORY_TOLERANCE or least > 1 + MEMORY_TOLERANCE:
            return False
        return True if least >= 1 - MEMORY_TOLERANCE and most <= 1 + MEMORY_TOLERANCE else None

    @property
    def seconds_ratio(self) -> float | None:
        return self.measured_seconds / self.planned_seconds if self.planned_seconds and self.measured_seconds else None

    @property
    def seconds_within(self) -> bool | None:
        return None if self.seconds_ratio is None else abs(self.seconds_ratio - 1) <= TIME_TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "memory_within": self.memory_within, "seconds_ratio": self.seconds_ratio,
                "seconds_within": self.seconds_within}  # fmt: skip

    def cells(self) -> list[str]:
        planned, least, most = self.planned_bytes, self.least_bytes, self.most_bytes
        seconds = (self.planned_seconds, self.measured_seconds, self.seconds_ratio)
        return [
            self.name, str(self.times), "-" if planned is None else f"{planned / 1e9:.2f}",
            "-" if most is None else span(least, most, 1e9),
            "-" if planned is None or most is None else span(least, most, planned), verdict(self.memory_within),
            *("-" if s is None else f"{s:.2f}" for s in seconds), verdict(self.seconds_within),
        ]  # fmt: skip


def span(least: int, most: int, unit: float) -> str:
    if least == most:
        return f"{most / unit:.2f}"
    return f"{least / unit:.2f} to {most / unit:.2f}" if least else f"at most {most / unit:.2f}"


def verdict(within: bool | None) -> str:
    return "-" if within is None else "yes" if within else "NO"


def compare(run: Run, planned: Planned) -> list[Line]:
    """A line for each row that the run or its plan has, and one for the whole run."""
    lines, measured = [], moments(run.events)
    saving = run.summary["phase_seconds"].get("save")
    if saving is not None:
        measured["checkpoints"].seconds.append(saving)
    total = 0.0
    for name, (phases, time) in ROWS.items():
        found = measured[name]
        if not found.times:
            continue
        each = None if planned.seconds is None or time is None else planned.seconds.get(time)
        if each is not None and name == "frozen prefix":
            each *= prefix_share(run, planned.work)
            found.seconds = found.seconds[-1:]
        total += (each or 0.0) * found.times
        known = found.times if name == "checkpoints" else len(found.seconds)  # theirs are told in all
        lines.append(Line(
            name, found.times, highest(planned.memory, phases), found.own_bytes, found.bound_bytes or None,
            None if each is None or not known else each * known, sum(found.seconds) if found.seconds else None,
        ))  # fmt: skip
    peak = run.summary["peak_memory_bytes"]
    lines.append(Line("whole run", 1, planned.memory.peak_bytes, peak, peak,
                      None if planned.seconds is None else total, run.summary["seconds_total"]))  # fmt: skip
    return lines


def highest(plan: MemoryPlan, names: Sequence[str]) -> int | None:
    return max((plan.total(p) for p in plan.phases if p.name.partition(",")[0] in names), default=None)


def prefix_share(run: Run, work: Work) -> float:
    """The part of the prefix's tokens that the run computed; the rest was cached before, or is not cached at all."""
    seconds = [event["seconds"] for event in run.events if event.get("name") == "frozen prefix"]
    computed = seconds[-1] * (run.summary["prefix_tokens_per_second"] or 0.0)
    share = computed / (work.train_tokens + work.eval_tokens)
    return 1.0 if share >= WHOLE_SHARE else float(share)


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/check_plan.py", "The plan of a finished run beside what the run measured.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run, such as runs/TAG")
    parser.add_argument("--no-times", action="store_true", help="memory alone, nothing is measured")
    parser.add_argument("--strict", action="store_true",
                        help=f"exit status 1 where a figure is off by more than {MEMORY_TOLERANCE:.0%} (memory) or "
                             f"{TIME_TOLERANCE:.0%} (time)".replace("%", "%%"))  # fmt: skip
    add_json_flag(parser)
    return parser.parse_args(argv)


def check_command(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    run = read_run(arguments.run)
    planned = plan_run(run, not arguments.no_times)
    lines = compare(run, planned)
    say(report(run, planned, lines))
    if arguments.json is not None:
        benchmark.write_json(arguments.json, {
            "run": str(arguments.run), "machine": benchmark.machine(), "notes": planned.notes,
            "decisions": run.stored["decisions"], "settings": run.settings.to_json(),
            "memory_tolerance": MEMORY_TOLERANCE, "time_tolerance": TIME_TOLERANCE,
            "always_bytes": planned.memory.always,
            "phases": [{"name": p.name, "peak_memory_bytes": planned.memory.total(p), "items_bytes": p.items}
                       for p in planned.memory.phases],
            "lines": [line.to_json() for line in lines], "within": within(lines), **speed(run, planned),
        })  # fmt: skip
    return 1 if arguments.strict and not within(lines) else 0


def within(lines: Iterable[Line]) -> bool:
    """Whether no figure that is known is off."""
    return all(v is not False for line in lines for v in (line.memory_within, line.seconds_within))


def speed(run: Run, planned: Planned) -> dict[str, float | None]:
    step = None if planned.seconds is None else planned.seconds["steps"]
    tokens = planned.work.step_tokens * planned.work.accum
    return {"planned_tokens_per_second": tokens / step if step else None,
            "measured_tokens_per_second": run.summary["tokens_per_second"]}  # fmt: skip


def report(run: Run, planned: Planned, lines: Sequence[Line]) -> str:
    header = ["phase", "times", "planned, GB", "measured, GB", "ratio", f"within {MEMORY_TOLERANCE:.0%}", "planned, s",
              "measured, s", "ratio", f"within {TIME_TOLERANCE:.0%}"]  # fmt: skip
    said = [f"{run.folder}: highest in {planned.memory.highest.name} by the plan", *planned.notes, ""]
    said.append(table([line.cells() for line in lines], header))
    planned_rate, rate = speed(run, planned).values()
    if planned_rate and rate:
        said += ["", f"tokens/s: {planned_rate:.1f} planned, of rows as long as the longest; {rate:.1f} measured"]
    return "\n".join(said)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: check_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
