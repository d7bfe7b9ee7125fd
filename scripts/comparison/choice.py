"""Each arm's best rate, its figures over seeds, and how two arms are compared.

    rate        of the sweep's seed, the one with the lowest validation NLL; where others ran all the seeds that it did,
                the one with the lowest mean over these. No other figure has a say
    spread      mean and sample standard deviation over all seeds run at that rate
    difference  paired: mean and sample standard deviation of the differences seed by seed, where both arms ran at least
                two seeds in common; else of the two means, with sqrt(sd1^2 + sd2^2)
    at equal gain  a peer's forgetting, or another figure, at a given in-domain gain, read off the line through its
                sweep in the order of its rates; it starts where the arm starts (rate 0)

The sweep's seed is the lowest of those that ran the most rates. Runs that diverged, or whose figures are not finite,
are never chosen and count in no mean; how many there were is told beside it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from comparison.run_files import Run

Figure = Callable[[Run], float | None]


def held_out_of(run: Run) -> float | None:
    return run.held_out


def forgetting_of(run: Run) -> float | None:
    return run.forgetting


# Two-sided 95% points of Student's t for 2, 3, ... seeds; above ten the last one, which is a little too wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Spread(NamedTuple):
    """Over seeds. sd: None with one seed."""

    mean: float
    sd: float | None
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """None if a value is absent, or all are."""
    found = list(values)
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class ArmResult:
    """One arm in one configuration.

    sweep: the runs of the sweep's seed, by rate; best: the chosen one of them, None if all diverged; seeds: all runs at
    the chosen rate, by seed.
    """

    config: str
    arm: str
    sweep: tuple[Run, ...]
    best: Run | None
    seeds: tuple[Run, ...]

    @property
    def family(self) -> str:
        return self.sweep[0].family

    @property
    def rate(self) -> float | None:
        return self.best.rate if self.best is not None else None

    def at(self, rate: float | None) -> ArmResult:
        """As if the sweep had chosen `rate`; itself where the sweep does not have it, or diverged there."""
        if rate == self.rate:
            return self
        run = next((run for run in self.sweep if run.rate == rate and not run.failed), None)
        return self if run is None else replace(self, best=run, seeds=(run,))

    @property
    def evaluated_in_part(self) -> ArmResult:
        """Of the seeds that were evaluated with a part of what was trained too."""
        return replace(self, seeds=tuple(run for run in self.finished if run.scaled))

    def at_scale(self, scale: str) -> ArmResult | None:
        """As if only so much of what was trained counted, at the chosen rate; None where not every seed has it."""
        runs = [run.at_scale(scale) for run in self.seeds]
        known = tuple(run for run in runs if run is not None)
        return replace(self, seeds=known) if len(known) == len(runs) else None

    @property
    def exported(self) -> ArmResult:
        """What was trained on a quantised base as it is on the unquantised one, of the seeds that were evaluated so."""
        runs = (run.on_original for run in self.finished)
        return replace(self, seeds=tuple(run for run in runs if run is not None and not run.failed))

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.seeds if not run.failed)

    @property
    def failed(self) -> int:
        """Seeds that diverged at the chosen rate."""
        return len(self.seeds) - len(self.finished)

    @property
    def drawn(self) -> Run | None:
        """Whose losses are drawn: of the chosen rate, the first seed that has a curve."""
        return next((run for run in self.finished if len(run.losses) > 1), None)

    @property
    def rate_mark(self) -> str:
        """Says "edge" where the best rate is the lowest or highest tried, those that diverged among them."""
        if self.rate is None:
            return ""
        if len(self.sweep) == 1:
            return "only rate"
        return "edge" if self.best in (self.sweep[0], self.sweep[-1]) else ""

    @property
    def loaded(self) -> Run | None:
        """Whose loads by expert are shown: of the chosen rate, the first seed that has them."""
        return next((run for run in self.finished if run.loads), None)

    def spread(self, figure: Figure) -> Spread | None:
        return spread(figure(run) for run in self.finished)

    def mean(self, figure: Figure) -> float | None:
        found = self.spread(figure)
        return None if found is None else found.mean

    def with_seed(self, seed: int) -> Run | None:
        return next((run for run in self.finished if run.seed == seed), None)

    def median(self, figure: Figure) -> float | None:
        """Of the seeds that have the figure; for times and sizes."""
        known = [value for run in self.finished if (value := figure(run)) is not None]
        return statistics.median(known) if known else None


def choose(runs: Sequence[Run]) -> ArmResult:
    """runs: those of one arm in one configuration, at least one."""
    sweep = sorted((run for run in runs if run.seed == sweep_seed(runs)), key=lambda run: run.rate or 0.0)
    best = lowest_mean(runs, sweep)
    at_best = [run for run in runs if best is not None and run.rate == best.rate]
    seeds = tuple(sorted(at_best, key=lambda run: run.seed))
    return ArmResult(runs[0].config, runs[0].arm, tuple(sweep), best, seeds)


def lowest_mean(runs: Sequence[Run], sweep: Sequence[Run]) -> Run | None:
    """The run of the sweep at the chosen rate; None where all diverged."""
    first = min((run for run in sweep if not run.failed), key=lambda run: run.validation, default=None)
    if first is None:
        return None
    seeds = {run.seed for run in runs if run.rate == first.rate and not run.failed}

    def mean(rate: float | None) -> float:
        found = {run.seed: run.validation for run in runs if run.rate == rate and not run.failed}
        return statistics.fmean(found[seed] for seed in seeds) if seeds <= found.keys() else math.inf

    return min((run for run in sweep if not run.failed), key=lambda run: mean(run.rate))


def sweep_seed(runs: Sequence[Run]) -> int:
    rates = {seed: len({run.rate for run in runs if run.seed == seed}) for seed in sorted({run.seed for run in runs})}
    return max(rates, key=lambda seed: rates[seed])  # the first of equals


Results = dict[str, dict[str, ArmResult]]


def results(runs: Iterable[Run], arms: Sequence[str] = ()) -> Results:
    """Config -> arm -> result: configs in the order of the numbers in their names, arms in the order of `arms`, those
    that are not in it after them."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.config, {}).setdefault(run.arm, []).append(run)
    place = {arm: i for i, arm in enumerate(arms)}
    found: Results = {}
    for config in sorted(groups, key=by_numbers):
        of_config = groups[config]
        ordered = sorted(of_config, key=lambda arm: (place.get(arm, len(place)), arm))
        found[config] = {arm: choose(of_config[arm]) for arm in ordered}
    return found


def by_numbers(name: str) -> list[tuple[float, str]]:
    """A sorting key in which 0.5% comes before 2%, and that before 10%."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts)]


# ---- comparing ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One arm's figure less another's. sd: None where seeds are too few; n: seeds in common if paired, else the fewer.

    lower: of the pairs, those in which the first arm's figure is lower; None if not paired.
    """

    mean: float
    sd: float | None
    n: int
    paired: bool
    lower: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% for the mean of paired differences, by Student's t."""
        if not self.paired or self.sd is None:
            return None
        half = T_95[min(self.n - 2, len(T_95) - 1)] * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def difference(one: ArmResult, other: ArmResult, figure: Figure) -> Difference | None:
    """None where an arm lacks the figure."""
    pairs = paired(one, other, figure)
    found = spread(a - b for a, b in pairs)
    if found is not None and found.n > 1:
        return Difference(*found, True, sum(a < b for a, b in pairs))
    first, second = one.spread(figure), other.spread(figure)
    if first is None or second is None:
        return None
    if first.sd is None or second.sd is None:
        # One pair says more than two means of which one has a single seed.
        return Difference(*(found or Spread(first.mean - second.mean, None, 1)), found is not None, None)
    return Difference(first.mean - second.mean, math.hypot(first.sd, second.sd), min(first.n, second.n), False, None)


def paired(one: ArmResult, other: ArmResult, figure: Figure) -> list[tuple[float, float]]:
    """The figure of both arms for every seed that both finished."""
    values = {run.seed: figure(run) for run in other.finished}
    pairs = [(figure(run), values.get(run.seed)) for run in one.finished]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def gain_share(arm: ArmResult, full: ArmResult) -> Spread | None:
    """Of full fine-tuning's in-domain gain: the mean over seeds in common, or of the mean gains where there is none.
    None where full fine-tuning gained nothing."""
    pairs = paired(arm, full, lambda run: run.gain)
    if pairs:
        return spread(a / b for a, b in pairs) if all(b > 0 for _, b in pairs) else None
    one, whole = arm.spread(lambda run: run.gain), full.spread(lambda run: run.gain)
    if one is None or whole is None or whole.mean <= 0:
        return None
    return Spread(one.mean / whole.mean, None, 1)


def gain_line(sweep: Sequence[Run], figure: Figure) -> list[tuple[float, float]]:
    """(gain, figure) of where an arm starts, if that is known, and of each rate's run; sweep: by rate. Empty where
    there is nothing of it to measure."""
    trained = [run for run in sweep if not run.failed and run.rate is not None]
    points = [(run.gain, value) for run in trained if (value := figure(run)) is not None]
    start = trained[0].untrained if points else None
    value = figure(start) if start is not None else None
    return [(start.gain, value), *points] if start is not None and value is not None else points


class AtGain(NamedTuple):
    """A figure of a sweep at some gain: the least where its line passes there more than once, None where it never
    does. top: (gain, figure) at the sweep's highest gain."""

    figure: float | None
    top: tuple[float, float]


def figure_at_gain(sweep: Sequence[Run], gain: float, figure: Figure) -> AtGain | None:
    """sweep: by rate. None where it does not have the figure."""
    line = gain_line(sweep, figure)
    if not line:
        return None
    found = [value for at, value in line if at == gain]
    for (gain1, value1), (gain2, value2) in pairwise(line):
        if min(gain1, gain2) < gain < max(gain1, gain2):
            found.append(value1 + (value2 - value1) * (gain - gain1) / (gain2 - gain1))
    return AtGain(min(found, default=None), max(line))
