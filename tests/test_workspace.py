"""Buffers in mapped files: the same bits, no private memory, nothing left on the disk."""

from __future__ import annotations

import errno
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from usaf import workspace as module
from usaf.errors import RunError
from usaf.memory import private_bytes, resident_bytes
from usaf.workspace import PRIVATE, SMALLEST_BYTES, Workspace, own_pages

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_what_is_kept_is_the_same_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 255, (3, 700_000)).to(dtype)
    kept = Workspace(tmp_path).keep(values)
    assert kept.dtype == dtype
    assert torch.equal(kept, values)
    kept[1] = 1
    assert not torch.equal(kept, values), "a copy, not a view"
    assert bool((kept[1] == 1).all())


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    values = torch.randn(1000, 1000, requires_grad=True)
    for memory in (Workspace(tmp_path), PRIVATE):
        assert not memory.keep(values * 2).requires_grad
        assert torch.equal(memory.keep(values), values)


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems count mapped pages in other ways")
def test_it_is_no_private_memory_and_comes_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "deeper")
    private, resident = private_bytes(), resident_bytes()
    kept = workspace.empty((128 * MIB,), torch.uint8)
    kept.fill_(1)
    assert resident_bytes() - resident > 120 * MIB
    assert private_bytes() - private < 8 * MIB
    assert workspace.bytes == 128 * MIB
    del kept
    gc.collect()
    assert resident_bytes() - resident < 8 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_tensors_hold_no_descriptors(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may close its own meanwhile
    workspace, before = Workspace(tmp_path), len(os.listdir("/proc/self/fd"))
    kept = [workspace.empty((MIB,), torch.uint8) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before
    del kept


@pytest.mark.skipif(os.name == "nt", reason="a mapped file keeps its name there")
def test_files_have_no_name_even_while_they_are_used(tmp_path: Path) -> None:
    kept = Workspace(tmp_path).empty((2 * MIB,), torch.uint8)
    assert list(tmp_path.iterdir()) == []
    assert int(kept.sum()) == 0


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    left = tmp_path / ".workspace.1-aa.partial"
    other = tmp_path / "states.bin"
    for path in (left, other):
        path.write_bytes(b"x")
    Workspace(tmp_path).close()
    assert not left.exists()
    assert other.exists()


def test_an_earlier_result_is_written_over_where_it_fits(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = workspace.keep(torch.ones(MIB))
    second = workspace.keep(torch.full((MIB,), 2.0), first)
    assert second.data_ptr() == first.data_ptr()
    assert float(second.sum()) == 2 * MIB
    assert workspace.keep(torch.ones(MIB + 1), first).data_ptr() != first.data_ptr()


def test_small_tensors_get_no_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.empty((SMALLEST_BYTES - 1,), torch.uint8).shape == (SMALLEST_BYTES - 1,)
    assert workspace.keep(torch.zeros(0, 5)).shape == (0, 5)
    assert workspace.bytes == 0


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "reserve", full)
    with pytest.raises(RunError, match="PREFIX_CACHE_DIR"):
        Workspace(tmp_path).empty((SMALLEST_BYTES,), torch.uint8)
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_where_the_system_has_no_call_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    kept = Workspace(tmp_path).empty((3, 5 * MIB // 4 + 1), torch.float32)
    assert float(kept.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (300, 400)])
def test_own_pages_are_a_tensor_as_any_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    own = own_pages(shape, dtype).copy_(values)
    assert torch.equal(own, values)
    assert own.is_contiguous()
    assert torch.equal(own.clone().add_(1), values + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_own_pages_are_private_and_go_back_with_the_tensor() -> None:
    before = private_bytes()
    own = own_pages((1 << 22,)).fill_(1.0)
    assert private_bytes() - before > 0.9 * own.nbytes
    view = own[:8]
    del own
    assert private_bytes() - before > 0.9 * (1 << 24)  # a view holds them
    assert view.tolist() == [1.0] * 8
    del view
    assert private_bytes() - before < 0.2 * (1 << 24)
