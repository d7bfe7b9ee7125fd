"""The trained result as a file: which weights, by how much, and what trained whole; nothing else.

`delta.safetensors` holds, for each fused expert parameter and for the head, `<parameter>.values` (fp16 where that keeps
every bit, as it does behind `Trainer.round_deltas`, else fp32) and where they go, in the shorter of two ways:
`<parameter>.skips`, bytes that say how many weights lie between one trained weight and the next (`encode_skips`; a byte
and a little for each at the usual densities), or `<parameter>.indices` (flat, sorted; int32 where they fit). Every
trained router and norm stands in it whole in fp32. A weight that was dropped is not in it: it is at its base value, in
memory and here alike. The metadata carries the fingerprint of the base (a delta fits one base only) and every choice
that a measurement made, so that another process computes the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usaf.errors import UserError
from usaf.files import replacing
from usaf.tensor_file import TensorFile, TensorFileWriter

FORMAT = "usaf-delta-3"
FORMATS = ("usaf-delta-1", "usaf-delta-2", FORMAT)  # the first had indices alone, both had values in fp32 alone
INT32_LIMIT = 2**31
BLOCK = 2**20  # indices, or bytes of skips, that are encoded at a time: what that takes stays small beside them
GOES_ON = 255  # a byte that skips so many weights and ends no skip


@dataclass(frozen=True)
class Delta:
    """sparse: parameter name -> (int64 sorted flat indices, fp32 values), of experts and the head; whole: parameter
    name -> fp32 weight, of routers and norms."""

    sparse: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    base_fingerprint: str
    about: dict[str, Any]  # shapes, decisions, step, train_from, ...


def scaled(delta: Delta, scale: float, base: Mapping[str, Tensor]) -> Delta:
    """The model that lies at `scale` on the straight line from the base, 0, to the trained one, 1: less of a change
    forgets less (WiSE-FT, Wortsman et al. 2022, eq. 1). At 1 it is `delta` itself.

    base: the checkpoint's own routers and norms, by name, those of `delta.whole` at least.
    """
    if scale == 1:
        return delta
    sparse = {name: (indices, partly(values, scale)) for name, (indices, values) in delta.sparse.items()}
    whole = {name: partly(weight, scale, base[name].to(weight)) for name, weight in delta.whole.items()}
    return replace(delta, sparse=sparse, whole=whole)


def partly(trained: Tensor, scale: float, base: Tensor | None = None) -> Tensor:
    """At `scale` on the line from `base`, None for zeros, to `trained`, which it is itself at 1."""
    if scale == 1:
        return trained
    return scale * trained if base is None else torch.lerp(base, trained, scale)


def save_delta(path: Path, delta: Delta) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    tensors: dict[str, Tensor] = {}
    for name, (indices, values) in delta.sparse.items():
        kind, places = stored_places(indices)
        tensors[f"{name}.{kind}"] = places
        tensors[f"{name}.values"] = stored_values(values)
    tensors.update(delta.whole)
    metadata = {"format": FORMAT, "base_fingerprint": delta.base_fingerprint, "about": json.dumps(delta.about)}
    with replacing(path) as file:
        writer = TensorFileWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, metadata)
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
    return path.stat().st_size


def stored_values(values: Tensor) -> Tensor:
    """In fp16 where that keeps every bit. values: fp32."""
    half = values.to(torch.float16)
    return half if torch.equal(half.to(torch.float32), values) else values


def stored_places(indices: Tensor) -> tuple[str, Tensor]:
    """("skips" or "indices", as they are stored), whichever is shorter. indices: int64 `[n]`, sorted, each once."""
    plain = indices.to(torch.int32) if len(indices) == 0 or int(indices[-1]) < INT32_LIMIT else indices
    if len(indices) and int(indices[-1]) // GOES_ON + len(indices) >= plain.nbytes:  # an upper bound of the skips
        return "indices", plain
    return "skips", encode_skips(indices)


def encode_skips(indices: Tensor) -> Tensor:
    """uint8 `[n and more]`: for each index, how many weights lie between the one before it and itself: one byte for
    each 255 of them (`GOES_ON`), and one below that for the rest. indices: int64 `[n]`, sorted, each once."""
    blocks, last = [torch.zeros(0, dtype=torch.uint8)], -1
    for block in indices.split(BLOCK) if len(indices) else ():
        skips = torch.diff(block, prepend=block.new_tensor([last])) - 1
        last = int(block[-1])
        ends = torch.cumsum(skips // GOES_ON + 1, 0) - 1
        encoded = torch.full((int(ends[-1]) + 1,), GOES_ON, dtype=torch.uint8)
        encoded[ends] = (skips % GOES_ON).to(torch.uint8)
        blocks.append(encoded)
    return torch.cat(blocks)


def decode_skips(encoded: Tensor) -> Tensor:
    """What `encode_skips` was given, int64."""
    indices = torch.empty(count_of_skips(encoded), dtype=torch.int64)
    known, passed = 0, 0  # indices, and the skips before the block
    for block in encoded.split(BLOCK) if len(encoded) else ():
        ends = (block != GOES_ON).nonzero().squeeze(1)
        sums = torch.cumsum(block, 0, dtype=torch.int64)
        indices[known : known + len(ends)] = sums[ends] + torch.arange(known + passed, known + passed + len(ends))
        known, passed = known + len(ends), passed + int(sums[-1])
    return indices


def count_of_skips(encoded: Tensor) -> int:
    return len(encoded) - int((encoded == GOES_ON).sum())


def load_delta(path: Path) -> Delta:
    """Raises UserError for anything that is not a whole delta file."""
    if not path.is_file():
        raise UserError(f"--delta {path}: no such file; a finished run leaves it as runs/<tag>/delta.safetensors")
    file = TensorFile(path, "copy it again, or run again")
    metadata = file.metadata
    if metadata.get("format") not in FORMATS:
        raise UserError(f"{path}: is not a delta of this program ({FORMAT}); give the delta.safetensors of a run")
    tensors = {name: file.read(name) for name in file.entries}
    fault = find_fault(tensors, metadata)
    if fault is not None:
        raise UserError(f"{path}: {fault}; the file is damaged, copy it again, or run again")
    sparse = {}
    for name in (name.removesuffix(".values") for name in tensors if name.endswith(".values")):
        sparse[name] = (read_places(tensors, name), tensors[f"{name}.values"].to(torch.float32))
    whole = {n: t for n, t in tensors.items() if not n.endswith((".indices", ".skips", ".values"))}
    return Delta(sparse, whole, metadata["base_fingerprint"], json.loads(metadata["about"]))


def read_places(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The indices of a parameter's trained weights, int64, of tensors in which `find_fault` finds nothing."""
    skips = tensors.get(f"{name}.skips")
    return tensors[f"{name}.indices"].to(torch.int64) if skips is None else decode_skips(skips)


def find_fault(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    """What in a delta's tensors is not as `save_delta` writes them; that they fit a model is `session`'s to check."""
    try:
        about = json.loads(metadata["about"])
    except (KeyError, ValueError):
        about = None
    if not isinstance(about, dict) or "base_fingerprint" not in metadata:
        return "its metadata are not those of a delta"
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in ("indices", "skips"):
            values = tensors.get(f"{stem}.values")
            found = fault_of_indices(tensor) if part == "indices" else fault_of_skips(tensor)
            if found is not None:
                return f"{name} {found}"
            count = len(tensor) if part == "indices" else count_of_skips(tensor)
            if values is None or values.shape != (count,):
                return f"{stem} has not one value for each index"
        elif part == "values" and (f"{stem}.indices" in tensors) == (f"{stem}.skips" in tensors):
            return f"{name} have no indices, or twice"
        elif tensor.dtype != torch.float32 and not (part == "values" and tensor.dtype == torch.float16):
            return f"{name} are of another type than a delta's"
        elif not bool(torch.isfinite(tensor).all()):
            return f"{name} holds something else than finite numbers"
    return None


def fault_of_indices(indices: Tensor) -> str | None:
    whole = indices.ndim == 1 and indices.dtype in (torch.int32, torch.int64)
    return None if whole and not bool((indices[1:] <= indices[:-1]).any()) else "are not whole numbers in rising order"


def fault_of_skips(skips: Tensor) -> str | None:
    whole = skips.ndim == 1 and skips.dtype == torch.uint8
    return None if whole and (len(skips) == 0 or int(skips[-1]) != GOES_ON) else "are not bytes, or break off"


def experts_moved(delta: Delta, numel_per_expert: dict[str, int]) -> dict[str, int]:
    """Experts module name -> how many of its experts have at least one weight off its base value; other tensors of the
    delta are left out.

    numel_per_expert: parameter name -> weights of one expert in it.
    """
    moved: dict[str, set[int]] = {}
    for name, size in numel_per_expert.items():
        indices, values = delta.sparse[name]
        changed = torch.div(indices[values != 0], size, rounding_mode="floor")
        moved.setdefault(name.rpartition(".")[0], set()).update(changed.unique().tolist())
    return {name: len(experts) for name, experts in moved.items()}
