"""The trained result as a file: which weights, by how much, and what trained whole; nothing else.

`delta.safetensors` holds `<parameter>.indices` (flat, sorted; int32 where they fit) and `<parameter>.values` (fp32)
for each fused expert parameter and for the head, and every trained router and norm whole in fp32. A weight that was
dropped on the way is not in it: it is at its base value, in memory and here alike. The metadata carries the fingerprint
of the base (a delta fits one base only) and every choice that a measurement made, so that another process computes the
same bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usaf.errors import UserError
from usaf.files import replacing
from usaf.tensor_file import TensorFile, TensorFileWriter

FORMAT = "usaf-delta-1"
INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Delta:
    """sparse: parameter name -> (int64 sorted flat indices, fp32 values), of experts and the head; whole: parameter
    name -> fp32 weight, of routers and norms."""

    sparse: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    base_fingerprint: str
    about: dict[str, Any]  # shapes, decisions, step, train_from, ...


def save_delta(path: Path, delta: Delta) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    tensors: dict[str, Tensor] = {}
    for name, (indices, values) in delta.sparse.items():
        small = len(indices) == 0 or int(indices[-1]) < INT32_LIMIT
        tensors[f"{name}.indices"] = indices.to(torch.int32) if small else indices
        tensors[f"{name}.values"] = values
    tensors.update(delta.whole)
    metadata = {"format": FORMAT, "base_fingerprint": delta.base_fingerprint, "about": json.dumps(delta.about)}
    with replacing(path) as file:
        writer = TensorFileWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, metadata)
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
    return path.stat().st_size


def load_delta(path: Path) -> Delta:
    """Raises UserError for anything that is not a whole delta file."""
    if not path.is_file():
        raise UserError(f"--delta {path}: no such file; a finished run leaves it as runs/<tag>/delta.safetensors")
    file = TensorFile(path, "copy it again, or run again")
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: is not a delta of this program ({FORMAT}); give the delta.safetensors of a run")
    tensors = {name: file.read(name) for name in file.entries}
    fault = find_fault(tensors, metadata)
    if fault is not None:
        raise UserError(f"{path}: {fault}; the file is damaged, copy it again, or run again")
    names = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
    sparse = {n: (tensors[f"{n}.indices"].to(torch.int64), tensors[f"{n}.values"]) for n in names}
    whole = {n: t for n, t in tensors.items() if not n.endswith((".indices", ".values"))}
    return Delta(sparse, whole, metadata["base_fingerprint"], json.loads(metadata["about"]))


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
        if part == "indices":
            values = tensors.get(f"{stem}.values")
            if values is None or values.shape != tensor.shape or tensor.ndim != 1:
                return f"{stem} has not one value for each index"
            if tensor.dtype not in (torch.int32, torch.int64) or bool((tensor[1:] <= tensor[:-1]).any()):
                return f"{name} are not whole numbers in rising order"
        elif part == "values" and f"{stem}.indices" not in tensors:
            return f"{name} have no indices"
        elif tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            return f"{name} holds something else than finite numbers in float32"
    return None


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
