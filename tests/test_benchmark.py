"""scripts/benchmark.py: the counts of arithmetic agree with what torch counts, and with what is known of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import benchmark


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_forward_is_what_torch_counts(family: str) -> None:
    """Of torch's own count, which gives attention the whole square and the head every token."""
    config = tiny_config(family)
    work, length = benchmark.model_work(config), 40
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length).unsqueeze(0) + 3)
    counted = work.forward([length], (0, 4), head=True)
    whole_square = counted.attention * 2 * length / (length + 1)
    head = counted.head * length / (length - 1)
    # What is left is the rotary table, a product with one column.
    expected = counted.experts + counted.projections + whole_square + head
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_full_size_is_three_billion_active_weights() -> None:
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    work = benchmark.model_work(config)
    layer = work.layers[0]
    assert layer.up == 2 * 8 * 2 * 768 * 2048
    assert layer.down == 2 * 8 * 768 * 2048
    assert layer.projections == 2 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048)
    assert layer.attention == 4 * 32 * 128
    weights = sum(one.up + one.down + one.projections for one in work.layers) / 2 + work.head / 2
    assert 2.9e9 < weights + 2048 * 151936 < 3.4e9


def test_backward_leaves_out_what_nothing_below_needs() -> None:
    work = benchmark.model_work(tiny_config("qwen3_moe", mlp_only_layers=[2]))
    lengths, tokens = [10, 6], 16
    assert not work.layers[2].has_experts
    last = work.layers[3]
    top = work.input_gradients(lengths, 3)
    assert (top.experts, top.projections, top.attention) == (tokens * last.down, 0, 0)
    assert top.head == work.head * 14
    assert work.input_gradients(lengths, 2) == top  # the dense layer trains nothing
    one_more = work.input_gradients(lengths, 1)
    assert one_more.experts == tokens * (work.layers[1].down + last.up + last.down)
    assert one_more.attention == 2 * (55 + 21) * (work.layers[2].attention + last.attention)
    down = work.importance(lengths, 1, "down", head=False).total - work.step(lengths, 1, 0.0).total
    both = work.importance(lengths, 1, "all", head=False).total - work.step(lengths, 1, 0.0).total
    assert 3 * down == both  # gate, up and down are of one size
    dense, sampled = work.importance(lengths, 1), work.step(lengths, 1, 0.01)
    assert dense.experts - sampled.experts == pytest.approx(0.99 * work.forward(lengths, (1, 4)).experts)
    assert dense.head == 3 * work.head * 14  # logits, their gradient at the hidden states, and at the weights
    assert work.importance(lengths, 1, head=False).head == sampled.head == 2 * work.head * 14
    assert work.dense_gradients(lengths, 1, "down").head == work.head * 14
    assert work.step(lengths, 1, 0.01, 0.5).head == 2.5 * work.head * 14


def test_medians_rates_and_the_report(tmp_path: Path) -> None:
    calls: list[int] = []
    assert benchmark.timed(lambda: calls.append(1), 5) >= 0
    assert len(calls) == 5
    assert benchmark.matmul_rate(8, 16, 16) > 0
    found = benchmark.machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] in benchmark.machine_line(found)
    benchmark.write_json(tmp_path / "figures.json", {"machine": found, "rate": float("nan")})
    written = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert written["machine"] == found
    assert written["rate"] is None
    assert "command" in written
