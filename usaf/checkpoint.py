"""A Hugging Face checkpoint, read a tensor at a time: what it holds is planned from the headers alone.

transformers' own conversion mapping says which checkpoint tensors make up which parameter (three tensors an expert in
Qwen3-MoE's files become one fused 3D parameter); we run its converters on one expert at a time, so that the peak is one
expert, not one layer. What a family's checkpoint looks like is therefore transformers' knowledge, not ours.

Left out here: writing back in the checkpoint's own names (export), FP8 and native 4-bit sources.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from usaf.errors import UserError
from usaf.experts import EXPERTS_IMPLEMENTATION, is_experts_module, projection_names

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
READABLE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# 4 KiB blocks of each shard that stand for its content where hashing 60 GB would take minutes.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096


@dataclass
class Source:
    """The checkpoint tensors that make up one parameter of the model, in the order the converter wants them."""

    converter: WeightConverter | None
    keys: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint key, the converter's pattern for it)


class Checkpoint:
    """`folder`, its `config`, the model class on the meta device (`model`), and the plan parameter -> Source."""

    def __init__(self, folder: Path, attention: str | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.shards = read_index(folder)
        self._files: dict[str, Any] = {}
        self._check_shards()
        self.model = meta_model(self.config, attention)
        self.unexpected: list[str] = []
        self.sources = self._plan()

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            path = self.folder / shard
            try:
                self._files[shard] = safe_open(path, "pt")
            except FileNotFoundError:
                raise UserError(f"{path}: this shard of the checkpoint is missing; download it again") from None
            except SafetensorError as error:
                raise UserError(
                    f"{path}: not a whole safetensors file ({one_line(error)}); download it again"
                ) from None
        return self._files[shard]

    def _check_shards(self) -> None:
        """Every tensor that the index names is in its shard, in a dtype that can be read. Headers only."""
        for shard in sorted(set(self.shards.values())):
            file = self._open(shard)
            held = set(file.keys())
            for key in (k for k, s in self.shards.items() if s == shard):
                if key not in held:
                    raise UserError(f"{self.folder / INDEX_NAME}: says that {shard} holds {key}, which it does not; "
                                    "index and shards are of different checkpoints, download them again")  # fmt: skip

    def _plan(self) -> dict[str, Source]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        wanted, prefix = self.model.state_dict(), self.model.base_model_prefix
        sources: dict[str, Source] = {}
        # The natural order (2 before 10) is what puts expert e at place e of every list.
        for key in sorted(self.shards, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = rename_source_key(key, [], [], prefix, wanted)
            if target not in wanted:
                self.unexpected.append(key)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            sources.setdefault(target, Source(converter)).keys.append((key, pattern or key))
        return sources

    def tensor(self, key: str) -> Tensor:
        """One tensor of the checkpoint under its own name, mapped from the file."""
        file = self._open(self.shards[key])
        dtype = file.get_slice(key).get_dtype()
        if dtype not in READABLE_DTYPES and not dtype.startswith(("I", "U", "BOOL")):
            raise UserError(f"{self.folder / self.shards[key]}: {key} has dtype {dtype}, which cannot be read yet; "
                            f"use a checkpoint in {', '.join(READABLE_DTYPES)}")  # fmt: skip
        return file.get_tensor(key)

    def read(self, target: str) -> Tensor:
        """A whole parameter of the model, converted from its checkpoint tensors."""
        source = self.sources[target]
        if source.converter is None:
            return self.tensor(source.keys[0][0])
        return self._convert(target, source, [(key, pattern) for key, pattern in source.keys])

    def read_expert(self, target: str, e: int, num_experts: int) -> Tensor:
        """Expert e of a fused parameter [E, a, b], as [a, b]; nothing else of it is read."""
        source = self.sources[target]
        if source.converter is None:
            return self._open(self.shards[source.keys[0][0]]).get_slice(source.keys[0][0])[e]
        if not isinstance(source.converter.operations[0], MergeModulelist):
            return self.read(target)[e]  # a converter that mixes experts: rare, and then a whole parameter at a time
        by_pattern: dict[str, list[str]] = {}
        for key, pattern in source.keys:
            by_pattern.setdefault(pattern, []).append(key)
        for pattern, keys in by_pattern.items():
            if len(keys) != num_experts:
                raise UserError(f"{self.folder}: {target} needs {num_experts} tensors like {keys[0]}, and the checkpoint "
                                f"has {len(keys)}; it is incomplete, download it again")  # fmt: skip
        return self._convert(target, source, [(keys[e], pattern) for pattern, keys in by_pattern.items()])[0]

    def _convert(self, target: str, source: Source, keys: Iterable[tuple[str, str]]) -> Tensor:
        converter = copy.deepcopy(source.converter)
        assert converter is not None
        for key, pattern in keys:
            converter.add_tensor(target, key, pattern, self.tensor(key))
        value = converter.convert(target, model=self.model, config=self.config)[target]
        return value[0] if isinstance(value, list) else value

    def missing(self, targets: Iterable[str]) -> list[str]:
        tied = set(self.model.all_tied_weights_keys)
        return [t for t in targets if t not in self.sources and t not in tied]

    def sampled_fingerprint(self) -> str:
        """Headers and evenly spaced blocks of every shard: tells another model, or the same one after a fine-tune."""
        digest = hashlib.sha256()
        for shard in sorted(set(self.shards.values())):
            path = self.folder / shard
            size = path.stat().st_size
            digest.update(f"{shard} {size}".encode())
            with open(path, "rb") as file:
                for i in range(SAMPLED_BLOCKS):
                    file.seek(max(0, (size - BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1)))
                    digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Drop the mapped files: on Windows a mapped file can be neither replaced nor deleted."""
        self._files.clear()

    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def expert_parameters(self) -> dict[str, tuple[str, str]]:
        """The experts modules: name -> (full name of the first projection, of the second)."""
        found = {}
        for name, module in self.model.named_modules():
            if is_experts_module(module):
                up, down = projection_names(module)
                found[name] = (f"{name}.{up}", f"{name}.{down}")
        return found


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def resolve_model(model: str) -> Path:
    """A local folder, or a model id whose files are fetched into the hub's own cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such folder; give a folder with config.json and safetensors files, or a "
                        "model id such as Qwen/Qwen3-30B-A3B")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"MODEL={model}: no such folder here, and the model hub could not give it "
                        f"({type(error).__name__}: {one_line(error)[:200]}); check the name and the network, or download "
                        "it and give the folder") from None  # fmt: skip


def read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"MODEL={folder}: has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: transformers {transformers.__version__} cannot read it ({one_line(error)[:300]}); a newer "
                        "transformers may know this model") from None  # fmt: skip
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(f"{path}: the weights are already quantised ({method}), which is not supported yet; use the 16-bit "
                        "checkpoint of this model")  # fmt: skip
    return config


def read_index(folder: Path) -> dict[str, str]:
    """checkpoint key -> shard file name."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError):
            raise UserError(f"{index}: is not a checkpoint index (JSON with a weight_map); download it again") from None
        return dict(weight_map)
    path = folder / SINGLE_NAME
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                return {key: SINGLE_NAME for key in file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}); download it again") from None
    hint = "; convert its .bin files with save_pretrained first" if list(folder.glob("*.bin")) else ""
    raise UserError(
        f"MODEL={folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}; give a checkpoint in safetensors{hint}"
    )


def model_class(config: Any) -> type[PreTrainedModel]:
    """The causal-LM class of a configuration; some are missing from the mapping and named in `architectures`."""
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        name = (config.architectures or ["none"])[0]
        if hasattr(transformers, name):
            return getattr(transformers, name)
        raise UserError(f"MODEL: transformers {transformers.__version__} has no causal language model for model_type "
                        f"{config.model_type} (architecture {name}); use an MoE language model it knows") from None  # fmt: skip


def meta_model(config: Any, attention: str | None = None) -> PreTrainedModel:
    """The model's modules without weights, its experts served by `experts_forward`.

    Raises:
        UserError: it has no MoE layers.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)
    config.get_text_config().output_router_logits = False  # the loss is ours; no auxiliary term
    with torch.device("meta"):
        model = cls._from_config(
            config, dtype=torch.float32, attn_implementation=attention, experts_implementation=EXPERTS_IMPLEMENTATION
        )
    if not any(is_experts_module(m) for m in model.modules()):
        raise UserError(f"MODEL: {config.model_type} has no MoE layers that transformers' experts interface serves; USAF "
                        "trains experts, so choose a Mixture-of-Experts model")  # fmt: skip
    return model.eval()
