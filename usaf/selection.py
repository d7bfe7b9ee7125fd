"""Which weights train: exact top-k over a stream of scores, and RigL's drop and grow. Pure functions on tensors.

Active weights are held as sorted int64 flat indices into a fused expert tensor `[E, out, in]`. Scores arrive one expert
at a time, so the k best of up to billions of candidates are found in memory O(k + one block).

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
from dataclasses import dataclass

import torch
from torch import Tensor


def top_k_indices(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of `scores` `[n]` (any order of magnitude or sign, no NaN), int64 sorted ascending."""
    assert scores.dim() == 1, scores.shape
    assert 0 <= k <= len(scores), (k, len(scores))
    assert not torch.isnan(scores).any(), "a NaN has no rank"
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = torch.topk(scores, k, sorted=False).values.min()
    chosen = scores > threshold
    level = (scores == threshold).nonzero().flatten()
    chosen[level[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def smallest_k_positions(values: Tensor, k: int) -> Tensor:
    """Positions of the k smallest |values| `[n]`, ties to the lower position; int64 sorted ascending."""
    return top_k_indices(-values.abs(), k)


class RunningTopK:
    """The k best of a stream of dense score blocks, exactly; memory O(k + block).

    Blocks may come in any order but must not overlap. With fewer than k candidates in all, every one is kept.
    """

    def __init__(self, k: int) -> None:
        assert k >= 0, k
        self._k = k
        self._threshold = 0.0  # no score below it can be among the k best any more
        self._held: list[tuple[Tensor, Tensor]] = []  # (indices, scores): the best so far, then what came since
        self._held_count = 0

    def update(self, scores: Tensor, first_index: int, exclude: Tensor | None = None) -> None:
        """Offer `scores` (float32 `[n]`, >= 0) of the flat indices first_index .. first_index + n - 1.

        `exclude`: sorted int64 flat indices, of the whole tensor, that are no candidates.
        """
        assert scores.dim() == 1, scores.shape
        assert scores.dtype == torch.float32, scores.dtype
        if self._k == 0 or len(scores) == 0:
            return
        assert bool(scores.min() >= 0), "scores must be >= 0 and not NaN"
        candidates = scores >= self._threshold
        if exclude is not None:
            begin, end = _span(exclude, first_index, first_index + len(scores))
            candidates[(exclude[begin:end] - first_index).to(scores.device)] = False
        positions = candidates.nonzero().flatten()
        if len(positions) == 0:
            return
        self._held.append((positions + first_index, scores[positions]))
        self._held_count += len(positions)
        # Compressing only when k candidates have gathered keeps the cost per block independent of k.
        if self._held_count > 2 * self._k:
            self._compress()

    def indices(self) -> Tensor:
        """The chosen flat indices, int64 sorted ascending."""
        self._compress()
        return self._held[0][0] if self._held else torch.empty(0, dtype=torch.int64)

    def scores(self) -> Tensor:
        """Their scores, float32, in the order of `indices()`."""
        self._compress()
        return self._held[0][1] if self._held else torch.empty(0, dtype=torch.float32)

    def _compress(self) -> None:
        if not self._held:
            return
        indices = torch.cat([held_indices for held_indices, _ in self._held])
        scores = torch.cat([held_scores for _, held_scores in self._held])
        if not bool((indices[1:] > indices[:-1]).all()):  # blocks mostly come in order, and sorting is the dear part
            indices, order = torch.sort(indices)
            scores = scores[order]
        if len(indices) > self._k:
            best = top_k_indices(scores, self._k)
            indices, scores = indices[best], scores[best]
        if len(indices) == self._k:
            self._threshold = float(scores.min())
        self._held, self._held_count = [(indices, scores)], len(indices)


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
