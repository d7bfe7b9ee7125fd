"""scripts/make_fullsize.py: published shapes, weights of the promised size, the same bytes for the same seed; and all
else takes the folder as any model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, random_batch, tiny_config
from runs import TINY, read_json
from transformers import AutoConfig, AutoModelForCausalLM

from usaf.architecture import meta_model
from usaf.checkpoint import Checkpoint
from usaf.evaluation import routing_entropy
from usaf.expert_store import FILE_NAME, read_store
from usaf.quantization import dequantize
from usaf.train import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import make_fullsize

SCRIPT = Path(make_fullsize.__file__)
MODELS = list(make_fullsize.published_configs())
PARAMETERS = {"qwen3-30b-a3b": 30_532_122_624, "mixtral-8x7b": 46_702_792_704, "olmoe-1b-7b": 6_919_161_856}


def small(**changes: Any) -> Any:
    """Wide enough for statistics, and a hidden size whose last group is a short one."""
    return tiny_config("qwen3_moe", hidden_size=192, moe_intermediate_size=96, num_experts=16, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    make_fullsize.make(small(dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"]), folder, 0, 48, 40, 24)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_published(name: str) -> None:
    """Of which the number of parameters, known for each, is the sum."""
    config = make_fullsize.published_config(name)
    assert sum(tensor.numel() for tensor in meta_model(config).state_dict().values()) == PARAMETERS[name]
    sizes = make_fullsize.Plan(config, 0, config.num_hidden_layers).sizes()
    assert sizes.parameters == PARAMETERS[name]
    assert sizes.experts_bytes == sizes.expert_parameters // 2 + sizes.expert_parameters // 128 * 4
    few = make_fullsize.published_config(name, 2)
    assert few.num_hidden_layers == 2
    assert few.hidden_size == config.hidden_size


def test_qwen3_says_what_its_config_says(tmp_path: Path) -> None:
    make_fullsize.published_config("qwen3-30b-a3b").save_pretrained(tmp_path)
    said = read_json(tmp_path / "config.json")
    wanted = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48,
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "norm_topk_prob": True, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.num_experts, loaded.num_experts_per_tok) == (128, 8)
    assert loaded.rope_parameters["rope_theta"] == 1e6


def test_decoded_weights_have_the_promised_size(folder: Path) -> None:
    store = read_store(folder / FILE_NAME)
    assert store.source is None
    small_std = make_fullsize.WEIGHT_STD / (2 * 48) ** 0.5
    for name, entry in store.entries.items():
        weights = dequantize(entry).double()
        std = small_std if name.endswith("down_proj") else make_fullsize.WEIGHT_STD
        assert float(weights.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(weights.mean())) < 0.02 * std
        assert float(weights.abs().max()) < 6 * std
        assert len(torch.unique(entry.scale)) > 100
        kurtosis = float(((weights - weights.mean()) / weights.std()).pow(4).mean())
        assert 2.5 < kurtosis < 3.5
    codes = torch.bincount(torch.from_numpy(make_fullsize.codes()).reshape(-1).long(), minlength=16) / (4 * 65536)
    assert bool((codes > 0.002).all())
    assert float(codes.max()) < 0.16


def test_dense_weights_and_pad_nibbles(tmp_path: Path) -> None:
    make_fullsize.make(tiny_config("mixtral", intermediate_size=31, hidden_size=64), tmp_path / "odd", 0, 2)
    checkpoint = Checkpoint(tmp_path / "odd")
    assert "model.layers.0.block_sparse_moe.gate.weight" in checkpoint.shards
    for key in checkpoint.stored:
        value = checkpoint.tensor(key).double()
        assert checkpoint.stored_dtype(key) == torch.bfloat16
        if key.endswith("norm.weight"):
            assert abs(float(value.mean()) - 1) < 0.05
        elif "gate" not in key:
            expected = {"o_proj": 0.01, "embed_tokens": 1.0}.get(key.split(".")[-2], 0.02)
            assert float(value.std()) == pytest.approx(expected, rel=0.05)
    down = read_store(tmp_path / "odd" / FILE_NAME)["model.layers.0.mlp.experts.down_proj"]
    assert down.shape == (4, 64, 31)
    assert int(down.packed[..., -1].max()) < 16
    assert int(down.packed[..., -2].max()) > 16


def test_same_seed_same_bytes_and_layers_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"])
    make_fullsize.make(config, tmp_path / "again", 0, 48, 40, 24)
    assert digests(tmp_path / "again") == digests(folder)
    make_fullsize.make(config, tmp_path / "other", 1, 48, 40, 24)
    changed = digests(tmp_path / "other")
    assert all(changed[name] != digest for name, digest in digests(folder).items() if "json" not in name)
    assert changed["data.jsonl"] != digests(folder)["data.jsonl"]
    monkeypatch.setattr(make_fullsize, "SHARD_BYTES", 100_000)
    config.num_hidden_layers = 2
    make_fullsize.make(config, tmp_path / "fewer", 0, 48)
    whole, fewer = Checkpoint(folder), Checkpoint(tmp_path / "fewer")
    assert len(set(fewer.shards.values())) > 1
    assert all(torch.equal(fewer.tensor(key), whole.tensor(key)) for key in fewer.stored)
    for name, entry in read_store(tmp_path / "fewer" / FILE_NAME).entries.items():
        for part, tensor in entry.tensors().items():
            assert torch.equal(tensor, read_store(folder / FILE_NAME)[name].tensors()[part])


@torch.no_grad()
def test_states_keep_their_size_and_experts_get_uneven_loads(tmp_path: Path) -> None:
    config = small(num_hidden_layers=48, num_experts_per_tok=4)
    make_fullsize.make(config, tmp_path / "deep", 0, 48)
    model = build(tmp_path / "deep")
    batch = random_batch([[64]] * 8)
    chosen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: chosen.append(args[1]))
    state, sizes = None, []
    for i in range(48):
        state = model.run_layers(batch, i, i + 1, state, norm=False)
        sizes.append(float(state.std()))
    assert min(sizes) > 0.8
    assert max(sizes) < 2
    assert state is not None
    common = state[:, 1:].mean((0, 1)).norm() / state[:, 1:].norm(dim=-1).mean()
    assert float(common) < 0.6, "tokens are no longer told apart"
    loads = [torch.bincount(ids.reshape(-1), minlength=16) for ids in chosen]
    entropies = torch.tensor([routing_entropy(load) for load in loads])
    assert 0.9 < float(entropies.min()) <= float(entropies.mean()) < 0.995
    highest = torch.stack(loads).double().amax(1) / loads[0].double().mean()
    assert 1.3 < float(highest.mean()) < 3


def test_the_main_job_trains_it(folder: Path, tmp_path: Path) -> None:
    """Prepared, loaded, trained and evaluated like any model, and read by transformers once it is exported."""
    settings = {**TINY, "MODEL": str(folder), "DATASET_PATH": str(folder / "data.jsonl"), "STEPS": "2",
                "OUTPUT_DIR": str(tmp_path), "RUN_TAG": "a", "RESELECT_EVERY": "0"}  # fmt: skip
    assert main([], settings) == 0
    summary = read_json(tmp_path / "a" / "summary.json")
    assert summary["steps"] == 2
    assert abs(summary["train_loss_first"] - 4.85) < 1  # ln(128)
    assert all(layer["moved"] > 0 for layer in summary["experts_moved"])


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    make_fullsize.make(small(tie_word_embeddings=True), tmp_path / "tied", 0, 4)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "tied").shards
    build(tmp_path / "tied")


def test_data_are_aligned_and_of_the_vocabulary(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 40
    assert all(row["input_ids"] == row["labels"] and len(row["labels"]) == 24 for row in rows)
    ids = [i for row in rows for i in row["input_ids"]]
    assert 0 <= min(ids) <= max(ids) < 128
    counts = sorted((ids.count(i) for i in set(ids)), reverse=True)
    assert counts[0] > 5 * counts[len(counts) // 2]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--layers", "49"], "--layers 49: qwen3-30b-a3b has 48 layers; choose at most that"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--seq-len", "50000"], "--seq-len 50000: qwen3-30b-a3b has 40960 tokens of context"),
        (["--model", "gpt-5"], "argument --model: invalid choice"),
        ([], "the model needs 18.48 GB and the disk has 1.00 GB free; free some, or choose fewer --layers"),
    ],
)
def test_bad_flags_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], problem: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 2e9, "used": 1e9, "free": 1e9}))
    assert make_fullsize.main(["--output", str(tmp_path / "model"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert problem in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_whole_or_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    assert make_fullsize.main(["--output", str(tmp_path / "full")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_fullsize.Plan, "_write_codes", no_space)
    monkeypatch.setattr(make_fullsize, "published_config", lambda *_: small())
    assert make_fullsize.main(["--output", str(tmp_path / "new"), "--layers", "4"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine").read_text() == "keep"


def test_figures_and_an_empty_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_fullsize, "published_config", lambda _, layers: small(num_hidden_layers=layers))
    (tmp_path / "model").mkdir()
    figures = tmp_path / "figures.json"
    flags = ["--output", str(tmp_path / "model"), "--layers", "3", "--json", str(figures), "--data-rows", "2"]
    assert make_fullsize.main([*flags, "--seq-len", "16"]) == 0
    found = read_json(figures)
    assert (found["layers"], found["layers_published"], found["data_rows"], found["seq_len"]) == (3, 48, 2, 16)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert 0 < on_disk - found["experts_bytes"] - found["dense_bytes"] < 20_000
    assert not list(tmp_path.glob("*.partial"))


def test_help_answers_without_torch() -> None:
    code = f"""
import runpy, sys
sys.argv = ["make_fullsize.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_reads_the_dense_part(folder: Path) -> None:
    """Under the published names."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert all("experts" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, Checkpoint(folder).tensor("lm_head.weight").float())
