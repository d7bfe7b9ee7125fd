"""The trained result as a file: which weights, by how much, and the router; nothing else.

`delta.safetensors` holds `<parameter>.indices` (flat, sorted; int32 where they fit) and `<parameter>.values` (fp32)
for each fused expert parameter, and every trained router weight whole in fp32. A weight that was dropped on the way is
not in it: it is at its base value, in memory and here alike. The metadata carries the fingerprint of the base (a delta
fits one base only) and every choice that a measurement made, so that another process computes the same bits.
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
    """experts: parameter name -> (int64 sorted flat indices, fp32 values); routers: parameter name -> fp32 weight."""

    experts: dict[str, tuple[Tensor, Tensor]]
    routers: dict[str, Tensor]
    base_fingerprint: str
    about: dict[str, Any]  # expert_shapes, decisions, step, train_from, ...


def save_delta(path: Path, delta: Delta) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    tensors: dict[str, Tensor] = {}
    for name, (indices, values) in delta.experts.items():
        small = len(indices) == 0 or int(indices[-1]) < INT32_LIMIT
        tensors[f"{name}.indices"] = indices.to(torch.int32) if small else indices
        tensors[f"{name}.values"] = values
    tensors.update(delta.routers)
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
    experts = {
        name.removesuffix(".indices"): (indices.to(torch.int64), tensors[f"{name.removesuffix('.indices')}.values"])
        for name, indices in tensors.items()
        if name.endswith(".indices")
    }
    routers = {n: t for n, t in tensors.items() if not n.endswith((".indices", ".values"))}
    return Delta(experts, routers, metadata["base_fingerprint"], json.loads(metadata["about"]))


def experts_moved(delta: Delta, numel_per_expert: dict[str, int]) -> dict[str, int]:
    """Experts module name -> how many of its experts have at least one weight off its base value.

    numel_per_expert: parameter name -> weights of one expert in it.
    """
    moved: dict[str, set[int]] = {}
    for name, (indices, values) in delta.experts.items():
        changed = torch.div(indices[values != 0], numel_per_expert[name], rounding_mode="floor")
        moved.setdefault(name.rpartition(".")[0], set()).update(changed.unique().tolist())
    return {name: len(experts) for name, experts in moved.items()}
