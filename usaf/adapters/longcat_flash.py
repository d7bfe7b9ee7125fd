"""LongCat-Flash: besides its experts the router may choose "zero" experts, which hand a token on as it is, weighted.

    out[t] = sum over the chosen e: g[t, e] E_e(x[t]),   E_e(x) = x for e >= n_routed_experts

The ids of zero experts lie beyond the experts that have weights, where `experts_forward` takes them for masked slots;
what they hand on is added here. A layer holds two attention blocks and two dense MLPs around its one MoE block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform

from usaf.adapters.fused import FusedExperts, modules_named, replace_module

MODEL_TYPES = ("longcat_flash",)


class ExpertsAndIdentities(FusedExperts):
    def __init__(self, own: Any) -> None:
        experts = own.num_routed_experts
        # transformers gives zero experts a gate_up_proj too, which nothing uses.
        super().__init__(own.gate_up_proj[:experts], own.down_proj, own.act_fn, router_rows=own.total_experts)
        self.num_routed_experts = experts

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        routed_TH = super().forward(hidden_TH, expert_ids_TK, routing_weights_TK)
        handed_on_T1 = (routing_weights_TK * (expert_ids_TK >= self.num_routed_experts)).sum(1, keepdim=True)
        return routed_TH + (hidden_TH * handed_on_T1).to(hidden_TH.dtype)


def adapt(model: PreTrainedModel) -> None:
    for name, own in modules_named(model, "LongcatFlashExperts"):
        replace_module(model, name, ExpertsAndIdentities(own))


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Experts are merged by transformers' own mapping. Where a checkpoint has tensors for zero experts (transformers
    writes them), they get a name that the model does not know: they are not read, and an export copies them."""
    routed, zero = model.config.n_routed_experts, model.config.zero_expert_num or 0
    if zero == 0:
        return []
    ids = "|".join(str(e) for e in range(routed, routed + zero))
    return [WeightRenaming(rf"mlp\.experts\.(?:{ids})\.", "mlp.zero_experts.")]
