"""The phases of a run in isolation: what is decided, counted, shown, warned of and cleared away."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import World, copy_run, delta_tensors, events, read_json, same_delta

from usaf import session as session_module
from usaf.data import DataOrder
from usaf.errors import UserError
from usaf.evaluation import Evaluation
from usaf.job import Job, take_away
from usaf.run import list_checkpoints, load_checkpoint
from usaf.session import decide_resident
from usaf.summary import Totals, change_row, final_table

# ---- the first active weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "wanted"), [(20, 8), (7, 64), (5, 5), (1, 2)])
def test_importance_takes_the_first_rows_of_the_order_once_each(rows: int, wanted: int) -> None:
    order = DataOrder(rows, chunk_rows=3, microbatch=4, seed=0)
    job: Any = SimpleNamespace(
        session=SimpleNamespace(order=order, data=SimpleNamespace(train=range(rows))),
        values=SimpleNamespace(importance_samples=wanted),
    )
    samples = Job.importance_samples(job)
    assert len(samples) == len(set(samples)) == min(rows, wanted)
    taken = [row for index in range(rows) for row in order.micro_batch(index)]
    assert samples == list(dict.fromkeys(taken))[: len(samples)]


def test_one_training_sequence_has_no_halves_to_compare(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    lines = world.data.read_text(encoding="utf-8").splitlines()[:2]
    path = world.root / "two.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert world.train("one", DATASET_PATH=path, STEPS=1, MICROBATCH=1, IMPORTANCE_SAMPLES=2) == 0
    assert read_json(world.runs / "one" / "summary.json")["importance_half_overlap"] is None
    assert "no halves to compare" in capsys.readouterr().out


def test_a_small_disk_caches_the_evaluation_sets_first(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has room for the 24 training rows, and after the evaluation sets no longer."""
    unbounded = world.finished("unbounded", EVAL_EVERY="0")
    row_bytes, spare = 24 * 64 * 2, 1000  # 5% of a disk of 20,000 bytes
    cache = world.root / "small"

    def usage(_: Path) -> Any:
        used = sum(path.stat().st_size for path in cache.rglob("states.bin"))
        return 20_000, 0, spare + 24 * row_bytes - used

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("usaf.prefix.shutil.disk_usage", usage)
        assert world.train("small", EVAL_EVERY="0", PREFIX_CACHE_DIR=cache) == 0
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "the disk is full" in line)
    assert "0 of 6 chunks are cached" in note
    assert sorted(p.stat().st_size // row_bytes for p in cache.rglob("states.bin")) == [2, 4]  # in_domain, held out
    assert same_delta(unbounded, world.runs / "small")


# ---- cadence --------------------------------------------------------------------------------------------------------


def test_no_checkpoint_falls_into_a_capture_window(world: World) -> None:
    """Windows are steps 3, 4 and 7, 8; a save is due after every step."""
    folder = world.finished("cadence", SAVE_EVERY="1", KEEP_CHECKPOINTS="20")
    assert [e["step"] for e in events(folder, "save")] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12]
    assert [int(p.name[5:]) for p in list_checkpoints(folder)] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12]


def test_the_last_step_is_saved_and_evaluated_once(world: World) -> None:
    folder = world.finished("once", SAVE_EVERY="6", EVAL_EVERY="6")
    assert [e["step"] for e in events(folder, "save")] == [0, 6, 12]
    assert [e["step"] for e in events(folder, "eval") if e["name"] == "in_domain"] == [0, 6, 12]


def test_eval_every_zero_evaluates_before_and_after_only(world: World) -> None:
    folder = world.finished("seldom", EVAL_EVERY="0")
    assert [e["step"] for e in events(folder, "eval") if e["name"] == "in_domain"] == [0, 12]


def test_checkpoints_carry_the_totals(world: World) -> None:
    folder = world.finished("once", SAVE_EVERY="6", EVAL_EVERY="6")
    for checkpoint, step in zip(list_checkpoints(folder), (6, 12), strict=True):
        totals = Totals(**load_checkpoint(checkpoint).about["totals"])
        assert totals.tokens == step * 48
        assert [e["name"] for e in totals.before] == ["in_domain", "heldout_other"]
        assert totals.seconds > totals.step_seconds > 0
        assert totals.peak_private_bytes > 0


# ---- when it goes wrong ---------------------------------------------------------------------------------------------


def test_a_run_that_diverges_ends_with_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = lambda _model, hidden, *_: (math.nan, torch.zeros_like(hidden))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("usaf.trainer.loss_and_gradient", lost)
        assert world.train("diverges", LR_PEAK="0.5", HEAD_LR="0.25", EVAL_EVERY="0") == 1
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "LR_PEAK=0.5, HEAD_LR=0.25: " in errors[0]
    assert "lower LR_PEAK, HEAD_LR or ROUTER_LR" in errors[0]
    assert "5 steps in a row" in errors[0]
    folder = world.runs / "diverges"
    assert list_checkpoints(folder)
    assert len(events(folder, "warning")) == 4  # the fifth is the error itself
    assert [e["loss"] for e in events(folder, "step") if e["loss"] is None]  # null, since JSON has no nan


def test_a_run_refused_before_its_first_checkpoint_leaves_no_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        assert (tmp_path / "runs" / "refused" / "settings.json").is_file()
        raise UserError("no")

    monkeypatch.setattr("usaf.job.load", refuse)
    assert world.train("refused", OUTPUT_DIR=tmp_path / "runs") == 2
    assert list(tmp_path.iterdir()) == []


def test_take_away_leaves_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tag"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("settings.json", "metrics.jsonl", ".lock"):
        (folder / name).write_text("", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    take_away(folder, with_parent=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    take_away(folder, with_parent=True)
    assert list(tmp_path.iterdir()) == []


def test_starved_experts_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[dict[str, Any]] = []
    job: Any = SimpleNamespace(
        totals=Totals(before=[{"name": "in_domain", "starved_experts": 1}]),
        run=SimpleNamespace(log=lambda event, **values: logged.append({"event": event, **values})),
    )
    Job.warn_of_collapse(job, 4, [Evaluation("in_domain", 1.0, 10, 0.5, 1), Evaluation("new", 1.0, 10, 0.5, 9)])
    assert logged == []
    Job.warn_of_collapse(job, 4, [Evaluation("in_domain", 1.0, 10, 0.5, 3)])
    assert [(e["event"], e["step"]) for e in logged] == [("warning", 4)]
    assert "3 experts get almost no tokens, 1 before training; lower ROUTER_LR" in capsys.readouterr().out


# ---- figures --------------------------------------------------------------------------------------------------------


def test_change_row() -> None:
    assert change_row("x", 4.0, 3.0, 2) == ["x", "4.00", "3.00", "-25.0%"]
    assert change_row("x", None, 3.0, 2) == ["x", "not finite", "3.00", ""]
    assert change_row("x", 0.0, 3.0, 1) == ["x", "0.0", "3.0", ""]


def test_final_table_of_a_run_without_figures() -> None:
    summary: dict[str, Any] = {
        "train_loss_first": None, "train_loss_last": None, "experts_moved": [], "tokens_per_second": None,
        "evaluations": [{"name": "in_domain", "perplexity_before": 2.0, "perplexity_after": None}],
        "active_parameters": 1, "expert_parameters": 10, "head_parameters": 0, "router_parameters": 0,
        "norm_parameters": 0, "seconds_total": 1.0, "delta_scale": 0.5,
        "peak_memory_bytes": 10**9, "peak_resident_bytes": 2 * 10**9, "peak_device_memory_bytes": 3 * 10**9,
    }  # fmt: skip
    shown = final_table(summary)
    assert re.search(r"perplexity in_domain +2.000 +not finite", shown)
    assert re.search(r"part of the change kept \(DELTA_SCALE\) +0.5", shown)
    assert re.search(r"training speed +not measured", shown)
    assert re.search(r"peak device memory +3.00 GB", shown)
    assert re.search(r"\(private / with mapped files\) +1.00 / 2.00 GB", shown)


# ---- decisions ------------------------------------------------------------------------------------------------------


def test_resident_needs_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bank: Any = SimpleNamespace(numel=100, base=SimpleNamespace(resident_dtype=lambda: torch.float16))
    host: Any = SimpleNamespace(name="cpu", device=torch.device("cpu"))
    monkeypatch.setattr(session_module, "available_bytes", lambda: 399)
    chosen, reason = decide_resident([bank], "auto", host)
    assert not chosen
    assert "0.0 GB of 0.0 GB" in reason
    assert decide_resident([bank], "1", host) == (True, "USE_RESIDENT=1")
    assert decide_resident([bank], "0", host) == (False, "USE_RESIDENT=0")


@pytest.mark.parametrize(("held", "mark"), [(399, "decoded copies would take"), (None, "does not say")])
def test_resident_on_a_card_looks_at_the_card(monkeypatch: pytest.MonkeyPatch, held: int | None, mark: str) -> None:
    """The copies lie there, however much the host has free."""
    bank: Any = SimpleNamespace(numel=100, base=SimpleNamespace(resident_dtype=lambda: torch.float16))
    card: Any = SimpleNamespace(name="cuda", device=torch.device("meta"), total_memory_bytes=lambda: held)
    monkeypatch.setattr(session_module, "available_bytes", lambda: 10**12)
    chosen, reason = decide_resident([bank], "auto", card)
    assert not chosen
    assert mark in reason


@pytest.mark.parametrize("faster", [True, False], ids=["resident", "decoding"])
def test_resident_is_measured(world: World, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """The measurement alone decides, its reason is kept, and evaluation and resume take the decision over."""
    monkeypatch.setattr(
        session_module, "product_seconds", lambda bank, resident, backend: 0.5 if resident else 1.0 if faster else 0.1
    )
    tag = f"resident-{faster}"
    assert world.train(tag, STEPS=1) == 0
    decisions = read_json(world.runs / tag / "settings.json")["decisions"]
    assert decisions["resident"] is faster
    assert "with a decoded copy" in decisions["resident_reason"]


def test_a_decision_is_taken_over_and_a_setting_goes_before_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 0.5])
    # Enough for one measurement: a second would fail.
    monkeypatch.setattr(session_module, "product_seconds", lambda bank, resident, backend: next(times))
    torch.set_num_threads(1)
    folder = world.finished("decided", STEPS="1")
    decisions = read_json(folder / "settings.json")["decisions"]
    assert (decisions["resident"], decisions["threads"]) == (True, 1)
    torch.set_num_threads(2)
    copy = copy_run(folder, world.runs / "decided-again")
    assert world.train(None, RESUME=copy, STEPS="1") == 0
    assert read_json(copy / "settings.json")["decisions"] == decisions
    assert torch.get_num_threads() == 1
    assert world.train(None, RESUME=copy, STEPS="1", USE_RESIDENT="0") == 0
    assert read_json(copy / "settings.json")["decisions"]["resident"] is False


def test_another_processor_is_warned_of(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And has a cache of its own, since its bits may differ."""
    copy = copy_run(world.finished("here", STEPS="1"), world.runs / "elsewhere")
    caches = len(list((world.runs / "cache").iterdir()))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SOMETHING ELSE")
    assert world.train(None, RESUME=copy, STEPS="1") == 0
    assert "this one has SOMETHING ELSE" in capsys.readouterr().out
    assert len(list((world.runs / "cache").iterdir())) > caches


@pytest.mark.parametrize("apart", [True, False])
def test_documents_share_a_row_only_where_the_family_keeps_them_apart(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], apart: bool
) -> None:
    seen = {}
    build = session_module.build_training_data

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.update(options)
        return build(*arguments, **options)

    monkeypatch.setattr(session_module, "build_training_data", spy)
    monkeypatch.setattr(session_module, "keeps_documents_apart", lambda _: apart)
    assert world.train(f"apart-{apart}", STEPS=1) == 0
    assert seen["one_document_per_row"] is not apart
    assert ("one document a row" in capsys.readouterr().out) is not apart


def test_weights_are_chosen_by_what_is_set(world: World) -> None:
    folder = world.finished("by-gradient", STEPS=1)
    assert same_delta(folder, world.finished("by-gradient-again", STEPS=1, IMPORTANCE_SCORE="gradient"))
    by_square = world.finished("by-square", STEPS=1, IMPORTANCE_SCORE="square")
    ones, others = delta_tensors(folder), delta_tensors(by_square)
    indices = [name for name in ones if name.endswith("indices")]
    assert indices
    assert all(len(ones[name]) == len(others[name]) for name in indices)
    assert not any(torch.equal(ones[name], others[name]) for name in indices)
