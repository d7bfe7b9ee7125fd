"""Step 3.7: its experts are the interface's in all but the mark. Gate and up are clamped in some layers.

The text model inside the multimodal one is trained; the vision tower stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from usaf.adapters.fused import FusedExperts, modules_named, replace_module

MODEL_TYPES = ("step3p7",)


class ClampedExperts(FusedExperts):
    """Experts whose activated gate is at most `limit`, and whose up is within -limit..limit."""

    def __init__(self, own: Any) -> None:
        super().__init__(own.gate_up_proj, own.down_proj, own.act_fn)
        self.limit = own.limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up.clamp(min=-self.limit, max=self.limit)


def adapt(model: PreTrainedModel) -> None:
    for name, own in modules_named(model, "Step3p7Experts"):
        replace_module(model, name, ClampedExperts(own))


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """None: transformers has the mapping, and the names are the same."""
    return []
