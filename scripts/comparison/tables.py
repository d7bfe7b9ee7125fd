"""Markdown tables of a comparison. What is not known is "-"."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from comparison.choice import ArmResult, Difference, Spread, difference, gain_share
from comparison.run_files import Run
from comparison.verdicts import TARGETS, Verdict, overall, worst_reload

NONE = "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """The first column and those named in `words` to the left, the others to the right."""
    ruler = ["---" if i == 0 or name in words else "---:" for i, name in enumerate(header)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ruler, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: float | None, digits: int = 3) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:+.{digits}f}"


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def scaled(value: float | None, unit: float, digits: int) -> str:
    return NONE if value is None else plain(value / unit, digits)


def rate_text(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:g}"


def with_spread(found: Spread | None, digits: int = 3, sign: bool = False) -> str:
    if found is None:
        return NONE
    mean = (signed if sign else plain)(found.mean, digits)
    return mean if found.sd is None else f"{mean} ± {found.sd:.{digits}f}"


def perplexity(found: Spread | None) -> str:
    """Of the mean NLL."""
    if found is None:
        return NONE
    value = math.exp(min(found.mean, 700))
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def share_text(found: Spread | None) -> str:
    if found is None:
        return NONE
    return f"{100 * found.mean:.1f}%" + (f" ± {100 * found.sd:.1f}" if found.sd is not None else "")


def chosen_rate(arm: ArmResult) -> str:
    if arm.best is None:
        return "diverged"
    return rate_text(arm.rate) + (f" ({arm.rate_mark})" if arm.rate_mark else "")


def seeds_text(arm: ArmResult) -> str:
    return str(len(arm.seeds)) + (f" ({arm.failed} diverged)" if arm.failed else "")


# ---- the tables -----------------------------------------------------------------------------------------------------


def quality_header(full: str) -> list[str]:
    return ["arm", "trainable", "artifact MB", "rate", "seeds", "test NLL", "ppl", f"of {full}'s gain", "held-out NLL",
            "ppl", "forgetting", "ppl"]  # fmt: skip


def quality_table(arms: Mapping[str, ArmResult], full: str) -> str:
    return markdown(quality_header(full), [quality_row(arm, arms.get(full)) for arm in arms.values()])


def bytes_table(arms: Mapping[str, ArmResult], full: str, ours: str, by_bytes: Sequence[str]) -> str:
    """Ours and the arms whose budget is ours in bytes on disk, and how much higher these are held out."""
    rows = [[*quality_row(arms[ours], arms.get(full)), NONE]]
    for arm in (arms[name] for name in by_bytes if name in arms):
        more = difference(arm, arms[ours], lambda run: run.held_out)
        rows.append([*quality_row(arm, arms.get(full)), difference_cell(more)])
    return markdown([*quality_header(full), "held-out less ours"], rows)


def scale_table(arms: Mapping[str, ArmResult], full: str) -> str:
    """How much of what was trained counts: every arm that was evaluated so, at its chosen rate, by those seeds."""
    header = ["arm", "rate", "seeds", "scale", "validation NLL", "test NLL", f"of {full}'s gain", "held-out NLL",
              "forgetting"]  # fmt: skip
    rows = []
    for arm in (arm.evaluated_in_part for arm in arms.values()):
        scales = {scale for run in arm.seeds for scale in run.scaled}
        found = [(scale, arm.at_scale(scale)) for scale in sorted({*scales, "1"} if scales else (), key=float)]
        known = [(scale, at) for scale, at in found if at is not None]
        best = min((at.mean(validation_of) or math.inf for _, at in known), default=None)
        for scale, at in known:
            mark = " (best)" if at.mean(validation_of) == best else ""
            of_full = share_text(gain_share(at, arms[full])) if full in arms else NONE
            rows.append([
                arm.arm, chosen_rate(arm), seeds_text(arm), scale,
                with_spread(at.spread(validation_of)) + mark, with_spread(at.spread(lambda run: run.test)),
                of_full, with_spread(at.spread(lambda run: run.held_out)),
                with_spread(at.spread(lambda run: run.forgetting), sign=True),
            ])  # fmt: skip
    return markdown(header, rows)


def export_table(arms: Mapping[str, ArmResult]) -> str:
    """Arms that were trained on a quantised base, there and on the unquantised one, at the chosen rate."""
    figures = (lambda run: run.test), (lambda run: run.held_out), (lambda run: run.forgetting)
    rows = []
    for arm in arms.values():
        if not (after := arm.exported).seeds:
            continue
        kept = {run.seed for run in after.seeds}
        trained = replace(arm, seeds=tuple(run for run in arm.finished if run.seed in kept))
        cells = [with_spread(one.spread(figure), sign=i == 2)
                 for i, figure in enumerate(figures) for one in (trained, after)]  # fmt: skip
        rows.append([arm.arm, chosen_rate(arm), str(len(kept)), *cells])
    header = ["arm", "rate", "seeds", "test NLL", "exported", "held-out NLL", "exported", "forgetting", "exported"]
    return markdown(header, rows)


def validation_of(run: Run) -> float:
    return run.validation


def load_table(run: Run) -> str:
    """Tokens of each expert over all evaluated texts, of 1000 of its layer, before and after training."""
    most = max(len(before) for before, _ in run.loads.values())
    rows = []
    for block, (before, after) in run.loads.items():
        parts = [
            f"{1000 * b / sum(before):.0f} → {1000 * a / sum(after):.0f}" for b, a in zip(before, after, strict=True)
        ]
        rows.append([block.removesuffix(".mlp.experts"), *parts, *[""] * (most - len(parts))])
    return markdown(["layer", *map(str, range(most))], rows)


def quality_row(arm: ArmResult, full: ArmResult | None) -> list[str]:
    test = arm.spread(lambda run: run.test)
    return [
        arm.arm,
        count(arm.median(lambda run: run.trainable_parameters)),
        scaled(arm.median(lambda run: run.artifact_bytes), 1e6, 2),
        chosen_rate(arm),
        seeds_text(arm),
        with_spread(test),
        perplexity(test),
        share_text(gain_share(arm, full)) if full is not None else NONE,
        with_spread(held_out := arm.spread(lambda run: run.held_out)),
        perplexity(held_out),
        with_spread(arm.spread(lambda run: run.forgetting), sign=True),
        perplexity(arm.spread(lambda run: run.nll.get("forgetting"))),
    ]


def cost_table(arms: Mapping[str, ArmResult]) -> str:
    """Medians over the seeds at the chosen rate."""
    header = ["arm", "step s", "jobs", "setup s", "run s", "peak GB", "reload", "entropy", "before", "load moved",
              "starved", "experts moved", "note"]  # fmt: skip
    return markdown(header, [cost_row(arm) for arm in arms.values()], words=["note"])


def cost_row(arm: ArmResult) -> list[str]:
    moved, experts = arm.median(lambda run: run.experts_moved), arm.median(lambda run: run.experts)
    worst = worst_reload(arm)
    return [
        arm.arm,
        plain(arm.median(lambda run: run.step_seconds)),
        jobs_text(arm),
        plain(arm.median(lambda run: run.setup_seconds), 1),
        plain(arm.median(lambda run: run.seconds), 0),
        scaled(arm.median(lambda run: run.peak_private_bytes), 1e9, 2),
        NONE if worst is None else "0" if worst == 0 else f"{worst:.1e}",
        routing(arm, "entropy"),
        routing(arm, "entropy_before"),
        routing(arm, "load_moved"),
        count(arm.median(lambda run: run.routing.get("starved_experts"))),
        count(moved) + (f" of {count(experts)}" if moved is not None and experts is not None else ""),
        arm.best.note if arm.best is not None else "",
    ]


def routing(arm: ArmResult, name: str) -> str:
    return plain(arm.median(lambda run: run.routing.get(name)))


def jobs_text(arm: ArmResult) -> str:
    """Of the runs whose times stand beside it."""
    found = sorted({int(run.jobs) for run in arm.finished if run.jobs is not None})
    return ", ".join(map(str, found)) or NONE


def sweep_table(arms: Mapping[str, ArmResult]) -> str:
    header = ["arm", "rate", "seed", "validation NLL", "held-out NLL", "forgetting", "remark"]
    rows = [sweep_row(run, run is arm.best) for arm in arms.values() for run in arm.sweep]
    return markdown(header, rows, words=["remark"])


def sweep_row(run: Run, chosen: bool) -> list[str]:
    remark = "diverged" if run.failed else "chosen" if chosen else ""
    figures = [plain(run.validation), plain(run.held_out), signed(run.forgetting)]
    return [run.arm, rate_text(run.rate), str(run.seed), *figures, remark]


def ablation_table(arms: Mapping[str, ArmResult], baseline: str, others: Sequence[str]) -> str:
    """Each arm's figures less the baseline's, each at its own best rate, or both at the only one that the arm ran at:
    below 0 the arm is better. Arms that were not run are left out; baseline: has been run."""
    header = [f"against {baseline}", "rate", "test NLL", "held-out NLL", "forgetting", "seeds"]
    own = arms[baseline]
    rows = [ablation_row(arms[arm], own) for arm in others if arm in arms and arm != baseline]
    return markdown(header, rows)


def ablation_row(arm: ArmResult, baseline: ArmResult) -> list[str]:
    if len(arm.sweep) == 1:
        baseline = baseline.at(arm.rate)
    test = difference(arm, baseline, lambda run: run.test)
    others = [difference(arm, baseline, figure) for figure in (lambda run: run.held_out, lambda run: run.forgetting)]
    seeds = NONE if test is None else f"{test.n} paired" if test.paired else f"{test.n} unpaired"
    if arm.failed or baseline.failed:
        seeds += f" ({arm.failed + baseline.failed} diverged)"
    return [arm.arm, chosen_rate(arm), *(difference_cell(found) for found in (test, *others)), seeds]


def difference_cell(found: Difference | None) -> str:
    return NONE if found is None else with_spread(Spread(found.mean, found.sd, found.n), 4, sign=True)


def targets_table(found: Mapping[str, Sequence[Verdict]]) -> str:
    """found: by configuration."""
    rows = [[config, *(overall(of_config, target) for target in TARGETS)] for config, of_config in found.items()]
    return markdown(["configuration", *TARGETS.values()], rows, words=TARGETS.values())
