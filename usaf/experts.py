"""The experts of one layer: a frozen 4-bit base with sparse trainable deltas, and the forward handed to transformers.

    W_effective = dequantize(base) + delta            delta is zero outside the active indices

The gradient of W at the active indices *is* the gradient of delta, so no straight-through estimator is needed, and a
dropped weight is at its base value because nothing else is stored. Tokens are sorted by expert and every expert
computes its own tokens only; its weights are decoded for one product at a time and decoded again in the backward, so
at most one expert is ever dense. Weight gradients are computed at the active indices alone (`kernels.sampled`).

Shape legend: T tokens, K experts a token (top_k), P = T * K token-expert pairs, E experts, H hidden, I intermediate.

What is left out: training the biases of experts (frozen, as everything but deltas and routers).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from usaf.errors import UserError
from usaf.kernels.sampled import sampled_gradient
from usaf.quantization import QuantizedTensor, dequantize

EXPERTS_IMPLEMENTATION = "usaf"
INDEX_ADD_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Routing:
    """Token-expert pairs sorted by expert; ids that name no expert (>= E, a masked slot) are left out."""

    token_P: Tensor  # int64: the token of each pair
    slot_P: Tensor  # int64: its place in the flattened [T * K] routing weights
    starts: list[int]  # E + 1 entries: pairs starts[e]..starts[e + 1] belong to expert e

    @classmethod
    def of(cls, expert_ids_TK: Tensor, num_experts: int) -> Routing:
        ids = expert_ids_TK.reshape(-1)
        slot = torch.sort(ids, stable=True).indices
        # A comparison and a sum where bincount would do: bincount falls back to the host on DirectML.
        experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
        counts = (ids.unsqueeze(1) == experts).sum(0).tolist()
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        slot = slot[: starts[-1]]
        return cls(torch.div(slot, expert_ids_TK.shape[1], rounding_mode="floor"), slot, starts)

    def by_pair(self) -> Routing:
        """The same pairs for inputs that are kept by pair ([P, in]) instead of by token."""
        return Routing(torch.arange(len(self.token_P), device=self.token_P.device), self.slot_P, self.starts)

    def used(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first pair, end of pairs) for every expert that got a token."""
        for e in range(len(self.starts) - 1):
            if self.starts[e] < self.starts[e + 1]:
                yield e, self.starts[e], self.starts[e + 1]


@dataclass(frozen=True)
class PairGradients:
    """What the weight gradients of one projection need, from one backward: dW[e] = dY_e^T X_e, formed only on demand.

    Inputs or output gradients that are shared by the K pairs of a token are kept by token.
    """

    inputs: Tensor  # [T, in] with input_token, else [P, in]
    input_token: Tensor | None
    grad_outputs: Tensor  # [T, out] with output_token, else [P, out]
    output_token: Tensor | None
    output_scale: Tensor | None  # [P]: the routing weights, where grad_outputs are shared by token
    starts: list[int]
    scale: float = 1.0  # of the gradient as a whole, where its step was clipped

    def expert(self, e: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(dY_e [n, out], X_e [n, in]) of the n pairs of expert e."""
        pairs = slice(self.starts[e], self.starts[e + 1])
        x = self.inputs[pairs] if self.input_token is None else self.inputs.index_select(0, self.input_token[pairs])
        if self.output_token is None:
            dy = self.grad_outputs[pairs]
        else:
            dy = self.grad_outputs.index_select(0, self.output_token[pairs])
        if self.output_scale is not None:
            dy = dy * self.output_scale[pairs].unsqueeze(1)
        if self.scale != 1.0:
            dy = dy * self.scale
        return dy.to(dtype), x.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint; `starts` included."""
        named = {
            "inputs": self.inputs, "input_token": self.input_token, "grad_outputs": self.grad_outputs,
            "output_token": self.output_token, "output_scale": self.output_scale,
            "starts": torch.tensor(self.starts, dtype=torch.int64),
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> PairGradients:
        return cls(
            named["inputs"], named.get("input_token"), named["grad_outputs"], named.get("output_token"),
            named.get("output_scale"), named["starts"].tolist(),
        )  # fmt: skip


class ExpertBank(nn.Module):
    """One projection (up or down) of all experts of a layer.

    `active` are the flat indices e * out * in + r * in + c of the trained weights, sorted; `delta` their trained values
    in fp32, in the same order. `resident` may hold the base decoded to 16 bits: decoding rounds to the same
    16 bits, so both ways give the same weights to the bit. While `captured` is a list, every backward appends what the
    weight gradients need.
    """

    delta: nn.Parameter

    def __init__(self, base: QuantizedTensor) -> None:
        super().__init__()
        self.base = base
        self.num_experts, self.out_features, self.in_features = base.shape
        self.resident: Tensor | None = None
        self.captured: list[PairGradients] | None = None
        self.set_active(torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    @property
    def device(self) -> torch.device:
        return self.base.packed.device

    @property
    def expert_size(self) -> int:
        return self.out_features * self.in_features

    @property
    def numel(self) -> int:
        return self.num_experts * self.expert_size

    def move(self, device: torch.device) -> None:
        """The base (and the resident copy) to `device`; frozen layers are moved there only while they run."""
        base = self.base
        self.base = base._replace(
            packed=base.packed.to(device), scale=base.scale.to(device), offset=base.offset.to(device)
        )
        if self.resident is not None:
            self.resident = self.resident.to(device)

    def set_active(self, active: Tensor, delta: Tensor) -> None:
        """Replace the trained set. active: int64 [n] sorted flat indices; delta: fp32 [n] (trainable if n or not).

        Kept are 8 bytes a weight of places, not the 32 of flat index, index in the expert, row and column: at full size
        they are 24 million.
        """
        assert active.shape == delta.shape
        if len(active) == 0:  # every frozen layer's bank: no tables
            self.expert_starts: list[int] = [0] * (self.num_experts + 1)
            self.rows = self.columns = self.row_starts = torch.zeros(0, dtype=torch.int32, device=self.device)
            self.delta = nn.Parameter(delta.to(self.device, torch.float32))
            return
        active = active.cpu()
        bounds = torch.arange(self.num_experts + 1, dtype=torch.int64) * self.expert_size
        self.expert_starts = torch.searchsorted(active, bounds).tolist()
        within = active % self.expert_size
        per_row = torch.div(active, self.in_features, rounding_mode="floor")
        starts = torch.searchsorted(per_row, torch.arange(self.num_experts * self.out_features + 1))
        e_first = torch.tensor(self.expert_starts[:-1], dtype=torch.int64).unsqueeze(1)
        shared = torch.arange(self.num_experts).unsqueeze(1) * self.out_features + torch.arange(self.out_features + 1)
        rows = torch.div(within, self.in_features, rounding_mode="floor")
        self.rows = rows.to(torch.int32).to(self.device)
        self.columns = (within % self.in_features).to(torch.int32).to(self.device)
        self.row_starts = (starts[shared] - e_first).to(torch.int32).to(self.device)  # [E, out + 1], CSR per expert
        self.delta = nn.Parameter(delta.to(self.device, torch.float32))

    @property
    def active(self) -> Tensor:
        """int64 [n]: the sorted flat indices, on the bank's device."""
        spans = enumerate(itertools.pairwise(self.expert_starts))
        first_index = [torch.full((end - first,), e * self.expert_size) for e, (first, end) in spans]
        return self._within(slice(None)) + torch.cat(first_index).to(self.device)

    def _within(self, part: slice) -> Tensor:
        """int64: places in the experts' own flattened [out, in]."""
        return self.rows[part].to(torch.int64) * self.in_features + self.columns[part]

    def base_weight(self, e: int, dtype: torch.dtype) -> Tensor:
        """[out, in] of expert e as stored, without delta."""
        if self.resident is not None:
            return self.resident[e].to(dtype)
        return dequantize(self.base.expert(e), dtype)[0]

    def weight(self, e: int, dtype: torch.dtype, delta: Tensor | None = None) -> Tensor:
        """[out, in] of expert e: base + delta, summed in fp32 (float64 for float64) and rounded once to `dtype`."""
        first, end = self.expert_starts[e], self.expert_starts[e + 1]
        if first == end:
            return self.base_weight(e, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.base_weight(e, wide)  # always a fresh tensor: the base is held in 4 or 16 bits
        values = (self.delta if delta is None else delta).detach()[first:end]
        weight.view(-1).scatter_add_(0, self._within(slice(first, end)), values.to(wide))
        return weight.to(dtype)

    @torch.no_grad()
    def lost_to_rounding(self, dtype: torch.dtype) -> tuple[int, int]:
        """(moved weights whose delta vanishes when base + delta is rounded to `dtype`, moved weights)."""
        lost = moved = 0
        for e in range(self.num_experts):
            part = slice(self.expert_starts[e], self.expert_starts[e + 1])
            delta = self.delta[part]
            base = self.base_weight(e, torch.float32).view(-1).gather(0, self._within(part))
            unchanged = (base + delta).to(dtype) == base.to(dtype)
            moved += int((delta != 0).sum())
            lost += int((unchanged & (delta != 0)).sum())
        return lost, moved

    def sampled(self, e: int, grad_output: Tensor, inputs: Tensor) -> Tensor:
        """The gradient of expert e's deltas from its tokens: [n_e]."""
        part = slice(self.expert_starts[e], self.expert_starts[e + 1])
        return sampled_gradient(grad_output, inputs, self.rows[part], self.columns[part], self.row_starts[e])

    def delta_gradient(self, pairs: PairGradients, dtype: torch.dtype) -> Tensor:
        """The gradient of all deltas from one backward's pairs: fp32 [n]; experts without tokens get zeros."""
        gradient = torch.zeros_like(self.delta)
        for e in range(self.num_experts):
            first, end = self.expert_starts[e], self.expert_starts[e + 1]
            if first < end and pairs.starts[e] < pairs.starts[e + 1]:
                gradient[first:end] = self.sampled(e, *pairs.expert(e, dtype)).to(gradient.dtype)
        return gradient


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
        pairs = PairGradients(x, routing.token_P, grad_y, None, None, routing.starts)
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
        pairs = PairGradients(a, None, grad_out, routing.token_P, g, routing.starts)
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
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None
    h = GroupedLinear.apply(hidden_TH, up.delta, up_bias, up, routing)
    a = self._apply_gate(h) if self.has_gate else self.act_fn(h)  # type: ignore[operator]
    g = routing_weights_TK.reshape(-1).gather(0, routing.slot_P)
    bias = self.down_proj_bias if self.has_bias else None
    if not getattr(self, "has_post_expert_norm", False):  # transformers 5.13 does not know the attribute
        return GroupedLinearCombine.apply(a, g, down.delta, bias, hidden_TH.shape[0], down, routing)
    # The norm stands between product and routing weight, so this family keeps its products for the backward.
    y = self.post_expert_norm(GroupedLinear.apply(a, down.delta, bias, down, routing.by_pair()))  # type: ignore[operator]
    weighted = (y * g.unsqueeze(1)).to(hidden_TH.dtype)
    return torch.zeros_like(hidden_TH).index_add(0, routing.token_P, weighted)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def is_experts_module(module: nn.Module) -> bool:
    """transformers marks every experts module of its interface with these attributes, whatever the class is called."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(module, "has_gate")


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's layers and their name: the outermost list of modules that experts are in."""
    experts = [name for name, module in model.named_modules() if is_experts_module(module)]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(e.startswith(f"{name}.") for e in experts)
    ]
    if not found:
        raise UserError(f"MODEL: the experts of {type(model).__name__} are in no list of layers; this family is not "
                        "supported yet")  # fmt: skip
    return min(found, key=lambda item: item[0].count("."))


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
