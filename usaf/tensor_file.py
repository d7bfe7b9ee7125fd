"""safetensors files larger than the memory: read a tensor, or a part of one, at a time; written piece by piece.

The library maps a file, and every page that was touched counts as the process's memory until the mapping goes; a 60 GB
checkpoint would pass through it whole. Here each read opens the file, takes the bytes it wants and closes it again: the
memory is that of the tensor, and no handle keeps a file from being replaced on Windows. Bytes are also readable as they
are, in types that torch does not have, which is how an export copies what it does not change. What is used again and
again (the 4-bit experts) is mapped for reading only.

Format: https://github.com/huggingface/safetensors, 8 bytes of header length (little endian), JSON, the data without
holes.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from usaf.errors import RunError, UserError, one_line

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, from its header. code: the format's name of its type; start, end: its bytes in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class TensorFile:
    """A safetensors file by its header: `entries` by name, `metadata`. No handle of it stays open.

    Raises:
        UserError: it is missing, cannot be read, or is not a whole safetensors file.
    """

    def __init__(self, path: Path, remedy: str = "download it again") -> None:
        self.path, self.remedy = path, remedy
        self._mapped: mmap.mmap | None = None
        try:
            with safe_open(path, "np"):  # for torch the library maps it writable: refused where it exceeds the memory
                pass  # the header is checked, and that the data are all there
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
        except FileNotFoundError:
            raise UserError(f"{path}: this file of the checkpoint is missing; {remedy}") from None
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}); {remedy}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); check its rights") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        first = 8 + length
        self.entries = {
            name: TensorEntry(e["dtype"], tuple(e["shape"]), *(first + at for at in e["data_offsets"]))
            for name, e in header.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a type that torch does not have."""
        code = self.entries[name].code
        if code not in TORCH_DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {code}, which cannot be read; use a checkpoint in "
                            f"{', '.join(list(TORCH_DTYPES)[:4])}")  # fmt: skip
        return TORCH_DTYPES[code]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        entry = self.entries[name]
        return self._read(entry.start, entry.shape, self.dtype(name))

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """[end - first, ...]: entries [first, end) of the first dimension; nothing else of it is read."""
        entry = self.entries[name]
        assert 0 <= first <= end <= entry.shape[0]
        row_bytes = entry.nbytes // entry.shape[0]
        return self._read(entry.start + first * row_bytes, (end - first, *entry.shape[1:]), self.dtype(name))

    def map(self, name: str) -> Tensor:
        """The whole tensor as a view of the mapped file, not to be written to: its pages are the system's cache. The
        mapping lasts as long as any such tensor; a writable one would be counted as memory of the process."""
        entry = self.entries[name]
        if self._mapped is None:
            with open(self.path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=self.dtype(name))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._mapped, dtype=self.dtype(name), count=count, offset=entry.start)
        return flat.reshape(entry.shape)

    def read_bytes(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """uint8, [..., bytes of a row]: entries [first, end) of the first dimension as they are in the file. For types
        of 8 bits at most (two of 4 bits make a byte), and for words that are read byte by byte."""
        entry = self.entries[name]
        end = entry.shape[0] if end is None else end
        assert 0 <= first <= end <= entry.shape[0]
        assert entry.shape[-1] * item_bits(entry.code) % 8 == 0
        shape = (*entry.shape[:-1], entry.shape[-1] * item_bits(entry.code) // 8)
        row_bytes = entry.nbytes // entry.shape[0]
        shape = (end - first, *shape[1:]) if len(shape) > 1 else (row_bytes * (end - first),)
        return self._read(entry.start + first * row_bytes, shape, torch.uint8)

    def _read(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        try:
            self._fill(memoryview(buffer.numpy()), start)  # type: ignore[arg-type]
        except OSError as error:
            raise RunError(f"{self.path}: could not be read ({error.strerror or error}); check the disk or the "
                           "network, and try again") from error  # fmt: skip
        return buffer.view(dtype).reshape(shape)

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while done < len(view):
                count = file.readinto(view[done:])  # a read takes 2 GB at most on Linux
                if not count:
                    raise UserError(f"{self.path}: was cut short while it was in use; {self.remedy}")
                done += count

    def raw(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as they are in the file, a piece at a time."""
        entry = self.entries[name]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                piece = file.read(min(left, COPY_BYTES))
                if not piece:
                    raise UserError(f"{self.path}: was cut short while it was in use; {self.remedy}")
                left -= len(piece)
                yield piece


class Shards:
    """The tensors of several files of one folder, by name. Headers are read when first asked for, and once."""

    def __init__(self, folder: Path, where: Mapping[str, str]) -> None:
        self.folder, self.where = folder, where
        self._files: dict[str, TensorFile] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def keys(self) -> Iterable[str]:
        return self.where.keys()

    def path(self, key: str) -> Path:
        return self.folder / self.where[key]

    def file(self, shard: str) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(self.folder / shard)
        return self._files[shard]

    def of(self, key: str) -> TensorFile:
        """The file that holds a tensor."""
        return self.file(self.where[key])

    def entry(self, key: str) -> TensorEntry:
        return self.of(key).entries[key]


class TensorFileWriter:
    """A safetensors file written piece by piece, for tensors that together exceed the memory.

    The header (names, types, shapes) is known beforehand; `write` fills a part of one tensor. Wider types come before
    narrower ones so that every tensor starts at a multiple of its item size and can be mapped. Types are torch's, or
    the format's own names of those that torch does not have.
    """

    def __init__(self, file: IO[bytes], shapes: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> None:  # fmt: skip
        self.file = file
        head, self.spans, size = layout(shapes, metadata)
        self.data_start = len(head)
        file.seek(0)
        file.write(head)
        file.truncate(size)

    def write(self, name: str, first_item: int, values: Tensor) -> None:
        """Place `values` at item `first_item` of the flattened tensor `name`."""
        self._put(name, first_item * values.element_size(), tensor_bytes(values))

    def copy(self, name: str, source: TensorFile, source_name: str) -> None:
        """The whole tensor `name` from another file, byte for byte."""
        at = 0
        for piece in source.raw(source_name):
            self._put(name, at, memoryview(piece))
            at += len(piece)

    def _put(self, name: str, at: int, data: memoryview) -> None:
        start, end = self.spans[name]
        assert start + at + data.nbytes <= end
        self.file.seek(self.data_start + start + at)
        self.file.write(data)


def layout(
    shapes: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """(the header's bytes, where each tensor lies in the data that follow, the size of the whole file)"""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item_bits(item[1][0])):
        start, end = end, end + tensor_bytes_count(dtype, shape)
        header[name] = {"dtype": code_of(dtype), "shape": list(shape), "data_offsets": [start, end]}
        spans[name] = (start, end)
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-(len(text) + 8) % 64)
    head = len(text).to_bytes(8, "little") + text
    return head, spans, len(head) + end


def code_of(dtype: torch.dtype | str) -> str:
    return dtype if isinstance(dtype, str) else CODES[dtype]


def item_bits(dtype: torch.dtype | str) -> int:
    """Bits of one item; the format's sub-byte types are named F4, F6_E2M3, ..."""
    code = code_of(dtype)
    if code in TORCH_DTYPES:
        return 8 * TORCH_DTYPES[code].itemsize
    digits = code.lstrip("BFIUC").partition("_")[0]
    assert digits.isdigit(), code
    return int(digits)


def tensor_bytes_count(dtype: torch.dtype | str, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * item_bits(dtype) // 8)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order, without a copy where it is contiguous on the host."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
