"""The final figures of a run: `summary.json` and the table that a user sees.

What is reported of the result is counted from the saved file, so that it is true of what was saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from usaf.console import table
from usaf.delta import Delta, experts_moved, load_delta
from usaf.evaluation import Evaluation
from usaf.session import Session
from usaf.trainer import Trainer


@dataclass
class Totals:
    """What the summary adds up over all processes of a run; every checkpoint carries it."""

    before: list[dict[str, Any]] = field(default_factory=list)  # evaluations of step 0
    evaluated_step: int = 0  # the last step with an evaluation
    tokens: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    prefix_tokens_per_second: float | None = None
    half_overlap: float | None = None
    peak_private_bytes: int = 0
    peak_resident_bytes: int = 0
    peak_device_bytes: int | None = None


def summarise(
    session: Session, trainer: Trainer, totals: Totals, after: list[Evaluation], delta_path: Path
) -> dict[str, Any]:
    """summary.json. Figures that JSON cannot hold (nan, inf) are null."""
    values = session.settings.values
    delta = load_delta(delta_path)  # counted from the file: what is reported is what was saved
    before = {e["name"]: e["perplexity"] for e in totals.before}
    return {
        "model": values.model or "demo", "model_type": session.checkpoint.config.model_type,
        "device": session.backend.name, "dtype": str(session.backend.compute_dtype).removeprefix("torch."),
        "steps": trainer.step, "steps_skipped": trainer.skipped, "seed": values.seed,
        "active_parameters": trainer.active_parameters(), "expert_parameters": expert_parameters(session),
        "head_parameters": len(trainer.model.head.delta) if trainer.model.head is not None else 0,
        "router_parameters": sum(weight.numel() for name, weight in delta.whole.items() if name in trainer.routers),
        "norm_parameters": sum(delta.whole[name].numel() for name in trainer.model.norms),
        "train_loss_first": mean(trainer.losses["first"]), "train_loss_last": mean(trainer.losses["last"]),
        "evaluations": [{"name": r.name, "perplexity_before": before.get(r.name),
                         "perplexity_after": finite(r.perplexity)} for r in after],
        "importance_half_overlap": totals.half_overlap, "delta_scale": values.delta_scale,
        "tokens_per_second": totals.tokens / totals.step_seconds if totals.step_seconds else None,
        "prefix_tokens_per_second": totals.prefix_tokens_per_second,
        "seconds_total": totals.seconds,
        "phase_seconds": {name: round(s, 3) for name, s in totals.phase_seconds.items()},
        "peak_memory_bytes": totals.peak_private_bytes, "peak_resident_bytes": totals.peak_resident_bytes,
        "peak_device_memory_bytes": totals.peak_device_bytes,
        "delta_bytes": delta_path.stat().st_size, "delta_path": str(delta_path),
        "share_lost_to_rounding": lost_share(session),
        "experts_moved": moved_by_layer(session, delta),
    }  # fmt: skip


def moved_by_layer(session: Session, delta: Delta) -> list[dict[str, int]]:
    """Of each trainable MoE layer: how many experts there are, and how many have a weight off its base value."""
    layers = session.model.moe_from(session.start)
    sizes = {name: bank.part_size for moe in layers for name, bank in zip(moe.names, moe.banks, strict=True)}
    moved = experts_moved(delta, sizes)
    return [
        {"layer": moe.layer, "experts": moe.banks[0].num_experts, "moved": moved[moe.names[0].rpartition(".")[0]]}
        for moe in layers
    ]


def lost_share(session: Session) -> float | None:
    """The part of the moved weights that the device's 16-bit arithmetic does not see; None where it computes wider."""
    dtype = session.backend.compute_dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    counts = [weights.lost_to_rounding(dtype) for weights in session.model.sparse_weights(session.start).values()]
    moved = sum(m for _, m in counts)
    return sum(lost for lost, _ in counts) / moved if moved else 0.0


def expert_parameters(session: Session) -> int:
    """Expert weights of the trainable layers: what FRAC is a fraction of."""
    return sum(bank.numel for moe in session.model.moe_from(session.start) for bank in moe.banks)


def mean(values: list[float]) -> float | None:
    return finite(sum(values) / len(values)) if values else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def final_table(summary: dict[str, Any]) -> str:
    """Before and after, then what it took; "not finite" where there is no figure."""
    rows = [change_row("training loss (first, last tenth)", summary["train_loss_first"], summary["train_loss_last"], 4)]
    rows += [
        change_row(f"perplexity {e['name']}", e["perplexity_before"], e["perplexity_after"], 3)
        for e in summary["evaluations"]
    ]
    moved, experts = (sum(layer[key] for layer in summary["experts_moved"]) for key in ("moved", "experts"))
    rate = summary["tokens_per_second"]
    facts = [
        ["active weights of experts", f"{summary['active_parameters'] - summary['head_parameters']:,} of "
         f"{summary['expert_parameters']:,}"],
        ["active weights of the head", f"{summary['head_parameters']:,}"],
        ["router and norm weights", f"{summary['router_parameters']:,} and {summary['norm_parameters']:,}"],
        ["experts moved", f"{moved} of {experts}"],
        ["part of the change kept (DELTA_SCALE)", f"{summary['delta_scale']:g}"],
        ["training speed", f"{rate:.0f} tokens/s" if rate else "not measured"],
        ["time in all", f"{summary['seconds_total']:.0f} s"],
        ["peak memory (private / with mapped files)",
         f"{summary['peak_memory_bytes'] / 1e9:.2f} / {summary['peak_resident_bytes'] / 1e9:.2f} GB"],
    ]  # fmt: skip
    if summary.get("share_lost_to_rounding") is not None:
        facts.append(["moved weights lost to 16-bit rounding here", f"{summary['share_lost_to_rounding']:.0%}"])
    if summary["peak_device_memory_bytes"] is not None:
        facts.append(["peak device memory", f"{summary['peak_device_memory_bytes'] / 1e9:.2f} GB"])
    return table(rows, ["", "before", "after", "change"]) + "\n\n" + table(facts, ["", "value"])


def change_row(name: str, before: float | None, after: float | None, digits: int) -> list[str]:
    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.{digits}f}"

    change = "" if before is None or after is None or before == 0 else f"{after / before - 1:+.1%}"
    return [name, shown(before), shown(after), change]
