"""The speed of each phase of a run on a model of full size, beside the rate of a plain matrix product of this machine.

    python scripts/make_fullsize.py --output qwen3-30b-a3b
    python scripts/bench_fullsize.py --folder qwen3-30b-a3b                              # 8 trainable layers, 2 x 512
    python scripts/bench_fullsize.py --folder qwen3-30b-a3b --train-from 44 --microbatch 1 --seq-len 256 \\
        --prefix-layers 4 --phases prefix,step MEMORY_LIMIT=8GB

Settings of a run may follow (NAME=VALUE); everything else has its default. Timed is the software itself, as a run calls
it, on sequences of random token ids (`make_fullsize.write_data`):

    prefix       `BoundaryStates.fill` over --prefix-tokens, once; the states go to the disk as in a run
    importance   `find_important` over --importance-samples sequences, once
    rates        `measure_learning_rates` with what importance found, once
    step         `Trainer.train_step`, the median of --steps after one that is not counted
    capture      the median of the CAPTURE_STEPS steps before a reselection, which keep what it needs
    reselection  `Trainer.reselect_if_due`, once
    evaluation   `evaluate` from cached states, the median of three

--prefix-layers runs only the first so many frozen layers. A second line then gives the time of all of them, which is
proportional, and says so; the other phases start from the states after the layers that did run, which have the shape
and about the size of those that would enter. Nothing else is scaled. What the system has in its cache stays there: on a
machine whose memory holds the model, a second call reads nothing from the disk.

GFLOP and share: see `benchmark`. Memory: the peak of the phase, private (without mapped files) and resident.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import benchmark
import make_fullsize
from benchmark import ModelWork, Work

from usaf.console import Parser, add_json_flag, phase, run_command, say, table
from usaf.errors import UserError
from usaf.files import require_writable

if TYPE_CHECKING:
    from usaf.data import Rows
    from usaf.importance import Importance
    from usaf.prefix import BoundaryStates
    from usaf.session import Session
    from usaf.trainer import Trainer

PHASES = ("prefix", "importance", "rates", "step", "reselection", "evaluation")
PRODUCT_ROWS = (512, 256, 64)
WARM_UP_STEPS = 1
EVALUATIONS = 3
SHARE_HELD_BACK = 0.05  # IN_DOMAIN_FRACTION's default: these rows are not trained on


@dataclass(frozen=True)
class Figure:
    """One line of the table. seconds, tokens, work: of one run. scaled_to: what the line stands for, where that is not
    what was measured."""

    phase: str
    measured_on: str
    runs: int
    seconds: float
    tokens: int
    work: Work
    private_bytes: int
    resident_bytes: int
    scaled_to: str | None = None

    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_json(self, product_rate: float) -> dict[str, Any]:
        rate = self.work.total / self.seconds
        return {
            "phase": self.phase, "measured_on": self.measured_on, "scaled_to": self.scaled_to, "runs": self.runs,
            "seconds": self.seconds, "tokens": self.tokens, "tokens_per_second": self.tokens_per_second(),
            **self.work.gflop(), "gflop_per_second": rate / 1e9, "share_of_product_rate": rate / product_rate,
            "peak_private_bytes": self.private_bytes, "peak_resident_bytes": self.resident_bytes,
        }  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/bench_fullsize.py", "The speed of each phase of a run, with the machine's own.")
    parser.add_argument("--folder", type=Path, required=True, help="a model, such as make_fullsize.py writes")
    parser.add_argument("--train-from", type=int, help="first trainable layer (default: as in a run, 40 of 48)")
    parser.add_argument("--microbatch", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--steps", type=int, default=3, help="steps to take the median of (default: 3)")
    parser.add_argument("--prefix-tokens", type=int, default=4096, help="tokens through the prefix (default: 4096)")
    parser.add_argument("--prefix-layers", type=int, help="run only so many frozen layers (default: all)")
    parser.add_argument("--importance-samples", type=int, default=16, help="sequences (default: 16)")
    parser.add_argument("--evaluation-samples", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"which, by commas (default: {','.join(PHASES)})")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--scratch", type=Path, help="folder for cached states (default: the system's temporary one)")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="further settings, such as USE_RESIDENT=0")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    for name, least in (("train_from", 0), ("microbatch", 1), ("seq_len", 8), ("steps", 1), ("prefix_tokens", 1),
                        ("prefix_layers", 1), ("importance_samples", 2), ("evaluation_samples", 1), ("threads", 0)
                        ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    arguments.phases = [name.strip() for name in arguments.phases.split(",")]
    unknown = [name for name in arguments.phases if name not in PHASES]
    if unknown:
        raise UserError(f"--phases {unknown[0]}: is none of {', '.join(PHASES)}")
    if "rates" in arguments.phases and "importance" not in arguments.phases:
        raise UserError("--phases rates: moves the weights that importance has chosen; add importance")
    wrong = [setting for setting in arguments.settings if "=" not in setting]
    if wrong:
        raise UserError(f"{wrong[0]}: settings are given as NAME=VALUE, such as USE_RESIDENT=0")
    if not (arguments.folder / "config.json").is_file():
        raise UserError(f"--folder {arguments.folder}: no config.json there; make a model with scripts/make_fullsize.py"
                        )  # fmt: skip
    return arguments


def bench_command(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        report(arguments, Bench(arguments, Path(scratch)))
    return 0


class Bench:
    """One model, loaded as a run loads it, and what was measured on it."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        from usaf.session import load, prepare

        self.arguments, self.scratch = arguments, scratch
        self.session: Session = prepare(self._settings())
        self.values = self.session.settings.values
        self.start = self.session.start
        self.prefix_layers = self._prefix_layers()
        self.work: ModelWork = benchmark.model_work(self.session.checkpoint.config)
        self.product_shape = self._product_shape()
        self.product_rates = [self._product_rates()]
        began = time.perf_counter()
        load(self.session)
        self.load_seconds = time.perf_counter() - began
        self.figures: list[Figure] = []
        self.run()
        self.product_rates.append(self._product_rates())  # a machine's rate may change under load

    # -- what is run ---------------------------------------------------------------------------------------------------

    def _settings(self) -> Any:
        """Those of a run on data that are written here: as many sequences as the phases need."""
        from usaf.settings import Settings, load_settings

        given = self.arguments
        further = dict(setting.split("=", 1) for setting in given.settings)
        said = further.get("CAPTURE_STEPS", "")
        window = int(said) if said.isdigit() else Settings().capture_steps
        capture = window if "reselection" in given.phases else 0
        steps = WARM_UP_STEPS + given.steps + capture
        samples = given.importance_samples if "importance" in given.phases else 1
        rows = max(steps * given.microbatch, 2 * samples if "rates" in given.phases else samples)
        sets = {
            "train": int(rows / (1 - SHARE_HELD_BACK)) + 2,
            "prefix": -(-given.prefix_tokens // given.seq_len),
            "evaluation": given.evaluation_samples,
        }
        vocabulary = self._vocabulary()
        for seed, (name, count) in enumerate(sets.items()):
            make_fullsize.write_data(self.scratch / f"{name}.jsonl", vocabulary, count, given.seq_len, seed)
        environ = {
            "MODEL": given.folder, "DATASET_PATH": self.scratch / "train.jsonl",
            "HELDOUT_PATH": f"{self.scratch / 'prefix.jsonl'},{self.scratch / 'evaluation.jsonl'}",
            "TRAIN_FROM": given.train_from, "MICROBATCH": given.microbatch, "SEQ_LEN": given.seq_len,
            "IMPORTANCE_SAMPLES": given.importance_samples, "EVAL_SAMPLES": 0, "OUTPUT_DIR": self.scratch,
            "CPU_THREADS": given.threads, "RESELECT_EVERY": steps if capture else 0, "RESELECT_UNTIL": 1,
            # As if the reselection came after a quarter of the run, which decides how much it exchanges.
            "STEPS": 4 * steps if capture else steps,
            "LR_PEAK": 1e-3, "HEAD_LR": 1e-4,  # any: rates that are set cost no time
        }  # fmt: skip
        return load_settings([], {**{k: str(v) for k, v in environ.items() if v is not None}, **further}, {})

    def _vocabulary(self) -> int:
        config = json.loads((self.arguments.folder / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        if not isinstance(size, int):
            raise UserError(f"{self.arguments.folder / 'config.json'}: has no vocab_size; give a language model")
        return size

    def _prefix_layers(self) -> int:
        wanted = self.arguments.prefix_layers
        if self.start == 0 and (wanted is not None or self.arguments.phases == ["prefix"]):
            raise UserError("--train-from 0: there are no frozen layers; leave the prefix out")
        layers = self.start if wanted is None else wanted
        if layers > self.start:
            raise UserError(f"--prefix-layers {layers}: layers from {self.start} train; choose at most {self.start}")
        cuts = self.session.checkpoint.handover.splits
        if layers not in cuts:
            raise UserError(f"--prefix-layers {layers}: this family's layers can be cut at "
                            f"{', '.join(str(cut) for cut in cuts[:-1])} only")  # fmt: skip
        return layers

    def _product_shape(self) -> tuple[int, int]:
        """(out, in) of an expert's first projection."""
        from usaf.expert_store import shapes_of

        return next(iter(shapes_of(self.session.checkpoint).values()))[1:]

    def _product_rates(self) -> dict[int, float]:
        out, inputs = self.product_shape
        return {rows: benchmark.matmul_rate(rows, inputs, out) for rows in PRODUCT_ROWS}

    def product_rate(self, rows: int = PRODUCT_ROWS[0]) -> float:
        """The mean of before and after."""
        return statistics.mean(rates[rows] for rates in self.product_rates)

    # -- states --------------------------------------------------------------------------------------------------------

    def states(self, rows: Rows, chunks: list[list[int]] | None = None) -> BoundaryStates:
        """What enters the first trainable layer, or stands for it where not all frozen layers run; not yet filled."""
        from usaf.prefix import BoundaryStates, cache_dtype, chunked

        layers = self.prefix_layers

        class FirstLayers(BoundaryStates):
            """As if the frozen layers ended after `layers`."""

            def _compute(self, *args: Any) -> Any:
                start, self.start = self.start, layers
                try:
                    return super()._compute(*args)
                finally:
                    self.start = start

        session = self.session
        return FirstLayers(
            session.model, rows, chunks or chunked(len(rows), session.chunk_rows(rows)), self.start,
            cache_dtype(self.values.cache_dtype, session.stored_dtype), {**session.identity(), "layers": layers},
            self.scratch / "cache", 0,
        )  # fmt: skip

    def fill(self, name: str, states: BoundaryStates) -> None:
        """Raises UserError where the states cannot be kept: computing them again would be timed with every step."""
        tokens = self.prefix_layers * sum(states.rows.length(row) for chunk in states.chunks for row in chunk)
        with phase(name, tokens, "tok") as bar:
            notes = states.fill(bar.update)
        if notes:
            raise UserError(f"--scratch {self.scratch.parent}: {notes[0]}")

    def head_trains(self) -> bool:
        return self.session.model.head is not None

    def different_targets(self) -> int:
        return self.session.data.train.different_targets()

    def densities(self) -> tuple[float, float]:
        """The shares that train of the experts' weights and of the head's."""
        from usaf.importance import counts_by_name

        model = self.session.model
        counts = counts_by_name(model, self.start, self.values.frac, self.values.projections, self.different_targets())
        of_head = 0.0 if model.head is None else counts.pop(model.head_name) / model.head.numel
        experts = sum(bank.numel for moe in model.moe_from(self.start) for bank in moe.banks)
        return sum(counts.values()) / experts, of_head

    def lengths(self, rows: Rows, chosen: Iterable[int]) -> list[int]:
        return [rows.length(row) for row in chosen]

    # -- the phases ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        wanted, data = self.arguments.phases, self.session.data
        assert self.session.order is not None
        if "prefix" in wanted and self.start > 0:
            self.prefix(data.heldout["heldout_prefix"])
        if wanted == ["prefix"]:
            return
        train = self.states(data.train, self.session.order.chunks)
        evaluation = self.states(data.heldout["heldout_evaluation"])
        if self.start > 0:
            self.fill("states", train)
            self.fill("states", evaluation)
        trainer = self.trainer(train)
        if "importance" in wanted:
            found = self.importance(train, trainer)
            if "rates" in wanted:
                self.rates(train, found)
        else:
            self.activate_any(trainer)
        if "step" in wanted or "reselection" in wanted:
            self.steps(trainer)
        if "evaluation" in wanted:
            self.evaluation(evaluation)

    def prefix(self, rows: Rows) -> None:
        states = self.states(rows)
        with self.watch() as seen:
            self.fill("prefix", states)
        lengths = self.lengths(rows, range(len(rows)))
        tokens, layers = sum(lengths), self.prefix_layers
        what = f"{layers} of {self.start} frozen layers, {tokens:,} tokens"
        self.add("prefix", what, 1, seen.seconds, tokens, self.work.forward(lengths, (0, layers)), seen)
        if layers < self.start:
            whole = self.work.forward(lengths, (0, self.start))
            self.add("prefix", what, 1, seen.seconds * self.start / layers, tokens, whole, seen,
                     f"{self.start} frozen layers, in proportion")  # fmt: skip

    def trainer(self, states: BoundaryStates) -> Trainer:
        from usaf.trainer import Trainer

        session = self.session
        assert session.order is not None
        return Trainer(session.model, states, session.data.train, session.order, self.values, self.values.steps)

    def samples(self) -> list[int]:
        """The rows that importance sees, as in a run: the first of the order."""
        order = self.session.order
        assert order is not None
        return order.first_rows(min(self.values.importance_samples, len(self.session.data.train)))

    def importance(self, states: BoundaryStates, trainer: Trainer) -> Importance:
        from usaf.importance import find_important, sample_chunks

        session, samples, rows = self.session, self.samples(), self.session.data.train
        chunk_rows = session.chunk_rows(rows)
        pieces = 2 * len(sample_chunks(samples, chunk_rows)) * (session.model.num_layers - self.start)
        with phase("importance", pieces, "chunk") as bar, self.watch() as seen:
            found = find_important(session.model, states, rows, samples, self.values.frac, chunk_rows,
                                   self.values.head_chunk_tokens, bar.update,
                                   projections=self.values.projections, score=self.values.importance_score)  # fmt: skip
        trainer.activate(found.active)
        lengths = self.lengths(rows, samples)
        work = self.work.importance(lengths, self.start, self.values.projections, self.head_trains())
        self.add("importance", f"{self.trained()}, {len(samples)} sequences", 1, seen.seconds, sum(lengths), work, seen)
        return found

    def rates(self, states: BoundaryStates, found: Importance) -> None:
        """Both lines, as in a run that has neither rate set; the steps that follow keep theirs."""
        from usaf.learning_rate import fresh_rows, measure_learning_rates

        session, rows = self.session, self.session.data.train
        assert session.order is not None
        unset = replace(self.values, lr_peak=None, head_lr=None)
        with phase("rates", 0, "point") as bar, self.watch() as seen:
            _, turns = measure_learning_rates(unset, session.model, states, rows, session.order, found, bar.update)
        lengths = self.lengths(rows, fresh_rows(session.order, rows, found.sequences).trained)
        points = {name: 1 + turn.points for name, turn in turns.items()}  # and where the line begins
        through = points["lr_peak"] * lengths
        work = self.forward_from_start(through, head=True)
        if "head_lr" in points:  # whose line goes through the layers once
            work += self.forward_from_start(lengths) + self.work.forward(points["head_lr"] * lengths, (0, 0), head=True)
            through = through + lengths
        what = f"{self.trained()}, {' and '.join(map(str, points.values()))} points of {len(lengths)} sequences"
        self.add("rates", what, 1, seen.seconds, sum(through), work, seen)

    def forward_from_start(self, lengths: list[int], head: bool = False) -> Work:
        return self.work.forward(lengths, (self.start, self.session.model.num_layers), head=head)

    def activate_any(self, trainer: Trainer) -> None:
        """Evenly spread active weights, where importance is not measured."""
        import torch

        from usaf.importance import counts_by_name

        counts = counts_by_name(
            trainer.model, self.start, self.values.frac, self.values.projections, self.different_targets()
        )
        generator = torch.Generator().manual_seed(0)
        active = {}
        for name, bank in trainer.banks.items():
            count = counts[name]
            place = torch.randint(max(1, bank.numel // max(1, count)), (count,), generator=generator)
            active[name] = torch.arange(count) * bank.numel // max(1, count) + place
        trainer.activate(active)

    def steps(self, trainer: Trainer) -> None:
        """Steps, those that capture, and the reselection after them."""
        from usaf.trainer import StepResult

        given = self.arguments
        ordinary: list[StepResult] = []
        capturing: list[StepResult] = []
        reselecting = self.values.reselect_every > 0
        total = self.values.reselect_every if reselecting else self.values.steps

        def steps(count: int, into: list[StepResult], bar: Any) -> Any:
            with self.watch() as watched:
                for _ in range(count):
                    into.append(trainer.train_step())
                    bar.update()
            return watched

        with phase("step", total, "step") as bar:
            steps(WARM_UP_STEPS, [], bar)
            seen = steps(given.steps, ordinary, bar)
            if reselecting:
                capture_seen = steps(total - trainer.step, capturing, bar)
        chosen = "" if "importance" in given.phases else ", active weights spread evenly"
        what = f"{self.trained()}, {given.microbatch} x {given.seq_len}{chosen}"
        self.add_steps("step", what, ordinary, seen)
        if not reselecting:
            return
        self.add_steps("capture", what, capturing, capture_seen)
        with self.watch() as seen:
            changed = trainer.reselect_if_due()
        assert changed is not None
        tokens = sum(result.tokens for result in capturing)
        lengths = [given.seq_len] * (tokens // given.seq_len)
        work = self.work.dense_gradients(lengths, self.start, self.values.projections, self.head_trains())
        self.add("reselection", f"{self.trained()}, {len(capturing)} captured steps, {changed.dropped:,} exchanged", 1,
                 seen.seconds, tokens, work, seen)  # fmt: skip

    def add_steps(self, name: str, what: str, results: list[Any], seen: Any) -> None:
        seconds = statistics.median(result.seconds for result in results)
        lengths = [self.arguments.seq_len] * (self.values.microbatch * self.values.accum)
        work = self.work.step(lengths, self.start, *self.densities())
        self.add(name, what, len(results), seconds, results[0].tokens, work, seen)

    def evaluation(self, states: BoundaryStates) -> None:
        from usaf.evaluation import evaluate

        lengths = self.lengths(states.rows, range(len(states.rows)))
        model = self.session.model
        with phase("evaluation", EVALUATIONS * sum(lengths), "tok") as bar, self.watch() as seen:
            seconds = benchmark.timed(
                lambda: evaluate(model, states, "evaluation", self.values.head_chunk_tokens, bar.update),
                EVALUATIONS, self.session.backend.synchronize,
            )  # fmt: skip
        self.add("evaluation", f"{self.trained()}, {len(lengths)} sequences, cached states", EVALUATIONS, seconds,
                 sum(lengths), self.forward_from_start(lengths, head=True), seen)  # fmt: skip

    # -- measuring -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[SimpleNamespace]:
        """Seconds and peak memory of the block, there when it has ended."""
        from usaf.memory import PeakMemory

        seen, memory = SimpleNamespace(), PeakMemory()
        began = time.perf_counter()
        try:
            yield seen
            self.session.backend.synchronize()
            seen.seconds = time.perf_counter() - began
        finally:
            memory.stop()
            seen.private, seen.resident = memory.private, memory.resident

    def add(self, name: str, what: str, runs: int, seconds: float, tokens: int, work: Work, seen: Any,
            scaled_to: str | None = None) -> None:  # fmt: skip
        self.figures.append(Figure(name, what, runs, seconds, tokens, work, seen.private, seen.resident, scaled_to))

    def trained(self) -> str:
        return f"layers {self.start}-{self.session.model.num_layers - 1}"

    def ratios(self) -> dict[str, float]:
        """What the targets are put in: to a step, and to the training of as many tokens."""
        by_phase = {figure.phase: figure for figure in self.figures if figure.scaled_to is None}
        step, importance, found = by_phase.get("step"), by_phase.get("importance"), {}
        if importance is not None:
            found["importance_seconds_per_sequence"] = importance.seconds / len(self.samples())
        if importance is not None and step is not None:
            found["importance_share_of_training_time"] = step.tokens_per_second() / importance.tokens_per_second()
        for name in ("rates", "capture", "reselection"):
            if name in by_phase and step is not None:
                found[f"{name}_share_of_a_step"] = by_phase[name].seconds / step.seconds
        return found


# The report.


def report(arguments: argparse.Namespace, bench: Bench) -> None:
    machine = benchmark.machine()
    rate = bench.product_rate()
    say()
    say(benchmark.machine_line(machine))
    out, inputs = bench.product_shape
    rates = ", ".join(f"{rows} rows {bench.product_rate(rows) / 1e9:.1f}" for rows in PRODUCT_ROWS)
    say(f"plain fp32 product with [{out}, {inputs}], GFLOP/s, mean of before and after: {rates}")
    layers = bench.session.model.num_layers
    say(f"{arguments.folder}: {layers} layers, of which {bench.start} frozen; device {bench.session.backend.name}; "
        f"loaded in {bench.load_seconds:.1f} s")  # fmt: skip
    say()
    say(figures_table(bench.figures, rate))
    ratios = bench.ratios()
    if ratios:
        say()
        say(table([[name.replace("_", " "), f"{value:.3f}"] for name, value in ratios.items()], ["ratio", ""]))
    if arguments.json is not None:
        benchmark.write_json(arguments.json, {
            "machine": machine, "folder": str(arguments.folder), "layers": layers, "train_from": bench.start,
            "prefix_layers": bench.prefix_layers, "product_shape": bench.product_shape,
            "product_gflop_per_second": {
                when: {str(rows): value / 1e9 for rows, value in rates.items()}
                for when, rates in zip(("before", "after"), bench.product_rates, strict=True)
            },
            "load_seconds": bench.load_seconds, "decisions": bench.session.decisions,
            "settings": bench.session.settings.to_json(),
            "phases": [figure.to_json(rate) for figure in bench.figures], **ratios,
        })  # fmt: skip


def figures_table(figures: Sequence[Figure], product_rate: float) -> str:
    header = ["phase", "measured on", "scaled to", "runs", "seconds", "tok/s", "GFLOP", "GFLOP/s", "share",
              "GB private", "resident"]  # fmt: skip
    rows = []
    for figure in figures:
        rate, tokens = figure.work.total / figure.seconds, f"{figure.tokens_per_second():.1f}"
        rows.append([
            figure.phase, figure.measured_on, figure.scaled_to or "-",
            "1" if figure.runs == 1 else f"median of {figure.runs}", f"{figure.seconds:.2f}",
            "-" if figure.phase == "reselection" else tokens, f"{figure.work.total / 1e9:,.1f}",
            f"{rate / 1e9:.1f}", f"{rate / product_rate:.0%}",
            f"{figure.private_bytes / 1e9:.2f}", f"{figure.resident_bytes / 1e9:.2f}",
        ])  # fmt: skip
    return table(rows, header)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: bench_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
