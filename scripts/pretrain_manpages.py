"""A third model and other data, for `scripts/compare_packages.sh manpages`: a small OLMoE that read English manual
pages, and the German ones for it to learn.

    python scripts/pretrain_manpages.py --packages PACKAGES --output data/manpages    # about 40 minutes on one core

`--packages` holds Debian's packages unpacked, each in a folder of its name. Writes below `--output`: `moe`, a
checkpoint, and

    train.jsonl         German pages of programs
    systemd.jsonl       German pages of systemd, all of whose pages are held out
    c_library.jsonl     German pages of the C library (sections 2 and 3), held out
    english.jsonl       one in twenty of the English pages, which pretraining has not seen
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

from transformers import OlmoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package_texts import LONGEST, pretrain_and_hold_out, write
from pretrain_demo import arguments

ENGLISH = ("manpages", "manpages-dev", "git-man", "systemd")
GERMAN = ("manpages-de", "manpages-de-dev")
VOCAB_SIZE = 8192


def pages(folder: Path, packages: tuple[str, ...], language: str = "") -> dict[str, str]:
    """ "package/section/page" -> its source without comments, in sorted order. A page that says only where another lies
    is left out."""
    found = {}
    for package in packages:
        root = folder / package / "usr/share/man" / language
        for path in sorted(root.glob("man*/*.gz")):
            if path.is_symlink():
                continue
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                lines = [line for line in file if not line.startswith(('.\\"', "'\\\""))]
            if len(lines) > 5:
                found[f"{package}/{path.parent.name}/{path.name[:-3]}"] = "".join(lines)[:LONGEST]
    return found


def olmoe_config(eos_token_id: int) -> OlmoeConfig:
    """Another family than the demo's: routing weights that do not add up to 1, norms on queries and keys, a head of its
    own; two experts of eight a token."""
    return OlmoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False,
        router_aux_loss_coef=0.01, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    args = arguments(parser, Path("data/manpages"))
    german = pages(args.packages, GERMAN, "de")
    of_systemd = {name for name, text in german.items() if "systemd" in text.partition("\n")[0]}
    of_c_library = {name for name in german if name.split("/")[1] in ("man2", "man3")} - of_systemd
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "train.jsonl", [t for n, t in german.items() if n not in of_systemd | of_c_library])
    write(args.output / "systemd.jsonl", [german[name] for name in sorted(of_systemd)])
    write(args.output / "c_library.jsonl", [german[name] for name in sorted(of_c_library)])
    english = list(pages(args.packages, ENGLISH).values())
    pretrain_and_hold_out(english, "english", VOCAB_SIZE, olmoe_config, args)


if __name__ == "__main__":
    main()
