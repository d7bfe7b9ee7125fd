"""DBRX: the experts of a layer are three 2D tensors, [E * I, H] each, one expert's rows after another's.

For one expert, w1, v1 and w2 being [I, H]:  y = w2^T (act(w1 x) * (v1 x))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, Transpose, WeightConverter, WeightTransform

from usaf.adapters.fused import FusedExperts, modules_named, on_meta
from usaf.errors import UserError

MODEL_TYPES = ("dbrx",)


class DbrxExperts(FusedExperts):
    """Called with hidden states that still have their batch."""

    def __init__(self, own: Any) -> None:
        rows, hidden = own.mlp.w1.shape
        experts, width = own.num_experts, rows // own.num_experts
        super().__init__(
            on_meta(experts, 2 * width, hidden), on_meta(experts, hidden, width), own.mlp.activation_fn
        )  # fmt: skip

    def forward(self, hidden_BSH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        return super().forward(hidden_BSH.flatten(0, -2), expert_ids_TK, routing_weights_TK).view_as(hidden_BSH)


class RowsToExperts(ConversionOps):
    """[E * rows, H] -> [E, rows, H], and back; for one expert alone as well, which is how `checkpoint` reads them."""

    expertwise = True

    def __init__(self, rows: int, inverse: bool = False) -> None:
        self.rows, self.inverse = rows, inverse

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        converted = {}
        for pattern, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if not self.inverse and len(tensor) % self.rows:
                raise UserError(f"{about['full_layer_name']}: {len(tensor)} rows are no whole number of experts of "
                                f"{self.rows} rows; config.json is of another model, download it again"
                                )  # fmt: skip
            converted[pattern] = tensor.flatten(0, 1) if self.inverse else tensor.unflatten(0, (-1, self.rows))
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return RowsToExperts(self.rows, not self.inverse)


def adapt(model: PreTrainedModel) -> None:
    block: Any
    for _, block in modules_named(model, "DbrxFFN"):
        block.experts = DbrxExperts(block.experts)
        experts, hidden = block.experts.down_proj.shape[:2]
        if block.router.layer.in_features != hidden:  # transformers 5.13 gives it the experts' width instead
            block.router.layer = nn.Linear(hidden, experts, bias=False, device="meta")


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    rows = model.config.ffn_config.ffn_hidden_size
    return [
        WeightConverter(
            ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1"], "ffn.experts.gate_up_proj",
            operations=[RowsToExperts(rows), Concatenate(dim=1)],
        ),
        WeightConverter(
            "ffn.experts.mlp.w2", "ffn.experts.down_proj", operations=[RowsToExperts(rows), Transpose(1, 2)]
        ),
    ]  # fmt: skip
