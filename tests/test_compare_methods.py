"""scripts/compare_methods.py: every arm trains what it says on the same data, and two implementations of USAF agree."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import World

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from compare_methods import Run, finished, main, on_grid, wanted_runs
from comparison import methods
from comparison.adapters import (
    adapter_targets,
    adapter_weights,
    head_weights,
    sparse_weights,
    trained_blocks,
    whole_weights,
)  # fmt: skip
from comparison.arms import ABLATIONS, ARMS, EVERY, Arm
from comparison.bed import Bed, dense_model, evaluate_dense
from comparison.dense import Unit
from comparison.methods import run_arm

SETTINGS = {
    "ROUTER_LR": "1e-3", "IMPORTANCE_SAMPLES": "8", "RESELECT_EVERY": "4", "CAPTURE_STEPS": "2",
    "RESELECT_UNTIL": "0.7", "USE_RESIDENT": "0", "CACHE_DTYPE": "fp32", "GROUP_SIZE": "32",
}  # fmt: skip
RECIPE = {"samples": 8, "reselect_every": 4, "capture_steps": 2, "reselect_until": 0.7}


@pytest.fixture(scope="module")
def bed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    from families import write_tokens

    folder = tmp_path_factory.mktemp("compare")
    data = write_tokens(folder / "all.jsonl", samples=60)
    heldout, unseen = (write_tokens(folder / f"{n}.jsonl", samples=6, seed=s) for n, s in (("other", 6), ("unseen", 7)))
    bed = Bed(folder, world.model, data, (heldout,), unseen, 0, 0.05, 12, 2, 32, 4, 1)
    bed.split()
    return bed


def test_splits_share_no_sample(bed: Bed) -> None:
    parts = [
        (bed.data / f"{n}.jsonl").read_text(encoding="utf-8").splitlines() for n in ("train", "validation", "test")
    ]
    assert [len(p) for p in parts] == [44, 8, 8]
    assert len({line for part in parts for line in part}) == len({*bed.dataset.read_text().splitlines()})
    assert not {*parts[0]} & {*parts[1]}
    assert not ({*parts[0]} | {*parts[1]}) & {*parts[2]}


def test_a_sample_with_a_line_separator_stays_whole(bed: Bed, tmp_path: Path) -> None:
    samples = [json.dumps({"text": f"a\u2028{i}\x85b"}, ensure_ascii=False) for i in range(40)]
    (tmp_path / "odd.jsonl").write_text("\n".join(samples), encoding="utf-8")
    odd = dataclasses.replace(bed, folder=tmp_path, dataset=tmp_path / "odd.jsonl")
    odd.split()
    parts = [(odd.data / f"{n}.jsonl").read_text(encoding="utf-8") for n in ("train", "validation", "test")]
    assert sorted("".join(parts).split("\n")[:-1]) == sorted(samples)


def test_every_evaluation_set_has_its_own_rows(bed: Bed) -> None:
    rows = bed.rows(bed.session(0, SETTINGS))
    assert list(rows) == ["validation", "test", "heldout_other", "forgetting"]
    assert len({r.fingerprint() for r in rows.values()}) == 4


@pytest.mark.parametrize(("projections", "also"), [("down", 1), ("all", 1), ("down", 0)])
@pytest.mark.parametrize("name", ["usaf", "usaf-static", "usaf-frozen-router"])
def test_the_product_and_masked_dense_weights_train_alike(
    bed: Bed, name: str, projections: str, also: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two implementations that share the optimizer's formulas and nothing of gradients, masks, experts or head.

    also: whether head and norms train.
    """
    rate = 4.9e-3  # at 5e-3 two experts of a token tie within rounding in one arm's step 9, and the two choose apart
    further = {**SETTINGS, **ARMS[name].options, "PROJECTIONS": projections, "TRAIN_HEAD": f"{also}",
               "TRAIN_NORMS": f"{also}", "HEAD_LR": repr(rate / 2)}  # fmt: skip
    same: dict[str, Any] = {"reselect_every": 0} if name == "usaf-static" else {}
    same["whole"] = (*(("router",) if name != "usaf-frozen-router" else ()), *(("norms",) if also else ()))
    same["sparse"] = ("experts" if projections == "all" else "down", *(("head",) if also else ()))
    same |= {"untie": bool(also), "head_rate": 0.5}
    monkeypatch.setitem(EVERY, "judge", Arm("lab", 5e-3, "", same))
    product = run_arm(bed, name, rate, 0, further)
    judge = run_arm(bed, "judge", rate, 0, further)
    assert product["losses"] == pytest.approx(judge["losses"], abs=2e-4)
    assert product["losses"][-1] < product["losses"][0] - 0.05  # and something was learnt
    for key, nll in product["nll"].items():
        assert nll == pytest.approx(judge["nll"][key], abs=2e-4)
        assert product["start"][key] == pytest.approx(judge["start"][key], abs=1e-5)
    assert (
        abs(product["trainable_parameters"] - judge["trainable_parameters"]) <= 2 * 4
    )  # the budget's rounding, by layer
    assert product["reloaded"] == product["nll"]  # to the bit
    assert list(product["loads"]) == trained_blocks(bed.session(0, SETTINGS))
    assert product["loads"].keys() == judge["loads"].keys()
    for block, (before, after) in product["loads"].items():
        assert before == judge["loads"][block][0]  # the same untrained model sends the same tokens
        assert sum(before) == sum(after) > 0
    assert bool(product["turnover"]) == (name != "usaf-static")


@pytest.mark.parametrize("frac", [0.01, 0.05, 0.2])
def test_adapters_get_the_budget_and_reload(bed: Bed, frac: float) -> None:
    bed = dataclasses.replace(bed, frac=frac, steps=4)
    session = bed.session(0, SETTINGS)
    budget = adapter_weights(bed, session, {})
    for name in ("lora-experts", "lora-experts-attention", "lora-attention", "qlora", "dora"):
        arm = ARMS[name]
        smallest = min(per_rank for per_rank, _, _ in adapter_targets(session, arm.options["targets"]))
        found = run_arm(bed, name, 5e-3, 0, SETTINGS)
        magnitudes = 2000 if name == "dora" else 0
        if smallest > budget:  # an adapter cannot be smaller
            assert found["trainable_parameters"] == smallest
            assert "above the budget" in found["note"]
        else:
            assert budget - smallest < found["trainable_parameters"] <= budget + magnitudes
        assert found["reloaded"] == pytest.approx(found["nll"], abs=1e-6)
        assert found["nll"] != found["start"]
        assert ("experts" in name or name == "qlora") == (found["experts_moved"] > 0)


@pytest.mark.parametrize("frac", [0.05, 0.2])
@pytest.mark.parametrize("name", ["lora-head-share", "lora-as-usaf", "lora-all-bytes", "qlora-bytes"])
def test_adapters_by_head_share_and_by_bytes_use_what_they_may(bed: Bed, name: str, frac: float) -> None:
    bed = dataclasses.replace(bed, frac=frac, steps=4)
    session, options = bed.session(0, SETTINGS), ARMS[name].options
    finest = adapter_targets(session, options["targets"])[-1][0]  # the head, or a layer
    found = run_arm(bed, name, 5e-3, 0, SETTINGS)
    whole = whole_weights(session) if options.get("whole") else 0
    used = found["trainable_parameters"] - whole
    assert adapter_weights(bed, session, options) - finest < used <= adapter_weights(bed, session, options)
    assert found["reloaded"] == pytest.approx(found["nll"], abs=1e-6)
    assert found["nll"] != found["start"]
    if options.get("head_share"):
        rows = session.checkpoint.config.vocab_size + session.checkpoint.config.hidden_size
        ranks = int(found["note"].split(", ")[-1].split()[0])
        assert ranks * rows >= head_weights(bed, session) - rows / 2
    if options.get("budget") == "bytes":
        own = run_arm(bed, "usaf-default", None, 0, SETTINGS)["artifact_bytes"]
        assert 0.8 * own < found["artifact_bytes"] < 1.2 * own  # with their headers
        sparse, long = sparse_weights(bed, session), bed.session(0, {**SETTINGS, "DELTA_DTYPE": "fp32"})
        assert adapter_weights(bed, long, options) - adapter_weights(bed, session, options) == sparse  # 2 bytes, of 2


def test_qlora_starts_from_the_same_base_as_usaf(bed: Bed) -> None:
    adapter, own, adapter_64, own_64, original = (
        run_arm(bed, name, 1e-3, 0, SETTINGS)["start"]
        for name in ("qlora", "usaf", "qlora-group-64", "usaf-unscaled-group-64", "lora-experts")
    )
    assert adapter == pytest.approx(own, abs=1e-5)
    assert adapter_64 == pytest.approx(own_64, abs=1e-5)
    assert all(adapter != pytest.approx(other, abs=1e-5) for other in (adapter_64, original))


@pytest.mark.parametrize("name", ["qlora", "usaf-frozen-router", "lora-experts", "full"])
def test_next_to_nothing_exported_is_the_unquantised_base(bed: Bed, name: str) -> None:
    found = run_arm(bed, name, 1e-7, 0, {**SETTINGS, "HEAD_LR": "1e-7"})
    if name in ("lora-experts", "full"):
        assert not found.get("exported")
    else:
        before = run_arm(bed, "none", None, 0, SETTINGS)["nll"]
        assert found["exported"] == pytest.approx(before, abs=1e-5)
        assert found["start"] != pytest.approx(before, abs=1e-4)


def test_what_was_trained_is_exported_to_its_place(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas: list[Any] = []
    on_original = methods.on_original
    monkeypatch.setattr(methods, "on_original", lambda *a: (deltas.append(a[2]), on_original(*a))[1])
    found = run_arm(bed, "usaf-default", None, 0, SETTINGS)
    session = bed.session(0, SETTINGS)
    model: Any = dense_model(bed, session, "original")
    (delta,) = deltas
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # from now on no embedding's
    with torch.no_grad():
        for name, (indices, values) in delta.sparse.items():
            model.get_parameter(name).view(-1)[indices] += values
        for name, weight in delta.whole.items():
            model.get_parameter(name).copy_(weight)
    assert len(delta.whole) > 4
    assert "lm_head.weight" in delta.sparse
    assert evaluate_dense(model, bed.rows(session)) == pytest.approx(found["exported"], abs=1e-6)


def test_full_fine_tuning_moves_everything(bed: Bed) -> None:
    found = run_arm(bed, "full", 1e-3, 0, SETTINGS)
    model = dense_model(bed, bed.session(0, SETTINGS), "original")
    assert found["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["experts_moved"] == found["experts"]
    assert found["reloaded"] == found["nll"]
    above = run_arm(dataclasses.replace(bed, train_from=2), "full", 1e-3, 0, SETTINGS)
    assert above["trainable_parameters"] < found["trainable_parameters"]


@pytest.mark.parametrize("name", ["full", "lora-experts-attention", "lora-as-usaf", "qlora", "usaf-default"])
def test_part_of_what_was_trained_counts(bed: Bed, name: str) -> None:
    """Next to nothing of it is where the arm starts, next to all of it is where it ends, which stays as it was."""
    bed = dataclasses.replace(bed, steps=4)
    rate = None if name == "usaf-default" else 5e-3
    plain = run_arm(bed, name, rate, 0, SETTINGS)
    found = run_arm(dataclasses.replace(bed, scales=(1e-4, 0.5, 0.9999)), name, rate, 0, SETTINGS)
    assert found["nll"] == plain["nll"]
    assert found["reloaded"] == plain["reloaded"]
    assert list(found["scaled"]) == ["0.0001", "0.5", "0.9999"]
    assert found["scaled"]["0.0001"] == pytest.approx(found["start"], abs=2e-4)
    assert found["scaled"]["0.9999"] == pytest.approx(found["nll"], abs=2e-4)
    for text, half in found["scaled"]["0.5"].items():
        assert half not in (found["start"][text], found["nll"][text])
    assert plain["scaled"] == {}


def test_no_training_gives_every_base(bed: Bed) -> None:
    found = run_arm(bed, "none", None, 0, SETTINGS)
    session = bed.session(0, SETTINGS)
    assert found["nll"] == evaluate_dense(dense_model(bed, session, "original"), bed.rows(session))
    assert len({base["test"] for base in found["bases"].values()}) == 3


@pytest.mark.parametrize("undo", [True, False])
def test_what_is_dropped_goes_back_or_keeps_its_value(undo: bool) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0))
    unit = Unit("w", parameter, torch.tensor([1, 3]))
    unit.set_active(torch.tensor([1, 3]), torch.tensor([0.5, 0.25]), undo=undo)
    unit.set_active(torch.tensor([1, 4]), torch.tensor([0.5, 0.0]), undo=undo)  # 3 is dropped, 4 grown
    assert parameter.tolist() == [0, 1.5, 2, 3 if undo else 3.25, 4, 5]
    assert unit.moved() == (2 if undo else 3)
    unit.set_active(torch.tensor([1, 3]), torch.tensor([0.75, 0.5]), undo=undo)  # grown again, on top of what it had
    assert parameter.tolist() == [0, 1.75, 2, 3.5 if undo else 3.75, 4, 5]
    assert unit.moved() == (2 if undo else 3)


def test_the_best_neurons_are_whole() -> None:
    from comparison.lab import best_neurons

    experts, inner, hidden = 3, 5, 4
    up, down = torch.zeros(experts, 2 * inner, hidden), torch.zeros(experts, hidden, inner)
    up[1, 2, 0] = 3.0  # expert 1, neuron 2, by its gate row
    up[2, 4 + inner, 3] = 2.0  # expert 2, neuron 4, by its up row
    down[0, 1, 0] = 1.0  # expert 0, neuron 0, by its down column
    names = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj", "lm_head.weight"
    counts = dict(zip(names, (20, 2 * hidden + 3, 2), strict=True))  # room for two neurons of 12, and 7 weights over
    head = torch.tensor([[0.0, 5.0], [-7.0, 6.0]])
    found = best_neurons(dict(zip(names, (up, down, head), strict=True)), counts)
    mask_up, mask_down = torch.zeros_like(up, dtype=torch.bool), torch.zeros_like(down, dtype=torch.bool)
    mask_up.view(-1)[found[names[0]]] = True
    mask_down.view(-1)[found[names[1]]] = True
    assert mask_up.any(2).nonzero().tolist() == [[1, 2], [1, 2 + inner], [2, 4], [2, 4 + inner]]
    assert mask_up[1, 2].all()
    assert mask_up[2, 4 + inner].all()
    assert mask_down.any(1).nonzero().tolist() == [[1, 2], [2, 4]]
    assert mask_down[1, :, 2].all()
    assert found[names[2]].tolist() == [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ABLATIONS, "router", "random", "earlier"])
def test_an_arm_trains_across_a_reselection(bed: Bed, name: str) -> None:
    coarse = ("lab-low-rank", "lab-neurons", "dense-default-neurons")
    wide = dataclasses.replace(bed, steps=6, frac=0.3 if name in coarse else bed.frac)
    found = run_arm(wide, name, 5e-3, 0, SETTINGS)
    assert all(math.isfinite(v) for v in found["nll"].values())
    assert not found["diverged"]
    assert found["nll"]["test"] != found["start"]["test"]


def test_dense_router_gradient_leaves_the_forward_alone(bed: Bed) -> None:
    from comparison.lab import add_dense_gradient

    session = bed.session(0, SETTINGS)
    model = dense_model(bed, session, "original")
    before = evaluate_dense(model, bed.rows(session))
    undo = add_dense_gradient(model)
    assert evaluate_dense(model, bed.rows(session)) == pytest.approx(before, abs=1e-5)
    batch = session.data.train.batch([0, 1])
    gate = model.get_parameter("model.layers.0.mlp.gate.weight")
    dense = torch.autograd.grad(arms_loss(model, batch), gate)[0]
    for restore in undo:
        restore()
    assert not torch.allclose(dense, torch.autograd.grad(arms_loss(model, batch), gate)[0])


def arms_loss(model: Any, batch: Any) -> torch.Tensor:
    from comparison.bed import batch_loss

    return batch_loss(model, batch)


def test_grid_places() -> None:
    assert [on_grid(5e-3, i) for i in (-2, -1, 0, 1, 2)] == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
    assert on_grid(9e-4, 0) == 1e-3
    assert on_grid(1e-3, -1) == 5e-4


def test_a_sweep_goes_on_while_its_best_is_at_an_edge_then_seeds_follow() -> None:
    def rates(runs: list[Run]) -> list[tuple[float | None, int]]:
        return [(r.rate, r.seed) for r in runs]

    done: dict[Run, float] = {}
    assert rates(wanted_runs("a", 5e-3, None, 3, done)) == [(2e-3, 0), (5e-3, 0), (1e-2, 0)]
    done |= {Run("a", 2e-3, 0): 3.0, Run("a", 5e-3, 0): 2.0, Run("a", 1e-2, 0): 1.0}
    assert rates(wanted_runs("a", 5e-3, None, 3, done)) == [(2e-2, 0)]
    done[Run("a", 2e-2, 0)] = math.inf  # diverged
    assert rates(wanted_runs("a", 5e-3, None, 3, done)) == [(1e-2, 1), (1e-2, 2)]
    done |= {Run("a", 1e-2, 1): 9.0, Run("a", 1e-2, 2): 9.0}  # seeds choose nothing
    assert wanted_runs("a", 5e-3, None, 3, done) == []
    done[Run("a", 5e-3, 0)] = 1.039  # as good, as far as one seed tells
    assert rates(wanted_runs("a", 5e-3, None, 3, done)) == [(5e-3, 1), (5e-3, 2)]
    assert rates(wanted_runs("a", 5e-3, [2e-3], 2, done, every=True)) == [(2e-3, 1)]
    assert rates(wanted_runs("none", None, None, 3, {})) == [(None, 0)]
    assert rates(wanted_runs("usaf-default", None, None, 3, {})) == [(None, 0), (None, 1), (None, 2)]
    assert rates(wanted_runs("a", 5e-3, [1e-4], 1, {})) == [(1e-4, 0)]


@pytest.mark.slow
def test_the_command_runs_resumes_and_says_what_is_wrong(
    bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--folder", str(tmp_path / "c"), "--model", str(bed.model), "--dataset", str(bed.dataset), "--heldout",
        str(bed.heldout[0]), "--arms", "none,usaf-static,lora-experts", "--rates", "5e-3", "--seeds", "2", "--steps",
        "3", "--microbatch", "2", "--seq-len", "32", "--eval-samples", "4", *(f"{k}={v}" for k, v in SETTINGS.items()),
    ]  # fmt: skip
    assert main(given) == 0
    folder = next(p for p in (tmp_path / "c").iterdir() if p.name.startswith("model-"))
    assert finished("usaf-static", folder, {}).keys() == {Run("usaf-static", 5e-3, 0), Run("usaf-static", 5e-3, 1)}
    result = json.loads((folder / "lora-experts" / "rate-0.005_seed-1.json").read_text())
    assert result["command"].startswith("python scripts/compare_methods.py --folder")
    assert result["peak_private_bytes"] > 0
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json")}
    capsys.readouterr()
    assert main(given) == 0  # nothing is left to do
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.json")} == times
    assert main([*given, "STEPS=3", "GRAD_CLIP=0.5"]) == 2
    assert "was run with settings" in capsys.readouterr().err
    assert main([*given[:2], "--arms", "lora"]) == 2
    assert "--arms lora: must be among" in capsys.readouterr().err


def test_arm_names_are_unique() -> None:
    assert not ARMS.keys() & ABLATIONS.keys()
    assert EVERY.keys() >= ARMS.keys() | ABLATIONS.keys()
