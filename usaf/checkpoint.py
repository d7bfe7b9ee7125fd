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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from usaf.errors import UserError
from usaf.experts import EXPERTS_IMPLEMENTATION, is_experts_module, projection_names
from usaf.skeleton import Handover, find_decoder, handover

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
READABLE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WHOLE_DTYPES = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
                "BOOL": torch.bool}  # fmt: skip
# 4 KiB blocks of each shard that stand for its content where hashing 60 GB would take minutes.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096
HUB_SECONDS = 10.0  # the model hub must answer within these, or what is in its cache must do
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
HUB_NOT = ["*/*", "consolidated*"]  # the same weights again, in the formats of other programs


@dataclass
class Source:
    """The checkpoint tensors that make up one parameter of the model, in the order the converter wants them."""

    converter: WeightConverter | None
    lead: str  # the parameter under whose name the converter collects; another one where it makes several of the same
    keys: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint key, the converter's pattern for it)


class Checkpoint:
    """`folder`, its `config`, the model class on the meta device (`model`), and the plan parameter -> Source.

    Raises:
        UserError: no checkpoint of an MoE language model, or not a whole one. All that headers tell is checked here,
            but that experts are there: they may all be in a 4-bit file.
    """

    def __init__(self, folder: Path, attention: str | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.shards = read_index(folder)
        self._files: dict[str, Any] = {}
        self._whole: tuple[str, Tensor] | None = None  # the last parameter that could not be read an expert at a time
        self._check_shards()
        self.model = meta_model(self.config, attention)
        self.unexpected: list[str] = []
        self.sources = self._plan()
        self._check_parameters()

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            self._files[shard] = open_shard(self.folder / shard)
        return self._files[shard]

    def _check_shards(self) -> None:
        """Every tensor that the index names is in its shard. Headers only."""
        for shard in sorted(set(self.shards.values())):
            wanted = {key for key, at in self.shards.items() if at == shard}
            absent = sorted(wanted - set(self._open(shard).keys()))
            if absent:
                raise UserError(f"{self.folder / INDEX_NAME}: says that {shard} holds {absent[0]}, which it does not; "
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
            for made in targets_of(converter, target):
                sources.setdefault(made, Source(converter, target)).keys.append((key, pattern or key))
        return sources

    def _check_parameters(self) -> None:
        """Every parameter has its tensors, in a dtype and of a shape that fit. Headers only: tensors without data."""
        wanted = self.model.state_dict()
        experts = {target for pair in self.expert_parameters().values() for target in pair}
        lacking = self.missing(sorted(set(wanted) - experts))
        if lacking:
            raise UserError(f"{self.folder}: has no tensor for {lacking[0]} ({len(lacking)} missing in all); the "
                            "checkpoint is incomplete or config.json is of another model, download it again"
                            )  # fmt: skip
        for target, source in self.sources.items():
            parameter = wanted[target]
            if target in experts:
                self._by_pattern(target, len(parameter))
            found = self._assemble(target, source.keys, self._without_data)
            if found.shape != parameter.shape:
                raise UserError(f"{self.folder}: {target} has shape {tuple(found.shape)}, config.json asks for "
                                f"{tuple(parameter.shape)}; the two are of different models, download them again"
                                )  # fmt: skip
            if parameter.is_floating_point() and not found.is_floating_point():
                raise UserError(f"{self.folder}: {target} is stored as {found.dtype}, which is no type of weights; use "
                                "the 16-bit checkpoint of this model")  # fmt: skip

    def _dtype(self, key: str) -> torch.dtype:
        code = self._open(self.shards[key]).get_slice(key).get_dtype()
        dtype = READABLE_DTYPES.get(code) or WHOLE_DTYPES.get(code)
        if dtype is None:
            raise UserError(f"{self.folder / self.shards[key]}: {key} has dtype {code}, which cannot be read yet; use "
                            f"a checkpoint in {', '.join(READABLE_DTYPES)}")  # fmt: skip
        return dtype

    def _without_data(self, key: str) -> Tensor:
        shape = self._open(self.shards[key]).get_slice(key).get_shape()
        return torch.empty(shape, dtype=self._dtype(key), device="meta")

    def tensor(self, key: str) -> Tensor:
        """One tensor of the checkpoint under its own name, mapped from the file."""
        return self._open(self.shards[key]).get_tensor(key)

    def dtype(self, target: str) -> torch.dtype:
        """What a parameter is stored in; its data are not read."""
        return self._dtype(self.sources[target].keys[0][0])

    def read(self, target: str) -> Tensor:
        """A whole parameter of the model, converted from its checkpoint tensors."""
        return self._assemble(target, self.sources[target].keys, self.tensor)

    def read_expert(self, target: str, e: int, num_experts: int) -> Tensor:
        """Expert e of a fused parameter [E, a, b], as [a, b]; nothing else of it is read."""
        source = self.sources[target]
        if source.converter is None:
            key = source.keys[0][0]
            return self._open(self.shards[key]).get_slice(key)[e]
        if not isinstance(source.converter.operations[0], MergeModulelist):
            # A converter that mixes experts: rare, and then a whole parameter at a time.
            if self._whole is None or self._whole[0] != target:
                self._whole = None
                self._whole = (target, self.read(target))
            return self._whole[1][e]
        by_pattern = self._by_pattern(target, num_experts)
        return self._assemble(target, [(keys[e], pattern) for pattern, keys in by_pattern.items()], self.tensor)[0]

    def _by_pattern(self, target: str, num_experts: int) -> dict[str, list[str]]:
        """The converter's pattern -> the tensors that match it, one for each expert where the experts are apart."""
        source = self.sources[target]
        by_pattern: dict[str, list[str]] = {}
        for key, pattern in source.keys:
            by_pattern.setdefault(pattern, []).append(key)
        if source.converter is None or not isinstance(source.converter.operations[0], MergeModulelist):
            return by_pattern
        for pattern in source.converter.source_patterns:
            keys = by_pattern.get(pattern, [])
            if len(keys) != num_experts:
                raise UserError(f"{self.folder}: {target} needs {num_experts} tensors like {pattern}, and the "
                                f"checkpoint has {len(keys)}; it is incomplete or config.json is of another model, "
                                "download it again")  # fmt: skip
        return by_pattern

    def _assemble(self, target: str, keys: Iterable[tuple[str, str]], read: Callable[[str], Tensor]) -> Tensor:
        """What the converter makes of these tensors, each read by `read`."""
        converter = copy.deepcopy(self.sources[target].converter)
        if converter is None:
            return read(next(iter(keys))[0])
        lead = self.sources[target].lead
        for key, pattern in keys:
            tensor: Any = read(key)  # (declared as a future of one)
            converter.add_tensor(lead, key, pattern, tensor)
        value = converter.convert(lead, model=self.model, config=self.model.config)[target]
        return value[0] if isinstance(value, list) else value

    def missing(self, targets: Iterable[str]) -> list[str]:
        tied = set(self.model.all_tied_weights_keys)
        return [t for t in targets if t not in self.sources and t not in tied]

    def sampled_fingerprint(self) -> str:
        """Sizes and evenly spaced blocks of every shard: tells another model, or the same one after a fine-tune."""
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
        """Drop the mapped files: on Windows these can be neither replaced nor deleted. Reading maps them again."""
        self._files.clear()
        self._whole = None

    @cached_property
    def handover(self) -> Handover:
        """What the model's layers hand on to each other. Asked before any module has weights."""
        return handover(self.model)

    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def moe_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        prefix = len(find_decoder(self.model)[1]) + 1
        return sorted({int(name[prefix:].split(".")[0]) for name in self.expert_parameters()})

    def expert_parameters(self) -> dict[str, tuple[str, str]]:
        """The experts modules of the text part: name -> (full name of the first projection, of the second)."""
        found = {}
        for name, module in self.model.named_modules():
            if is_experts_module(module) and name in self.handover.called:
                up, down = projection_names(module)
                found[name] = (f"{name}.{up}", f"{name}.{down}")
        return found


def targets_of(converter: WeightConverter | None, target: str) -> list[str]:
    """The parameters that a converter makes together, given the first of them."""
    patterns = [] if converter is None else converter.target_patterns
    return [target, *(target.replace(patterns[0], other) for other in patterns[1:])]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def open_shard(path: Path) -> Any:
    """The safetensors file, mapped, its header read."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path}: this file of the checkpoint is missing; download it again") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); check its rights") from None


def resolve_model(model: str) -> Path:
    """A local folder, or a model id whose files are fetched into the hub's own cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such folder; give a folder with config.json and safetensors files, or a "
                        "model id such as Qwen/Qwen3-30B-A3B")  # fmt: skip
    return from_hub(model)


def from_hub(model: str) -> Path:
    """The folder of a model id in the hub's cache, fetched there if need be.

    One short question goes first: without a network the hub's client may wait for minutes, and what is in the cache
    needs none.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except (OSError, ValueError, HTTPError) as error:
        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            raise unobtainable(model, error) from None
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT))
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise unobtainable(model, error) from None


def unobtainable(model: str, error: BaseException) -> UserError:
    return UserError(f"MODEL={model}: no such folder here, and the model hub could not give it "
                     f"({type(error).__name__}: {one_line(error)[:200]}); check the name and the network, or download "
                     "it and give the folder")  # fmt: skip


def read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"MODEL={folder}: has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        known = config_class_by_architecture(path)
        if known is not None:
            config = known.from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{path}: transformers {transformers.__version__} cannot read it ({one_line(error)[:300]}); a "
                        "newer transformers may know this model") from None  # fmt: skip
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(f"{path}: the weights are already quantised ({method}), which is not supported yet; use the "
                        "16-bit checkpoint of this model")  # fmt: skip
    return config


def config_class_by_architecture(path: Path) -> Any:
    """The configuration class of a checkpoint whose model_type only remote code knows (kimi_k2), but whose architecture
    is one of transformers' own (DeepseekV3ForCausalLM); else None."""
    given = json.loads(path.read_text(encoding="utf-8"))
    architecture = getattr(transformers, (given.get("architectures") or ["none"])[0], None)
    if given.get("model_type") in CONFIG_MAPPING or not isinstance(architecture, type):
        return None
    return getattr(architecture, "config_class", None)


def read_index(folder: Path) -> dict[str, str]:
    """checkpoint key -> shard file name. A single file goes before an index, as in transformers."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return dict.fromkeys(open_shard(single).keys(), SINGLE_NAME)
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError):
            weight_map = None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: is not a checkpoint index (JSON with a weight_map); download it again")
        return weight_map
    hint = "; convert its .bin files with save_pretrained first" if list(folder.glob("*.bin")) else ""
    raise UserError(
        f"MODEL={folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}; give a checkpoint in safetensors{hint}"
    )


def model_class(config: Any) -> type[PreTrainedModel]:
    """The language-model class of a configuration: the text part alone where transformers reads it so, else the whole.

    Some are missing from the causal-LM mapping and named in `architectures`, or are multimodal models, whose text part
    is what trains; remote code's names for these are not transformers' own.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        known: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return known
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if type(config) in AutoModelForImageTextToText._model_mapping:
        multimodal: Any = AutoModelForImageTextToText._model_mapping[type(config)]
        return multimodal
    raise UserError(f"MODEL: transformers {transformers.__version__} has no causal language model for model_type "
                    f"{config.model_type} (architecture {name}); use an MoE language model it knows")  # fmt: skip


def meta_model(config: Any, attention: str | None = None) -> PreTrainedModel:
    """The model's modules without weights, its experts served by `experts_forward`.

    Raises:
        UserError: it has no MoE layers, or transformers cannot build it.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)
    if not isinstance(config, cls.config_class):  # type: ignore[arg-type]  # a multimodal model, read for its text part
        config = config.get_text_config()
    config.get_text_config().output_router_logits = False  # the loss is ours; no auxiliary term
    try:
        with torch.device("meta"):
            model = cls._from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention,
                experts_implementation=EXPERTS_IMPLEMENTATION,
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"MODEL: transformers {transformers.__version__} cannot build {cls.__name__} from config.json "
                        f"({one_line(error)[:300]})") from None  # fmt: skip
    if not any(is_experts_module(m) for m in model.modules()):
        raise UserError(f"MODEL: {config.model_type} has no MoE layers that transformers' experts interface serves; "
                        "USAF trains experts, so choose a Mixture-of-Experts model")  # fmt: skip
    return model.eval()
