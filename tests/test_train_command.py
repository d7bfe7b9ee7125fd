"""`python -m usaf.train` as a user meets it: what a run leaves behind, the same however it is carried out."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, write_checkpoint
from runs import (
    REPOSITORY,
    TINY,
    World,
    copy_run,
    curve,
    delta_tensors,
    events,
    lasting,
    read_json,
    same_delta,
    signal_at_step,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from usaf import evaluate as evaluate_module
from usaf.delta import load_delta, save_delta
from usaf.devices import choose_backend, cuda
from usaf.learning_rate import Line
from usaf.session import prepare
from usaf.settings import ResolvedSettings, load_settings
from usaf.train import main

SUMMARY_KEYS = {
    "model", "model_type", "device", "dtype", "steps", "steps_skipped", "seed", "active_parameters",
    "expert_parameters", "router_parameters", "train_loss_first", "train_loss_last", "evaluations",
    "tokens_per_second", "prefix_tokens_per_second", "seconds_total", "peak_memory_bytes", "peak_resident_bytes",
    "peak_device_memory_bytes", "delta_bytes", "delta_path", "experts_moved",
    "delta_scale",
}  # fmt: skip
STEP_KEYS = {
    "step", "loss", "learning_rate", "head_learning_rate", "router_learning_rate", "grad_norm", "tokens",
    "tokens_per_second", "peak_memory_bytes",
}  # fmt: skip
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 8, 64, 48


def evaluated(folder: Path, tmp_path: Path, *flags: object) -> list[dict[str, Any]]:
    """What `python -m usaf.evaluate` says about a run's delta."""
    out = tmp_path / "figures.json"
    delta = flags[0] if flags and str(flags[0]).endswith(".safetensors") else folder / "delta.safetensors"
    rest = [str(flag) for flag in flags if flag is not delta]
    assert evaluate_module.main(["--delta", str(delta), "--json", str(out), *rest]) == 0
    return read_json(out)["evaluations"]


def final_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    last = max(e["step"] for e in events(folder, "eval"))
    return {e["name"]: e for e in events(folder, "eval") if e["step"] == last}


# ---- what a run leaves behind ---------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(world: World) -> None:
    folder = world.finished("plain")
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {"settings.json", "metrics.jsonl", "summary.json", "checkpoints", "delta.safetensors"}
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000009", "step-000012"]  # KEEP_CHECKPOINTS=2
    assert not [path for path in world.root.rglob("*.partial")]


def test_summary(world: World) -> None:
    folder = world.finished("plain")
    summary = read_json(folder / "summary.json")
    assert summary.keys() >= SUMMARY_KEYS
    trained = 2 * EXPERTS * 3 * HIDDEN * INTERMEDIATE  # layers 2 and 3: gate, up and down
    assert summary["expert_parameters"] == trained
    assert summary["active_parameters"] == sum(
        int(0.05 * EXPERTS * size) for size in (2 * HIDDEN * INTERMEDIATE, HIDDEN * INTERMEDIATE) * 2
    )
    assert summary["router_parameters"] == 2 * EXPERTS * HIDDEN
    experts = 2 * EXPERTS * 3 * HIDDEN * INTERMEDIATE  # PROJECTIONS=all
    text = prepare(load_settings([], world.environ("plain"), {})).data.train
    assert 10 < text.different_targets() < VOCAB
    head = min(2 * text.different_targets(), VOCAB) * HIDDEN
    assert summary["head_parameters"] == pytest.approx(0.05 * experts * head / (head + experts), abs=4)
    assert summary["norm_parameters"] == 2 * (2 * HIDDEN + 2 * 16) + HIDDEN  # of a layer two, and two of its heads'
    assert (summary["steps"], summary["steps_skipped"], summary["seed"]) == (12, 0, 0)
    assert summary["model"] == str(world.model)
    assert (summary["model_type"], summary["device"], summary["dtype"]) == ("qwen3_moe", "cpu", "float32")
    losses = [e["loss"] for e in events(folder, "step")]
    assert summary["train_loss_first"] == losses[0]  # a tenth of 12 steps is one
    assert summary["train_loss_last"] == losses[-1]
    assert 0 <= summary["importance_half_overlap"] < 1
    assert summary["peak_resident_bytes"] >= summary["peak_memory_bytes"] > 10_000_000
    assert summary["peak_device_memory_bytes"] is None
    assert summary["delta_bytes"] == (folder / "delta.safetensors").stat().st_size
    assert summary["delta_path"] == str(folder / "delta.safetensors")
    for rate in ("tokens_per_second", "prefix_tokens_per_second", "seconds_total"):
        assert summary[rate] > 0


def test_summary_compares_the_end_with_step_zero(world: World) -> None:
    folder = world.finished("plain")
    by_name = {e["name"]: e for e in read_json(folder / "summary.json")["evaluations"]}
    assert by_name.keys() == {"in_domain", "heldout_other"}
    first = {e["name"]: e["perplexity"] for e in events(folder, "eval") if e["step"] == 0}
    for name, entry in by_name.items():
        assert entry["perplexity_before"] == first[name]
        assert entry["perplexity_after"] == final_evaluations(folder)[name]["perplexity"]
        assert entry["perplexity_after"] < entry["perplexity_before"]


def test_metrics(world: World) -> None:
    folder = world.finished("plain")
    steps = events(folder, "step")
    assert [e["step"] for e in steps] == list(range(1, 13))
    assert all(e.keys() >= STEP_KEYS for e in steps)
    assert all(e["tokens"] == 2 * 24 for e in steps)
    evaluations = events(folder, "eval")
    assert [e["step"] for e in evaluations] == [0, 0, 4, 4, 8, 8, 12, 12]
    assert all(e.keys() >= {"step", "name", "loss", "perplexity", "tokens"} for e in evaluations)
    assert all(e["perplexity"] == math.exp(e["loss"]) for e in evaluations)
    reselections = events(folder, "reselect")
    assert [e["step"] for e in reselections] == [4, 8]
    for e in reselections:
        assert e["active"] == read_json(folder / "summary.json")["active_parameters"]
        assert e["dropped"] == e["grown"] > 0
        assert e["turnover"] == e["dropped"] / e["active"]
    # A save due at 3 waits for the reselection at 4; one at 6 falls into no window.
    assert [e["step"] for e in events(folder, "save")] == [0, 4, 6, 9, 12]
    phases = {"load", "frozen prefix", "evaluate", "importance", "learning rates", "train", "delta scale"}
    assert phases <= {e["name"] for e in events(folder, "phase")}
    assert {e["event"] for e in events(folder)} <= {
        "step",
        "eval",
        "reselect",
        "save",
        "phase",
        "warning",
        "importance",
        "learning_rate",
        "delta_scale",
    }


def test_settings_file(world: World) -> None:
    saved = read_json(world.finished("plain") / "settings.json")
    assert saved["settings"]["STEPS"] == {"value": 12, "source": "environment"}
    assert saved["settings"]["SEED"] == {"value": 0, "source": "default"}
    assert saved["settings"]["TRAIN_FROM"]["value"] == 2
    assert saved["versions"].keys() >= {"usaf", "torch", "transformers", "python"}
    assert saved["device"]["name"] == "cpu"
    for what in ("model", "data"):
        assert len(saved[f"{what}_fingerprint"]) == 64
    assert saved["decisions"].keys() >= {"threads", "attention", "resident", "quant_path"}


def test_every_setting_is_printed_with_its_source(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    environ = world.environ("printed", STEPS=None, EPOCHS=None)
    assert main(["--steps", "2"], environ) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isupper()}
    saved = read_json(world.runs / "printed" / "settings.json")["settings"]
    assert saved.keys() <= lines.keys()
    assert lines["STEPS"][1:] == ["2", "flag"]
    assert lines["LR_PEAK"][1:] == ["0.005", "environment"]
    assert lines["SEED"][1:] == ["0", "default"]
    assert lines["TRAIN_FROM"][1:] == ["2", "environment"]


def test_the_default_first_trainable_layer_is_printed_as_a_number(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.train("default-start", TRAIN_FROM=None, STEPS=1) == 0
    assert "settled: TRAIN_FROM = 3 (default)" in capsys.readouterr().out.splitlines()


def test_rates_that_are_not_set_are_measured_and_kept(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """They are in the run's settings, its log and its steps, each at its own peak."""
    assert world.train("measured", LR_PEAK=None, HEAD_LR=None, WARMUP="0", LR_FLOOR="1", RESELECT_EVERY="0") == 0
    folder = world.runs / "measured"
    settings = read_json(folder / "settings.json")["settings"]
    told = {event["name"]: event for event in events(folder) if event["event"] == "learning_rate"}
    steps = [event for event in events(folder) if event["event"] == "step"]
    out = capsys.readouterr().out
    for name, key in (("LR_PEAK", "learning_rate"), ("HEAD_LR", "head_learning_rate")):
        assert settings[name]["source"] == "measured"
        assert told[name]["rate"] == settings[name]["value"]
        assert told[name]["least"] < told[name]["rest"]
        assert f"settled: {name} = {told[name]['rate']:g} (measured: the loss turns when" in out
        assert {step[key] for step in steps} == {settings[name]["value"]}


def test_rates_of_few_steps_are_measured_on_sequences_that_do_not_train(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data and delta are those of the run that is given these rates."""
    measured_on: list[tuple[int, ...]] = []
    begin = Line.__init__

    def begun(self: Line, model: Any, parts: Any, *args: Any) -> None:
        measured_on.extend(
            tuple(states.rows.batch([row]).input_ids[0].tolist()) for states, rows in parts for row in rows
        )
        begin(self, model, parts, *args)

    monkeypatch.setattr(Line, "__init__", begun)
    few = {"STEPS": 2, "LR_PEAK": None, "HEAD_LR": None}
    assert world.train("few", **few) == 0
    assert "learning rates: the data have but" not in capsys.readouterr().out
    settings = read_json(world.runs / "few" / "settings.json")
    own = prepare(ResolvedSettings.from_json(settings["settings"]), settings["decisions"]).data
    trained = {tuple(own.train.batch([row]).input_ids[0].tolist()) for row in range(len(own.train))}
    assert len(set(measured_on)) == len(trained) == 8
    assert not set(measured_on) & trained
    rates = {name: settings["settings"][name]["value"] for name in ("LR_PEAK", "HEAD_LR")}
    assert world.train("given", **{**few, **rates}) == 0
    assert same_delta(world.runs / "few", world.runs / "given")
    assert read_json(world.runs / "given" / "settings.json")["data_fingerprint"] == settings["data_fingerprint"]
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 1)
        assert world.train("resumed", **few) == 130
    assert world.train("resumed", RESUME="auto", STEPS=None, LR_PEAK=None) == 0
    assert same_delta(world.runs / "few", world.runs / "resumed")


def test_data_that_end_are_said_to(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """38 of 40 samples are left to train on, 32 of which choose."""
    assert world.train("ends", STEPS=1, IMPORTANCE_SAMPLES=32, LR_PEAK=None) == 0
    assert (
        "learning rates: the data have but 6 sequences that had no say in choosing the weights; 2 that had one are "
        "measured on too"
    ) in capsys.readouterr().out.splitlines()


def test_a_rate_that_is_set_is_not_measured(world: World) -> None:
    assert world.train("set", LR_PEAK="1e-3", HEAD_LR="1e-4", STEPS=1) == 0
    assert world.train("no-head", LR_PEAK="1e-3", TRAIN_HEAD="0", HEAD_LR=None, STEPS=1) == 0
    for tag, head in (("set", 1e-4), ("no-head", 0.0)):
        found = events(world.runs / tag)
        assert not [event for event in found if event["event"] == "learning_rate"]
        assert [e["head_learning_rate"] for e in found if e["event"] == "step"] == [head]
    assert world.train("head-only", LR_PEAK="1e-3", HEAD_LR=None, STEPS=1) == 0
    settings = read_json(world.runs / "head-only" / "settings.json")["settings"]
    assert (settings["LR_PEAK"]["source"], settings["HEAD_LR"]["source"]) == ("environment", "measured")


def test_the_final_table_tells_the_summary(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.train("table") == 0
    out = capsys.readouterr().out
    summary = read_json(world.runs / "table" / "summary.json")
    of_experts = summary["active_parameters"] - summary["head_parameters"]
    assert f"{of_experts:,} of {summary['expert_parameters']:,}" in out
    for e in summary["evaluations"]:
        line = next(li for li in out.splitlines() if li.startswith(f"perplexity {e['name']} "))
        assert f"{e['perplexity_before']:.3f}" in line
        assert f"{e['perplexity_after']:.3f}" in line
    assert f"{summary['train_loss_first']:.4f}" in out
    assert summary["delta_path"] in out
    assert "masks of disjoint halves agree on" in out
    assert "USE_CUDA=0" in out  # why this device


def test_epochs_set_the_steps_everywhere(world: World) -> None:
    assert world.train("epochs", STEPS=None, EPOCHS=1, ACCUM=2) == 0
    folder = world.runs / "epochs"
    samples = 40 - 2  # in_domain holds 5% back
    steps = math.ceil(samples / 4)
    assert [e["step"] for e in events(folder, "step")][-1] == steps
    assert read_json(folder / "summary.json")["steps"] == steps
    assert read_json(folder / "settings.json")["settings"]["STEPS"] == {"value": steps, "source": "data"}
    assert events(folder, "step")[-1]["learning_rate"] == pytest.approx(0.1 * 5e-3, rel=0.2)  # the cosine's end


# ---- what was trained is what was saved -----------------------------------------------------------------------------


def test_delta_holds_what_was_trained_and_nothing_that_was_dropped(world: World) -> None:
    folder = world.finished("plain")
    tensors = delta_tensors(folder)
    with safe_open(folder / "checkpoints" / "step-000012" / "state.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with safe_open(folder / "checkpoints" / "step-000009" / "state.safetensors", "pt") as file:
        names = [name.removeprefix("active/") for name in file.keys() if name.startswith("active/")]  # noqa: SIM118
    assert len(names) == 5
    for name in names:
        indices = tensors[f"{name}.indices"]
        assert torch.equal(indices.long(), state[f"active/{name}"])
        assert torch.equal(tensors[f"{name}.values"], state[f"delta/{name}"].half())
        assert bool((indices[1:] > indices[:-1]).all())
    active = sum(len(t) for n, t in tensors.items() if n.endswith(".indices"))
    assert active == read_json(folder / "summary.json")["active_parameters"]  # dropped ones left


def test_a_finished_run_can_be_finished_again_in_fp32(world: World, tmp_path: Path) -> None:
    """Its last checkpoint has every bit; what is evaluated is what is saved, in either type."""
    short, folder = world.finished("plain"), copy_run(world.finished("plain"), world.runs / tmp_path.name)
    assert world.train(None, RESUME=folder, DELTA_DTYPE="fp32") == 0
    long, rounded = delta_tensors(folder), delta_tensors(short)
    assert long.keys() == rounded.keys()
    for name, tensor in rounded.items():
        assert tensor.dtype == (torch.float16 if name.endswith(".values") else long[name].dtype)
        assert torch.equal(tensor, long[name].to(tensor.dtype))
    ours = {e["name"]: e["loss"] for e in evaluated(folder, tmp_path)}
    assert ours == {name: e["loss"] for name, e in final_evaluations(folder).items()}
    assert ours != {name: e["loss"] for name, e in final_evaluations(short).items()}


@pytest.mark.parametrize("frac", ["0.05", "2e-4"])
def test_experts_moved_agrees_with_the_file(world: World, frac: str) -> None:
    """Counted here with numpy over flat positions, expert by expert. With few active weights, few experts move."""
    folder = world.finished(f"moved-{frac}", FRAC=frac)
    tensors = delta_tensors(folder)
    counted = []
    for layer in (2, 3):
        moved = set()
        for part, rows in (("gate_up_proj", 2 * INTERMEDIATE * HIDDEN), ("down_proj", HIDDEN * INTERMEDIATE)):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            flat = np.zeros(EXPERTS * rows, np.float32)
            flat[tensors[f"{name}.indices"].numpy()] = tensors[f"{name}.values"].numpy()
            moved |= {e for e, weights in enumerate(flat.reshape(EXPERTS, rows)) if weights.any()}
        counted.append({"layer": layer, "experts": EXPERTS, "moved": len(moved)})
    assert read_json(folder / "summary.json")["experts_moved"] == counted
    assert (min(layer["moved"] for layer in counted) < EXPERTS) == (frac == "2e-4")


@pytest.mark.parametrize(
    "changes",
    [{}, {"USE_RESIDENT": "0"}, {"USE_RESIDENT": "1"}, {"USE_FROZEN_CACHE": "0"}, {"FROZEN_CACHE_N": "5"}],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "plain",
)
def test_evaluating_the_delta_gives_the_runs_own_losses(world: World, tmp_path: Path, changes: dict[str, str]) -> None:
    folder = world.finished("-".join(["exact", *changes, *changes.values()]), **changes)
    last = final_evaluations(folder)
    found = evaluated(folder, tmp_path)
    assert {e["name"] for e in found} == last.keys()
    for e in found:
        assert e["loss"] == last[e["name"]]["loss"]
        assert e["perplexity"] == last[e["name"]]["perplexity"]
        assert e["tokens"] == last[e["name"]]["tokens"]
        assert e["step"] == 12


def test_evaluating_in_a_new_process_with_everything_moved(world: World, tmp_path: Path) -> None:
    folder = world.finished("plain")
    for name in ("model", "data.jsonl", "other.jsonl"):
        source = world.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / f"moved-{name}")
    (tmp_path / "moved-other.jsonl").rename(tmp_path / "other.jsonl")  # its stem names the evaluation
    delta = shutil.copy(folder / "delta.safetensors", tmp_path / "moved.safetensors")
    out = tmp_path / "figures.json"
    flags = ["--delta", delta, "--model", tmp_path / "moved-model", "--dataset", tmp_path / "moved-data.jsonl",
             "--heldout", tmp_path / "other.jsonl", "--json", out]  # fmt: skip
    command = [sys.executable, "-m", "usaf.evaluate", *map(str, flags)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    last = final_evaluations(folder)
    assert {e["name"]: e["loss"] for e in read_json(out)["evaluations"]} == {n: e["loss"] for n, e in last.items()}


def test_the_base_alone_is_step_zero(world: World, tmp_path: Path) -> None:
    folder = world.finished("plain")
    first = {e["name"]: e["loss"] for e in events(folder, "eval") if e["step"] == 0}
    assert {e["name"]: e["loss"] for e in evaluated(folder, tmp_path, "--base")} == first


def test_evaluating_at_several_scales(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is the run's model with its file's change multiplied, and the whole of it is what was trained."""
    folder = world.finished("plain")
    own = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).state_dict()
    delta, halved = load_delta(folder / "delta.safetensors"), tmp_path / "halved"
    sparse = {name: (indices, values / 2) for name, (indices, values) in delta.sparse.items()}
    whole = {name: (weight + own[name]) / 2 for name, weight in delta.whole.items()}
    halved.mkdir()
    save_delta(halved / "delta.safetensors", dataclasses.replace(delta, sparse=sparse, whole=whole))
    capsys.readouterr()
    found = evaluated(folder, tmp_path, "--scale", "1,0.5,1.0")
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity at scale"))
    assert header.split()[3:] == ["1", "0.5"]
    last = {name: e["loss"] for name, e in final_evaluations(folder).items()}
    assert {e["name"]: e["loss"] for e in found if e["scale"] == 1} == last
    half = {e["name"]: e["loss"] for e in found if e["scale"] == 0.5}
    assert half.keys() == last.keys()
    for e in evaluated(halved, tmp_path):
        assert half[e["name"]] == pytest.approx(e["loss"], rel=1e-5)
        assert half[e["name"]] != last[e["name"]]


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        *((["--scale", scale], f"--scale {scale}: must be numbers above 0") for scale in ("0", "2.5", "nan", "1,", "")),
        (["--scale", "0.5", "--base"], "--scale contradicts --base"),
    ],
)
def test_a_bad_scale_is_one_line(
    world: World, flags: list[str], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.finished("plain")
    capsys.readouterr()
    assert evaluate_module.main(["--delta", str(folder / "delta.safetensors"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {pattern}")
    assert err.count("\n") == 1


def test_a_delta_on_another_base_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world.finished("plain")
    other = write_checkpoint(tmp_path / "other-model", seed=1)
    flags = ["--model", str(other), "--quant", str(tmp_path / "experts_q4.safetensors")]
    status = evaluate_module.main(["--delta", str(folder / "delta.safetensors"), *flags])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status == 2
    assert len(errors) == 1
    assert "another base" in errors[0]


# ---- the same weights however it is carried out ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"USE_RESIDENT": "0"},
        {"USE_RESIDENT": "1"},
        {"USE_FROZEN_CACHE": "0"},
        {"FROZEN_CACHE_N": "5"},
        {"EVAL_EVERY": "1", "SAVE_EVERY": "1", "KEEP_CHECKPOINTS": "1"},
        {"EVAL_EVERY": "0"},
        {"HELDOUT_PATH": None},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "repeated",
)
def test_what_shapes_no_result_changes_no_bit(world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = world.finished("plain")
    changes = {"PREFIX_CACHE_DIR": tmp_path / "cache", **changes}
    if "HELDOUT_PATH" in changes:  # the split of the training data costs samples, but only where it is not given
        changes["HELDOUT_PATH"] = world.data
    tag = "same-" + tmp_path.name
    assert world.train(tag, **changes) == 0
    assert same_delta(plain, world.runs / tag)
    mine, its = curve(plain), curve(world.runs / tag)
    assert [e for e in mine if e[0] == "step"] == [e for e in its if e[0] == "step"]


@pytest.mark.parametrize(
    "changes",
    [{"SEED": "1"}, {"RESELECT_EVERY": "0"}, {"ACCUM": "2"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_shapes_the_result_changes_it(world: World, changes: dict[str, str]) -> None:
    tag = "other-" + next(iter(changes))
    assert world.train(tag, **changes) == 0
    assert not same_delta(world.finished("plain"), world.runs / tag)


def test_frozen_routers_are_not_in_the_delta(world: World) -> None:
    folder = world.finished("frozen-routers", ROUTER_LR="0")
    assert all(name.endswith((".indices", ".values", "norm.weight")) for name in delta_tensors(folder))
    assert read_json(folder / "summary.json")["router_parameters"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_reloads(family: str, tmp_path: Path) -> None:
    """One command, told from the checkpoint alone; from layer 1 in deepseek's, whose layer 0 is dense."""
    world = World(tmp_path, family)
    changes = {"STEPS": "3", "RESELECT_EVERY": "2", "CAPTURE_STEPS": "1", "TRAIN_FROM": "1"}
    assert world.train("run", **changes) == 0
    folder = world.runs / "run"
    assert [e["step"] for e in events(folder, "reselect")] == [2]
    assert read_json(folder / "summary.json")["model_type"] == family
    assert len(read_json(folder / "summary.json")["experts_moved"]) == 3
    last = final_evaluations(folder)
    assert {e["name"]: e["loss"] for e in evaluated(folder, tmp_path)} == {n: e["loss"] for n, e in last.items()}


def test_the_first_layer_can_be_the_first_trainable_one(world: World, tmp_path: Path) -> None:
    folder = world.finished("from-zero", TRAIN_FROM="0", STEPS="4", RESELECT_EVERY="2", CAPTURE_STEPS="1")
    last = final_evaluations(folder)
    assert {e["name"]: e["loss"] for e in evaluated(folder, tmp_path)} == {n: e["loss"] for n, e in last.items()}
    assert read_json(folder / "summary.json")["prefix_tokens_per_second"] is None


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [["-m", "usaf.train"], ["train.py"]], ids=["module", "script"])
def test_help_needs_no_torch(script: list[str]) -> None:
    trap = "import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = ['x', '--help']; "
    run = f"runpy.run_module({script[1]!r}" if script[0] == "-m" else f"runpy.run_path({script[0]!r}"
    command = [sys.executable, "-c", f"{trap}{run}, run_name='__main__')"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("--model", "--lr-peak", "--resume"):
        assert name in done.stdout


def test_flags_and_environment_are_one(world: World) -> None:
    assert main(["--seed", "3", "--steps", "4"], world.environ("by-flag", STEPS=None, SEED="7")) == 0
    assert world.train("by-environment", STEPS="4", SEED="3") == 0
    assert same_delta(world.runs / "by-flag", world.runs / "by-environment")


def test_one_of_two_gpus_is_said_to_be_used(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card's own words, shown by a run on the CPU in its place."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    words = cuda.cuda_backend(True).reason
    backend = choose_backend(False, True)
    object.__setattr__(backend, "reason", words)
    monkeypatch.setattr("usaf.session.choose_backend", lambda *_: backend)
    assert world.train("two-gpus", STEPS="1") == 0
    assert "one of 2 GPUs (only one is used)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path: Path) -> None:
    """`python train.py` with nothing set but where its runs go: learns what was held out too."""
    import os

    environ = {k: v for k, v in os.environ.items() if k not in {*TINY, "MODEL", "DATASET_PATH", "HELDOUT_PATH"}}
    environ |= {"OUTPUT_DIR": str(tmp_path), "RUN_TAG": "demo", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "train.py"], cwd=REPOSITORY, env=environ, check=True, timeout=3600)
    summary = read_json(tmp_path / "demo" / "summary.json")
    heldout = [e for e in summary["evaluations"] if e["name"].startswith("heldout_")]
    assert heldout
    for e in heldout:
        assert e["perplexity_after"] <= 0.85 * e["perplexity_before"], e
    assert "forgetting_python" in {e["name"] for e in summary["evaluations"]}


def test_lasting_ignores_measurements() -> None:
    """The judge of the resume tests: what it leaves out are times, bytes and places."""
    assert lasting({"steps": 1, "seconds_total": 2.0, "peak_memory_bytes": 3, "delta_path": "x"}) == {"steps": 1}
