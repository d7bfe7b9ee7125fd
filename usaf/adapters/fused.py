"""The experts module that adapters put into a family's MoE blocks: what transformers' experts interface would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from usaf.experts import experts_forward


class FusedExperts(nn.Module):
    """Gated experts in two fused 3D parameters, in the layout that transformers marks by the same attributes.

    Args:
        gate_up_proj: [E, 2I, H], all gates before all ups; [E, H, 2I] with `is_transposed`.
        down_proj: [E, H, I]; [E, I, H] with `is_transposed`.
        act_fn: of the gate.
        router_rows: rows of the router's weight, where it chooses among more than these E experts.

    Both tensors are on the meta device: shapes, no data. A family that does something else between the two products
    overrides `_apply_gate`, one that does something else around them overrides `forward`.
    """

    has_gate, has_bias = True, False

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        act_fn: Callable[[Tensor], Tensor],
        is_transposed: bool = False,
        router_rows: int | None = None,
    ) -> None:
        super().__init__()
        assert gate_up_proj.is_meta
        assert down_proj.is_meta
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_proj.detach()), nn.Parameter(down_proj.detach())
        self.act_fn, self.is_transposed = act_fn, is_transposed
        self.router_rows = len(gate_up_proj) if router_rows is None else router_rows

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """[P, 2I] -> [P, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        """[T, H]. The arguments come by position, and ids are [T, K]: that is how expert loads are counted."""
        return experts_forward(self, hidden_TH, expert_ids_TK, routing_weights_TK)


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def modules_named(model: nn.Module, class_name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules of a class of transformers; looked up by name, since versions differ in what they
    have. The model may be rewritten meanwhile."""
    return iter([(name, m) for name, m in model.named_modules() if type(m).__name__ == class_name])


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
