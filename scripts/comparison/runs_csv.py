"""runs.csv: one line for each run of a comparison, for spreadsheets, and complete enough to go on from.

A report's folder is kept, run files are not. So every figure of a run stands in its line, its losses where the report
draws them and the loads of its experts where it shows them, and `restore` makes the run files again, for a comparison
that goes on somewhere else. Figures that a run's other figures give (`DERIVED`) are there for the reader alone.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from comparison.run_files import READERS, Run, file_name
from usaf.errors import UserError, one_line
from usaf.files import replacing, write_json

GROUPS = {
    "nll": "nll", "before": "before", "start": "start", "reloaded": "reloaded", "exported": "exported",
    "routing": "routing", "tokens": "tokens", "scaled": "scaled", "option": "options", "machine": "machine",
}  # fmt: skip
"""Beginning of a column's name -> the field whose entries such columns hold."""
DERIVED = ("chosen_rate", "nll_heldout", "gain_test", "forgetting", "last_loss")
LOSS_DIGITS = 4  # of a curve that is drawn


# ---- writing --------------------------------------------------------------------------------------------------------


def write_csv(
    path: Path, runs: Iterable[Run], chosen: Collection[Path], drawn: Collection[Path] = (),
    loaded: Collection[Path] = (),
) -> None:  # fmt: skip
    """One line a run, in the order given; what a run does not have, and what is not finite, is left empty.

    chosen: runs at their arm's chosen rate; drawn: those whose losses are kept; loaded: whose loads are.
    """
    rows = [csv_row(run, run.path in chosen, run.path in drawn, run.path in loaded) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO(newline="") as written:
        writer = csv.DictWriter(written, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if is_nan(value) else value for name, value in row.items()})
        with replacing(path) as file:
            file.write(written.getvalue().encode("utf-8"))


def csv_row(run: Run, chosen: bool, drawn: bool, loaded: bool = False) -> dict[str, Any]:
    """Whether its rate is the chosen one, every single figure, and those that the tables make of them."""
    row = {
        "config": run.config, "arm": run.arm, "family": run.family, "rate": run.rate, "seed": run.seed,
        "chosen_rate": int(chosen), "diverged": int(run.failed),
        "trainable_parameters": run.trainable_parameters, "artifact_bytes": run.artifact_bytes,
        "step_seconds": run.step_seconds, "jobs": run.jobs, "seconds": run.seconds, "setup_seconds": run.setup_seconds,
        "peak_private_bytes": run.peak_private_bytes,
        "nll_heldout": run.held_out, "gain_test": run.gain, "forgetting": run.forgetting,
        "experts_moved": run.experts_moved, "experts": run.experts, "last_loss": run.losses[-1] if run.losses else None,
        "note": run.note, "origin": run.origin, "commit": run.commit, "command": run.command,
    }  # fmt: skip
    for prefix, name in GROUPS.items():
        row |= {f"{prefix}_{key}": cell(value) for key, value in getattr(run, name).items()}
    if drawn and len(run.losses) > 1:
        row["losses"] = " ".join(f"{loss:.{LOSS_DIGITS}g}" for loss in run.losses)
    if loaded and run.loads:
        row["loads"] = json.dumps(run.loads, separators=(",", ":"))
    return row


def cell(value: Any) -> Any:
    """As it is where reading gives the same again, else as JSON: a text of digits, None, lists."""
    if is_nan(value) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) and value and uncell(value) == value else json.dumps(value)


def uncell(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


# ---- and back -------------------------------------------------------------------------------------------------------


def restore(path: Path, folder: Path) -> int:
    """Make the run files below `folder` that are not there yet; returns how many.

    Raises:
        UserError: `path` is not there or is no such table.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            runs = [run_of(row) for row in csv.DictReader(file)]
        if not runs:
            raise ValueError("it has no line")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no table of runs ({one_line(error)}); give the folder of a report") from None
    made = {folder / run["config"] / run["arm"] / file_name(run["rate"], run["seed"]): run for run in runs}
    missing = {where: run for where, run in made.items() if not where.exists()}
    for where, run in missing.items():
        where.parent.mkdir(parents=True, exist_ok=True)
        write_json(where, run)
    return len(missing)


def run_of(row: Mapping[str, str]) -> dict[str, Any]:
    """A run file's content."""
    run: dict[str, Any] = {}
    for one in dataclasses.fields(Run):
        if one.name in READERS and row.get(one.name):
            run[one.name] = json.loads(row[one.name]) if one.type.startswith(("int", "float")) else row[one.name]
    run["diverged"] = bool(int(row["diverged"]))
    for prefix, name in GROUPS.items():
        entries = {column.removeprefix(f"{prefix}_"): text for column, text in row.items()
                   if column.startswith(f"{prefix}_") and column not in DERIVED and text}  # fmt: skip
        run[name] = {key: uncell(text) for key, text in entries.items()}
    if run["diverged"]:
        run["nll"] = None
    curve, last = (row.get("losses") or "").split(), (row.get("last_loss") or "").split()
    if row.get("loads"):
        run["loads"] = json.loads(row["loads"])
    run["losses"] = [float(loss) for loss in [*curve[:-1], *last]]  # the last is known in full
    return {"rate": None, **run}
