"""Exports of checkpoints in fewer than 16 bits: trained experts come out in 16 bits, the rest as it was, and loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from runs import World, raw_tensors, read_json
from source_checkpoints import LINEAR, to_fp8, to_fp8_channels, to_int4, to_mxfp4
from test_export import SHORT, Run, bases, deltas, export, whole
from test_source_formats import config_class
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf.checkpoint import Checkpoint
from usaf.merged_folder import except_modules


class Format(NamedTuple):
    family: str
    changes: dict[str, Any]
    write: Callable[[Path], Path]
    config: str  # transformers' class of the quantisation
    name: str  # as `Checkpoint.format` calls it


FORMATS = {
    "fp8": Format("qwen3_moe", {"moe_intermediate_size": 64}, to_fp8, "FineGrainedFP8Config", "fp8"),
    "fp8 channels": Format(
        "qwen3_moe", {"moe_intermediate_size": 64}, to_fp8_channels, "CompressedTensorsConfig", "fp8"
    ),
    "int4": Format("qwen3_moe", {"moe_intermediate_size": 64}, to_int4, "CompressedTensorsConfig", "int4"),
    "mxfp4": Format("gpt_oss", {"intermediate_size": 96}, to_mxfp4, "Mxfp4Config", "mxfp4"),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    made: dict[str, Run] = {}

    def run(what: str) -> Run:
        if FORMATS[what].config == "CompressedTensorsConfig":
            pytest.importorskip("compressed_tensors", minversion="0.15")
        if what not in made:
            form = FORMATS[what]
            world = World(tmp_path_factory.mktemp(form.family), form.family, **form.changes)
            form.write(world.model)
            folder = world.finished("short", **SHORT)
            made[what] = Run(world.model, folder / "delta.safetensors", world)
        return made[what]

    return run


def loaded(folder: Path, form: Format) -> dict[str, Tensor]:
    """What transformers makes of a folder, dequantised to bf16; without a configuration where the folder has none."""
    declared = "quantization_config" in read_json(folder / "config.json")
    more = {"quantization_config": config_class(form.config)} if declared else {}
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).state_dict())


@pytest.mark.parametrize("what", FORMATS)
def test_trained_experts_come_out_in_16_bits(run_of: Callable[[str], Run], what: str, tmp_path: Path) -> None:
    run, form = run_of(what), FORMATS[what]
    figures = export(run, tmp_path / "out", "--no-evaluate")
    before, after = loaded(run.model, form), loaded(tmp_path / "out", form)
    trained, gates = deltas(run), whole(run)
    assert set(before) == set(after)
    changed = 0
    for name, base in before.items():
        if name in trained:
            assert torch.equal(after[name], (base.float() + trained[name]).to(torch.bfloat16)), name
            changed += int((after[name] != base).sum())
        else:
            assert torch.equal(after[name], gates[name].to(base.dtype) if name in gates else base), name
    assert figures["changed_elements"] == changed > 0


@pytest.mark.parametrize("what", FORMATS)
def test_the_rest_stays_byte_for_byte(run_of: Callable[[str], Run], what: str, tmp_path: Path) -> None:
    """Codes and scales of what was written are gone, in trained layers alone; config.json tells loaders so."""
    if what == "int4":
        pytest.skip("all experts come out in 16 bits: see the next test")
    run, form = run_of(what), FORMATS[what]
    export(run, tmp_path / "out", "--no-evaluate")
    source, written = raw_tensors(run.model), raw_tensors(tmp_path / "out")
    trained = ("model.layers.2.mlp.experts.", "model.layers.3.mlp.experts.", "lm_head.")
    kept = {name for name in source if not name.startswith(trained) and name not in whole(run)}
    assert all(written[name] == source[name] for name in kept)
    new = set(written) - kept - set(whole(run))
    assert all(name.startswith(trained) for name in new)
    assert {written[name][1] for name in new} == {"BF16"}
    formats = {name: stored.format for name, stored in Checkpoint(tmp_path / "out").stored.items()}
    assert not {name for name, f in formats.items() if f != "plain" and name.startswith(trained)}
    assert {name for name, f in formats.items() if f == form.name and ".experts." in name}
    before, after = (read_json(f / "config.json")["quantization_config"] for f in (run.model, tmp_path / "out"))
    listed = "ignore" if form.config == "CompressedTensorsConfig" else "modules_to_not_convert"
    added = after[listed][len(before.get(listed) or []) :]
    assert len(added) == 2
    assert all("2" in a or "3" in a for a in added)
    assert {k: v for k, v in after.items() if k != listed} == {k: v for k, v in before.items() if k != listed}


def test_int4_experts_come_out_in_all_layers(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """transformers does not load a mixture of int4 and other experts."""
    run = run_of("int4")
    export(run, tmp_path / "out", "--no-evaluate")
    source, written = raw_tensors(run.model), raw_tensors(tmp_path / "out")
    dense = {name for name in source if ".experts." not in name and name not in (*whole(run), "lm_head.weight")}
    assert all(written[name] == source[name] for name in dense)
    assert {v[1] for v in written.values()} == {"BF16"}
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


def test_a_declaration_of_several_formats_loses_the_one_that_is_gone() -> None:
    fp8, int4 = {"weights": {"num_bits": 8, "type": "float"}}, {"weights": {"num_bits": 4, "type": "int"}}
    said = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"a": fp8, "b": int4}}
    except_modules(said, ["model.layers.1.mlp.experts"], four_bit_left=False)
    assert said["ignore"] == ["lm_head", r"re:model\.layers\.1\.mlp\.experts\..*"]
    assert said["config_groups"] == {"a": fp8}
    except_modules(said := {**said, "config_groups": {"a": fp8, "b": int4}}, [], four_bit_left=True)
    assert said["config_groups"] == {"a": fp8, "b": int4}


def test_a_router_in_few_bits_comes_out_in_16(tmp_path: Path) -> None:
    world = World(tmp_path, moe_intermediate_size=64)
    to_fp8(world.model, only=re.compile(rf"{LINEAR.pattern}|mlp\.gate\.weight$"))
    run = Run(world.model, world.finished("short", **SHORT) / "delta.safetensors", world)
    export(run, tmp_path / "out", "--no-evaluate")
    source, written = raw_tensors(run.model), raw_tensors(tmp_path / "out")
    routers = [name for name in whole(run) if name.endswith("mlp.gate.weight")]
    assert {source[name][1] for name in routers} == {"F8_E4M3"}
    assert {written[name][1] for name in whole(run)} == {"BF16"}
    left_alone = read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules_to_not_convert"]
    layers = [f"model.layers.{i}.mlp" for i in (2, 3)]
    assert left_alone == [name for layer in layers for name in (f"{layer}.experts", f"{layer}.gate")]
    checkpoint = Checkpoint(tmp_path / "out")
    for name, weight in whole(run).items():
        assert torch.equal(checkpoint.read(name), weight.to(torch.bfloat16))


@pytest.mark.parametrize("what", FORMATS)
def test_onto_the_dequantized_base(run_of: Callable[[str], Run], what: str, tmp_path: Path) -> None:
    """Native four-bit experts are their own dequantised base: those that were not trained stay as they are."""
    run, form = run_of(what), FORMATS[what]
    figures = export(run, tmp_path / "out", "--base", "dequantized", "--dtype", "fp32")
    trained, checkpoint = deltas(run), Checkpoint(tmp_path / "out")
    native = form.name in ("int4", "mxfp4")
    for target, weight in bases(run).items():
        stored = torch.stack([checkpoint.read_expert(target, e) for e in range(len(weight))])
        assert (checkpoint.four_bit(target) is not None) == (what == "mxfp4" and target not in trained)
        assert torch.equal(stored.float(), weight + trained.get(target, torch.zeros(()))), target
    for evaluation in figures["evaluations"]:
        if native:  # both bases are one
            assert evaluation["loss_original"] == evaluation["loss_dequantized"]
        assert evaluation["loss_dequantized"] == pytest.approx(evaluation["loss_as_trained"], abs=2e-3)


def test_without_anything_left_in_few_bits_the_declaration_goes(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """As of a gpt-oss trained in all layers."""
    root = tmp_path / "world"
    root.mkdir()
    world = World(root, "gpt_oss", intermediate_size=96)
    to_mxfp4(world.model)
    folder = world.finished("all", **SHORT, TRAIN_FROM=0)
    run = Run(world.model, folder / "delta.safetensors", world)
    export(run, tmp_path / "out", "--no-evaluate")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert {v[1] for v in raw_tensors(tmp_path / "out").values()} == {"BF16"}
    loaded(tmp_path / "out", FORMATS["mxfp4"])
