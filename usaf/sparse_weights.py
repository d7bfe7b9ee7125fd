"""Trained entries of frozen weights: which they are, their deltas, and the gradients of these alone.

    W_effective = base + delta            delta is zero outside the active indices

The gradient of W at the active indices *is* the gradient of delta, so no straight-through estimator is needed, and a
dropped weight is at its base value because nothing else is stored. Weight gradients are computed at the active indices
alone (`kernels.sampled`).

What trains so comes in equal parts, one of which is dense at a time: the experts of a projection (`expert_bank`),
blocks of the vocabulary's rows (`sparse_head`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from usaf.kernels.sampled import sampled_gradient
from usaf.workers import number_of_workers, run_shares, shares
from usaf.workspace import Memory

COPYING_COSTS = 200
"""What a gathered and turned element costs, in multiplications of a product."""


class Factors(ABC):
    """What the weight gradients need, from one backward: dW[part] = dY_part^T X_part, formed only on demand.

    `starts`: parts + 1 entries; rows starts[p]..starts[p + 1] are those of part p.
    """

    starts: list[int]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which the backward ran."""

    @abstractmethod
    def part(
        self, p: int, dtype: torch.dtype = torch.float32, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(dY_p [n, out], X_p [n, in]) of the n rows of part p; of dY the columns that `outputs` names, where given."""

    def bounds(self, p: int, squares: bool = False) -> Tensor | None:
        """[out]: what no entry of a row of dW[p] exceeds in size, or with `squares` of the sum of its tokens' squares,
        where that is known for less than dY costs."""
        return None

    @abstractmethod
    def scaled(self, scale: float) -> Factors:
        """The same for a gradient that was scaled as a whole, as clipping does."""

    @abstractmethod
    def is_finite(self) -> bool: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint."""

    @abstractmethod
    def kept(self, memory: Memory) -> Factors:
        """The same in `memory`."""


@dataclass(frozen=True)
class Deltas:
    """The trained entries of a `SparseWeights` as they are, or as they were: see there."""

    rows: Tensor
    columns: Tensor
    part_starts: list[int]
    part_columns: int
    values: Tensor

    def add_to(self, weight: Tensor, p: int) -> None:
        """Add those of part p to `weight`: [out, in], contiguous."""
        span = slice(self.part_starts[p], self.part_starts[p + 1])
        if span.start < span.stop:
            within = self.rows[span].to(torch.int64) * self.part_columns + self.columns[span]
            weight.view(-1).scatter_add_(0, within, self.values[span].to(weight.dtype))


Captured = TypeVar("Captured", bound=Factors)


class SparseWeights(nn.Module, ABC, Generic[Captured]):
    """A frozen weight in `num_parts` parts [out, in] with sparse trainable deltas; the last part may be cut short.

    `active` are the flat indices p * out * in + r * in + c of the trained weights, sorted; `delta` their trained values
    in fp32, in the same order. While `captured` is a list, every backward appends what the weight gradients need.
    """

    delta: nn.Parameter

    def __init__(self, num_parts: int, out_features: int, in_features: int, device: torch.device, numel: int) -> None:
        super().__init__()
        self.num_parts, self.part_rows, self.part_columns, self.numel = num_parts, out_features, in_features, numel
        self.captured: list[Captured] | None = None
        self.part_starts: list[int] = []
        self._clear(torch.zeros(0), device)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def base_weight(self, p: int, dtype: torch.dtype) -> Tensor:
        """[out, in] of part p as stored, without delta."""

    @abstractmethod
    def restored(self, named: dict[str, Tensor]) -> Captured:
        """What `Factors.tensors` gave, on the weight's device."""

    @property
    def part_size(self) -> int:
        return self.part_rows * self.part_columns

    def rows_in(self, p: int) -> int:
        """Rows that part p has."""
        return min(self.part_rows, self.numel // self.part_columns - p * self.part_rows)

    def set_active(self, active: Tensor, delta: Tensor) -> None:
        """Replace the trained set. active: int64 [n] sorted flat indices; delta: fp32 [n] (trainable if n or not).

        Kept are 8 bytes a weight of places, not the 32 of flat index, index in the part, row and column: at full size
        they are 24 million.
        """
        assert active.shape == delta.shape
        if len(active) == 0:  # every frozen layer's bank: no tables
            self._clear(delta, self.device)
            return
        active = active.cpu()
        self.part_starts = torch.searchsorted(active, torch.arange(self.num_parts + 1) * self.part_size).tolist()
        within = active % self.part_size
        per_row = torch.div(active, self.part_columns, rounding_mode="floor")
        starts = torch.searchsorted(per_row, torch.arange(self.num_parts * self.part_rows + 1))
        first = torch.tensor(self.part_starts[:-1], dtype=torch.int64).unsqueeze(1)
        shared = torch.arange(self.num_parts).unsqueeze(1) * self.part_rows + torch.arange(self.part_rows + 1)
        rows = torch.div(within, self.part_columns, rounding_mode="floor")
        self.rows = rows.to(torch.int32).to(self.device)
        self.columns = (within % self.part_columns).to(torch.int32).to(self.device)
        self.row_starts = (starts[shared] - first).to(torch.int32).to(self.device)  # [parts, out + 1], CSR per part
        self.delta = nn.Parameter(delta.to(self.device, torch.float32))

    def _clear(self, delta: Tensor, device: torch.device) -> None:
        self.part_starts = [0] * (self.num_parts + 1)
        self.rows = self.columns = self.row_starts = torch.zeros(0, dtype=torch.int32, device=device)
        self.delta = nn.Parameter(delta.to(device, torch.float32))

    @property
    def active(self) -> Tensor:
        """int64 [n]: the sorted flat indices, on the weight's device."""
        spans = enumerate(itertools.pairwise(self.part_starts))
        first_index = [torch.full((end - first,), p * self.part_size) for p, (first, end) in spans]
        return self._within(slice(None)) + torch.cat(first_index).to(self.device)

    def span(self, p: int) -> slice:
        """Where the active weights of part p lie in `delta`, `rows` and `columns`."""
        return slice(self.part_starts[p], self.part_starts[p + 1])

    def _within(self, span: slice) -> Tensor:
        """int64: places in the parts' own flattened [out, in]."""
        return self.rows[span].to(torch.int64) * self.part_columns + self.columns[span]

    def present(self) -> Deltas:
        """What trains, as it is now; its values are not a copy."""
        return Deltas(self.rows, self.columns, self.part_starts, self.part_columns, self.delta.detach())

    @torch.no_grad()
    def lost_to_rounding(self, dtype: torch.dtype) -> tuple[int, int]:
        """(moved weights whose delta vanishes when base + delta is rounded to `dtype`, moved weights)."""
        lost = moved = 0
        for p in range(self.num_parts):
            span = self.span(p)
            if span.start == span.stop:
                continue
            delta = self.delta[span]
            base = self.base_weight(p, torch.float32).reshape(-1).gather(0, self._within(span))
            unchanged = (base + delta).to(dtype) == base.to(dtype)
            moved += int((delta != 0).sum())
            lost += int((unchanged & (delta != 0)).sum())
        return lost, moved

    def take_captured(self) -> list[Captured]:
        """What one backward has left, which is forgotten."""
        captured, self.captured = self.captured or [], None
        return captured

    # -- gradients -----------------------------------------------------------------------------------------------------

    def sampled(self, p: int, grad_output: Tensor, inputs: Tensor) -> Tensor:
        """The gradient of part p's deltas from its rows: [n_p]."""
        span = self.span(p)
        return sampled_gradient(grad_output, inputs, self.rows[span], self.columns[span], self.row_starts[p])

    def delta_gradient(self, factors: Captured, dtype: torch.dtype, chosen: Tensor | None = None) -> Tensor:
        """The gradient of all deltas from one backward: fp32 [n]; parts without rows get zeros.

        chosen: bool [n]; where given, only the gradient of these deltas, [number chosen].
        """
        starts, columns, rows, row_starts = self.part_starts, self.columns, self.rows, self.row_starts
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
        def work(parts: list[int]) -> None:
            for p in parts:
                span = slice(starts[p], starts[p + 1])
                within, begins, outputs = rows[span], row_starts[p], None
                if factors.bounds(p) is not None:  # dY is formed for this: of the rows with weights alone
                    outputs, within = torch.unique(within, return_inverse=True)
                    begins = torch.cat([begins.index_select(0, outputs), begins[-1:]])
                sampled = sampled_gradient(*factors.part(p, dtype, outputs), within, columns[span], begins)
                gradient[span] = sampled.to(gradient.dtype)

        seen = factors.starts
        used = [p for p in range(self.num_parts) if starts[p] < starts[p + 1] and seen[p] < seen[p + 1]]
        if not used:
            return gradient
        sizes = [seen[p + 1] - seen[p] for p in used]
        copied = sum(sizes) * (self.part_rows + self.part_columns)  # what the kernel turns feature-major
        workers = number_of_workers(COPYING_COSTS * copied, len(used)) if self.device.type == "cpu" else 1
        run_shares(lambda parts: work([used[i] for i in parts]), shares(sizes, workers))
        return gradient
