"""JetMoE: its MLP's experts are trained; the experts of its attention (MoA) stay frozen in the checkpoint's 16 bits.

transformers' block sorts the tokens by expert itself and hands over counts instead of ids, so the block is replaced;
its router's linear layer, which is all that a checkpoint holds of it, stays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform

from usaf.adapters.fused import FusedExperts, modules_named, replace_module
from usaf.linear import WidenedLinear

MODEL_TYPES = ("jetmoe",)


class JetMoeMlp(nn.Module):
    """transformers' MoE block (`own`) with experts that are given the routing: softmax over the K best logits."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.experts = FusedExperts(own.input_linear.weight, own.output_linear.weight, own.activation)
        self.router, self.bias = own.router, own.bias

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_TH = hidden_BSH.flatten(0, -2)
        logits_TE = self.router.layer(hidden_TH).float()
        logits_TK, ids_TK = logits_TE.topk(self.router.top_k, dim=1)
        weights_TK = torch.softmax(logits_TK, dim=1)
        return self.experts(hidden_TH, ids_TK, weights_TK).view_as(hidden_BSH) + self.bias


class FrozenParallelLinear(nn.Module):
    """The attention's experts: one product for each expert, over the tokens sorted by expert. Never trained, kept in
    the checkpoint's type (`in_stored_type`, which `model.set_dense` asks for) and widened an expert at a time."""

    in_stored_type = True

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.weight = own.weight  # [E, out, in]

    def forward(self, inputs_PH: Tensor, counts: list[int]) -> Tensor:
        parts = []
        for weight, inputs in zip(self.weight, inputs_PH.split(counts), strict=True):
            same = weight.dtype == inputs.dtype
            parts.append(F.linear(inputs, weight) if same else WidenedLinear.apply(inputs, weight, None))
        return torch.cat(parts)


def adapt(model: PreTrainedModel) -> None:
    attention: Any
    for name, own in modules_named(model, "JetMoeMoE"):
        replace_module(model, name, JetMoeMlp(own))
    for _, attention in modules_named(model, "JetMoeMoA"):
        attention.input_linear = FrozenParallelLinear(attention.input_linear)
        attention.output_linear = FrozenParallelLinear(attention.output_linear)


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """The tensors are fused as they should be, under the names of two modules; so are the attention's, which stay."""
    return [
        WeightRenaming(r"mlp\.input_linear\.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming(r"mlp\.output_linear\.weight", "mlp.experts.down_proj"),
    ]
