"""The experts of one layer on the CPU in fp32, each from its 4-bit codes to its share of the result on one core.

For the pairs p of expert e, of token t(p) and routing weight g[p] (names as in `experts`):

    h[p] = W_up x[t] + b_up          a[p] = activate(h[p])          out[t] += g[p] (W_down a[p] + b_down)

The forward keeps h alone; the backward computes a again, and what it needs of a product that was not kept:

    back[p] = W_down^T dout[t]       dg[p] = back[p] . a[p] + dout[t] . b_down
    dh[p]   = g[p] activate'(back)   dx[t] += W_up^T dh[p]

Every core takes whole experts (`workers`): it decodes an expert into a buffer of its own, which stays in its cache for
the product, and adds to a result of its own; these are summed at the end. The gradients of the deltas are written where
they belong, each by one core. `experts.GroupedLinear` and `GroupedLinearCombine` are the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from usaf.expert_bank import ExpertBank, PairGradients, Routing
from usaf.workers import number_of_workers, run_shares, shares
from usaf.workspace import own_pages


@dataclass(frozen=True)
class ExpertLayer:
    """up, down: the banks; the biases [E, out] or None; activate: h [n, out of up] -> a [n, in of down]."""

    up: ExpertBank
    down: ExpertBank
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]

    def shares(self, routing: Routing) -> list[list[int]]:
        """The experts that each worker takes: by their tokens, and by what decoding costs whatever the tokens."""
        used = list(routing.used())
        sizes = [DECODING_COSTS_TOKENS + end - first for _, first, end in used]
        weights = self.up.part_size + self.down.part_size
        taken = shares(sizes, number_of_workers(weights * sum(sizes), len(used)))
        return [[used[i][0] for i in parts] for parts in taken]

    def buffer(self) -> Tensor:
        return torch.empty(max(self.up.part_size, self.down.part_size))


DECODING_COSTS_TOKENS = 10
"""Decoding a weight takes about as long as multiplying it with so many tokens."""


def runs_fused(hidden_TH: Tensor, up: ExpertBank, down: ExpertBank) -> bool:
    if hidden_TH.device.type != "cpu" or up.device.type != "cpu" or down.device.type != "cpu":
        return False
    return hidden_TH.dtype == torch.float32 == up.delta.dtype == down.delta.dtype


def fused_experts(x: Tensor, g: Tensor, layer: ExpertLayer, routing: Routing) -> Tensor:
    """[T, H] from x [T, H] and the pairs' routing weights g [P], in the routing's order."""
    g = g.to(x.dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, g, layer.up.delta, layer.down.delta)):
        return FusedExperts.apply(x, g, layer.up.delta, layer.down.delta, layer, routing)
    return _forward(x, g, layer, routing, None)


@torch.no_grad()
def _forward(x: Tensor, g: Tensor, layer: ExpertLayer, routing: Routing, h_P: Tensor | None) -> Tensor:
    """[T, H]; h_P [P, out of up], where given, is filled with what the backward needs."""

    @torch.no_grad()
    def work(experts: list[int]) -> Tensor:
        out, buffer = torch.zeros(len(x), layer.down.out_features), layer.buffer()
        for e in experts:
            pairs = slice(routing.starts[e], routing.starts[e + 1])
            token = routing.token_P[pairs]
            weight = layer.up.decode(e, buffer, layer.up.delta)
            h = torch.mm(x.index_select(0, token), weight.t(), out=None if h_P is None else h_P[pairs])
            if layer.up_bias is not None:
                h += layer.up_bias[e]
            if layer.down.output_unused and h_P is not None:
                continue
            y = layer.activate(h) @ layer.down.decode(e, buffer, layer.down.delta).t()
            if layer.down_bias is not None:
                y += layer.down_bias[e]
            out.index_add_(0, token, y.mul_(g[pairs].unsqueeze(1)))
        return out

    return _sum(run_shares(work, layer.shares(routing)))


def _sum(parts: list[Tensor]) -> Tensor:
    total, *rest = parts
    for part in rest:
        total = total.add_(part)
    return total


class FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, up_delta, down_delta, layer: ExpertLayer, routing: Routing):
        h_P = torch.empty(len(g), layer.up.out_features)
        ctx.layer, ctx.routing = layer, routing
        ctx.save_for_backward(x, g, up_delta, down_delta, h_P)
        return _forward(x, g, layer, routing, h_P)

    @staticmethod
    def backward(ctx, grad_out):
        x, g, up_delta, down_delta, h_P = ctx.saved_tensors
        needs_x, needs_g, needs_up, needs_down = ctx.needs_input_grad[:4]
        layer, routing = ctx.layer, ctx.routing
        grad_out = grad_out.contiguous()
        grad_g = torch.zeros_like(g)
        grad_up = torch.zeros_like(up_delta) if needs_up else None
        grad_down = torch.zeros_like(down_delta) if needs_down else None
        capture = Capture.of(layer, h_P)
        back = Backward(layer, routing, x, g, up_delta.detach(), down_delta.detach(), h_P, grad_out, capture,
                        grad_g, grad_up, grad_down, needs_x)  # fmt: skip
        parts = run_shares(back.experts, layer.shares(routing))
        capture.hand_over(layer, routing, x, g, grad_out)
        grad_x = _sum([part for part in parts if part is not None]) if needs_x else None
        return grad_x, grad_g if needs_g else None, grad_up, grad_down, None, None


@dataclass(frozen=True)
class Capture:
    """What weight gradients need (`PairGradients`), where a bank asks for it: dh [P, out of up], a [P, in of down]."""

    dh_P: Tensor | None
    a_P: Tensor | None

    @classmethod
    def of(cls, layer: ExpertLayer, h_P: Tensor) -> Capture:
        return cls(
            own_pages(tuple(h_P.shape)) if layer.up.captured is not None else None,
            own_pages((len(h_P), layer.down.in_features)) if layer.down.captured is not None else None,
        )

    def hand_over(self, layer: ExpertLayer, routing: Routing, x: Tensor, g: Tensor, grad_out: Tensor) -> None:
        if self.dh_P is None and self.a_P is None:
            return
        token, starts = _outliving(routing.token_P), routing.starts
        if layer.up.captured is not None and self.dh_P is not None:
            layer.up.captured.append(PairGradients(_outliving(x), token, self.dh_P, None, None, starts))
        if layer.down.captured is not None and self.a_P is not None:
            grad_out, g = _outliving(grad_out), _outliving(g)
            layer.down.captured.append(PairGradients(self.a_P, None, grad_out, token, g, starts))


def _outliving(tensor: Tensor) -> Tensor:
    """A copy that may stay when the step has gone (`own_pages`)."""
    return own_pages(tuple(tensor.shape), tensor.dtype).copy_(tensor.detach())


@dataclass(frozen=True)
class Backward:
    """One backward: its tensors, and the results that have a place for every pair or delta."""

    layer: ExpertLayer
    routing: Routing
    x: Tensor
    g: Tensor
    up_delta: Tensor
    down_delta: Tensor
    h_P: Tensor
    grad_out: Tensor
    capture: Capture
    grad_g: Tensor
    grad_up: Tensor | None
    grad_down: Tensor | None
    needs_x: bool

    @torch.no_grad()
    def experts(self, experts: list[int]) -> Tensor | None:
        """One worker's experts; returns its share of the gradient of x."""
        grad_x = torch.zeros_like(self.x) if self.needs_x else None
        buffer = self.layer.buffer()
        for e in experts:
            self.expert(e, buffer, grad_x)
        return grad_x

    def expert(self, e: int, buffer: Tensor, grad_x: Tensor | None) -> None:
        up, down = self.layer.up, self.layer.down
        pairs = slice(self.routing.starts[e], self.routing.starts[e + 1])
        token, g = self.routing.token_P[pairs], self.g[pairs].unsqueeze(1)
        dy = self.grad_out.index_select(0, token)
        back = dy @ down.decode(e, buffer, self.down_delta)
        h = self.h_P[pairs].detach().requires_grad_()
        with torch.enable_grad():
            activated = self.layer.activate(h)
        a = activated.detach()
        grad_g = (back * a).sum(1)
        if self.layer.down_bias is not None:
            grad_g += (dy * self.layer.down_bias[e]).sum(1)
        self.grad_g[pairs] = grad_g
        (dh,) = torch.autograd.grad(activated, h, back.mul_(g))
        if grad_x is not None:
            grad_x.index_add_(0, token, dh @ up.decode(e, buffer, self.up_delta))
        if self.grad_up is not None:
            self._sampled(self.grad_up, up, e, dh, self.x.index_select(0, token))
        if self.grad_down is not None:
            self._sampled(self.grad_down, down, e, dy.mul_(g), a)
        if self.capture.dh_P is not None:
            self.capture.dh_P[pairs] = dh
        if self.capture.a_P is not None:
            self.capture.a_P[pairs] = a

    @staticmethod
    def _sampled(gradient: Tensor, bank: ExpertBank, e: int, grad_output: Tensor, inputs: Tensor) -> None:
        first, end = bank.part_starts[e], bank.part_starts[e + 1]
        if first < end:
            gradient[first:end] = bank.sampled(e, grad_output, inputs)
