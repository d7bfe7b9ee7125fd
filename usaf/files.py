"""Files that are complete or absent: atomic writes, a streaming safetensors writer, folder locks, hashes.

Everything is written to a temporary name in the same folder, flushed to the disk, then renamed; a process killed at any
moment leaves the old file or the new one. Nothing here replaces a file that is mapped: Windows forbids that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from usaf.errors import UserError

SAFETENSORS_DTYPES = {
    torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}


def flush(file: IO[Any]) -> None:
    """Down to the disk, so that a rename that follows never uncovers an empty file after a power loss."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            flush(file)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror or error}); free space or check the rights of "
                        f"{path.parent}") from error  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_json(path: Path, data: object) -> None:
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


class TensorFileWriter:
    """A safetensors file written piece by piece, for tensors that together exceed the memory.

    The header (names, dtypes, shapes) is known beforehand; `write` fills a part of one tensor. 16-bit tensors come
    before 8-bit ones so that every tensor starts at a multiple of its item size and can be mapped.
    Format: https://github.com/huggingface/safetensors, 8 bytes of header length, JSON, then the data without holes.
    """

    def __init__(self, file: IO[bytes], shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> None:  # fmt: skip
        self.file = file
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self.spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in sorted(
            shapes.items(), key=lambda item: -ITEM_BYTES[SAFETENSORS_DTYPES[item[1][0]]]
        ):
            code = SAFETENSORS_DTYPES[dtype]
            start, end = end, end + math.prod(shape) * ITEM_BYTES[code]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
            self.spans[name] = (start, end)
        text = json.dumps(header).encode("utf-8")
        text += b" " * (-(len(text) + 8) % 64)
        self.data_start = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(self.data_start + end)

    def write(self, name: str, first_item: int, values: Tensor) -> None:
        """Place `values` at item `first_item` of the flattened tensor `name`."""
        start, end = self.spans[name]
        at = start + first_item * values.element_size()
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert at + data.nbytes <= end
        self.file.seek(self.data_start + at)
        self.file.write(data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order, without a copy where it is contiguous on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def hash_file(path: Path) -> str:
    """sha256 of a file's content, remembered beside it by size and time of change (17 GB take some ten seconds)."""
    stat = path.stat()
    stamp = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memo = path.with_name(path.name + ".sha256.json")
    if memo.is_file():
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        if all(known.get(key) == value for key, value in stamp.items()):
            return str(known["sha256"])
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if os.access(path.parent, os.W_OK):
        write_json(memo, {**stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def fingerprint(parts: object) -> str:
    """sha256 of anything that JSON can hold, keys sorted."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def require_space(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Refuse before anything is written. `folder` need not exist yet."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise UserError(f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                        f"{remedy}")  # fmt: skip


class FolderLock:
    """One process at a time in a folder. The lock is the operating system's: a killed process leaves none behind."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = open(self.path, "a+b")  # noqa: SIM115  (held open for as long as the lock)
        try:
            self._lock()
        except OSError as error:
            self.file.close()
            raise UserError(f"{folder}: another run is using this folder; wait for it, or choose another RUN_TAG"
                            ) from error  # fmt: skip

    def _lock(self) -> None:
        if os.name == "nt":
            import msvcrt

            self.file.seek(0)
            msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        self.file.close()  # closing the file gives the lock back on every system
