"""MEMORY_LIMIT: a promise on private memory, planned before anything heavy is done, kept or refused.

What the plan lowers is stored: chunk sizes, which decide bits, as settings from the source "memory limit", so that
resume and evaluation take them over; the stretch and what lies in mapped files, which decide none, as decisions. A
resumed run keeps its chunk sizes, whatever the limit has become, and is refused where they no longer do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from usaf.budget import SPILLABLE, Knobs, MemoryPlan, Work, plan_for_limit, work_of
from usaf.checkpoint import Checkpoint
from usaf.data import Rows, TrainingData
from usaf.memory import private_bytes, return_at_once, return_freed
from usaf.model_shape import shape_of_checkpoint
from usaf.settings import FIELDS, ResolvedSettings, parse_size

CHOSEN = "memory limit"
OPEN = ("default", "demo", CHOSEN)
"""Sources of a setting that the user has left to us."""


@dataclass(frozen=True)
class Kept:
    """What keeps a run to its limit. line: for the user."""

    settings: ResolvedSettings
    plan: MemoryPlan
    decisions: dict[str, Any]
    line: str

    @property
    def room_bytes(self) -> int:
        """Left for copies that are wanted and not needed."""
        assert self.settings.values.memory_limit is not None
        return parse_size(self.settings.values.memory_limit) - self.plan.peak_bytes


def keep_to_limit(
    settings: ResolvedSettings, checkpoint: Checkpoint, data: TrainingData, threads: int, *,
    resumes: bool, quantises: bool, on_device: bool,
) -> Kept:  # fmt: skip
    """Plan a run for its MEMORY_LIMIT. resumes: its chunk sizes stand; quantises: it makes the 4-bit file.

    Raises:
        UserError: the limit is too low.
    """
    limit = settings.values.memory_limit
    assert limit is not None
    return_at_once()
    return_freed()
    chosen = [n for n in ("prefix_chunk_tokens", "head_chunk_tokens") if settings.sources[n] in OPEN and not resumes]
    for name in chosen:
        if settings.sources[name] == CHOSEN:  # of an attempt that left nothing to resume
            settings = settings.replace("default", **{name: FIELDS[name].default})
    shape = shape_of_checkpoint(checkpoint, settings.values.group_size, settings.values.quant_bits, masked(data))
    work = work_of_run(settings, data, threads, quantises, on_device)
    knobs = Knobs("prefix_chunk_tokens" in chosen, "head_chunk_tokens" in chosen, () if on_device else SPILLABLE)
    work, plan = plan_for_limit(shape, work, private_bytes(), limit, knobs)
    lowered = {n: getattr(work, n) for n in chosen if getattr(work, n) != getattr(settings.values, n)}
    if lowered:
        settings = settings.replace(CHOSEN, **lowered)
    decisions = {"stretch_bytes": work.stretch_bytes, "mapped_buffers": sorted(work.spilled)}
    return Kept(settings, plan, decisions, describe(work, plan, limit))


def work_of_run(settings: ResolvedSettings, data: TrainingData, threads: int, quantises: bool, on_device: bool) -> Work:
    values, sets = settings.values, [data.in_domain, *data.heldout.values()]
    assert values.train_from is not None
    cache_itemsize = 4 if values.cache_dtype == "fp32" else 2
    longest = max(sets, key=Rows.longest)
    return work_of(
        values, values.train_from, data.train.longest(), len(data.train.input_ids), len(data.train),
        longest.longest(), sum(len(rows.input_ids) for rows in sets), cache_itemsize, threads,
        quantises=quantises, on_device=on_device, different_targets=data.train.different_targets(),
    )  # fmt: skip


def masked(data: TrainingData) -> bool:
    """Whether rows are packed or, being of different lengths, padded: either needs a mask."""
    sets = [data.train, data.unseen, data.untrained, data.in_domain, *data.heldout.values()]
    return any(len(set(np.diff(rows.offsets).tolist())) > 1 or is_packed(rows) for rows in sets)


def is_packed(rows: Rows) -> bool:
    return int((rows.positions == 0).sum()) > len(rows)


def describe(work: Work, plan: MemoryPlan, limit: str) -> str:
    """The plan in a line."""
    said = f"memory: at most {plan.peak_bytes / 1e9:.2f} GB of MEMORY_LIMIT={limit} planned, in {plan.highest.name}"
    if work.spilled:
        size = plan.disk["workspace"] / 1e9
        said += f"; {', '.join(sorted(work.spilled))} in mapped files ({size:.2f} GB of disk while it runs)"
    return said
