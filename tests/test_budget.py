"""Planned memory: what is counted, and what is lowered for a limit. Against real runs: `test_memory_limit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config

from usaf.architecture import meta_model
from usaf.budget import (
    SLACK,
    SPILLABLE,
    Knobs,
    MemoryPlan,
    Work,
    _Count,
    evaluates_in_window,
    fit,
    last_reselection,
    memory_plan,
    plan_for_limit,
    trained_weights,
    work_of,
)
from usaf.errors import UserError
from usaf.importance import active_count, sample_chunks
from usaf.model_shape import ModelShape, model_shape
from usaf.quantization import hqq_encoding
from usaf.settings import load_settings, parse_size
from usaf.skeleton import handover
from usaf.sparse_head import BLOCK_ELEMENTS

BASELINE = 400_000_000
HIDDEN, EXPERTS, UP, INNER, TOP_K, LAYERS, VOCAB = 256, 32, 256, 128, 4, 8, 50_000
BLOCK = BLOCK_ELEMENTS // HIDDEN  # rows of the head


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    model = meta_model(tiny_config(
        "qwen3_moe", hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=INNER, vocab_size=VOCAB, num_attention_heads=8, head_dim=32,
    ))  # fmt: skip
    return model_shape(model, handover(model), lambda _: hqq_encoding(128, 4), 2, 1.0)


def work(**changes: Any) -> Work:
    values = load_settings([], {"PROJECTIONS": "all"}, {}).values
    return dataclasses.replace(work_of(values, 4, 512, 360 * 512, 360, 512, 128 * 512, 2, 2), **changes)


def plan_of(shape: ModelShape, **changes: Any) -> MemoryPlan:
    return memory_plan(shape, work(**changes), BASELINE)


def items(plan: MemoryPlan, name: str) -> dict[str, int]:
    return next(phase.items for phase in plan.phases if phase.name == name)


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_down_projections_alone_need_a_third_of_the_pairs(shape: ModelShape) -> None:
    both, down = (plan_of(shape, projections=p) for p in ("all", "down"))
    pairs = [items(plan, "reselection")["captured pairs"] for plan in (both, down)]
    assert 0.25 < pairs[1] / pairs[0] < 0.45
    assert items(down, "reselection")["training state"] == pytest.approx(
        items(both, "reselection")["training state"], rel=1e-6
    )  # as many weights


def test_importance_counts_inputs_of_all_layers_and_one_layers_pairs(shape: ModelShape) -> None:
    plan, tokens = plan_of(shape, head_trains=False), 64 * 512
    inputs = items(plan, "importance, forward")["inputs of lower layers"]
    assert inputs == int(SLACK * 4 * tokens * HIDDEN * 4)
    assert items(plan, "importance, backward")["inputs of lower layers"] == int(SLACK * 3 * tokens * HIDDEN * 4)
    pairs = items(plan, "importance, scoring")["pairs of one layer"]
    per_token = 4 * 2 * HIDDEN + TOP_K * 4 * (UP + INNER)  # X and dOut; dh and a
    assert per_token * tokens * SLACK < pairs < 1.1 * per_token * tokens * SLACK  # their index


def test_the_head_waits_beside_the_top_layers_pairs_until_it_is_scored(shape: ModelShape) -> None:
    with_head, without, tokens = plan_of(shape), plan_of(shape, head_trains=False), 64 * 512
    chunk = _Count(shape, work()).importance_chunk()
    kept = items(with_head, "importance, backward")["inputs of the head"]
    assert kept == int(SLACK * (tokens - chunk) * (4 * HIDDEN + 12))
    scoring = items(with_head, "importance, scoring")
    assert scoring["inputs of the head"] == int(SLACK * tokens * (4 * HIDDEN + 12))
    assert "pairs of one layer" not in scoring, "they are gone"
    assert scoring["head's gradients"] == int(SLACK * 2 * (36 * BLOCK * HIDDEN + 4 * chunk * BLOCK))
    mapped = plan_of(shape, spilled=frozenset({"importance"}))
    assert items(mapped, "importance, scoring")["inputs of the head"] == int(SLACK * tokens * 12)
    sizes = [plan_of(shape, spilled=frozenset({"importance"}), head_trains=h).disk["workspace"] for h in (True, False)]
    assert sizes[0] - sizes[1] == tokens * (4 * HIDDEN + 12)
    assert "inputs of the head" not in items(without, "importance, backward")


def test_squares_take_the_gathered_rows_once_more(shape: ModelShape) -> None:
    changes: dict[str, Any] = {"importance_rows": 64, "head_trains": True}
    one, other = (items(plan_of(shape, **changes, squares=s), "importance, scoring") for s in (False, True))
    key = next(key for key in one if key.endswith("gradients") and key != "gradients")
    assert one[key] < other[key] < 2 * one[key]
    assert {**one, key: 0} == {**other, key: 0}


def test_the_head_takes_its_share_of_what_trains(shape: ModelShape) -> None:
    for projections in ("all", "down"):
        found, frozen = (
            trained_weights(shape, work(projections=projections, head_trains=h)) for h in (True, False)
        )  # fmt: skip
        experts = EXPERTS * HIDDEN * (INNER if projections == "down" else INNER + UP)
        share = VOCAB * HIDDEN / (VOCAB * HIDDEN + 4 * experts)
        assert frozen.head == 0
        assert found.active == frozen.active
        assert found.head / found.active == pytest.approx(share, rel=1e-3)
        assert [up == 0 for up, _ in found.experts] == [projections == "down"] * 4


def test_the_largest_tensor_may_be_the_head(shape: ModelShape) -> None:
    head = trained_weights(shape, work()).head
    experts = max(map(max, trained_weights(shape, work()).experts))
    assert head > experts
    plan = plan_of(shape)
    assert items(plan, "step, update")["update of one tensor"] == int(SLACK * 16 * head)
    assert items(plan, "reselection")["selection"] == int(SLACK * (96 + 4 * 4) * head)


def test_training_state_is_28_bytes_an_active_weight_and_20_one_of_what_trains_whole(shape: ModelShape) -> None:
    up, down = EXPERTS * UP * HIDDEN, EXPERTS * HIDDEN * INNER
    active = 4 * (active_count(up, 0.005) + active_count(down, 0.005))
    routers, norms = 4 * EXPERTS * HIDDEN, 4 * (2 * HIDDEN + 2 * 32) + HIDDEN

    def state(**changes: Any) -> int:
        return items(plan_of(shape, **changes), "evaluate")["training state"]

    assert state() == state(head_trains=False) == int(SLACK * (28 * active + 20 * (routers + norms)))
    assert state(router_trains=False) == int(SLACK * (28 * active + 20 * norms))
    assert state(delta_scale=0.8) == state()
    assert state(delta_scale=1.0) == int(SLACK * (28 * active + 16 * (routers + norms))), "their base is not kept"
    assert state(router_trains=False, norms_train=False) == int(SLACK * 28 * active)


def test_captured_pairs_grow_with_steps_micro_batches_and_layers(shape: ModelShape) -> None:
    def captured(**changes: Any) -> int:
        return items(plan_of(shape, **changes), "reselection")["captured pairs"]

    one = captured(capture_steps=1)
    assert captured(capture_steps=4) == pytest.approx(4 * one, rel=1e-6)
    assert captured(capture_steps=1, accum=3) == pytest.approx(3 * one, rel=1e-6)
    pairs = captured(capture_steps=1, head_trains=False)
    assert captured(capture_steps=1, head_trains=False, start=6) == pytest.approx(pairs / 2, rel=1e-6)
    head = trained_weights(shape, work()).head
    assert one - pairs == pytest.approx(SLACK * (2 * 512 * (4 * HIDDEN + 12) + 4 * head), rel=1e-6)
    spilled = captured(capture_steps=4, spilled=frozenset({"captured"}))
    assert spilled == pytest.approx(one + SLACK * (3 * 4 * head + 4 * 12 * 2 * 512), rel=1e-6), "what has no file"
    assert "reselection" not in [phase.name for phase in plan_of(shape, capture_steps=0).phases]
    assert "captured pairs" not in items(plan_of(shape, capture_steps=0), "step, backward")


def test_rates_hold_what_enters_the_layers_and_the_head(shape: ModelShape) -> None:
    assert not [p for p in plan_of(shape, measured_rates=0).phases if p.name.startswith("learning rates")]
    plan, tokens = plan_of(shape, measured_rates=2), 64 * 512
    assert items(plan, "learning rates")["inputs of the line"] == int(SLACK * 2 * 4 * tokens * HIDDEN)
    assert "learning rates, prefix" not in [phase.name for phase in plan.phases]
    for changes, rows, kinds in (
        ({"head_trains": False}, 64, 1),
        ({"start": 0}, 64, 1),
        ({"importance_rows": 2}, 8, 2),
    ):
        found = items(plan_of(shape, measured_rates=2, **changes), "learning rates")["inputs of the line"]
        assert found == int(SLACK * kinds * 4 * rows * 512 * HIDDEN), changes
    uncached = items(plan_of(shape, measured_rates=2, cached=False), "learning rates, prefix")
    assert uncached["states of a stretch"] == int(SLACK * 4 * tokens * HIDDEN)  # all of them are one
    small = items(plan_of(shape, measured_rates=2, cached=False, stretch_bytes=1), "learning rates, prefix")
    assert small["states of a stretch"] < uncached["states of a stretch"]
    assert small["recomputed prefix"] < uncached["recomputed prefix"]
    chunk = plan_of(shape, measured_rates=2, cached=False, importance_rows=2)  # whose 8 sequences are less than a chunk
    assert items(chunk, "learning rates, prefix")["states of a stretch"] == int(SLACK * 4 * 8192 * HIDDEN)
    assert uncached["inputs of the line"] == int(SLACK * 2 * 4 * tokens * HIDDEN)
    few = items(plan_of(shape, measured_rates=2, train_tokens=64 * 512), "learning rates, prefix")  # none is left over
    assert few["inputs of the line"] == uncached["inputs of the line"]
    mapped = plan_of(shape, measured_rates=2, spilled=frozenset({"importance"}))
    assert "inputs of the line" not in items(mapped, "learning rates")
    assert mapped.disk["workspace"] >= 2 * 4 * tokens * HIDDEN


def test_the_scale_holds_what_enters_the_layers(shape: ModelShape) -> None:
    for given in (1.0, 0.8):
        assert not [p for p in plan_of(shape, delta_scale=given).phases if p.name.startswith("delta scale")]
    plan, of_all = plan_of(shape), int(SLACK * 4 * 64 * 512 * HIDDEN)
    names = [phase.name for phase in plan.phases]
    assert names.index("checkpoint") < names.index("delta scale") < names.index("evaluate")
    for name in ("delta scale", "delta scale, prefix"):  # these rows are in no cache
        assert items(plan, name)["inputs of the places"] == of_all
        assert items(plan, name)["training state"] == items(plan, "evaluate")["training state"]
    assert items(plan, "delta scale, prefix")["states of a stretch"] == of_all  # all of them are one
    mapped = plan_of(shape, spilled=frozenset({"stretch"}))
    assert "states of a stretch" not in items(mapped, "delta scale, prefix")
    assert "inputs of the places" not in items(plan_of(shape, start=0), "delta scale")
    assert "delta scale, prefix" not in [phase.name for phase in plan_of(shape, start=0).phases]
    mapped = plan_of(shape, measured_rates=0, spilled=frozenset({"importance"}))
    assert "inputs of the places" not in items(mapped, "delta scale")
    assert mapped.disk["workspace"] >= 4 * 64 * 512 * HIDDEN


def test_logits_are_one_chunk_of_the_vocabulary(shape: ModelShape) -> None:
    small, large = (items(plan_of(shape, head_chunk_tokens=n), "step, head")["logits of a chunk"] for n in (100, 200))
    assert large - small == pytest.approx(SLACK * 100 * 4 * (VOCAB + 4 * HIDDEN), rel=1e-6)
    own = 4 * trained_weights(shape, work()).head
    frozen = items(plan_of(shape, head_chunk_tokens=100, head_trains=False), "step, head")["logits of a chunk"]
    assert small - frozen == pytest.approx(SLACK * own, rel=1e-3)
    wide = dataclasses.replace(shape, stored_bytes=4)
    plans = (memory_plan(wide, work(head_trains=h), BASELINE) for h in (True, False))
    made = [items(plan, "step, head")["logits of a chunk"] for plan in plans]
    assert made[0] - made[1] == pytest.approx(SLACK * (own + 2 * 4 * BLOCK * HIDDEN), rel=1e-6), "only with deltas"


def test_nothing_is_cached_or_computed_where_every_layer_trains(shape: ModelShape) -> None:
    plan = plan_of(shape, start=0)
    assert "prefix" not in [phase.name for phase in plan.phases]
    assert plan.disk["prefix cache"] == 0
    assert "hidden states" not in items(plan, "evaluate before")
    assert plan.mapped["4-bit experts of frozen layers, once a stretch"] == 0


def test_disk_counts_every_file(shape: ModelShape) -> None:
    plan, active = plan_of(shape), 4 * (active_count(EXPERTS * UP * HIDDEN, 0.005) + active_count(
        EXPERTS * HIDDEN * INNER, 0.005))  # fmt: skip
    whole = trained_weights(shape, work()).whole
    assert plan.disk["4-bit experts"] == sum(layer.experts.stored_bytes for layer in shape.layers if layer.experts)
    assert plan.disk["prefix cache"] == (360 + 128) * 512 * HIDDEN * 2
    assert plan.disk["checkpoints"] == 3 * (24 * active + 16 * whole)
    assert plan.disk["delta"] == 8 * active + 4 * whole
    assert plan.disk["workspace"] == 0


def test_dense_weights_are_private_unless_they_are_mapped(shape: ModelShape) -> None:
    mapped, copied = plan_of(shape), memory_plan(dataclasses.replace(shape, mapped_share=0.0), work(), BASELINE)
    dense = 2 * (shape.shared_weights + sum(layer.linear_weights for layer in shape.layers))
    assert "dense weights" not in mapped.always
    assert mapped.mapped["dense weights"] == copied.always["dense weights"] == dense
    assert items(copied, "load")["largest dense weight"] == int(SLACK * 2 * 2 * VOCAB * HIDDEN)


def test_a_gpu_holds_what_it_computes(shape: ModelShape) -> None:
    host, device = plan_of(shape), plan_of(shape, on_device=True)
    assert device.peak_bytes < host.peak_bytes
    assert items(device, "importance, forward").keys() == {"inputs of lower layers"}
    assert sum(device.device.values()) > 0


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 64, 65])
@pytest.mark.parametrize("tokens", [100, 512, 1500, 4096])
def test_importance_runs_in_the_chunks_that_are_planned(shape: ModelShape, rows: int, tokens: int) -> None:
    count = _Count(shape, work(importance_rows=rows, prefix_chunk_tokens=tokens))
    chunks = sample_chunks(list(range(rows)), max(1, tokens // 512))
    assert count.importance_chunk() == 512 * max(len(chunk) for chunk in chunks)


@pytest.mark.parametrize(("every", "evaluations", "capture", "falls"), [
    (50, 30, 4, False), (50, 48, 4, True), (50, 50, 4, False), (10, 3, 2, True), (10, 0, 4, False), (50, 47, 4, True),
    (50, 47, 3, False),
])  # fmt: skip
def test_evaluations_within_a_capture_window_are_noticed(
    every: int, evaluations: int, capture: int, falls: bool
) -> None:
    values = load_settings([f"--reselect-every={every}", f"--eval-every={evaluations}"], {}, {}).values
    assert evaluates_in_window(values, capture) is falls
    assert last_reselection(values) == 108


def test_a_run_without_reselections_captures_nothing() -> None:
    for flag in ("--reselect-every=0", "--drop-fraction=0", "--steps=16"):
        values = load_settings([flag], {}, {}).values
        assert work_of(values, 4, 512, 9, 9, 512, 9, 2, 2).capture_steps == 0


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_nothing_is_lowered_below_the_limit(shape: ModelShape) -> None:
    asked = work()
    assert plan_for_limit(shape, asked, BASELINE, "100GB", Knobs(spill=SPILLABLE))[0] == asked


def test_a_limit_is_kept_by_as_little_as_it_takes(shape: ModelShape) -> None:
    peak = memory_plan(shape, work(), BASELINE).peak_bytes
    before = work()
    for share in (0.99, 0.9, 0.8, 0.7, 0.6):
        limit = f"{int(peak * share / 1000)}KB"
        fitted, plan = plan_for_limit(shape, work(), BASELINE, limit, Knobs(spill=SPILLABLE))
        assert plan.peak_bytes <= parse_size(limit)
        assert fitted.prefix_chunk_tokens <= before.prefix_chunk_tokens
        assert fitted.spilled >= before.spilled
        unturned = {"prefix_chunk_tokens", "head_chunk_tokens", "stretch_bytes", "spilled"}
        assert {k: v for k, v in dataclasses.asdict(fitted).items() if k not in unturned} == {
            k: v for k, v in dataclasses.asdict(work()).items() if k not in unturned
        }
        before = fitted
    assert before.spilled, "at 60% something must be in mapped files"


def test_what_the_user_set_stays(shape: ModelShape) -> None:
    peak = memory_plan(shape, work(), BASELINE).peak_bytes
    fitted, _ = plan_for_limit(shape, work(), BASELINE, f"{int(peak * 0.9 / 1000)}KB", Knobs(False, False, SPILLABLE))
    assert fitted.prefix_chunk_tokens == work().prefix_chunk_tokens
    assert fitted.head_chunk_tokens == 256


@pytest.mark.parametrize("spill", [(), SPILLABLE])
def test_the_least_that_would_do_does(shape: ModelShape, spill: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^MEMORY_LIMIT=10MB: the least that would do is \d+\.\d+GB") as refused:
        plan_for_limit(shape, work(), BASELINE, "10MB", Knobs(spill=spill))
    least = str(refused.value).split(" is ")[1].split(" ")[0]
    fitted, plan = plan_for_limit(shape, work(), BASELINE, least, Knobs(spill=spill))
    assert plan.peak_bytes <= parse_size(least)
    with pytest.raises(UserError, match="MEMORY_LIMIT"):
        plan_for_limit(shape, work(), BASELINE, f"{(parse_size(least) - 20_000_000) // 1000}KB", Knobs(spill=spill))


@pytest.mark.parametrize(("changes", "named"), [
    ({"importance_rows": 2000}, "IMPORTANCE_SAMPLES"), ({"microbatch": 200}, "MICROBATCH"),
    ({"capture_steps": 50, "microbatch": 8}, "CAPTURE_STEPS"),
    ({"resident": True, "importance_rows": 2}, "USE_RESIDENT=0"),
])  # fmt: skip
def test_the_remedy_is_for_the_phase_that_is_highest(shape: ModelShape, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_for_limit(shape, work(**changes), BASELINE, "10MB", Knobs())
    assert named in str(refused.value)


def test_fitting_ends_where_nothing_helps(shape: ModelShape) -> None:
    lowest = fit(shape, work(), BASELINE, 0, Knobs(spill=SPILLABLE))
    assert fit(shape, lowest, BASELINE, 0, Knobs(spill=SPILLABLE)) == lowest


def test_the_full_size_model_fits_into_8_gb() -> None:
    """Qwen3-30B-A3B with the default settings."""
    config = tiny_config(
        "qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, vocab_size=151_936, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    model = meta_model(config)
    shape = model_shape(model, handover(model), lambda _: hqq_encoding(128, 4), 2, 1.0)
    values = load_settings([], {}, {}).values
    asked = work_of(values, 40, 512, 360 * 512, 360, 512, 128 * 512, 2, 2)
    fitted, plan = plan_for_limit(shape, asked, BASELINE, "8GB", Knobs())
    assert fitted.prefix_chunk_tokens >= 4096, "which costs next to nothing"
    assert dataclasses.replace(fitted, prefix_chunk_tokens=asked.prefix_chunk_tokens) == asked
    assert 5e9 < plan.peak_bytes < 8e9
    assert plan.disk["4-bit experts"] == pytest.approx(29e9 * (0.5 + 4 / 128), rel=0.01)
    assert plan.mapped["dense weights"] == pytest.approx(2 * 1.53e9, rel=0.03)


def test_shape_is_a_plain_value(shape: ModelShape, tmp_path: Path) -> None:
    assert dataclasses.replace(shape) == shape
    assert hash(shape.layers[-1].experts) is not None
