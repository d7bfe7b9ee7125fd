"""The trained result in the checkpoint's own tensors: what each of them holds after the merge.

    onto the original base      the stored tensor + delta           what other programs expect of a fine-tune
    onto the dequantised base   dequantise(4-bit) + delta           exactly what the run ended with, for every expert

summed in fp32 and rounded once to the type of the output; nothing is ever quantised again, since deltas are smaller
than half a step of a 4-bit weight. Routers and norms are whole in the delta and replace the stored ones. The head is
not in 4 bits, so it has one base; where it shares the embeddings' tensor it becomes one of its own.

Writing back needs no inverse of transformers' converters. They only move values (stack, concatenate, transpose,
interleave), so sending the *addresses* 0, 1, 2, ... of the stored values through the forward converter says for each
weight of a fused expert where it lies in the checkpoint. One expert is in memory at a time.

Shape legend: E experts; a fused parameter is [E, a, b] in the model and [E, out, in] in the 4-bit file and the delta
(a, b are out, in, or in, out where the family is transposed).

Left out: writing files and configuration (`merged_folder`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from usaf.checkpoint import Checkpoint
from usaf.delta import Delta
from usaf.errors import UserError
from usaf.expert_store import ExpertStore
from usaf.quantization import dequantize
from usaf.weight_plan import Piece

BaseName = Literal["original", "dequantized"]


class MergedPiece(NamedTuple):
    """What one of the checkpoint's tensors, or a span of one, holds of an expert after the merge."""

    piece: Piece
    values: Tensor  # in the output's type
    active: int  # non-zero deltas in it
    changed: int  # of these, values that differ from the base's, rounded alike


@dataclass
class Counts:
    """What an export changed. Elements of trained experts and of the head, counted as they are written."""

    active: int = 0
    changed: int = 0
    experts_changed: set[tuple[str, int]] = field(default_factory=set)  # (experts module, expert)

    def add(self, target: str, e: int, merged: MergedPiece) -> None:
        self.active += merged.active
        self.changed += merged.changed
        if merged.changed:
            self.experts_changed.add((target.rpartition(".")[0], e))

    @property
    def share_lost(self) -> float:
        """Non-zero deltas that rounding to the output's type erased."""
        return 1 - self.changed / self.active if self.active else 0.0


class Merge:
    """One delta onto one base of one checkpoint.

    Args:
        dtype: of what is written anew in the output; None keeps what the checkpoint has.

    Raises:
        UserError: the checkpoint lacks expert tensors, or keeps them in a form that cannot be written back.
    """

    def __init__(
        self, checkpoint: Checkpoint, store: ExpertStore, delta: Delta, base: BaseName, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.store, self.delta, self.base, self.dtype = checkpoint, store, delta, base, dtype
        self.plan = checkpoint.plan
        self.transposed = {
            target: bool(checkpoint.model.get_submodule(name).is_transposed)
            for name, pair in checkpoint.expert_parameters().items()
            for target in pair
        }
        self.head = next((name for name in delta.sparse if name not in self.transposed), None)
        lacking = checkpoint.missing([*self.transposed, *delta.whole, *([self.head] if self.head else [])])
        if lacking:
            raise UserError(f"{checkpoint.folder}: has no tensor for {lacking[0]}, so it cannot be written back; "
                            "give the complete checkpoint with --model")  # fmt: skip
        self._addresses: dict[str, Tensor | None] = {}
        self._asking = Lock()  # evaluation merges experts side by side

    @property
    def trained_whole(self) -> set[str]:
        return set(self.delta.whole)

    @cached_property
    def targets(self) -> list[str]:
        """The fused parameters that the merge writes anew, in 16 bits or more.

        Experts that the checkpoint has in four bits are their own dequantised base: without a delta they stay as they
        are, but in the format of compressed-tensors, which transformers loads in all layers or in none.
        """
        quantization = self.checkpoint.quantization
        four_bit = {target for target in self.transposed if self.checkpoint.four_bit(target) is not None}
        written = {target for target in self.transposed if len(self.delta.sparse.get(target, ((), ()))[0])}
        if self.base == "dequantized":
            written |= self.transposed.keys() - four_bit
        if quantization is not None and quantization.method == "compressed-tensors" and written & four_bit:
            written |= four_bit
        return [target for target in self.transposed if target in written]

    @cached_property
    def expert_keys(self) -> dict[str, list[tuple[str, int]]]:
        """The checkpoint's (logical) tensors that hold experts which are written anew -> these, (target, expert)."""
        found: dict[str, list[tuple[str, int]]] = {}
        for target in self.targets:
            for e in range(self.num_experts(target)):
                for piece in self.pieces(target, e):
                    found.setdefault(piece.key, []).append((target, e))
        return found

    @cached_property
    def head_source(self) -> str | None:
        """The checkpoint's tensor that the head's base is; None where no head was trained."""
        if self.head is None:
            return None
        tied: dict[str, str] = dict(self.checkpoint.model.all_tied_weights_keys)
        source = self.plan.sources[self.head if self.head in self.plan.sources else tied[self.head]]
        if source.converter is not None or len(source.keys) != 1:
            raise UserError(f"{self.checkpoint.folder}: {self.head} is not stored as one tensor; this family cannot be "
                            "exported yet with a trained head (TRAIN_HEAD=0 leaves it alone)")  # fmt: skip
        return source.keys[0][0]

    @property
    def unties_head(self) -> bool:
        """Whether the head was the embeddings' tensor, by the model's class: loaders would use that."""
        return self.head is not None and self.head in self.checkpoint.model.all_tied_weights_keys

    @property
    def adds_head(self) -> bool:
        """Whether the head becomes a tensor of its own."""
        return self.head is not None and self.head not in self.plan.sources

    @property
    def head_key(self) -> str | None:
        """The tensor that the head is written to."""
        return self.head if self.adds_head else self.head_source

    @cached_property
    def whole_keys(self) -> dict[str, str]:
        """Checkpoint tensor -> the router or norm weight it is, or is a part of."""
        return {key: name for name in self.delta.whole for key, _ in self.plan.sources[name].keys}

    def num_experts(self, target: str) -> int:
        return self.store[target].shape[0]

    def pieces(self, target: str, e: int) -> list[Piece]:
        pieces = self.plan.expert_pieces(target, e)
        if pieces is None:
            raise UserError(f"{self.checkpoint.folder}: {target} mixes experts in one tensor in a way that cannot be "
                            "written back expert by expert; this family cannot be exported yet")  # fmt: skip
        return pieces

    def output_dtype(self, key: str) -> torch.dtype:
        stored = self.head_source if key == self.head_key else key
        assert stored is not None
        return self.dtype or self.checkpoint.stored_dtype(stored)

    # -- experts -------------------------------------------------------------------------------------------------------

    def expert_pieces(self, target: str, e: int) -> list[MergedPiece]:
        """Expert e of a fused parameter as it is written: its part of each tensor that it is made of."""
        pieces = self.pieces(target, e)
        places, values = self._delta_of(target, e)
        merged = self._base_of(target, e, pieces)
        base = merged[places]
        merged[places] += values
        found, first = [], 0
        for piece, part in zip(pieces, self._split(pieces, merged), strict=True):
            rounded = self._rounded(piece.key, part)
            here = (places >= first) & (places < first + part.numel())
            changed = rounded.reshape(-1)[places[here] - first] != base[here].to(rounded.dtype)
            found.append(MergedPiece(piece, rounded, int(here.sum()), int(changed.sum())))
            first += part.numel()
        return found

    def expert(self, target: str, e: int) -> Tensor:
        """[out, in] of expert e after the merge, rounded as in the output, in fp32: what loads from the file."""
        pieces = self.expert_pieces(target, e)
        values = (merged.values for merged in pieces)
        weight = self.plan.assemble_expert(target, [merged.piece for merged in pieces], values)[0]
        return (weight.t() if self.transposed[target] else weight).to(torch.float32)

    def _base_of(self, target: str, e: int, pieces: list[Piece]) -> Tensor:
        """fp32: what the delta is added to, as the values of the pieces, one behind the other."""
        if self.base == "original":
            return torch.cat([self.checkpoint.read_piece(p).to(torch.float32).reshape(-1) for p in pieces])
        weight = dequantize(self.store[target].expert(e))[0]
        return self._to_checkpoint(target, weight.t() if self.transposed[target] else weight)

    def _split(self, pieces: list[Piece], flat: Tensor) -> list[Tensor]:
        """The values of pieces that lie one behind the other, in their shapes."""
        shapes = [torch.Size(self.plan.piece_shape(piece)) for piece in pieces]
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _rounded(self, key: str, values: Tensor) -> Tensor:
        dtype = self.output_dtype(key)
        rounded = values.to(dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(f"--dtype: {key} reaches {float(values.abs().max()):.6g}, beyond {dtype}; use --dtype bf16 "
                            "or fp32")  # fmt: skip
        return rounded

    def _delta_of(self, target: str, e: int) -> tuple[Tensor, Tensor]:
        """(places in the flattened pieces of expert e, values) of its non-zero deltas."""
        if target not in self.delta.sparse:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        indices, values = self.delta.sparse[target]
        _, rows, columns = self.store[target].shape
        first, end = torch.searchsorted(indices, torch.tensor([e, e + 1]) * (rows * columns)).tolist()
        within, values = indices[first:end] - e * rows * columns, values[first:end]
        within, values = within[values != 0], values[values != 0]
        if self.transposed[target]:
            row = torch.div(within, columns, rounding_mode="floor")
            within = (within - row * columns) * rows + row
        addresses = self._address_map(target)
        return (within if addresses is None else addresses[within]), values

    def _to_checkpoint(self, target: str, weight: Tensor) -> Tensor:
        """A router or norm, or [a, b] of one expert, as the values of its pieces, flattened one behind the other."""
        flat, addresses = weight.reshape(-1), self._address_map(target)
        if addresses is None:
            return flat
        placed = torch.empty_like(flat)
        placed[addresses] = flat
        return placed

    def _address_map(self, target: str) -> Tensor | None:
        """int32: where in its pieces each weight of an expert, a router or a norm lies; None: in order.

        The same for all experts of a parameter, whose pieces have equal shapes, and as a rule for all layers: equal
        ones are one tensor (40 layers of DBRX would have 32 GB of them).
        """
        with self._asking:
            if target not in self._addresses:
                found = self._find_addresses(target)
                different = {id(a): a for a in self._addresses.values() if a is not None}.values()
                equal = (a for a in different if found is not None and torch.equal(a, found))
                self._addresses[target] = next(equal, found)
            return self._addresses[target]

    def _find_addresses(self, target: str) -> Tensor | None:
        is_whole = target in self.delta.whole
        pieces = self.plan.sources[target].pieces if is_whole else self.pieces(target, 0)
        size = sum(torch.Size(self.plan.piece_shape(piece)).numel() for piece in pieces)
        assert size < 2**31, "of one expert, router or norm"
        in_order = torch.arange(size, dtype=torch.int32)
        assemble = self.plan.assemble if is_whole else self.plan.assemble_expert
        addresses = assemble(target, pieces, self._split(pieces, in_order)).reshape(-1)
        if torch.equal(addresses, in_order):
            return None
        if not is_rearrangement(addresses, size):
            raise UserError(f"{self.checkpoint.folder}: {target} is more than a rearrangement of stored tensors; "
                            "this family cannot be exported yet")  # fmt: skip
        return addresses

    # -- routers and norms ---------------------------------------------------------------------------------------------

    def whole_piece(self, key: str) -> Tensor:
        """The checkpoint's tensor `key` of a trained router or norm, in the output's type."""
        name = self.whole_keys[key]
        pieces = self.plan.sources[name].pieces
        parts = self._split(pieces, self._to_checkpoint(name, self.delta.whole[name]))
        return self._rounded(key, next(part for piece, part in zip(pieces, parts, strict=True) if piece.key == key))

    def whole(self, name: str) -> Tensor:
        """A router or norm after the merge, rounded as in the output, in fp32: what loads from the file."""
        pieces = self.plan.sources[name].pieces
        return self.plan.assemble(name, pieces, (self.whole_piece(p.key) for p in pieces)).to(torch.float32)

    # -- the head ------------------------------------------------------------------------------------------------------

    def merged_head(self, counts: Counts | None = None) -> Tensor:
        """[vocabulary, H] of a trained head, in the output's type; `counts` is told what changed."""
        assert self.head is not None
        assert self.head_source is not None
        assert self.head_key is not None
        dtype, base = self.output_dtype(self.head_key), self.checkpoint.tensor(self.head_source)
        indices, values = self.delta.sparse[self.head]
        places, values = indices[values != 0], values[values != 0]
        before = base.view(-1)[places]
        merged = base.to(dtype)  # what was read is ours to write to
        rounded = self._rounded(self.head_key, before.to(torch.float32) + values)
        merged.view(-1)[places] = rounded
        if counts is not None:
            counts.active += len(places)
            counts.changed += int((rounded != before.to(dtype)).sum())
        return merged


def is_rearrangement(addresses: Tensor, size: int) -> bool:
    """Whether each of 0, 1, ... size - 1 is there once."""
    if len(addresses) != size or int(addresses.min()) < 0 or int(addresses.max()) >= size:
        return False
    seen = torch.zeros(size, dtype=torch.bool)
    seen[addresses] = True
    return bool(seen.all())


class StoredWeights:
    """An exported folder read back: what `Merge` says of its result, from the files."""

    def __init__(self, folder: Path, merge: Merge) -> None:
        self.checkpoint, self.merge = Checkpoint(folder), merge
        self.trained_whole, self.head = merge.trained_whole, merge.head

    def expert(self, target: str, e: int) -> Tensor:
        """[out, in], fp32."""
        stored = self.checkpoint.read_expert(target, e).to(torch.float32)
        return stored.t() if self.merge.transposed[target] else stored

    def whole(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(torch.float32)

    def merged_head(self) -> Tensor:
        assert self.head is not None
        return self.checkpoint.read(self.head)
