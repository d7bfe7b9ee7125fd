"""Every bad input ends in one line that names setting or file, with exit status 2, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, tiny_config, write_checkpoint, write_tokens
from runs import World
from safetensors.torch import load_file, save_file

from usaf.quantization import quantize_4bit
from usaf.train import main

Prepare = Callable[[World, Path], dict[str, object]]
"""Damages something below the folder it gets, and returns the settings that lead there."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Never trained in, so that its model has no 4-bit file either."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def refused(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, object], flags: list[str],
    *words: str,
) -> str:  # fmt: skip
    """The one line, after checking everything that holds of all refusals."""
    before = snapshot(world.root), snapshot(tmp_path)
    capsys.readouterr()
    assert main(flags, world.environ("run", **{"OUTPUT_DIR": tmp_path / "runs", **changes})) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("error: ")
    assert not [word for word in words if word not in captured.err], captured.err
    assert "Traceback" not in captured.out
    assert (snapshot(world.root), snapshot(tmp_path)) == before
    return captured.err


# ---- settings -------------------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[dict[str, object], list[str], list[str]]] = [
    ({"STEP": 10}, [], ["STEP=10", "STEPS", "USAF_IGNORE"]),
    ({"LR_PEEK": "1e-3"}, [], ["LR_PEEK", "LR_PEAK"]),
    ({"SEQLEN": 10}, [], ["SEQLEN", "SEQ_LEN"]),
    ({}, ["--lr", "1"], ["--lr", "--lr-peak"]),
    ({}, ["--config", "x.yaml"], ["--config"]),
    ({}, ["data.jsonl"], ["data.jsonl", "--flag"]),
    ({}, ["--steps"], ["--steps"]),
    ({}, ["--steps", ""], ["STEPS", "--steps"]),
    ({}, ["--steps", "0"], ["STEPS=0", "flag --steps", "at least 1"]),
    ({"STEPS": "ten"}, [], ["STEPS=ten", "whole number"]),
    ({"STEPS": "1.5"}, [], ["STEPS=1.5"]),
    ({"FRAC": 0}, [], ["FRAC=0"]),
    ({"FRAC": 1.01}, [], ["FRAC=1.01"]),
    ({"FRAC": "nan"}, [], ["FRAC=nan"]),
    ({"MICROBATCH": 0}, [], ["MICROBATCH=0"]),
    ({"ACCUM": 0}, [], ["ACCUM=0"]),
    ({"SEQ_LEN": 7}, [], ["SEQ_LEN=7"]),
    ({"LR_PEAK": -1}, [], ["LR_PEAK=-1"]),
    ({"LR_PEAK": "inf"}, [], ["LR_PEAK=inf"]),
    ({"ROUTER_LR": -1}, [], ["ROUTER_LR=-1"]),
    ({"RESELECT_EVERY": -1}, [], ["RESELECT_EVERY=-1"]),
    ({"DROP_FRACTION": 1.5}, [], ["DROP_FRACTION=1.5"]),
    ({"SAVE_EVERY": 0}, [], ["SAVE_EVERY=0"]),
    ({"KEEP_CHECKPOINTS": 0}, [], ["KEEP_CHECKPOINTS=0"]),
    ({"SEED": -1}, [], ["SEED=-1"]),
    ({"USE_CUDA": 2}, [], ["USE_CUDA=2"]),
    ({"USE_RESIDENT": "maybe"}, [], ["USE_RESIDENT=maybe", "auto"]),
    ({"USE_AMP": "x"}, [], ["USE_AMP=x"]),
    ({"CACHE_DTYPE": "int8"}, [], ["CACHE_DTYPE=int8", "bf16"]),
    ({"ATTENTION": "flash"}, [], ["ATTENTION=flash", "sdpa"]),
    ({"QUANT_BITS": 3}, [], ["QUANT_BITS=3"]),
    ({"GROUP_SIZE": 7}, [], ["GROUP_SIZE=7"]),
    ({"IMPORTANCE_SAMPLES": 1}, [], ["IMPORTANCE_SAMPLES=1"]),
    ({"IMPORTANCE_SCORE": "fisher"}, [], ["IMPORTANCE_SCORE=fisher"]),
    ({"RUN_TAG": "a/b"}, [], ["RUN_TAG=a/b"]),
    ({"RUN_TAG": ".."}, [], ["RUN_TAG=.."]),
    ({"HELDOUT_PATH": "a,,b"}, [], ["HELDOUT_PATH=a,,b"]),
    ({"EPOCHS": 2}, [], ["STEPS=12", "EPOCHS=2"]),
    ({"CAPTURE_STEPS": 5}, [], ["CAPTURE_STEPS=5", "RESELECT_EVERY=4"]),
    ({"TRAIN_FROM": 4}, [], ["TRAIN_FROM=4", "4 layers", "0 to 3"]),
    ({"TRAIN_FROM": -1}, [], ["TRAIN_FROM=-1"]),
    ({"RESUME": "nowhere"}, [], ["RESUME=nowhere", "settings.json"]),
]


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    BAD_SETTINGS,
    ids=[" ".join([*(f"{k}={v}" for k, v in changes.items()), *flags]) for changes, flags, _ in BAD_SETTINGS],
)
def test_bad_setting(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], flags: list[str],
    words: list[str],
) -> None:  # fmt: skip
    if flags and flags[0] == "--steps":
        changes = {**changes, "STEPS": None}
    refused(world, capsys, tmp_path, changes, flags, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(world, capsys, tmp_path, {"USE_CUDA": 1}, [], "USE_CUDA=1", "leave USE_CUDA unset")


# ---- data -----------------------------------------------------------------------------------------------------------


def tokens(n: int = 12, vocab: int = VOCAB) -> dict[str, list[int]]:
    ids = [(97 * i + 3) % vocab for i in range(n)]
    return {"input_ids": ids, "labels": ids}


def shifted(n: int = 12) -> dict[str, list[int]]:
    ids = tokens(n)["input_ids"]
    return {"input_ids": ids, "labels": [*ids[1:], 5]}


def lines(*samples: object) -> bytes:
    return "".join((s if isinstance(s, str) else json.dumps(s)) + "\n" for s in samples).encode()


GOOD = [tokens(10 + i) for i in range(6)]
BAD_DATA: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["no samples"]),
    "blank lines": (b"\n\n  \n", ["no samples"]),
    "broken line": (lines(*GOOD, '{"input_ids": [1, 2'), ["line 7", "not valid JSON"]),
    "array": (b"[" + lines(GOOD[0]) + b"]", ["line 1", "JSONL"]),
    "unknown form": (lines({"prompt": "x"}), ["line 1", "unknown form"]),
    "unequal lengths": (lines(*GOOD, {"input_ids": [1, 2, 3], "labels": [1, 2]}), ["line 7", "3 entries", "has 2"]),
    "outside the vocabulary": (lines(*GOOD, tokens(12, 1000)), ["line 7", "vocabulary of 128"]),
    "label outside": (
        lines(*GOOD, {"input_ids": [1, 2, 3], "labels": [1, 2, 128]}),
        ["line 7"],
    ),
    "negative id": (lines(*GOOD, {"input_ids": [1, -2, 3], "labels": [1, -2, 3]}), ["line 7", "input_ids[1] is -2"]),
    "fractional id": (lines({"input_ids": [1.5]}), ["line 1", "whole number"]),
    "no ids": (lines({"input_ids": []}), ["line 1", "empty"]),
    "UTF-16": (lines(*GOOD).decode().encode("utf-16"), ["line 1", "UTF-8", "UTF-16"]),
    "Latin-1": ('{"text": "caf\xe9"}\n'.encode("latin-1"), ["line 1", "UTF-8"]),
    "both label conventions": (lines(*GOOD, shifted(), *GOOD), ["mixture", "line 1 is aligned", "line 7 is shifted"]),
    "neither convention": (lines(*GOOD, {"input_ids": [1, 2, 3], "labels": [7, 8, 9]}), ["line 7", "neither"]),
    "two kinds": (lines(*GOOD, {"text": "x"}), ["line 7", "kind text", "kind tokens"]),
    "too few": (lines(GOOD[0]), ["too few"]),
    "text without a tokenizer": (lines(*[{"text": "x" * 50}] * 6), ["tokenizer", "MODEL"]),
    "nothing to learn": (lines(*[{"input_ids": [1, 2], "labels": [-100, -100]}] * 6), ["token to learn"]),
    "beyond the context": (lines(*GOOD, *[tokens(300)] * 6), ["SEQ_LEN=512", "300 tokens", "256"]),
}  # fmt: skip


@pytest.mark.parametrize("setting", ["DATASET_PATH", "HELDOUT_PATH"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, setting: str) -> None:
    if name == "too few" and setting == "HELDOUT_PATH":
        pytest.skip("one sample is enough to evaluate")
    data, words = BAD_DATA[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    named = [] if name == "beyond the context" else [str(path)]
    refused(world, capsys, tmp_path, {setting: path}, [], *named, *words)


@pytest.mark.parametrize("setting", ["DATASET_PATH", "HELDOUT_PATH"])
@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_data_that_is_no_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, setting: str
) -> None:
    refused(world, capsys, tmp_path, {setting: tmp_path / name}, [], str(tmp_path / name))


def test_two_heldout_files_of_one_name(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [write_tokens(tmp_path / folder / "same.jsonl") for folder in "ab"]
    refused(world, capsys, tmp_path, {"HELDOUT_PATH": f"{paths[0]},{paths[1]}"}, [], "HELDOUT_PATH", *map(str, paths))


# ---- models ---------------------------------------------------------------------------------------------------------


def own_model(world: World, folder: Path) -> Path:
    model = folder / "own-model"
    shutil.copytree(world.model, model)
    return model


def rewrite_config(model: Path, **changes: Any) -> dict[str, object]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return {"MODEL": model}


def missing(world: World, folder: Path) -> dict[str, object]:
    return {"MODEL": folder / "own-model"}


def a_file(world: World, folder: Path) -> dict[str, object]:
    return {"MODEL": world.model / "config.json"}


def empty_folder(world: World, folder: Path) -> dict[str, object]:
    (folder / "own-model").mkdir()
    return {"MODEL": folder / "own-model"}


def config_not_json(world: World, folder: Path) -> dict[str, object]:
    model = own_model(world, folder)
    (model / "config.json").write_text("{", encoding="utf-8")
    return {"MODEL": model}


def unknown_type(world: World, folder: Path) -> dict[str, object]:
    changes = {"model_type": "nothing_like_this", "architectures": ["NothingLikeThisForCausalLM"]}
    return rewrite_config(own_model(world, folder), **changes)


def unknown_activation(world: World, folder: Path) -> dict[str, object]:
    return rewrite_config(own_model(world, folder), hidden_act="nothing_like_this")


def already_quantised(world: World, folder: Path) -> dict[str, object]:
    return rewrite_config(own_model(world, folder), quantization_config={"quant_method": "awq", "bits": 4})


def dense(world: World, folder: Path) -> dict[str, object]:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCAB,
        intermediate_size=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "own-model")
    return {"MODEL": folder / "own-model"}


def truncated(world: World, folder: Path) -> dict[str, object]:
    model = own_model(world, folder)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"MODEL": model}


def no_weights(world: World, folder: Path) -> dict[str, object]:
    model = own_model(world, folder)
    (model / "model.safetensors").unlink()
    return {"MODEL": model}


def sharded(world: World, folder: Path) -> Path:
    """The model in two files with an index."""
    model = own_model(world, folder)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return model


def missing_shard(world: World, folder: Path) -> dict[str, object]:
    model = sharded(world, folder)
    (model / "model-00002-of-00002.safetensors").unlink()
    return {"MODEL": model}


def truncated_shard(world: World, folder: Path) -> dict[str, object]:
    model = sharded(world, folder)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return {"MODEL": model}


def shard_elsewhere(written: str) -> Prepare:
    """written: what the index says in the place of the name of a shard, which lies there for this test."""

    def prepare(world: World, folder: Path) -> dict[str, object]:
        model = sharded(world, folder)
        index = model / "model.safetensors.index.json"
        name = written.format(folder=folder)
        (model / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(model / "model-00002-of-00002.safetensors", model / name)
        text = index.read_text(encoding="utf-8").replace('"model-00002-of-00002.safetensors"', json.dumps(name))
        index.write_text(text, encoding="utf-8")
        return {"MODEL": model}

    return prepare


def expert_of_integers(world: World, folder: Path) -> dict[str, object]:
    """One expert's tensor alone, which joined to the others would pass for a float."""
    model = own_model(world, folder)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.3.up_proj.weight"))
    tensors[name] = tensors[name].view(torch.int16)
    save_file(tensors, model / "model.safetensors")
    return {"MODEL": model}


def groups_without_names(world: World, folder: Path) -> dict[str, object]:
    own_model(world, folder)
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [{"weights": None}]}
    return rewrite_config(folder / "own-model", quantization_config=said)


def without_tensor(part: str) -> Prepare:
    def prepare(world: World, folder: Path) -> dict[str, object]:
        model = own_model(world, folder)
        tensors = load_file(model / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) < len(tensors)
        save_file(kept, model / "model.safetensors")
        return {"MODEL": model}

    return prepare


BAD_MODELS: dict[str, tuple[Prepare, list[str]]] = {
    "missing": (missing, ["MODEL="]),
    "a file": (a_file, ["MODEL="]),
    "an empty folder": (empty_folder, ["config.json"]),
    "config is not JSON": (config_not_json, ["config.json"]),
    "unknown type": (unknown_type, ["nothing_like_this"]),
    "unknown activation": (unknown_activation, ["config.json", "nothing_like_this"]),
    "already quantised": (already_quantised, ["awq"]),
    "dense": (dense, ["no MoE layers", "llama"]),
    "truncated": (truncated, ["model.safetensors", "download it again"]),
    "no weights": (no_weights, ["model.safetensors"]),
    "a missing shard": (missing_shard, ["model-00002-of-00002.safetensors"]),
    "a truncated shard": (truncated_shard, ["model-00002-of-00002.safetensors"]),
    "a shard above": (shard_elsewhere("../elsewhere.safetensors"), ["index.json", "../elsewhere.safetensors"]),
    "a shard below": (shard_elsewhere("below/x.safetensors"), ["index.json", "below/x.safetensors"]),
    "a shard by its full path": (shard_elsewhere("{folder}/x.safetensors"), ["index.json", "x.safetensors"]),
    "an expert of integers": (expert_of_integers, ["experts.3.up_proj.weight", "torch.int16"]),
    "groups without names": (groups_without_names, ["config.json", "config_groups"]),
    "without a norm": (without_tensor("layers.1.input_layernorm"), ["layers.1.input_layernorm"]),
    "without an expert": (without_tensor("layers.3.mlp.experts.5.up_proj"), ["layers.3.mlp.experts"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    prepare, words = BAD_MODELS[name]
    changes = prepare(world, tmp_path)
    refused(world, capsys, tmp_path, changes, [], *words)


def test_a_model_id_without_a_network(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, object] = {"MODEL": "nobody/nothing-like-this"}
    refused(world, capsys, tmp_path, changes, [], "MODEL=nobody/nothing-like-this")


# ---- the 4-bit file -------------------------------------------------------------------------------------------------


def legacy_entries(experts: int = 8) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{layer}.mlp.experts.{part}": quantize_4bit(torch.randn(experts, *shape, generator=generator))
        for layer in range(4)
        for part, shape in (("gate_up_proj", (96, 64)), ("down_proj", (64, 48)))
    }


def quantised_of_another(world: World, folder: Path) -> Path:
    from families import build

    other = write_checkpoint(folder / "other", num_experts=4)
    build(other)
    return other / "experts_q4.safetensors"


def quantised_truncated(world: World, folder: Path) -> Path:
    from families import build

    build(own_model(world, folder))
    path = folder / "own-model" / "experts_q4.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return path


def rewritten_header(damage: Callable[[dict[str, Any]], object]) -> Callable[[World, Path], Path]:
    """The world's own 4-bit file, but for what `damage` does to its header."""

    def prepare(world: World, folder: Path) -> Path:
        from families import build

        build(own_model(world, folder))
        path = folder / "own-model" / "experts_q4.safetensors"
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        damage(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        return path

    return prepare


def scales_of_another_shape(header: dict[str, Any]) -> None:
    entry = header["model.layers.0.mlp.experts.down_proj.scale"]
    entry["shape"] = [1, math.prod(entry["shape"]), 1]


def not_quantised(world: World, folder: Path) -> Path:
    save_file({"x": torch.zeros(2)}, folder / "q.safetensors")
    return folder / "q.safetensors"


def legacy_of_another(world: World, folder: Path) -> Path:
    torch.save(legacy_entries(experts=4), folder / "experts_q4.pt")
    return folder / "experts_q4.pt"


def legacy_with_code(world: World, folder: Path) -> Path:
    Point = namedtuple("Point", "x")
    globals()["Point"] = Point  # picklable
    Point.__module__, Point.__qualname__ = __name__, "Point"
    torch.save({"model.layers.0.mlp.experts.gate_up_proj": Point(1)}, folder / "experts_q4.pt")
    return folder / "experts_q4.pt"


def legacy_missing(world: World, folder: Path) -> Path:
    return folder / "nothing.pt"


def wrong_suffix(world: World, folder: Path) -> Path:
    return folder / "experts.bin"


BAD_QUANTISED: dict[str, tuple[Callable[[World, Path], Path], list[str]]] = {
    "of another model": (quantised_of_another, ["another model"]),
    "truncated": (quantised_truncated, ["whole safetensors file"]),
    "entries that are no JSON": (rewritten_header(lambda h: h["__metadata__"].update(entries="{")), ["damaged"]),
    "no entries": (rewritten_header(lambda h: h["__metadata__"].pop("entries")), ["damaged"]),
    "scales of another name": (
        rewritten_header(lambda h: h.update({"x": h.pop("model.layers.0.mlp.experts.down_proj.scale")})),
        ["damaged"],
    ),
    "scales of another shape": (rewritten_header(scales_of_another_shape), ["damaged"]),
    "not 4-bit experts": (not_quantised, ["4-bit experts"]),
    "legacy of another model": (legacy_of_another, ["another model"]),
    "legacy with code": (legacy_with_code, ["code"]),
    "legacy, missing": (legacy_missing, ["QUANT_PATH"]),
    "wrong suffix": (wrong_suffix, ["QUANT_PATH", ".safetensors"]),
}


@pytest.mark.parametrize("name", BAD_QUANTISED)
def test_bad_4bit_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Told before data are read and a folder is made."""
    prepare, words = BAD_QUANTISED[name]
    path = prepare(world, tmp_path)
    monkeypatch.delattr("usaf.session.read_data")
    refused(world, capsys, tmp_path, {"QUANT_PATH": path}, [], str(path), *words)


def test_a_4bit_file_of_other_settings(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from families import build

    build(own_model(world, tmp_path), group_size=64)
    line = refused(world, capsys, tmp_path, {"MODEL": tmp_path / "own-model"}, [], "GROUP_SIZE=128")
    assert "experts_q4.safetensors" in line


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    before = snapshot(world.root)
    assert world.train("run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    assert "free" in errors[0]
    assert "QUANT_PATH" in errors[0]
    assert snapshot(world.root) == before


@pytest.mark.parametrize("setting", ["OUTPUT_DIR", "PREFIX_CACHE_DIR"])
def test_a_folder_that_cannot_be_made(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    """A cache that cannot be written costs time only, so a run goes on without it."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    blocked = tmp_path / "file" / "below"
    own = World(tmp_path / "own")
    status = own.train("run", **{setting: blocked, "STEPS": 1})
    captured = capsys.readouterr()
    if setting == "OUTPUT_DIR":
        assert status == 2
        assert len([line for line in captured.err.splitlines() if line.startswith("error: ")]) == 1
        assert str(blocked) in captured.err
        assert not (own.model / "experts_q4.safetensors").exists()
    else:
        assert status == 0
        assert str(blocked) in captured.out


def test_a_shape_that_config_and_weights_do_not_share(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The 4-bit file may stay, whole, but no folder of a run."""
    model = own_model(world, tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors")
    assert world.train("run", MODEL=model, OUTPUT_DIR=tmp_path / "runs", QUANT_PATH=tmp_path / "q.safetensors") == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "model.norm.weight" in errors[0]
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_the_good_input_is_good(world: World, tmp_path: Path) -> None:
    """The settings that every test here spoils one of do train, so that the refusals mean something."""
    assert tiny_config("qwen3_moe").num_hidden_layers == 4
    assert world.train("run", OUTPUT_DIR=tmp_path, QUANT_PATH=tmp_path / "q.safetensors", STEPS=1) == 0
