"""Peak memory of a whole run on a random Qwen3-MoE of a chosen size: makes model and data, runs, prints the figures.

    python scripts/measure_memory.py                     # 0.9 B weights: 8 layers, 64 experts, hidden 1024
    python scripts/measure_memory.py --hidden 256 --layers 4 --experts 16 TRAIN_FROM=2

The figures are those of the run's own summary.json. Random weights route evenly, so speed is not judged here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_model import Sizes, write_data, write_model

REPOSITORY = Path(__file__).resolve().parent.parent
FIGURES = (
    "active_parameters", "expert_parameters", "router_parameters", "tokens_per_second", "prefix_tokens_per_second",
    "peak_memory_bytes", "peak_resident_bytes", "phase_seconds", "experts_moved",
)  # fmt: skip


def run_training(folder: Path, steps: int, further: list[str]) -> dict[str, object]:
    """The summary of one run in `folder`."""
    settings = {
        "MODEL": folder / "model", "DATASET_PATH": folder / "data.jsonl", "STEPS": steps, "IMPORTANCE_SAMPLES": 16,
        "EVAL_SAMPLES": 4, "EVAL_EVERY": 0, "RESELECT_EVERY": 3, "RESELECT_UNTIL": 1, "OUTPUT_DIR": folder / "runs",
        "RUN_TAG": "memory", **dict(setting.split("=", 1) for setting in further),
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    subprocess.run([sys.executable, "train.py"], check=True, cwd=REPOSITORY, env=environment)
    return json.loads((folder / "runs" / "memory" / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("settings", nargs="*", help="further settings for the run, such as TRAIN_FROM=4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = Sizes(
            hidden=args.hidden, layers=args.layers, heads=args.hidden // 64, kv_heads=max(1, args.hidden // 256),
            experts=args.experts, top_k=min(8, args.experts), intermediate=args.hidden // 2,
        )  # fmt: skip
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder / "model", sizes))
        writer.start()
        writer.join()
        write_data(folder / "data.jsonl", 48, args.seq_len, sizes.vocab)
        summary = run_training(folder, args.steps, args.settings)
    print(json.dumps({name: summary[name] for name in FIGURES}, indent=2))


if __name__ == "__main__":
    main()
