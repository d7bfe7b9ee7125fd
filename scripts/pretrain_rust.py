"""A fourth model and other data, for `scripts/compare_packages.sh rust`: a small Mixtral that read Rust, and Go for it
to learn. Made after every default was settled, to try them on what they have not seen.

    python scripts/pretrain_rust.py --packages PACKAGES --output data/rust --steps 900      # half an hour on one core

`--packages` holds Debian's packages unpacked, each in a folder of its name. Writes below `--output`: `moe`, a
checkpoint, and

    train.jsonl      Go: its own tools and network library, and Prometheus' client
    grpc.jsonl       Go: gRPC, held out
    etcd.jsonl       Go: etcd, held out
    rust.jsonl       one in twenty of the Rust files, which pretraining has not seen
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import MixtralConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package_texts import pretrain_and_hold_out, sources, write
from pretrain_demo import arguments

GO = {
    "train": ("golang-golang-x-tools-dev", "golang-golang-x-net-dev", "golang-github-prometheus-client-golang-dev"),
    "grpc": ("golang-google-grpc-dev",),
    "etcd": ("golang-etcd-server-dev",),
}
VOCAB_SIZE = 6000


def mixtral_config(eos_token_id: int) -> MixtralConfig:
    """Few, wide experts, as no other model of the comparisons has them; no norm but the layers' own."""
    return MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=224, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=8, num_experts_per_tok=2,
        router_aux_loss_coef=0.01, tie_word_embeddings=False, sliding_window=None, bos_token_id=None,
        eos_token_id=eos_token_id, pad_token_id=eos_token_id,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    args = arguments(parser, Path("data/rust"))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, packages in GO.items():
        write(args.output / f"{name}.jsonl", sources([args.packages / p for p in packages], ".go"))
    rust = sources(sorted(args.packages.glob("librust-*-dev")), ".rs")
    pretrain_and_hold_out(rust, "rust", VOCAB_SIZE, mixtral_config, args)


if __name__ == "__main__":
    main()
