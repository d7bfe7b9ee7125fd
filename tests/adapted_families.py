"""Tiny random models of the families that `usaf.adapters` serves, and where their own modules keep their experts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from families import COMMON, VOCAB
from torch import Tensor, nn
from transformers import PreTrainedModel

from usaf.model import SparseModel

TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA4 = {**COMMON, "head_dim": 16, "intermediate_size": 48, "intermediate_size_mlp": 96, "num_local_experts": 4,
          "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8}  # fmt: skip
STEP3P7 = {
    **COMMON, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 48, "share_expert_dim": 32,
    "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_router_scaling_factor": 1.5,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "swiglu_limits": [0.0, 0.0, 0.5, 0.5],
    "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# family -> (configuration class, class of the model, arguments). The last layer of each has experts, and layer 2 or 3.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama4_text": ("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4),
    "llama4_text, two experts a token": (
        "Llama4TextConfig", "Llama4ForCausalLM", {**LLAMA4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1},
    ),
    "dbrx": (
        "DbrxConfig", "DbrxForCausalLM",
        {**TOKENS, "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2}},
    ),
    "jetmoe": (
        "JetMoeConfig", "JetMoeForCausalLM",
        {**TOKENS, "hidden_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2, "kv_channels": 16,
         "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    ),
    "longcat_flash": (
        "LongcatFlashConfig", "LongcatFlashForCausalLM",
        {**TOKENS, "hidden_size": 64, "num_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256,
         "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "n_routed_experts": 6, "zero_expert_num": 2,
         "moe_topk": 3, "routed_scaling_factor": 2.0, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
         "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16},
    ),
    "step3p7": (
        "Step3p7Config", "Step3p7ForConditionalGeneration",
        {**TOKENS, "text_config": STEP3P7, "vision_config": {**VISION, "image_size": 56, "patch_size": 14}},
    ),
}  # fmt: skip
# The whole multimodal model, of which the text part is trained.
LLAMA4_WHOLE: dict[str, Any] = {
    "text_config": {**LLAMA4},
    "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "intermediate_size": 64,
                      "projector_input_dim": 16, "projector_output_dim": 16},
    "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5,
}  # fmt: skip

View = Callable[[Tensor, int], Tensor]
Parts = list[tuple[str, View]]


def as_is(tensor: Tensor, _experts: int) -> Tensor:
    return tensor


def transposed(tensor: Tensor, _experts: int) -> Tensor:
    return tensor.transpose(1, 2)


def without_zero_experts(tensor: Tensor, experts: int) -> Tensor:
    return tensor[:experts]


def rows(tensor: Tensor, experts: int) -> Tensor:
    return tensor.view(experts, -1, tensor.shape[1])


def rows_transposed(tensor: Tensor, experts: int) -> Tensor:
    return rows(tensor, experts).transpose(1, 2)


# family -> for gate and up, and for down: parameters of a layer in transformers' own model, each with its view as
# [E, out, in]; together, along the outputs, they are the fused one. Said here once more, independently of the adapters.
PARTS: dict[str, tuple[Parts, Parts]] = {
    "llama4_text": (
        [("feed_forward.experts.gate_up_proj", transposed)],
        [("feed_forward.experts.down_proj", transposed)],
    ),
    "dbrx": (
        [("ffn.experts.mlp.w1", rows), ("ffn.experts.mlp.v1", rows)],
        [("ffn.experts.mlp.w2", rows_transposed)],
    ),
    "jetmoe": ([("mlp.input_linear.weight", as_is)], [("mlp.output_linear.weight", as_is)]),
    "longcat_flash": (
        [("mlp.experts.gate_up_proj", without_zero_experts)],
        [("mlp.experts.down_proj", as_is)],
    ),
    "step3p7": ([("mlp.experts.gate_up_proj", as_is)], [("mlp.experts.down_proj", as_is)]),
}


def own_class(family: str) -> type[PreTrainedModel]:
    return getattr(transformers, FAMILIES[family][1])


def tiny_config(family: str, **changes: Any) -> Any:
    config, _, arguments = FAMILIES[family]
    return getattr(transformers, config)(**{"architectures": [FAMILIES[family][1]], **arguments, **changes})


def is_known(family: str) -> bool:
    """Whether the installed transformers has the family, in a state that can be compared with."""
    if family == "dbrx":  # 5.13 builds experts and routers of wrong shapes, unless hidden and intermediate size agree
        from transformers.models.dbrx.modeling_dbrx import DbrxRouter

        return DbrxRouter(tiny_config(family).ffn_config).layer.in_features == tiny_config(family).d_model
    return hasattr(transformers, FAMILIES[family][1])


KNOWN = [family for family in FAMILIES if is_known(family)]


def randomise(model: PreTrainedModel, seed: int = 0, std: float = 0.08) -> PreTrainedModel:
    """Weights large enough that routing matters, and biases that are not zero, which would hide that they are lost."""
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (tensor.ndim > 1 and isinstance(tensor, nn.Parameter)) or name.endswith("bias"):
            nn.init.normal_(tensor.data, std=std)
    return model.eval()


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """transformers' own model, in fp32."""
    torch.manual_seed(seed)
    return randomise(own_class(family)._from_config(tiny_config(family, **changes), dtype=torch.float32), seed)


def write_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    random_model(family, **changes).to(dtype).save_pretrained(folder)
    return folder


Projection = list[tuple[nn.Parameter, View]]


def own_experts(reference: PreTrainedModel, family: str, names: tuple[str, str]) -> list[Projection]:
    """For each of the two projections (`names` in USAF's model): its parameters in transformers' own, and their views
    as [E, out, in]."""
    layer = re.match(r".*?\.\d+\.", names[0])
    assert layer is not None
    parts = PARTS[family.partition(",")[0]]
    return [[(reference.get_parameter(layer[0] + name), view) for name, view in projection] for projection in parts]


def own_weights(reference: PreTrainedModel, family: str, names: tuple[str, str], experts: int) -> list[Tensor]:
    """[E, out, in] for each of the two projections of transformers' own model."""
    projections = own_experts(reference, family, names)
    return [torch.cat([view(p.data, experts) for p, view in projection], dim=1) for projection in projections]


def own_gradients(reference: PreTrainedModel, family: str, names: tuple[str, str], experts: int) -> list[Tensor]:
    """The dense gradients, [E, out, in], for each of the two projections of transformers' own model."""
    projections = own_experts(reference, family, names)
    return [torch.cat([view(p.grad, experts) for p, view in projection], dim=1) for projection in projections]  # type: ignore


def reference_of(folder: Path, family: str, model: SparseModel) -> PreTrainedModel:
    """transformers' own model of a checkpoint, in fp32, with the dequantised experts and deltas of `model` in it."""
    reference = own_class(family).from_pretrained(folder, dtype=torch.float32).eval()
    for moe in model.moe:
        for bank, projection in zip(moe.banks, own_experts(reference, family, moe.names), strict=True):
            weight = torch.stack([bank.weight(e, torch.float32) for e in range(bank.num_experts)])
            for (parameter, view), part in zip(projection, weight.chunk(len(projection), dim=1), strict=True):
                view(parameter.data, bank.num_experts).copy_(part)
    return reference


def record_check(family: str, *checked: str) -> None:
    """A line for `scripts/supported_models.py`: this has held. Variants, named behind a comma, add nothing."""
    if "," in family:
        return
    line = {"family": family, "saved_class": FAMILIES[family][1], "checked": checked, "notes": ["by an adapter"],
            "transformers": transformers.__version__}  # fmt: skip
    with open(os.environ["USAF_FAMILY_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
