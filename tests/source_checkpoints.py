"""Checkpoints in fewer than 16 bits, made from a family's 16-bit one the way that publishers store them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf.source_folder import INDEX_NAME, SINGLE_NAME
from usaf.tensor_file import TensorFileWriter

LINEAR = re.compile(r"(self_attn|mlp|ffn|attn)\..*(proj|w\d|wq_a|wq_b|wkv|wo_a|wo_b)\.weight$")
EXPERT = re.compile(r"experts\.\d+\.(\w+)\.weight$")

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensors], quantization: dict[str, Any] | None) -> Path:
    """Every tensor of a checkpoint in one file becomes what `change(name, tensor)` says."""
    tensors: Tensors = {}
    for name, tensor in load_file(folder / SINGLE_NAME).items():
        tensors.update(change(name, tensor.clone()))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE_NAME, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def fp8_blocks(weight: Tensor, block: tuple[int, int], powers: bool = False) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> F8_E4M3 of that shape, fp32 factors [ceil(rows / block), ceil(columns / block)]."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    values, scale = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            largest = weight[at].float().abs().max() / 448
            scale[i, j] = 2.0 ** torch.ceil(torch.log2(largest)) if powers else largest
            values[at] = (weight[at].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def to_fp8(
    folder: Path, block: tuple[int, int] | None = (32, 32), scale_name: str = "weight_scale_inv",
    scale_type: torch.dtype = torch.float32, only: re.Pattern[str] = LINEAR,
) -> Path:  # fmt: skip
    """As DeepSeek-V3 and its like are published; block=None: one factor a tensor, with an activation scale beside it.
    scale_type uint8: E8M0 exponents."""

    def change(name: str, tensor: Tensor) -> Tensors:
        if not only.search(name):
            return {name: tensor}
        stem, exponents = name.removesuffix("weight"), scale_type == torch.uint8
        rows, columns = tensor.shape
        values, scale = fp8_blocks(tensor, block or (rows, columns), exponents)
        stored = (torch.log2(scale) + 127).to(torch.uint8) if exponents else scale.to(scale_type)
        if block is None:
            return {name: values, stem + scale_name: stored.reshape(()), stem + "activation_scale": torch.tensor(0.5)}
        return {name: values, stem + scale_name: stored}

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static",
                    "weight_block_size": list(block) if block else None}  # fmt: skip
    return rewrite(folder, change, quantization)


def to_fp8_channels(folder: Path, scale_type: torch.dtype = torch.bfloat16) -> Path:
    """compressed-tensors' float-quantized with a factor a row, as GLM-4.5's FP8 checkpoints are published."""

    def change(name: str, tensor: Tensor) -> Tensors:
        if not LINEAR.search(name):
            return {name: tensor}
        values, scale = fp8_blocks(tensor, (1, tensor.shape[1]))
        return {name: values, name + "_scale": scale.to(scale_type)}

    args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    return rewrite(folder, change, {**compressed_config(args, "float-quantized"), "ignore": ["lm_head", "re:.*gate$"]})


def compressed_config(group: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": None,
                                      "output_activations": None}},
        **more,
    }  # fmt: skip


def int4_args(group_size: int, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None,
        "group_size": group_size if group_size > 0 else None, "strategy": "group" if group_size > 0 else "channel",
    }  # fmt: skip


def pack_words(codes: Tensor) -> Tensor:
    """[rows, columns] of -8 to 7 -> int32 [rows, ceil(columns / 8)]: the nibble is code + 8, the lowest comes first."""
    padded = torch.nn.functional.pad(codes.to(torch.int64) + 8, (0, -codes.shape[1] % 8))
    words = (padded.reshape(len(codes), -1, 8) * 16 ** torch.arange(8)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def to_int4(
    folder: Path, group_size: int = 32, symmetric: bool = True, scale_type: torch.dtype = torch.bfloat16,
    only: re.Pattern[str] = EXPERT,
) -> Path:  # fmt: skip
    """Experts in compressed-tensors' pack-quantized form, as Kimi K2 is published. group_size -1: a scale a row."""
    draw = torch.Generator().manual_seed(7)

    def change(name: str, tensor: Tensor) -> Tensors:
        if not only.search(name):
            return {name: tensor}
        rows, columns = tensor.shape
        groups = 1 if group_size < 0 else -(-columns // group_size)
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=draw)
        parts = {
            name + "_packed": pack_words(codes),
            name + "_scale": (torch.rand(rows, groups, generator=draw) * 0.02 + 0.001).to(scale_type),
            name + "_shape": torch.tensor([rows, columns], dtype=torch.int32),
        }
        if not symmetric:
            zero = torch.randint(-8, 8, (rows, groups), dtype=torch.int8, generator=draw)
            parts[name + "_zero_point"] = pack_words(zero.t()).t().contiguous()
        return parts

    return rewrite(folder, change, compressed_config(int4_args(group_size, symmetric), "pack-quantized"))


def to_mxfp4(folder: Path) -> Path:
    """A gpt-oss checkpoint whose experts are published blocks: random codes, scales near those of trained weights."""
    draw = torch.Generator().manual_seed(7)

    def change(name: str, tensor: Tensor) -> Tensors:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, columns, rows = tensor.shape  # [E, in, out]
        return {
            name + "_blocks": torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8,
                                            generator=draw),
            name + "_scales": torch.randint(115, 124, (experts, rows, columns // 32), dtype=torch.uint8,
                                            generator=draw),
        }  # fmt: skip

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return rewrite(folder, change, quantization)


def to_fp4(folder: Path, scale_type: torch.dtype) -> Path:
    """Experts as DeepSeek-V4 is published: two E2M1 codes in an int8, E8M0 scales of 32 under `.scale`."""
    draw = torch.Generator().manual_seed(7)

    def change(name: str, tensor: Tensor) -> Tensors:
        if EXPERT.search(name):
            rows, columns = tensor.shape
            codes = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=draw)
            scale = torch.randint(115, 124, (rows, columns // 32), dtype=torch.uint8, generator=draw)
            return {name: codes, name.removesuffix("weight") + "scale": scale.view(scale_type)}
        if LINEAR.search(name) and tensor.ndim == 2:
            values, scales = fp8_blocks(tensor, (32, 32))
            return {name: values, name.removesuffix("weight") + "scale": scales}
        return {name: tensor}

    return rewrite(folder, change, {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"})


def write_shards(folder: Path, layers: int, int4: bool) -> int:
    """A checkpoint with a shard for each layer, of 10 experts of 3 x 1536 x 4096 weights; returns its bytes. What is
    written is one random piece over and over."""
    config = tiny_config(
        "qwen3_moe", num_hidden_layers=layers, hidden_size=4096, head_dim=128, moe_intermediate_size=1536,
        num_experts=10,
    )  # fmt: skip
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    if int4:
        config.quantization_config = compressed_config(int4_args(32), "pack-quantized")
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shards: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {f"{i}.safetensors": {} for i in range(layers)}
    for n, p in names.items():
        if ".experts." not in n:
            shards["0.safetensors"][n] = (torch.bfloat16, tuple(p.shape))
    for layer in range(layers):
        for e in range(10):
            for part, (rows, columns) in {"gate": (1536, 4096), "up": (1536, 4096), "down": (4096, 1536)}.items():
                name, shapes = (
                    f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight",
                    shards[f"{layer}.safetensors"],
                )
                if int4:
                    shapes[name + "_packed"] = (torch.int32, (rows, columns // 8))
                    shapes[name + "_scale"] = (torch.bfloat16, (rows, columns // 32))
                else:
                    shapes[name] = (torch.bfloat16, (rows, columns))
    random = torch.randn(4096 * 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    for shard, shapes in shards.items():
        with open(folder / shard, "w+b") as file:
            writer = TensorFileWriter(file, shapes, {"format": "pt"})
            for name, (dtype, shape) in shapes.items():
                count = math.prod(shape) * dtype.itemsize // 2
                writer.write(name, 0, random[:count].view(dtype) if count else torch.zeros(shape, dtype=dtype))
    where = {name: shard for shard, shapes in shards.items() for name in shapes}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
