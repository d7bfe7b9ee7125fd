"""Selection against sorting in Python; RigL's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from usaf.selection import (
    HELD,
    RunningTopK,
    drop_fraction_at,
    overlap,
    reselect,
    smallest_k_positions,
    top_k_indices,
)


def best_by_sorting(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def scores_with_ties(n: int, levels: int, seed: int) -> Tensor:
    return torch.randint(0, levels, (n,), generator=torch.Generator().manual_seed(seed)).float() / levels


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("k", [0, 1, 7, 99, 100])
def test_top_k_is_the_head_of_the_sorted_list(k: int, levels: int) -> None:
    scores = scores_with_ties(100, levels, seed=k)
    assert top_k_indices(scores, k).tolist() == best_by_sorting(scores.tolist(), k)
    assert top_k_indices(scores, k).dtype == torch.int64


@pytest.mark.parametrize("k", [0, 5, 50])
def test_smallest_goes_by_magnitude_and_lower_position(k: int) -> None:
    values = scores_with_ties(50, 6, seed=1) - 0.5
    expected = best_by_sorting([-abs(value) for value in values.tolist()], k)
    assert smallest_k_positions(values, k).tolist() == expected


def test_nan_has_no_rank() -> None:
    scores = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(AssertionError, match="NaN"):
        top_k_indices(scores, 1)
    with pytest.raises(AssertionError, match="NaN"):
        RunningTopK(2).update(scores, 0)


@pytest.mark.parametrize("levels", [1, 4, 10**6])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [0, 1, 60, 300])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_stream_gives_the_same_as_the_whole(k: int, block: int, levels: int, order: str) -> None:
    scores = scores_with_ties(300, levels, seed=2)
    stream = RunningTopK(k)
    starts = range(0, 300, block)
    for start in starts if order == "forward" else reversed(starts):
        stream.update(scores[start : start + block], start)
    expected = best_by_sorting(scores.tolist(), k)
    assert stream.indices().tolist() == expected
    assert torch.equal(stream.values(), scores[torch.tensor(expected, dtype=torch.int64)])


@pytest.mark.parametrize("block", [9, 64, 200])
def test_excluded_indices_are_no_candidates(block: int) -> None:
    first = 5 * 10**9
    scores = scores_with_ties(200, 5, seed=3)
    barred = torch.arange(0, 200, 3)
    stream = RunningTopK(40)
    for start in range(0, 200, block):
        stream.update(scores[start : start + block], first + start, exclude=barred + first)
    open_scores = scores.clone()
    open_scores[barred] = -1
    assert (stream.indices() - first).tolist() == best_by_sorting(open_scores.tolist(), 40)


def test_excluding_all_but_a_few_keeps_those_few() -> None:
    stream = RunningTopK(4)
    stream.update(torch.zeros(6), 0, exclude=torch.tensor([0, 1, 3, 5]))
    assert stream.indices().tolist() == [2, 4]
    assert RunningTopK(4).indices().tolist() == []
    assert RunningTopK(4).values().tolist() == []


def test_results_can_be_read_between_updates() -> None:
    scores = scores_with_ties(90, 8, seed=4)
    stream = RunningTopK(20)
    for start in range(0, 90, 30):
        stream.update(scores[start : start + 30], start)
        assert stream.indices().tolist() == best_by_sorting(scores[: start + 30].tolist(), 20)


def test_held_candidates_stay_bounded() -> None:
    stream = RunningTopK(10)
    for start in range(0, 10_000, 100):
        stream.update(torch.full((100,), 1.0), start)
        assert sum(len(indices) for indices, _ in stream._held.values()) <= HELD * 10
    assert stream.indices().tolist() == list(range(10))


def test_overlap_is_the_shared_part_of_the_first() -> None:
    a, b = torch.tensor([1, 5, 9, 7 * 10**9]), torch.tensor([5, 7 * 10**9])
    assert overlap(a, b) == 0.5
    assert overlap(b, a) == 1.0
    assert overlap(a, torch.tensor([2])) == 0.0
    assert overlap(a[:0], b) == 1.0


def test_drop_fraction_is_a_cosine_to_zero() -> None:
    assert drop_fraction_at(0, 100, 0.3) == pytest.approx(0.3)
    assert drop_fraction_at(50, 100, 0.3) == pytest.approx(0.15)
    assert drop_fraction_at(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert drop_fraction_at(100, 100, 0.3) == 0.0
    assert drop_fraction_at(500, 100, 0.3) == 0.0
    assert drop_fraction_at(0, 0, 0.3) == 0.0
    fractions = [drop_fraction_at(step, 100, 0.3) for step in range(101)]
    assert fractions == sorted(fractions, reverse=True)


def test_zero_drop_changes_nothing() -> None:
    active = torch.tensor([2, 3, 11])
    outcome = reselect(active, torch.tensor([0.0, 1.0, 2.0]), 0, torch.tensor([5, 6]))
    assert torch.equal(outcome.active, active)
    assert outcome.from_old.tolist() == outcome.kept_positions.tolist() == [0, 1, 2]
    assert len(outcome.dropped) == len(outcome.grown) == 0


def test_smallest_deltas_go_and_the_best_candidates_come() -> None:
    active = torch.tensor([2, 3, 11, 20, 7 * 10**9])
    delta = torch.tensor([0.1, -0.01, 0.5, 0.0, -0.3])
    # 11 is kept; 20 was just dropped and comes back fresh; the second 30 is a repetition
    outcome = reselect(active, delta, 2, torch.tensor([11, 30, 30, 20, 4]))
    assert outcome.dropped.tolist() == [3, 20]
    assert outcome.kept_positions.tolist() == [0, 2, 4]
    assert outcome.grown.tolist() == [20, 30]
    assert outcome.active.tolist() == [2, 11, 20, 30, 7 * 10**9]
    assert outcome.from_old.tolist() == [0, 2, -1, -1, 4]


@pytest.mark.parametrize("n_drop", [1, 13, 40])
def test_the_count_is_preserved_and_every_entry_has_an_origin(n_drop: int) -> None:
    generator = torch.Generator().manual_seed(n_drop)
    active = torch.randperm(1000, generator=generator)[:40].sort().values
    delta = torch.randn(40, generator=generator).round(decimals=1)
    candidates = torch.randperm(1000, generator=generator)
    outcome = reselect(active, delta, n_drop, candidates)
    kept = set(active[outcome.kept_positions].tolist())
    expected_grown = [c for c in candidates.tolist() if c not in kept][:n_drop]
    assert len(outcome.dropped) == n_drop
    assert kept | set(outcome.dropped.tolist()) == set(active.tolist())
    assert outcome.grown.tolist() == sorted(expected_grown)
    assert outcome.active.tolist() == sorted(kept | set(expected_grown))
    for entry, old in zip(outcome.active.tolist(), outcome.from_old.tolist(), strict=True):
        assert (entry in expected_grown) if old < 0 else entry == int(active[old])


def test_too_few_candidates_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="1 candidates"):
        reselect(torch.tensor([1, 2]), torch.tensor([0.1, 0.0]), 2, torch.tensor([4]))
