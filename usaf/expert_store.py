"""The 4-bit file: every expert of a checkpoint, quantised once, then mapped.

`experts_q4.safetensors` holds, for each projection `<experts module>.<parameter>`, three tensors: `.packed`, `.scale`
and `.offset` (see `quantization`). It is written one expert at a time, so converting needs the memory of one expert
whatever the size of the checkpoint, and read through a mapping, so its pages belong to the system's cache and not to
the process. The file appears whole or not at all; where two processes make it at once, the first to finish wins. The
earlier tool's `experts_q4.pt` is read too.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from usaf.checkpoint import Checkpoint
from usaf.errors import UserError
from usaf.files import hash_file, replacing, require_space, require_writable
from usaf.quantization import QuantizedTensor, quantize, read_entry
from usaf.tensor_file import TensorFileWriter, one_line

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


def find_path(checkpoint: Checkpoint, quant_path: str | None, setting: str = "QUANT_PATH") -> tuple[Path, bool]:
    """Where the 4-bit file is or is to be made, and whether it is there. `setting` is what users call `quant_path`."""
    if quant_path is None:
        for name in (FILE_NAME, LEGACY_NAME):
            if (checkpoint.folder / name).is_file():
                return checkpoint.folder / name, True
        return checkpoint.folder / FILE_NAME, False
    path = Path(quant_path).expanduser()
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{setting}={quant_path}: must end in .safetensors (or .pt for the legacy format); name a file "
                        f"such as {FILE_NAME}")  # fmt: skip
    if path.is_dir():
        raise UserError(f"{setting}={quant_path}: is a folder; name a file such as {path / FILE_NAME}")
    if path.suffix == ".pt" and not path.is_file():
        raise UserError(f"{setting}={quant_path}: no such file, and new ones are written as .safetensors; correct the "
                        f"path, or name a file such as {FILE_NAME}")  # fmt: skip
    return path, path.is_file()


def open_or_make(checkpoint: Checkpoint, quant_path: str | None, group_size: int, bits: int,
                 progress: Progress) -> ExpertStore:  # fmt: skip
    """The 4-bit experts of `checkpoint`: found beside it (or at QUANT_PATH), or quantised there now."""
    path, there = find_path(checkpoint, quant_path)
    if not there:
        convert(checkpoint, path, group_size, bits, progress)
    store = read_store(path)
    check_store(store, checkpoint, group_size, bits)
    return store


def convert(checkpoint: Checkpoint, path: Path, group_size: int, bits: int, progress: Progress,
            setting: str = "QUANT_PATH") -> None:  # fmt: skip
    """Quantise all experts into `path`, one expert in memory at a time. A file that is there by then is kept."""
    shapes = shapes_of(checkpoint)
    lacking = checkpoint.missing(shapes)
    if lacking:
        raise UserError(f"{checkpoint.folder}: has no tensors for {lacking[0]} ({len(lacking)} expert parameters "
                        f"missing in all), and there is no 4-bit file; set {setting} to one, or give a complete "
                        "checkpoint")  # fmt: skip
    specs = tensor_specs(shapes, group_size, bits)
    total_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
    require_space(path.parent, total_bytes, "the 4-bit file", f"free some, or set {setting} to another disk")
    require_writable(path, f"{setting}, the 4-bit file to be made:")
    metadata = {"format": FORMAT, "group_size": str(group_size), "bits": str(bits),
                "source": checkpoint.sampled_fingerprint(),
                **{f"in_features.{t}": str(s[2]) for t, s in shapes.items()}}  # fmt: skip
    done, total = 0, sum(shape[0] for shape in shapes.values())
    with replacing(path, overwrite=False) as file:
        writer = TensorFileWriter(file, specs, metadata)
        for name, targets in checkpoint.expert_parameters().items():
            transposed = checkpoint.model.get_submodule(name).is_transposed
            for target in targets:
                for e in range(shapes[target][0]):
                    weight = checkpoint.read_expert(target, e, shapes[target][0])
                    weight = (weight.t() if transposed else weight).contiguous().unsqueeze(0)
                    try:
                        _write_expert(writer, target, e, quantize(weight, group_size, bits))
                    except UserError as error:
                        raise UserError(f"{checkpoint.folder}: {target}, expert {e}: {error}") from None
                    done += 1
                    progress(done, total, name)


def tensor_specs(
    shapes: dict[str, tuple[int, int, int]], group_size: int, bits: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the 4-bit file."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for target, (experts, rows, columns) in shapes.items():
        width = columns if bits == 8 else (columns + 1) // 2
        specs[f"{target}.packed"] = (torch.uint8, (experts, rows, width))
        specs[f"{target}.scale"] = (torch.float16, (experts, rows, -(-columns // group_size)))
        specs[f"{target}.offset"] = specs[f"{target}.scale"]
    return specs


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
                raise UserError(f"{path}: is a safetensors file but not of 4-bit experts ({FORMAT}); set QUANT_PATH to "
                                "one that `python -m usaf.quantize` made")  # fmt: skip
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({one_line(error)}); delete it, and it is made anew"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); check its rights, or set QUANT_PATH") from None
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
    except pickle.UnpicklingError:  # torch's text tells how to run the code that it found; not here
        raise UserError(f"{path}: is not a file of tensors alone; only data is accepted from a .pt file, never pickled "
                        "code or objects: make it with quantize_4bit and torch.save") from None  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)[:200]}); it is damaged or not of torch.save, make "
                        "it again") from None  # fmt: skip
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path}: must be a dict of 4-bit entries by parameter name; make it with quantize_4bit")
    entries = {}
    for name, entry in loaded.items():
        try:
            entries[str(name)] = read_entry(entry)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
    return ExpertStore(path, entries, None)


def check_store(store: ExpertStore, checkpoint: Checkpoint, group_size: int, bits: int) -> None:
    """Refuse a 4-bit file of another model, or one made with other settings."""
    for target, shape in shapes_of(checkpoint).items():
        entry = store.entries.get(target)
        if entry is None:
            raise UserError(
                f"{store.path}: has no experts for {target}; it is of another model, delete it or set QUANT_PATH"
            )
        if entry.shape != shape:
            raise UserError(f"{store.path}: {target} has shape {entry.shape}, the model wants {shape}; it is of "
                            "another model, delete it or set QUANT_PATH")  # fmt: skip
        if store.path.suffix != ".pt" and (entry.group_size, entry.bits) != (group_size, bits):
            raise UserError(f"{store.path}: holds {entry.bits} bits in groups of {entry.group_size}, and the settings "
                            f"say QUANT_BITS={bits}, GROUP_SIZE={group_size}; change the settings, or set QUANT_PATH "
                            "to a new file")  # fmt: skip
    has_experts = not checkpoint.missing(shapes_of(checkpoint))
    if store.source is not None and has_experts and store.source != checkpoint.sampled_fingerprint():
        raise UserError(f"{store.path}: was made from other weights than {checkpoint.folder} holds now; delete it, and "
                        "it is made anew")  # fmt: skip
