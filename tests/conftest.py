"""What every test module shares: quiet libraries, and one thread a worker where tests run side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from runs import World

# Two workers of two threads on two cores wait for each other more than they work. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets torch's threads for its process; the next test finds them as they were."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    yield
    if torch is not None:
        torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of an adapted family that is marked `checks("logits")` says so in the file of results, if it passes."""
    report = yield
    marker = item.get_closest_marker("checks")
    if marker is not None and report.when == "call" and report.passed and "USAF_FAMILY_RESULTS" in os.environ:
        from adapted_families import record_check

        record_check(item.callspec.params["family"], *marker.args)  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model, its data and a place for runs, shared by the tests of a module."""
    from runs import World

    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many threads share work (`usaf.workers`), however little there is to do."""
    import torch  # after the environment above is set

    from usaf import workers

    monkeypatch.setattr(workers, "LEAST_PART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
