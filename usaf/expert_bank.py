"""The experts of one layer as data: a frozen 4-bit base with sparse trainable deltas.

    W_effective = dequantize(base) + delta            delta is zero outside the active indices

The gradient of W at the active indices *is* the gradient of delta, so no straight-through estimator is needed, and a
dropped weight is at its base value because nothing else is stored. Weight gradients are computed at the active indices
alone (`kernels.sampled`).

Shape legend: T tokens, K experts a token (top_k), P = T * K token-expert pairs, E experts, H hidden, I intermediate.

What is left out: training the biases of experts (frozen, as everything but deltas and routers).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usaf.kernels.decode import add_deltas, decode_expert
from usaf.kernels.sampled import sampled_gradient
from usaf.quantization import QuantizedTensor, dequantize
from usaf.workers import number_of_workers, run_shares, shares
from usaf.workspace import Memory


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

    def kept(self, memory: Memory) -> PairGradients:
        """The same in `memory`."""
        return PairGradients.from_tensors({name: memory.keep(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> PairGradients:
        return cls(
            named["inputs"], named.get("input_token"), named["grad_outputs"], named.get("output_token"),
            named.get("output_scale"), named["starts"].tolist(),
        )  # fmt: skip


COPYING_COSTS = 200
"""What a gathered and turned element costs, in multiplications of a product."""


class ExpertBank(nn.Module):
    """One projection (up or down) of all experts of a layer.

    `active` are the flat indices e * out * in + r * in + c of the trained weights, sorted; `delta` their trained values
    in fp32, in the same order. `resident` may hold the base decoded to the 16 bits that define it (to fp32 where those
    are bfloat16 and the device has none): decoding rounds to the same bits, so both ways give the same weights to the
    bit. While `captured` is a list, every backward appends what the weight gradients need. `output_unused` says that
    only gradients are wanted of the forwards that follow, and that those do not depend on what this projection, the
    second, gives: it may be left out.
    """

    delta: nn.Parameter

    def __init__(self, base: QuantizedTensor) -> None:
        super().__init__()
        self.base = base
        self.num_experts, self.out_features, self.in_features = base.shape
        self.resident: Tensor | None = None
        self.captured: list[PairGradients] | None = None
        self.output_unused = False
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
        self.base = self.base.to(device)
        if self.resident is not None:
            self.resident = self.resident.to(device, self.base.resident_dtype())

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
        weight = self.base_weight(e, wide)
        if self.resident is not None and self.resident.dtype == wide:
            weight = weight.clone()  # all others are fresh already
        values = (self.delta if delta is None else delta).detach()[first:end]
        weight.view(-1).scatter_add_(0, self._within(slice(first, end)), values.to(wide))
        return weight.to(dtype)

    def decode(self, e: int, buffer: Tensor, delta: Tensor) -> Tensor:
        """As `weight` in fp32, a view of the beginning of `buffer` (fp32, flat, on the CPU) that is written to."""
        out = buffer[: self.expert_size].view(self.out_features, self.in_features)
        part = slice(self.expert_starts[e], self.expert_starts[e + 1])
        if part.start == part.stop:
            active: tuple[Tensor, ...] = ()
        else:
            active = (self.columns[part], self.row_starts[e], delta.detach()[part])
        if self.resident is None:
            decode_expert(self.base, e, out, *active)
        else:
            out.copy_(self.resident[e])
            if active:
                add_deltas(out, *active)
        return out

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

    def delta_gradient(self, pairs: PairGradients, dtype: torch.dtype, chosen: Tensor | None = None) -> Tensor:
        """The gradient of all deltas from one backward's pairs: fp32 [n]; experts without tokens get zeros.

        chosen: bool [n]; where given, only the gradient of these deltas, [number chosen].
        """
        starts, columns, rows, row_starts = self.expert_starts, self.columns, self.rows, self.row_starts
        if chosen is not None:
            chosen = chosen.cpu()
            places, before = chosen.nonzero().squeeze(1), torch.zeros(len(chosen) + 1, dtype=torch.int64)
            torch.cumsum(chosen, 0, out=before[1:])  # how many are chosen below each
            first = torch.tensor(starts[:-1]).unsqueeze(1)
            row_starts = (before[row_starts.cpu() + first] - before[first]).to(self.device, torch.int32)
            places, starts = places.to(self.device), before[torch.tensor(starts)].tolist()
            columns, rows = columns.index_select(0, places), rows.index_select(0, places)
        gradient = torch.zeros(starts[-1], dtype=self.delta.dtype, device=self.device)

        @torch.no_grad()
        def work(experts: list[int]) -> None:
            for e in experts:
                part = slice(starts[e], starts[e + 1])
                sampled = sampled_gradient(*pairs.expert(e, dtype), rows[part], columns[part], row_starts[e])
                gradient[part] = sampled.to(gradient.dtype)

        used = [
            e for e in range(self.num_experts) if starts[e] < starts[e + 1] and pairs.starts[e] < pairs.starts[e + 1]
        ]
        if not used:
            return gradient
        sizes = [pairs.starts[e + 1] - pairs.starts[e] for e in used]
        copied = sum(sizes) * (self.out_features + self.in_features)  # what the kernel turns feature-major
        workers = number_of_workers(COPYING_COSTS * copied, len(used)) if self.device.type == "cpu" else 1
        run_shares(lambda parts: work([used[i] for i in parts]), shares(sizes, workers))
        return gradient
