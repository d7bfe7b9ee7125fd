"""`python -m usaf.quantize MODEL`: make the 4-bit file alone, one expert in memory at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from usaf.errors import UserError
from usaf.evaluate import Parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m usaf.quantize", description="Write a model's experts in 4 bits.", allow_abbrev=False
    )
    parser.add_argument("model", help="Hugging Face id or local folder of an MoE checkpoint")
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: experts_q4.safetensors beside the model)"
    )
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="bits a weight (default 4)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    if arguments.group_size < 8 or arguments.group_size > 1024 or arguments.group_size % 2:
        raise UserError(f"--group-size {arguments.group_size}: must be even, from 8 to 1024; 128 is the default")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from usaf.console import run_command

    return run_command(lambda: quantize_command(arguments))


def quantize_command(arguments: argparse.Namespace) -> int:
    import time

    from usaf.checkpoint import Checkpoint, resolve_model
    from usaf.console import LateBar, say
    from usaf.expert_store import convert, find_path
    from usaf.files import write_json
    from usaf.memory import PeakMemory

    memory = PeakMemory()
    began = time.perf_counter()
    checkpoint = Checkpoint(resolve_model(arguments.model))
    path, there = find_path(checkpoint, None if arguments.output is None else str(arguments.output))
    if there or path.suffix == ".pt":
        raise UserError(f"{path}: is there already (or is of the legacy format); delete it, or give another --output")
    convert(checkpoint, path, arguments.group_size, arguments.bits, LateBar("quantise", "expert"))
    memory.stop()
    weights = sum(
        checkpoint.model.get_parameter(t).numel() for pair in checkpoint.expert_parameters().values() for t in pair
    )
    size = path.stat().st_size
    say(f"{path}: {weights:,} expert weights in {size / 1e9:.3f} GB, {8 * size / weights:.2f} bits a weight")
    if arguments.json is not None:
        write_json(arguments.json, {
            "path": str(path), "file_bytes": size, "expert_parameters": weights, "bits_per_weight": 8 * size / weights,
            "group_size": arguments.group_size, "seconds": time.perf_counter() - began,
            "peak_memory_bytes": memory.private,
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
