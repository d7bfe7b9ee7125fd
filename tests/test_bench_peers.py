"""scripts/bench_peers.py on a tiny model: every arm trains what its name says, from the same loss on the same batch."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_peers
from bench_model import Inputs, Sizes
from bench_peers import Plan, add_ratios, main, make_inputs, peer_arm, peers_table, probe, too_large, usaf_arm

SIZES = Sizes(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=16, experts=4, top_k=2, intermediate=32, vocab=256)
QUICK = [
    *("--hidden", "64", "--layers", "2", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--experts", "4"),
    *("--top-k", "2", "--intermediate", "32", "--vocab", "256", "--seq-len", "32", "--steps", "1", "--threads", "1"),
]
FRAC, RANK = 0.005, 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("peers")
    plan = Plan(Inputs(folder, SIZES, 4, 32), torch.get_num_threads(), 2, 1, 1, {"USE_RESIDENT": "0"})
    make_inputs(plan)
    return plan


def lora_weights(layers: int, shapes: list[tuple[int, int]]) -> int:
    """Of rank RANK on matrices [out, in]."""
    return layers * RANK * sum(rows + columns for rows, columns in shapes)


def expected_weights(arm: str) -> int:
    s = SIZES
    experts = [(2 * s.intermediate, s.hidden), (s.hidden, s.intermediate)] * s.experts
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = [(q, s.hidden), (kv, s.hidden), (kv, s.hidden), (s.hidden, q)]
    return {
        "lora-experts": lora_weights(s.layers, experts),
        "lora-attention": lora_weights(s.layers, attention),
        "dora": lora_weights(s.layers, attention) + s.layers * sum(rows for rows, _ in attention),
        "full": s.parameters,
    }[arm]


def test_sizes_count_the_models_weights(plan: Plan) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan.inputs.model)
    assert sum(p.numel() for p in model.parameters()) == SIZES.parameters
    assert 0.85e9 < Sizes().parameters < 0.95e9


@pytest.mark.parametrize(("arm", "layers"), [("usaf-all", 2), ("usaf-default", 1)])
def test_usaf_trains_the_weights_that_a_run_would(plan: Plan, arm: str, layers: int) -> None:
    found = usaf_arm(plan, arm)
    up, down = 4 * 2 * 32 * 64, 4 * 64 * 32
    assert found["active_parameters"] == layers * (int(FRAC * up) + int(FRAC * down))
    norms = layers * 2 * (64 + 16) + 64  # before attention and experts, of queries and keys; behind the layers
    assert found["whole_parameters"] == layers * 4 * 64 + norms
    assert found["trainable_parameters"] == found["active_parameters"] + found["whole_parameters"]
    assert found["parameters_with_gradient"] == found["trainable_parameters"]  # the step leaves none of them out
    assert found["train_from"] == 2 - layers
    assert (found["prefix_seconds"] is None) == (layers == 2)
    assert found["prefix_tokens"] == (0 if layers == 2 else 4 * 32)
    assert len(found["losses"]) == 2
    assert len(found["step_seconds_each"]) == len(found["warmup_seconds_each"]) == 1
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["losses"][0] == pytest.approx(peer_loss(plan), abs=0.02)  # the same batch; 4-bit experts


def peer_loss(plan: Plan) -> float:
    """The first loss by transformers alone."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.load(plan.batches)[0])
    model = AutoModelForCausalLM.from_pretrained(plan.inputs.model, dtype=torch.float32)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("arm", ["lora-experts", "lora-attention", "dora", "full"])
def test_peers_train_what_their_name_says(plan: Plan, arm: str) -> None:
    if arm != "full":
        pytest.importorskip("peft")
    found = peer_arm(plan, arm, "grouped_mm")
    if arm == "dora" and "on attention only" not in found["note"]:
        pytest.skip("this PEFT has DoRA on experts")
    assert found["trainable_parameters"] == expected_weights(arm)
    assert found["losses"][0] == pytest.approx(peer_loss(plan), abs=1e-4)
    assert math.isfinite(found["losses"][1])
    # Embeddings of ids that no batch has get none; in LoRA all are reached, once B has left zero.
    reached = found["parameters_with_gradient"] / found["trainable_parameters"]
    assert reached > 0.8 if arm == "full" else reached == 1
    assert found["experts_implementation"] == "grouped_mm"


def test_the_implementations_are_timed_or_said_to_be_too_large(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(plan, "full")
    assert found["seconds"].keys() | found["left_out"].keys() == {"grouped_mm", "batched_mm", "eager"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    import usaf.memory

    # 2 x 32 tokens, top-2, 3 x 64 x 32 weights of four bytes each, in two layers
    needed = 2 * 32 * 2 * 3 * 64 * 32 * 4 * 2
    monkeypatch.setattr(usaf.memory, "available_bytes", lambda: 2 * needed)
    assert too_large(plan, "batched_mm") is None
    monkeypatch.setattr(usaf.memory, "available_bytes", lambda: 2 * needed - 2)
    assert too_large(plan, "batched_mm") is not None
    assert too_large(plan, "grouped_mm") is None


def test_ratios_are_to_lora_on_the_experts() -> None:
    arms: list[dict[str, Any]] = [
        {"name": "usaf-all", "step_seconds": 1.0, "steps_peak_private_bytes": 20},
        {"name": "lora-experts", "step_seconds": 4.0, "steps_peak_private_bytes": 80},
        {"name": "full", "error": "killed"},
    ]
    add_ratios(arms)
    assert [arm["time_ratio_to_lora_experts"] for arm in arms] == [0.25, 1.0, None]
    assert [arm["memory_ratio_to_lora_experts"] for arm in arms] == [0.25, 1.0, None]
    alone = arms[:1]
    add_ratios(alone)
    assert alone[0]["time_ratio_to_lora_experts"] is None
    assert "failed" in peers_table([{"name": "full", "error": "killed"}])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "usaf-all,qlora"], "--arms qlora: must be among usaf-all"),
        (["--top-k", "5", "--experts", "4"], "--top-k 5: there are 4 experts"),
        (["--heads", "3", "--kv-heads", "2"], "--kv-heads 2: must divide --heads 3"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["use_resident=0"], "use_resident=0: must be a setting such as"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_measures_every_arm(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = tmp_path / "figures.json"
    assert main([*QUICK, "--keep", str(tmp_path / "kept"), "--json", str(path), "USE_RESIDENT=0"]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [arm["name"] for arm in found["arms"]] == list(bench_peers.ARMS)
    assert found["matmul_512_rows_flop_per_second"] > 0
    assert found["model"]["parameters"] == SIZES.parameters
    assert found["experts_probes"].keys() == set(bench_peers.PEER_ARMS)
    for arm in found["arms"]:
        assert all(math.isfinite(loss) for loss in arm["losses"])
        assert arm["tokens_per_second"] == pytest.approx(2 * 32 / arm["step_seconds"])
        assert arm["peak_private_bytes"] >= arm["steps_peak_private_bytes"] > 0
        assert arm["peak_resident_bytes"] >= arm["steps_peak_resident_bytes"] > 0
        assert arm["time_ratio_to_lora_experts"] > 0
        assert arm["memory_ratio_to_lora_experts"] > 0
    first = [arm["losses"][0] for arm in found["arms"]]
    assert max(first) - min(first) < 0.02  # all saw the same batch
