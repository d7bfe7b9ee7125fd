"""The experts of one layer as data: a frozen 4-bit base with sparse trainable deltas (`sparse_weights`).

Shape legend: T tokens, K experts a token (top_k), P = T * K token-expert pairs, E experts, H hidden, I intermediate.

What is left out: training the biases of experts (frozen).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from usaf.kernels.decode import add_deltas, decode_expert
from usaf.quantization import QuantizedTensor, dequantize
from usaf.sparse_weights import Factors, SparseWeights
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
class PairGradients(Factors):
    """Of one projection, by expert. Inputs or output gradients that are shared by the K pairs of a token are kept by
    token."""

    inputs: Tensor  # [T, in] with input_token, else [P, in]
    input_token: Tensor | None
    grad_outputs: Tensor  # [T, out] with output_token, else [P, out]
    output_token: Tensor | None
    output_scale: Tensor | None  # [P]: the routing weights, where grad_outputs are shared by token
    starts: list[int]
    scale: float = 1.0  # of the gradient as a whole, where its step was clipped

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    def part(
        self, p: int, dtype: torch.dtype = torch.float32, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert outputs is None, "there is nothing to save"
        pairs = slice(self.starts[p], self.starts[p + 1])
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

    def scaled(self, scale: float) -> PairGradients:
        return dataclasses.replace(self, scale=scale)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.grad_outputs).all())

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "inputs": self.inputs, "input_token": self.input_token, "grad_outputs": self.grad_outputs,
            "output_token": self.output_token, "output_scale": self.output_scale,
            "starts": torch.tensor(self.starts, dtype=torch.int64),
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def kept(self, memory: Memory) -> PairGradients:
        return PairGradients.from_tensors({name: memory.keep(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> PairGradients:
        return cls(
            named["inputs"], named.get("input_token"), named["grad_outputs"], named.get("output_token"),
            named.get("output_scale"), named["starts"].tolist(),
        )  # fmt: skip


class ExpertBank(SparseWeights[PairGradients]):
    """One projection (up or down) of all experts of a layer: a 4-bit base and its deltas, a part an expert.

    `resident` may hold the base decoded to the 16 bits that define it (to fp32 where those are bfloat16 and the device
    has none): decoding rounds to the same bits, so both ways give the same weights to the bit. `output_unused` says
    that only gradients are wanted of the forwards that follow, and that those do not depend on what this projection,
    the second, gives: it may be left out.
    """

    def __init__(self, base: QuantizedTensor) -> None:
        self.num_experts, self.out_features, self.in_features = base.shape
        super().__init__(*base.shape, base.packed.device, math.prod(base.shape))
        self.base = base
        self.resident: Tensor | None = None
        self.output_unused = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def device(self) -> torch.device:
        return self.base.packed.device

    def move(self, device: torch.device) -> None:
        """The base (and the resident copy) to `device`; frozen layers are moved there only while they run."""
        self.base = self.base.to(device)
        if self.resident is not None:
            self.resident = self.resident.to(device, self.base.resident_dtype())

    def restored(self, named: dict[str, Tensor]) -> PairGradients:
        return PairGradients.from_tensors({name: tensor.to(self.device) for name, tensor in named.items()})

    def base_weight(self, p: int, dtype: torch.dtype) -> Tensor:
        if self.resident is not None:
            return self.resident[p].to(dtype)
        return dequantize(self.base.expert(p), dtype)[0]

    def weight(self, e: int, dtype: torch.dtype, delta: Tensor | None = None) -> Tensor:
        """[out, in] of expert e: base + delta, summed in fp32 (float64 for float64) and rounded once to `dtype`."""
        span = self.span(e)
        if span.start == span.stop:
            return self.base_weight(e, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.base_weight(e, wide)
        if self.resident is not None and self.resident.dtype == wide:
            weight = weight.clone()  # all others are fresh already
        deltas = self.present() if delta is None else dataclasses.replace(self.present(), values=delta.detach())
        deltas.add_to(weight, e)
        return weight.to(dtype)

    def decode(self, e: int, buffer: Tensor, delta: Tensor) -> Tensor:
        """As `weight` in fp32, a view of the beginning of `buffer` (fp32, flat, on the CPU) that is written to."""
        out = buffer[: self.part_size].view(self.out_features, self.in_features)
        span = self.span(e)
        if span.start == span.stop:
            active: tuple[Tensor, ...] = ()
        else:
            active = (self.columns[span], self.row_starts[e], delta.detach()[span])
        if self.resident is None:
            decode_expert(self.base, e, out, *active)
        else:
            out.copy_(self.resident[e])
            if active:
                add_deltas(out, *active)
        return out
