"""`python -m usaf.plan`: what it says, from how little, and how a plan compares with the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config, write_checkpoint
from runs import REPOSITORY, World, read_json

from usaf import plan_time
from usaf.budget import memory_plan
from usaf.expert_store import FILE_NAME
from usaf.plan import Plan, main
from usaf.plan_time import Curve, PhaseTime, time_plan
from usaf.settings import load_settings

SMALL = ["--train-from", "2", "--seq-len", "24", "--steps", "12", "--use-cuda", "0"]


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    config = tiny_config("qwen3_moe")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    assert main([*arguments, "--json", str(path)], {"OUTPUT_DIR": str(tmp_path / "runs")}) == 0
    found: dict[str, Any] = read_json(path)
    return found


def test_config_json_is_enough(config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(tmp_path, "--model", str(config_only), *SMALL, "--no-times")
    out = capsys.readouterr().out
    assert "the checkpoint is not here; config.json alone is used" in out
    assert "importance, backward" in out
    assert "page cache wanted" in out
    assert "not tried" in out
    assert found["model_type"] == "qwen3_moe"
    assert found["peak_memory_bytes"] == max(phase["peak_memory_bytes"] for phase in found["phases"])
    assert found["times"] == []
    assert found["rates"] is None
    assert [path.name for path in config_only.iterdir()] == ["config.json"], "nothing is written beside it"
    assert not (tmp_path / "runs").exists()


def test_headers_say_the_same_as_config_json(config_only: Path, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    alone = figures(tmp_path, "--model", str(config_only), *SMALL, "--no-times")
    found = figures(tmp_path, "--model", str(whole), *SMALL, "--no-times")
    assert found["not_known"] == []
    assert found["disk_bytes"] == alone["disk_bytes"]
    assert [p["items_bytes"] for p in found["phases"]] == [p["items_bytes"] for p in alone["phases"]]


def test_a_checkpoint_half_downloaded_is_told(config_only: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(config_only, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    found = figures(tmp_path, "--model", str(folder), *SMALL, "--no-times")
    assert "is not whole" in found["not_known"][0]


def test_times_are_measured_and_add_up(
    config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_time, "FILE_BYTES", 1 << 22)
    monkeypatch.setattr(plan_time, "ROWS", (1, 16))
    found = figures(tmp_path, "--model", str(config_only), *SMALL, "--reselect-every", "4")
    assert [t["name"] for t in found["times"]] == [
        "quantise", "prefix", "importance", "learning rates", "steps", "reselections", "delta scale", "evaluations",
        "checkpoints",
    ]  # fmt: skip
    assert all(t["seconds"] > 0 for t in found["times"])
    assert (
        next(t["times"] for t in found["times"] if t["name"] == "reselections") == 1
    )  # at step 4: none after 0.6 * 12
    assert next(t["times"] for t in found["times"] if t["name"] == "steps") == 12
    assert found["rates"]["decode_weights_per_second"] > 0
    assert found["rates"]["head"]["blocks"] == 1
    assert found["rates"]["head"]["dense_seconds_by_rows"].keys() == {"16", "256"}
    assert found["rates"]["read_bytes_per_second"] > 0
    assert "GFLOP/s" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "cache").iterdir()) == [], "the measured file is gone"


def test_neighbours_are_compared(config_only: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, "--model", str(config_only), *SMALL, "--no-times")
    pairs = [(row["train_from"], row["microbatch"]) for row in found["comparison"]]
    assert pairs == [(start, batch) for start in (0, 2, 3) for batch in (1, 2, 4)]
    own = next(row for row in found["comparison"] if (row["train_from"], row["microbatch"]) == (2, 2))
    assert own["peak_memory_bytes"] == found["peak_memory_bytes"]
    by_layers = [row["disk_bytes"] for row in found["comparison"] if row["microbatch"] == 2]
    assert by_layers[2] < by_layers[1], "fewer layers, less state in checkpoints"


def test_a_limit_is_planned_for_or_refused(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures(tmp_path, "--model", str(config_only), *SMALL, "--no-times", "--memory-limit", "100GB")
    assert "for MEMORY_LIMIT=100GB: PREFIX_CHUNK_TOKENS=" in capsys.readouterr().out
    assert main(["--model", str(config_only), *SMALL, "--no-times"], {"MEMORY_LIMIT": "50MB"}) == 2
    assert capsys.readouterr().err.startswith("error: MEMORY_LIMIT=50MB: the least that would do is ")


def test_the_demo_is_planned_where_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-times"], {}) == 0
    out = capsys.readouterr().out
    assert out.startswith("the bundled demo: ")
    assert "TRAIN_FROM=2, MICROBATCH=4, SEQ_LEN=256" in out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--model", "no/such", "--no-times"], "MODEL=no/such"), (["--model", "./nowhere"], "MODEL=./nowhere"),
    (["--microbatch", "0"], "MICROBATCH=0"), (["--no-such"], "--no-such"), (["--json", "/"], "--json"),
    (["--train-from", "99"], "TRAIN_FROM=99"), (["--seq-len", "99999"], "SEQ_LEN=99999"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, {}) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert said in err


def test_help_names_every_flag_without_loading_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "usaf.plan", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for flag in ("--json", "--memory-limit", "--train-from", "--no-times"):
        assert flag in done.stdout
    assert not any(line.endswith(("| torch", "| transformers")) for line in done.stderr.splitlines())


# ---- times ----------------------------------------------------------------------------------------------------------


def test_curves_go_through_their_points_and_on() -> None:
    curve = Curve((10, 20, 40), (1.0, 1.5, 3.5))
    assert [curve.at(rows) for rows in (10, 15, 20, 30, 40, 50)] == pytest.approx([1, 1.25, 1.5, 2.5, 3.5, 4.5])
    assert curve.at(5) == pytest.approx(0.75)
    assert curve.at(0) == pytest.approx(0.5)
    assert Curve((10, 20), (2.0, 1.0)).at(30) == 2.0, "noise"
    assert Curve((10,), (1.0,)).at(5) == 0.5


@pytest.fixture(scope="module")
def planned(config_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_time, "FILE_BYTES", 1 << 22)
        patch.setattr(plan_time, "ROWS", (1, 16))
        patch.setattr(plan_time, "HEAD_ROWS", (1, 16))
        runs = tmp_path_factory.mktemp("runs")
        return Plan(load_settings(["--model", str(config_only), "--output-dir", str(runs), *SMALL], {}, {}), True)


def test_times_grow_with_what_they_are_of(planned: Plan) -> None:
    assert planned.rates is not None

    def times(**changes: Any) -> dict[str, PhaseTime]:
        work = dataclasses.replace(planned.work, **changes)
        found = time_plan(planned.shape, planned.rates, work, 10, 2, 3, 4)  # type: ignore[arg-type]
        return {t.name: t for t in found}

    base = times()
    assert times(accum=2)["steps"].operations == pytest.approx(2 * base["steps"].operations)
    assert times(microbatch=4)["steps"].operations == pytest.approx(2 * base["steps"].operations)
    assert times(start=3)["steps"].operations < 0.7 * base["steps"].operations
    assert times(train_tokens=2 * planned.work.train_tokens, eval_tokens=2 * planned.work.eval_tokens)[
        "prefix"
    ].operations == pytest.approx(2 * base["prefix"].operations)
    assert "quantise" not in times(quantises=False)
    assert "learning rates" not in times(measured_rates=0)
    enough = 2 * planned.work.train_tokens  # else they are measured on rows that do not train
    one, both = (times(measured_rates=n, train_tokens=enough)["learning rates"] for n in (1, 2))
    assert one.operations < both.operations < 2 * one.operations  # the head's line passes the layers once
    assert one.seconds < both.seconds
    for changes in ({"train_tokens": enough, "cached": False}, {"train_tokens": enough - 1}):
        again = times(measured_rates=2, **changes)["learning rates"].operations - both.operations
        passes = both.operations / plan_time.LINE_POINTS  # of two layers; as many are frozen
        assert 0 < again < 1.1 * passes  # once, not at every point
    assert "delta scale" not in times(delta_scale=0.8)
    place = times(delta_scale=None, start=0)["delta scale"].operations / plan_time.SCALE_PLACES  # all four layers
    scaling = times(delta_scale=None)["delta scale"].operations - plan_time.SCALE_PLACES * place / 2
    assert 0.4 * place < scaling < 0.6 * place  # two are frozen, and passed once
    assert "prefix" not in times(start=0)
    uncached = times(cached=False)
    assert "prefix" not in uncached
    for name, least in (("steps", 1.3), ("evaluations", 1.3), ("importance", 1.1)):  # its two frozen layers come along
        assert uncached[name].operations > least * base[name].operations, name
    assert base["evaluations"].each == pytest.approx(base["evaluations"].seconds / 3)


def test_operations_are_those_of_the_products(planned: Plan) -> None:
    """One step of two rows of 24 tokens: two layers, top-2 of 8 experts of 3 * 48 * 64 weights; forward and back to the
    inputs; and the head."""
    assert planned.rates is not None
    step = next(
        t for t in time_plan(planned.shape, planned.rates, planned.work, 1, 0, 1, 1) if t.name == "steps"
    )  # fmt: skip
    tokens, linear = 48, 2 * 64 * 64 + 2 * 64 * 32
    attention = 3.5 * 2 * 4 * 32 * 24 * tokens
    products = 2 * 2 * tokens * (linear + 2 * 3 * 48 * 64)
    assert step.operations == pytest.approx(2 * (products + attention) + 4 * tokens * 128 * 64, rel=0.01)


def test_the_head_is_scored_and_its_dz_formed_again(planned: Plan) -> None:
    """Of 128 x 64 weights: by importance logits and their product with the inputs once more, by a reselection dz again
    for the moments of grown weights."""
    assert planned.rates is not None
    rates, captures = planned.rates, dataclasses.replace(planned.work, capture_steps=2)
    with_head, without = (
        {t.name: t for t in time_plan(planned.shape, rates, dataclasses.replace(captures, head_trains=h), 1, 1, 1, 1)}
        for h in (True, False)
    )
    product = 2 * 24 * 128 * 64  # of a row
    rows = {"importance": planned.work.importance_rows * 2, "reselections": 2 * 2 * 3}
    for name, passes in rows.items():
        assert with_head[name].operations - without[name].operations == pytest.approx(passes * product), name
        assert with_head[name].seconds > without[name].seconds
    for name in ("steps", "evaluations"):
        assert with_head[name].operations == without[name].operations


# ---- against runs ---------------------------------------------------------------------------------------------------


def test_the_plan_is_what_the_run_plans(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The same formulas on the same shape; of the data, the run knows the rows."""
    folder = world.finished("planned", MEMORY_LIMIT="100GB", STEPS=12)
    said = capsys.readouterr().out.split("memory: at most ")[1]
    environ = {k: v for k, v in world.environ("planned", SEQ_LEN=24).items() if k not in ("RUN_TAG", "MEMORY_LIMIT")}
    found = Plan(load_settings([], environ, {}), False)
    assert found.has_experts_file
    assert (folder.parent.parent / "model" / FILE_NAME).is_file()
    assert f"in {found.memory.highest.name}" in said
    assert float(said.split(" ")[0]) * 1e9 == pytest.approx(found.memory.peak_bytes, rel=0.1)
    assert found.memory == memory_plan(found.shape, found.work, found.baseline)


def test_figures_are_json(planned: Plan) -> None:
    assert json.loads(json.dumps(planned.figures()))["times"]
    assert planned.figures()["rates"]["experts"]
