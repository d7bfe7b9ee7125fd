"""scripts/upcycle.py: what it builds is the dense model where it must be, differs where it should, and trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from smollm2 import fetched_model, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from usaf.train import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import upcycle

REPOSITORY = Path(__file__).resolve().parent.parent
GSM8K = Path(__file__).resolve().parent.parent / "data" / "gsm8k" / "train.jsonl"
QUICK = ["--experts", "4", "--calibration-tokens", "2048", "--heldout-tokens", "512"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("dense") / "model")


def run(model: Path, output: Path, *flags: str) -> dict[str, Any]:
    figures = output.with_name(f"{output.name}.json")
    assert upcycle.main(["--model", str(model), "--output", str(output), "--json", str(figures), *QUICK, *flags]) == 0
    return json.loads(figures.read_text(encoding="utf-8"))


@pytest.mark.parametrize("flags", [("--width", "64"), ("--construction", "copies")], ids=["all neurons", "no noise"])
def test_experts_that_hold_everything_are_the_dense_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """The residual of the refit is then zero, and routing weights sum to one, whoever is chosen."""
    monkeypatch.setattr(upcycle, "COPY_NOISE", 0.0)
    found = run(dense, tmp_path / "moe", *flags)
    assert found["layer_error_highest"] < 1e-8
    for name, expected in found["perplexity"]["dense"].items():
        for kind in ("moe", "random_experts", "swapped_experts"):
            assert found["perplexity"][kind][name] == pytest.approx(expected, rel=1e-3)
    ids = torch.arange(40).unsqueeze(0) + 300
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (dense, tmp_path / "moe")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-2 * float(logits[0].detach().std()))


def test_what_is_not_feed_forward_is_copied_bit_for_bit(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe", "--heldout-tokens", "0")
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    kept = {name for name in before if ".mlp." not in name}
    assert kept <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (tmp_path / "moe" / "LICENSE").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("12 x")["input_ids"] == [33, 34, 1792]


@pytest.mark.parametrize("construction", list(upcycle.CONSTRUCTIONS))
def test_experts_differ_and_take_their_share(dense: Path, tmp_path: Path, construction: str) -> None:
    found = run(dense, tmp_path / "moe", "--construction", construction)
    assert found["expert_difference_lowest"] > 0.05
    assert 0.2 < found["expert_load_lowest"] <= 1 <= found["expert_load_highest"] < 3
    assert all(0 < value < 1e6 for kind in found["perplexity"].values() for value in kind.values())
    assert found["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "moe").parameters()
    )


def test_slices_hold_every_neuron_once(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe", "--construction", "slices", "--heldout-tokens", "0")
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    rows = torch.cat([after[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in range(4)])
    expected = before["model.layers.1.mlp.gate_proj.weight"]
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_the_seed_decides(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(dense, tmp_path / name, "--heldout-tokens", "0", "--seed", seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(a[router], c[router])


def test_refit_is_the_weighted_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    neurons, down = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    target, weight = torch.randn(200, 3, generator=generator), torch.rand(200, generator=generator)
    found = upcycle.refit(neurons, target, weight, down)
    root = weight.sqrt().unsqueeze(1)
    ridge = (upcycle.RIDGE * (neurons.square() * weight.unsqueeze(1)).sum(0).mean()).sqrt()
    left = torch.cat([neurons * root, ridge * torch.eye(6)])
    right = torch.cat([target * root, ridge * down.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.T, rtol=1e-4, atol=1e-5)


def test_random_and_swapped_experts_are_what_they_say(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe", "--heldout-tokens", "0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    ids = torch.arange(64).unsqueeze(0) + 300
    seen: list[torch.Tensor] = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda _m, _i, out: seen.append(out[2]))
    model(ids)
    handle.remove()
    experts: list[torch.Tensor] = []
    module = model.model.layers[0].mlp.experts
    handle = module.register_forward_pre_hook(lambda _m, args: experts.append(args[1]))
    with upcycle.overruled(model, lambda chosen: (chosen + 1) % 4):
        model(ids)
    model(ids)
    handle.remove()
    torch.testing.assert_close(experts[0], (seen[0] + 1) % 4)
    torch.testing.assert_close(experts[1], seen[0])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--experts", "1"], "--experts 1: must be at least 2"),
        (["--top-k", "9"], "--top-k 9: there are 4 experts"),
        (["--width", "65"], "--width 65: the dense feed-forward has 64 neurons"),
        (["--construction", "slices", "--experts", "5"], "--construction slices: needs --width 12"),
        (["--construction", "copies", "--width", "32"], "--construction copies: needs --width 64"),
        (["--calibration-tokens", "100"], "--calibration-tokens 100: must be at least 512"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_flags_are_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str
) -> None:
    output = tmp_path / "moe"
    assert upcycle.main(["--model", str(dense), "--output", str(output), *QUICK, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert problem in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_full_folders_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased = tiny_llama(tmp_path / "biased", attention_bias=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    for model, output, problem in (
        (tmp_path / "nothing", tmp_path / "moe", "no config.json there"),
        (biased, tmp_path / "moe", "does not fit into Mixtral"),
        (dense, full, "is not an empty folder"),
    ):
        assert upcycle.main(["--model", str(model), "--output", str(output), *QUICK]) == 2
        assert problem in capsys.readouterr().err
    assert (full / "mine").read_text() == "keep"
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
def test_smollm2_becomes_a_mixture_that_usaf_trains(tmp_path: Path) -> None:
    """The real model with a short calibration: its perplexity stays near the dense one's as long as the router chooses,
    and three steps of USAF lower the loss on what they saw."""
    model = fetched_model()
    found = run(model, tmp_path / "moe", "--experts", "8", "--width", "512", "--calibration-tokens", "4096",
                "--heldout-tokens", "1024")  # fmt: skip
    perplexity = found["perplexity"]
    for name in ("train", "python_docs"):
        assert 5 < perplexity["dense"][name] < 40
        assert perplexity["moe"][name] < 4 * perplexity["dense"][name]
        assert perplexity["random_experts"][name] > 2 * perplexity["moe"][name]
        assert perplexity["swapped_experts"][name] > 2 * perplexity["moe"][name]
    assert found["expert_difference_lowest"] > 0.02
    assert found["router_fit_lowest"] > 0.6
    assert found["expert_load_highest"] < 3

    questions = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "gsm8k.jsonl").write_text("".join(questions), encoding="utf-8")
    settings = {
        "MODEL": tmp_path / "moe", "DATASET_PATH": tmp_path / "gsm8k.jsonl", "OUTPUT_DIR": tmp_path / "runs",
        "RUN_TAG": "a", "STEPS": 3, "TRAIN_FROM": 28, "FRAC": 0.02, "LR_PEAK": 1e-3, "SEQ_LEN": 256,
        "IMPORTANCE_SAMPLES": 4, "EVAL_SAMPLES": 2, "RESELECT_EVERY": 0, "WARMUP": 0, "USE_CUDA": 0,
    }  # fmt: skip
    assert main([], {name: str(value) for name, value in settings.items()}) == 0
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text(encoding="utf-8"))
    assert summary["model_type"] == "mixtral"
    for evaluation in summary["evaluations"]:
        assert evaluation["perplexity_after"] < evaluation["perplexity_before"]
