"""How USAF's time and memory grow with experts, hidden size, density, sequence length, layers, micro-batch and samples.

    python scripts/bench_scaling.py --json scaling.json                 # every factor, a few minutes on two cores
    python scripts/bench_scaling.py --factors density --hidden 1024 --heads 16 --kv-heads 4 --intermediate 512
    python scripts/bench_scaling.py --factors experts --values experts=64,128,256

One factor at a time around a base: every point is a random Qwen3-MoE of its own sizes in a process of its own, whose
prefix, importance and steps are timed (medians; of the steps, after an untimed one; importance is repeated for ten
seconds at most) and their peaks of private memory taken apart. The upper half of the layers trains. `hidden` takes
heads and the experts' intermediate size with it; with fewer experts than top-k all of them are chosen. FRAC of each
expert tensor trains, chosen by importance, so `density` shows what it costs to train more of them.

A process holds some 0.3 GB before it has a model (`start_private_bytes`); the tables' memory includes that.

Left out: combinations of factors, GPUs, reselection and evaluation (`measure_memory.py` has a whole run's peak).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_model import (
    Inputs,
    Sizes,
    add_size_flags,
    further_settings,
    measured_steps,
    prepare_session,
    require_at_least,
    run_apart,
    sizes_of,
    trained_figures,
    usaf_trainer,
    working_folder,
)
from benchmark import machine, machine_line, matmul_rate, write_json

from usaf.console import Parser, add_json_flag, run_command, say, table
from usaf.errors import RunError, UserError
from usaf.memory import PeakMemory, private_bytes

if TYPE_CHECKING:
    from usaf.prefix import BoundaryStates
    from usaf.session import Session

BASE = Sizes(hidden=512, layers=4, heads=8, kv_heads=2, experts=32, intermediate=256, vocab=8192)
DENSITY_AIM = 0.15  # the most by which a step is to grow from the lowest to the highest density
WARMUP = 1
ENOUGH_SECONDS = 10.0  # importance that has taken this long is not repeated


@dataclass(frozen=True)
class Point:
    sizes: Sizes
    density: float
    sequence_tokens: int
    microbatch: int
    samples: int
    """sequences that importance sees, and at least so many pass the prefix"""


def with_hidden(sizes: Sizes, hidden: int) -> Sizes:
    def scaled(value: int) -> int:
        return max(1, value * hidden // sizes.hidden)

    return dataclasses.replace(sizes, hidden=hidden, heads=scaled(sizes.heads), kv_heads=scaled(sizes.kv_heads),
                               intermediate=scaled(sizes.intermediate))  # fmt: skip


def with_experts(sizes: Sizes, experts: int) -> Sizes:
    return dataclasses.replace(sizes, experts=experts, top_k=min(sizes.top_k, experts))


@dataclass(frozen=True)
class Factor:
    """values: of the tables; of: a point's own; at: the point with another one."""

    values: tuple[float, ...]
    of: Callable[[Point], float]
    at: Callable[[Point, Any], Point]


FACTORS = {
    "experts": Factor(
        (8, 16, 32, 64, 128, 256),
        lambda p: p.sizes.experts,
        lambda p, n: dataclasses.replace(p, sizes=with_experts(p.sizes, n)),
    ),
    "hidden": Factor(
        (256, 512, 1024),
        lambda p: p.sizes.hidden,
        lambda p, n: dataclasses.replace(p, sizes=with_hidden(p.sizes, n)),
    ),
    "density": Factor(
        (0.001, 0.002, 0.005, 0.01, 0.02), lambda p: p.density, lambda p, x: dataclasses.replace(p, density=x)
    ),
    "seq-len": Factor(
        (128, 256, 512, 1024), lambda p: p.sequence_tokens, lambda p, n: dataclasses.replace(p, sequence_tokens=n)
    ),
    "layers": Factor(
        (2, 4, 8),
        lambda p: p.sizes.layers,
        lambda p, n: dataclasses.replace(p, sizes=dataclasses.replace(p.sizes, layers=n)),
    ),
    "microbatch": Factor((1, 2, 4, 8), lambda p: p.microbatch, lambda p, n: dataclasses.replace(p, microbatch=n)),
    "samples": Factor((8, 16, 32, 64), lambda p: p.samples, lambda p, n: dataclasses.replace(p, samples=n)),
}


# One point: `make_point` and `measure_point` run in processes of their own.


@dataclass(frozen=True)
class Plan:
    folder: Path
    threads: int
    timed: int
    further: dict[str, str]

    def inputs(self, point: Point) -> Inputs:
        steps_rows = (WARMUP + self.timed) * point.microbatch
        return Inputs(self.folder, point.sizes, max(steps_rows, point.samples), point.sequence_tokens)

    def settings(self, point: Point) -> dict[str, str]:
        return self.inputs(point).settings(self.threads, WARMUP + self.timed, {
            "TRAIN_FROM": str(point.sizes.layers // 2), "FRAC": str(point.density),
            "MICROBATCH": str(point.microbatch), "IMPORTANCE_SAMPLES": str(point.samples), **self.further,
        })  # fmt: skip


def make_point(plan: Plan, point: Point) -> dict[str, Any]:
    return plan.inputs(point).make(plan.settings(point))


def measure_point(plan: Plan, point: Point) -> dict[str, Any]:
    """Prefix, importance and steps of one point."""
    from usaf.session import load

    session = prepare_session(plan.settings(point))
    start = private_bytes()
    load(session)
    with tempfile.TemporaryDirectory(dir=plan.folder) as caches:
        states, figures = measure_prefix(session, plan.timed, Path(caches))
        active, importance = measure_importance(session, states, plan.timed)
        trainer = usaf_trainer(session, states)
        trainer.activate(active)
        steps = measured_steps(lambda: trainer.train_step().loss, WARMUP, plan.timed)
    rate = point.microbatch * point.sequence_tokens / steps["step_seconds"]
    return {**figures, **importance, **steps, **trained_figures(trainer), "tokens_per_second": rate,
            "start_private_bytes": start, "resident": session.decisions.get("resident")}  # fmt: skip


def measure_prefix(session: Session, repeats: int, caches: Path) -> tuple[BoundaryStates, dict[str, Any]]:
    """The states that enter the first trainable layer, into a cache of its own each time."""
    from usaf.session import fill_all

    assert session.order is not None
    memory, seconds = PeakMemory(), []
    asked = session.settings
    for i in range(repeats):
        session.settings = asked.replace("benchmark", prefix_cache_dir=str(caches / str(i)))
        states = session.boundary(session.data.train, session.order.chunks)
        began = time.perf_counter()
        fill_all([states])
        seconds.append(time.perf_counter() - began)
    memory.stop()
    median, tokens = statistics.median(seconds), states.tokens_computed
    return states, {
        "prefix_seconds": median, "prefix_tokens": tokens, "prefix_tokens_per_second": tokens / median,
        "prefix_layers": session.start, "prefix_peak_private_bytes": memory.private,
    }  # fmt: skip


def measure_importance(session: Session, states: BoundaryStates, repeats: int) -> tuple[Any, dict[str, Any]]:
    """(active indices by tensor, figures)."""
    from usaf.importance import find_important

    assert session.order is not None
    values, rows = session.settings.values, session.data.train
    samples = [row for chunk in session.order.chunks for row in chunk][: values.importance_samples]
    memory, seconds = PeakMemory(), []
    for _ in range(repeats):
        began = time.perf_counter()
        found = find_important(session.model, states, rows, samples, values.frac, session.chunk_rows(rows),
                               values.head_chunk_tokens, lambda _: None,
                               projections=values.projections, score=values.importance_score)  # fmt: skip
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > ENOUGH_SECONDS:
            break
    memory.stop()
    return found.active, {
        "importance_seconds": statistics.median(seconds), "importance_repeats": len(seconds),
        "importance_sequences": found.sequences,
        "importance_peak_private_bytes": memory.private,
    }  # fmt: skip


# The command.


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/bench_scaling.py", "How USAF's time and memory grow, one factor at a time, on the "
                    "CPU.")  # fmt: skip
    parser.add_argument("--factors", default=",".join(FACTORS), help="comma-separated (default: all); base: none")
    parser.add_argument("--values", action="append", default=[], metavar="FACTOR=VALUES",
                        help="other values of a factor, comma-separated; may be repeated")  # fmt: skip
    parser.add_argument("--density", type=float, default=0.005, help="FRAC of the base (default: 0.005)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--microbatch", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--samples", type=int, default=16, help="sequences of importance (default: 16)")
    add_size_flags(parser, BASE)
    parser.add_argument("--steps", type=int, default=3, help="repeats of which the median counts (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where models and logs stay, and are found again")
    parser.add_argument("settings", nargs="*", help="further settings of the runs, such as USE_RESIDENT=0")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    for name, least in (("seq_len", 8), ("microbatch", 1), ("samples", 2), ("steps", 1), ("threads", 0)):
        require_at_least(arguments, name, least)
    if not 0 < arguments.density <= 1:
        raise UserError(f"--density {arguments.density:g}: must be above 0 and at most 1; give such a share")
    arguments.factors = [] if arguments.factors == "base" else arguments.factors.split(",")
    for name in arguments.factors:
        if name not in FACTORS:
            raise UserError(f"--factors {name}: must be among {', '.join(FACTORS)}, or base alone; name such factors")
    arguments.values = dict(parse_values(text) for text in arguments.values)
    return arguments


def parse_values(text: str) -> tuple[str, tuple[float, ...]]:
    """FACTOR=VALUES -> (factor, values). The least that a value may be is 8 tokens or 2 samples, else 1 and above 0."""
    name, _, listed = text.partition("=")
    least = {"seq-len": 8, "samples": 2}.get(name, 1)
    try:
        values: tuple[float, ...] = tuple((float if name == "density" else int)(value) for value in listed.split(","))
    except ValueError:
        values = ()
    good = all(0 < value <= 1 if name == "density" else value >= least for value in values)
    if name not in FACTORS or not values or not good:
        rule = "shares above 0 and at most 1" if name == "density" else f"whole numbers of at least {least}"
        raise UserError(f"--values {text}: must be a factor among {', '.join(FACTORS)}, then {rule}; write "
                        "experts=8,16 for instance")  # fmt: skip
    return name, values


def scaling_command(arguments: argparse.Namespace) -> int:
    import torch

    base = Point(sizes_of(arguments), arguments.density, arguments.seq_len, arguments.microbatch, arguments.samples)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "benchmark": "scaling", "machine": machine(), "matmul_512_rows_flop_per_second": matmul_rate(512, 2048, 2048),
        "base": described(base), "repeats": arguments.steps,
    }  # fmt: skip
    say(header(report))
    with working_folder(arguments.keep) as folder:
        plan = Plan(folder, torch.get_num_threads(), arguments.steps, further_settings(arguments.settings))
        measured = measure_all(plan, base, arguments, kept=arguments.keep is not None)
    report["points"] = [{"factor": name, "value": value, **described(point), **figures}
                        for name, value, point, figures in measured]  # fmt: skip
    report["step_time_growth_ratio"] = growths(report["points"])
    report["matmul_512_rows_flop_per_second_after"] = matmul_rate(512, 2048, 2048)
    for name in dict.fromkeys(point["factor"] for point in report["points"]):
        say()
        say(factor_table(name, [point for point in report["points"] if point["factor"] == name], base))
        if name in report["step_time_growth_ratio"]:
            say(growth_line(name, report["step_time_growth_ratio"][name]))
    if arguments.json is not None:
        write_json(arguments.json, report)
    return 1 if any("error" in point for point in report["points"]) else 0


def described(point: Point) -> dict[str, Any]:
    return {**asdict(point.sizes), "density": point.density, "sequence_tokens": point.sequence_tokens,
            "microbatch": point.microbatch, "samples": point.samples}  # fmt: skip


def points_of(name: str, base: Point, values: tuple[float, ...]) -> list[tuple[float, Point]]:
    """The values of a factor with the base's own among them, and their points."""
    factor = FACTORS[name]
    own = factor.of(base)
    return [(value, base if value == own else factor.at(base, value)) for value in sorted({*values, own})]


def measure_all(
    plan: Plan, base: Point, arguments: argparse.Namespace, kept: bool
) -> list[tuple[str, float | None, Point, dict[str, Any]]]:
    """(factor, value, point, figures) of every point; the base, which all factors share, is measured once.

    A model that no other point needs is deleted after its own, unless the folder is to be kept.
    """
    done = {base: measured(plan, base, "base")}
    found: list[tuple[str, float | None, Point, dict[str, Any]]] = []
    for name in arguments.factors:
        for value, point in points_of(name, base, arguments.values.get(name, FACTORS[name].values)):
            if point not in done:
                done[point] = measured(plan, point, f"{name} {value:g}")
                if not kept and point.sizes != base.sizes:
                    shutil.rmtree(plan.inputs(point).model, ignore_errors=True)
            found.append((name, value, point, done[point]))
    return found or [("base", None, base, done[base])]


def measured(plan: Plan, point: Point, label: str) -> dict[str, Any]:
    """A point that fails (for want of memory, say) does not end the others."""
    say(f"{label} ...")
    log = plan.folder / f"{label.replace(' ', '-')}.log"
    try:
        made = run_apart(make_point, plan, point, log=log)
        return {"quantise_seconds": made["quantise_seconds"], **run_apart(measure_point, plan, point, log=log)}
    except RunError as error:
        say(f"  failed: {error}")
        return {"error": str(error)}


def growths(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By factor: step time at its highest value over that at its lowest."""
    found = {}
    for name in dict.fromkeys(point["factor"] for point in points):
        good = [point for point in points if point["factor"] == name and "error" not in point]
        if len(good) > 1:
            found[name] = {"from": good[0]["value"], "to": good[-1]["value"],
                           "ratio": good[-1]["step_seconds"] / good[0]["step_seconds"]}  # fmt: skip
    return found


def growth_line(name: str, growth: dict[str, float]) -> str:
    line = f"step time from {name} {growth['from']:g} to {growth['to']:g}: x {growth['ratio']:.3f}"
    return line + (f" (aim: at most {1 + DENSITY_AIM:.2f})" if name == "density" else "")


def header(report: dict[str, Any]) -> str:
    base = report["base"]
    return "\n".join([
        machine_line(report["machine"]),
        f"fp32 product of 512 x 2048 x 2048: {report['matmul_512_rows_flop_per_second'] / 1e9:.1f} GFLOP/s",
        f"base: Qwen3-MoE of {base['layers']} layers, hidden {base['hidden']}, {base['experts']} experts, "
        f"top-{base['top_k']}, intermediate {base['intermediate']}, vocabulary {base['vocab']:,}; "
        f"{base['microbatch']} x {base['sequence_tokens']} tokens a step, density {base['density']:g}, "
        f"{base['samples']} samples; medians of {report['repeats']}",
    ])  # fmt: skip


def factor_table(name: str, points: list[dict[str, Any]], base: Point) -> str:
    """Memory in GB, private."""
    names = [name, "s/step", "x base", "tok/s", "active", "step GB", "prefix tok/s", "prefix s", "prefix GB",
             "importance s", "importance GB"]  # fmt: skip
    own = FACTORS[name].of(base) if name in FACTORS else None
    reference = next((p["step_seconds"] for p in points if p["value"] == own and "error" not in p), None)
    rows = []
    for point in points:
        value = "-" if point["value"] is None else f"{point['value']:g}"
        if "error" in point:
            rows.append([value, "failed", *[""] * (len(names) - 2)])
            continue
        ratio = "-" if reference is None else f"{point['step_seconds'] / reference:.2f}"
        rows.append([
            value, f"{point['step_seconds']:.3f}", ratio, f"{point['tokens_per_second']:.0f}",
            f"{point['active_parameters']:,}", f"{point['steps_peak_private_bytes'] / 1e9:.2f}",
            f"{point['prefix_tokens_per_second']:.0f}", f"{point['prefix_seconds']:.2f}",
            f"{point['prefix_peak_private_bytes'] / 1e9:.2f}", f"{point['importance_seconds']:.2f}",
            f"{point['importance_peak_private_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    return table(rows, names)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: scaling_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
