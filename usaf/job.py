"""One fine-tuning run from prepared settings to the final table: the phases in order, and what each leaves behind.

A new run checks everything that can be checked before it makes its folder, and takes the folder away again when it is
refused before its first checkpoint. A resumed run locks its folder first, then reads the newest checkpoint, and writes
nothing until model and data have proved to be the ones it began with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from usaf.console import phase, say
from usaf.data import FEWEST
from usaf.delta import save_delta
from usaf.delta_scale import Measured, measure_delta_scale
from usaf.errors import RunError, UserError
from usaf.evaluation import Evaluation
from usaf.importance import Importance, find_important, sample_chunks
from usaf.learning_rate import measure_learning_rates
from usaf.memory import PeakMemory, return_freed
from usaf.run import RunFolder, SavedState, list_checkpoints, load_checkpoint
from usaf.session import Session, default_tag, evaluate_all, fill_all, load, output_folder, prepare, versions
from usaf.settings import FIELDS, ResolvedSettings
from usaf.summary import Totals, expert_parameters, final_table, finite, summarise
from usaf.trainer import ReselectResult, StepResult, Trainer
from usaf.workspace import PRIVATE, Memory

INTERRUPTED = 130

MEASURED = "measured"
"""Source of a setting that the run found out by trying."""


class _GivenUp(Exception):
    """The run was interrupted in an evaluation."""


class Job:
    """The state of one run. `interrupted` is set by Ctrl-C or SIGTERM while steps run, and heeded after the step, or
    after the chunk of an evaluation."""

    def __init__(self, session: Session, run: RunFolder, memory: PeakMemory) -> None:
        self.session, self.run, self.memory = session, run, memory
        self.values = session.settings.values
        self.totals = Totals()
        self.counted_until = time.perf_counter()
        self.saved_step: int | None = None
        self.save_pending = self.interrupted = False

    # -- logging -------------------------------------------------------------------------------------------------------

    def phase_done(self, name: str, seconds: float) -> None:
        self.totals.phase_seconds[name] = self.totals.phase_seconds.get(name, 0.0) + seconds
        self.run.log("phase", name=name, seconds=round(seconds, 3), peak_memory_bytes=self.memory.private)
        return_freed()

    def log_step(self, result: StepResult) -> None:
        if result.skipped:
            say(f"step {result.step}: loss or gradient not finite, skipped")
            self.run.log("warning", step=result.step, message="loss or gradient not finite, step skipped")
        self.run.log(
            "step", step=result.step, loss=result.loss, learning_rate=result.learning_rate,
            head_learning_rate=result.head_learning_rate, router_learning_rate=result.router_learning_rate,
            grad_norm=result.grad_norm, tokens=result.tokens,
            tokens_per_second=result.tokens / result.seconds, peak_memory_bytes=self.memory.private,
        )  # fmt: skip

    def log_reselection(self, result: ReselectResult) -> None:
        self.run.log("reselect", step=result.step, active=result.active, dropped=result.dropped, grown=result.grown,
                     turnover=result.turnover)  # fmt: skip

    def log_evaluations(self, step: int, results: list[Evaluation]) -> None:
        for r in results:
            self.run.log(
                "eval", step=step, name=r.name, loss=r.loss, perplexity=r.perplexity, tokens=r.tokens,
                routing_entropy=r.routing_entropy, starved_experts=r.starved_experts,
            )  # fmt: skip

    # -- phases --------------------------------------------------------------------------------------------------------

    def fill_prefix(self, trains: bool) -> None:
        """The boundary states of the evaluation sets, and of the training set where steps are left, cached where they
        are to be. Where the disk has no room for all, evaluation sets go before: they are read at every evaluation, a
        training row once an epoch."""
        session = self.session
        assert session.order is not None
        self.states = session.boundary(session.data.train, session.order.chunks)
        self.evaluations = session.evaluation_states()
        everything = [*self.evaluations.values(), *([self.states] if trains else [])]
        began = time.perf_counter()
        fill_all(everything, self.phase_done)
        computed = sum(s.tokens_computed for s in everything)
        if computed:
            self.totals.prefix_tokens_per_second = computed / (time.perf_counter() - began)

    def evaluate(self, step: int) -> list[Evaluation]:
        results = evaluate_all(self.session, self.evaluations, self.phase_done, self.heed_interrupt)
        self.log_evaluations(step, results)
        self.totals.evaluated_step = step
        say(f"step {step}: perplexity " + ", ".join(f"{r.name} {r.perplexity:.3f}" for r in results))
        self.warn_of_collapse(step, results)
        return results

    def heed_interrupt(self) -> None:
        if self.interrupted:
            raise _GivenUp

    def evaluate_between_steps(self, step: int) -> None:
        """Unless it is interrupted; then the resumed run makes up for it."""
        with contextlib.suppress(_GivenUp):
            self.heed_interrupt()
            self.evaluate(step)

    def evaluate_before(self) -> None:
        """Step 0: what every later figure is compared with."""
        self.totals.before = [
            {"name": r.name, "loss": r.loss, "perplexity": finite(r.perplexity), "starved_experts": r.starved_experts}
            for r in self.evaluate(0)
        ]

    def warn_of_collapse(self, step: int, results: list[Evaluation]) -> None:
        """Say so when training starves experts that the base model used."""
        starved_before = {e["name"]: e["starved_experts"] for e in self.totals.before}
        worse: dict[str, list[str]] = {}  # what is said -> the sets it is true of: often all of them
        for r in results:
            before = starved_before.get(r.name, r.starved_experts)
            if r.starved_experts > before:
                said = f"{r.starved_experts} experts get almost no tokens, {before} before training"
                worse.setdefault(said, []).append(r.name)
        for said, names in worse.items():
            say(f"warning: {', '.join(names)}: {said}; lower ROUTER_LR")
            self.run.log("warning", step=step, message=f"{', '.join(names)}: {said}")

    def importance_samples(self) -> list[int]:
        order = self.session.order
        assert order is not None
        return order.first_rows(min(self.values.importance_samples, len(self.session.data.train)))

    def choose_weights(self, trainer: Trainer) -> None:
        """Importance over the first sequences of the run's order."""
        session, samples = self.session, self.importance_samples()
        rows = session.chunk_rows(session.data.train)
        work = 2 * len(sample_chunks(samples, rows)) * (session.model.num_layers - session.start)
        with phase("importance", work, "chunk", self.phase_done) as bar:
            found = find_important(
                session.model, self.states, session.data.train, samples, self.values.frac, rows,
                self.values.head_chunk_tokens, bar.update, session.workspace("importance"), self.values.projections,
                self.values.importance_score,
            )  # fmt: skip
        trainer.activate(found.active)
        self.note_importance(trainer, found)
        self.settle_learning_rates(trainer, found)

    def note_importance(self, trainer: Trainer, found: Importance) -> None:
        overlap = self.totals.half_overlap = finite(found.half_overlap)
        self.run.log("importance", sequences=found.sequences, active=trainer.active_parameters(), half_overlap=overlap)
        agreement = "one sequence has no halves to compare" if overlap is None else (
            f"masks of disjoint halves agree on {overlap:.0%}")  # fmt: skip
        say(f"importance: {trainer.active_parameters():,} weights ({expert_parameters(self.session):,} x FRAC) chosen "
            f"from {found.sequences} sequences; {agreement}")  # fmt: skip

    def settle_learning_rates(self, trainer: Trainer, found: Importance) -> None:
        """Measure those that are not set; from here on they are settings like others, of a run that is resumed too."""
        session, values = self.session, self.values
        assert session.order is not None
        if values.lr_peak is not None and (values.head_lr is not None or session.model.head is None):
            return
        with phase("learning rates", 0, "point", self.phase_done) as bar:
            rates, turns = measure_learning_rates(
                values, session.model, self.states, session.data.train, session.order, found, bar.update,
                session.workspace("importance") or PRIVATE, session.unseen_states(),
            )  # fmt: skip
        session.settings = session.settings.replace(MEASURED, **rates)
        self.values = trainer.settings = session.settings.values
        self.write_settings()
        for name, turn in turns.items():
            self.run.log("learning_rate", name=name.upper(), rate=rates[name], **dataclasses.asdict(turn))
            what = "head's" if name == "head_lr" else "experts'"
            found_at = "never falls along its gradient, so this is by width" if turn.at is None else (
                f"turns when the {what} weights move by {turn.at:.2g}")  # fmt: skip
            say(f"settled: {name.upper()} = {rates[name]:g} (measured: the loss {found_at})")

    def train(self, trainer: Trainer) -> None:
        """Steps until the end, or until interrupted; logs, evaluates and saves on the way."""
        with phase("train", trainer.steps - trainer.step, "step", self.phase_done) as bar, self.heeding_interrupts():
            if self.totals.evaluated_step < trainer.step and self.evaluation_due(trainer):
                self.evaluate_between_steps(trainer.step)  # it comes after its step's checkpoint

            def after_step(result: StepResult, reselection: ReselectResult | None) -> bool:
                bar.update(1)
                bar.set_postfix_str(f"loss {result.loss:.3f}", refresh=False)
                self.totals.tokens += result.tokens
                self.totals.step_seconds += result.seconds
                self.log_step(result)
                if reselection is not None:
                    self.log_reselection(reselection)
                return self.cadence(trainer)

            if not self.interrupted:
                trainer.run(after_step)

    @contextlib.contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of the step, but not of an evaluation. (At other times they end the
        command at once, which leaves nothing half-written either.)"""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("finishing this step and saving; once more to stop at once", file=sys.stderr)

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signals
            return
        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def evaluation_due(self, trainer: Trainer) -> bool:
        """The last step is none of these: its evaluation follows the delta."""
        every = self.values.eval_every
        return every > 0 and trainer.step % every == 0 and trainer.step < trainer.steps

    def cadence(self, trainer: Trainer) -> bool:
        """Save and evaluate when due, the steps first: an evaluation may take long, and who waits for it may lose
        patience. A save that falls into a capture window waits for its reselection, but for an interrupt, which saves
        the captured pairs too. Returns whether to go on."""
        self.save_pending |= trainer.step % self.values.save_every == 0
        if self.save_pending and not trainer.in_capture_window():
            self.save(trainer)
        if self.evaluation_due(trainer):
            self.evaluate_between_steps(trainer.step)
        stops = self.interrupted  # one that comes now waits for the next step
        if stops and self.saved_step != trainer.step:
            self.save(trainer)
        return not stops

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Bring the totals up to this moment."""
        now, totals = time.perf_counter(), self.totals
        totals.seconds += now - self.counted_until
        self.counted_until = now
        totals.peak_private_bytes = max(totals.peak_private_bytes, self.memory.private)
        totals.peak_resident_bytes = max(totals.peak_resident_bytes, self.memory.resident)
        on_device = self.session.backend.memory_bytes()
        if on_device is not None:
            totals.peak_device_bytes = max(totals.peak_device_bytes or 0, on_device)

    def save(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        saved = trainer.state()
        self.run.log("save", step=trainer.step)
        self.count()
        about = {
            **saved.about, "model_fingerprint": self.session.model.base_fingerprint,
            "data_fingerprint": self.session.data_fingerprint, "decisions": self.session.decisions,
            "metrics_bytes": self.run.metrics_bytes(), "totals": dataclasses.asdict(self.totals),
        }  # fmt: skip
        self.run.save(trainer.step, SavedState(saved.tensors, about), self.values.keep_checkpoints)
        self.saved_step, self.save_pending = trainer.step, False
        spent = time.perf_counter() - began
        self.totals.phase_seconds["save"] = self.totals.phase_seconds.get("save", 0.0) + spent

    def restore(self, trainer: Trainer, saved: SavedState) -> None:
        trainer.restore(saved)
        earlier, now = Totals(**saved.about["totals"]), self.totals
        for name, seconds in now.phase_seconds.items():
            earlier.phase_seconds[name] = earlier.phase_seconds.get(name, 0.0) + seconds
        earlier.prefix_tokens_per_second = now.prefix_tokens_per_second or earlier.prefix_tokens_per_second
        self.totals, self.saved_step = earlier, trainer.step
        saved.tensors.clear()  # the caller holds `saved` to the end of the run
        say(f"resumed at step {trainer.step}")

    def write_settings(self) -> None:
        session = self.session
        self.run.write_settings(session.settings, {
            "versions": versions(),
            "device": {"name": session.backend.name, "description": session.backend.description,
                       "reason": session.backend.reason},
            "model_fingerprint": session.model.base_fingerprint if session.loaded else None,
            "data_fingerprint": session.data_fingerprint, "decisions": session.decisions,
        })  # fmt: skip

    # -- the whole -----------------------------------------------------------------------------------------------------

    def execute(self, saved: SavedState | None) -> int:
        """Every phase, from loading to the summary. Returns the exit status."""
        session = self.session
        phases: list[tuple[str, float]] = []  # nothing is written before the model has proved to be the same
        load(session, lambda name, seconds: phases.append((name, seconds)))
        if saved is not None:
            refuse_change("model", saved, session.model.base_fingerprint, self.run.folder)
        self.run.truncate_metrics(saved.about["metrics_bytes"] if saved is not None else 0)
        for name, seconds in phases:
            self.phase_done(name, seconds)
        self.run.remove_summary()
        self.write_settings()
        self.fill_prefix(trains=saved is None or saved.about["step"] < self.values.steps)
        assert session.order is not None
        trainer = Trainer(
            session.model, self.states, session.data.train, session.order, self.values, self.values.steps,
            session.workspace("captured"),
        )  # fmt: skip
        if saved is not None:
            self.restore(trainer, saved)
        else:
            self.evaluate_before()
            self.choose_weights(trainer)
            self.save(trainer)
        self.train(trainer)
        if self.interrupted:
            say(f"stopped at step {trainer.step} of {trainer.steps}; go on with RESUME={self.run.folder}")
            return INTERRUPTED
        self.finish(trainer)
        return 0

    def finish(self, trainer: Trainer) -> None:
        """The final checkpoint (all of the change, in fp32), the delta, the last evaluation, summary and table."""
        if self.saved_step != trainer.step:
            self.save(trainer)
        self.settle_delta_scale(trainer)
        trainer.round_deltas()
        delta_bytes = save_delta(self.run.delta_path, trainer.delta(self.delta_about(trainer)))
        after = self.evaluate(trainer.step)
        self.count()
        summary = summarise(self.session, trainer, self.totals, after, self.run.delta_path)
        self.run.write_summary(summary)
        say()
        say(final_table(summary))
        say()
        say(f"result: {summary['delta_path']} ({delta_bytes / 1e6:.2f} MB); the same figures from the file: "
            f"python -m usaf.evaluate --delta {summary['delta_path']}")  # fmt: skip

    def settle_delta_scale(self, trainer: Trainer) -> None:
        """Keep as much of the change as DELTA_SCALE says; what was measured is from here on a setting like others."""
        session = self.session
        if self.values.delta_scale is not None:
            found = keep_of_change(session, trainer)
        else:
            with phase("delta scale", 0, "point", self.phase_done) as bar:
                found = keep_of_change(session, trainer, session.workspace("importance") or PRIVATE, bar.update)
            session.settings = session.settings.replace(MEASURED, delta_scale=found.scale)
            self.values = session.settings.values
            self.write_settings()
            say(f"settled: DELTA_SCALE = {found.scale:g} ({self.reason_of_scale(found)})")
        self.run.log("delta_scale", scale=found.scale, sequences=found.sequences, evaluated=found.evaluated,
                     losses={f"{place:g}": finite(loss) for place, loss in found.losses.items()})  # fmt: skip

    def reason_of_scale(self, found: Measured) -> str:
        if found.losses:
            losses = ", ".join(f"{loss:.4f} at {place:g}" for place, loss in found.losses.items())
            those = ", some of in_domain's samples, as too few others are left" if found.evaluated else (
                " that nothing trained on")  # fmt: skip
            return f"measured on {found.sequences} sequences{those}: a loss of {losses}"
        remedy = "raise IN_DOMAIN_FRACTION" + ("" if self.values.epochs else ", or lower STEPS")
        return (f"to measure it there are not {FEWEST} sequences, of as many samples, that neither train nor are held "
                f"out; for such a run {remedy}")  # fmt: skip

    def delta_about(self, trainer: Trainer) -> dict[str, Any]:
        shapes = {name: list(weights.shape) for name, weights in trainer.banks.items()}
        return {"shapes": shapes, "step": trainer.step, "decisions": self.session.decisions,
                "settings": self.session.settings.to_json(), "versions": versions()}  # fmt: skip


def keep_of_change(
    session: Session, trainer: Trainer, memory: Memory = PRIVATE, progress: Callable[[int], None] = lambda _: None
) -> Measured:
    """Behind the last step: leave the model with as much of the change as DELTA_SCALE says, or as is measured."""
    trainer.free_gradients()
    given = trainer.settings.delta_scale
    on = session.scale_sequences() if given is None else None
    found = Measured(1.0 if given is None else given, {}, 0)
    if on is None and found.scale == 1:
        return found
    change = trainer.change()
    if on is not None:
        found = measure_delta_scale(trainer.settings, session.model, change, on, progress, memory)
    change.move_to(found.scale)
    return found


# ---- beginning and resuming -----------------------------------------------------------------------------------------


def run_job(settings: ResolvedSettings, resume_from: Path | None) -> int:
    """Everything after the settings are known. Returns the exit status."""
    memory = PeakMemory()
    try:
        return begin(settings, memory) if resume_from is None else resume(settings, resume_from, memory)
    finally:
        memory.stop()


def begin(settings: ResolvedSettings, memory: PeakMemory) -> int:
    """A new run in a new folder."""
    refuse_taken_tag(settings)
    say(settings.table())
    session = prepare(settings)
    announce(session, settings)
    parent = output_folder(session.settings.values)
    parent_is_ours = not parent.exists()
    run = RunFolder(parent / (settings.values.run_tag or default_tag()))
    try:
        say(f"run: {run.folder}")
        job = Job(session, run, memory)
        job.write_settings()  # so that a run killed before its first checkpoint can be resumed too
        return job.execute(None)
    except RunError:
        raise  # a full disk is no refusal: the folder is what RESUME goes on from
    except UserError:
        if not list_checkpoints(run.folder):
            run.close()
            take_away(run.folder, parent_is_ours)
        raise
    finally:
        run.close()


def resume(settings: ResolvedSettings, folder: Path, memory: PeakMemory) -> int:
    """A run that another process began, from its newest checkpoint, or from its beginning where it has none."""
    run = RunFolder(folder)
    try:
        checkpoints = list_checkpoints(folder)
        saved = load_checkpoint(checkpoints[-1]) if checkpoints else None
        settings = settings if saved else unmeasured(settings)
        say(settings.table())
        session = prepare(settings, saved.about["decisions"] if saved else None)
        if saved is not None:
            refuse_other_device(saved, session, folder)
            refuse_change("data", saved, session.data_fingerprint, folder)
        announce(session, settings)
        say(f"run: {folder}")
        return Job(session, run, memory).execute(saved)
    finally:
        run.close()


def unmeasured(settings: ResolvedSettings) -> ResolvedSettings:
    """Without what an earlier process has measured by the settings of then; it left nothing that was trained by it."""
    measured = [name for name in FIELDS if settings.sources[name] == MEASURED]
    return settings.replace("default", **{name: FIELDS[name].default for name in measured})


def announce(session: Session, asked: ResolvedSettings) -> None:
    """What model and data settled of the settings, the device and why, and what was found in the data."""
    say()
    for name in FIELDS:
        value = getattr(session.settings.values, name)
        if value != getattr(asked.values, name):
            say(f"settled: {name.upper()} = {value} ({session.settings.sources[name]})")
    chosen = session.decisions
    say(f"settled: CPU_THREADS = {chosen['threads']}, ATTENTION = {chosen['attention']}")
    say(f"device: {session.backend.name}, {session.backend.description} ({session.backend.reason})")
    if session.kept is not None:
        say(session.kept.line)
    for note in session.data.notes:
        say(f"data: {note}")


def refuse_taken_tag(settings: ResolvedSettings) -> None:
    tag = settings.values.run_tag
    folder = output_folder(settings.values) / (tag or "")
    if tag is not None and (folder / "settings.json").is_file():
        raise UserError(
            f"RUN_TAG={tag}: {folder} already holds a run; go on with RESUME={folder}, or choose another RUN_TAG"
        )


def refuse_other_device(saved: SavedState, session: Session, folder: Path) -> None:
    """Another device computes in another type and rounds otherwise: never silently."""
    was, now = saved.about["decisions"], session.decisions
    for name in ("device", "compute"):
        if was[name] != now[name]:
            raise UserError(
                f"RESUME={folder}: the run began on {was['device']} in {was['compute']}, and this would go on on "
                f"{now['device']} in {now['compute']} ({session.backend.reason}); make the first available, or start a "
                "new run"
            )


def refuse_change(what: str, saved: SavedState, now: str, folder: Path) -> None:
    """what: model or data."""
    named = {"model": "MODEL, QUANT_PATH", "data": "DATASET_PATH, HELDOUT_PATH, EVAL_SAMPLES, the tokenizer"}[what]
    if saved.about[f"{what}_fingerprint"] != now:
        raise UserError(
            f"RESUME={folder}: the {what} is no longer what this run began with ({named}); restore its files, or start "
            "a new run"
        )


def take_away(folder: Path, with_parent: bool) -> None:
    """Remove a run that was refused before its first checkpoint: what we made in `folder`, and nothing else."""
    for name in ("settings.json", "metrics.jsonl", ".lock"):
        (folder / name).unlink(missing_ok=True)
    for ours in [folder / "checkpoints", folder, *([folder.parent] if with_parent else [])]:
        with contextlib.suppress(OSError):  # somebody else's files are in it
            ours.rmdir()
