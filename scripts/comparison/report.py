"""The report of a comparison: README.md with tables, verdicts and plots, and runs.csv, from a folder of run files.

Everything in it comes from those files, so it may be made at any time, beside runs that are still to come, and comes
out the same from the same runs. scripts/ has to be on the path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark

from comparison.choice import ArmResult, Results, results
from comparison.plots import require_matplotlib, write_plots
from comparison.run_files import Run, load_runs
from comparison.runs_csv import write_csv
from comparison.tables import (
    ablation_table,
    bytes_table,
    cost_table,
    export_table,
    load_table,
    quality_table,
    scale_table,
    sweep_table,
    targets_table,
)
from comparison.verdicts import Verdict, verdicts
from usaf.files import replacing

SAME_NLL = 1e-3  # nats, that two runs may differ in of one and the same untrained model (threads, instructions)
MACHINE = ("processor", "threads", "cpu_capability", "memory_bytes", "torch")  # what a line about it takes

HOW_TO_READ = """\
Each arm is one method, trained at several learning rates. **The rate is chosen on the validation split alone**: of the
runs of the sweep's seed, the one with the lowest validation NLL, and where further rates ran all its seeds, the one
with the lowest mean over these. *(edge)* marks a best rate that is the lowest or highest tried, so a better one may lie
beyond; *(only rate)* an arm that was not swept. The test split and the held-out texts have no say in it.

- NLL is in nats a token. Figures are mean ± sample standard deviation over all seeds run at the chosen rate; without ±
  there was one seed. Runs that diverged count in no mean and are told beside the seeds.
- *test* is the in-domain test split, *held-out* the unweighted mean of the held-out texts; *forgetting* is the change
  of NLL on the pretraining domain against the unquantised base (above 0: worse).
- *of {full}'s gain* is (before - test NLL) of the arm / the same of {full}, by seed where both ran the same ones.
- *Beyond the spread*: a mean difference that exceeds its own standard deviation, which is that of the differences seed
  by seed where both arms ran at least two seeds in common, else sqrt(sd1² + sd2²). With few seeds this is a mild test,
  so the 95% interval of the mean (Student's t) stands beside it.
- *intervals hold 0*: a target is reached, but of so many comparisons the 95% interval of the difference holds 0.
- A target that is reached only against an arm whose best rate is marked *(edge)* or *(only rate)* counts as undecided.
- *At equal gain*: the other arm's figure is read off its sweep, linearly between neighbouring rates and from where it
  starts (which may flatter or hurt it, where the curve bends); the least, where several rates give the same gain. Ours
  is that of the same seed. Where the other never reaches that gain, the two sweeps are compared at the highest that it
  reaches; ours is then that of the arm named. One seed, so no spread.
- *reload* is the largest |NLL after saving and loading - NLL after training| over all texts and seeds.
- *Ablations* are compared each at its best rate, and one that ran at a single rate with its baseline at that rate.
- *setup s*: what a method does with the data before its first step, such as importance.
- *load moved* is the mean total variation between the experts' loads before and after, *entropy* the routing's, against
  *before*. Times of runs that shared the machine (*jobs* above 1) are comparable only at the same number of jobs."""


@dataclass(frozen=True)
class Ablation:
    """Arms whose differences to one baseline are shown."""

    title: str
    baseline: str
    arms: Sequence[str]


@dataclass(frozen=True)
class Question:
    """What a report is to say.

    ours: the arm that the targets are for; swept: the first of these that was run is our sweep, where that has one
    rate; full: full fine-tuning; peers: those to beat, None for the family "peft"; by_bytes: arms whose budget is ours
    in bytes, for a table of their own; arms: the order of the tables, others after them.
    """

    title: str = "Comparison of methods"
    ours: str = "ours"
    full: str = "full"
    peers: Sequence[str] | None = None
    by_bytes: Sequence[str] = ()
    arms: Sequence[str] = ()
    ablations: Sequence[Ablation] = ()
    swept: Sequence[str] = ()

    def drawn(self, found: Results) -> Results:
        """Without the arms of ablations, which would hide the others in a plot."""
        ablated = {arm for one in self.ablations for arm in one.arms}

        def shown(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
            kept = {self.ours, *self.rivals(arms)}
            return {name: arm for name, arm in arms.items() if name in kept or name not in ablated}

        return {config: shown(arms) for config, arms in found.items()}

    def rivals(self, arms: Mapping[str, ArmResult]) -> list[str]:
        """Of one configuration."""
        if self.peers is not None:
            return list(self.peers)
        return [name for name, arm in arms.items() if arm.family == "peft" and name != self.ours]


def write_report(runs_folder: Path, output: Path, question: Question | None = None) -> list[Path]:
    """README.md, runs.csv and the plots, into `output`.

    Raises:
        UserError: no runs, a broken one, no matplotlib, `output` cannot be written.
    """
    question = question or Question()
    require_matplotlib()
    runs = load_runs(runs_folder)
    found = results(runs, question.arms)
    plots = write_plots(output, question.drawn(found), question.ours)
    chosen = {run.path for arms in found.values() for arm in arms.values() for run in arm.seeds}
    drawn = {run.path for arms in found.values() for arm in arms.values() if (run := arm.drawn) is not None}
    loaded = {run.path for arms in found.values() for arm in arms.values() if (run := arm.loaded) is not None}
    write_csv(output / "runs.csv", in_order(runs, found), chosen, drawn, loaded)
    with replacing(output / "README.md") as file:
        file.write(report_text(runs, found, question, plots).encode("utf-8"))
    return [output / name for name in ("README.md", "runs.csv", *plots)]


def in_order(runs: Sequence[Run], found: Results) -> list[Run]:
    """As in the tables, then by rate and seed."""
    place = {key: i for i, key in enumerate((config, arm) for config, arms in found.items() for arm in arms)}
    return sorted(runs, key=lambda run: (place[run.config, run.arm], run.rate or 0.0, run.seed))


# ---- the text -------------------------------------------------------------------------------------------------------


def report_text(runs: Sequence[Run], found: Results, question: Question, plots: Sequence[str] = ()) -> str:
    judged = {
        config: verdicts(arms, question.ours, question.full, question.rivals(arms), question.swept)
        for config, arms in found.items()
    }
    by_config = {config: [run for run in runs if run.config == config] for config in found}
    parts = [f"# {question.title}", "Made by `scripts/compare_methods.py` from the runs in [runs.csv](runs.csv); not "
             "written by hand."]  # fmt: skip
    if any(judged.values()):
        parts += [f"## Targets, for `{question.ours}`", targets_table({k: v for k, v in judged.items() if v})]
    parts += ["## How to read it", HOW_TO_READ.format(full=question.full)]
    for config, arms in found.items():
        parts += config_parts(config, arms, by_config[config], judged[config], question)
    parts += [f"![{name.removesuffix('.svg')}]({name})" for name in plots]
    return "\n\n".join([*parts, *origin_parts(runs)]) + "\n"


def config_parts(
    config: str, arms: Mapping[str, ArmResult], runs: Sequence[Run], judged: Sequence[Verdict], question: Question
) -> list[str]:
    parts = [f"## {config}", options_text(runs), quality_table(arms, question.full)]
    if judged:
        parts.append("\n".join(f"- **{one.status}** ({one.target}): {one.text}" for one in judged))
    parts += [f"**Warning:** {warning}" for warning in warnings(runs)]
    if question.ours in arms and any(arm in arms for arm in question.by_bytes):
        parts += ["At equal artifact bytes:", bytes_table(arms, question.full, question.ours, question.by_bytes)]
    if any(run.scaled for arm in arms.values() for run in arm.seeds):
        parts += ["How much of what was trained counts (against full fine-tuning at the whole; *best* by validation):",
                  scale_table(arms, question.full)]  # fmt: skip
    if any(arm.exported.seeds for arm in arms.values()):
        parts += ["As trained on a quantised base, and exported: the same change on the unquantised one:",
                  export_table(arms)]  # fmt: skip
    parts += ["Cost and routing:", cost_table(arms)]
    for ablation in question.ablations:
        if ablation.baseline in arms and any(arm in arms for arm in ablation.arms if arm != ablation.baseline):
            parts += [f"Ablation, {ablation.title} (differences; below 0 is better than {ablation.baseline}):",
                      ablation_table(arms, ablation.baseline, ablation.arms)]  # fmt: skip
    if question.ours in arms and (run := arms[question.ours].loaded) is not None:
        told = f"Load of each expert, of {question.ours}: tokens of 1000 of its layer, before → after (seed {run.seed})"
        parts += [f"<details><summary>{told}</summary>", load_table(run), "</details>"]
    return [*parts, "<details><summary>The sweep</summary>", sweep_table(arms), "</details>"]


def options_text(runs: Sequence[Run]) -> str:
    """What the runs share, and the figures of the untrained model."""
    shared = [f"{name} {shown(values[0])}" for name, values in options_of(runs).items() if len(values) == 1]
    before = runs[0].before
    texts = [f"{name} {before[name]:.3f}" for name in sorted(before)]
    return f"{', '.join(shared) or 'Options not known'}. Before training, NLL: {', '.join(texts)}."


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes runs of one configuration hard to compare."""
    found = [
        f"the runs differ in {name}: {', '.join(shown(value) for value in values)}."
        for name, values in options_of(runs).items()
        if len(values) > 1
    ]
    apart = [name for name in runs[0].before if not_the_same([run.before.get(name) for run in runs])]
    if apart:
        found.append(f"the untrained model has different NLL in different runs ({', '.join(apart)}).")
    if len({json.dumps(run.tokens, sort_keys=True) for run in runs if run.tokens}) > 1:
        found.append("the runs differ in the number of tokens that were measured.")
    return [*found, *uneven(runs)]


def uneven(runs: Sequence[Run]) -> list[str]:
    """Arms whose runs do not all train equally many weights."""
    sizes: dict[str, set[float]] = {}
    for run in runs:
        if run.trainable_parameters is not None:
            sizes.setdefault(run.arm, set()).add(run.trainable_parameters)
    return [f"the runs of {arm} train {', '.join(f'{n:,.0f}' for n in sorted(found))} weights."
            for arm, found in sizes.items() if len(found) > 1]  # fmt: skip


def not_the_same(values: Sequence[float | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) < len(values) or max(known) - min(known) > SAME_NLL


def options_of(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Each option's distinct values."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        for name, value in run.options.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return found


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def origin_parts(runs: Sequence[Run]) -> list[str]:
    """Commands, commits and machines that gave the figures, each once."""
    commands = distinct(run.command for run in runs)
    commits = [f"`{commit}`" for commit in distinct(run.commit for run in runs)]
    machines = distinct(machine_text(run) for run in runs)
    return [
        "## Where the figures come from",
        "```bash\n" + "\n".join(commands) + "\n```" if commands else "Commands not known.",
        f"{len(runs)} runs; commit{'s' * (len(commits) > 1)} {', '.join(commits) or 'not known'}.",
        "\n".join(f"- {one}" for one in machines) or "Machine not known.",
        *origins(runs),
    ]


def origins(runs: Sequence[Run]) -> list[str]:
    """What has to be said of runs that do not come from their command as it stands."""
    told: dict[str, list[str]] = {}
    for run in runs:
        if run.origin:
            told.setdefault(run.origin, []).append(f"{run.config}/{run.arm}")
    return [f"{origin}: {', '.join(f'`{where}`' for where in distinct(wheres))}." for origin, wheres in told.items()]


def machine_text(run: Run) -> str:
    return benchmark.machine_line(run.machine) if all(name in run.machine for name in MACHINE) else ""


def distinct(texts: Iterable[str]) -> list[str]:
    """In the order of the first of each, without empty ones."""
    return [text for text in dict.fromkeys(texts) if text]
