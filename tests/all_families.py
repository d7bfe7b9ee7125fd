"""Every MoE family of transformers that has the experts interface, as a tiny random configuration.

`CONFIGS` maps a model_type to the arguments of its configuration, `WRAPPERS` the multimodal ones to a text part among
them and small towers. Families that this transformers does not know are left out of `FAMILIES`.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from usaf.architecture import model_class

VOCAB, LAYERS = 128, 4
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
       "v_head_dim": 16}  # fmt: skip
DSA = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
ROUTED = {"intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2}
GROUPS = {"n_group": 2, "topk_group": 1}
NUM_EXPERTS = {"intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
             "linear_value_head_dim": 16}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_chunk_size": 8}
FIRST_DENSE = ["dense"] + ["sparse"] * (LAYERS - 1)
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SHARED_INDEXER = ["full", "full", "shared", "full"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16,
        "max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {**NUM_EXPERTS, "head_dim": 16, "num_shared_experts": 1, "sliding_window": 8,
              "global_attn_every_n_layers": 2, "mup_enabled": True, "route_scale": 1.5},
    "aria_text": {"intermediate_size": 48, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**ROUTED, **MLA, **GROUPS, "mlp_layer_types": FIRST_DENSE},
    "axk2": {**ROUTED, **MLA, **DSA, "gated_norm_rank": 8, "mlp_layer_types": FIRST_DENSE},
    "bailing_hybrid": {"intermediate_size": 96, "moe_intermediate_size": 48, "num_local_experts": 8,
                       "num_experts_per_tok": 2, **MLA, **GROUPS, "head_dim": 16, "layer_group_size": 2,
                       "first_k_dense_replace": 1},
    "beam": {**NUM_EXPERTS, **GROUPS, "head_dim": 16, "sliding_window": 8,
             "layer_types": ALTERNATING, "mlp_layer_types": FIRST_DENSE},
    "cohere2_moe": {**NUM_EXPERTS, "head_dim": 16, "sliding_window": 8, "num_shared_experts": 1,
                    "logit_scale": 1.0},
    "deepseek_v2": {**ROUTED, **MLA, **GROUPS, "topk_method": "group_limited_greedy", "n_shared_experts": 1,
                    "first_k_dense_replace": 1},
    "deepseek_v3": {**ROUTED, **MLA, **GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v32": {**ROUTED, **MLA, **GROUPS, **DSA, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_key_value_heads": 1, "head_dim": 32, "moe_intermediate_size": 48, "n_routed_experts": 8,
                    "num_experts_per_tok": 2, "q_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2, **DSA,
                    "sliding_window": 8, "hc_mult": 2, "hc_sinkhorn_iters": 4,
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "dots1": {**ROUTED, **GROUPS, "num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
              "head_dim": 16},
    "dots3_note_text": {**ROUTED, **MLA, **DSA, "sliding_window": 8, "shared_experts_intermediate_size": 48,
                        "mlp_layer_types": FIRST_DENSE,
                        "layer_types": ["sliding_attention", "indexed_attention"] * 2,
                        **{f"swa_{name}": size for name, size in MLA.items()}, "swa_num_attention_heads": 4,
                        "swa_head_dim": 24},
    "ernie4_5_moe": {"intermediate_size": 96, "moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 2,
                     "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone_moe": {**NUM_EXPERTS, "sliding_window": 8, "sliding_window_pattern": 2, "first_k_dense_replace": 1},
    "flex_olmo": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "flint": {**NUM_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 48, "sliding_window": 8,
              "layer_types": ALTERNATING, "mlp_only_layers": [0]},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 16, "intermediate_size": 96, "enable_moe_block": True,
                    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "sliding_window": 8,
                    "layer_types": ALTERNATING, "num_kv_shared_layers": 2, "final_logit_softcapping": 30.0},
    "glm4_moe": {**ROUTED, "head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, **GROUPS},
    "glm4_moe_lite": {**ROUTED, **MLA, **GROUPS, "mlp_layer_types": FIRST_DENSE},
    "glm_moe_dsa": {**ROUTED, **MLA, **GROUPS, **DSA, "first_k_dense_replace": 1, "indexer_types": SHARED_INDEXER},
    "gpt_oss": {**LOCAL, "head_dim": 16, "sliding_window": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoe": {**LOCAL, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.25},
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 48, "sliding_window": 8, "layer_types": ALTERNATING},
    "granitemoehybrid": {**LOCAL, **MAMBA2, "shared_intermediate_size": 48,
                         "layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {"head_dim": 16, "intermediate_size": 48, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**NUM_EXPERTS, "head_dim": 16},
    "hy_v4": {**ROUTED, **MLA, **GROUPS, **DSA, "hc_mult": 2, "indexer_types": SHARED_INDEXER},
    "inkling_text": {**ROUTED, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
                     "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16,
                     "n_shared_experts": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2,
                     "mlp_layer_types": FIRST_DENSE, "logits_mup_width_multiplier": 1.0},
    "inkling2_text": {"moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
                      "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
                      "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16, "n_layers_per_attn_res_block": 2,
                      "unpadded_vocab_size": VOCAB, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False,
              "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"intermediate_size": 96, "moe_intermediate_size": 48, "num_local_experts": 8,
                    "num_experts_per_tok": 2, **MLA, **GROUPS, "q_lora_rank": None, "linear_head_dim": 16,
                    "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "kolibri1": {**NUM_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 48, "sliding_window": 8,
                 "layer_types": ALTERNATING},
    "laguna": {**NUM_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 48, "sliding_window": 8,
               "layer_types": ALTERNATING},
    "lfm2_moe": {**NUM_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "mellum": {**NUM_EXPERTS, "head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING},
    "mimo_v2_flash": {**ROUTED, **GROUPS, "head_dim": 16, "v_head_dim": 8, "sliding_window": 8,
                      "layer_types": ALTERNATING, "mlp_layer_types": FIRST_DENSE},
    "minimax": {**LOCAL, "block_size": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "minimax_m2": {**LOCAL, "head_dim": 16},
    "minimax_m3_vl_text": {**LOCAL, "head_dim": 16, "dense_intermediate_size": 96, "shared_intermediate_size": 48,
                           "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
                           "index_topk_blocks": 2, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mistral4": {**ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1, "rope_parameters": YARN},
    "mixtral": {**LOCAL},
    "nemotron_h": {"num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention", "moe"],
                   "head_dim": 16, **ROUTED, **GROUPS, "moe_shared_expert_intermediate_size": 48,
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8},
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {**LOCAL, "router_jitter_noise": 0.0},
    "qwen2_moe": {**NUM_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_5_moe_text": {**NUM_EXPERTS, **DELTA_NET, "head_dim": 16, "shared_expert_intermediate_size": 48,
                         "layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_moe": {**NUM_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {**NUM_EXPERTS, **DELTA_NET, "head_dim": 16, "shared_expert_intermediate_size": 48,
                   "layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen4_exp_text": {**NUM_EXPERTS, **DELTA_NET, "head_dim": 16, "shared_expert_intermediate_size": 48,
                       "hc_count": 2, "hc_lowrank": 8, "layer_types": ["linear_attention", "indexed_attention"] * 2,
                       "ple_layer_ids": [1, 3], "heads_per_ngram": 2, "ngram_vocab_size_base": 97,
                       "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
                       "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "solar_open": {**ROUTED, **GROUPS, "head_dim": 16, "n_shared_experts": 1},
    "zaya": {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 1, "head_dim": 16,
             "router_hidden_size": 16},
}  # fmt: skip
# Multimodal ones: the text part's model_type and arguments, and what else the composite's class wants to be told.
MOE_TEXT = {**NUM_EXPERTS, "head_dim": 16}
WRAPPERS: dict[str, dict[str, Any]] = {
    "aria": {"text": ("aria_text", {}), "arguments": {"projector_patch_to_query_dict": {4: 4}}},
    "dots3_note": {"text": ("dots3_note_text", {}), "class": "Dots3NoteForConditionalGeneration"},
    "ernie4_5_vl_moe": {"text": ("ernie4_5_vl_moe_text",
                                 {"intermediate_size": 96, "moe_intermediate_size": [48, 48], "moe_num_experts": 8,
                                  "moe_k": 2, "moe_num_shared_experts": 1, "mlp_layer_types": FIRST_DENSE,
                                  "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}})},
    "gemma4": {"text": ("gemma4_text", {}), "towers": {"vision_config": {"model_type": "gemma4_vision"}}},
    "glm4v_moe": {"text": ("glm4v_moe_text", {**ROUTED, "head_dim": 16, "n_shared_experts": 1, **GROUPS,
                                              "first_k_dense_replace": 1,
                                              "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}})},
    "glm5_next": {"text": ("glm5_next_text", {**ROUTED, **MLA, **GROUPS, **DSA, "qk_rope_head_dim": 0,
                                              "index_kpool": 2, "linear_head_dim": 16, "linear_num_heads": 4,
                                              "hc_mult": 2, "hc_sinkhorn_iters": 4, "mlp_layer_types": FIRST_DENSE,
                                              "layer_types": ["linear_attention", *["indexed_attention"] * 3],
                                              "indexer_types": SHARED_INDEXER})},
    "inkling_mm_model": {"text": ("inkling_text", {}),
                         "towers": {"vision_config": {"patch_size": 4, "num_hidden_layers": 6}}},
    "inkling2": {"text": ("inkling2_text", {})},
    "kimi_k25": {"text": ("deepseek_v3", {})},
    "minimax_m3_vl": {"text": ("minimax_m3_vl_text", {})},
    "mistral3": {"text": ("mistral4", {})},
    "mistral_large4": {"text": ("mistral_large4_text", {**ROUTED, **MLA, **GROUPS, **DSA, "first_k_dense_replace": 1,
                                                        "indexer_types": SHARED_INDEXER,
                                                        "kv_source_layers": [0, 1, 1, 3]})},
    "muse_spark": {"text": ("muse_spark_text", {**LOCAL, "head_dim": 16, "moe_intermediate_size": 48,
                                                "moe_hidden_size": 32, "sliding_window": 8})},
    "qwen3_5_moe": {"text": ("qwen3_5_moe_text", {"rope_parameters": MROPE}),
                    "class": "Qwen3_5MoeForConditionalGeneration"},
    "qwen3_omni_moe_thinker": {"text": ("qwen3_omni_moe_text", {**MOE_TEXT, "rope_parameters": MROPE}),
                               "class": "Qwen3OmniMoeThinkerForConditionalGeneration"},
    "qwen3_vl_moe": {"text": ("qwen3_vl_moe_text", {**MOE_TEXT, "rope_parameters": MROPE})},
    "qwen4_exp": {"text": ("qwen4_exp_text", {}), "class": "Qwen4ExpForConditionalGeneration"},
}  # fmt: skip
# What makes a tower small, in the names that the towers' configurations have.
SMALL_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
    "out_hidden_size": COMMON["hidden_size"], "text_hidden_size": COMMON["hidden_size"],
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "projector_hidden_size": 32,
    "projection_hidden_size": 32, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2,
    "projection_intermediate_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4, "mlp_ratio": 1.0,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "output_dim": 64,
    "downsample_hidden_size": 16, "depths": [1], "hidden_sizes": [16], "patch_sizes": [16], "layer_types": None,
    "adapter_in_dim": 32, "mlp_layer_types": ["dense"], "adapter_input_size": 32,
    "adapter_out_dim": COMMON["hidden_size"],
}  # fmt: skip


def known(family: str) -> bool:
    return family in CONFIG_MAPPING


FAMILIES = [family for family in (*CONFIGS, *WRAPPERS) if known(family)]


def tiny_config(family: str) -> Any:
    if family in WRAPPERS:
        return wrapper_config(family)
    given = copy.deepcopy({**COMMON, **CONFIGS[family]})
    if given["num_hidden_layers"] is None:
        del given["num_hidden_layers"]
    return AutoConfig.for_model(family, **given)


def wrapper_config(family: str) -> Any:
    wrapper = WRAPPERS[family]
    text, changes = wrapper["text"]
    given = copy.deepcopy({**COMMON, **CONFIGS.get(text, {}), **changes, "model_type": text})
    composite = CONFIG_MAPPING[family]
    default = composite()
    towers = {
        name: {**small_tower(getattr(default, name), wrapper.get("towers", {}).get(name, {}))}
        for name in composite.sub_configs
        if name != "text_config" and (getattr(default, name) is not None or name in wrapper.get("towers", {}))
    }
    own = {name: SMALL_TOWER[name] for name in SMALL_TOWER if name in names_of(composite)}
    return composite(text_config=given, **towers, **own, **copy.deepcopy(wrapper.get("arguments", {})))


def names_of(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def small_tower(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    model_type = changes.get("model_type") or default.model_type
    own = names_of(CONFIG_MAPPING[model_type])
    return {"model_type": model_type, **{k: v for k, v in SMALL_TOWER.items() if k in own}, **changes}


def class_of(family: str, config: Any) -> type[PreTrainedModel]:
    """The class whose checkpoints users bring: for wrappers the whole model, towers included."""
    name = WRAPPERS.get(family, {}).get("class")
    return getattr(transformers, name) if name else model_class(config)


def has_interface(family: str) -> bool:
    """Whether this transformers lets the family's experts be served by others (5.13 does not, for aria)."""
    text = WRAPPERS[family]["text"][0] if family in WRAPPERS else family
    asked = text if text in CONFIGS else family
    return bool(class_of(asked, tiny_config(asked))._can_set_experts_implementation())


def random_model(family: str, seed: int = 0, std: float = 0.08) -> PreTrainedModel:
    """A reference model by transformers' own eager experts, with weights large enough that routing matters."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    model = class_of(family, config)._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
    for name, vector in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "correction_bias", "expert_bias")):
            nn.init.normal_(vector.data, std=std)  # zeros would hide that they are lost
        elif name.endswith("balancing_biases"):
            nn.init.normal_(vector.data[:-1], std=std)  # (transformers sets the last one whatever a checkpoint says)
        elif name.endswith("tid2eid"):
            vector.data.copy_(torch.rand(len(vector), 8).argsort(1)[:, : vector.shape[1]])
        elif vector.ndim == 1 and not vector.any():
            nn.init.normal_(vector.data, std=std)
    return model


def write_checkpoint(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model saved the way its family is published."""
    copy.deepcopy(random_model(family, seed)).to(dtype).save_pretrained(folder)
    return folder
