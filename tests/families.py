"""Tiny random models of the families that the tests train, as checkpoints on disk, and token data for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from usaf.checkpoint import Checkpoint
from usaf.data import NO_TARGET, Batch
from usaf.delta import load_delta
from usaf.devices import Backend, choose_backend
from usaf.expert_store import open_or_make
from usaf.model import SparseModel, build_model
from usaf.trained_parts import open_head, open_norms

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
    "qwen3_moe": "Qwen3MoeConfig", "mixtral": "MixtralConfig", "olmoe": "OlmoeConfig", "gpt_oss": "GptOssConfig",
    "deepseek_v3": "DeepseekV3Config",
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
    for name, vector in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "e_score_correction_bias")):  # zeros would hide that they are lost
            nn.init.normal_(vector.data, std=std)
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
    """Put the dequantised experts, norms and a trained head into a transformers model, so that both compute the same
    function."""
    for moe in model.moe:
        for name, bank in zip(moe.names, moe.banks, strict=True):
            weight = torch.stack([bank.weight(e, torch.float32) for e in range(bank.num_experts)])
            parameter = reference.get_parameter(name)
            transposed = reference.get_submodule(name.rpartition(".")[0]).is_transposed
            parameter.data.copy_(weight.transpose(1, 2) if transposed else weight)
    for name, weight in model.norms.items():
        reference.get_parameter(name).data.copy_(weight)
    if model.head is not None:
        weight = torch.cat([model.head.block(p, torch.float32) for p in range(model.head.num_parts)])
        head = reference.get_output_embeddings()
        head.weight = nn.Parameter(weight.detach().to(head.weight.dtype))


def reference_of(folder: Path, model: SparseModel) -> PreTrainedModel:
    """transformers' own model of a checkpoint with eager experts, in fp32, computing the function that `model` does."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    base_into(reference, model)
    return reference


def with_delta(folder: Path, path: Path) -> SparseModel:
    """The model that a run has left as `path`: its 4-bit base with all that the delta has."""
    model, delta = build(folder), load_delta(path)
    for moe in model.moe:
        for name, bank in zip(moe.names, moe.banks, strict=True):
            if name in delta.sparse:
                bank.set_active(*delta.sparse[name])
    if any(name.endswith("norm.weight") for name in delta.whole):
        open_norms(
            model, min(int(name.split(".layers.")[1].split(".")[0]) for name in delta.sparse if "layers" in name)
        )
    for name, weight in delta.whole.items():
        model.model.get_parameter(name).data.copy_(weight)
    if any(name.startswith("lm_head") for name in delta.sparse):
        assert open_head(model)
        assert model.head is not None
        model.head.set_active(*delta.sparse[model.head_name])
    return model


def logits_of(model: SparseModel, batch: Batch) -> Tensor:
    """[B, S, vocabulary]."""
    with torch.no_grad():
        hidden = model.run_layers(batch, 0, model.num_layers)
        return model.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


def leaks(model: PreTrainedModel, border: int = 9, length: int = 20) -> bool:
    """Whether editing the first of two packed documents moves the second's logits, by transformers' own model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, length), generator=generator)
    edited = ids.clone()
    edited[0, :border] = torch.randint(3, VOCAB, (border,), generator=generator)
    positions = torch.cat([torch.arange(border), torch.arange(length - border)]).unsqueeze(0)
    with torch.no_grad():
        rows = [model(input_ids=i, position_ids=positions, use_cache=False).logits[0, border:] for i in (ids, edited)]
    # Not equal to the bit: the edit sends other tokens to the experts, and a product's rounding depends on its rows.
    return float((rows[0] - rows[1]).abs().max()) > 1e-4


def random_batch(documents: list[list[int]], seed: int = 0, vocab: int = VOCAB) -> Batch:
    """Rows of documents of the given lengths, padded the way `Rows.batch` pads them, with random ids."""
    rng = np.random.default_rng(seed)
    lengths = [sum(row) for row in documents]
    shape = len(documents), max(lengths)
    ids, labels, positions = np.zeros(shape, np.int64), np.full(shape, NO_TARGET), np.zeros(shape, np.int64)
    for i, row in enumerate(documents):
        begin = 0
        for length in [*row, shape[1] - lengths[i]]:
            span = slice(begin, begin + length)
            positions[i, span] = np.arange(length)
            if begin < lengths[i]:
                ids[i, span] = rng.integers(3, vocab, length)
                labels[i, span] = ids[i, span]
                labels[i, begin] = NO_TARGET
            begin += length
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), lengths)


def activate(model: SparseModel, per_bank: int = 200, std: float = 0.02, seed: int = 0) -> None:
    """Random active weights with non-zero deltas in every bank, and routers that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    for moe in model.moe:
        for bank in moe.banks:
            active = torch.randperm(bank.numel, generator=generator)[:per_bank].sort().values
            bank.set_active(active, torch.randn(len(active), generator=generator) * std)
        moe.router_weight.requires_grad_(True)


class Float64Kept(TorchFunctionMode):
    """transformers computes softmax and sigmoid scores in fp32, too coarse for differences: leave float64 as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func in (Tensor.to, Tensor.type) and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


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
