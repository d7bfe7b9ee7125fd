"""`python -m usaf.export`: what is written, judged by transformers and by the bytes; bad input, a line each.

The expected values are worked out here from the delta file, the source as transformers loads it and `dequantize`, with
none of the code that merges.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import adapted_families
import pytest
import torch
from families import FAMILIES, build, logits_of, random_batch, tiny_config, with_delta, write_checkpoint
from runs import World, peaks_of, raw_tensors, read_json, tensors_of_delta
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from source_checkpoints import write_shards
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf import expert_store, merged_folder
from usaf import merge as merge_module
from usaf.checkpoint import Checkpoint
from usaf.delta import Delta
from usaf.expert_store import FILE_NAME, open_or_make, read_store
from usaf.export import main
from usaf.files import lock
from usaf.merged_folder import ABOUT_NAME
from usaf.quantization import dequantize, quantize_minmax
from usaf.session import DataOrder
from usaf.source_folder import INDEX_NAME, SINGLE_NAME

SHORT = {"STEPS": 3, "RESELECT_EVERY": 0, "EVAL_EVERY": 0, "LR_PEAK": "2e-4", "EVAL_SAMPLES": 2}


class Run(NamedTuple):
    """A short run on a tiny checkpoint."""

    model: Path
    delta: Path
    world: World


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The run of a family, made once. shards: files of the checkpoint; extra: more tensors for it."""
    made: dict[tuple[str, int, bool], Run] = {}

    def run(family: str = "qwen3_moe", shards: int = 1, extra: dict[str, Tensor] | None = None) -> Run:
        key = family, shards, extra is not None
        if key not in made:
            world = World(tmp_path_factory.mktemp(family), family)
            if extra is not None:
                path = world.model / SINGLE_NAME
                save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
            if shards > 1:
                deal_out(world.model, shards)
            folder = world.finished("short", **SHORT)
            made[key] = Run(world.model, folder / "delta.safetensors", world)
        return made[key]

    return run


def deal_out(folder: Path, shards: int) -> None:
    """The tensors of a checkpoint, to several files in turn: those of one expert lie apart. (Whether they do in what
    `save_pretrained` shards depends on the version of transformers.)"""
    tensors = load_file(folder / SINGLE_NAME)
    homes = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for home in set(homes.values()):
        save_file({n: t for n, t in tensors.items() if homes[n] == home}, folder / home, metadata={"format": "pt"})
    (folder / SINGLE_NAME).unlink()
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def export(run: Run, output: Path, *flags: str) -> dict[str, Any]:
    """The figures of an export that succeeds."""
    figures = output.with_name(f"{output.name}.json")
    assert main(["--delta", str(run.delta), "--output", str(output), "--json", str(figures), *flags]) == 0
    return dict(read_json(figures))


def loaded(folder: Path, dtype: Any = torch.float32) -> dict[str, Tensor]:
    """What transformers makes of a folder."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())


def deltas(run: Run) -> dict[str, Tensor]:
    """Parameter -> its delta as transformers lays it out, dense, zero where nothing is trained."""
    found = {}
    model = Checkpoint(run.model).model
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}  # of the head, beside the experts
    shapes |= {name: entry.shape for name, entry in read_store(run.model / FILE_NAME).entries.items()}
    tensors = tensors_of_delta(run.delta)
    for target in (name.removesuffix(".indices") for name in tensors if name.endswith(".indices")):
        dense = torch.zeros(torch.Size(shapes[target]).numel())
        dense[tensors[f"{target}.indices"].long()] = tensors[f"{target}.values"].float()
        dense = dense.reshape(shapes[target])
        transposed = getattr(model.get_submodule(target.rpartition(".")[0]), "is_transposed", False)
        found[target] = dense.transpose(1, 2) if transposed else dense
    assert found
    assert all(bool((dense != 0).any()) for dense in found.values())
    return found


def bases(run: Run) -> dict[str, Tensor]:
    """Parameter -> its 4-bit weights, decoded, as transformers lays them out."""
    model = Checkpoint(run.model).model
    found = {}
    for target, entry in read_store(run.model / FILE_NAME).entries.items():
        weight = dequantize(entry)
        found[target] = (
            weight.transpose(1, 2) if model.get_submodule(target.rpartition(".")[0]).is_transposed else weight
        )
    return found


def whole(run: Run) -> dict[str, Tensor]:
    """Routers and norms."""
    return {n: t for n, t in tensors_of_delta(run.delta).items() if not n.endswith((".indices", ".values"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_onto_the_original_weights(run_of: Callable[..., Run], family: str, tmp_path: Path) -> None:
    """bf16: changed are exactly the weights whose rounded sum differs, and the lost share is counted right."""
    run = run_of(family)
    figures = export(run, tmp_path / "out", "--no-evaluate")
    before, after, trained = loaded(run.model), loaded(tmp_path / "out"), deltas(run)
    assert set(before) == set(after)
    active = changed = 0
    for name, base in before.items():
        if name in trained:
            expected = (base + trained[name]).to(torch.bfloat16).float()
            assert torch.equal(after[name], expected), name
            moved = after[name] != base
            assert not (moved & (trained[name] == 0)).any()
            active += int((trained[name] != 0).sum())
            changed += int(moved.sum())
        elif name in whole(run):
            assert torch.equal(after[name], whole(run)[name].to(torch.bfloat16).float()), name
        else:
            assert torch.equal(after[name], base), name
    assert (figures["active_nonzero_elements"], figures["changed_elements"]) == (active, changed)
    assert figures["share_lost_to_rounding"] == pytest.approx(1 - changed / active)
    assert 0 < changed < active


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_exactly_the_trained_weights_change(run_of: Callable[..., Run], family: str, tmp_path: Path) -> None:
    run = run_of(family)
    figures = export(run, tmp_path / "out", "--no-evaluate", "--dtype", "fp32")
    before, trained = loaded(run.model), deltas(run)
    after = loaded(tmp_path / "out", "auto")  # as a user loads it: config.json must say fp32
    for name, dense in trained.items():
        assert torch.equal(after[name] != before[name], dense != 0), name
        assert torch.equal(after[name], before[name] + dense), name
    for name, weight in whole(run).items():
        assert torch.equal(after[name], weight)
    assert figures["share_lost_to_rounding"] == 0
    assert figures["changed_elements"] == sum(int((dense != 0).sum()) for dense in trained.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_onto_the_dequantized_base(run_of: Callable[..., Run], family: str, tmp_path: Path) -> None:
    """Every expert, of frozen layers too, is dequantise + delta; the logits are those of the training process."""
    run = run_of(family)
    export(run, tmp_path / "out", "--no-evaluate", "--base", "dequantized", "--dtype", "fp32")
    after, trained, base = loaded(tmp_path / "out", "auto"), deltas(run), bases(run)
    assert len(base) > len(trained)
    for name, weight in base.items():
        assert torch.equal(after[name], weight + trained.get(name, torch.zeros(()))), name
    batch = random_batch([[20], [17]])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    ours = logits_of(with_delta(run.model, run.delta), batch)
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("shards", [1, 5], ids=["one file", "sharded"])
def test_names_shards_types_and_untouched_bytes_are_the_sources(
    run_of: Callable[..., Run], shards: int, tmp_path: Path
) -> None:
    run = run_of(shards=shards)
    export(run, tmp_path / "out", "--no-evaluate")
    before, after = raw_tensors(run.model), raw_tensors(tmp_path / "out")
    assert {n: v[:2] for n, v in after.items()} == {n: v[:2] for n, v in before.items()}
    changed = {n for n in before if before[n][2] != after[n][2]}
    layers = tuple(f"model.layers.{i}." for i in (2, 3))
    experts = {n for n in changed if n.startswith(layers) and ".experts." in n}
    assert experts
    assert changed - experts <= {*whole(run), "lm_head.weight"}
    assert {"lm_head.weight", "model.layers.2.mlp.gate.weight"} <= changed
    assert (tmp_path / "out" / INDEX_NAME).exists() == (shards > 1)
    if shards > 1:
        index = read_json(tmp_path / "out" / INDEX_NAME)
        assert index["weight_map"] == {n: v[0] for n, v in after.items()}
        assert index["metadata"]["total_size"] == sum(len(v[2]) for v in after.values())


def test_an_expert_whose_tensors_lie_in_two_shards_is_counted_once(run_of: Callable[..., Run], tmp_path: Path) -> None:
    whole, parts = run_of(), run_of(shards=5)
    homes = read_json(parts.model / INDEX_NAME)["weight_map"]
    apart = [k for k in homes if k.endswith("gate_proj.weight") and homes[k] != homes[k.replace("gate_", "up_")]]
    assert apart, "the case does not occur"
    figures = [export(r, tmp_path / str(i), "--no-evaluate") for i, r in enumerate((whole, parts))]
    keys = ("active_nonzero_elements", "changed_elements", "experts_changed")
    assert [figures[0][k] for k in keys] == [figures[1][k] for k in keys]


def test_tensors_that_no_class_knows_are_carried_along(run_of: Callable[..., Run], tmp_path: Path) -> None:
    """Heads for multi-token prediction, vision towers, in whatever type."""
    extra = {"mtp.0.weight": torch.arange(7.0).to(torch.float8_e4m3fn), "vision.x": torch.ones(2, 2)}
    run = run_of(extra=extra)
    export(run, tmp_path / "out", "--no-evaluate")
    before, after = raw_tensors(run.model), raw_tensors(tmp_path / "out")
    assert set(before) == set(after)
    for name in (*extra, "model.embed_tokens.weight"):
        assert before[name] == after[name]


def test_companions_and_config(run_of: Callable[..., Run], tmp_path: Path) -> None:
    run = run_of()
    model = Path(shutil.copytree(run.model, tmp_path / "model"))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "README.md", "pytorch_model.bin", "x.gguf"):
        (model / name).write_text(name, encoding="utf-8")
    (model / "subfolder").mkdir()
    files = {}
    for i, flags in enumerate(([], ["--dtype", "fp32"])):
        out = tmp_path / str(i)
        arguments = ["--delta", str(run.delta), "--model", str(model), "--output", str(out), "--no-evaluate", *flags]
        assert main(arguments) == 0
        files[i] = {path.name for path in out.iterdir()}
    expected = {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "generation_config.json", ABOUT_NAME}
    assert files[0] == files[1] == expected | {SINGLE_NAME}
    source = read_json(model / "config.json")
    assert read_json(tmp_path / "0" / "config.json") == source
    assert read_json(tmp_path / "1" / "config.json") == {**source, "dtype": "float32"}
    about = read_json(tmp_path / "1" / ABOUT_NAME)
    assert about["base"] == "original"
    assert about["dtype"] == "fp32"


def test_dtype_of_composite_configurations() -> None:
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}, "vision_config": {"n": 2}}
    merged_folder.set_dtype(config, "float32")
    assert config == {"dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "vision_config": {"n": 2}}


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_perplexities_are_those_of_the_files(
    run_of: Callable[..., Run], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers computes them, in fp32, on the sequences of the run; and the run's own to the bit."""
    run = run_of()
    figures = export(run, tmp_path / "out", "--base", base, "--dtype", "fp32")
    out = capsys.readouterr().out
    assert f"{base} + delta (exported)" in out
    events = [json.loads(line) for line in (run.delta.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
    own = {e["name"]: e["loss"] for e in events if e["event"] == "eval" and e["step"] == SHORT["STEPS"]}
    assert {e["name"]: e["loss_as_trained"] for e in figures["evaluations"]} == own
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    samples = [json.loads(line) for line in run.world.other.read_text("utf-8").splitlines()]
    losses = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        with torch.no_grad():
            losses.append(float(reference(input_ids=ids, labels=ids, use_cache=False).loss))
    evaluation = next(e for e in figures["evaluations"] if e["name"] == "heldout_other")
    assert evaluation["tokens"] % (len(samples[0]["input_ids"]) - 1) == 0
    # Two of the six held-out samples were evaluated, and boundary states are rounded to bf16 on the way.
    assert min(abs(evaluation[f"loss_{base}"] - (a + b) / 2) for a in losses for b in losses) < 2e-3
    assert evaluation["loss_original"] != evaluation["loss_dequantized"]


def test_at_half_the_scale_half_of_the_change_is_written(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = run_of(), loaded(run_of().model)
    whole_of_it = export(run, tmp_path / "all", "--dtype", "fp32")
    figures = export(run, tmp_path / "half", "--dtype", "fp32", "--scale", "0.5")
    assert "at scale 0.5" in capsys.readouterr().out
    assert (whole_of_it["scale"], figures["scale"]) == (1, 0.5)
    every, half = loaded(tmp_path / "all"), loaded(tmp_path / "half")
    for name, weight in half.items():
        base = before.get(name, before["model.embed_tokens.weight"])  # a trained head that was tied is its own now
        torch.testing.assert_close(weight, (base + every[name]) / 2, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(half[name], every[name]) for name in half)
    for whole_one, half_one in zip(whole_of_it["evaluations"], figures["evaluations"], strict=True):
        assert whole_one["loss_as_trained"] != half_one["loss_as_trained"]


def test_both_bases_give_the_same_comparison(run_of: Callable[..., Run], tmp_path: Path) -> None:
    """One column is read back from the files, the other computed: whichever is which, the figures agree to the bit."""
    run = run_of()
    evaluations = [export(run, tmp_path / base, "--base", base)["evaluations"] for base in ("original", "dequantized")]
    assert evaluations[0] == evaluations[1]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"original", "dequantized"}


# ---- refusals -------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def refused(
    run: Run, root: Path, capsys: pytest.CaptureFixture[str], pattern: str, *flags: str, output: str = "out",
    status: int = 2,
) -> None:  # fmt: skip
    """One line, that exit status, and nothing changed anywhere."""
    before, source = state(root), state(run.model)
    capsys.readouterr()
    assert main(["--delta", str(run.delta), "--output", str(root / output), "--no-evaluate", *flags]) == status
    err = capsys.readouterr().err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(pattern, line), line
    assert state(root) == before
    assert state(run.model) == source


def test_an_output_that_is_taken(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    refused(run, tmp_path, capsys, r"--output .*full: is not empty; give a new folder", output="full")
    refused(run, tmp_path, capsys, r"--output .*x: is a file", output="full/x")
    refused(run, tmp_path, capsys, r"--output .*y: could not be written", output="full/x/y")
    refused(run, tmp_path, capsys, r"--output .*model: is not empty", output=str(run.model))
    refused(run, tmp_path, capsys, r"File name too long", output="x" * 300)


def test_nothing_is_put_into_the_sources_folder(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of()
    (tmp_path / "link").symlink_to(run.model, target_is_directory=True)
    refused(run, tmp_path, capsys, "in the folder of the model", output=str(run.model / "out"))
    refused(run, tmp_path, capsys, "in the folder of the model", output="link/below/out")


def test_one_export_at_a_time(run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second would take the first one's half for a killed process's, and clear it away."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / SINGLE_NAME).write_bytes(b"half")
    with open(tmp_path / ".out.lock", "wb") as file:
        lock(file)
        refused(run_of(), tmp_path, capsys, "another export is writing this folder")
    export(run_of(), tmp_path / "out", "--no-evaluate")  # what a killed process left keeps nobody out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.json"]


def test_a_link_to_an_empty_folder_is_filled(run_of: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    export(run_of(), tmp_path / "out", "--no-evaluate")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_parents_that_were_made_for_a_refused_export_go_again(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(run_of(), tmp_path, capsys, "the exported model needs", output="a/b/out")


def test_an_empty_folder_is_filled(run_of: Callable[..., Run], tmp_path: Path) -> None:
    """The one that a link leads to, as any other."""
    (tmp_path / "elsewhere").mkdir()
    try:
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("links need a right that this process lacks")
    export(run_of(), tmp_path / "out", "--no-evaluate")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_an_empty_folder_that_cannot_be_replaced(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point: found out before anything is written. And one whose export fails is there afterwards."""
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rmdir", lambda _: (_ for _ in ()).throw(OSError(errno.EBUSY, "Device or resource busy")))
        patched.setattr(merged_folder, "write_shard", lambda *_: pytest.fail("written"))
        refused(run_of(), tmp_path, capsys, r"could not be written \(Device or resource busy\)")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    arguments = ["--delta", str(run_of().delta), "--output", str(tmp_path / "out"), "--no-evaluate"]
    assert main(arguments) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_delta_of_another_base(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=3)
    Checkpoint(other)
    build(other)  # makes its 4-bit file
    refused(run_of(), tmp_path, capsys, "was trained on another base than .*other", "--model", str(other))


UP = "model.layers.2.mlp.experts.gate_up_proj"
GATE = "model.layers.2.mlp.gate.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "an index beyond the weights": (lambda t: t[f"{UP}.indices"].__setitem__(-1, 10**9), "1000000000"),
    "an index below 0": (lambda t: t[f"{UP}.indices"].__setitem__(0, -5), "-5"),
    "one router weight for all experts": (lambda t: t.update({GATE: t[GATE][:1]}), GATE),
    "a router less": (lambda t: t.pop(GATE), GATE),
    "a name more": (lambda t: t.update({"model.layers.2.x.weight": torch.zeros(2)}), "model.layers.2.x.weight"),
    "a frozen layer's experts": (
        lambda t: t.update({n.replace("layers.2", "layers.0"): t[n].clone() for n in list(t) if "layers.2" in n}),
        "model.layers.0",
    ),
    "experts less": (lambda t: [t.pop(f"{UP}.{part}") for part in ("indices", "values")], UP),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_damaged_delta(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = run_of()
    damage, words = MISFITS[name]
    with safe_open(run.delta, "pt") as file:
        metadata = file.metadata()
    tensors = tensors_of_delta(run.delta)
    damage(tensors)
    path = tmp_path / "damaged.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    refused(run._replace(delta=path), tmp_path, capsys, f"damaged\\.safetensors: .*{re.escape(words)}")


def test_a_broken_source(run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(shards=5)
    model = Path(shutil.copytree(run.model, tmp_path / "model"))
    shard = sorted(model.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(run, tmp_path, capsys, rf"{shard.name}: not a whole safetensors file", "--model", str(model))
    shard.unlink()
    refused(run, tmp_path, capsys, rf"{shard.name}: this file of the checkpoint is missing", "--model", str(model))


def test_a_source_without_its_experts(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run needs the 4-bit file alone; an export has nothing to write into."""
    run = run_of()
    model = Path(shutil.copytree(run.model, tmp_path / "model"))
    tensors = {name: t.clone() for name, t in load_file(model / SINGLE_NAME).items() if ".experts." not in name}
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})
    pattern = r"has no tensor for model\.layers\.0\.mlp\.experts\.gate_up_proj, so it cannot be written back"
    refused(run, tmp_path, capsys, pattern, "--model", str(model))


def test_a_disk_that_is_too_small(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(run_of(), tmp_path, capsys, r"the exported model needs 0\.\d\d GB and the disk has 0\.00 GB free")


def test_a_disk_that_fills_up(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merged_folder.TensorFileWriter, "copy", full)
    refused(run_of(), tmp_path, capsys, r"could not be written \(No space left on device\)", status=1)


def test_weights_beyond_the_asked_type(
    run_of: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = merge_module.Merge._delta_of
    monkeypatch.setattr(
        merge_module.Merge, "_delta_of", lambda self, *a: (large(self, *a)[0], large(self, *a)[1] + 1e5)
    )
    refused(run_of(), tmp_path, capsys, r"--dtype: .*reaches 1\d+, beyond torch\.float16; use", "--dtype", "fp16")


def test_what_a_killed_export_left_is_removed(run_of: Callable[..., Run], tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / SINGLE_NAME).write_bytes(b"half")
    export(run_of(), tmp_path / "out", "--no-evaluate")
    assert not left.exists()


def test_an_export_needs_no_data(run_of: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    monkeypatch.setattr(DataOrder, "__init__", lambda *_: pytest.fail("data were read"))
    hidden = run.world.data.rename(run.world.data.with_suffix(".gone"))
    try:
        export(run, tmp_path / "out", "--no-evaluate")
    finally:
        hidden.rename(run.world.data)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_each_expert_is_merged_once(
    run_of: Callable[..., Run], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fused tensors, and in tensors of its own whose order mixes its two parameters (w1 and w3, w2)."""
    run = run_of(family)
    merged: list[tuple[str, int]] = []
    expert_pieces = merge_module.Merge.expert_pieces
    monkeypatch.setattr(
        merge_module.Merge, "expert_pieces",
        lambda self, target, e: (merged.append((target, e)), expert_pieces(self, target, e))[1],
    )  # fmt: skip
    export(run, tmp_path / "out", "--no-evaluate", "--base", "dequantized")
    experts, layers = tiny_config(family).num_local_experts, tiny_config(family).num_hidden_layers
    assert len(merged) == len(set(merged)) == 2 * layers * experts


def test_layers_share_what_says_where_weights_lie(tmp_path: Path) -> None:
    """DBRX stores down projections the other way round."""
    adapted_families.write_checkpoint(tmp_path, "dbrx")
    checkpoint = Checkpoint(tmp_path)
    store = open_or_make(checkpoint, None, 16, 4, lambda *_: None)
    merge = merge_module.Merge(checkpoint, store, Delta({}, {}, "", {}), "dequantized", None)
    layers = len(checkpoint.expert_parameters())
    asked = [(target, e) for target in merge.targets for e in range(merge.num_experts(target))] * 4
    with ThreadPoolExecutor(8) as pool:
        maps = list(pool.map(lambda of: merge._address_map(of[0]), asked))
    found = {id(a): a for a in maps if a is not None}
    assert len({target for target, _ in asked}) == 2 * layers >= 4
    assert 1 <= len(found) <= 2


def test_what_a_rearrangement_is() -> None:
    size = 1000
    addresses = torch.randperm(size, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert merge_module.is_rearrangement(addresses, size)
    twice, negative, beyond = addresses.clone(), addresses.clone(), addresses.clone()
    twice[3], negative[3], beyond[3] = twice[4], -1, size
    for wrong in (twice, negative, beyond, addresses[:-1], torch.cat([addresses, addresses[:1]]), addresses[:0]):
        assert not merge_module.is_rearrangement(wrong, size)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_exporting_gigabytes_in_many_shards_stays_small(
    tmp_path: Path, base: merge_module.BaseName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As converting them: far below 2 GB beyond what the process has already."""
    model, output = tmp_path / "model", tmp_path / "output"
    total = write_shards(model, 6, int4=False)
    try:
        monkeypatch.setattr(expert_store, "quantize", quantize_minmax)  # ten times faster than HQQ
        checkpoint = Checkpoint(model)
        store = open_or_make(checkpoint, None, 128, 4, lambda *_: None)
        generator, experts = torch.Generator().manual_seed(0), {}
        for target in ("model.layers.5.mlp.experts.gate_up_proj", "model.layers.5.mlp.experts.down_proj"):
            size = torch.Size(store[target].shape).numel()
            indices = torch.randint(size, (size // 200,), generator=generator).unique()
            experts[target] = indices, torch.randn(len(indices), generator=generator) * 1e-3
        merge = merge_module.Merge(checkpoint, store, Delta(experts, {}, "", {}), base, None)
        output.mkdir()
        written: list[merge_module.Counts] = []
        private, resident = peaks_of(
            lambda: written.append(merged_folder.write_folder(merge, output, {}, lambda *_: None))
        )
        print(f"{total / 1e9:.1f} GB, {base}: {private / 1e6:.0f} MB private, {resident / 1e6:.0f} MB resident")
        # One expert has 12.6 M weights; what is read of the 4-bit file is mapped, and counts until the system wants it.
        mapped = (model / FILE_NAME).stat().st_size if base == "dequantized" else 0
        assert private < 500e6
        assert resident < 500e6 + mapped
        assert written[0].active == sum(len(indices) for indices, _ in experts.values())
        assert sum(path.stat().st_size for path in output.glob("*.safetensors")) == pytest.approx(total, rel=1e-3)
    finally:
        shutil.rmtree(model)
        shutil.rmtree(output, ignore_errors=True)


BAD: dict[str, tuple[list[str], str]] = {
    "no delta": (["--output", "{tmp}/o"], r"usaf\.export: the following arguments are required: --delta; see --help"),
    "no output": (["--delta", "{tmp}/d"], "the following arguments are required: --output"),
    "unknown flag": (["--delta", "x", "--output", "{tmp}/o", "--bas", "original"], "unrecognized arguments: --bas"),
    "unknown base": (["--delta", "x", "--output", "{tmp}/o", "--base", "4bit"], "argument --base: invalid choice"),
    "unknown type": (["--delta", "x", "--output", "{tmp}/o", "--dtype", "int8"], "argument --dtype: invalid choice"),
    "no such delta": (["--delta", "{tmp}/d", "--output", "{tmp}/o"], r"--delta .*d: no such file"),
    "json is a folder": (["--delta", "x", "--output", "{tmp}/o", "--json", "{tmp}"], "--json .*: is a folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_one_line(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, pattern = BAD[what]
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert not list(tmp_path.iterdir())
