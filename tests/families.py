"""Tiny random models of the families that the tests train, as checkpoints on disk, and token data for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from usaf.checkpoint import Checkpoint
from usaf.devices import Backend, choose_backend
from usaf.expert_store import open_or_make
from usaf.model import SparseModel, build_model

VOCAB = 128
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 8,
                  "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 64,
                    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
                    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "gpt_oss": {"head_dim": 16, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip
CLASSES = {
    "qwen3_moe": "Qwen3MoeConfig", "mixtral": "MixtralConfig", "olmoe": "OlmoeConfig", "deepseek_v3": "DeepseekV3Config",
    "gpt_oss": "GptOssConfig",
}  # fmt: skip
FAMILIES = list(CONFIGS)


def tiny_config(family: str, **changes: Any) -> Any:
    return getattr(transformers, CLASSES[family])(**{**COMMON, **CONFIGS[family], **changes})


def random_model(family: str, seed: int = 0, std: float = 0.08, **changes: Any) -> PreTrainedModel:
    """A reference model by transformers' own eager experts, with weights large enough that routing matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
    return model


def write_checkpoint(
    folder: Path, family: str = "qwen3_moe", seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """A random model saved the way its family is published."""
    copy.deepcopy(random_model(family, seed, **changes)).to(dtype).save_pretrained(folder)
    return folder


def build(folder: Path, backend: Backend | None = None, group_size: int = 128) -> SparseModel:
    """The 4-bit model of a checkpoint folder, on the CPU in fp32 unless told otherwise."""
    backend = backend or choose_backend(False, True)
    checkpoint = Checkpoint(folder, "eager" if backend.attention == "eager" else None)
    return build_model(checkpoint, open_or_make(checkpoint, None, group_size, 4, lambda *_: None), backend)


def base_into(reference: PreTrainedModel, model: SparseModel) -> None:
    """Put the dequantised experts into a transformers model, so that both compute the same function."""
    for moe in model.moe:
        for name, bank in zip(moe.names, moe.banks, strict=True):
            weight = torch.stack([bank.weight(e, torch.float32) for e in range(bank.num_experts)])
            parameter = reference.get_parameter(name)
            transposed = reference.get_submodule(name.rpartition(".")[0]).is_transposed
            parameter.data.copy_(weight.transpose(1, 2) if transposed else weight)


def write_tokens(path: Path, samples: int = 40, length: int = 24, seed: int = 0, vocab: int = VOCAB) -> Path:
    """Token data with something to learn: each next id is a fixed function of the last, with some noise."""
    rng = np.random.default_rng(seed)
    step = np.random.default_rng(99).permutation(vocab)
    lines = []
    for _ in range(samples):
        ids = [int(rng.integers(3, vocab))]
        while len(ids) < length:
            ids.append(int(step[ids[-1]]) if rng.random() < 0.8 else int(rng.integers(3, vocab)))
        lines.append(json.dumps({"input_ids": ids, "labels": ids}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
