"""`python -m usaf.evaluate --delta runs/x/delta.safetensors`: the loss of a saved result, in a new process.

Model, data and every decision that decides a bit (threads, chunk sizes, resident copies) come from the run that saved
the delta, so on the CPU the losses equal the run's own to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from usaf.console import (
    Parser,
    add_base_flag,
    add_delta_flags,
    add_json_flag,
    add_scale_flag,
    refuse_scaled_base,
    run_command,
    say,
    table,
)

if TYPE_CHECKING:
    from usaf.evaluation import Evaluation


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m usaf.evaluate", "Evaluate a saved delta.")
    add_delta_flags(parser)
    parser.add_argument("--dataset", help="the run's training data, if it has moved (its in_domain split is evaluated)")
    parser.add_argument("--heldout", help="held-out data in place of the run's: JSONL files, comma-separated")
    add_base_flag(parser)
    add_scale_flag(parser, several=True)
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    refuse_scaled_base(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: evaluate_command(parse(sys.argv[1:] if argv is None else argv)))


def evaluate_command(arguments: argparse.Namespace) -> int:
    from usaf.delta import load_delta
    from usaf.files import require_writable, write_json
    from usaf.session import apply_delta, evaluate_all, load, prepare, settings_of_run

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    delta = load_delta(arguments.delta)
    moved = {"dataset_path": arguments.dataset, "heldout_path": arguments.heldout}
    settings = settings_of_run(delta, arguments)
    settings = settings.replace("flag", **{name: value for name, value in moved.items() if value is not None})
    session = prepare(settings, delta.about["decisions"], train=False)
    load(session)
    states = session.evaluation_states()
    results = {}
    for scale in arguments.scale:
        if not arguments.base:
            apply_delta(session, delta, arguments.delta, scale)
        results[scale] = evaluate_all(session, states)
    say()
    say(table_of(results))
    if arguments.json is not None:
        evaluations: list[dict[str, Any]] = [
            {"scale": scale, "step": delta.about["step"], "perplexity": r.perplexity, **dataclasses.asdict(r)}
            for scale, found in results.items() for r in found
        ]  # fmt: skip
        write_json(arguments.json, {"delta": str(arguments.delta), "base_only": arguments.base,
                                    "evaluations": evaluations})  # fmt: skip
    return 0


def table_of(results: dict[float, list[Evaluation]]) -> str:
    """Loss and perplexity at one scale; the perplexities beside each other at several."""
    if len(results) == 1:
        (found,) = results.values()
        rows = [[r.name, f"{r.loss:.6f}", f"{r.perplexity:.4f}", f"{r.tokens:,}"] for r in found]
        return table(rows, ["", "loss", "perplexity", "tokens"])
    of_each_set = zip(*results.values(), strict=True)
    rows = [[found[0].name, *(f"{r.perplexity:.4f}" for r in found)] for found in of_each_set]
    return table(rows, ["perplexity at scale", *(f"{scale:g}" for scale in results)])


if __name__ == "__main__":
    sys.exit(main())
