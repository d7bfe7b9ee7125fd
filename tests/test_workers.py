"""Work shared among threads: who takes what, that torch keeps to one thread meanwhile, and what happens on errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from usaf import workers
from usaf.workers import number_of_workers, run_shares, shares


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_part_is_taken_once_and_loads_are_even(count: int) -> None:
    sizes = [int(size) for size in torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(0))]
    taken = shares(sizes, count)
    assert sorted(part for parts in taken for part in parts) == list(range(50))
    assert all(parts == sorted(parts) for parts in taken)
    loads = [sum(sizes[part] for part in parts) for parts in taken]
    assert max(loads) - min(loads) <= max(sizes)
    assert taken == shares(sizes, count)


def test_results_come_in_the_workers_order_and_torch_keeps_to_one_thread(two_threads: None) -> None:
    seen: list[tuple[str, int]] = []

    def work(parts: list[int]) -> list[int]:
        time.sleep(0.02 * (3 - len(parts)))
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return parts

    taken = [[0], [1, 2], [3, 4, 5]]
    assert run_shares(work, taken) == taken
    assert {threads for _, threads in seen} == {1}
    assert len({name for name, _ in seen}) == 3
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_is_raised_after_all_have_finished(fails: int, two_threads: None) -> None:
    finished: list[int] = []

    def work(parts: list[int]) -> None:
        if parts[0] == fails:
            raise ValueError("out of memory")
        time.sleep(0.05)
        finished.append(parts[0])

    with pytest.raises(ValueError, match="out of memory"):
        run_shares(work, [[0], [1]])
    assert finished == [1 - fails]
    assert torch.get_num_threads() == 2


def test_little_work_stays_on_the_calling_thread(two_threads: None) -> None:
    assert number_of_workers(10**9, 1000) == 1
    assert number_of_workers(10**12, 1000) == 2
    assert number_of_workers(10**12, 1) == 1
    assert run_shares(lambda parts: threading.current_thread(), [[0, 1]]) == [threading.current_thread()]


def test_where_threads_cannot_change_one_does_all(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    monkeypatch.setattr(workers, "_threads_can_change", lambda: False)
    assert number_of_workers(10**12, 1000) == 1
