"""`python -m usaf.evaluate --delta runs/x/delta.safetensors`: the loss of a saved result, in a new process.

Model, data and every decision that decides a bit (threads, chunk sizes, resident copies) come from the run that saved
the delta, so on the CPU the losses equal the run's own to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from usaf.console import Parser, add_base_flag, add_delta_flags, add_json_flag, run_command, say, table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m usaf.evaluate", "Evaluate a saved delta.")
    add_delta_flags(parser)
    parser.add_argument("--dataset", help="the run's training data, if it has moved (its in_domain split is evaluated)")
    parser.add_argument("--heldout", help="held-out data in place of the run's: JSONL files, comma-separated")
    add_base_flag(parser)
    add_json_flag(parser)
    return parser.parse_args(argv)


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
    if not arguments.base:
        apply_delta(session, delta, arguments.delta)
    results = evaluate_all(session, session.evaluation_states())
    say()
    rows = [[r.name, f"{r.loss:.6f}", f"{r.perplexity:.4f}", f"{r.tokens:,}"] for r in results]
    say(table(rows, ["", "loss", "perplexity", "tokens"]))
    if arguments.json is not None:
        evaluations: list[dict[str, Any]] = [
            {"step": delta.about["step"], "perplexity": r.perplexity, **dataclasses.asdict(r)} for r in results
        ]  # fmt: skip
        write_json(arguments.json, {"delta": str(arguments.delta), "base_only": arguments.base,
                                    "evaluations": evaluations})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
