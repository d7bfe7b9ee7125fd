"""Llama 4 (Scout, Maverick): experts whose *input* is multiplied by the router's score.

transformers runs every expert over all tokens, the inputs of those not chosen multiplied by zero. The experts have no
biases, so a zero input gives zero, and only the chosen ones are computed here:

    out[t] = shared(x[t]) + sum over the K chosen experts e: E_e(sigmoid(score[t, e]) x[t])

The checkpoint of a multimodal Llama 4 gives its text part; the vision tower's tensors are not read.

Left as transformers has it: chunks of the attention, and the temperature by which it is tuned, count the places of a
row, not of a document packed into it. Both begin to matter beyond 8,192 tokens a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from usaf.adapters.fused import FusedExperts, modules_named, replace_module
from usaf.experts import experts_forward

MODEL_TYPES = ("llama4_text", "llama4")


class ScaledInputExperts(FusedExperts):
    """Experts that weight what goes into them instead of what comes out."""

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        tokens, top_k = expert_ids_TK.shape
        # Each pair has an input of its own, so each pair is a token with one expert of weight 1.
        pairs_PH = (hidden_TH.unsqueeze(1) * routing_weights_TK.unsqueeze(2)).to(hidden_TH.dtype).flatten(0, 1)
        ids_P1 = expert_ids_TK.reshape(-1, 1)
        out_PH = experts_forward(self, pairs_PH, ids_P1, torch.ones_like(ids_P1, dtype=hidden_TH.dtype))
        return out_PH.view(tokens, top_k, -1).sum(1)


class Llama4Moe(nn.Module):
    """transformers' MoE block (`own`) with its router and shared expert, and experts that are given the routing."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        experts = own.experts
        self.experts = ScaledInputExperts(experts.gate_up_proj, experts.down_proj, experts.act_fn, is_transposed=True)
        self.router, self.shared_expert, self.top_k = own.router, own.shared_expert, own.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, logits_TE = self.router(hidden_TH)  # the sigmoid of the K best logits, 0 elsewhere
        ids_TK = torch.topk(logits_TE, self.top_k, dim=1).indices
        routed_TH = self.experts(hidden_TH, ids_TK, scores_TE.gather(1, ids_TK))
        return self.shared_expert(hidden_TH) + routed_TH, logits_TE


def adapt(model: PreTrainedModel) -> None:
    for name, own in modules_named(model, "Llama4TextMoe"):
        replace_module(model, name, Llama4Moe(own))


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """None: the checkpoint's tensors are fused, [E, in, out], under the same names."""
    return []
