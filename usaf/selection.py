"""Which weights train: exact top-k over a stream of scores, and RigL's drop and grow. Pure functions on tensors.

Active weights are held as sorted int64 flat indices into a fused expert tensor `[E, out, in]`, or the head's. Scores
arrive one expert at a time, so the k best of up to billions of candidates are found in memory O(k + one block).

Order everywhere: the larger score first, of equal scores the lower flat index. `torch.topk` alone leaves ties open, so
a selection here is a threshold (the k-th score) and, among the scores equal to it, the first in index order; the chosen
set then depends on the scores alone, never on the device, the thread count or how the stream was cut.

Reselection (Evci et al., "Rigging the Lottery", 2020, and google-research/rigl): drop a cosine-decayed fraction of the
active weights, grow as many with the largest gradients. As in SpIEL (Ansell et al., 2024) the weights dropped are those
with the smallest |delta|, the ones that training moved least, not the smallest weights.

Left out: growing at random (SET), budgets that move between tensors, ordering by anything but one score.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from usaf.kernels.scan import at_least


def top_k_indices(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of `scores` `[n]` (any order of magnitude or sign, no NaN), int64 sorted ascending."""
    assert scores.dim() == 1, scores.shape
    assert 0 <= k <= len(scores), (k, len(scores))
    assert not torch.isnan(scores).any(), "a NaN has no rank"
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = _kth_largest(scores, k)
    chosen = scores > threshold
    level = (scores == threshold).nonzero().flatten()
    chosen[level[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type == "cpu" and scores.dtype != torch.bfloat16:
        # numpy's selection moves no indices along: three times as fast as topk
        return torch.tensor(np.partition(scores.detach().numpy(), len(scores) - k)[len(scores) - k])
    return torch.topk(scores, k, sorted=False).values.min()


def smallest_k_positions(values: Tensor, k: int) -> Tensor:
    """Positions of the k smallest |values| `[n]`, ties to the lower position; int64 sorted ascending."""
    return top_k_indices(-values.abs(), k)


HELD = 4
"""Candidates that a `RunningTopK` gathers before it looks which of them are still among the best, in multiples of k."""


class RunningTopK:
    """The k best of a stream of dense blocks of values, by their size, exactly; memory O(k + block).

    Blocks may come in any order, from several threads at once, but must not overlap. With fewer than k candidates in
    all, every one is kept.
    """

    def __init__(self, k: int) -> None:
        assert k >= 0, k
        self._k = k
        self._threshold = 0.0  # no score below it can be among the k best any more
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # first index of a block -> (indices, values)
        self._held_count = 0
        self._lock = threading.Lock()

    def update(self, values: Tensor, first_index: int, exclude: Tensor | None = None) -> None:
        """Offer |values| (float32 `[n]`) of the flat indices first_index .. first_index + n - 1.

        `exclude`: sorted int64 flat indices, of the whole tensor, that are no candidates.
        """
        assert values.dim() == 1, values.shape
        assert values.dtype == torch.float32, values.dtype
        if self._k == 0 or len(values) == 0:
            return
        # Another thread may raise the threshold meanwhile: then some candidates too many are held until then.
        positions, scores = at_least(values, self._threshold)
        candidates = values.index_select(0, positions)
        assert not bool(torch.isnan(scores).any()), "a NaN has no rank"
        indices = positions + first_index
        if exclude is not None and len(indices):
            outside = ~_among(indices, exclude, first_index, first_index + len(values))
            indices, candidates = indices[outside], candidates[outside]
        if len(indices) == 0:
            return
        with self._lock:
            self._held[first_index] = (indices, candidates)
            self._held_count += len(indices)
            # Compressing only when so many have gathered keeps the cost per block independent of k.
            if self._held_count > HELD * self._k:
                self._compress()

    def settled_threshold(self) -> float:
        """The k-th best score so far, 0 while there are fewer; it depends on what was offered, not on when."""
        with self._lock:
            self._compress()
            return self._threshold if self._held_count == self._k else 0.0

    def indices(self) -> Tensor:
        """The chosen flat indices, int64 sorted ascending."""
        return self._compressed()[0]

    def values(self) -> Tensor:
        """What was offered of them, with its sign, float32, in the order of `indices()`."""
        return self._compressed()[1]

    def _compressed(self) -> tuple[Tensor, Tensor]:
        with self._lock:
            self._compress()
            blocks = [self._held[first] for first in sorted(self._held)]
        if not blocks:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
        return torch.cat([indices for indices, _ in blocks]), torch.cat([values for _, values in blocks])

    def _compress(self) -> None:
        if self._held_count <= self._k:
            return
        order = sorted(self._held)
        chosen = top_k_indices(torch.cat([self._held[first][1] for first in order]).abs(), self._k)
        # Blocks are apart and each is sorted, so in the order of their beginnings all indices are.
        ends = torch.tensor([len(self._held[first][0]) for first in order]).cumsum(0).tolist()
        begin, held = 0, {}
        for first, end, part in zip(order, ends, _split(chosen, ends), strict=True):
            if len(part):
                indices, values = self._held[first]
                held[first] = (indices[part - begin], values[part - begin])
            begin = end
        self._held, self._held_count = held, self._k
        self._threshold = min(float(values.abs().min()) for _, values in held.values())


def _split(ordered: Tensor, ends: list[int]) -> list[Tensor]:
    """The values of a sorted tensor below each of `ends` that are not below the one before."""
    begin, parts = 0, []
    for end in ends:
        upto = _span(ordered, 0, end)[1]
        parts.append(ordered[begin:upto])
        begin = upto
    return parts


def _among(indices: Tensor, others: Tensor, low: int, high: int) -> Tensor:
    """bool: which of `indices`, all from `low` to below `high`, are in the sorted `others` (on any device)."""
    begin, end = _span(others, low, high)
    barred = torch.zeros(high - low, dtype=torch.bool, device=indices.device)
    barred[(others[begin:end] - low).to(indices.device)] = True
    return barred[indices - low]


def _span(ordered: Tensor, low: int, high: int) -> tuple[int, int]:
    """Where the values from `low` to below `high` stand in a sorted tensor."""
    if ordered.device.type == "cpu":
        begin, end = torch.searchsorted(ordered, torch.tensor([low, high])).tolist()
        return begin, end
    return int((ordered < low).sum()), int((ordered < high).sum())  # DirectML has no searchsorted


def overlap(a: Tensor, b: Tensor) -> float:
    """|a & b| / |a| of two sorted int64 index sets; 1 where a is empty."""
    if len(a) == 0:
        return 1.0
    # Each holds an index once, so what they share stands twice, side by side, in the sorted whole.
    merged = torch.sort(torch.cat((a, b))).values
    return int((merged[1:] == merged[:-1]).sum()) / len(a)


def drop_fraction_at(step: int, end_step: int, initial: float) -> float:
    """Share of the active weights to drop at `step`: initial / 2 (1 + cos(pi step / end_step)); 0 from end_step on.

    Source: Evci et al. 2020, section 3, the cosine update schedule.
    """
    if step >= end_step:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * step / end_step))


@dataclass(frozen=True)
class Reselection:
    """The outcome of one drop and grow; n active weights before and after."""

    kept_positions: Tensor
    """int64 sorted: positions in the old active arrays that stay"""
    dropped: Tensor
    """int64 sorted flat indices; one that came straight back is in `grown` too"""
    grown: Tensor
    """int64 sorted flat indices"""
    active: Tensor
    """int64 `[n]` sorted flat indices"""
    from_old: Tensor
    """int64 `[n]`: for each entry of `active` its position in the old arrays, or -1 where it is grown"""


def reselect(active: Tensor, delta: Tensor, n_drop: int, candidates: Tensor) -> Reselection:
    """Drop the n_drop active weights with the smallest |delta| and grow the first n_drop candidates not kept.

    `active`: int64 `[n]` sorted flat indices; `delta`: `[n]`; `candidates`: flat indices, the best first; those that
    are kept, or named before, are passed over, those just dropped are not. n_drop = 0 changes nothing.
    """
    assert active.shape == delta.shape, (active.shape, delta.shape)
    dropped_positions = smallest_k_positions(delta, n_drop)
    stays = torch.ones(len(active), dtype=torch.bool, device=active.device)
    stays[dropped_positions] = False
    kept_positions = stays.nonzero().flatten()
    kept = active[kept_positions]
    if n_drop:
        grown = candidates[_first_mentions(kept, candidates)][:n_drop]
        assert len(grown) == n_drop, f"{len(grown)} candidates outside the kept weights for {n_drop} places"
    else:
        grown = candidates[:0]
    new_active, order = torch.sort(torch.cat((kept, grown)))
    from_old = torch.cat((kept_positions, torch.full_like(grown, -1)))[order]
    return Reselection(kept_positions, active[dropped_positions], torch.sort(grown).values, new_active, from_old)


def _first_mentions(taken: Tensor, candidates: Tensor) -> Tensor:
    """Positions of the candidates that are neither in `taken` nor earlier among the candidates, in their order.

    By one stable sort, since DirectML has neither searchsorted nor isin.
    """
    values, order = torch.sort(torch.cat((taken, candidates)), stable=True)
    repeated = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    repeated[order[1:]] = values[1:] == values[:-1]
    return (~repeated[len(taken) :]).nonzero().flatten()
