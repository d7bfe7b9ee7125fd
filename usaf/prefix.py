"""The frozen prefix: layers below `TRAIN_FROM` never change, so every sequence passes them once.

The activations that enter the first trainable layer ("boundary states") are kept on disk, with a fingerprint of all
that determines them. They are computed layer-major: a frozen layer runs over many chunks of sequences before the next
one starts, so its weights come from the disk once, and on a GPU cross the bus once, for all of them.

Bits: a chunk always holds the same sequences, because the bits of a matrix product depend on its number of rows; and
the states are rounded to the cache's type whether they come from the cache or not. So cached and uncached runs agree.

The cache only saves time. Whatever it lacks, cannot be written or comes back changed is computed again when needed, and
it may be deleted at any moment. Left out: removing caches of earlier runs, which is for the user to decide.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from usaf.console import say
from usaf.data import Rows
from usaf.errors import UserError
from usaf.files import existing_parent, fingerprint, flush, flush_folder
from usaf.model import SparseModel
from usaf.tensor_file import tensor_bytes
from usaf.workspace import PRIVATE, Memory

STRETCH_BYTES = 512 << 20
"""Activations held at once while a stretch of chunks goes through the frozen layers one layer at a time, unless less
is asked for. It decides no bit."""

SPARE_DISK, SPARE_DISK_BYTES = 0.05, 8 << 30
"""Share of the disk that a cache leaves free, but no more than so many bytes: checkpoints are to fit beside it."""

LAYOUT = 2
"""Version of the cache's files: another one is another cache."""

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
        cached_rows: at most so many rows are cached, rounded up to whole chunks (FROZEN_CACHE_N; 0 = all).
        stretch_bytes: activations of a stretch of chunks that are held at once; memory: where they lie.
    """

    def __init__(
        self, model: SparseModel, rows: Rows, chunks: list[list[int]], start: int, dtype: torch.dtype,
        identity: dict[str, object], folder: Path | None, cached_rows: int = 0, stretch_bytes: int | None = None,
        memory: Memory = PRIVATE,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.chunks, self.start, self.dtype = model, rows, chunks, start, dtype
        self.stretch_bytes, self.memory = stretch_bytes or STRETCH_BYTES, memory
        self.chunk_of = {row: c for c, chunk in enumerate(chunks) for row in chunk}
        self.recent: OrderedDict[int, dict[int, Tensor]] = OrderedDict()  # uncached chunks, the last two
        self.cache: _CacheFile | None = None
        self.tokens_computed = 0  # tokens that passed the whole prefix in this process
        if folder is not None and start > 0:
            limit = self._cacheable(cached_rows)
            about = {**identity, "start": start, "dtype": str(dtype), "layout": LAYOUT, "rows": rows.fingerprint()}
            self.cache = _CacheFile(folder, about, rows, chunks, limit, dtype, model.handover.token_shape(start))

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
        try:
            while missing:
                stretch, missing = self._stretch(missing)
                self.cache.require_room(stretch)  # before the work: a full disk shall not cost a stretch at every start
                self.cache.write(self._compute(stretch, progress))
        except _NotWritten as fault:
            cached = f"{len(self.cache.done)} of {len(self.chunks)} chunks are cached"
            remedy = "the others are computed when they are needed; PREFIX_CACHE_DIR can name a folder elsewhere"
            return [f"{self.cache.folder}: {fault}; {cached}, {remedy}"]
        return []

    def _stretch(self, chunks: list[int]) -> tuple[list[int], list[int]]:
        handover = self.model.handover
        width = 4 * max(handover.width(cut) for cut in handover.splits if cut <= self.start)
        total = 0
        for i, c in enumerate(chunks):
            total += len(self.chunks[c]) * max(self.rows.length(r) for r in self.chunks[c]) * width
            if total > self.stretch_bytes and i > 0:
                return chunks[:i], chunks[i:]
        return chunks, []

    @torch.no_grad()
    def _compute(self, chunks: Sequence[int], progress: Progress | None = None) -> dict[int, dict[int, Tensor]]:
        """chunk -> row -> [length, ...], rounded, on the host; layer-major over the given chunks."""
        batches = {c: self.rows.batch(self.chunks[c]) for c in chunks}
        states: dict[int, Tensor] = {}
        segments = self.model.handover.segments(0, self.start)
        for (first, end), following in zip(segments, [*segments[1:], None], strict=True):
            if following is not None:
                self.model.read_ahead(*following)
            with self.model.placed(first, end):
                for c, batch in batches.items():
                    hidden = states[c].to(self.model.backend.device) if first else None
                    states[c] = self.memory.keep(self.model.run_layers(batch, first, end, hidden), states.get(c))
                    if progress is not None:
                        progress((end - first) * sum(batch.lengths))
        self.tokens_computed += sum(sum(b.lengths) for b in batches.values())
        return {c: self._rounded(c, states.pop(c), batches[c].lengths) for c in chunks}

    def _rounded(self, chunk: int, hidden: Tensor, lengths: list[int]) -> dict[int, Tensor]:
        """row -> its states in the cache's type, without the padding."""
        rows = {}
        for row, states, length in zip(self.chunks[chunk], hidden, lengths, strict=True):
            rows[row] = states[:length].to(self.dtype)
            if not torch.isfinite(rows[row]).all():
                raise UserError(self._not_finite(states[:length]))
        return rows

    def _not_finite(self, states: Tensor) -> str:
        where = f"activations that enter layer {self.start} are not finite"
        if torch.isfinite(states).all():
            name = next(name for name, dtype in CACHE_DTYPES.items() if dtype == self.dtype)
            return f"CACHE_DTYPE={name}: {where} in this type; set CACHE_DTYPE=bf16 or fp32"
        computed_in = str(states.dtype).removeprefix("torch.")
        return (
            f"MODEL: {where} as computed ({computed_in}); the checkpoint or its 4-bit file is damaged, or the type is "
            "too narrow for this model: set USE_AMP=0"
        )

    def _row(self, row: int) -> Tensor:
        chunk = self.chunk_of[row]
        if self.cache is not None and self.cache.has(chunk):
            state = self.cache.read(chunk, row)
            if state is not None:
                return state
            say(f"{self.cache.path}: cached activations are gone or damaged; they are computed again")
            self._remember(chunk)
            self._repair(chunk)
        elif chunk not in self.recent:
            self._remember(chunk)
        return self.recent[chunk][row]

    def _remember(self, chunk: int) -> None:
        self.recent[chunk] = self._compute([chunk])[chunk]
        self._keep_the_last_two()

    def _keep_the_last_two(self) -> None:
        while len(self.recent) > 2:
            self.recent.popitem(last=False)

    def _repair(self, chunk: int) -> None:
        assert self.cache is not None
        try:
            self.cache.write({chunk: self.recent[chunk]})
        except _NotWritten as fault:
            say(f"{self.cache.folder}: {fault}")

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

    def kept(self, rows: Sequence[int], memory: Memory) -> Tensor | None:
        """`hidden`, on the host in `memory`: for what needs it more than once, since it may have to be computed."""
        hidden = self.hidden(rows)
        return None if hidden is None else memory.keep(hidden)

    def all_kept(self, parts: Sequence[Sequence[int]], memory: Memory) -> list[Tensor | None]:
        """`kept` of each part. Chunks that are not cached pass the frozen layers a stretch at a time, as in `fill`:
        one by one, each would have all their weights read again."""
        needed = [{self.chunk_of[row] for row in rows} for rows in parts]
        ahead = list(dict.fromkeys(c for chunks in needed for c in sorted(chunks) if not self._at_hand(c)))
        found = []
        for rows, chunks in zip(parts, needed, strict=True):
            while self.start > 0 and chunks & set(ahead):
                stretch, ahead = self._stretch(ahead)
                for chunk in self.recent.keys() - chunks:
                    del self.recent[chunk]
                self.recent.update(self._compute(stretch))
            found.append(self.kept(rows, memory))
        self._keep_the_last_two()
        return found

    def _at_hand(self, chunk: int) -> bool:
        return chunk in self.recent or (self.cache is not None and self.cache.has(chunk))


class _NotWritten(Exception):
    """Why the cache cannot take more, in words."""


def could_not_be_written(error: OSError) -> str:
    return f"could not be written ({error.strerror or error})"


class _CacheFile:
    """The folder `<fingerprint>` of one cache. It is made by the first write.

        states.bin   the rows' states, each at a place that follows from the rows' lengths
        done.jsonl   a line for each finished chunk: its number, the shape of a token's state, a CRC-32 for each row
        about.json   what the fingerprint is made of, for people

    A chunk is listed only after its states are on the disk, and a row is believed only if its CRC-32 agrees. So a
    killed process, a power loss or a truncated file costs a chunk that is computed again, never a wrong bit. Two runs
    that fill one cache write the same bytes to the same places; each appends whole lines, and a torn line is no JSON.

    Plain reads and writes, no mapping: a mapped file could not be deleted on Windows.
    """

    def __init__(
        self, folder: Path, about: dict[str, object], rows: Rows, chunks: list[list[int]], limit: int,
        dtype: torch.dtype, token_shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        key = fingerprint({**about, "chunks": chunks})
        self.folder = folder / key[:32]
        self.path, self.listing = self.folder / "states.bin", self.folder / "done.jsonl"
        self.about = {"fingerprint": key, **about}
        self.rows, self.chunks, self.dtype = rows, chunks[:limit], dtype
        self.token_shape, self.token_bytes = token_shape, math.prod(token_shape) * dtype.itemsize
        self.starts: dict[int, int] = {}  # row -> tokens before it in states.bin
        at = 0
        for chunk in self.chunks:
            for row in chunk:
                self.starts[row] = at
                at += rows.length(row)
        self.done: dict[int, list[int]] = {}  # chunk -> CRC-32 of its rows
        if self.listing.is_file() and self.path.is_file():
            self._read_listing(self.path.stat().st_size)

    def _read_listing(self, size_bytes: int) -> None:
        """Believe the lines that are whole and whose chunks lie within the file."""
        for line in self.listing.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                c, shape, sums = entry["chunk"], tuple(entry["shape"]), entry["crc32"]
            except (ValueError, TypeError, KeyError):
                continue  # torn by a killed process, or by two that wrote at once
            if c >= len(self.chunks) or len(sums) != len(self.chunks[c]) or shape != self.token_shape:
                continue
            if self._place(self.chunks[c][-1])[1] <= size_bytes:
                self.done[c] = sums

    def has(self, chunk: int) -> bool:
        return chunk in self.done

    def missing(self) -> list[int]:
        return [c for c in range(len(self.chunks)) if c not in self.done]

    def _place(self, row: int) -> tuple[int, int]:
        """Where a row begins and ends in states.bin, in bytes."""
        begin = self.starts[row] * self.token_bytes
        return begin, begin + self.rows.length(row) * self.token_bytes

    def require_room(self, chunks: Sequence[int]) -> None:
        """Raises _NotWritten where the disk has no room for these chunks, or cannot be asked. Nothing is written, and
        the folder need not exist yet."""
        needed = sum(end - begin for c in chunks for begin, end in map(self._place, self.chunks[c]))
        try:
            total, _, free = shutil.disk_usage(existing_parent(self.folder))
        except OSError as error:
            raise _NotWritten(could_not_be_written(error)) from None
        except UserError as error:  # no such drive
            raise _NotWritten(str(error)) from None
        if needed > free - min(SPARE_DISK * total, SPARE_DISK_BYTES):
            raise _NotWritten(f"the disk is full ({free / 1e9:.2f} GB free)")

    def write(self, states: dict[int, dict[int, Tensor]]) -> None:
        """Place the rows of whole chunks, then list them. Raises _NotWritten; chunks listed before stay good."""
        assert all(state.shape[1:] == self.token_shape for rows in states.values() for state in rows.values())
        try:
            self._prepare_folder()
            self.require_room(list(states))
            with open(self.path, "r+b") as file:
                sums = {c: [self._write_row(file, row, state) for row, state in rows.items()]
                        for c, rows in states.items()}  # fmt: skip
                flush(file)
            self._list(sums)
            flush_folder(self.folder)
        except OSError as error:
            raise _NotWritten(could_not_be_written(error)) from None
        self.done.update(sums)

    def _prepare_folder(self) -> None:
        if self.path.is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "about.json").write_text(json.dumps(self.about, indent=2, default=str) + "\n", encoding="utf-8")
        open(self.path, "ab").close()  # never "wb": another run may have begun to fill it

    def _write_row(self, file: IO[bytes], row: int, state: Tensor) -> int:
        data = tensor_bytes(state)
        file.seek(self._place(row)[0])
        file.write(data)
        return zlib.crc32(data)

    def _list(self, sums: dict[int, list[int]]) -> None:
        lines = [json.dumps({"chunk": c, "shape": self.token_shape, "crc32": s}) for c, s in sums.items()]
        with open(self.listing, "ab") as file:
            file.write("\n".join(["", *lines, ""]).encode("ascii"))  # a torn line before never joins the first of these
            flush(file)

    def read(self, chunk: int, row: int) -> Tensor | None:
        """[length, ...], or None where the file no longer holds what was written; the chunk is then missing."""
        begin, end = self._place(row)
        buffer = bytearray(end - begin)
        try:
            with open(self.path, "rb") as file:
                file.seek(begin)
                got = file.readinto(buffer)
        except OSError:
            got = 0
        if got != len(buffer) or zlib.crc32(buffer) != self.done[chunk][self.chunks[chunk].index(row)]:
            del self.done[chunk]
            return None
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.rows.length(row), *self.token_shape)


def chunked(n_rows: int, chunk_rows: int) -> list[list[int]]:
    """Consecutive rows in chunks, for sets that are read in order (evaluation)."""
    return [list(range(i, min(i + chunk_rows, n_rows))) for i in range(0, n_rows, chunk_rows)]


def cache_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    """CACHE_DTYPE as a type; `auto` is the checkpoint's own 16-bit type (bf16 for an fp32 checkpoint: no overflow)."""
    if name != "auto":
        return CACHE_DTYPES[name]
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
