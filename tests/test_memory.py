"""Peak memory: what a run holds counts as private, what it maps from files does not."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from usaf.memory import PeakMemory, available_bytes, private_bytes, resident_bytes

MIB = 1 << 20


def test_the_peak_outlives_the_allocation() -> None:
    memory = PeakMemory()
    before = memory.private
    assert before > 0
    held = torch.ones(200 * MIB, dtype=torch.uint8)
    while memory.private < before + 190 * MIB and memory._thread.is_alive():
        memory._stopped.wait(0.01)  # the sampler's own pace; a broken one would hang here, and the limit below catch it
        if private_bytes() < before + 190 * MIB:
            pytest.fail(f"200 MiB of ones are not in private_bytes: {private_bytes() - before}")
    del held
    memory.stop()
    assert memory.private >= before + 190 * MIB
    assert memory.resident >= 200 * MIB
    assert not memory._thread.is_alive()
    peak = memory.private
    memory.stop()  # twice does no harm
    assert memory.private >= peak


def test_stop_takes_a_last_sample() -> None:
    memory = PeakMemory()
    memory._stopped.set()
    memory._thread.join()
    before = memory.private
    held = torch.ones(200 * MIB, dtype=torch.uint8)
    memory.stop()
    assert memory.private >= before + 190 * MIB
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems count mapped pages in other ways")
def test_mapped_files_are_resident_but_not_private(tmp_path: Path) -> None:
    path = tmp_path / "mapped.bin"
    path.write_bytes(b"\1" * (64 * MIB))
    private, resident = private_bytes(), resident_bytes()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, 64 * MIB, 4096)) == 64 * MIB // 4096  # every page is touched
        assert resident_bytes() - resident > 60 * MIB
        assert private_bytes() - private < 8 * MIB


def test_figures_are_bytes_of_this_machine() -> None:
    assert private_bytes() > 20 * MIB
    assert 20 * MIB < resident_bytes() < 1 << 50
    assert MIB < available_bytes() < 1 << 50
