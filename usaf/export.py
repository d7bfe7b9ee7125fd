"""`python -m usaf.export --delta runs/x/delta.safetensors --output folder`: the fine-tuned model for other programs.

Writes a Hugging Face folder (see `merged_folder`), then evaluates what lies in it, beside the same result on the other
base and the run's own function. The three differ by the error of 4 bits and of rounding; users should see by how much.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usaf.console import (
    LateBar,
    Parser,
    add_delta_flags,
    add_json_flag,
    add_scale_flag,
    run_command,
    say,
    table,
)

if TYPE_CHECKING:
    import torch

    from usaf.evaluation import Evaluation
    from usaf.merge import BaseName, Counts, Merge, StoredWeights
    from usaf.session import Session

DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m usaf.export", "Merge a saved delta into its checkpoint: a Hugging Face folder.")
    add_delta_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--base", choices=("original", "dequantized"), default="original",
        help="what the delta is added to: the checkpoint's own weights (default), or the 4-bit experts, decoded, which "
        "is exactly the model that the run ended with",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto",
                        help="type of what is written anew (default auto: the checkpoint's own)")  # fmt: skip
    add_scale_flag(parser)
    parser.add_argument("--no-evaluate", action="store_true", help="skip the perplexities of what was exported")
    add_json_flag(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: export_command(parse(sys.argv[1:] if argv is None else argv)))


def export_command(arguments: argparse.Namespace) -> int:
    import torch

    from usaf.delta import load_delta
    from usaf.files import require_writable, write_json
    from usaf.merge import Merge
    from usaf.merged_folder import refuse_place, refuse_taken, whole_folder, write_folder
    from usaf.session import Session, apply_delta, load, prepare, prepare_model, settings_of_run

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    (scale,) = arguments.scale
    refuse_taken(arguments.output)
    began = time.perf_counter()
    delta = load_delta(arguments.delta)
    settings, decisions = settings_of_run(delta, arguments), delta.about["decisions"]
    session = prepare_model(settings, decisions) if arguments.no_evaluate else prepare(settings, decisions, train=False)
    refuse_place(arguments.output, session.checkpoint.folder)
    load(session)
    delta = apply_delta(session, delta, arguments.delta, scale)
    assert session.store is not None
    dtype_name = DTYPES[arguments.dtype]
    dtype = None if dtype_name is None else getattr(torch, dtype_name)
    merge = Merge(session.checkpoint, session.store, delta, arguments.base, dtype)
    about = {"delta": str(arguments.delta), "scale": scale, "base": arguments.base, "dtype": arguments.dtype,
             "model": settings.values.model or "demo", "step": delta.about["step"],
             "base_fingerprint": delta.base_fingerprint}  # fmt: skip
    bar = LateBar("export", "B")
    try:
        with whole_folder(arguments.output) as folder:
            counts = write_folder(merge, folder, about, lambda done, total: bar(done, total, "export"))
    finally:
        bar.abandon()
    figures = {**about, "output": str(arguments.output), **count_figures(counts)}
    report_counts(figures)
    if isinstance(session, Session):
        figures["evaluations"] = compare(session, merge, arguments.output, scale)
    figures["seconds_total"] = time.perf_counter() - began
    say(f"exported to {arguments.output}; transformers loads it with AutoModelForCausalLM.from_pretrained")
    if arguments.json is not None:
        write_json(arguments.json, figures)
    return 0


def count_figures(counts: Counts) -> dict[str, Any]:
    return {
        "active_nonzero_elements": counts.active, "changed_elements": counts.changed,
        "share_lost_to_rounding": counts.share_lost, "experts_changed": len(counts.experts_changed),
    }  # fmt: skip


def report_counts(figures: dict[str, Any]) -> None:
    say(f"{figures['changed_elements']:,} of {figures['active_nonzero_elements']:,} trained weights differ from the "
        f"base as written, in {figures['experts_changed']} experts; {figures['share_lost_to_rounding']:.1%} were lost "
        f"to rounding{'' if figures['dtype'] == 'fp32' else ' (--dtype fp32 keeps them)'}")  # fmt: skip


# ---- perplexities of what was exported ------------------------------------------------------------------------------


def compare(session: Session, merge: Merge, output: Path, scale: float) -> list[dict[str, Any]]:
    """Losses of the run's own function, of the exported files, and of the same result on the other base."""
    from usaf.merge import Merge, StoredWeights
    from usaf.session import evaluate_all

    other: BaseName = "dequantized" if merge.base == "original" else "original"
    results = {
        "as trained": evaluate_all(session, session.evaluation_states()),
        merge.base: evaluate_merged(session, StoredWeights(output, merge), output.parent),
        other: evaluate_merged(
            session, Merge(merge.checkpoint, merge.store, merge.delta, other, merge.dtype), output.parent
        ),
    }
    columns = ["as trained", "original", "dequantized"]
    rows = [
        [evaluation.name, *(f"{results[column][i].perplexity:.4f}" for column in columns)]
        for i, evaluation in enumerate(results["as trained"])
    ]
    marks = {column: f"{column} + delta{' (exported)' if column == merge.base else ''}" for column in columns[1:]}
    say()
    say(table(rows, ["perplexity", "as trained" if scale == 1 else f"at scale {scale:g}", *marks.values()]))
    say()
    return [
        {"name": evaluation.name, "tokens": evaluation.tokens,
         **{f"loss_{column.replace(' ', '_')}": results[column][i].loss for column in columns},
         **{f"perplexity_{column.replace(' ', '_')}": results[column][i].perplexity for column in columns}}
        for i, evaluation in enumerate(results["as trained"])
    ]  # fmt: skip


def evaluate_merged(session: Session, weights: Merge | StoredWeights, folder: Path) -> list[Evaluation]:
    """The run's evaluations with these weights in the place of base and delta. The session is spent after it.

    weights: a `Merge`, or the `StoredWeights` of an exported one; folder: where states may lie meanwhile.
    """
    import torch

    from usaf.session import evaluate_all, fill_all

    for moe in session.model.moe:
        for name, bank in zip(moe.names, moe.banks, strict=True):
            bank.set_active(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
            bank.resident = ReadExperts(lambda e, name=name: weights.expert(name, e), bank.device)  # type: ignore
    for name, parameter in session.model.whole_weights(0, routers=True).items():
        if name in weights.trained_whole:
            parameter.data.copy_(weights.whole(name))
    head = session.model.head
    if head is not None:
        head.set_active(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        head.weight = torch.nn.Parameter(weights.merged_head().to(head.device), requires_grad=False)
    # States of another function than the run's: in a cache of their own, for as long as this takes.
    with tempfile.TemporaryDirectory(prefix=".usaf-", dir=folder) as cache:
        session.settings = session.settings.replace("export", prefix_cache_dir=cache, use_frozen_cache=True)
        states = session.evaluation_states()
        fill_all(list(states.values()))
        return evaluate_all(session, states)


class ReadExperts:
    """Experts that are read one at a time, in the place of a bank's resident copies."""

    def __init__(self, read: Callable[[int], torch.Tensor], device: torch.device) -> None:
        self.read, self.device = read, device

    def __getitem__(self, e: int) -> torch.Tensor:
        return self.read(e).to(self.device)

    def to(self, device: torch.device, _: torch.dtype) -> ReadExperts:
        return ReadExperts(self.read, device)


if __name__ == "__main__":
    sys.exit(main())
