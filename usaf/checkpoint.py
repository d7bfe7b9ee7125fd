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
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    core_model_loading,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from usaf import adapters
from usaf.errors import UserError
from usaf.experts import EXPERTS_IMPLEMENTATION, is_experts_module, projection_names
from usaf.quantization import Encoding, QuantizedTensor
from usaf.skeleton import Handover, find_decoder, handover
from usaf.source_formats import FourBit, Quantization, logical_tensors, read_quantization
from usaf.tensor_file import Shards, TensorEntry, TensorFile, one_line

JOINING = tuple(  # operations along one dimension `dim`; transformers 5.13 has only the first
    getattr(core_model_loading, name)
    for name in ("Concatenate", "Interleave")
    if hasattr(core_model_loading, name)
)  # fmt: skip
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
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
    """The logical tensors that make up one parameter of the model, in the order the converter wants them."""

    converter: WeightConverter | None
    lead: str  # the parameter under whose name the converter collects; another one where it makes several of the same
    keys: list[tuple[str, str]] = field(default_factory=list)  # (logical key, the converter's pattern for it)

    @property
    def experts_apart(self) -> bool:
        """Whether each expert has tensors of its own."""
        return self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist)


class _OneExpert:
    """The model as a converter sees it that works on a part of a fused parameter: shapes are those of that part."""

    def __init__(self, model: PreTrainedModel, shapes: dict[str, torch.Size], count: int) -> None:
        self.model, self.shapes, self.count = model, shapes, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty((self.count, *self.shapes[name][1:]), device="meta")


class Checkpoint:
    """`folder`, its `config`, the model class on the meta device (`model`), and the plan parameter -> Source.

    `shards`: the file's own tensors -> their file; `stored`: the logical tensors; `quantization`: what config.json says
    of weights that are not in 16 bits, None where they are.

    Raises:
        UserError: no checkpoint of an MoE language model, or not a whole one. All that headers tell is checked here,
            but that experts are there: they may all be in a 4-bit file.
    """

    def __init__(self, folder: Path, attention: str | None = None) -> None:
        self.folder = folder
        self.config, self.quantization = read_config(folder)
        self.shards = read_index(folder)
        self.raw = Shards(folder, self.shards)
        self._sharing: dict[str, bool] = {}  # leading parameter -> what `_shares_its_lists` has found
        self._whole: tuple[str, Tensor] | None = None  # the last parameter that could not be read an expert at a time
        self._check_shards()
        self.stored = logical_tensors(self.raw, self.quantization)
        self.model = meta_model(self.config, attention)
        self.unexpected: list[str] = []
        self._patterns: dict[str, dict[str, list[str]]] = {}
        # Of the model as transformers builds it: later, banks take the place of its experts.
        self.shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self.sources = self._plan()
        self._check_parameters()

    def file(self, shard: str) -> TensorFile:
        return self.raw.file(shard)

    def entry(self, key: str) -> TensorEntry:
        """Of one of the file's own tensors."""
        return self.raw.entry(key)

    def parts(self, key: str) -> tuple[str, ...]:
        """The file's own tensors that make up a logical one: itself, or codes, scales and what else belongs to them."""
        return self.stored[key].parts

    def format(self, key: str) -> str:
        """How a logical tensor is stored: "plain", "fp8", "int4", "fp4" or "mxfp4" (see `source_formats`)."""
        return self.stored[key].format

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
        for key in sorted(self.stored, key=dot_natural_key):
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
                self.four_bit(target)
            found = self._assemble(target, source.keys, self._without_data)
            if found.shape != parameter.shape:
                raise UserError(f"{self.folder}: {target} has shape {tuple(found.shape)}, config.json asks for "
                                f"{tuple(parameter.shape)}; the two are of different models, download them again"
                                )  # fmt: skip
            if parameter.is_floating_point() and not found.is_floating_point():
                raise UserError(f"{self.folder}: {target} is stored as {found.dtype}, which is no type of weights; use "
                                "the 16-bit checkpoint of this model")  # fmt: skip

    def stored_dtype(self, key: str) -> torch.dtype:
        """The type in which a logical tensor is read."""
        return self.stored[key].dtype()

    def _without_data(self, key: str) -> Tensor:
        stored = self.stored[key]
        return torch.empty(stored.shape(), dtype=stored.dtype(), device="meta")

    def tensor(self, key: str) -> Tensor:
        """One logical tensor of the checkpoint."""
        return self.stored[key].read()

    def dtype(self, target: str) -> torch.dtype:
        """What a parameter is read in; its data are not read."""
        return self.stored[self.sources[target].keys[0][0]].dtype()

    def read(self, target: str) -> Tensor:
        """A whole parameter of the model, converted from its checkpoint tensors."""
        return self._assemble(target, self.sources[target].keys, self.tensor)

    def read_expert(self, target: str, e: int, num_experts: int) -> Tensor:
        """Expert e of a fused parameter [E, a, b], as [a, b]; nothing else of it is read."""
        pieces = self.expert_pieces(target, e, num_experts)
        if pieces is None:
            # A converter that mixes experts: rare, and then a whole parameter at a time.
            if self._whole is None or self._whole[0] != target:
                self._whole = None
                self._whole = (target, self.read(target))
            return self._whole[1][e]
        return self.assemble(target, pieces, [self.read_piece(piece) for piece in pieces], 1)[0]

    def expert_pieces(self, target: str, e: int, num_experts: int) -> list[Piece] | None:
        """Where expert e of a fused parameter lies, in the converter's order: whole tensors, or rows of fused ones."""
        source = self.sources[target]
        if source.experts_apart:
            return [Piece(keys[e], pattern, None) for pattern, keys in self._by_pattern(target, num_experts).items()]
        if self._shares_its_lists(target, num_experts):
            first = self._made_together(target).index(target) * num_experts
            lists = self._by_pattern(target, num_experts).items()
            return [Piece(keys[first + e], pattern, None) for pattern, keys in lists]
        if not expert_by_expert(source.converter):
            return None
        return [Piece(key, pattern, self._rows_of_expert(key, e, num_experts)) for key, pattern in source.keys]

    def _made_together(self, target: str) -> list[str]:
        """The parameters that the converter of `target` makes of the same tensors, itself included."""
        source = self.sources[target]
        return targets_of(source.converter, source.lead)

    def _shares_its_lists(self, target: str, num_experts: int) -> bool:
        """Whether the converter cuts lists of experts' tensors into those of several parameters, one after another's.

        As ERNIE-4.5-VL's does: experts of text, then of vision. Asked of the converter by tensors that hold a number.
        """
        source, made = self.sources[target], self._made_together(target)
        lists = list(self._by_pattern(target, num_experts).values())
        if len(made) == 1 or any(len(keys) != len(made) * num_experts for keys in lists):
            return False
        if source.lead not in self._sharing:
            number = {key: i for i, (key, _) in enumerate(source.keys)}
            found = self._assemble(target, source.keys, lambda key: torch.full((1, 1), number[key]))
            first = made.index(target) * num_experts
            expected = [sorted(number[keys[first + e]] for keys in lists) for e in range(num_experts)]
            self._sharing[source.lead] = [sorted(expert.flatten().tolist()) for expert in found] == expected
        return self._sharing[source.lead]

    def _rows_of_expert(self, key: str, e: int, num_experts: int) -> tuple[int, int]:
        """Of a tensor that holds all experts, one after another: the entries of its first dimension that are e's."""
        each = self.stored[key].shape()[0] // num_experts
        return e * each, (e + 1) * each

    def piece_shape(self, piece: Piece) -> tuple[int, ...]:
        shape = self.stored[piece.key].shape()
        return shape if piece.rows is None else (piece.rows[1] - piece.rows[0], *shape[1:])

    def read_piece(self, piece: Piece) -> Tensor:
        stored = self.stored[piece.key]
        return stored.read() if piece.rows is None else stored.read_rows(*piece.rows)

    def assemble(self, target: str, pieces: list[Piece], tensors: list[Tensor], experts: int | None = None) -> Tensor:
        """What the converter makes of `tensors`, one for each piece. experts: how many of a fused parameter's."""
        found = iter(tensors)
        keys = [(piece.key, piece.pattern) for piece in pieces]
        return self._assemble(target, keys, lambda _: next(found), experts)

    def four_bit(self, target: str) -> Encoding | None:
        """The encoding of an expert parameter that is stored in four bits, to be used as it is; None where it is not.

        Raises:
            UserError: only a part of it is, or in several ways, or in one that cannot be joined.
        """
        source = self.sources[target]
        stored = [self.stored[key] for key, _ in source.keys]
        if not any(isinstance(s, FourBit) for s in stored):
            return None
        kinds = {(s.encoding(), s.transposed) if isinstance(s, FourBit) else None for s in stored}
        (encoding, transposed), *others = (kind for kind in kinds if kind is not None)
        if others or None in kinds:
            raise UserError(f"{self.folder}: the experts of {target} are stored in several ways (as {encoding.name} in "
                            f"groups of {encoding.group_size}, and otherwise); use a checkpoint in which they are alike"
                            )  # fmt: skip
        module = self.model.get_submodule(target.rpartition(".")[0])
        if transposed != bool(module.is_transposed) or not in_rows(source.converter):
            raise UserError(f"{self.folder}: {target} is stored in four bits along another dimension than this family "
                            "needs; use this model in 16 bits")  # fmt: skip
        return encoding

    def read_four_bit(self, target: str, e: int, num_experts: int) -> QuantizedTensor:
        """Expert e of a parameter that is stored in four bits: [1, out, in], codes and scales as they are.

        The converter joins and reorders rows, which is the same work for codes and for scales, so it does each alone.
        """
        pieces = self.expert_pieces(target, e, num_experts)
        assert pieces is not None, "a converter that joins rows keeps experts apart"
        read: list[QuantizedTensor] = []
        for piece in pieces:
            stored = self.stored[piece.key]
            assert isinstance(stored, FourBit)
            read.append(stored.quantized(*(piece.rows or ())))
        joined = {}
        for part in read[0].tensors():
            # A tensor of one expert alone has two dimensions in the checkpoint.
            alone = zip(pieces, read, strict=True)
            tensors = [q.tensors()[part][0] if p.rows is None else q.tensors()[part] for p, q in alone]
            joined[part] = self.assemble(target, pieces, tensors, 1)
        return read[0].replace(joined, (1, joined["packed"].shape[1], read[0].shape[2]))

    def _by_pattern(self, target: str, num_experts: int) -> dict[str, list[str]]:
        """The converter's pattern -> the tensors that match it, one for each expert where the experts are apart."""
        source = self.sources[target]
        if target in self._patterns:
            return self._patterns[target]
        by_pattern = self._patterns[target] = {}
        for key, pattern in source.keys:
            by_pattern.setdefault(pattern, []).append(key)
        if source.converter is None or not source.experts_apart:
            return by_pattern
        for pattern in source.converter.source_patterns:
            keys = by_pattern.get(pattern, [])
            if len(keys) != num_experts:
                raise UserError(f"{self.folder}: {target} needs {num_experts} tensors like {pattern}, and the "
                                f"checkpoint has {len(keys)}; it is incomplete or config.json is of another model, "
                                "download it again")  # fmt: skip
        return by_pattern

    def _assemble(self, target: str, keys: Iterable[tuple[str, str]], read: Callable[[str], Tensor],
                  experts: int | None = None) -> Tensor:  # fmt: skip
        """What the converter makes of these tensors, each read by `read`. experts: how many of a fused parameter's."""
        converter = copy.deepcopy(self.sources[target].converter)
        if converter is None:
            return read(next(iter(keys))[0])
        lead = self.sources[target].lead
        # Of a list that is cut into several parameters' experts, one expert alone stands for that of each.
        copies = len(self._made_together(target)) if experts is not None and self._sharing.get(lead) else 1
        for key, pattern in keys:
            tensor: Any = read(key)  # (declared as a future of one)
            for _ in range(copies):
                converter.add_tensor(lead, key, pattern, tensor)
        model: Any = self.model if experts is None else _OneExpert(self.model, self.shapes, experts)
        value = converter.convert(lead, model=model, config=self.model.config)[target]
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

    @cached_property
    def handover(self) -> Handover:
        """What the model's layers hand on to each other. Asked before any module has weights."""
        return handover(self.model)

    def num_layers(self) -> int:
        return len(find_decoder(self.model)[2])

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


def dimensions(converter: WeightConverter | None) -> set[int | None]:
    """The dimensions of a fused parameter [E, a, b] that a converter joins or reorders, None for what it does else."""
    found: set[int | None] = set()
    for operation in () if converter is None else converter.operations:
        if isinstance(operation, Transpose):
            found |= {operation.dim0 % 3, operation.dim1 % 3}
        elif isinstance(operation, JOINING):
            found.add(operation.dim % 3)
        elif getattr(operation, "expertwise", False):  # an adapter's own
            found |= {1, 2}
        elif not isinstance(operation, MergeModulelist):
            found.add(None)
    return found


def expert_by_expert(converter: WeightConverter | None) -> bool:
    return dimensions(converter) <= {1, 2}


def in_rows(converter: WeightConverter | None) -> bool:
    """Whether whole rows are joined and reordered, within an expert, and nothing else."""
    return dimensions(converter) <= {1}


def read_config(folder: Path) -> tuple[Any, Quantization | None]:
    """The configuration, and what it says of weights that are not in 16 bits (taken out of it: we dequantise)."""
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
    quantization = read_quantization(config, path)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config, quantization


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
        adapters.adapt(model)
    if not any(is_experts_module(m) for m in model.modules()):
        raise UserError(f"MODEL: {config.model_type} has no MoE layers that transformers' experts interface or an "
                        "adapter serves; USAF trains experts, so choose a Mixture-of-Experts model")  # fmt: skip
    return model.eval()
