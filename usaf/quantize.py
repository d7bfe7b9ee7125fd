"""`python -m usaf.quantize MODEL`: make the 4-bit file alone, one expert in memory at a time."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from usaf.console import LateBar, Parser, add_json_flag, run_command, say
from usaf.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m usaf.quantize", "Write a model's experts in 4 bits.")
    parser.add_argument("model", help="Hugging Face id or local folder of an MoE checkpoint")
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: experts_q4.safetensors beside the model)"
    )
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="bits a weight (default 4)")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.group_size < 8 or arguments.group_size > 1024 or arguments.group_size % 2:
        raise UserError(f"--group-size {arguments.group_size}: must be even, from 8 to 1024; 128 is the default")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: quantize_command(parse(sys.argv[1:] if argv is None else argv)))


def quantize_command(arguments: argparse.Namespace) -> int:
    from usaf.checkpoint import Checkpoint
    from usaf.expert_store import convert, find_path, read_store, shapes_of
    from usaf.files import require_writable, write_json
    from usaf.memory import PeakMemory
    from usaf.source_folder import resolve_model

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    memory = PeakMemory()
    began = time.perf_counter()
    checkpoint = Checkpoint(resolve_model(arguments.model))
    path, there = find_path(checkpoint, None if arguments.output is None else str(arguments.output), "--output")
    if there:
        raise UserError(f"{path}: is there already; delete it, or give another --output")
    convert(checkpoint, path, arguments.group_size, arguments.bits, LateBar("quantise", "expert"), "--output")
    memory.stop()
    counts = {name: math.prod(shape) for name, shape in shapes_of(checkpoint).items()}
    weights, store = sum(counts.values()), read_store(path)
    size = path.stat().st_size
    say(f"{path}: {weights:,} expert weights in {size / 1e9:.3f} GB, {8 * size / weights:.2f} bits a weight")
    if arguments.json is not None:
        write_json(arguments.json, {
            "path": str(path), "file_bytes": size, "expert_parameters": weights, "bits_per_weight": 8 * size / weights,
            "bits_per_code": arguments.bits, "group_size_weights": arguments.group_size,
            "expert_parameters_as_stored": sum(n for name, n in counts.items() if name not in store.quantized),
            "seconds_total": time.perf_counter() - began, "peak_memory_bytes": memory.private,
            "peak_resident_bytes": memory.resident,
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
