"""Train the bundled demo model, `data/demo-moe/`, from nothing: a small Qwen3-MoE on Python source.

The demo of `python train.py` must fine-tune a model that was really trained, on a machine without a
network. Every machine that runs Python has the standard library, so that is the pretraining corpus:
some 12 MB of source without its tests and tables, less the modules in `PYTHON_HELDOUT`, which measure
generalisation here and forgetting later.

    python scripts/pretrain_demo.py --steps 2000        # about 50 minutes on two cores

Writes an ordinary Hugging Face checkpoint (bf16 weights, tokenizer, config) and `training_log.jsonl`,
whose last line holds the held-out perplexity beside that of a unigram model over the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf.demo import python_sources

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
SEQ_LEN = 256


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries; spaces run together, as indentation does in code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=512
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents in one int32 stream, each closed by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int32)


def demo_config(eos_token_id: int) -> Qwen3MoeConfig:
    make: Callable[..., Qwen3MoeConfig] = Qwen3MoeConfig  # not every field is in its declared signature
    return make(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


@torch.no_grad()
def held_out_loss(model, stream: np.ndarray) -> float:
    """Mean negative log-likelihood per token over consecutive windows of `SEQ_LEN`."""
    model.eval()
    windows = len(stream) // SEQ_LEN
    rows = torch.from_numpy(stream[: windows * SEQ_LEN].astype(np.int64)).view(windows, SEQ_LEN)
    losses = [model(input_ids=r, labels=r, output_router_logits=False).loss * len(r) for r in rows.split(16)]
    model.train()
    return float(sum(losses) / windows)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """The loss of the best model that ignores context: training frequencies, one added to each count."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def save(model, tokenizer: PreTrainedTokenizerFast, log: list[dict], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    trained_dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(output)
    model.to(trained_dtype)
    tokenizer.save_pretrained(output)
    (output / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def arguments(parser: argparse.ArgumentParser, output: Path) -> argparse.Namespace:
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help=f"sequences of {SEQ_LEN} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def pretrain(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    train_texts: list[str],
    held_out_texts: list[str],
    args: argparse.Namespace,
) -> None:
    """A model of `config` from random weights (`args.seed`), saved to `args.output` every 500 steps and at the end."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_out_texts)
    print(f"{len(train_texts)} files, {len(train):,} training tokens, {len(held_out):,} held-out tokens", flush=True)

    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    model.train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )

    log: list[dict] = []
    started = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        starts = rng.integers(0, len(train) - SEQ_LEN, args.batch_size)
        batch = torch.from_numpy(np.stack([train[s : s + SEQ_LEN] for s in starts]).astype(np.int64))
        out = model(input_ids=batch, labels=batch, output_router_logits=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0 or step == 0:
            aux = config.router_aux_loss_coef * out.aux_loss.item()
            log.append(
                {
                    "step": step + 1,
                    "train_loss": round(out.loss.item() - aux, 4),
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
            print(log[-1], flush=True)
        if (step + 1) % 500 == 0 and step + 1 < args.steps:
            log.append({"step": step + 1, "held_out_loss": round(held_out_loss(model, held_out), 4)})
            print(log[-1], flush=True)
            save(model, tokenizer, log, args.output)

    loss, unigram = held_out_loss(model, held_out), unigram_loss(train, held_out, config.vocab_size)
    log.append(
        {
            "step": args.steps,
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 2),
            "unigram_perplexity": round(math.exp(unigram), 2),
            "held_out_tokens": len(held_out),
            "training_tokens": args.steps * args.batch_size * SEQ_LEN,
            "corpus_tokens": len(train),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
        }
    )
    print(log[-1], flush=True)
    save(model, tokenizer, log, args.output)


def main() -> None:
    output = Path(__file__).resolve().parent.parent / "data" / "demo-moe"
    args = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), output)
    train_texts, held_out_texts = python_sources(held_out=False), python_sources(held_out=True)
    tokenizer = train_tokenizer(train_texts)
    pretrain(demo_config(tokenizer.eos_token_id), tokenizer, train_texts, held_out_texts, args)


if __name__ == "__main__":
    main()
