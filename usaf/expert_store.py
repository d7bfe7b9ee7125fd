"""The 4-bit file: every expert of a checkpoint, quantised once (or taken over as it is), then mapped.

`experts_q4.safetensors` holds, for each projection `<experts module>.<parameter>`, its `.packed`, `.scale` and, by its
format, `.offset` tensors (see `quantization`); the metadata say each one's encoding. Experts that ship in four bits are
copied, codes and scales, never quantised again. It is written one expert at a time, so converting needs the memory of
one expert whatever the size of the checkpoint, and read through a mapping, so its pages belong to the system's cache
and not to the process. The file appears whole or not at all; an interrupted conversion goes on where it stopped
(`partial`). The earlier tool's `experts_q4.pt` is read too.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from usaf import __version__
from usaf.checkpoint import Checkpoint
from usaf.console import say
from usaf.errors import RunError, UserError, one_line
from usaf.files import hash_file, require_space, require_writable
from usaf.partial import allocated_bytes, continued, partial_path
from usaf.quantization import Encoding, QuantizedTensor, decode_scale, hqq_encoding, quantize, read_entry
from usaf.read_ahead import Span
from usaf.tensor_file import CODES, TORCH_DTYPES, TensorFile, TensorFileWriter, layout

FILE_NAME, LEGACY_NAME = "experts_q4.safetensors", "experts_q4.pt"
FORMAT = "usaf-experts-2"
PARTS = ("packed", "scale", "offset")

Progress = Callable[[int, int, str], None]
"""Called with (experts done, experts in all, what is being done)."""


class ExpertStore:
    """The 4-bit experts of one model: `path`, and a `QuantizedTensor` by the name of the fused parameter."""

    def __init__(self, path: Path, entries: dict[str, QuantizedTensor], source: str | None) -> None:
        self.path, self.entries = path, entries
        self.source = source  # Checkpoint.sampled_fingerprint() of what it was made from, where the file says so
        self.quantized: set[str] = set()  # the entries that were quantised by the settings' group size and bits
        self.spans: dict[str, list[Span]] = {}  # where each entry lies in the mapped file, if it is one

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self.entries[name]

    def content_hash(self) -> str:
        return hash_file(self.path)


def target_shape(checkpoint: Checkpoint, experts_name: str, target: str) -> tuple[int, int, int]:
    """(E, out, in) of a fused parameter; transposed families are stored [E, out, in] as well."""
    experts, rows, columns = checkpoint.plan.shapes[target]
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
    """Write all experts into `path`, one expert in memory at a time. A file that is there by then is kept."""
    shapes = shapes_of(checkpoint)
    lacking = checkpoint.missing(shapes)
    if lacking:
        raise UserError(f"{checkpoint.folder}: has no tensors for {lacking[0]} ({len(lacking)} expert parameters "
                        f"missing in all), and there is no 4-bit file; set {setting} to one, or give a complete "
                        "checkpoint")  # fmt: skip
    encodings = {target: checkpoint.four_bit(target) or hqq_encoding(group_size, bits) for target in shapes}
    specs = tensor_specs(shapes, encodings)
    metadata = {"format": FORMAT, "source": checkpoint.sampled_fingerprint(),
                "entries": json.dumps({t: entry_metadata(encodings[t], shapes[t]) for t in shapes})}  # fmt: skip
    as_stored = sorted({(e.name, e.group_size) for e in encodings.values() if e.name != "hqq"})
    if as_stored:
        kinds = ", ".join(f"{name} in groups of {size}" for name, size in as_stored)
        say(f"experts that the checkpoint holds in 4 bits are used as they are ({kinds})")
    head, _, size = layout(specs, metadata)
    identity = hashlib.sha256(head + __version__.encode()).hexdigest()
    total = sum(shape[0] for shape in shapes.values())
    require_space(
        path.parent, size - allocated_bytes(path), "the 4-bit file", f"free some, or set {setting} to another disk"
    )
    require_writable(path, f"{setting}, the 4-bit file to be made:")
    with continued(path, identity, size) as partial:
        if partial is None:
            return
        if partial.discarded:
            say(f"{partial_path(path)}: was begun for other weights or settings, and is made anew")
        if partial.done:
            say(f"{path}: its making goes on where it stopped, after {partial.done} of {total} experts")
        writer = TensorFileWriter(partial.file, specs, metadata)
        for place, (name, target, e) in enumerate(experts_in_order(checkpoint, shapes)):
            if place < partial.done:
                continue
            _write_expert(writer, target, e, read_quantized(checkpoint, name, target, e, encodings[target]))
            partial.step()
            progress(partial.done, total, name)


def experts_in_order(checkpoint: Checkpoint, shapes: dict[str, tuple[int, int, int]]) -> Iterator[tuple[str, str, int]]:
    """(experts module, its parameter, expert), the order in which they are written."""
    for name, targets in checkpoint.expert_parameters().items():
        for target in targets:
            for e in range(shapes[target][0]):
                yield name, target, e


def read_quantized(checkpoint: Checkpoint, name: str, target: str, e: int, encoding: Encoding) -> QuantizedTensor:
    """One expert [1, out, in] as it goes into the file: as it is stored in four bits, or quantised now."""
    try:
        if encoding.name != "hqq":
            stored = checkpoint.read_four_bit(target, e)
            check_finite(stored)
            return stored
        weight = checkpoint.read_expert(target, e)
        transposed = checkpoint.model.get_submodule(name).is_transposed
        weight = (weight.t() if transposed else weight).contiguous().unsqueeze(0)
        return quantize(weight, encoding.group_size, encoding.bits)
    except RunError:
        raise
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {target}, expert {e}: {error}") from None


def check_finite(stored: QuantizedTensor) -> None:
    """Refuse scales that are not finite, or so large that a weight may not be."""
    largest = 15.0 if stored.table is None else float(stored.table.abs().max())
    reach = decode_scale(stored.scale).abs().max() * largest
    if not torch.isfinite(reach.to(stored.dtype)):
        raise UserError(f"holds a scale of {float(reach) / largest:g}, with which weights leave {stored.dtype}; the "
                        "checkpoint is damaged, download it again")  # fmt: skip


def tensor_specs(
    shapes: dict[str, tuple[int, int, int]], encodings: dict[str, Encoding]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the 4-bit file."""
    return {
        f"{target}.{part}": spec
        for target, shape in shapes.items()
        for part, spec in encodings[target].tensors(shape).items()
    }


def entry_metadata(encoding: Encoding, shape: tuple[int, int, int]) -> dict[str, Any]:
    said = asdict(encoding)
    for name in ("scale", "offset", "dtype"):
        said[name] = None if said[name] is None else CODES[said[name]]
    return {**said, "in_features": shape[2]}


def read_encoding(said: dict[str, Any]) -> Encoding:
    types = {name: None if said[name] is None else TORCH_DTYPES[said[name]] for name in ("scale", "offset", "dtype")}
    table = None if said["table"] is None else tuple(said["table"])
    return Encoding(said["name"], said["group_size"], said["bits"], table=table, **types)  # type: ignore[arg-type]


def _write_expert(writer: TensorFileWriter, target: str, e: int, quantized: QuantizedTensor) -> None:
    for part, values in quantized.tensors().items():
        writer.write(f"{target}.{part}", e * values.numel(), values)


def read_store(path: Path) -> ExpertStore:
    """Map a 4-bit file of ours, or read the earlier tool's."""
    if path.suffix == ".pt":
        return _read_legacy(path)
    file = TensorFile(path, "delete it, and it is made anew")
    metadata, damaged = file.metadata, f"{path}: is damaged; delete it, and it is made anew"
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: is a safetensors file but not of 4-bit experts ({FORMAT}); set QUANT_PATH to one "
                        "that `python -m usaf.quantize` made, or delete it, and it is made anew")  # fmt: skip
    entries, quantized = {}, set()
    spans: dict[str, list[Span]] = {}
    try:
        described = {
            t: (read_encoding(said), said["in_features"]) for t, said in json.loads(metadata["entries"]).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(damaged) from None
    for target, (encoding, in_features) in described.items():
        parts = {p: file.map(f"{target}.{p}") for p in PARTS if f"{target}.{p}" in file.entries}
        shape = (*parts["packed"].shape[:2], in_features) if "packed" in parts else ()
        if len(shape) != 3 or encoding.tensors(shape) != {p: (t.dtype, tuple(t.shape)) for p, t in parts.items()}:
            raise UserError(damaged)
        entries[target] = encoding.of(parts, shape)
        places = [file.entries[f"{target}.{part}"] for part in parts]
        spans[target] = [Span(path, place.start, place.start + place.nbytes) for place in places]
        if encoding.name == "hqq":
            quantized.add(target)
    store = ExpertStore(path, entries, metadata.get("source"))
    store.quantized, store.spans = quantized, spans
    return store


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
        if target in store.quantized and (entry.group_size, entry.bits) != (group_size, bits):
            raise UserError(f"{store.path}: holds {entry.bits} bits in groups of {entry.group_size}, and the settings "
                            f"say QUANT_BITS={bits}, GROUP_SIZE={group_size}; change the settings, or set QUANT_PATH "
                            "to a new file")  # fmt: skip
    has_experts = not checkpoint.missing(shapes_of(checkpoint))
    if store.source is not None and has_experts and store.source != checkpoint.sampled_fingerprint():
        raise UserError(f"{store.path}: was made from other weights than {checkpoint.folder} holds now; delete it, and "
                        "it is made anew")  # fmt: skip
