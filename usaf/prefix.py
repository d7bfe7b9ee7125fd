"""The frozen prefix: layers below `TRAIN_FROM` never change, so every sequence passes them once.

The activations that enter the first trainable layer ("boundary states") are kept on disk, with a fingerprint of all that
determines them. They are computed layer-major: a frozen layer runs over many chunks of sequences before the next one
starts, so its weights come from the disk once, and on a GPU cross the bus once, for all of them.

Bits: a chunk always holds the same sequences, because the bits of a matrix product depend on its number of rows; and
the states are rounded to the cache's type whether they come from the cache or not. So cached and uncached runs agree.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from usaf.data import Rows
from usaf.errors import UserError
from usaf.files import fingerprint, flush, flush_folder, tensor_bytes, write_json
from usaf.model import SparseModel

STRETCH_BYTES = 512 << 20
"""Activations held at once while a stretch of chunks goes through the frozen layers one layer at a time."""

SPARE_DISK = 0.05
"""Share of the free disk that a cache leaves alone."""

CACHE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Progress = Callable[[int], None]
"""Called with the number of tokens that have just passed one layer."""


class BoundaryStates:
    """The boundary states of one set of sequences, computed by chunk, cached on disk where `folder` is given.

    Args:
        chunks: row numbers, each row in one chunk; this composition is fixed for the run.
        start: the first trainable layer; the states are what enters it.
        dtype: what the states are rounded to.
        identity: what, beside the sequences, determines the states (the model's fingerprint, versions, threads).
        folder: where to cache; None computes every chunk when it is needed.
        cached_rows: at most so many rows are cached (FROZEN_CACHE_N; 0 = all).
    """

    def __init__(
        self, model: SparseModel, rows: Rows, chunks: list[list[int]], start: int, dtype: torch.dtype,
        identity: dict[str, object], folder: Path | None, cached_rows: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.chunks, self.start, self.dtype = model, rows, chunks, start, dtype
        self.chunk_of = {row: c for c, chunk in enumerate(chunks) for row in chunk}
        self.recent: OrderedDict[int, dict[int, Tensor]] = OrderedDict()  # uncached chunks, the last two
        self.cache: _CacheFile | None = None
        self.tokens_computed = 0  # tokens that passed the whole prefix in this process
        if folder is not None and start > 0:
            limit = self._cacheable(cached_rows)
            about = {**identity, "start": start, "dtype": str(dtype), "rows": rows.fingerprint(), "chunks": chunks}
            self.cache = _CacheFile(folder, fingerprint(about), rows, chunks[:limit], dtype)

    def _cacheable(self, cached_rows: int) -> int:
        """How many chunks, from the first, are cached."""
        if not cached_rows:
            return len(self.chunks)
        count = 0
        for i, chunk in enumerate(self.chunks):
            count += len(chunk)
            if count >= cached_rows:
                return i + 1
        return len(self.chunks)

    def pending_tokens(self) -> int:
        """Layer-tokens that `fill` has yet to compute."""
        if self.cache is None:
            return 0
        return self.start * sum(self.rows.length(r) for c in self.cache.missing() for r in self.chunks[c])

    def fill(self, progress: Progress) -> list[str]:
        """Compute what the cache lacks, a stretch of chunks at a time. Returns notes for the user."""
        if self.cache is None:
            return []
        missing = self.cache.missing()
        notes = []
        while missing:
            stretch, missing = self._stretch(missing)
            states = self._compute(stretch, progress)
            try:
                self.cache.write({c: states[c] for c in stretch})
            except _DiskFull as full:
                notes.append(f"{self.cache.path}: the disk is full after {full.cached} of {len(self.chunks)} chunks; the "
                             "others are computed when they are needed")  # fmt: skip
                break
        return notes

    def _stretch(self, chunks: list[int]) -> tuple[list[int], list[int]]:
        width = self.model.config.get_text_config().hidden_size * 4
        total = 0
        for i, c in enumerate(chunks):
            total += len(self.chunks[c]) * max(self.rows.length(r) for r in self.chunks[c]) * width
            if total > STRETCH_BYTES and i > 0:
                return chunks[:i], chunks[i:]
        return chunks, []

    @torch.no_grad()
    def _compute(self, chunks: Sequence[int], progress: Progress | None = None) -> dict[int, dict[int, Tensor]]:
        """chunk -> row -> [length, ...], rounded, on the host; layer-major over the given chunks."""
        batches = {c: self.rows.batch(self.chunks[c]) for c in chunks}
        states: dict[int, Tensor] = {}
        for layer in range(self.start):
            with self.model.placed(layer):
                for c, batch in batches.items():
                    hidden = states[c].to(self.model.backend.device) if layer else None
                    states[c] = self.model.run_layers(batch, layer, layer + 1, hidden).cpu()
                    if progress is not None:
                        progress(sum(batch.lengths))
        self.tokens_computed += sum(sum(b.lengths) for b in batches.values())
        return {c: self._rounded(c, states[c], batches[c].lengths) for c in chunks}

    def _rounded(self, chunk: int, hidden: Tensor, lengths: list[int]) -> dict[int, Tensor]:
        rounded = hidden.to(self.dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(f"CACHE_DTYPE={str(self.dtype)[6:]}: activations that enter layer {self.start} are not finite in "
                            "it; set CACHE_DTYPE=bf16 or fp32")  # fmt: skip
        return {
            row: rounded[i, :length] for i, (row, length) in enumerate(zip(self.chunks[chunk], lengths, strict=True))
        }

    def _row(self, row: int) -> Tensor:
        chunk = self.chunk_of[row]
        if self.cache is not None and self.cache.has(chunk):
            return self.cache.read(row)
        if chunk not in self.recent:
            self.recent[chunk] = self._compute([chunk])[chunk]
            while len(self.recent) > 2:
                self.recent.popitem(last=False)
        return self.recent[chunk][row]

    def hidden(self, rows: Sequence[int]) -> Tensor | None:
        """What enters the first trainable layer for these rows, in the compute type: [B, S, ...] padded with zeros.

        None where the first trainable layer is the first of all: its input is the embeddings.
        """
        if self.start == 0:
            return None
        states = [self._row(row) for row in rows]
        longest = max(len(s) for s in states)
        hidden = torch.zeros(len(rows), longest, *states[0].shape[1:], dtype=self.model.backend.compute_dtype)
        for i, state in enumerate(states):
            hidden[i, : len(state)] = state
        return hidden.to(self.model.backend.device)


class _DiskFull(Exception):
    def __init__(self, cached: int) -> None:
        self.cached = cached


class _CacheFile:
    """`<folder>/<fingerprint>/states.bin`, rows at places known from their lengths, and the list of finished chunks.

    A chunk is listed only after its states are on the disk, so a killed process leaves no chunk half-written and listed.
    Plain reads and writes, no mapping: a mapped file could not be deleted on Windows.
    """

    def __init__(self, folder: Path, key: str, rows: Rows, chunks: list[list[int]], dtype: torch.dtype) -> None:
        self.folder = folder / key[:32]
        self.path = self.folder / "states.bin"
        self.rows, self.chunks, self.dtype = rows, chunks, dtype
        self.token_shape: tuple[int, ...] | None = None
        self.starts: dict[int, int] = {}
        at = 0
        for chunk in chunks:
            for row in chunk:
                self.starts[row] = at
                at += rows.length(row)
        self.tokens = at
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: set[int] = set()
        listing = self.folder / "done.txt"
        shape = self.folder / "shape.txt"
        if listing.is_file() and shape.is_file() and self.path.is_file():
            self.token_shape = tuple(int(n) for n in shape.read_text(encoding="utf-8").split())
            lines = listing.read_text(encoding="utf-8").split("\n")[:-1]  # a torn last line has no newline
            self.done = {int(line) for line in lines if line.isdigit() and int(line) < len(chunks)}
        elif not (self.folder / "about.json").is_file():
            write_json(self.folder / "about.json", {"fingerprint": key, "dtype": str(dtype), "rows": len(self.starts)})

    def has(self, chunk: int) -> bool:
        return chunk in self.done

    def missing(self) -> list[int]:
        return [c for c in range(len(self.chunks)) if c not in self.done]

    def _token_bytes(self) -> int:
        assert self.token_shape is not None
        return torch.Size(self.token_shape).numel() * self.dtype.itemsize

    def write(self, states: dict[int, dict[int, Tensor]]) -> None:
        """Place the rows of whole chunks; raises _DiskFull before the disk is."""
        if self.token_shape is None:
            some = next(iter(next(iter(states.values())).values()))
            self.token_shape = tuple(some.shape[1:])
            (self.folder / "shape.txt").write_text(" ".join(map(str, self.token_shape)), encoding="utf-8")
        needed = sum(len(s) for rows in states.values() for s in rows.values()) * self._token_bytes()
        if needed > shutil.disk_usage(self.folder).free * (1 - SPARE_DISK):
            raise _DiskFull(len(self.done))
        with open(self.path, "r+b" if self.path.is_file() else "w+b") as file:
            for rows in states.values():
                for row, state in rows.items():
                    file.seek(self.starts[row] * self._token_bytes())
                    file.write(tensor_bytes(state))
            flush(file)
        with open(self.folder / "done.txt", "a", encoding="utf-8", newline="\n") as listing:
            listing.write("".join(f"{c}\n" for c in states))
            flush(listing)
        flush_folder(self.folder)
        self.done |= set(states)

    def read(self, row: int) -> Tensor:
        assert self.token_shape is not None
        count = self.rows.length(row) * self._token_bytes()
        buffer = bytearray(count)
        with open(self.path, "rb") as file:
            file.seek(self.starts[row] * self._token_bytes())
            got = file.readinto(buffer)
        if got != count:
            raise UserError(
                f"{self.path}: is shorter than it should be; delete the folder {self.folder}, and it is made anew"
            )
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.rows.length(row), *self.token_shape)


def chunked(n_rows: int, chunk_rows: int) -> list[list[int]]:
    """Consecutive rows in chunks, for sets that are read in order (evaluation)."""
    return [list(range(i, min(i + chunk_rows, n_rows))) for i in range(0, n_rows, chunk_rows)]


def cache_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    """CACHE_DTYPE as a type; `auto` is the checkpoint's own 16-bit type (bf16 for an fp32 checkpoint: no overflow)."""
    if name != "auto":
        return CACHE_DTYPES[name]
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def forget(folder: Path) -> None:
    """Delete caches. They can always be made anew."""
    if folder.is_dir() and os.access(folder, os.W_OK):
        shutil.rmtree(folder)
