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
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

REPOSITORY = Path(__file__).resolve().parent.parent
VOCAB = 32_000
FIGURES = (
    "active_parameters", "expert_parameters", "router_parameters", "tokens_per_second", "prefix_tokens_per_second",
    "peak_memory_bytes", "peak_resident_bytes", "phase_seconds", "experts_moved",
)  # fmt: skip


def write_model(folder: Path, hidden: int, layers: int, experts: int) -> None:
    """A random bf16 checkpoint in shards."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256), "head_dim": 64,
        "moe_intermediate_size": hidden // 2, "num_experts": experts, "num_experts_per_tok": min(8, experts),
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")


def write_data(path: Path, sequences: int, length: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(sequences):
            file.write(json.dumps({"input_ids": rng.integers(3, VOCAB, length).tolist()}) + "\n")


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
        sizes = (folder / "model", args.hidden, args.layers, args.experts)
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=sizes)
        writer.start()
        writer.join()
        write_data(folder / "data.jsonl", 48, args.seq_len)
        summary = run_training(folder, args.steps, args.settings)
    print(json.dumps({name: summary[name] for name in FIGURES}, indent=2))


if __name__ == "__main__":
    main()
