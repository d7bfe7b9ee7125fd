"""The 4-bit file: every expert of a checkpoint, quantised once, then mapped.

`experts_q4.safetensors` holds, for each projection `<experts module>.<parameter>`, three tensors: `.packed`, `.scale` and
`.offset` (see `quantization`). It is written one expert at a time, so converting needs the memory of one expert whatever
the size of the checkpoint, and read through a mapping, so its pages belong to the system's cache and not to the process.
The file appears whole or not at all. The earlier tool's `experts_q4.pt` is read too.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from usaf.checkpoint import Checkpoint, one_line
from usaf.errors import UserError
from usaf.files import TensorFileWriter, hash_file, replacing, require_space
from usaf.quantization import QuantizedTensor, quantize, read_entry

FILE_NAME, LEGACY_NAME = "experts_q4.safetensors", "experts_q4.pt"
FORMAT = "usaf-experts-1"
PARTS = ("packed", "scale", "offset")

Progress = Callable[[int, int, str], None]
"""Called with (experts done, experts in all, what is being done)."""


class ExpertStore:
    """The 4-bit experts of one model: `path`, and a `QuantizedTensor` by the name of the fused parameter."""

    def __init__(self, path: Path, entries: dict[str, QuantizedTensor], source: str | None) -> None:
        self.path, self.entries = path, entries
        self.source = source  # Checkpoint.sampled_fingerprint() of what it was made from, where the file says so

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self.entries[name]

    def content_hash(self) -> str:
        return hash_file(self.path)


def target_shape(checkpoint: Checkpoint, experts_name: str, target: str) -> tuple[int, int, int]:
    """(E, out, in) of a fused parameter; transposed families are stored [E, out, in] as well."""
    parameter = checkpoint.model.get_parameter(target)
    experts, rows, columns = parameter.shape
    if checkpoint.model.get_submodule(experts_name).is_transposed:
        rows, columns = columns, rows
    return int(experts), int(rows), int(columns)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    return {
        target: target_shape(checkpoint, name, target)
        for name, pair in checkpoint.expert_parameters().items()
        for target in pair
    }


def find_path(checkpoint: Checkpoint, quant_path: str | None) -> tuple[Path, bool]:
    """Where the 4-bit file is or is to be made, and whether it is there."""
    if quant_path is not None:
        path = Path(quant_path).expanduser()
        if path.suffix not in (".safetensors", ".pt"):
            raise UserError(f"QUANT_PATH={quant_path}: must end in .safetensors (or .pt for the legacy format); name a file "
                            f"such as {FILE_NAME}")  # fmt: skip
        if path.suffix == ".pt" and not path.is_file():
            raise UserError(f"QUANT_PATH={quant_path}: no such file, and new ones are written as .safetensors; correct the "
                            f"path, or name a file such as {FILE_NAME}")  # fmt: skip
        return path, path.is_file()
    for name in (FILE_NAME, LEGACY_NAME):
        if (checkpoint.folder / name).is_file():
            return checkpoint.folder / name, True
    return checkpoint.folder / FILE_NAME, False


def open_or_make(checkpoint: Checkpoint, quant_path: str | None, group_size: int, bits: int,
                 progress: Progress) -> ExpertStore:  # fmt: skip
    """The 4-bit experts of `checkpoint`: found beside it (or at QUANT_PATH), or quantised there now."""
    path, there = find_path(checkpoint, quant_path)
    if not there:
        convert(checkpoint, path, group_size, bits, progress)
    store = read_store(path)
    check_store(store, checkpoint, group_size, bits)
    return store


def convert(checkpoint: Checkpoint, path: Path, group_size: int, bits: int, progress: Progress) -> None:
    """Quantise all experts into `path`, one expert in memory at a time."""
    shapes = shapes_of(checkpoint)
    lacking = checkpoint.missing(shapes)
    if lacking:
        raise UserError(f"{checkpoint.folder}: has no tensors for {lacking[0]} and {len(lacking) - 1} other expert "
                        "parameters, and no 4-bit file; give QUANT_PATH, or a complete checkpoint")  # fmt: skip
    specs = {}
    for target, (experts, rows, columns) in shapes.items():
        groups = -(-columns // group_size)
        width = columns if bits == 8 else (columns + 1) // 2
        specs[f"{target}.packed"] = (torch.uint8, (experts, rows, width))
        specs[f"{target}.scale"] = specs[f"{target}.offset"] = (torch.float16, (experts, rows, groups))
    total_bytes = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values())
    require_space(path.parent, total_bytes, "the 4-bit file", "free some, or set QUANT_PATH to another disk")
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: not writable, and the 4-bit file is to be made there; set QUANT_PATH to a file in a "
                        "folder that is")  # fmt: skip
    metadata = {"format": FORMAT, "group_size": str(group_size), "bits": str(bits),
                "source": checkpoint.sampled_fingerprint(),
                **{f"in_features.{t}": str(s[2]) for t, s in shapes.items()}}  # fmt: skip
    done, total = 0, sum(shape[0] for shape in shapes.values())
    with replacing(path) as file:
        writer = TensorFileWriter(file, specs, metadata)
        for name, targets in checkpoint.expert_parameters().items():
            transposed = checkpoint.model.get_submodule(name).is_transposed
            for target in targets:
                for e in range(shapes[target][0]):
                    weight = checkpoint.read_expert(target, e, shapes[target][0])
                    weight = weight.t() if transposed else weight
                    _write_expert(writer, target, e, quantize(weight.contiguous().unsqueeze(0), group_size, bits))
                    done += 1
                    progress(done, total, name)


def _write_expert(writer: TensorFileWriter, target: str, e: int, quantized: QuantizedTensor) -> None:
    for part in PARTS:
        values = getattr(quantized, part)
        writer.write(f"{target}.{part}", e * values.numel(), values)


def read_store(path: Path) -> ExpertStore:
    """Map a 4-bit file of ours, or read the earlier tool's."""
    if path.suffix == ".pt":
        return _read_legacy(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: is a safetensors file but not of 4-bit experts ({FORMAT}); set QUANT_PATH to one "
                                "that `python -m usaf.quantize` made")  # fmt: skip
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({one_line(error)}); delete it, and it is made anew"
        ) from None
    group_size, bits = int(metadata["group_size"]), int(metadata["bits"])
    entries = {}
    for target in sorted({name.rpartition(".")[0] for name in tensors}):
        packed, scale, offset = (tensors[f"{target}.{part}"] for part in PARTS)
        shape = (packed.shape[0], packed.shape[1], int(metadata[f"in_features.{target}"]))
        entries[target] = QuantizedTensor(packed, scale, offset, shape, group_size, bits)
    return ExpertStore(path, entries, metadata.get("source"))


def _read_legacy(path: Path) -> ExpertStore:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a file of tensors ({one_line(error)[:200]}); only data is accepted from a "
                        ".pt file, never code") from None  # fmt: skip
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path}: must be a dict of 4-bit entries by parameter name; make it with quantize_4bit")
    return ExpertStore(path, {str(name): read_entry(entry) for name, entry in loaded.items()}, None)


def check_store(store: ExpertStore, checkpoint: Checkpoint, group_size: int, bits: int) -> None:
    """Refuse a 4-bit file of another model, or one made with other settings."""
    for target, shape in shapes_of(checkpoint).items():
        entry = store.entries.get(target)
        if entry is None:
            raise UserError(
                f"{store.path}: has no experts for {target}; it is of another model, delete it or set QUANT_PATH"
            )
        if entry.shape != shape:
            raise UserError(f"{store.path}: {target} has shape {entry.shape}, the model wants {shape}; it is of another "
                            "model, delete it or set QUANT_PATH")  # fmt: skip
        if store.path.suffix != ".pt" and (entry.group_size, entry.bits) != (group_size, bits):
            raise UserError(f"{store.path}: holds {entry.bits} bits in groups of {entry.group_size}, and the settings say "
                            f"QUANT_BITS={bits}, GROUP_SIZE={group_size}; change the settings, or set QUANT_PATH to a new "
                            "file")  # fmt: skip
    has_experts = not checkpoint.missing(shapes_of(checkpoint))
    if store.source is not None and has_experts and store.source != checkpoint.sampled_fingerprint():
        raise UserError(f"{store.path}: was made from other weights than {checkpoint.folder} holds now; delete it, and it is "
                        "made anew")  # fmt: skip
