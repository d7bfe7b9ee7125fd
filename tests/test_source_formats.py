"""Checkpoints in fewer than 16 bits, judged by transformers' own dequantised loading and by `compressed-tensors`."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, build, random_batch, reference_of, write_checkpoint, write_tokens
from runs import TINY
from safetensors.torch import load_file, save_file
from source_checkpoints import (
    EXPERT,
    compressed_config,
    fp8_blocks,
    int4_args,
    rewrite,
    to_fp4,
    to_fp8,
    to_fp8_channels,
    to_int4,
    to_mxfp4,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf.checkpoint import Checkpoint
from usaf.errors import UserError
from usaf.evaluate import main as evaluate_command
from usaf.expert_store import FILE_NAME, convert, open_or_make, read_store, shapes_of
from usaf.quantization import dequantize, quantize
from usaf.session import make_resident
from usaf.source_folder import SINGLE_NAME
from usaf.tensor_file import TensorFile
from usaf.train import main as train

SMALL = {"num_hidden_layers": 2, "moe_intermediate_size": 64}


def quiet(*_: Any) -> None:
    pass


def config_class(name: str) -> Any:
    """transformers' class of a quantisation, if this version can dequantise while it loads."""
    found = getattr(transformers, name, None)
    if found is None or "dequantize" not in found.__init__.__code__.co_varnames:
        pytest.skip(f"this transformers has no {name}(dequantize=True)")
    if name == "Mxfp4Config" and not hasattr(torch, "accelerator"):
        pytest.skip("transformers loads MXFP4 through torch.accelerator, which this torch (below 2.6) does not have")
    return found(dequantize=True)


def compare(folder: Path, dequantized: Any, formats: set[str]) -> None:
    """Every parameter and every expert equals what `from_pretrained` makes of the folder, to the bit."""
    checkpoint = Checkpoint(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=dequantized)
    reference = loaded.state_dict()
    assert set(reference) == set(checkpoint.model.state_dict())
    assert not checkpoint.missing(reference)
    assert not checkpoint.unexpected
    assert {checkpoint.format(key) for key in checkpoint.stored} == formats
    for target in checkpoint.sources:
        value = checkpoint.read(target)
        assert value.dtype == checkpoint.dtype(target)
        assert torch.equal(value.to(reference[target].dtype), reference[target]), target
    compare_experts(checkpoint, reference)


def compare_experts(checkpoint: Checkpoint, reference: dict[str, Tensor]) -> None:
    for target, (experts, rows, columns) in shapes_of(checkpoint).items():
        transposed = checkpoint.model.get_submodule(target.rpartition(".")[0]).is_transposed
        for e in range(experts):
            expected = reference[target][e]
            assert torch.equal(checkpoint.read_expert(target, e).to(expected.dtype), expected), (target, e)
            if checkpoint.four_bit(target) is not None:
                stored = checkpoint.read_four_bit(target, e)
                assert stored.shape == (1, rows, columns)
                decoded = dequantize(stored, expected.dtype)[0]
                assert torch.equal(decoded.t() if transposed else decoded, expected), (target, e)


FP8: dict[str, Callable[[Path], Path]] = {
    "blocks": to_fp8,
    "uneven blocks": lambda p: to_fp8(p, (16, 32)),
    "whole tensors": lambda p: to_fp8(p, None),
    "under .scale": lambda p: to_fp8(p, scale_name="scale"),
    "factors in bf16": lambda p: to_fp8(p, scale_type=torch.bfloat16),
    "exponents": lambda p: to_fp8(p, (1, 32), scale_type=torch.uint8),
    "experts alone": lambda p: to_fp8(p, only=EXPERT),
}


@pytest.mark.parametrize("what", FP8)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_equals_transformers(tmp_path: Path, family: str, what: str) -> None:
    changes = {**SMALL, "first_k_dense_replace": 1, "kv_lora_rank": 24, "qk_rope_head_dim": 8} if family == (
        "deepseek_v3") else SMALL  # fmt: skip
    folder = FP8[what](write_checkpoint(tmp_path / "model", family, **changes))
    compare(folder, config_class("FineGrainedFP8Config"), {"plain", "fp8"})


@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_channels_equal_transformers_and_compressed_tensors(tmp_path: Path, scale_type: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.15")
    folder = to_fp8_channels(write_checkpoint(tmp_path / "model", **SMALL), scale_type)
    compare(folder, config_class("CompressedTensorsConfig"), {"plain", "fp8"})


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    folder = to_mxfp4(write_checkpoint(tmp_path / "model", "gpt_oss", num_hidden_layers=2, intermediate_size=96))
    compare(folder, config_class("Mxfp4Config"), {"plain", "mxfp4"})


def deepseek_v4(folder: Path) -> Path:
    config = transformers.DeepseekV4Config(
        **{**COMMON, "num_hidden_layers": 2, "num_key_value_heads": 1}, head_dim=32, moe_intermediate_size=64,
        n_routed_experts=8, num_local_experts=8, num_experts_per_tok=2, q_lora_rank=32, o_lora_rank=16, o_groups=2,
        index_head_dim=16, index_n_heads=2, index_topk=8, sliding_window=8, qk_rope_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV4Config"), reason="transformers does not know the family")
@pytest.mark.parametrize("scale_type", ["float8_e8m0fnu", "uint8"])
def test_fp4_of_deepseek_v4_equals_transformers(tmp_path: Path, scale_type: str) -> None:
    if not hasattr(torch, "float8_e8m0fnu"):  # whichever type the file has them in
        pytest.skip("transformers loads scales that are exponents only where torch has float8_e8m0fnu (from 2.7 on)")
    folder = to_fp4(deepseek_v4(tmp_path / "model"), getattr(torch, scale_type))
    compare(folder, config_class("FineGrainedFP8Config"), {"plain", "fp8", "fp4"})


@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float16], ids=str)
def test_int4_equals_transformers(tmp_path: Path, scale_type: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.15")
    folder = to_int4(write_checkpoint(tmp_path / "model", **SMALL), scale_type=scale_type)
    compare(folder, config_class("CompressedTensorsConfig"), {"plain", "int4"})


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every weight as the compressed-tensors package decodes it, by name."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    compressor = compressors.BaseCompressor.get_value_from_registry(said["format"])
    scheme = quantization.QuantizationScheme(**said["config_groups"]["group_0"])
    tensors = load_file(folder / SINGLE_NAME)
    found = {}
    for name in [n for n in tensors if n.endswith("_packed")]:
        stem = name.removesuffix("weight_packed")
        module = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        found[stem + "weight"] = compressor.decompress(module, scheme)["weight"]
    assert found
    return found


def compare_packed(folder: Path) -> None:
    """Experts as they go into the file, and logical tensors, equal what the package decodes."""
    checkpoint, expected = Checkpoint(folder), decompressed(folder)
    for key, weight in expected.items():
        value = checkpoint.tensor(key)
        assert torch.equal(value, weight.to(value.dtype)), key
    for target, (experts, _, _) in shapes_of(checkpoint).items():
        stem, names = target.rpartition(".")[0], ["gate_proj", "up_proj"] if "gate_up" in target else ["down_proj"]
        for e in range(experts):
            weight = torch.cat([expected[f"{stem}.{e}.{name}.weight"] for name in names])
            stored = checkpoint.read_four_bit(target, e)
            assert torch.equal(dequantize(stored, stored.dtype)[0], weight.to(stored.dtype)), (target, e)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(
    ("group_size", "width", "scale_type"),
    [(32, 64, torch.bfloat16), (16, 48, torch.float16), (-1, 64, torch.bfloat16), (-1, 44, torch.bfloat16),
     (64, 64, torch.float32)],
)  # fmt: skip
def test_int4_equals_compressed_tensors(
    tmp_path: Path, group_size: int, width: int, scale_type: torch.dtype, symmetric: bool
) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.15")
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1, moe_intermediate_size=width)
    to_int4(folder, group_size, symmetric, scale_type)
    if symmetric or scale_type != torch.float32:
        compare_packed(folder)
        return
    with pytest.raises(UserError, match="zero points beside scales in F32, which cannot be decoded to the bit"):
        Checkpoint(folder)


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.15")
    folder = write_checkpoint(tmp_path / "model", **SMALL)
    draw = torch.Generator().manual_seed(0)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not EXPERT.search(name):
            return {name: tensor}
        rows, columns = tensor.shape
        return {
            name + "_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=draw),
            name + "_scale": torch.randint(115, 124, (rows, columns // 32), dtype=torch.uint8, generator=draw),
        }

    args = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 32}
    compare_packed(rewrite(folder, change, compressed_config(args, "mxfp4-pack-quantized")))


def test_a_group_that_a_row_cannot_fill(tmp_path: Path) -> None:
    """44 columns in groups of 32: the second has 12."""
    pytest.importorskip("compressed_tensors", minversion="0.15")
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1, moe_intermediate_size=44)
    to_int4(folder, 32)
    checkpoint = Checkpoint(folder)
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    raw = load_file(folder / SINGLE_NAME)
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = helpers.unpack_from_int32(raw[key + "_packed"], 4, torch.Size((64, 44)))
    expected = codes.bfloat16() * raw[key + "_scale"].repeat_interleave(32, 1)[:, :44]
    assert torch.equal(checkpoint.tensor(key), expected)


@pytest.mark.parametrize("shape", [(64, 48), (40, 100), (33, 65), (5, 7)])
def test_blocks_of_fp8_with_ragged_edges(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The last block of a dimension is smaller, as in DeepSeek-V3's kv_a_proj_with_mqa of 576 rows."""
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values, scale = fp8_blocks(weight, (32, 32))
    rewrite(
        folder, lambda n, t: {n: t, "extra.weight": values, "extra.weight_scale_inv": scale},
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    )  # fmt: skip
    factors = scale.repeat_interleave(32, 0)[: shape[0]].repeat_interleave(32, 1)[:, : shape[1]]
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.tensor("extra.weight"), (values.float() * factors).bfloat16())
    assert checkpoint.parts("extra.weight") == ("extra.weight", "extra.weight_scale_inv")
    assert checkpoint.format("extra.weight") == "fp8"
    assert checkpoint.unexpected == ["extra.weight"]


@pytest.mark.parametrize("form", ["blocks", "rows", "experts", "whole", "columns"])
def test_fused_fp8_experts_are_read_one_at_a_time(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor for all experts of a layer: of values and scales alike, only the expert's own bytes are read."""
    folder = write_checkpoint(tmp_path / "model", "gpt_oss", num_hidden_layers=1, intermediate_size=64)
    expected: dict[str, Tensor] = {}

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, rows, columns = tensor.shape
        values = (tensor.float() * 30).to(torch.float8_e4m3fn)
        grid = {"blocks": (experts, rows // 32, columns // 32), "rows": (experts, rows, 1), "experts": (experts, 1, 1),
                "whole": (1,), "columns": (experts, 1, columns)}[form]  # fmt: skip
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(2))
        full = scale.expand(1, 1, 1) if form == "whole" else scale
        for dimension, step in ((1, 32), (2, 32)) if form == "blocks" else ():
            full = full.repeat_interleave(step, dimension)
        expected[name] = (values.float() * full).bfloat16()
        return {name: values, name + "_scale_inv": scale}

    rewrite(folder, change, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    checkpoint = Checkpoint(folder)
    read = counted(monkeypatch)
    for target, weight in expected.items():
        assert torch.equal(checkpoint.read(target), weight)
        read.clear()
        assert torch.equal(checkpoint.read_expert(target, 2), weight[2])
        per_expert = weight[2].numel()
        scales = checkpoint.entry(target + "_scale_inv").nbytes // (1 if form == "whole" else len(weight))
        assert sum(read.values()) == per_expert + scales


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Bytes that are read from checkpoints, by file and place."""
    read: Counter[tuple[str, int]] = Counter()
    original = TensorFile._read

    def counting(self: TensorFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = original(self, start, shape, dtype)
        read[str(self.path), start] += tensor.nbytes
        return tensor

    monkeypatch.setattr(TensorFile, "_read", counting)
    return read


SOURCES: dict[str, Callable[[Path], Path]] = {
    "int4": lambda p: to_int4(write_checkpoint(p, **SMALL)),
    "mxfp4": lambda p: to_mxfp4(write_checkpoint(p, "gpt_oss", num_hidden_layers=2, intermediate_size=64)),
    "fp8": lambda p: to_fp8(write_checkpoint(p, **SMALL)),
    "bf16": lambda p: write_checkpoint(p, **SMALL),
    "bf16 fused": lambda p: write_checkpoint(p, "gpt_oss", num_hidden_layers=2, intermediate_size=64),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each of SOURCES, made once. Not to be written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = SOURCES[name](tmp_path_factory.mktemp(name.replace(" ", "")) / "model")
        return made[name]

    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_conversion_reads_every_byte_of_the_experts_once(
    folders: Callable[[str], Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(folders(name))
    expert_parts = {
        part
        for target in shapes_of(checkpoint)
        for key, _ in checkpoint.sources[target].keys
        for part in checkpoint.parts(key)
    }
    read = counted(monkeypatch)
    convert(checkpoint, tmp_path / FILE_NAME, 32, 4, quiet)
    assert sum(read.values()) == sum(checkpoint.entry(part).nbytes for part in expert_parts)
    assert max(read.values()) <= 128 * 64 * 2, "one tensor of an expert, or an expert's part of a fused one"


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_native_experts_are_copied_code_by_code(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Settings of group size and bits are for experts that are quantised here; these are what they are."""
    checkpoint = Checkpoint(folders(name))
    path = tmp_path / FILE_NAME
    store = open_or_make(checkpoint, str(path), 128, 8, quiet)
    assert {e.group_size for e in store.entries.values()} == {32}
    assert {e.bits for e in store.entries.values()} == {4}
    assert {e.dtype for e in store.entries.values()} == {torch.bfloat16}
    assert not store.quantized
    for target, entry in store.entries.items():
        for e in range(entry.shape[0]):
            stored, kept = checkpoint.read_four_bit(target, e), entry.expert(e)
            assert torch.equal(stored.packed, kept.packed)
            assert torch.equal(stored.scale, kept.scale)
            assert torch.equal(stored.table, kept.table)  # type: ignore[arg-type]
            assert stored.scale.dtype == kept.scale.dtype
    open_or_make(checkpoint, str(path), 64, 4, lambda *_: pytest.fail("made again"))
    weights = sum(e.packed.numel() * 2 for e in store.entries.values())
    assert path.stat().st_size * 8 / weights < (4.8 if name == "int4" else 4.6), "bits a weight with the header"


def test_fp8_experts_are_quantised_from_their_dequantised_values(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(folders("fp8"))
    store = open_or_make(checkpoint, str(tmp_path / FILE_NAME), 32, 4, quiet)
    assert store.quantized == set(store.entries)
    target, entry = next(iter(store.entries.items()))
    expected = quantize(checkpoint.read(target), 32)
    assert torch.equal(entry.packed, expected.packed)
    assert torch.equal(entry.scale, expected.scale)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "fp8"])
def test_the_model_computes_what_transformers_does(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Hidden states of the 4-bit model equal those of transformers' own with the same weights, resident or not."""
    folder = Path(shutil.copytree(folders(name), tmp_path / "model"))
    model = build(folder)
    plain = tmp_path / "plain"  # dequantised as tests above compare with transformers
    checkpoint = Checkpoint(folder)
    reference = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.bfloat16)
    reference.load_state_dict({t: checkpoint.read(t) for t in checkpoint.sources}, strict=False)
    reference.save_pretrained(plain)
    expected_model = reference_of(plain, model)
    batch = random_batch([[12], [9]])
    with torch.no_grad():
        expected = expected_model.model(batch.input_ids, position_ids=batch.position_ids).last_hidden_state
        found = model.run_layers(batch, 0, model.num_layers)
        assert torch.allclose(found[0, :12], expected[0, :12], atol=2e-5)
        for moe in model.moe:
            for bank in moe.banks:
                make_resident(bank)
                assert bank.resident is not None
                assert bank.resident.dtype == (torch.float16 if name == "fp8" else torch.bfloat16)
        assert torch.equal(model.run_layers(batch, 0, model.num_layers), found)
    if name != "fp8":
        for moe in model.moe:
            for target, bank in zip(moe.names, moe.banks, strict=True):
                weight = checkpoint.read(target)
                weight = weight.transpose(1, 2) if name == "mxfp4" else weight
                assert torch.equal(bank.weight(1, torch.float32), weight[1].float())


def test_tensors_of_a_file_stand_behind_logical_ones(folders: Callable[[str], Path]) -> None:
    """Every tensor of the file belongs to one logical tensor, which is what an export goes by."""
    for name in SOURCES:
        checkpoint = Checkpoint(folders(name))
        behind = [part for key in checkpoint.stored for part in checkpoint.parts(key)]
        assert sorted(behind) == sorted(checkpoint.shards)
    checkpoint = Checkpoint(folders("int4"))
    key = "model.layers.1.mlp.experts.7.up_proj.weight"
    assert checkpoint.parts(key) == (f"{key}_packed", f"{key}_scale", f"{key}_shape")
    checkpoint = Checkpoint(folders("mxfp4"))
    key = "model.layers.1.mlp.experts.down_proj"
    assert checkpoint.parts(key) == (f"{key}_blocks", f"{key}_scales")
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.method == "mxfp4"


def set_config(folder: Path, quantization: Any, inside: str | None = None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (config if inside is None else config.setdefault(inside, {}))["quantization_config"] = quantization
    path.write_text(json.dumps(config), encoding="utf-8")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, r"says awq \(AWQ, int4\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, r"says gptq \(GPTQ"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "says bitsandbytes"),
    "nothing": ({}, "says unknown"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "says modelopt NVFP4"),
    "nvfp4": (
        compressed_config({"num_bits": 4, "type": "float", "group_size": 16}, "nvfp4-pack-quantized"),
        "compressed-tensors nvfp4-pack-quantized, float of 4 bits",
    ),
    "int8": (
        compressed_config({"num_bits": 8, "type": "int"}, "int-quantized"), "compressed-tensors int-quantized, int of 8"
    ),
    "packed int8": (
        compressed_config({**int4_args(32), "num_bits": 8}, "pack-quantized"), "pack-quantized, int of 8 bits"
    ),
    "reordered": (
        compressed_config({**int4_args(32), "actorder": "group"}, "pack-quantized"), "int of 4 bits with actorder=group"
    ),
    "marlin": (compressed_config(int4_args(32), "marlin-24"), "compressed-tensors marlin-24"),
    "sparse": (
        compressed_config(int4_args(32), "pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}),
        "with sparsity sparse-24-bitmask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_formats_that_cannot_be_read_are_refused_by_name(tmp_path: Path, what: str) -> None:
    said, pattern = REFUSED[what]
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    set_config(folder, said)
    remedy = "use this model in 16 bits, FP8, MXFP4, or int4 of compressed-tensors"
    with pytest.raises(UserError, match=f"config.json: quantization_config .*{pattern}.*{remedy}") as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_quantisation_in_the_text_part_is_found(tmp_path: Path) -> None:
    """Multimodal wrappers carry it there."""
    from transformers import AutoConfig

    from usaf.source_formats import read_quantization

    class Wrapper:
        quantization_config = None

        def get_text_config(self) -> Any:
            return text

    text = AutoConfig.for_model("qwen3_moe")
    text.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match="says awq"):
        read_quantization(Wrapper(), tmp_path / "config.json")
    text.quantization_config = compressed_config(int4_args(32), "pack-quantized")
    found = read_quantization(Wrapper(), tmp_path / "config.json")
    assert found is not None
    assert (found.method, found.group_sizes, found.dtype) == ("compressed-tensors", (32,), torch.bfloat16)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


EXPERT_3 = "model.layers.0.mlp.experts.3.down_proj.weight"
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "scales of other blocks": (
        "fp8", lambda t: t.update({EXPERT_3 + "_scale_inv": torch.ones(3, 5)}),
        r"experts\.3\.down_proj\.weight has shape \(64, 64\) and scales of shape \(3, 5\), which do not fit",
    ),
    "no scales": (
        "fp8", lambda t: t.pop(EXPERT_3 + "_scale_inv"), r"has dtype F8_E4M3 and no scale beside it",
    ),
    "codes of another width": (
        "int4", lambda t: t.update({EXPERT_3 + "_packed": torch.ones(64, 9, dtype=torch.int32)}),
        r"packs 64 weights a row in 9 words, which is not int4",
    ),
    "scales of other groups": (
        "int4", lambda t: t.update({EXPERT_3 + "_scale": torch.ones(64, 3, dtype=torch.bfloat16)}),
        r"has 64 weights a row and scales of shape \(64, 3\), which do not fit",
    ),
    "two group sizes": (
        "int4", lambda t: t.update({EXPERT_3 + "_scale": torch.ones(64, 4, dtype=torch.bfloat16)}),
        r"down_proj are stored in several ways \(as int4 in groups of .*, and otherwise\)",
    ),
    "one expert in 16 bits": (
        "int4", lambda t: (t.pop(EXPERT_3 + "_packed"), t.update({EXPERT_3: torch.ones(64, 64)})),
        r"down_proj are stored in several ways",
    ),
    "one expert missing": (
        "int4", lambda t: t.pop(EXPERT_3 + "_packed"), r"down_proj needs 8 tensors like .*, and the checkpoint has 7",
    ),
    "blocks of another width": (
        "mxfp4",
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(4, 64, 3, 16).byte()}),
        r"down_proj has shape \(4, 96, 64\), config\.json asks for \(4, 64, 64\)",
    ),
    "no scales of blocks": (
        "mxfp4", lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_quantised_checkpoints_are_refused_by_name(
    folders: Callable[[str], Path], tmp_path: Path, what: str
) -> None:
    name, change, pattern = DAMAGED[what]
    folder = Path(shutil.copytree(folders(name), tmp_path / "model"))
    edit(folder, change)
    if pattern is None:  # experts may be absent as far as the checkpoint goes
        checkpoint = Checkpoint(folder)
        assert checkpoint.missing(shapes_of(checkpoint)) == ["model.layers.0.mlp.experts.down_proj"]
        return
    with pytest.raises(UserError, match=pattern) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


BAD_DATA: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a scale that is inf": (
        "int4", lambda t: t[EXPERT_3 + "_scale"].fill_(torch.inf), "expert 3: holds a scale of inf",
    ),
    "a shape that is another": (
        "int4", lambda t: t[EXPERT_3 + "_shape"].copy_(torch.tensor([64, 63])),
        r"has a weight_shape of \(64, 63\) where \(64, 64\) was expected",
    ),
    "an exponent that is nan": (
        "mxfp4", lambda t: t["model.layers.0.mlp.experts.down_proj_scales"][3, 5].fill_(255),
        "expert 3: .*scale of nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_of_native_experts_is_found_in_the_conversion(
    folders: Callable[[str], Path], tmp_path: Path, what: str
) -> None:
    name, change, pattern = BAD_DATA[what]
    folder = Path(shutil.copytree(folders(name), tmp_path / "model"))
    edit(folder, change)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=pattern):
        convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)
    assert sorted(folder.iterdir()) == before


def test_a_mixture_of_formats_in_different_layers(tmp_path: Path) -> None:
    """As in Kimi's newer checkpoints: attention in FP8, experts of one layer in int4, of another in 16 bits."""
    folder = write_checkpoint(tmp_path / "model", **SMALL)
    to_int4(folder, only=re.compile(r"layers\.1\.mlp\.experts"))
    plain = load_file(folder / SINGLE_NAME)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if "q_proj" not in name:
            return {name: tensor}
        values, scale = fp8_blocks(tensor, (1, tensor.shape[1]))
        return {name: values, name + "_scale": scale}

    rewrite(folder, change, None)
    checkpoint = Checkpoint(folder)
    store = open_or_make(checkpoint, None, 32, 4, quiet)
    assert store.quantized == {n for n in store.entries if "layers.0" in n}
    assert {e.dtype for n, e in store.entries.items() if "layers.1" in n} == {torch.bfloat16}
    q = checkpoint.read("model.layers.0.self_attn.q_proj.weight").float()
    assert (q - plain["model.layers.0.self_attn.q_proj.weight"].float()).abs().max() < 0.02
    assert read_store(folder / FILE_NAME).quantized == store.quantized


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_a_run_on_native_experts_and_its_evaluation(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """From the checkpoint to a delta, whose loss in a new session is that of the run to the bit."""
    data = write_tokens(tmp_path / "data.jsonl")
    environ = {
        **TINY, "MODEL": str(folders(name)), "DATASET_PATH": str(data), "OUTPUT_DIR": str(tmp_path), "RUN_TAG": "run",
        "QUANT_PATH": str(tmp_path / FILE_NAME), "STEPS": "4", "TRAIN_FROM": "1",
    }  # fmt: skip
    assert train([], environ) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    (after,) = [e for e in summary["evaluations"] if e["name"] == "in_domain"]
    assert after["perplexity_after"] < after["perplexity_before"]
    assert (
        evaluate_command(["--delta", str(tmp_path / "run" / "delta.safetensors"), "--json", str(tmp_path / "e")]) == 0
    )
    evaluations = json.loads((tmp_path / "e").read_text(encoding="utf-8"))["evaluations"]
    assert {e["name"]: e["perplexity"] for e in evaluations}["in_domain"] == after["perplexity_after"]
