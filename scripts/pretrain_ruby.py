"""A fifth model and other data, for `scripts/compare_packages.sh ruby`: a small Qwen2-MoE that read Ruby learns how
Rails is written. The change is a small one, as when a model that knows a language learns the code of one house.

    python scripts/pretrain_ruby.py --packages PACKAGES --output data/ruby --steps 1200      # 40 minutes on one core

`--packages` holds Debian's packages unpacked, each in a folder of its name. Writes below `--output`: `moe`, a
checkpoint, and

    train.jsonl       the libraries of Rails
    plugins.jsonl     libraries for Rails by others, held out
    redmine.jsonl     an application on Rails, held out
    ruby.jsonl        one in twenty of the other Ruby files, which pretraining has not seen
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import Qwen2MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package_texts import pretrain_and_hold_out, sources, write
from pretrain_demo import arguments

RAILS = ("actioncable", "actionmailer", "actionpack", "actionview", "activejob", "activemodel", "activerecord",
         "activestorage", "activesupport", "railties")  # fmt: skip
PLUGINS = ("acts-as-taggable-on", "cancancan", "carrierwave", "devise", "doorkeeper", "friendly-id", "paper-trail",
           "will-paginate")  # fmt: skip
LEARNED = {
    "train": [f"ruby-{name}" for name in RAILS],
    "plugins": [f"ruby-{name}" for name in PLUGINS],
    "redmine": ["redmine"],
}
VOCAB_SIZE = 5000


def qwen2_config(eos_token_id: int) -> Qwen2MoeConfig:
    """Deeper than the others, many small experts; a dense first layer, and a shared expert beside the chosen ones."""
    return Qwen2MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=160, intermediate_size=512, moe_intermediate_size=64,
        shared_expert_intermediate_size=192, num_hidden_layers=8, mlp_only_layers=[0], num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=512, num_experts=32, num_experts_per_tok=4, norm_topk_prob=False,
        router_aux_loss_coef=0.01, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    args = arguments(parser, Path("data/ruby"))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, packages in LEARNED.items():
        write(args.output / f"{name}.jsonl", sources([args.packages / p for p in packages], ".rb"))
    of_rails = {package for packages in LEARNED.values() for package in packages}
    others = [folder for folder in sorted(args.packages.iterdir()) if folder.is_dir() and folder.name not in of_rails]
    pretrain_and_hold_out(sources(others, ".rb"), "ruby", VOCAB_SIZE, qwen2_config, args)


if __name__ == "__main__":
    main()
