"""A stand-in for a published MoE model: its exact configuration and plausible random weights, in minutes.

    python scripts/make_fullsize.py --output qwen3-30b-a3b --data-rows 256
    python scripts/make_fullsize.py --output small --model mixtral-8x7b --layers 4

The folder is a checkpoint whose experts are in 4 bits from the beginning (`experts_q4.safetensors`, written by
`usaf.expert_store`'s own names and types) and whose other tensors are bf16 shards with an index; no 16-bit copy of an
expert ever exists, neither in memory nor on the disk. All else takes it as any model.

Weights come from random 16-bit words that index tables of 65,536 entries, which is faster than the disk:

    dense      quantiles of a normal distribution, in bf16
    codes      four at a time, as HQQ gives them for normal weights: mean 7.5, standard deviation `CODE_STD`
    scales     log-normal from group to group; offset = -(mean code + jitter) scale, so that decoded weights have mean
               zero and standard deviation `WEIGHT_STD`

Projections that add to the residual stream (attention's output, the experts' second) are smaller by sqrt(2 layers), as
in GPT-2, so that hidden states keep their size through all layers; embeddings have standard deviation `EMBEDDING_STD`.
Were they as small as the other weights, the mean that random attention adds to every token alike would drown them in a
few layers, and all tokens would choose the same experts. The rows of a router differ in length, log-normally by
`ROUTER_SPREAD`: long ones win more often, so that some experts get three times their share and some a tenth.

A tensor's bytes depend on the seed and its name alone, not on the number of layers. `data.jsonl`: sequences of random
token ids by Zipf's law, as frequent words are in text.

Left out: a tokenizer; anything that was learnt, so losses stay near ln(vocabulary).

Source: GPT-2's initialisation (Radford et al. 2019) for the residual projections.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf.console import Parser, add_json_flag, phase, run_command, say
from usaf.errors import RunError, UserError
from usaf.files import existing_parent, flush, flush_folder, require_space, require_writable, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from usaf.quantization import Encoding
    from usaf.tensor_file import TensorFileWriter

WEIGHT_STD = 0.02
EMBEDDING_STD = 1.0  # but that of other weights where the head is tied to them, or its logits would be huge
CODE_STD = 2.87  # of HQQ's codes for groups of 128 normal weights, whose range is 5.2 standard deviations
SCALE_SPREAD, OFFSET_JITTER = 0.15, 0.3  # of ln(scale); of the offset, in codes
ROUTER_LOGIT_STD, ROUTER_SPREAD = 1.5, 0.15  # of the logits; of ln(length) of a router's rows
NORM_SPREAD = 0.05  # of the norms' weights around 1
RESIDUAL = ("o_proj.weight", "down_proj", "down_proj.weight")  # how the projections end that add to the residual stream
SHARD_BYTES = 10**9
BLOCK_WORDS = 1 << 17  # random words at a time: word and what it becomes stay in cache
DATA_BYTES_A_TOKEN = 2 * 8  # of data.jsonl, at most: twice a number of six digits, a comma and a space
HEAD_ROOM_BYTES = 1 << 20  # for config.json and headers

Progress = Callable[[int], object]
"""Called with the number of bytes just written."""


@dataclass(frozen=True)
class Sizes:
    """What a folder holds. Bytes are those of the tensors, without headers."""

    parameters: int
    expert_parameters: int
    experts_bytes: int
    dense_bytes: int


def published_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (transformers' configuration class, what its config.json says beyond that class's defaults)."""
    qwen3: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "bos_token_id": 151643, "eos_token_id": 151645, "router_aux_loss_coef": 0.001,
    }  # fmt: skip
    mixtral: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "bos_token_id": 1, "eos_token_id": 2, "router_aux_loss_coef": 0.02, "sliding_window": None,
    }  # fmt: skip
    olmoe: dict[str, Any] = {
        "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "clip_qkv": None, "pad_token_id": 1, "eos_token_id": 50279, "router_aux_loss_coef": 0.01,
    }  # fmt: skip
    return {
        "qwen3-30b-a3b": ("Qwen3MoeConfig", qwen3),
        "mixtral-8x7b": ("MixtralConfig", mixtral),
        "olmoe-1b-7b": ("OlmoeConfig", olmoe),
    }


def published_config(name: str, layers: int | None = None) -> Any:
    """The configuration object of one of these models, with fewer layers where `layers` is given."""
    import transformers

    cls, said = published_configs()[name]
    said = {**said, "tie_word_embeddings": False, "dtype": "bfloat16"}
    said["rope_parameters"] = {"rope_type": "default", "rope_theta": said.pop("rope_theta")}
    if layers is not None:
        said["num_hidden_layers"] = layers
    return getattr(transformers, cls)(**said)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python scripts/make_fullsize.py", "A published MoE model's shape with random weights in 4 bits.")
    configs = published_configs()
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--model", choices=list(configs), default="qwen3-30b-a3b", help="default: qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="only the first so many layers (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-rows", type=int, default=0, help="also write data.jsonl with so many sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each of them (default: 512)")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    for name, least in (("layers", 1), ("seed", 0), ("data_rows", 0), ("seq_len", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    config = configs[arguments.model][1]
    for name, key, what in (("layers", "num_hidden_layers", "layers"),
                            ("seq_len", "max_position_embeddings", "tokens of context")):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value > config[key]:
            raise UserError(f"--{name.replace('_', '-')} {value}: {arguments.model} has {config[key]} {what}; choose "
                            "at most that")  # fmt: skip
    return arguments


def make_command(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        raise UserError(f"--output {arguments.output}: is not an empty folder; name another one")
    began = time.perf_counter()
    config = published_config(arguments.model, arguments.layers)
    depth = published_configs()[arguments.model][1]["num_hidden_layers"]
    sizes = make(config, arguments.output, arguments.seed, depth, arguments.data_rows, arguments.seq_len)
    seconds = time.perf_counter() - began
    written = sizes.experts_bytes + sizes.dense_bytes
    say(f"{arguments.output}: {arguments.model}, {config.num_hidden_layers} of {depth} layers, "
        f"{sizes.parameters:,} parameters, {sizes.expert_parameters:,} of them of experts; {written / 1e9:.2f} GB in "
        f"{seconds:.0f} s ({written / seconds / 1e6:.0f} MB/s)")  # fmt: skip
    if arguments.json is not None:
        write_json(arguments.json, {
            "model": arguments.model, "output": str(arguments.output), "layers": config.num_hidden_layers,
            "layers_published": depth, "seed": arguments.seed, "parameters": sizes.parameters,
            "expert_parameters": sizes.expert_parameters, "experts_bytes": sizes.experts_bytes,
            "dense_bytes": sizes.dense_bytes, "data_rows": arguments.data_rows, "seq_len": arguments.seq_len,
            "seconds_total": seconds, "bytes_per_second": written / seconds,
        })  # fmt: skip
    return 0


def make(config: Any, output: Path, seed: int, depth: int, data_rows: int = 0, seq_len: int = 512) -> Sizes:
    """The folder, complete or absent: config.json, shards with their index, the 4-bit file, data.jsonl.

    depth: layers of the whole model, by which residual projections are scaled.

    Raises:
        UserError: the disk is too small for it. RunError: it could not be written.
    """
    plan = Plan(config, seed, depth)
    sizes = plan.sizes()
    total = sizes.experts_bytes + sizes.dense_bytes
    needed = total + HEAD_ROOM_BYTES + data_rows * seq_len * DATA_BYTES_A_TOKEN
    require_space(output, needed, "the model", "free some, or choose fewer --layers")
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with phase("write", total, "B") as bar:
            plan.write(partial, bar.update)
        if data_rows:
            write_data(partial / "data.jsonl", config.vocab_size, data_rows, seq_len, seed)
        flush_folder(partial)
        if output.exists():
            output.rmdir()
        os.rename(partial, output)
        flush_folder(existing_parent(output.parent))
    except OSError as error:
        raise RunError(f"--output {output}: could not be written ({error.strerror or error}); free space, or name "
                       "another folder") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sizes


class Plan:
    """Which tensors there are, and how each is drawn.

    dense: published name -> shape; experts: fused parameter -> (E, out, in); routers: the published names of theirs.
    """

    def __init__(self, config: Any, seed: int, depth: int) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        from usaf.architecture import meta_model
        from usaf.experts import is_experts_module, projection_names
        from usaf.model import find_router
        from usaf.quantization import hqq_encoding
        from usaf.settings import Settings

        self.config, self.seed, self.depth = config, seed, depth
        self.encoding: Encoding = hqq_encoding(Settings().group_size, Settings().quant_bits)
        model = meta_model(config)
        routers = set()
        self.experts: dict[str, tuple[int, int, int]] = {}
        for name, module in model.named_modules():
            if is_experts_module(module):
                block, _, own = name.rpartition(".")
                assert not module.is_transposed
                for parameter in (f"{name}.{projection}" for projection in projection_names(module)):
                    experts, rows, columns = model.get_parameter(parameter).shape
                    self.experts[parameter] = (experts, rows, columns)
                routers.add(f"{block}.{find_router(model.get_submodule(block), own, experts)}.weight")
        self.dense: dict[str, tuple[int, ...]] = {}
        self.routers: set[str] = set()
        for name, tensor in model.state_dict().items():
            if name in self.experts or name in model.all_tied_weights_keys:
                continue
            (published,) = revert_weight_conversion(model, {name: tensor})
            self.dense[published] = tuple(tensor.shape)
            if name in routers:
                self.routers.add(published)

    def sizes(self) -> Sizes:
        specs = [self.encoding.tensors(shape) for shape in self.experts.values()]
        dense = sum(math.prod(shape) for shape in self.dense.values())
        experts = sum(math.prod(shape) for shape in self.experts.values())
        quantized = sum(dtype.itemsize * math.prod(shape) for parts in specs for dtype, shape in parts.values())
        return Sizes(dense + experts, experts, quantized, 2 * dense)

    def write(self, folder: Path, progress: Progress) -> None:
        """All but data.jsonl. At the end the folder is read back the way every command reads it."""
        from usaf.checkpoint import Checkpoint
        from usaf.expert_store import FILE_NAME, check_store, read_store

        self.config.save_pretrained(folder)
        self._write_shards(folder, progress)
        self._write_experts(folder / FILE_NAME, progress)
        check_store(read_store(folder / FILE_NAME), Checkpoint(folder), self.encoding.group_size, self.encoding.bits)

    # -- dense tensors -------------------------------------------------------------------------------------------------

    def _shards(self) -> list[list[str]]:
        """Names in their order, about `SHARD_BYTES` in each shard."""
        shards: list[list[str]] = []
        filled = 0
        for name, shape in self.dense.items():
            size = 2 * math.prod(shape)
            if not shards or filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def _write_shards(self, folder: Path, progress: Progress) -> None:
        import torch

        from usaf.source_folder import INDEX_NAME
        from usaf.tensor_file import TensorFileWriter

        shards = self._shards()
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file_name, shard in zip(names, shards, strict=True):
            with open(folder / file_name, "w+b") as file:
                specs = {name: (torch.bfloat16, self.dense[name]) for name in shard}
                writer = TensorFileWriter(file, specs, {"format": "pt"})
                for name in shard:
                    for first, values in self._dense_values(name):
                        writer.write(name, first, values)
                        progress(2 * values.numel())
                flush(file)
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(2 * math.prod(shape) for shape in self.dense.values())
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _dense_values(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first item, bf16 values) block by block."""
        import torch

        shape = self.dense[name]
        draws = Draws(self.seed, name)
        if len(shape) == 1:
            yield 0, (1 + NORM_SPREAD * draws.normal(shape[0])).to(torch.bfloat16)
        elif name in self.routers:
            rows = ROUTER_LOGIT_STD / math.sqrt(shape[1]) * torch.exp(ROUTER_SPREAD * draws.normal(shape[0]))
            yield 0, (rows.unsqueeze(1) * draws.normal(math.prod(shape)).view(shape)).to(torch.bfloat16)
        else:
            table = normal_table(self._std(name)).to(torch.bfloat16).view(torch.int16).numpy()
            for first, words in draws.blocks(math.prod(shape)):
                yield first, torch.from_numpy(table.take(words, mode="clip")).view(torch.bfloat16)

    def _std(self, name: str) -> float:
        if name.endswith("embed_tokens.weight") and not self.config.tie_word_embeddings:
            return EMBEDDING_STD
        return WEIGHT_STD / math.sqrt(2 * self.depth) if name.endswith(RESIDUAL) else WEIGHT_STD

    # -- experts -------------------------------------------------------------------------------------------------------

    def _write_experts(self, path: Path, progress: Progress) -> None:
        from usaf.expert_store import FORMAT, entry_metadata, tensor_specs
        from usaf.tensor_file import TensorFileWriter

        encodings = dict.fromkeys(self.experts, self.encoding)
        entries = {name: entry_metadata(self.encoding, shape) for name, shape in self.experts.items()}
        metadata = {"format": FORMAT, "entries": json.dumps(entries)}  # no "source": there are no other weights
        with open(path, "w+b") as file:
            writer = TensorFileWriter(file, tensor_specs(self.experts, encodings), metadata)
            for name in self.experts:
                self._write_scales(writer, name, progress)
                self._write_codes(writer, name, progress)
            flush(file)

    def _write_codes(self, writer: TensorFileWriter, name: str, progress: Progress) -> None:
        import torch

        experts, rows, columns = self.experts[name]
        width = (columns + 1) // 2
        table = code_table()
        for first, words in Draws(self.seed, f"{name}.packed").blocks(-(-experts * rows * width // 2)):
            packed = torch.from_numpy(table.take(words, mode="clip").view("u1"))[: experts * rows * width - 2 * first]
            if columns % 2:  # the pad nibble of a row's last byte is 0
                last = torch.arange(2 * first, 2 * first + len(packed)) % width == width - 1
                packed = torch.where(last, packed % 16, packed)
            writer.write(f"{name}.packed", 2 * first, packed)
            progress(len(packed))

    def _write_scales(self, writer: TensorFileWriter, name: str, progress: Progress) -> None:
        import torch

        experts, rows, columns = self.experts[name]
        count = experts * rows * -(-columns // self.encoding.group_size)
        mean, std = code_moments()
        # E[scale^2] (std^2 + jitter^2) = weights' variance; E[exp(2 s n)] = exp(2 s^2) of a normal n
        middle = self._std(name) / math.hypot(std, OFFSET_JITTER) / math.exp(SCALE_SPREAD**2)
        table = torch.exp(SCALE_SPREAD * normal_table(1.0)).mul_(middle).to(torch.float16).numpy()
        jitter = normal_table(OFFSET_JITTER).numpy()
        draws = Draws(self.seed, f"{name}.scale"), Draws(self.seed, f"{name}.offset")
        for (first, for_scale), (_, for_offset) in zip(*(d.blocks(count) for d in draws), strict=True):
            scale = torch.from_numpy(table.take(for_scale, mode="clip"))
            offset = -scale.float() * (mean + torch.from_numpy(jitter.take(for_offset, mode="clip")))
            writer.write(f"{name}.scale", first, scale)
            writer.write(f"{name}.offset", first, offset.to(torch.float16))
            progress(4 * len(scale))


class Draws:
    """The random 16-bit words of one tensor: they depend on seed and name, and on nothing drawn before."""

    def __init__(self, seed: int, name: str) -> None:
        import numpy as np

        self.bits = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))

    def words(self, count: int) -> np.ndarray:
        """uint16 [count]; whole 64-bit draws are used up."""
        return self.bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]

    def blocks(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first word, words) of `count` words in all."""
        for first in range(0, count, BLOCK_WORDS):
            yield first, self.words(min(BLOCK_WORDS, count - first))

    def normal(self, count: int) -> Tensor:
        """fp32 [count]."""
        import torch

        return torch.from_numpy(normal_table(1.0).numpy().take(self.words(count), mode="clip"))


def normal_table(std: float) -> Tensor:
    """fp32 [65536]: quantiles of the middles of as many equal shares of a normal distribution."""
    import torch

    shares = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return (std * torch.special.ndtri(shares)).float()


def codes() -> np.ndarray:
    """uint8 [65536, 4]: the codes that a random word stands for, the same for every seed."""
    import numpy as np

    normal = normal_table(CODE_STD).numpy().take(Draws(0, "codes").words(4 * 65536), mode="clip")
    return np.clip(np.rint(7.5 + normal), 0, 15).astype("u1").reshape(65536, 4)


def code_table() -> np.ndarray:
    """uint16 [65536]: four codes as two packed bytes, the first in the lowest nibble."""
    four = codes()
    return (four[:, 0::2] | four[:, 1::2] << 4).copy().view("<u2").reshape(-1)


def code_moments() -> tuple[float, float]:
    """Mean and standard deviation of the codes as they are drawn."""
    four = codes()
    return float(four.mean()), float(four.std())


def write_data(path: Path, vocabulary: int, rows: int, length: int, seed: int) -> None:
    """Sequences of token ids; the n-th most frequent id comes about 1/n as often as the first. Labels are aligned."""
    import numpy as np

    bits = Draws(seed, "data").bits
    ids = np.random.Generator(np.random.SFC64(seed)).permutation(vocabulary)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for _ in range(rows):
            uniform = bits.random_raw(length) / 2.0**64
            row = ids[(vocabulary**uniform).astype(np.int64) - 1].tolist()
            file.write(json.dumps({"input_ids": row, "labels": row}) + "\n")
        flush(file)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: make_command(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
