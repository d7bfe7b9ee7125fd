"""`python -m usaf.plan --model ID_OR_FOLDER`: what a run would need here, before anything is downloaded or run.

Memory and disk are counted from config.json (`budget`), times from the same counts and a few seconds of measurement
(`plan_time`), for the settings given and for other values of TRAIN_FROM and MICROBATCH beside them. The data are not
read: they are taken to be packed rows of SEQ_LEN tokens, as many as the steps want.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usaf.console import Parser, add_json_flag, run_command, say, table
from usaf.demo import DEMO_MODEL, DEMO_SETTINGS
from usaf.errors import UserError
from usaf.settings import ResolvedSettings, Settings, build_parser, load_settings

if TYPE_CHECKING:
    from usaf.budget import MemoryPlan, Work
    from usaf.model_shape import ModelShape
    from usaf.plan_time import PhaseTime, Rates

PROG = "python -m usaf.plan"
DESCRIPTION = (
    "What a run with these settings needs: memory, disk and time, from config.json alone; the flags are those of "
    "usaf.train."
)
UNREAD_EVALUATION_ROWS = 64  # of a set of which EVAL_SAMPLES=0 takes all


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    environ = os.environ if environ is None else environ
    return run_command(lambda: plan_command(arguments, environ))


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Path | None, bool, ResolvedSettings]:
    """(--json, whether to measure, the settings)."""
    if {"-h", "--help"} & set(arguments):
        whole = build_parser(PROG)
        whole.description = DESCRIPTION
        add_own_flags(whole)
        whole.print_help()
        raise SystemExit(0)
    own = Parser(PROG, DESCRIPTION)
    add_own_flags(own)
    found, rest = own.parse_known_args(arguments)
    return found.json, not found.no_times, load_settings(rest, environ, DEMO_SETTINGS)


def add_own_flags(parser: Any) -> None:
    add_json_flag(parser)
    parser.add_argument("--no-times", action="store_true", help="memory and disk alone, nothing is measured")


def plan_command(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    try:
        path, measured, settings = parse(arguments, environ)
    except SystemExit:
        return 0
    from usaf.files import require_writable, write_json

    if path is not None:
        require_writable(path, "--json")
    found = Plan(settings, measured)
    say(found.text())
    if path is not None:
        write_json(path, found.figures())
    return 0


class Plan:
    """The plan of one set of settings and of its neighbours; `unknown`: what config.json does not say."""

    def __init__(self, settings: ResolvedSettings, measured: bool) -> None:
        from usaf.budget import SPILLABLE, Knobs, memory_plan, plan_for_limit
        from usaf.memory import private_bytes
        from usaf.session import settle_train_from

        self.folder, self.shape, self.model, self.unknown, self.has_experts_file = read_shape(settings.values)
        moe = [i for i, layer in enumerate(self.shape.layers) if layer.experts is not None]
        self.settings = settle_train_from(settings, len(self.shape.layers), self.shape.splits, moe)
        self.values = self.settings.values
        self.note_data()
        import torch

        self.threads = self.values.cpu_threads or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.baseline = private_bytes()
        self.limit = self.values.memory_limit
        self.knobs = Knobs(
            settings.sources["prefix_chunk_tokens"] in ("default", "demo"),
            settings.sources["head_chunk_tokens"] in ("default", "demo"), SPILLABLE,
        )  # fmt: skip
        self.work = self.work_of(self.values)
        if self.limit is not None:
            self.work, self.memory = plan_for_limit(self.shape, self.work, self.baseline, self.limit, self.knobs)
        else:
            self.memory = memory_plan(self.shape, self.work, self.baseline)
        self.rates = self.measure() if measured else None

    def work_of(self, values: Settings) -> Work:
        from usaf.budget import work_of

        assert values.train_from is not None
        rows = max(values.steps * values.accum * values.microbatch, values.importance_samples)
        sets = 1 + (len(values.heldout_path.split(",")) if values.heldout_path else 4 if values.model is None else 1)
        tokens = sets * (values.eval_samples or UNREAD_EVALUATION_ROWS) * values.seq_len
        itemsize = 4 if values.cache_dtype == "fp32" else 2
        return work_of(
            values, values.train_from, values.seq_len, rows * values.seq_len, rows, values.seq_len, tokens, itemsize,
            self.threads, quantises=not self.has_experts_file,
        )  # fmt: skip

    def note_data(self) -> None:
        values = self.values
        if values.epochs:
            self.unknown.append(f"EPOCHS={values.epochs} takes its steps from the data; STEPS={values.steps} is taken")
        if values.seq_len > (self.shape.context or values.seq_len):
            raise UserError(f"SEQ_LEN={values.seq_len}: the model's context is {self.shape.context}; lower SEQ_LEN")

    def measure(self) -> Rates:
        from usaf.plan_time import measure
        from usaf.session import cache_folder

        say("measuring this machine for a few seconds ...")
        files = [p for p in self.folder.glob("*.safetensors") if p.stat().st_size > 1 << 28]
        return measure(self.model, self.shape, self.work, cache_folder(self.values), max(files, default=None))

    def times(self, values: Settings, work: Work) -> list[PhaseTime]:
        from usaf.budget import last_reselection
        from usaf.plan_time import time_plan

        assert self.rates is not None
        every = values.reselect_every
        reselections = last_reselection(values) // every if work.capture_steps else 0
        evaluations = 2 + ((values.steps - 1) // values.eval_every if values.eval_every else 0)
        saves = 1 + -(-values.steps // values.save_every)
        return time_plan(self.shape, self.rates, work, values.steps, reselections, evaluations, saves)

    # -- neighbours

    def neighbours(self) -> list[tuple[int, int]]:
        """(TRAIN_FROM, MICROBATCH) worth comparing."""
        layers, start = len(self.shape.layers), self.work.start
        moe = [i for i, layer in enumerate(self.shape.layers) if layer.experts is not None]
        cuts = [cut for cut in self.shape.splits[:-1] if cut <= max(moe)]
        wanted = [layers - 2 * (layers - start), start, layers - max(1, (layers - start) // 2)]
        starts = {max((cut for cut in cuts if cut <= max(0, want)), default=cuts[0]) for want in wanted}
        batches = {max(1, self.values.microbatch // 2), self.values.microbatch, 2 * self.values.microbatch}
        return [(start, batch) for start in sorted(starts) for batch in sorted(batches)]

    def neighbour(self, start: int, batch: int) -> dict[str, Any]:
        """Figures of other settings; `peak_bytes` is above the limit where none would keep to it."""
        from usaf.budget import fit, memory_plan
        from usaf.settings import parse_size

        values = dataclasses.replace(self.values, train_from=start, microbatch=batch)
        work = self.work_of(values)
        if self.limit is not None:
            work = fit(self.shape, work, self.baseline, parse_size(self.limit), self.knobs)
        plan = memory_plan(self.shape, work, self.baseline)
        figures: dict[str, Any] = {
            "train_from": start, "microbatch": batch, "peak_memory_bytes": plan.peak_bytes,
            "peak_phase": plan.highest.name, "disk_bytes": sum(plan.disk.values()),
        }  # fmt: skip
        if self.rates is not None:
            times = self.times(values, work)
            step = next(t for t in times if t.name == "steps")
            figures |= {
                "step_seconds": step.each, "tokens_per_second": work.step_tokens * work.accum / step.each,
                "seconds_total": sum(t.seconds for t in times),
            }  # fmt: skip
        return figures

    # -- what is shown

    def text(self) -> str:
        parts = [self.heading(), memory_table(self.memory), self.chosen(), other_memory(self.memory)]
        if self.rates is not None:
            parts += [rates_line(self.rates), times_table(self.times(self.values, self.work))]
        return "\n\n".join(part for part in [*parts, self.comparison()] if part)

    def heading(self) -> str:
        shape, moe = self.shape, [layer.experts for layer in self.shape.layers if layer.experts is not None]
        weights = sum(e.weights for e in moe) + shape.shared_weights + sum(la.linear_weights for la in shape.layers)
        kind = moe[-1]
        lines = [
            f"{self.values.model or 'the bundled demo'}: {shape.model_type}, {weights / 1e9:.2f} B weights, "
            f"{len(shape.layers)} layers, {len(moe)} with {kind.count} experts (top-{kind.pairs_per_token:g})",
            f"TRAIN_FROM={self.work.start}, MICROBATCH={self.work.microbatch}, SEQ_LEN={self.values.seq_len}, "
            f"STEPS={self.values.steps}, IMPORTANCE_SAMPLES={self.values.importance_samples}",
        ]  # fmt: skip
        return "\n".join([*lines, *(f"not known: {what}" for what in self.unknown)])

    def chosen(self) -> str:
        if self.limit is None:
            return ""
        work = self.work
        said = f"for MEMORY_LIMIT={self.limit}: PREFIX_CHUNK_TOKENS={work.prefix_chunk_tokens}, "
        said += f"HEAD_CHUNK_TOKENS={work.head_chunk_tokens}"
        return said + (f", in mapped files: {', '.join(sorted(work.spilled))}" if work.spilled else "")

    def comparison(self) -> str:
        header = ["TRAIN_FROM", "MICROBATCH", "RAM, GB", "in", "disk, GB"]
        if self.rates is not None:
            header += ["a step, s", "tok/s", "in all, h"]
        rows = []
        for figures in (self.neighbour(*pair) for pair in self.neighbours()):
            row = [str(figures["train_from"]), str(figures["microbatch"]), gigabytes(figures["peak_memory_bytes"]),
                   figures["peak_phase"], gigabytes(figures["disk_bytes"])]  # fmt: skip
            if self.rates is not None:
                row += [f"{figures['step_seconds']:.2f}", f"{figures['tokens_per_second']:.1f}",
                        f"{figures['seconds_total'] / 3600:.2f}"]  # fmt: skip
            rows.append(row)
        return table(rows, header)

    def figures(self) -> dict[str, Any]:
        times = [] if self.rates is None else self.times(self.values, self.work)
        return {
            "model": self.values.model or "demo", "model_type": self.shape.model_type, "not_known": self.unknown,
            "settings": {k: v["value"] for k, v in self.settings.to_json().items()},
            "prefix_chunk_tokens": self.work.prefix_chunk_tokens, "head_chunk_tokens": self.work.head_chunk_tokens,
            "mapped_buffers": sorted(self.work.spilled), "threads": self.threads,
            "peak_memory_bytes": self.memory.peak_bytes, "peak_phase": self.memory.highest.name,
            "always_bytes": self.memory.always,
            "phases": [{"name": p.name, "peak_memory_bytes": self.memory.total(p), "items_bytes": p.items}
                       for p in self.memory.phases],
            "page_cache_bytes": self.memory.mapped, "disk_bytes": self.memory.disk,
            "device_bytes_not_tried": self.memory.device,
            "times": [{"name": t.name, "seconds": t.seconds, "times": t.times, "operations": t.operations,
                       "disk_seconds": t.disk_seconds} for t in times],
            "rates": None if self.rates is None else rates_figures(self.rates),
            "comparison": [self.neighbour(*pair) for pair in self.neighbours()],
        }  # fmt: skip


def read_shape(values: Settings) -> tuple[Path, ModelShape, Any, list[str], bool]:
    """(folder, shape, the model on the meta device, what is not known, whether there is a 4-bit file): from the
    checkpoint's headers where they are there and whole, else from config.json."""
    from usaf.checkpoint import Checkpoint
    from usaf.expert_store import find_path
    from usaf.model_shape import shape_of_checkpoint, shape_of_config
    from usaf.source_folder import INDEX_NAME, SINGLE_NAME, resolve_config

    folder = resolve_config(values.model or str(DEMO_MODEL))
    if (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file():
        try:
            checkpoint = Checkpoint(folder)
            there = find_path(checkpoint, values.quant_path)[1]
            return (
                folder,
                shape_of_checkpoint(checkpoint, values.group_size, values.quant_bits),
                checkpoint.model,
                [],
                there,
            )
        except UserError as error:
            said = f"the checkpoint in {folder} is not whole ({str(error)[:120]}); config.json alone is used"
    else:
        said = "the checkpoint is not here; config.json alone is used"
    shape, model, unknown = shape_of_config(folder, values.group_size, values.quant_bits)
    return folder, shape, model, [said, *unknown], False


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def memory_table(plan: MemoryPlan) -> str:
    """Private memory, a phase a line, with what fills it."""
    always = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.always.items())
    rows = []
    for phase in plan.phases:
        items = sorted(phase.items.items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{name} {gigabytes(size)}" for name, size in items if size >= 5e6)
        rows.append([phase.name, gigabytes(plan.total(phase)), told])
    lines = table(rows, ["private memory", "GB", "most of it, GB"]).splitlines()
    return "\n".join([*lines, f"in every phase: {always}"])


def other_memory(plan: MemoryPlan) -> str:
    def told(items: Mapping[str, int]) -> str:
        return (
            ", ".join(f"{name} {gigabytes(size)}" for name, size in items.items() if size >= 5e6) or "next to nothing"
        )

    return "\n".join([
        f"page cache wanted for full speed, GB: {told(plan.mapped)}",
        f"disk, GB: {told(plan.disk)}",
        f"device memory on a GPU, {gigabytes(sum(plan.device.values()))} GB by the same counts, not tried: "
        f"{told(plan.device)}",
    ])  # fmt: skip


def rates_line(rates: Rates) -> str:
    product = ", ".join(f"{rate / 1e9:.0f} at {rows} rows" for rows, rate in rates.product.items())
    return (
        f"measured in {rates.seconds:.0f} s on {rates.threads} threads: {product} (GFLOP/s, fp32 product); decoding "
        f"{rates.decode_weights / 1e9:.2f}, widening {rates.widen_weights / 1e9:.2f} G weights/s; disk "
        f"{rates.read_bytes / 1e9:.2f} GB/s read, {rates.write_bytes / 1e9:.2f} written"
    )


def rates_figures(rates: Rates) -> dict[str, Any]:
    return {
        "threads": rates.threads, "measuring_seconds": rates.seconds,
        "product_operations_per_second": {str(rows): rate for rows, rate in rates.product.items()},
        "decode_weights_per_second": rates.decode_weights, "widen_weights_per_second": rates.widen_weights,
        "quantize_weights_per_second": rates.quantize_weights, "read_bytes_per_second": rates.read_bytes,
        "write_bytes_per_second": rates.write_bytes,
        "experts": [{"count": e.count, "weights_of_one": r.weights,
                     **{f"{name}_seconds_by_rows": dict(zip(map(str, c.rows), c.seconds, strict=True))
                        for name, c in (("forward", r.forward), ("training", r.training), ("scoring", r.scoring),
                                        ("growing", r.growing))}}
                    for e, r in rates.experts.items()],
        "head": {"blocks": rates.head.blocks, "selection_seconds": rates.head.selection,
                 **{f"{name}_seconds_by_rows": dict(zip(map(str, c.rows), c.seconds, strict=True))
                    for name, c in (("forward", rates.head.forward), ("training", rates.head.training),
                                    ("dense", rates.head.dense), ("seeding", rates.head.seeding))}},
    }  # fmt: skip


def times_table(times: Sequence[PhaseTime]) -> str:
    rows = []
    for t in times:
        rate = f"{t.operations / t.seconds / 1e9:.0f}" if t.operations and t.seconds else ""
        disk = f"{t.disk_seconds:.0f}" if t.disk_seconds >= 0.5 else ""
        rows.append([t.name, f"{t.seconds:.1f}", str(t.times) if t.times > 1 else "", f"{t.each:.2f}", rate, disk])
    rows.append(["in all", f"{sum(t.seconds for t in times):.1f}", "", "", "", ""])
    return table(rows, ["phase", "seconds", "times", "each", "GFLOP/s", "disk, s"])


if __name__ == "__main__":
    sys.exit(main())
