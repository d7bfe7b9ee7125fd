"""Plots of a comparison, as SVG files that come out the same from the same runs.

    sweep.svg       validation NLL over the learning rate
    parameters.svg  held-out NLL over the trainable parameters, all configurations of a model in one plot
    forgetting.svg  forgetting over in-domain gain, every run of the sweeps, joined by rate from where the arm starts
    losses.svg      training loss at the chosen rate, a running mean

Runs far above the untrained model are cut off, and those that diverged are not drawn. matplotlib is imported where it
is needed, without its global state (no pyplot, no display).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.choice import ArmResult, Results, forgetting_of, gain_line
from comparison.run_files import Run
from usaf.errors import UserError
from usaf.files import replacing

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5",
)  # fmt: skip
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
COLUMNS = 2
POINTS = 40  # of a loss curve
SMOOTHED_SHARE = 0.1  # of the steps, that a point of it is the mean of
SLACK = 0.15  # of the range between best and untrained, that is shown beyond them

Style = dict[str, Any]
Draw = Callable[[Any, str, Mapping[str, ArmResult], Mapping[str, Style]], None]


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib: is not installed, and draws the plots; pip install matplotlib") from None


def write_plots(folder: Path, found: Results, ours: str) -> list[str]:
    """Names of the files, for the report."""
    styles = styles_of(found, ours)
    write_panels(folder / "sweep.svg", found, styles, draw_sweep)
    write_panels(folder / "forgetting.svg", found, styles, draw_forgetting)
    write_panels(folder / "losses.svg", found, styles, draw_losses)
    write_parameters(folder / "parameters.svg", found, styles)
    return ["sweep.svg", "parameters.svg", "forgetting.svg", "losses.svg"]


def styles_of(found: Results, ours: str) -> dict[str, Style]:
    """One look for each arm in all plots; ours is black."""
    names = [arm for arm in dict.fromkeys(arm for arms in found.values() for arm in arms) if arm != ours]
    look = {
        arm: {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // 10 % len(LINES)], "linewidth": 1.2}
        for i, arm in enumerate(names)
    }
    return {**look, ours: {"color": "black", "linestyle": "-", "linewidth": 2.0}}


def point_of(arm: ArmResult) -> list[tuple[float, float]]:
    """(gain, forgetting) of an arm without a rate of its own; empty where it did not train."""
    best = arm.best
    return [] if best is None or best.forgetting is None or best.gain == 0 else [(best.gain, best.forgetting)]


# ---- files ----------------------------------------------------------------------------------------------------------


def save(figure: Any, path: Path) -> None:
    import matplotlib

    # A hash of the process and the date would differ from run to run; letters as text keep the file small.
    with matplotlib.rc_context({"svg.hashsalt": "usaf", "svg.fonttype": "none"}), replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure and its axes, one for each title."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows + 0.9), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize=10)
        one.grid(alpha=0.3)
    return figure, axes


def add_legend(figure: Any, axes: Iterable[Any]) -> None:
    """Once for all panels, below them."""
    handles = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8)


def write_panels(path: Path, found: Results, styles: Mapping[str, Style], draw: Draw) -> None:
    figure, axes = panels(list(found))
    for one, (config, arms) in zip(axes, found.items(), strict=True):
        draw(one, config, arms, styles)
    add_legend(figure, axes)
    save(figure, path)


def limits(low: float, untrained: float) -> dict[str, float]:
    """Of an axis of NLL: from the best to a little above the untrained model."""
    slack = SLACK * abs(untrained - low) or 0.1
    return {"bottom": min(low, untrained) - slack, "top": max(low, untrained) + slack}


def finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.failed]


# ---- what is drawn --------------------------------------------------------------------------------------------------


def draw_sweep(axes: Any, config: str, arms: Mapping[str, ArmResult], styles: Mapping[str, Style]) -> None:
    drawn = {arm: [run for run in finished(one.sweep) if run.rate is not None] for arm, one in arms.items()}
    for arm, runs in drawn.items():
        if runs:
            axes.plot([run.rate for run in runs], [run.validation for run in runs], marker="o", markersize=3, label=arm,
                      **styles[arm])  # fmt: skip
    every = [run for runs in drawn.values() for run in runs]
    if every:
        untrained = every[0].before["validation"]
        axes.axhline(untrained, color="grey", linewidth=0.8)
        axes.set_ylim(**limits(min(run.validation for run in every), untrained))
        axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation NLL")


def draw_forgetting(axes: Any, config: str, arms: Mapping[str, ArmResult], styles: Mapping[str, Style]) -> None:
    best = max((run.gain for one in arms.values() for run in finished(one.sweep)), default=0.0)
    shown = [0.0]
    for arm, one in arms.items():
        line = gain_line(one.sweep, forgetting_of) or point_of(one)
        if not line:
            continue
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=arm, **styles[arm])
        if one.best is not None and one.best.forgetting is not None:
            axes.plot(one.best.gain, one.best.forgetting, marker="o", markersize=8, fillstyle="none",
                      color=styles[arm]["color"])  # fmt: skip
        shown += [point[1] for point in line if point[0] > -SLACK * best]
    if best > 0:
        slack = SLACK / 3 * (max(shown) - min(shown)) or 0.1
        axes.set_xlim(-SLACK * best, 1.05 * best)
        axes.set_ylim(min(shown) - slack, max(shown) + slack)
    axes.set_xlabel("in-domain gain, nats (ring: the chosen rate)")
    axes.set_ylabel("forgetting, nats")


def draw_losses(axes: Any, config: str, arms: Mapping[str, ArmResult], styles: Mapping[str, Style]) -> None:
    for arm, one in arms.items():
        if one.drawn is not None:
            axes.plot(*loss_curve(one.drawn.losses), label=arm, **styles[arm])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")


def loss_curve(losses: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """(steps, means of the losses up to each), at most POINTS of them."""
    width = max(1, round(SMOOTHED_SHARE * len(losses)))
    ends = np.unique(np.linspace(width, len(losses), min(POINTS, len(losses) - width + 1)).astype(int))
    totals = np.concatenate([[0.0], np.cumsum(losses)])
    return ends.tolist(), ((totals[ends] - totals[ends - width]) / width).tolist()


def write_parameters(path: Path, found: Results, styles: Mapping[str, Style]) -> None:
    """One panel for each model, for held-out figures of two models share no axis."""
    models: dict[str, Results] = {}
    for config, arms in found.items():
        first = next(iter(arms.values())).sweep[0]
        models.setdefault(str(first.options.get("model", "")), {})[config] = arms
    figure, axes = panels(list(models))
    for one, configs in zip(axes, models.values(), strict=True):
        draw_parameters(one, configs, styles)
    add_legend(figure, axes)
    save(figure, path)


def draw_parameters(axes: Any, configs: Results, styles: Mapping[str, Style]) -> None:
    """Colours are arms, markers configurations; bars are standard deviations over seeds."""
    drawn: dict[str, tuple[str, str]] = {}
    of_configs: dict[str, tuple[str, str]] = {}
    for (config, arms), marker in zip(configs.items(), MARKERS * len(configs), strict=False):
        for arm, one in arms.items():
            held_out = one.spread(lambda run: run.held_out)
            parameters = one.median(lambda run: run.trainable_parameters)
            if held_out is not None and parameters:
                axes.errorbar(parameters, held_out.mean, held_out.sd or 0.0, marker=marker, markersize=5, capsize=2,
                              linestyle="none", color=styles[arm]["color"])  # fmt: skip
                drawn.update({arm: ("o", styles[arm]["color"])})
                of_configs.update({config: (marker, "grey")})
    for name, (marker, colour) in {**drawn, **of_configs}.items():  # for the legend alone
        axes.plot([], [], marker=marker, linestyle="none", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("held-out NLL")
