"""The experts of one layer: the forward handed to transformers, and its plain version for every device and type.

Tokens are sorted by expert and every expert computes its own tokens only; its weights are decoded for one product at a
time and decoded again in the backward, so at most one expert is ever dense. Weight gradients are computed at the active
indices alone. On the CPU in fp32 `fused_experts` computes the same, an expert at a time on every core.

Shape legend: T tokens, K experts a token (top_k), P = T * K token-expert pairs, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from usaf.expert_bank import ExpertBank, PairGradients, Routing
from usaf.fused_experts import ExpertLayer, fused_experts, runs_fused
from usaf.quantization import QuantizedTensor

EXPERTS_IMPLEMENTATION = "usaf"
INDEX_ADD_DEVICES = ("cpu", "cuda")


def add_rows(target: Tensor, rows: Tensor, source: Tensor) -> None:
    """target[rows[i]] += source[i], in order. index_add falls back to the host on DirectML; scatter_add does not."""
    if target.device.type in INDEX_ADD_DEVICES:
        target.index_add_(0, rows, source)
    else:
        target.scatter_add_(0, rows.unsqueeze(1).expand_as(source), source)


class GroupedLinear(torch.autograd.Function):
    """Pairs of the first projection: y[p] = W_{e(p)} x[token(p)] + b_{e(p)}; x is [T, in], the result [P, out]."""

    @staticmethod
    def forward(ctx, x, delta, bias, bank: ExpertBank, routing: Routing):
        ctx.bank, ctx.routing = bank, routing
        ctx.save_for_backward(x, delta)
        parts = []
        for e, first, end in routing.used():
            weight = bank.weight(e, x.dtype, delta)
            y = x.index_select(0, routing.token_P[first:end]) @ weight.t()
            parts.append(y if bias is None else y + bias[e].to(y.dtype))
        return torch.cat(parts) if parts else x.new_zeros(0, bank.out_features)

    @staticmethod
    def backward(ctx, grad_y):
        x, delta = ctx.saved_tensors
        bank, routing = ctx.bank, ctx.routing
        grad_y = grad_y.contiguous()
        pairs = PairGradients(x.detach(), routing.token_P, grad_y, None, None, routing.starts)
        if bank.captured is not None:
            bank.captured.append(pairs)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            for e, first, end in routing.used():
                part = grad_y[first:end] @ bank.weight(e, x.dtype, delta)
                add_rows(grad_x, routing.token_P[first:end], part)
        grad_delta = bank.delta_gradient(pairs, x.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_delta, None, None, None


class GroupedLinearCombine(torch.autograd.Function):
    """The second projection with the weighted sum over a token's experts:

        out[t] = sum over pairs p of token t: g[p] (W_{e(p)} a[p] + b_{e(p)})

    The products themselves are not kept: dL/dg[p] = dout[t] . (W a[p] + b) = (W^T dout[t]) . a[p] + dout[t] . b, and
    W^T dout[t] is needed anyway for the gradient of a.
    """

    @staticmethod
    def forward(ctx, a, g, delta, bias, num_tokens: int, bank: ExpertBank, routing: Routing):
        ctx.bank, ctx.routing, ctx.bias = bank, routing, bias
        ctx.save_for_backward(a, g, delta)
        out = a.new_zeros(num_tokens, bank.out_features)
        for e, first, end in routing.used():
            y = a[first:end] @ bank.weight(e, a.dtype, delta).t()
            if bias is not None:
                y = y + bias[e].to(y.dtype)
            add_rows(out, routing.token_P[first:end], (y * g[first:end].unsqueeze(1)).to(out.dtype))
        return out

    @staticmethod
    def backward(ctx, grad_out):
        a, g, delta = ctx.saved_tensors
        bank, routing, bias = ctx.bank, ctx.routing, ctx.bias
        grad_out = grad_out.contiguous()
        pairs = PairGradients(a.detach(), None, grad_out, routing.token_P, g.detach(), routing.starts)
        if bank.captured is not None:
            bank.captured.append(pairs)
        grad_a, grad_g = [], []
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            for e, first, end in routing.used():
                dy = grad_out.index_select(0, routing.token_P[first:end])
                back = dy @ bank.weight(e, a.dtype, delta)
                weighted = (back.to(g.dtype) * a[first:end]).sum(1)
                grad_g.append(weighted if bias is None else weighted + (dy * bias[e].to(dy.dtype)).sum(1))
                grad_a.append(back * g[first:end].unsqueeze(1).to(back.dtype))
        grad_delta = bank.delta_gradient(pairs, a.dtype) if ctx.needs_input_grad[2] else None
        grad_a_P = torch.cat(grad_a) if grad_a else torch.zeros_like(a)
        grad_g_P = torch.cat(grad_g).to(g.dtype) if grad_g else torch.zeros_like(g)
        return grad_a_P, grad_g_P, grad_delta, None, None, None, None


def experts_forward(self: nn.Module, hidden_TH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
    """The experts of one layer, with the signature of transformers' experts interface.

    Args:
        self: transformers' experts module, whose 3D parameters `attach_banks` replaced.
        hidden_TH: [T, H]; expert_ids_TK: int64 [T, K]; routing_weights_TK: [T, K].

    Returns:
        [T, H], dtype of hidden_TH.
    """
    up: ExpertBank = self.up_bank  # type: ignore[assignment]
    down: ExpertBank = self.down_bank  # type: ignore[assignment]
    routing = Routing.of(expert_ids_TK, up.num_experts)
    g = routing_weights_TK.reshape(-1).gather(0, routing.slot_P)
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None
    bias = self.down_proj_bias if self.has_bias else None
    activate = self._apply_gate if self.has_gate else self.act_fn
    has_post_norm = getattr(self, "has_post_expert_norm", False)  # transformers 5.13 does not know the attribute
    if not has_post_norm and runs_fused(hidden_TH, up, down):
        return fused_experts(hidden_TH, g, ExpertLayer(up, down, up_bias, bias, activate), routing)  # type: ignore[arg-type]
    h = GroupedLinear.apply(hidden_TH, up.delta, up_bias, up, routing)
    a = activate(h)  # type: ignore[operator]
    if not has_post_norm:
        return GroupedLinearCombine.apply(a, g, down.delta, bias, hidden_TH.shape[0], down, routing)
    # The norm stands between product and routing weight, so this family keeps its products for the backward.
    y = self.post_expert_norm(GroupedLinear.apply(a, down.delta, bias, down, routing.by_pair()))  # type: ignore[operator]
    weighted = (y * g.unsqueeze(1)).to(hidden_TH.dtype)
    return torch.zeros_like(hidden_TH).index_add(0, routing.token_P, weighted)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def is_experts_module(module: nn.Module) -> bool:
    """transformers marks every experts module of its interface with these attributes, whatever the class is called."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(module, "has_gate")


def projection_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two 3D parameters of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def attach_banks(module: nn.Module, up: QuantizedTensor, down: QuantizedTensor) -> tuple[ExpertBank, ExpertBank]:
    """Put 4-bit banks in the place of the module's 3D parameters (which are still on the meta device)."""
    for name in projection_names(module):
        if name in module._parameters:
            delattr(module, name)
    module.up_bank, module.down_bank = ExpertBank(up), ExpertBank(down)
    return module.up_bank, module.down_bank
