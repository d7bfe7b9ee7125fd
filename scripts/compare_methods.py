"""Many methods on one and the same MoE, data, steps and evaluation; a table, figures, and every run behind them.

    python scripts/compare_methods.py --folder runs/compare                      # the demo: Python learns C++
    python scripts/compare_methods.py --folder runs/compare --part report
    python scripts/compare_methods.py --folder runs/demo --part restore          # the runs of docs/results/demo
    python scripts/compare_methods.py --folder runs/compare --arms usaf,lora-experts --seeds 5
    python scripts/compare_methods.py --folder runs/gsm8k --model data/smollm2/moe --dataset data/gsm8k/train.jsonl

Every arm's learning rate is swept on the validation split: three rates of the grid 1, 2, 5 a decade around a guess, and
further ones for as long as the best is the first or the last of them. Then the best rate is run with further seeds, and
every other that came within NEAR_TIE of it; of these the one with the lowest mean over the seeds is chosen. One JSON
file a finished run; a command that was interrupted goes on where it stopped, and parts (`--arms`, `--part`) add up in
one folder. A report's runs.csv has all that the files have, so `--part restore` makes them again somewhere else, and
what is run there adds to them. `comparison.arms` has the arms, `comparison.methods` runs one, `comparison.bed` has what
they share, `comparison.report` the tables.

Left out: GPUs; rates, epochs or batch sizes of more than one kind; dropout; weight decay.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from comparison.bed import Bed, read_result
from comparison.run_files import file_name

from usaf.console import Parser, run_command, say, scales_of
from usaf.errors import RunError, UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from comparison.report import Question

GRID = (1, 2, 5)
MOST_RATES = 7
DEMO_SETTINGS = {"ROUTER_LR": "2e-4"}  # as `usaf.demo` has it
SWEEP_SEED = 0
NEAR_TIE = 0.04  # nats of validation NLL: what one seed cannot tell apart
SWEPT = ("usaf", "usaf-head-half")  # with the head's rate measured, and as part of the experts'
UNTRAINED = "none"


@dataclass(frozen=True)
class Run:
    """One training: of an arm, at a rate, with a seed."""

    arm: str
    rate: float | None
    seed: int

    def path(self, folder: Path) -> Path:
        return folder / self.arm / file_name(self.rate, self.seed)


# ---- what is to be run ----------------------------------------------------------------------------------------------


def on_grid(rate: float, steps: int) -> float:
    """`steps` places from the grid's nearest to `rate`."""
    decade = math.floor(math.log10(rate))
    places = [
        (abs(math.log(rate / (g * 10.0**d))), 3 * d + i) for d in (decade, decade + 1) for i, g in enumerate(GRID)
    ]
    place = min(places)[1] + steps
    return float(f"{GRID[place % 3]}e{place // 3}")


def wanted_runs(
    arm: str, guess: float | None, rates: Sequence[float] | None, seeds: int, done: dict[Run, float],
    every: bool = False,
) -> list[Run]:  # fmt: skip
    """The runs that an arm still needs before more can be said; empty when it is finished.

    guess: where the sweep begins, None for an arm without a rate of its own. rates: a fixed sweep. done: run -> its
    validation NLL (inf where it diverged). every: all rates of `rates` run all seeds.
    """
    if guess is None:
        return [
            run for run in (Run(arm, None, seed) for seed in range(1 if arm == UNTRAINED else seeds)) if run not in done
        ]
    swept = {run.rate: nll for run, nll in done.items() if run.seed == SWEEP_SEED and run.rate is not None}
    grid = list(rates) if rates else [on_grid(guess, i) for i in (-1, 0, 1)]
    missing = [Run(arm, rate, SWEEP_SEED) for rate in grid if rate not in swept]
    if missing:
        return missing
    best = min(swept, key=lambda rate: swept[rate])
    ordered = sorted(swept)
    if not rates and len(ordered) < MOST_RATES:
        if best == ordered[-1]:
            return [Run(arm, on_grid(best, 1), SWEEP_SEED)]
        if best == ordered[0]:
            return [Run(arm, on_grid(best, -1), SWEEP_SEED)]
    contenders = grid if every else [rate for rate in ordered if swept[rate] <= swept[best] + NEAR_TIE]
    return [run for seed in range(1, seeds) for run in (Run(arm, rate, seed) for rate in contenders) if run not in done]


def finished(arm: str, folder: Path, options: dict[str, Any]) -> dict[Run, float]:
    """The runs of an arm that are on disk, with their validation NLL.

    Raises UserError for one that was made otherwise than `options` say.
    """
    found = {}
    for path in (folder / arm).glob("rate-*_seed-*.json"):
        result = read_result(path)
        if result is None:
            continue
        for name, value in options.items():
            if result["options"].get(name) != value:
                raise UserError(f"{path}: was run with {name} {result['options'].get(name)}, and this is {value}; give "
                                "another --folder, or what it was run with")  # fmt: skip
        lost = result.get("diverged") or any(v is None for v in result["nll"].values())
        found[Run(arm, result["rate"], result["seed"])] = math.inf if lost else result["nll"]["validation"]
    return found


# ---- running --------------------------------------------------------------------------------------------------------


def run_all(plan: argparse.Namespace, bed: Bed, folder: Path) -> int:
    """Every arm to its end, `--jobs` runs at a time; returns how many failed. What the untrained model gives, which
    every run's file has too, comes first; then arms in their order, so that what is there is complete."""
    context, options = processes(), bed.describe(plan.settings)
    failed: set[Run] = set()
    running: dict[Future[None], Run] = {}
    untrained = Run(UNTRAINED, None, SWEEP_SEED)
    if untrained not in finished(UNTRAINED, folder, options):
        one_run(context, plan, bed, untrained, folder)
    pool = ThreadPoolExecutor(plan.jobs)
    try:
        while True:
            for run in upcoming(plan, folder, options, failed):
                if run not in running.values() and len(running) < plan.jobs:
                    running[pool.submit(one_run, context, plan, bed, run, folder)] = run
            if not running:
                return len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.add(run)
                    say(f"{run.arm} rate {run.rate} seed {run.seed}: failed: {error}")
    finally:
        for child in multiprocessing.active_children():  # Ctrl-C, or a failure of ours
            child.terminate()
        pool.shutdown(cancel_futures=True)


def upcoming(plan: argparse.Namespace, folder: Path, options: dict[str, Any], failed: set[Run]) -> Iterator[Run]:
    """What is still to be run, arm by arm."""
    from comparison.arms import EVERY

    for arm in plan.arms:
        done = finished(arm, folder, options) | {run: math.inf for run in failed if run.arm == arm}
        yield from wanted_runs(arm, EVERY[arm].guess or None, plan.rates, plan.seeds, done, plan.all_seeds)


def processes() -> Any:
    """Processes that begin with torch and transformers imported, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.qwen3_moe", "peft", "usaf.session", "usaf.trainer"])
    return context


def one_run(context: Any, plan: argparse.Namespace, bed: Bed, run: Run, folder: Path) -> None:
    """A run in a process of its own; its figures go to its file, what it prints to a log beside it."""
    from usaf.files import write_json

    path = run.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=apart, args=(sender, log, bed, run, plan.settings), daemon=True)
    began = time.perf_counter()
    process.start()
    sender.close()
    try:
        figures = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(f"ended with status {process.exitcode}, see {log}") from None
    finally:
        process.join()
        receiver.close()
    if isinstance(figures, UserError):
        raise figures
    untrained = figures if run.arm == UNTRAINED else read_result(Run(UNTRAINED, None, SWEEP_SEED).path(folder))
    assert untrained is not None
    figures |= {
        "before": untrained["nll"], "config": plan.config, "jobs": plan.jobs, "command": plan.command,
        "commit": plan.commit, "machine": plan.machine,
    }  # fmt: skip
    write_json(path, figures)
    nll = figures["nll"]
    heldout = [v for n, v in nll.items() if n.startswith("heldout_")]
    say(f"{run.arm:<24} rate {run.rate or 0:<7g} seed {run.seed}: validation {nll['validation']:.4f}, held-out "
        f"{sum(heldout) / max(1, len(heldout)):.4f}, {time.perf_counter() - began:.0f} s")  # fmt: skip


def apart(sender: Connection, log: Path, bed: Bed, run: Run, further: dict[str, str]) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(bed.threads)
    from comparison.methods import run_arm

    try:
        found: dict[str, Any] | UserError = run_arm(bed, run.arm, run.rate, run.seed, further)
    except UserError as error:
        found = error
    except Exception:
        traceback.print_exc()  # into the log
        sys.exit(1)
    sender.send(found)


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    from comparison.arms import ARMS, EVERY

    parser = Parser("python scripts/compare_methods.py", "Many methods on one MoE, and what each is worth.")
    parser.add_argument("--folder", type=Path, required=True, help="where runs, splits and caches go")
    parser.add_argument("--part", choices=("run", "report", "restore"), default="run",
                        help="report: tables from what has run; restore: run files from its runs.csv")  # fmt: skip
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated (default: the main table's)")
    parser.add_argument("--model", type=Path, help="an MoE checkpoint's folder (default: the bundled demo)")
    parser.add_argument("--dataset", type=Path, help="JSONL to train on, and to split (default: the demo's)")
    parser.add_argument("--heldout", type=Path, action="append", help="a held-out JSONL; may be given again")
    parser.add_argument("--forgetting", type=Path, help="JSONL like the pretraining's text")
    parser.add_argument("--train-from", type=int, default=0, help="first trained layer (default: 0)")
    parser.add_argument("--frac", type=float, default=0.02, help="USAF's FRAC, the budget of all (default: 0.02)")
    parser.add_argument("--steps", type=int, default=180, help="(default: 180)")
    parser.add_argument("--microbatch", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--eval-samples", type=int, default=32, help="sequences a set (default: 32)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm's best rate (default: 3)")
    parser.add_argument("--rates", help="a fixed sweep for every arm, comma-separated")
    parser.add_argument("--all-seeds", action="store_true", help="every rate of --rates with every seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument(
        "--scale", dest="scales", type=partial(scales_of, several=True), default=[], metavar="X,...",
        help="evaluate every trained arm so too: with so much of its change (not those that are done, masks, DoRA)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder of the report (default: docs/results/<name of --folder>)")
    parser.add_argument("settings", nargs="*", help="further settings of USAF, such as ROUTER_LR=1e-4")
    arguments = parser.parse_args(argv)
    arguments.arms = arguments.arms.split(",")
    for arm in arguments.arms:
        if arm not in EVERY:
            raise UserError(f"--arms {arm}: must be among {', '.join(EVERY)}; name such arms, with commas between")
    try:
        arguments.rates = [float(r) for r in arguments.rates.split(",")] if arguments.rates else None
    except ValueError:
        raise UserError(f"--rates {arguments.rates}: must be numbers, with commas between") from None
    arguments.command = shlex.join(["python", "scripts/compare_methods.py", *argv])
    return arguments


def bed_of(arguments: argparse.Namespace) -> Bed:
    from usaf.demo import DEMO_MODEL, build_demo_text

    heldout, dataset, forgetting = arguments.heldout or [], arguments.dataset, arguments.forgetting
    if dataset is None:
        demo = build_demo_text()
        dataset, heldout, forgetting = demo.train, heldout or demo.heldout, forgetting or demo.forgetting
    for path in (dataset, *heldout, *([forgetting] if forgetting else [])):
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a JSONL file")
    return Bed(
        arguments.folder, arguments.model or DEMO_MODEL, dataset, tuple(heldout), forgetting, arguments.train_from,
        arguments.frac, arguments.steps, arguments.microbatch, arguments.seq_len, arguments.eval_samples,
        arguments.threads, tuple(scale for scale in arguments.scales if scale != 1),
    )  # fmt: skip


def question() -> Question:
    """What the report is to say."""
    from comparison.arms import ARMS, EVERY
    from comparison.report import Ablation, Question

    rivals = [name for name, arm in ARMS.items() if arm.family == "peft" and "budget" not in arm.options]
    by_bytes = [name for name, arm in ARMS.items() if arm.options.get("budget") == "bytes"]
    # an arm has the longest that begins its name
    baselines = ("usaf-unscaled", "usaf", "usaf-head-1", "usaf-experts", "qlora", "now", "lab")
    of = {
        a: max((b for b in baselines if a.startswith(f"{b}-")), key=len, default="") for a in EVERY if a not in by_bytes
    }
    ablations = [Ablation(f"one thing changed of {b}", b, [a for a in of if of[a] == b]) for b in baselines]
    return Question("Methods compared", "usaf-default", "full", rivals, by_bytes, list(EVERY), ablations, SWEPT)


def compare_command(arguments: argparse.Namespace) -> int:
    from bench_model import further_settings
    from benchmark import machine

    from usaf.files import locked

    output = arguments.output or Path("docs/results") / arguments.folder.name
    if arguments.part == "restore":
        from comparison.runs_csv import restore

        say(f"{restore(output / 'runs.csv', arguments.folder)} runs restored: {arguments.folder}")
        return 0
    if arguments.part == "report":
        from comparison.report import write_report

        write_report(arguments.folder, output, question())
        say(f"report: {output}")
        return 0
    bed = bed_of(arguments)
    bed.split()
    own = DEMO_SETTINGS if arguments.model is None else {}
    arguments.settings = {**own, **further_settings(arguments.settings)}
    arguments.config = f"{bed.model.name}-from{bed.train_from}-{bed.frac:g}"
    arguments.machine = machine()
    arguments.commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    folder = arguments.folder / arguments.config
    with locked(arguments.folder / ".lock", UserError(f"--folder {arguments.folder}: another command runs there; wait "
                                                      "for it, or give another")):  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return 1 if run_all(arguments, bed, folder) else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: compare_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
