"""A merge written as a Hugging Face folder: the source's own names, shards, types, tokenizer and configuration.

Tensors that training did not touch are copied byte for byte, also those that no model class knows (MTP heads, vision
towers). The folder appears whole or not at all, and the source is only read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key

from usaf.errors import RunError, UserError
from usaf.files import (
    FULL_DISK,
    flush,
    flush_folder,
    locked,
    require_space,
    require_writable_folder,
    write_json,
)
from usaf.merge import Counts, Merge
from usaf.source_folder import INDEX_NAME, SINGLE_NAME
from usaf.source_formats import FourBit
from usaf.tensor_file import TensorFileWriter, tensor_bytes_count

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".partial")
NOT_COPIED = (INDEX_NAME, "config.json", "README.md", ".gitattributes")
ABOUT_NAME = "usaf_export.json"

Specs = dict[str, tuple[torch.dtype | str, tuple[int, ...]]]
"""Tensor -> (type, shape)."""


def refuse_taken(output: Path) -> None:
    """Only a folder that is new or empty is written to."""
    try:
        if output.exists() or output.is_symlink():
            if not output.is_dir():
                raise UserError(f"--output {output}: is a file; give a new folder, or delete this one first")
            if any(output.iterdir()):
                raise UserError(f"--output {output}: is not empty; give a new folder, or delete this one first")
    except OSError as error:
        raise unwritable(output, error) from error


def refuse_place(output: Path, source: Path) -> None:
    """The source stays as it is: nothing is put into its folder either. Elsewhere, a folder must be possible there."""
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output}: lies in the folder of the model, {source}, which is only read; give a "
                        "folder outside it")  # fmt: skip
    require_writable_folder(output.absolute().parent, f"--output {output}")


def unwritable(output: Path, error: OSError) -> UserError:
    kind = RunError if error.errno in FULL_DISK else UserError
    return kind(f"--output {output}: could not be written ({error.strerror or error}); free space or check the rights "
                f"of {output.absolute().parent}")  # fmt: skip


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not, with the
    parents that were made for it."""
    output = output.resolve()  # where it is a link to an empty folder, that is filled and the link stays
    partial = output.with_name(f".{output.name}.partial")
    made = [parent for parent in output.parents if not parent.exists()]
    is_there = output.is_dir()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with alone(output):
            refuse_taken(output)  # by a process that was at work meanwhile
            try:
                if is_there:
                    output.rmdir()  # now, not after hours: a mount point cannot go, nor on Windows one that is in use
                if partial.exists():
                    shutil.rmtree(partial)  # of a killed process
                partial.mkdir()
                yield partial
                flush_folder(partial)
                partial.replace(output)
                made = []
                flush_folder(output.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                if is_there and not output.exists():
                    output.mkdir()
    except OSError as error:
        raise unwritable(output, error) from error
    finally:
        for parent in made:
            with suppress(OSError):  # somebody else's files are in it by now
                parent.rmdir()


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """One process at a time writes `output`: two would clear away each other's half. The lock is the system's."""
    path = output.with_name(f".{output.name}.lock")
    busy = UserError(f"--output {output}: another export is writing this folder; wait until it has finished, or give "
                     "another one")  # fmt: skip
    try:
        with locked(path, busy):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()
    finally:
        if os.name == "nt":
            with suppress(OSError):  # another process may hold it by now
                path.unlink()


def write_folder(merge: Merge, folder: Path, about: dict[str, Any], progress: Callable[[int, int], None]) -> Counts:
    """Every file of the exported model, and what it changes. `progress`: (bytes written, bytes in all).

    Raises:
        UserError: the disk is too small, before anything is written.
    """
    shards = plan_shards(merge)
    total = sum(tensor_bytes_count(*spec) for specs in shards.values() for spec in specs.values())
    require_space(folder.parent, total, "the exported model", "free some, or give --output on another disk")
    counts, done = Counts(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for shard, specs in shards.items():
        write_shard(merge, shard, specs, folder / shard, counts, advance)
    if set(shards) != {SINGLE_NAME}:
        write_json(folder / INDEX_NAME, {
            "metadata": {"total_size": total},
            "weight_map": {name: shard for shard, specs in shards.items() for name in specs},
        })  # fmt: skip
    copy_companions(merge.checkpoint.folder, folder)
    write_json(folder / "config.json", exported_config(merge))
    write_json(folder / ABOUT_NAME, about)
    return counts


def plan_shards(merge: Merge) -> dict[str, Specs]:
    """Output shard -> its tensors: the source's, but for what the merge writes anew.

    A weight that the source keeps as codes and scales is written as one tensor, in the shard of the first of them.
    """
    checkpoint = merge.checkpoint
    own_head = [merge.head_key] if merge.head_key is not None and not merge.adds_head else []
    written = {part: key for key in [*merge.expert_keys, *merge.whole_keys, *own_head]
               for part in checkpoint.parts(key)}  # fmt: skip
    shards: dict[str, Specs] = {}
    for shard in sorted(set(checkpoint.shards.values())):
        specs = shards[shard] = {}
        for name, entry in checkpoint.file(shard).entries.items():
            key = written.get(name)
            if key is None:
                specs[name] = entry.code, entry.shape
            elif name == checkpoint.parts(key)[0]:
                specs[key] = merge.output_dtype(key), checkpoint.stored[key].shape()
            if merge.adds_head and name == merge.head_source:  # beside the embeddings whose tensor it was
                assert merge.head_key is not None
                specs[merge.head_key] = merge.output_dtype(merge.head_key), entry.shape
    return shards


def write_shard(
    merge: Merge, shard: str, specs: Specs, path: Path, counts: Counts, progress: Callable[[int], None]
) -> None:
    """One file of the output; one expert in memory at a time. One that lies in two shards is merged for each."""
    source = merge.checkpoint.file(shard)
    with open(path, "xb") as file:
        writer = TensorFileWriter(file, specs, source.metadata)
        for name, spec in specs.items():
            if name in merge.expert_keys:
                continue
            if name == merge.head_key:
                writer.write(name, 0, merge.merged_head(counts))
            elif name in merge.whole_keys:
                writer.write(name, 0, merge.whole_piece(name))
            else:
                writer.copy(name, source, name)
            progress(tensor_bytes_count(*spec))
        for target, e in dict.fromkeys(expert for name in specs for expert in merge.expert_keys.get(name, ())):
            for merged in merge.expert_pieces(target, e):
                if merged.piece.key in specs:
                    rows, row_items = merged.piece.rows, merged.values[0].numel()
                    writer.write(merged.piece.key, 0 if rows is None else rows[0] * row_items, merged.values)
                    counts.add(target, e, merged)
                    progress(merged.values.nbytes)
        flush(file)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, chat template, licence: every file of the source's folder that is no weights."""
    for path in sorted(source.iterdir()):
        is_weights = any(suffix in WEIGHT_SUFFIXES for suffix in path.suffixes)
        if path.is_file() and not is_weights and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)


def exported_config(merge: Merge) -> dict[str, Any]:
    """The source's config.json. Where the written type is another, it says so: loading would round to the old one."""
    config: dict[str, Any] = json.loads((merge.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    if merge.dtype is not None:
        set_dtype(config, str(merge.dtype).removeprefix("torch."))
    if merge.unties_head:
        config["tie_word_embeddings"] = False
        for part in config.values():  # of a composite configuration
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    except_written(config, merge)
    return config


def except_written(config: dict[str, Any], merge: Merge) -> None:
    """Take what is written in 16 bits out of the quantisation that the configuration declares, or that out of it."""
    stored = merge.checkpoint.stored
    quantized = {key for key, tensor in stored.items() if tensor.format != "plain"}
    written = quantized & {*merge.expert_keys, *merge.whole_keys, merge.head_key}
    if not written:
        return
    modules = sorted({module_of(key, merge) for key in written}, key=dot_natural_key)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for name in ("quantization_config", "compression_config"):
            if name in part and written == quantized:
                del part[name]
            elif name in part:
                four_bit_left = any(isinstance(stored[key], FourBit) for key in quantized - written)
                except_modules(part[name], modules, four_bit_left)


def except_modules(quantization: dict[str, Any], modules: list[str], four_bit_left: bool) -> None:
    """Add modules to those that a quantisation leaves alone, each in the way of its loader."""
    if quantization.get("quant_method") != "compressed-tensors":
        listed = quantization.get("modules_to_not_convert") or []
        quantization["modules_to_not_convert"] = [*listed, *modules]
        return
    patterns = [f"re:{re.escape(module)}\\..*" for module in modules]
    quantization["ignore"] = [*(quantization.get("ignore") or []), *patterns]
    if not four_bit_left:  # transformers would look for four-bit experts as long as a group declares some
        groups = quantization["config_groups"].items()
        quantization["config_groups"] = {k: g for k, g in groups if (g.get("weights") or {}).get("num_bits") != 4}


def module_of(key: str, merge: Merge) -> str:
    """The checkpoint's name of the experts, the router, the norm or the head that a tensor belongs to."""
    before, found, _ = key.rpartition(".experts.")
    if found:
        return f"{before}.experts"
    if key in merge.whole_keys or key == merge.head_key:
        return key.rpartition(".")[0]
    return merge.expert_keys[key][0][0].rpartition(".")[0]


def set_dtype(config: dict[str, Any], name: str) -> None:
    """At the top, and in the parts of a composite configuration that say a type of their own."""
    config.pop("torch_dtype", None)
    config["dtype"] = name
    for part in config.values():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            set_dtype(part, name)
