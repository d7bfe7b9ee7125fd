"""The run files of a comparison: one JSON file for each finished run, read and checked.

    <folder>/<config>/<arm>/rate-<rate>_seed-<n>.json

A run is one arm (a method) at one learning rate and one seed. `config` is the label of what runs are compared within:
model, trained layers, fraction. NLL sets hold nats a token by text: "validation" (in-domain, for choosing), "test"
(in-domain, never for choosing), "forgetting" (the pretraining domain), and any number of "heldout_*", whose unweighted
mean is the held-out figure. `before` is the unquantised base model, `start` what the arm starts from, `reloaded` what
the saved artifact gives when it is loaded again, `exported` what it gives on the unquantised base.

JSON has no nan: a number that is not finite is null in the file and nan here. Half-written files have other names and
are never seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from usaf.errors import UserError, one_line

PATTERN = "rate-*_seed-*.json"
HELD_OUT = "heldout_"
NEEDED = ("validation", "test")  # of every NLL set that figures are taken from

NLL = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What one file says. Fields with a default may be absent or null."""

    path: Path
    arm: str
    config: str
    seed: int
    before: NLL
    nll: NLL
    rate: float | None = None
    family: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: float | None = None
    artifact_bytes: float | None = None
    step_seconds: float | None = None
    jobs: float | None = None
    """runs that shared the machine"""
    seconds: float | None = None
    setup_seconds: float | None = None
    """of `seconds`: what a method does with the data before its first step"""
    peak_private_bytes: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)
    start: NLL = field(default_factory=dict)
    reloaded: NLL = field(default_factory=dict)
    routing: dict[str, float] = field(default_factory=dict)
    loads: dict[str, list[list[int]]] = field(default_factory=dict)
    """layer's experts module -> tokens of each expert over the evaluation, before and after"""
    scaled: dict[str, NLL] = field(default_factory=dict)
    """how much of what was trained counts, such as "0.8" -> NLL"""
    exported: NLL = field(default_factory=dict)
    """of what was trained on a quantised base, put onto the unquantised one"""
    experts_moved: float | None = None
    experts: float | None = None
    losses: list[float] = field(default_factory=list)
    diverged: bool = False
    note: str = ""
    origin: str = ""
    """where it comes from, if not from its command as it stands: taken over, or run under another name"""

    @property
    def failed(self) -> bool:
        """It gives no figures: no choice takes it and no mean contains it."""
        return self.diverged or not all(math.isfinite(value) for value in self.nll.values())

    @property
    def validation(self) -> float:
        return self.nll["validation"]

    @property
    def test(self) -> float:
        return self.nll["test"]

    @property
    def gain(self) -> float:
        """Nats of the in-domain test split that training has won, against the unquantised base."""
        return self.before["test"] - self.nll["test"]

    @property
    def held_out(self) -> float | None:
        return held_out(self.nll)

    @property
    def forgetting(self) -> float | None:
        """Nats lost on the pretraining domain against the unquantised base; below 0 it got better."""
        return changed(self.before, self.nll, "forgetting")

    @property
    def untrained(self) -> Run | None:
        """As if it had stopped where it starts from; None if that is not known."""
        return dataclasses.replace(self, nll=self.start) if self.start.keys() == self.nll.keys() else None

    def at_scale(self, scale: str) -> Run | None:
        """As if only so much of what was trained counted; None if that was not evaluated."""
        if float(scale) == 1:
            return self
        return dataclasses.replace(self, nll=self.scaled[scale]) if scale in self.scaled else None

    @property
    def on_original(self) -> Run | None:
        """What it is on the unquantised base; None if it was trained there, or that was not evaluated."""
        return dataclasses.replace(self, nll=self.exported) if self.exported.keys() == self.nll.keys() else None

    @property
    def reload_difference(self) -> float | None:
        """The largest |reloaded - trained| over the texts, nan if one is not finite; None if nothing was reloaded."""
        differences = [abs(self.reloaded[name] - self.nll[name]) for name in self.reloaded if name in self.nll]
        if any(math.isnan(one) for one in differences):
            return math.nan
        return max(differences, default=None)


def held_out(nll: Mapping[str, float]) -> float | None:
    values = [value for name, value in nll.items() if name.startswith(HELD_OUT)]
    return sum(values) / len(values) if values else None


def changed(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float | None:
    return after[name] - before[name] if name in before and name in after else None


def file_name(rate: float | None, seed: int) -> str:
    return f"rate-{'none' if rate is None else f'{rate:g}'}_seed-{seed}.json"


# ---- reading --------------------------------------------------------------------------------------------------------


def load_runs(folder: Path) -> list[Run]:
    """Every run below `folder`, in the order of their paths.

    Raises:
        UserError: there is none, a file is broken, or two are the same run.
    """
    runs = [read_run(path) for path in sorted(folder.rglob(PATTERN))]
    if not runs:
        raise UserError(f"{folder}: holds no run ({PATTERN}); make some first, or give the folder that has them")
    seen: dict[tuple[str, str, float | None, int], Path] = {}
    for run in runs:
        other = seen.setdefault((run.config, run.arm, run.rate, run.seed), run.path)
        if other is not run.path:
            raise UserError(f"{run.path}: is the same run as {other}; remove one of them")
    return runs


def read_run(path: Path) -> Run:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(path, one_line(error)) from None
    if not isinstance(data, dict):
        raise broken(path, "no JSON object")
    values = {one.name: read_field(path, data, one) for one in dataclasses.fields(Run) if one.name in READERS}
    values["nll"] = read_nll(path, data, values["before"], values["diverged"])
    return Run(path=path, **values)


def read_field(path: Path, data: Mapping[str, Any], one: dataclasses.Field[Any]) -> Any:
    value = data.get(one.name)
    if value is None:
        if one.default is not dataclasses.MISSING:
            return one.default
        if one.default_factory is not dataclasses.MISSING:
            return one.default_factory()
        raise broken(path, f"{one.name} is missing")
    try:
        return READERS[one.name](value)
    except ValueError as error:
        raise broken(path, f"{one.name}: {error}") from None


def read_nll(path: Path, data: Mapping[str, Any], before: NLL, diverged: bool) -> NLL:
    """Of the trained model, for the same texts as `before`; a run that diverged may have none."""
    value = data.get("nll")
    if value is None and diverged:
        return dict.fromkeys(before, math.nan)
    if value is None:
        raise broken(path, "nll is missing")
    try:
        found = nll_set(value)
    except ValueError as error:
        raise broken(path, f"nll: {error}") from None
    if before.keys() != found.keys():
        raise broken(path, f"before and nll are of different texts ({', '.join(sorted(before.keys() ^ found.keys()))})")
    return found


def broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: is not a run file ({what}); remove it, and the run can be made again")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


def finite(value: Any) -> float:
    if not math.isfinite(number(value)):
        raise ValueError(f"{value!r} is not finite")
    return value


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def positive(value: Any) -> float:
    if not finite(value) > 0:
        raise ValueError(f"{value!r} is not above 0")
    return float(value)


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")
    return value


def figures(value: Any) -> dict[str, float]:
    """The single numbers among what it holds; lists and what is not known are left out."""
    found = {name: one for name, one in mapping(value).items() if isinstance(one, (int, float))}
    return {name: one for name, one in found.items() if math.isfinite(one)}


def maybe_finite(value: Any) -> float:
    return math.nan if value is None else float(number(value))


def nll_set(value: Any) -> NLL:
    return {name: maybe_finite(one) for name, one in mapping(value).items()}


def before_set(value: Any) -> NLL:
    found = {name: float(finite(one)) for name, one in mapping(value).items()}
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(f"lacks {missing[0]!r}")
    return found


def scaled_sets(value: Any) -> dict[str, NLL]:
    found = {scale: nll_set(one) for scale, one in mapping(value).items()}
    for scale in found:
        positive(float(scale))
    return found


def loads(value: Any) -> dict[str, list[list[int]]]:
    found = mapping(value)
    for both in found.values():
        if not isinstance(both, list) or len(both) != 2 or len(both[0]) != len(both[1]):
            raise ValueError("is not two counts for each expert")
        for counts in both:
            for one in counts:
                whole(one)
    return found


def numbers(value: Any) -> list[float]:
    if not isinstance(value, list):
        raise ValueError("is not a list")
    return [maybe_finite(one) for one in value]


READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("arm", "config", "family", "command", "commit", "note", "origin"), text),
    **dict.fromkeys(("options", "machine"), mapping),
    **dict.fromkeys(("trainable_parameters", "artifact_bytes", "step_seconds", "jobs", "seconds"), finite),
    **dict.fromkeys(("setup_seconds", "peak_private_bytes", "experts_moved", "experts"), finite),
    "seed": whole, "rate": positive, "before": before_set, "losses": numbers, "diverged": flag,
    **dict.fromkeys(("start", "reloaded", "exported"), nll_set),
    "routing": figures, "tokens": figures, "loads": loads, "scaled": scaled_sets,
}  # fmt: skip
