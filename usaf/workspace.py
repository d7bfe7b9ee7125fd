"""Large buffers in mapped files: pages of the system's cache, which it may write out, in the place of private memory.

A file is reserved on the disk before it is mapped, so a full disk is an error with a remedy, never a signal in the
middle of a product. On Linux and macOS it loses its name at once: the space comes back with the last tensor, or with
the process, however that ends, and what is given up is never written. Windows cannot remove a mapped file, so there
it goes when the workspace is closed, and what a killed process left goes with the next workspace in that folder.

The values are the same to the bit; only where they lie differs. `own_pages` is private memory all the same, but beside
the allocator's heap.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from usaf.errors import RunError
from usaf.files import FULL_DISK, lock, remove_abandoned

NAME = "workspace"
SMALLEST_BYTES = 1 << 20
"""Tensors below this stay in private memory: a file each is not worth it."""
SMALLEST_OWN_BYTES = 1 << 14
"""The same for pages of their own."""


def own_pages(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the host for what outlives the step that makes it; what is in it is not defined.

    Its pages go back to the system with it. Among what a step allocates and frees, such tensors, the small ones above
    all, would leave holes that glibc keeps: 1.1 GB of a full-size run (docs/decisions.md).
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if size < SMALLEST_OWN_BYTES:
        return torch.empty(shape, dtype=dtype)
    flags = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}  # shared pages are the default
    return torch.frombuffer(mmap.mmap(-1, size, **flags), dtype=dtype, count=count).view(shape)


class Memory:
    """Private memory: the same interface without files."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the host; what is in it is not defined."""
        return torch.empty(shape, dtype=dtype)

    def keep(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """The values of a tensor, on the host, without its gradient. into: an earlier result, which may be written
        over."""
        return tensor.detach().cpu()


PRIVATE = Memory()


class Workspace(Memory):
    """Tensors in files of one folder, which is made if need be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0  # handed out so far
        self._left: list[Path] = []  # files that still have a name (Windows)
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder / NAME)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the host, in a file of its own.

        Raises:
            RunError: the disk has no room for it.
        """
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if size < SMALLEST_BYTES:
            return torch.empty(shape, dtype=dtype)
        path = self.folder / f".{NAME}.{os.getpid()}-{secrets.token_hex(8)}.partial"
        try:
            mapped = self._map(path, count, dtype)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise RunError(f"{self.folder}: {error.strerror}, and {size / 1e9:.2f} GB of working memory were to go "
                           "there; free some space, let PREFIX_CACHE_DIR name a folder elsewhere, or raise "
                           "MEMORY_LIMIT") from None  # fmt: skip
        self.bytes += size
        return mapped.view(shape)

    def _map(self, path: Path, count: int, dtype: torch.dtype) -> Tensor:
        """A new file, reserved and mapped. (By torch, which holds no descriptor for it: there may be hundreds.)"""
        with open(path, "xb+") as file:
            try:
                with suppress(OSError):  # a disk without locks
                    lock(file)
                reserve(file.fileno(), count * dtype.itemsize)
                mapped = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            finally:
                if os.name != "nt":
                    path.unlink()
        if os.name == "nt":
            self._left.append(path)
        return mapped

    def keep(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        fits = into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype)
        kept = into if into is not None and fits else self.empty(tuple(tensor.shape), tensor.dtype)
        return kept.copy_(tensor.detach())

    def close(self) -> None:
        """Remove what still has a name and is no longer mapped."""
        for path in self._left:
            with suppress(OSError):
                path.unlink()
        self._left = [path for path in self._left if path.exists()]


def reserve(handle: int, size: int) -> None:
    """Give a file its size, with room on the disk for all of it. Raises OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    if os.name == "nt":
        os.ftruncate(handle, size)  # which takes the room, since such files are not sparse
        return
    block = bytes(min(size, 1 << 22))  # macOS: a file of holes would be mapped without room behind it
    written = 0
    while written < size:
        written += os.write(handle, block[: size - written])
