"""A Hugging Face checkpoint, read a tensor at a time: what it holds is planned from the headers alone.

transformers' own conversion mapping says which checkpoint tensors make up which parameter (three tensors an expert in
Qwen3-MoE's files become one fused 3D parameter); we run its converters on one expert at a time, so that the peak is one
expert, not one layer. What a family's checkpoint looks like is therefore transformers' knowledge, not ours; where
`adapters` rewrite a family, they add to the mapping.

Left out here: writing back in the checkpoint's own names (export), FP8 and native 4-bit sources.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from usaf import adapters
from usaf.errors import UserError
from usaf.experts import EXPERTS_IMPLEMENTATION, find_layers, is_experts_module, projection_names
from usaf.tensor_file import TensorEntry, TensorFile, one_line

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
FLOAT_CODES = ("F32", "F16", "BF16", "F64")
WHOLE_CODES = ("I8", "I16", "I32", "I64", "U8", "BOOL")
# 4 KiB blocks of each shard that stand for its content where hashing 60 GB would take minutes.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096
HUB_SECONDS = 10.0  # the model hub must answer within these, or what is in its cache must do
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
HUB_NOT = ["*/*", "consolidated*"]  # the same weights again, in the formats of other programs


class Piece(NamedTuple):
    """A tensor of the checkpoint, or a span of its first dimension: what one expert, or one parameter, is made of."""

    key: str
    pattern: str  # the converter's for it
    rows: tuple[int, int] | None  # None: all of it


@dataclass
class Source:
    """The checkpoint tensors that make up one parameter of the model, in the order the converter wants them."""

    converter: WeightConverter | None
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
        self._files: dict[str, TensorFile] = {}
        self._check_shards()
        self.model = meta_model(self.config, attention)
        self.unexpected: list[str] = []
        self._patterns: dict[str, dict[str, list[str]]] = {}
        self.sources = self._plan()
        self._check_parameters()

    def file(self, shard: str) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(self.folder / shard)
        return self._files[shard]

    def entry(self, key: str) -> TensorEntry:
        return self.file(self.shards[key]).entries[key]

    def _check_shards(self) -> None:
        """Every tensor that the index names is in its shard. Headers only."""
        for shard in sorted(set(self.shards.values())):
            wanted = {key for key, at in self.shards.items() if at == shard}
            absent = sorted(wanted - set(self.file(shard).entries))
            if absent:
                raise UserError(f"{self.folder / INDEX_NAME}: says that {shard} holds {absent[0]}, which it does not; "
                                "index and shards are of different checkpoints, download them again")  # fmt: skip

    def _plan(self) -> dict[str, Source]:
        mapping = [*get_model_conversion_mapping(self.model), *adapters.conversions(self.model)]
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
            first, *others = converter.target_patterns if converter is not None else [""]
            for each in (target, *(target.replace(first, other) for other in others)):  # one tensor may make several
                sources.setdefault(each, Source(converter)).keys.append((key, pattern or key))
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
        code = self.entry(key).code
        if code not in FLOAT_CODES + WHOLE_CODES:
            raise UserError(f"{self.folder / self.shards[key]}: {key} has dtype {code}, which cannot be read yet; use "
                            f"a checkpoint in {', '.join(FLOAT_CODES)}")  # fmt: skip
        return self.file(self.shards[key]).dtype(key)

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._dtype(key)

    def _without_data(self, key: str) -> Tensor:
        return torch.empty(self.entry(key).shape, dtype=self._dtype(key), device="meta")

    def tensor(self, key: str) -> Tensor:
        """One tensor of the checkpoint under its own name."""
        return self.file(self.shards[key]).read(key)

    def dtype(self, target: str) -> torch.dtype:
        """What a parameter is stored in; its data are not read."""
        return self._dtype(self.sources[target].keys[0][0])

    def read(self, target: str) -> Tensor:
        """A whole parameter of the model, converted from its checkpoint tensors."""
        return self._assemble(target, self.sources[target].keys, self.tensor)

    def read_expert(self, target: str, e: int, num_experts: int) -> Tensor:
        """Expert e of a fused parameter [E, a, b], as [a, b]; nothing else of it is read."""
        pieces = self.expert_pieces(target, e, num_experts)
        if pieces is None:
            return self.read(target)[e]  # a converter that mixes experts: rare, and then a whole parameter at a time
        return self.assemble(target, pieces, [self.read_piece(piece) for piece in pieces])[0]

    def expert_pieces(self, target: str, e: int, num_experts: int) -> list[Piece] | None:
        """Where expert e of a fused parameter lies, in the converter's order: whole tensors, or rows of fused ones."""
        source = self.sources[target]
        operations = [] if source.converter is None else source.converter.operations
        if all(keeps_experts_apart(operation) for operation in operations):
            return [Piece(key, pattern, self._rows_of_expert(key, e, num_experts)) for key, pattern in source.keys]
        if not isinstance(operations[0], MergeModulelist):
            return None
        return [Piece(keys[e], pattern, None) for pattern, keys in self._by_pattern(target, num_experts).items()]

    def _rows_of_expert(self, key: str, e: int, num_experts: int) -> tuple[int, int]:
        """Of a tensor that holds all experts, one after another: the entries of its first dimension that are e's."""
        each = self.entry(key).shape[0] // num_experts
        return e * each, (e + 1) * each

    def piece_shape(self, piece: Piece) -> tuple[int, ...]:
        shape = self.entry(piece.key).shape
        return shape if piece.rows is None else (piece.rows[1] - piece.rows[0], *shape[1:])

    def read_piece(self, piece: Piece) -> Tensor:
        if piece.rows is None:
            return self.tensor(piece.key)
        return self.file(self.shards[piece.key]).read_rows(piece.key, *piece.rows)

    def assemble(self, target: str, pieces: list[Piece], tensors: list[Tensor]) -> Tensor:
        """What the converter makes of `tensors`, one for each piece."""
        found = iter(tensors)
        return self._assemble(target, [(piece.key, piece.pattern) for piece in pieces], lambda _: next(found))

    def _by_pattern(self, target: str, num_experts: int) -> dict[str, list[str]]:
        """The converter's pattern -> the tensors that match it, one for each expert where the experts are apart."""
        source = self.sources[target]
        if target in self._patterns:
            return self._patterns[target]
        by_pattern = self._patterns[target] = {}
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
        for key, pattern in keys:
            tensor: Any = read(key)  # (declared as a future of one)
            converter.add_tensor(target, key, pattern, tensor)
        value = converter.convert(target, model=self.model, config=self.config)[target]
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

    def num_layers(self) -> int:
        return len(find_layers(self.model)[1])

    def expert_parameters(self) -> dict[str, tuple[str, str]]:
        """The experts modules: name -> (full name of the first projection, of the second)."""
        found = {}
        for name, module in self.model.named_modules():
            if is_experts_module(module):
                up, down = projection_names(module)
                found[name] = (f"{name}.{up}", f"{name}.{down}")
        return found


def keeps_experts_apart(operation: Any) -> bool:
    """Whether a step of a converter leaves the first dimension, the experts', alone: then one expert's rows make the
    same of themselves as they do among all. Adapters mark steps of their own (`expertwise`)."""
    if type(operation) is Concatenate:
        return operation.dim > 0
    if type(operation) is Transpose:  # with check_dims it compares with the shape of the whole
        return operation.dim0 > 0 and operation.dim1 > 0 and not operation.check_dims
    return getattr(operation, "expertwise", False)


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


def read_index(folder: Path) -> dict[str, str]:
    """checkpoint key -> shard file name. A single file goes before an index, as in transformers."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return dict.fromkeys(TensorFile(single).entries, SINGLE_NAME)
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
    """The causal-LM class of a configuration; some are missing from the mapping and named in `architectures`."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        known: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return known
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise UserError(f"MODEL: transformers {transformers.__version__} has no causal language model for model_type "
                    f"{config.model_type} (architecture {name}); use an MoE language model it knows")  # fmt: skip


def meta_model(config: Any, attention: str | None = None) -> PreTrainedModel:
    """The model's modules without weights, its experts served by `experts_forward`.

    Raises:
        UserError: it has no MoE layers, or transformers cannot build it.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.output_router_logits = False  # the loss is ours; no auxiliary term
    if cls.config_class is type(text):  # the class of the text part alone, for a multimodal checkpoint too
        config = text
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
        adapters.adapt(model)
    if not any(is_experts_module(m) for m in model.modules()):
        raise UserError(f"MODEL: {config.model_type} has no MoE layers that transformers' experts interface or an "
                        "adapter serves; USAF trains experts, so choose a Mixture-of-Experts model")  # fmt: skip
    return model.eval()
