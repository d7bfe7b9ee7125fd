"""Several threads for work that falls into parts, such as the experts of a layer: each part runs on one core.

torch divides every single operator among its threads, and at some 64 tokens an expert the threads then wait for each
other more than they compute. Here each thread takes whole parts instead, while torch itself keeps to the calling thread
(`torch.set_num_threads(1)`, also in the BLAS library). torch's operators and `usaf.kernels` release the GIL.

Who takes which part follows from the parts' sizes and the number of threads alone, so results that are summed by thread
have the same bits in every run with as many threads.

Left out: torch builds without OpenMP, whose number of threads cannot be changed while they run; there one thread does
all parts, and torch divides each operator as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST_WORKERS = 16
"""More would not pay for the results that each of them sums on its own."""

LEAST_PART = 1 << 25
"""Multiplications in a part, on the average, from which it pays to give parts to threads: some 0.4 ms. Below, the
threads wait for each other at Python's lock (the demo's step is a quarter slower with two)."""


def number_of_workers(multiplications: int, parts: int) -> int:
    """How many threads share so much work in so many parts, the calling one included."""
    if not _threads_can_change() or multiplications < LEAST_PART * parts:
        return 1
    return max(1, min(torch.get_num_threads(), MOST_WORKERS, parts))


def shares(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """For each worker the parts that it takes, ascending. The largest first, each to whoever has the least so far."""
    loads = [0] * workers
    taken: list[list[int]] = [[] for _ in range(workers)]
    for part in sorted(range(len(sizes)), key=lambda part: -sizes[part]):
        worker = loads.index(min(loads))
        loads[worker] += sizes[part]
        taken[worker].append(part)
    return [sorted(parts) for parts in taken]


def run_shares(work: Callable[[list[int]], Result], taken: list[list[int]]) -> list[Result]:
    """`work(parts)` of every worker at once, the first on the calling thread; their results in the workers' order.

    Raises what any of them raised. Gradient modes belong to a thread: `work` has to set its own.
    """
    if len(taken) == 1:
        return [work(taken[0])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        others = [_pool().submit(work, parts) for parts in taken[1:]]
        try:
            first = work(taken[0])
        finally:
            wait(others)  # nobody may still write when this returns
        return [first, *(future.result() for future in others)]
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The other threads; each tells torch once to use itself alone, a setting of its own in OpenMP."""
    return ThreadPoolExecutor(
        MOST_WORKERS - 1, thread_name_prefix="worker", initializer=functools.partial(torch.set_num_threads, 1)
    )


@functools.cache
def _threads_can_change() -> bool:
    return "OpenMP" in torch.__config__.parallel_info()
