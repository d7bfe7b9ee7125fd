"""One fine-tuning run from prepared settings to the final table: the phases in their order, and what each leaves behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from usaf.console import phase, say, table
from usaf.delta import Delta, experts_moved, load_delta, save_delta
from usaf.errors import UserError
from usaf.evaluation import Evaluation
from usaf.importance import find_important
from usaf.memory import PeakMemory
from usaf.run import RunFolder, SavedState, list_checkpoints, load_checkpoint
from usaf.session import Session, default_tag, evaluate_all, fill_all, load, prepare, versions
from usaf.settings import ResolvedSettings
from usaf.trainer import ReselectResult, StepResult, Trainer

INTERRUPTED = 130


class Job:
    """The state of one run. `interrupted` is set by Ctrl-C or SIGTERM while steps run, and heeded after the step."""

    def __init__(self, session: Session, run: RunFolder, memory: PeakMemory) -> None:
        self.session, self.run, self.memory = session, run, memory
        self.values = session.settings.values
        self.began = time.perf_counter()
        self.seconds_before = 0.0  # of the processes that this one resumes
        self.phase_seconds: dict[str, float] = {}
        self.before: list[dict[str, Any]] = []  # evaluations of step 0
        self.tokens = 0
        self.step_seconds = 0.0
        self.half_overlap: float | None = None
        self.save_pending = self.interrupted = False
        self.prefix_rate: float | None = None

    # -- logging -------------------------------------------------------------------------------------------------------

    def phase_done(self, name: str, seconds: float) -> None:
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        self.run.log("phase", name=name, seconds=round(seconds, 3), peak_memory_bytes=self.memory.private)

    def log_step(self, result: StepResult) -> None:
        if result.skipped:
            say(f"step {result.step}: loss or gradient not finite, skipped")
            self.run.log("warning", step=result.step, message="loss or gradient not finite, step skipped")
        self.run.log(
            "step", step=result.step, loss=result.loss, learning_rate=result.learning_rate,
            router_learning_rate=result.router_learning_rate, grad_norm=result.grad_norm, tokens=result.tokens,
            tokens_per_second=result.tokens / result.seconds, peak_memory_bytes=self.memory.private,
        )  # fmt: skip

    def log_evaluations(self, step: int, results: list[Evaluation]) -> None:
        for r in results:
            self.run.log(
                "eval", step=step, name=r.name, loss=r.loss, perplexity=r.perplexity, tokens=r.tokens,
                routing_entropy=r.routing_entropy, starved_experts=r.starved_experts,
            )  # fmt: skip

    # -- phases --------------------------------------------------------------------------------------------------------

    def fill_prefix(self) -> None:
        session = self.session
        assert session.order is not None
        self.states = session.boundary(session.data.train, session.order.chunks)
        self.evaluations = session.evaluation_states()
        everything = [self.states, *self.evaluations.values()]
        fill_all(everything, self.phase_done)
        computed = sum(s.tokens_computed for s in everything)
        if computed and "frozen prefix" in self.phase_seconds:
            self.prefix_rate = computed / self.phase_seconds["frozen prefix"]

    def evaluate(self, step: int) -> list[Evaluation]:
        results = evaluate_all(self.session, self.evaluations, self.phase_done)
        self.log_evaluations(step, results)
        say(f"step {step}: perplexity " + ", ".join(f"{r.name} {r.perplexity:.3f}" for r in results))
        self.warn_of_collapse(step, results)
        return results

    def warn_of_collapse(self, step: int, results: list[Evaluation]) -> None:
        """Say so when training starves experts that the base model used."""
        starved_before = {e["name"]: e["starved_experts"] for e in self.before}
        for r in results:
            if r.starved_experts > starved_before.get(r.name, r.starved_experts):
                message = f"{r.name}: {r.starved_experts} experts get almost no tokens, {starved_before[r.name]} before training"
                say(f"warning: {message}; lower ROUTER_LR")
                self.run.log("warning", step=step, message=message)

    def choose_weights(self, trainer: Trainer) -> None:
        """Importance over the first sequences of the run's order, and the first resumable checkpoint."""
        session, values = self.session, self.values
        assert session.order is not None
        count = min(values.importance_samples, len(session.data.train))
        samples: list[int] = []
        index = 0
        while len(samples) < count:  # epochs may repeat rows before all were seen; each is scored once
            samples += [row for row in dict.fromkeys(session.order.micro_batch(index)) if row not in set(samples)]
            index += 1
        rows = session.chunk_rows(session.data.train)
        chunk = max(1, min(rows, (count + 1) // 2))
        chunks, layers = -(-count // chunk), session.model.num_layers - session.start
        with phase("importance", 2 * chunks * layers, "chunk", self.phase_done) as bar:
            found = find_important(
                session.model, self.states, session.data.train, samples[:count], values.frac, rows,
                values.head_chunk_tokens, bar.update,
            )  # fmt: skip
        trainer.activate(found.active)
        self.half_overlap = found.half_overlap
        self.run.log("importance", sequences=found.sequences, active=trainer.active_parameters(),
                     half_overlap=found.half_overlap)  # fmt: skip
        say(f"importance: {trainer.active_parameters():,} weights of {expert_parameters(session):,} chosen from "
            f"{found.sequences} sequences; masks of disjoint halves agree on {found.half_overlap:.0%}")  # fmt: skip

    def train(self, trainer: Trainer) -> None:
        """Steps until the end, or until interrupted; logs, evaluates and saves on the way."""
        with phase("train", trainer.steps - trainer.step, "step", self.phase_done) as bar:

            def after_step(result: StepResult, reselection: ReselectResult | None) -> bool:
                bar.update(1)
                bar.set_postfix_str(f"loss {result.loss:.3f}", refresh=False)
                self.tokens += result.tokens
                self.step_seconds += result.seconds
                self.log_step(result)
                if reselection is not None:
                    self.run.log("reselect", step=reselection.step, active=reselection.active,
                                 dropped=reselection.dropped, grown=reselection.grown, turnover=reselection.turnover)  # fmt: skip
                return self.cadence(trainer)

            previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                trainer.run(after_step)
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("finishing this step and saving; once more to stop at once", file=sys.stderr)

    def cadence(self, trainer: Trainer) -> bool:
        """Evaluate and save when due. A save that falls into a capture window waits for its reselection, but for an
        interrupt, which saves the captured pairs too. Returns whether to go on."""
        step = trainer.step
        if (
            self.values.eval_every
            and step % self.values.eval_every == 0
            and step < trainer.steps
            and not self.interrupted
        ):
            self.evaluate(step)
        self.save_pending |= step % self.values.save_every == 0
        if self.interrupted or (self.save_pending and not trainer.in_capture_window()):
            self.save(trainer)
        return not self.interrupted

    def save(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        saved = trainer.state()
        self.run.log("save", step=trainer.step)
        about = {
            **saved.about, "model_fingerprint": self.session.model.base_fingerprint,
            "data_fingerprint": self.session.data_fingerprint(), "decisions": self.session.decisions,
            "before": self.before, "tokens": self.tokens, "step_seconds": self.step_seconds,
            "half_overlap": self.half_overlap, "metrics_bytes": self.run.metrics_bytes(),
            "seconds": self.seconds_before + time.perf_counter() - self.began, "prefix_rate": self.prefix_rate,
        }  # fmt: skip
        self.run.save(trainer.step, SavedState(saved.tensors, about), self.values.keep_checkpoints)
        self.save_pending = False
        self.phase_seconds["save"] = self.phase_seconds.get("save", 0.0) + time.perf_counter() - began

    def restore(self, trainer: Trainer, saved: SavedState) -> None:
        about = saved.about
        for name, now in (("model", self.session.model.base_fingerprint), ("data", self.session.data_fingerprint())):
            if about[f"{name}_fingerprint"] != now:
                raise UserError(f"RESUME={self.run.folder}: the {name} is no longer what this run began with; restore its "
                                "files, or start a new run")  # fmt: skip
        trainer.restore(saved)
        self.before, self.tokens, self.step_seconds = about["before"], about["tokens"], about["step_seconds"]
        self.half_overlap, self.seconds_before = about["half_overlap"], about["seconds"]
        self.prefix_rate = self.prefix_rate or about["prefix_rate"]
        self.run.truncate_metrics(about["metrics_bytes"])
        say(f"resumed at step {trainer.step}")

    # -- the end -------------------------------------------------------------------------------------------------------

    def delta_about(self, trainer: Trainer) -> dict[str, Any]:
        shapes = {name: list(bank.base.shape) for name, bank in trainer.banks.items()}
        return {"expert_shapes": shapes, "step": trainer.step, "decisions": self.session.decisions,
                "settings": self.session.settings.to_json(), "versions": versions()}  # fmt: skip

    def summarise(self, trainer: Trainer, after: list[Evaluation], delta_bytes: int) -> dict[str, Any]:
        session = self.session
        delta = load_delta(self.run.delta_path)  # counted from the file: what is reported is what was saved
        before = {e["name"]: e["perplexity"] for e in self.before}
        return {
            "model": self.values.model or "demo", "model_type": session.checkpoint.config.model_type,
            "device": session.backend.name, "dtype": str(session.backend.compute_dtype).removeprefix("torch."),
            "steps": trainer.step, "steps_skipped": trainer.skipped, "seed": self.values.seed,
            "active_parameters": trainer.active_parameters(), "expert_parameters": expert_parameters(session),
            "router_parameters": sum(r.weight.numel() for r in trainer.routers.values()),  # type: ignore[union-attr,operator]
            "train_loss_first": mean(trainer.losses["first"]), "train_loss_last": mean(trainer.losses["last"]),
            "evaluations": [{"name": r.name, "perplexity_before": before[r.name], "perplexity_after": r.perplexity}
                            for r in after],
            "importance_half_overlap": self.half_overlap,
            "tokens_per_second": self.tokens / self.step_seconds if self.step_seconds else None,
            "prefix_tokens_per_second": self.prefix_rate,
            "seconds_total": self.seconds_before + time.perf_counter() - self.began,
            "phase_seconds": {name: round(s, 3) for name, s in self.phase_seconds.items()},
            "peak_memory_bytes": self.memory.private, "peak_resident_bytes": self.memory.resident,
            "peak_device_memory_bytes": session.backend.memory_bytes(),
            "delta_bytes": delta_bytes, "delta_path": str(self.run.delta_path),
            "experts_moved": moved_by_layer(session, delta),
        }  # fmt: skip


def moved_by_layer(session: Session, delta: Delta) -> list[dict[str, int]]:
    sizes = {
        name: bank.expert_size for moe in session.model.moe for name, bank in zip(moe.names, moe.banks, strict=True)
    }
    moved = experts_moved(delta, sizes)
    return [
        {
            "layer": moe.layer,
            "experts": moe.banks[0].num_experts,
            "moved": moved.get(moe.names[0].rpartition(".")[0], 0),
        }
        for moe in session.model.moe_from(session.start)
    ]


def expert_parameters(session: Session) -> int:
    """Expert weights of the trainable layers: what FRAC is a fraction of."""
    return sum(bank.numel for moe in session.model.moe_from(session.start) for bank in moe.banks)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def open_folder(settings: ResolvedSettings, resume_from: Path | None) -> RunFolder:
    if resume_from is not None:
        return RunFolder(resume_from)
    tag = settings.values.run_tag or default_tag()
    folder = Path(settings.values.output_dir).expanduser() / tag
    if (folder / "settings.json").is_file():
        raise UserError(
            f"RUN_TAG={tag}: {folder} already holds a run; go on with RESUME={folder}, or choose another RUN_TAG"
        )
    return RunFolder(folder)


def terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_job(settings: ResolvedSettings, resume_from: Path | None) -> int:
    """Everything after the settings are known. Returns the exit status."""
    memory = PeakMemory()
    signal.signal(signal.SIGTERM, terminate)
    checkpoints = list_checkpoints(resume_from) if resume_from is not None else []
    saved = load_checkpoint(checkpoints[-1]) if checkpoints else None
    session = prepare(settings, saved.about["decisions"] if saved else None)
    say(session.settings.table())
    say()
    say(f"device: {session.backend.name}, {session.backend.description} ({session.backend.reason})")
    for note in session.data.notes:
        say(f"data: {note}")
    run = open_folder(session.settings, resume_from)
    try:
        job = Job(session, run, memory)
        if saved is None:
            run.truncate_metrics(0)
        write_run_settings(job)
        say(f"run: {run.folder}")
        load(session, job.phase_done)
        write_run_settings(job)
        return run_phases(job, saved)
    finally:
        run.close()
        memory.stop()


def write_run_settings(job: Job) -> None:
    session = job.session
    model = getattr(session, "model", None)
    job.run.write_settings(session.settings, {
        "versions": versions(), "device": {"name": session.backend.name, "description": session.backend.description,
                                           "reason": session.backend.reason},
        "model_fingerprint": model.base_fingerprint if model is not None else None,
        "data_fingerprint": session.data_fingerprint(), "decisions": session.decisions,
    })  # fmt: skip


def run_phases(job: Job, saved: SavedState | None) -> int:
    session = job.session
    job.fill_prefix()
    assert session.order is not None
    trainer = Trainer(
        session.model, job.states, session.data.train, session.order, job.values, session.settings.values.steps
    )  # fmt: skip
    if saved is not None:
        job.restore(trainer, saved)
    else:
        results = job.evaluate(0)
        job.before = [
            {"name": r.name, "loss": r.loss, "perplexity": r.perplexity, "starved_experts": r.starved_experts}
            for r in results
        ]
        job.choose_weights(trainer)
        job.save(trainer)
    job.train(trainer)
    if job.interrupted:
        say(f"stopped at step {trainer.step} of {trainer.steps}; go on with RESUME={job.run.folder}")
        return INTERRUPTED
    return finish(job, trainer)


def finish(job: Job, trainer: Trainer) -> int:
    """The final checkpoint, the delta, the last evaluation, the summary and the table."""
    job.save(trainer)
    delta_bytes = save_delta(job.run.delta_path, trainer.delta(job.delta_about(trainer)))
    after = job.evaluate(trainer.step)
    summary = job.summarise(trainer, after, delta_bytes)
    job.run.write_summary(summary)
    say()
    say(final_table(summary))
    say()
    say(f"result: {summary['delta_path']} ({delta_bytes / 1e6:.2f} MB); the same figures from the file: "
        f"python -m usaf.evaluate --delta {summary['delta_path']}")  # fmt: skip
    return 0


def final_table(summary: dict[str, Any]) -> str:
    def change(before: float, after: float) -> str:
        return f"{after / before - 1:+.1%}" if before else ""

    rows = []
    first, last = summary["train_loss_first"], summary["train_loss_last"]
    if first is not None and last is not None:
        rows.append(["training loss (first, last tenth)", f"{first:.4f}", f"{last:.4f}", change(first, last)])
    for e in summary["evaluations"]:
        before, after = e["perplexity_before"], e["perplexity_after"]
        rows.append([f"perplexity {e['name']}", f"{before:.3f}", f"{after:.3f}", change(before, after)])
    moved, experts = (sum(layer[key] for layer in summary["experts_moved"]) for key in ("moved", "experts"))
    rate = summary["tokens_per_second"]
    facts = [
        ["active expert weights", f"{summary['active_parameters']:,} of {summary['expert_parameters']:,}"],
        ["router weights", f"{summary['router_parameters']:,}"],
        ["experts moved", f"{moved} of {experts}"],
        ["training speed", f"{rate:.0f} tokens/s" if rate else "no step in this process"],
        ["time in all", f"{summary['seconds_total']:.0f} s"],
        ["peak memory (private / with mapped files)",
         f"{summary['peak_memory_bytes'] / 1e9:.2f} / {summary['peak_resident_bytes'] / 1e9:.2f} GB"],
    ]  # fmt: skip
    if summary["peak_device_memory_bytes"] is not None:
        facts.append(["peak device memory", f"{summary['peak_device_memory_bytes'] / 1e9:.2f} GB"])
    return table(rows, ["", "before", "after", "change"]) + "\n\n" + table(facts, ["", "value"])
