"""Whole runs in which head and norms train: resumed, evaluated, refused, asked, exported. With a head in several short
blocks, a few tokens at a time, as a tensor of its own and as the embeddings'."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build, logits_of, random_batch, with_delta, write_checkpoint
from runs import (
    World,
    curve,
    delta_tensors,
    events,
    lasting,
    raw_tensors,
    read_json,
    same_delta,
    signal_at_step,
    tensors_of_delta,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from usaf import evaluate, export, sparse_head
from usaf.generation import base_alone
from usaf.run import list_checkpoints, load_checkpoint
from usaf.trained_parts import open_head, open_norms

HEAD, EMBEDDINGS, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"
# Steps 3 and 4 are captured, a reselection follows the latter.
SETTINGS: dict[str, Any] = {"STEPS": 6, "HEAD_CHUNK_TOKENS": 7, "EVAL_EVERY": 6, "SAVE_EVERY": 6, "FRAC": "0.1"}
BATCH = random_batch([[20], [17]])


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows each, 8 in the last."""
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", 20 * 64)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def world(which: str) -> World:
        if which not in made:
            made[which] = World(tmp_path_factory.mktemp(which), tie_word_embeddings=which == "tied")
        return made[which]

    return world


@pytest.fixture(params=["untied", "tied"])
def own(request: pytest.FixtureRequest, worlds: Callable[[str], World]) -> World:
    return worlds(request.param)


def finished(world: World) -> Path:
    return world.finished("run", **SETTINGS)


def delta_of(world: World) -> Path:
    return finished(world) / "delta.safetensors"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


# ---- training -------------------------------------------------------------------------------------------------------


def test_head_and_norms_move(own: World) -> None:
    """As many weights as without a head, of experts and head; and the head's change in the reselection too."""
    folder, model = finished(own), build(own.model)
    tensors, summary = delta_tensors(folder), read_json(folder / "summary.json")
    assert bool((tensors[f"{HEAD}.values"] != 0).any())
    assert f"{EMBEDDINGS}.indices" not in tensors
    norms = [name for name in tensors if name.endswith("norm.weight")]
    assert len(norms) == 2 * 4 + 1
    for name in norms:
        assert not torch.equal(tensors[name], model.model.get_parameter(name).float()), name
    assert summary["head_parameters"] == len(tensors[f"{HEAD}.values"]) > 0
    assert summary["active_parameters"] == sum(len(t) for n, t in tensors.items() if n.endswith(".values"))
    (reselection,) = events(folder, "reselect")
    assert reselection["active"] == summary["active_parameters"]


def test_a_checkpoint_inside_a_capture_window_resumes_to_the_bit(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head has captured, several chunks a step in several blocks, waits in the checkpoint."""
    plain = finished(own)
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGINT, 3)
        assert own.train("interrupted", **SETTINGS) == 130
    folder = own.runs / "interrupted"
    saved = load_checkpoint(list_checkpoints(folder)[-1])
    captured = saved.about["captured"][HEAD]
    assert [entry["step"] for entry in captured] == [2]
    assert len(saved.tensors[f"captured/{HEAD}/0/targets"]) > 7
    assert f"whole/{NORM}" in saved.tensors
    assert f"adam/{NORM}/exp_avg" in saved.tensors
    assert own.train("interrupted", RESUME="auto", **SETTINGS) == 0
    assert same_delta(plain, folder)
    assert curve(folder) == curve(plain)
    assert lasting(read_json(folder / "summary.json")) == lasting(read_json(plain / "summary.json"))


def test_the_saved_delta_has_the_losses_of_its_run(own: World, tmp_path: Path) -> None:
    delta = delta_of(own)
    assert evaluate.main(["--delta", str(delta), "--json", str(tmp_path / "figures.json")]) == 0
    found = {e["name"]: e["loss"] for e in read_json(tmp_path / "figures.json")["evaluations"]}
    assert found == {e["name"]: e["loss"] for e in events(delta.parent, "eval") if e["step"] == SETTINGS["STEPS"]}
    assert len(found) == 2


@pytest.mark.parametrize(("head", "norms"), [(0, 0), (1, 0), (0, 1)])
def test_what_is_switched_off_stays_at_its_base(
    worlds: Callable[[str], World], head: int, norms: int, tmp_path: Path
) -> None:
    """It is not in the delta, and the export has the source's own bytes of it."""
    world = worlds("tied")
    folder = world.finished(f"parts-{head}-{norms}", **SETTINGS, TRAIN_HEAD=head, TRAIN_NORMS=norms)
    tensors = delta_tensors(folder)
    assert (f"{HEAD}.indices" in tensors) == bool(head)
    assert any("norm" in name for name in tensors) == bool(norms)
    assert (read_json(folder / "summary.json")["head_parameters"] > 0) == bool(head)
    with_all = delta_tensors(finished(world))
    sizes = [sum(len(t) for n, t in found.items() if n.endswith(".values")) for found in (tensors, with_all)]
    assert sizes[0] == sizes[1], "the head's share comes from the experts'"
    arguments = ["--delta", str(folder / "delta.safetensors"), "--output", str(tmp_path / "out"), "--no-evaluate"]
    assert export.main([*arguments, "--dtype", "fp32"]) == 0
    before, after = raw_tensors(world.model), raw_tensors(tmp_path / "out")
    assert (HEAD in after) == bool(head)
    assert HEAD not in before
    same = {name for name in before if before[name] == after[name]}
    of_norms = {name for name in before if "norm" in name}
    assert EMBEDDINGS in same
    assert len(of_norms - same) == (2 * 4 + 1 if norms else 0)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] == (not head)


# ---- a damaged file -------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "an index beyond the head": (lambda t: t[f"{HEAD}.indices"].__setitem__(-1, VOCAB * 64), f"{VOCAB * 64}"),
    "an index below 0": (lambda t: t[f"{HEAD}.indices"].__setitem__(0, -1), "-1"),
    "indices that fall": (lambda t: t.update({f"{HEAD}.indices": t[f"{HEAD}.indices"].flip(0)}), "in rising order"),
    "a value less": (lambda t: t.update({f"{HEAD}.values": t[f"{HEAD}.values"][1:]}), "not one value for each index"),
    "a value that is none": (lambda t: t[f"{HEAD}.values"].__setitem__(0, float("nan")), "finite numbers"),
    "no head": (lambda t: [t.pop(f"{HEAD}.{part}") for part in ("indices", "values")], HEAD),
    "the embeddings for the head": (
        lambda t: t.update({f"{EMBEDDINGS}.{part}": t.pop(f"{HEAD}.{part}") for part in ("indices", "values")}),
        HEAD,
    ),
    "a whole head": (lambda t: t.update({HEAD: torch.zeros(VOCAB, 64)}), HEAD),
    "a norm less": (lambda t: t.pop(NORM), NORM),
    "a norm of a frozen layer": (lambda t: t.update({NORM.replace("2", "1"): t[NORM].clone()}), NORM.replace("2", "1")),
    "half a norm": (lambda t: t.update({NORM: t[NORM][:32]}), NORM),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_head_or_norm_is_one_line(
    worlds: Callable[[str], World], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta, (damage, words) = delta_of(worlds("untied")), DAMAGES[what]
    with safe_open(delta, "pt") as file:
        metadata = file.metadata()
    tensors = tensors_of_delta(delta)
    damage(tensors)
    path = tmp_path / "damaged.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    for command in (
        lambda: evaluate.main(["--delta", str(path)]),
        lambda: export.main(["--delta", str(path), "--output", str(tmp_path / "out"), "--no-evaluate"]),
    ):
        capsys.readouterr()
        assert command() == 2
        assert re.search(f"damaged\\.safetensors: .*{re.escape(words)}", error_of(capsys))
    assert not (tmp_path / "out").exists()


# ---- the base's own answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["head", "norms", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_base_alone_has_its_own_head_and_norms(part: str, tied: bool, tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path, tie_word_embeddings=tied))
    open_norms(model, 2)
    assert open_head(model)
    before, kept = logits_of(model, BATCH), model.own_weights()
    assert model.head is not None
    if part != "norms":
        model.head.set_active(torch.arange(0, 2000, 3), torch.full((667,), 0.3))
    if part != "head":
        for weight in model.norms.values():
            weight.data.mul_(1.5)
    tuned = logits_of(model, BATCH)
    assert not torch.equal(tuned, before)
    with base_alone(model, kept):
        assert torch.equal(logits_of(model, BATCH), before)
    assert torch.equal(logits_of(model, BATCH), tuned)


# ---- export ---------------------------------------------------------------------------------------------------------


def exported(world: World, output: Path, *flags: str) -> dict[str, Any]:
    figures = output.with_name(f"{output.name}.json")
    assert export.main(["--delta", str(delta_of(world)), "--output", str(output), "--json", str(figures), *flags]) == 0
    return dict(read_json(figures))


def dense_head(world: World) -> tuple[Tensor, Tensor]:
    """(its base, its base with the delta), worked out here from the files, in fp32."""
    tensors = delta_tensors(finished(world))
    stored = load_file(world.model / "model.safetensors")
    base = stored.get(HEAD, stored[EMBEDDINGS])
    merged = base.float()
    merged.view(-1)[tensors[f"{HEAD}.indices"].long()] += tensors[f"{HEAD}.values"]
    return base.float(), merged


def test_a_tied_model_is_exported_with_a_head_of_its_own(worlds: Callable[[str], World], tmp_path: Path) -> None:
    """As trained: transformers' logits from the folder are those of the trained model."""
    world = worlds("tied")
    out = tmp_path / "out"
    exported(world, out, "--base", "dequantized", "--dtype", "fp32", "--no-evaluate")
    before, after = raw_tensors(world.model), raw_tensors(out)
    assert after.keys() == {*before, HEAD}
    assert after[EMBEDDINGS] == before[EMBEDDINGS]
    assert after[HEAD][0] == after[EMBEDDINGS][0], "in the shard of the tensor that it was"
    assert AutoConfig.from_pretrained(world.model).tie_word_embeddings
    assert not AutoConfig.from_pretrained(out).tie_word_embeddings
    reference = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()
    base, merged = dense_head(world)
    assert torch.equal(reference.get_output_embeddings().weight, merged)
    assert torch.equal(reference.get_input_embeddings().weight, base)
    with torch.no_grad():
        theirs = reference(input_ids=BATCH.input_ids, position_ids=BATCH.position_ids, use_cache=False).logits
    ours = logits_of(with_delta(world.model, delta_of(world)), BATCH)
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((ours - logits_of(build(world.model), BATCH)).abs().max()) > 1e-2


def test_in_16_bits_the_head_is_rounded_once(own: World, tmp_path: Path) -> None:
    figures = exported(own, tmp_path / "out", "--no-evaluate")
    base, merged = dense_head(own)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[HEAD], merged.bfloat16())
    tensors = delta_tensors(finished(own))
    nonzero = sum(int((t != 0).sum()) for n, t in tensors.items() if n.endswith(".values"))
    assert figures["active_nonzero_elements"] == nonzero
    assert figures["changed_elements"] >= int((merged.bfloat16() != base.bfloat16()).sum()) > 0


def test_the_columns_of_an_export_agree(own: World, tmp_path: Path) -> None:
    """Read back from the files or computed, the figures are the same; and onto the dequantised base, the run's own."""
    figures = {
        base: exported(own, tmp_path / base, "--base", base, "--dtype", "fp32") for base in ("original", "dequantized")
    }
    evaluations = figures["original"]["evaluations"]
    assert evaluations == figures["dequantized"]["evaluations"]
    losses = {e["name"]: e["loss"] for e in events(finished(own), "eval") if e["step"] == SETTINGS["STEPS"]}
    assert {e["name"]: e["loss_as_trained"] for e in evaluations} == losses
    for evaluation in evaluations:
        assert evaluation["loss_dequantized"] == pytest.approx(evaluation["loss_as_trained"], rel=1e-5)
        assert evaluation["loss_original"] != evaluation["loss_dequantized"]
