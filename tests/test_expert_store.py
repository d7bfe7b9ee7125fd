"""The 4-bit file: what is in it, that it is complete or absent, and one line for every file that does not serve."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, random_model, tiny_config, write_checkpoint
from runs import die_at, peaks_of, processes, wait
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from source_checkpoints import write_shards
from transformers import AutoModelForCausalLM

from usaf import expert_store, files, partial
from usaf.checkpoint import Checkpoint
from usaf.errors import RunError, UserError
from usaf.expert_store import (
    FILE_NAME,
    LEGACY_NAME,
    check_store,
    convert,
    find_path,
    open_or_make,
    read_store,
    shapes_of,
)
from usaf.quantization import QuantizedTensor, dequantize, quantize, quantize_4bit, quantize_minmax
from usaf.source_folder import SINGLE_NAME
from usaf.tensor_file import TensorFile, TensorFileWriter

REPOSITORY = Path(__file__).resolve().parent.parent


def quiet(done: int, total: int, what: str) -> None:
    pass


def forbidden(*_: Any) -> None:
    pytest.fail("was quantised again")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe checkpoint with its 4-bit file in groups of 32. Not to be written to."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy without the 4-bit file."""
    return Path(shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns(FILE_NAME)))


@pytest.fixture
def quantized(original: Path, tmp_path: Path) -> Path:
    """A copy with the 4-bit file."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a[3:] == b[3:] and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("group_size", "bits"), [(128, 4), (32, 4), (64, 8)])
def test_holds_every_expert_as_quantised_from_transformers_weights(
    tmp_path: Path, family: str, group_size: int, bits: int
) -> None:
    """Stored [E, out, in] for transposed families too. 48 is no multiple of 32: the last group is shorter."""
    changes = {"first_k_dense_replace": 1} if family == "deepseek_v3" else {}
    folder = write_checkpoint(tmp_path / "model", family, num_hidden_layers=2, **changes)
    calls: list[tuple[int, int]] = []
    checkpoint = Checkpoint(folder)
    store = open_or_make(checkpoint, None, group_size, bits, lambda done, total, what: calls.append((done, total)))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    total = 0
    for name, pair in checkpoint.expert_parameters().items():
        for target in pair:
            weight = reference.get_parameter(target).data
            weight = weight.transpose(1, 2) if reference.get_submodule(name).is_transposed else weight
            assert same(store[target], quantize(weight.contiguous(), group_size, bits)), target
            total += len(weight)
    assert set(store.entries) == set(shapes_of(checkpoint))
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert {path.name for path in folder.glob("*experts*")} == {FILE_NAME}


@pytest.mark.parametrize("width", [37, 24, 130])
def test_odd_intermediate_sizes(tmp_path: Path, width: int) -> None:
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1, moe_intermediate_size=width, num_experts=4)
    checkpoint = Checkpoint(folder)
    store = open_or_make(checkpoint, None, 128, 4, quiet)
    down = "model.layers.0.mlp.experts.down_proj"
    assert store[down].shape == (4, 64, width)
    assert store[down].packed.shape == (4, 64, (width + 1) // 2)
    weight = torch.stack([checkpoint.read_expert(down, e) for e in range(4)]).float()
    step = weight.abs().max() * 2 / 15
    assert (dequantize(store[down]) - weight).abs().max() < step


def test_one_expert_is_quantised_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    made = quantize

    def recording(weights: torch.Tensor, *rest: Any) -> QuantizedTensor:
        shapes.add(tuple(weights.shape))
        return made(weights, *rest)

    monkeypatch.setattr(expert_store, "quantize", recording)
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)
    assert shapes == {(1, 96, 64), (1, 64, 48)}


def write_large(folder: Path, experts: int, width: int) -> tuple[Path, int]:
    """One layer of random experts, written to disk a tensor at a time; returns their bytes too."""
    config = tiny_config(
        "qwen3_moe", num_hidden_layers=1, hidden_size=512, head_dim=64, moe_intermediate_size=width, num_experts=experts
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shapes = {n: tuple(p.shape) for n, p in names.items() if ".experts." not in n}
    for e in range(experts):
        name = f"model.layers.0.mlp.experts.{e}"
        shapes.update({f"{name}.{part}_proj.weight": (width, 512) for part in ("gate", "up")})
        shapes[f"{name}.down_proj.weight"] = (512, width)
    torch.manual_seed(0)
    with files.replacing(folder / SINGLE_NAME) as file:
        writer = TensorFileWriter(file, {n: (torch.bfloat16, s) for n, s in shapes.items()}, {"format": "pt"})
        for name, shape in shapes.items():
            writer.write(name, 0, torch.randn(shape).mul_(0.02).to(torch.bfloat16))
    return folder, experts * 3 * width * 512 * 2


def conversion_peaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Private and resident bytes that converting needs beyond those that the process has already.

    Plain rounding takes the place of HQQ, whose own memory is bounded in test_quantization: it is ten times faster.
    """
    monkeypatch.setattr(expert_store, "quantize", quantize_minmax)
    checkpoint = Checkpoint(folder)
    name, shape = next(iter(shapes_of(checkpoint).items()))
    quantize_minmax(checkpoint.read_expert(name, 0).unsqueeze(0))  # what torch sets up once
    return peaks_of(lambda: convert(checkpoint, folder / FILE_NAME, 128, 4, quiet))


@pytest.mark.slow
@pytest.mark.parametrize("int4", [False, True], ids=["bf16", "int4"])
def test_converting_gigabytes_in_many_shards_stays_small(
    tmp_path: Path, int4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Private memory and all resident memory, mapped pages included, by far below the promised 2 GB."""
    total = write_shards(tmp_path, 16 if int4 else 10, int4)
    try:
        assert total > (1.7e9 if int4 else 3.5e9)
        private, resident = conversion_peaks(tmp_path, monkeypatch)
        print(f"{total / 1e9:.1f} GB: {private / 1e6:.0f} MB private, {resident / 1e6:.0f} MB resident")
        assert max(private, resident) < 200e6
        store = read_store(tmp_path / FILE_NAME)
        assert bool(store.quantized) != int4
    finally:
        shutil.rmtree(tmp_path)


def test_converting_takes_the_memory_of_few_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, total = write_large(tmp_path / "model", experts=64, width=256)
    assert max(conversion_peaks(folder, monkeypatch)) < total / 2


def test_weights_that_are_not_finite_are_named_and_nothing_is_left(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    tensors["model.layers.1.mlp.experts.6.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj, expert 6: .*") as caught:
        convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


# ---- interruptions --------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


PARTIAL, JOURNAL = f".{FILE_NAME}.partial", f".{FILE_NAME}.journal"


def convert_in_process(folder: Path) -> None:
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)


def stop_at(at: int, error: BaseException) -> Callable[[int, int, str], None]:
    """A progress that raises once `at` experts are done."""

    def progress(done: int, total: int, what: str) -> None:
        if done == at:
            raise error

    return progress


@pytest.mark.parametrize("at", [1, 17, 32])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_conversion_that_breaks_off_goes_on(
    original: Path, folder: Path, error: BaseException, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    with pytest.raises(type(error)):
        convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, stop_at(at, error))
    assert names(folder) == before | {PARTIAL, JOURNAL}
    assert find_path(Checkpoint(folder), None) == (folder / FILE_NAME, False)
    calls: list[int] = []
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, lambda done, total, what: calls.append(done))
    assert calls == list(range(at + 1, 33))
    assert f"its making goes on where it stopped, after {at} of 32 experts" in capsys.readouterr().out
    assert names(folder) == before | {FILE_NAME}
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def kill_in_conversion(where: str, count: int, flush_seconds: float) -> None:
    """Called in the process that is to die: at the `count`-th file operation, or after so many experts."""
    partial.FLUSH_SECONDS = flush_seconds
    if where != "experts":
        die_at(where, count)
        return
    step = partial.Partial.step

    def dying(self: partial.Partial) -> None:
        step(self)
        if self.done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    partial.Partial.step = dying  # type: ignore[method-assign]


def _converting(folder: Path, arguments: tuple[Any, ...]) -> None:
    kill_in_conversion(*arguments)
    convert_in_process(folder)
    os._exit(0)


def run_and_kill(folder: Path, *arguments: Any) -> int:
    process = processes().Process(target=_converting, args=(folder, arguments))
    process.start()
    return wait(process)


needs_sigkill = pytest.mark.skipif(os.name == "nt", reason="SIGKILL")


@needs_sigkill
@pytest.mark.parametrize("flush_seconds", [0.0, 1e9], ids=["flushed each time", "never flushed"])
@pytest.mark.parametrize("at", [1, 20])
def test_a_killed_conversion_goes_on_with_what_was_flushed(
    original: Path, folder: Path, at: int, flush_seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    assert run_and_kill(folder, "experts", at, flush_seconds) == -signal.SIGKILL
    assert names(folder) == before | {PARTIAL, JOURNAL}
    convert_in_process(folder)
    assert names(folder) == before | {FILE_NAME}
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()
    went_on = f"after {at} of 32 experts" in capsys.readouterr().out
    assert went_on == (flush_seconds == 0)


@needs_sigkill
def test_killed_at_any_file_operation_it_comes_to_the_same_file(original: Path, folder: Path) -> None:
    """Each attempt is killed one operation later than the one before, and the next goes on from what it left."""
    before, count = names(folder), 1
    while run_and_kill(folder, str(folder / "."), count, 0.0) != 0:
        left = names(folder) - before
        assert left <= {PARTIAL, JOURNAL, FILE_NAME}
        if FILE_NAME in left:
            assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()
            break
        count += 1
        assert count < 60
    assert count > 5, "operations that could be killed at"
    convert_in_process(folder)
    assert names(folder) - {JOURNAL} == before | {FILE_NAME}
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def interrupted(folder: Path, at: int = 20) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, stop_at(at, KeyboardInterrupt()))


def test_a_partial_file_of_other_settings_or_weights_is_made_anew(
    original: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(folder)
    calls: list[int] = []
    convert(Checkpoint(folder), folder / "x.safetensors", 32, 4, quiet)  # another target: not concerned
    assert PARTIAL in names(folder)
    with pytest.raises(KeyboardInterrupt):
        convert(Checkpoint(folder), folder / FILE_NAME, 64, 4, stop_at(3, KeyboardInterrupt()))
    assert f"{PARTIAL}: was begun for other weights or settings, and is made anew" in capsys.readouterr().out
    tensors = {n: t + 0.01 if "layers.1" in n else t.clone() for n, t in load_file(folder / SINGLE_NAME).items()}
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    convert(Checkpoint(folder), folder / FILE_NAME, 64, 4, lambda done, total, what: calls.append(done))
    assert calls == list(range(1, 33))
    assert "made anew" in capsys.readouterr().out
    check_store(read_store(folder / FILE_NAME), Checkpoint(folder), 64, 4)


TORN: dict[str, tuple[Callable[[Path], Any], int]] = {
    "a line that was cut short": (lambda p: p.write_bytes(p.read_bytes() + b'{"done": 29'), 20),
    "lines after it": (lambda p: p.write_bytes(p.read_bytes() + b'{"do\n{"done": 29}\n'), 0),
    "no lines": (lambda p: p.write_bytes(b""), 0),
    "half of the first": (lambda p: p.write_bytes(p.read_bytes()[:20]), 0),
    "none": (lambda p: p.unlink(), 0),
}


@pytest.mark.parametrize("what", TORN)
def test_a_journal_is_trusted_as_far_as_it_is_whole(original: Path, folder: Path, what: str) -> None:
    interrupted(folder)
    damage, done = TORN[what]
    damage(folder / JOURNAL)
    calls: list[int] = []
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, lambda done, total, what: calls.append(done))
    assert calls[0] == done + 1
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def test_a_partial_file_of_another_size_is_made_anew(original: Path, folder: Path) -> None:
    interrupted(folder)
    os.truncate(folder / PARTIAL, 1000)
    convert_in_process(folder)
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def test_data_are_flushed_before_they_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power loss takes away was never promised: nothing is written to the partial file between its last fsync
    and the journal's line."""
    order: list[str] = []
    flush = partial.flush
    monkeypatch.setattr(partial, "flush", lambda file: (order.append(Path(file.name).name), flush(file)))
    monkeypatch.setattr(partial, "FLUSH_SECONDS", 0.0)
    convert_in_process(folder)
    assert order[:2] == [PARTIAL, JOURNAL]
    assert order[2:] == [PARTIAL, JOURNAL] * 32


def test_two_conversions_at_once(original: Path, folder: Path) -> None:
    """The second is refused in one line, and changes nothing; the first goes on."""
    refused: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        if done == 7:
            with pytest.raises(UserError, match="another process is making this file; wait until") as caught:
                convert_in_process(folder)
            refused.append(str(caught.value))

    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, progress)
    assert len(refused) == 1
    assert "\n" not in refused[0]
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()
    assert not {PARTIAL, JOURNAL} & names(folder)


def test_a_file_that_another_process_finished_meanwhile_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be mapped by then."""
    checkpoint = Checkpoint(folder)
    continued = expert_store.continued

    def late(path: Path, *rest: Any) -> Any:
        path.write_bytes(b"theirs")
        return continued(path, *rest)

    monkeypatch.setattr(expert_store, "continued", late)
    convert(checkpoint, folder / FILE_NAME, 32, 4, forbidden)
    assert (folder / FILE_NAME).read_bytes() == b"theirs"
    assert not {PARTIAL, JOURNAL} & names(folder)


def test_a_disk_that_fills_up_midway(original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(folder)

    def full(done: int, total: int, what: str) -> None:
        if done == 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="the disk takes no more .*; what is done is kept in .*the same command goes on"):
        convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, full)
    assert names(folder) == before | {PARTIAL, JOURNAL}
    calls: list[int] = []
    convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, lambda done, total, what: calls.append(done))
    assert calls[0] == 13
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def test_a_source_that_cannot_be_read_for_a_while(
    original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network disk that went away: the fault is told as the source's, and what is done is kept."""
    checkpoint, fill = Checkpoint(folder), TensorFile._fill

    def gone(self: TensorFile, view: memoryview, start: int) -> None:
        if start > 100_000:
            raise OSError(errno.EIO, "Input/output error")
        fill(self, view, start)

    monkeypatch.setattr(TensorFile, "_fill", gone)
    with pytest.raises(RunError, match=rf"{SINGLE_NAME}: could not be read \(Input/output error\); check the disk"):
        convert(checkpoint, folder / FILE_NAME, 32, 4, quiet)
    assert {PARTIAL, JOURNAL} <= names(folder)
    monkeypatch.setattr(TensorFile, "_fill", fill)
    convert(checkpoint, folder / FILE_NAME, 32, 4, quiet)
    assert (folder / FILE_NAME).read_bytes() == (original / FILE_NAME).read_bytes()


def test_what_a_partial_file_takes_already_is_not_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, 31)
    held = partial.allocated_bytes(folder / FILE_NAME)
    assert held > 0
    needed = (folder / PARTIAL).stat().st_size - held
    for free in (needed - 1, needed):
        usage = shutil._ntuple_diskusage(10**9, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if free < needed:
            with pytest.raises(UserError, match="the 4-bit file needs"):
                convert_in_process(folder)
        else:
            convert_in_process(folder)


def test_a_full_disk_is_refused_beforehand_with_sizes(
    original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.iterdir())
    needed = (original / FILE_NAME).stat().st_size
    for free, refused in ((needed, False), (needed - 1, True)):
        usage = shutil._ntuple_diskusage(10**9, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if refused:
            with pytest.raises(
                UserError, match=r"the 4-bit file needs 0\.00 GB and the disk has 0\.00 GB free; .*QUANT_PATH"
            ):
                convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, forbidden)
            assert sorted(folder.iterdir()) == before
        else:
            convert(Checkpoint(folder), folder / FILE_NAME, 32, 4, quiet)
            (folder / FILE_NAME).unlink()


def test_a_folder_that_cannot_be_written_is_refused_beforehand(folder: Path) -> None:
    (folder.parent / "file").write_bytes(b"")
    with pytest.raises(UserError, match="QUANT_PATH, .*could not be written"):
        open_or_make(Checkpoint(folder), str(folder.parent / "file" / FILE_NAME), 32, 4, forbidden)
    if os.name != "nt" and os.geteuid() != 0:  # root writes everywhere
        folder.chmod(0o500)
        try:
            with pytest.raises(UserError, match="QUANT_PATH, .*could not be written"):
                open_or_make(Checkpoint(folder), None, 32, 4, forbidden)
        finally:
            folder.chmod(0o700)


def test_quant_path_names_the_file_to_make_and_to_find(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "mine.safetensors"
    made = open_or_make(Checkpoint(folder), str(path), 32, 4, quiet)
    assert made.path == path
    assert not (folder / FILE_NAME).exists()
    assert same(
        *(open_or_make(Checkpoint(folder), str(path), 32, 4, forbidden)[n] for n in [next(iter(made.entries))] * 2)
    )


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("experts.bin", "must end in .safetensors"),
        ("experts", "must end in .safetensors"),
        ("none.pt", "no such file, and new ones are written as .safetensors"),
        ("folder.safetensors", "is a folder; name a file such as"),
    ],
)
def test_quant_path_that_cannot_be_is_refused(folder: Path, tmp_path: Path, name: str, pattern: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=f"QUANT_PATH=.*{name}: {pattern}"):
        open_or_make(Checkpoint(folder), str(tmp_path / name), 32, 4, forbidden)


def test_the_file_beside_the_model_is_found_ours_before_the_legacy(quantized: Path) -> None:
    checkpoint = Checkpoint(quantized)
    (quantized / LEGACY_NAME).write_bytes(b"")
    assert find_path(checkpoint, None) == (quantized / FILE_NAME, True)
    (quantized / FILE_NAME).unlink()
    assert find_path(checkpoint, None) == (quantized / LEGACY_NAME, True)


def test_the_experts_may_be_absent_once_there_is_a_4_bit_file(quantized: Path) -> None:
    tensors = load_file(quantized / SINGLE_NAME)
    save_file(
        {n: t for n, t in tensors.items() if ".experts." not in n}, quantized / SINGLE_NAME, metadata={"format": "pt"}
    )
    open_or_make(Checkpoint(quantized), None, 32, 4, forbidden)
    (quantized / FILE_NAME).unlink()
    with pytest.raises(
        UserError, match=r"no tensors for .*\(4 expert parameters missing in all\), and there is no 4-bit"
    ):
        open_or_make(Checkpoint(quantized), None, 32, 4, forbidden)


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 100), r"not a whole safetensors file \(.*\); delete it"),
    "empty": (lambda p: p.write_bytes(b""), r"not a whole safetensors file \(.*\); delete it"),
    "not safetensors": (damage_header, r"not a whole safetensors file \(.*\); delete it"),
    "of something else": (lambda p: save_file({"x": torch.ones(1)}, p), "a safetensors file but not of 4-bit experts"),
    "the model itself": (
        lambda p: shutil.copy(p.parent / SINGLE_NAME, p),
        "a safetensors file but not of 4-bit experts",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_none_of_ours_is_refused(quantized: Path, what: str) -> None:
    damage, pattern = FILES[what]
    path = quantized / FILE_NAME
    damage(path)
    content = path.read_bytes()
    with pytest.raises(UserError, match=f"{FILE_NAME}: .*{pattern}") as caught:
        open_or_make(Checkpoint(quantized), None, 32, 4, forbidden)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_hidden_layers": 3}, r"has no experts for model\.layers\.2\.mlp\.experts\..*; it is of another model"),
        ({"moe_intermediate_size": 64}, r"has shape \(8, 96, 64\), the model wants \(8, 128, 64\); it is of"),
        ({"num_experts": 4}, r"has shape \(8, 96, 64\), the model wants \(4, 96, 64\)"),
        ({"seed": 1}, "was made from other weights than .* holds now; delete it, and it is made anew"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_the_file_of_another_model_is_refused(
    original: Path, tmp_path: Path, changes: dict[str, Any], pattern: str
) -> None:
    other = write_checkpoint(tmp_path / "other", **{"num_hidden_layers": 2, **changes})
    with pytest.raises(UserError, match=pattern):
        open_or_make(Checkpoint(other), str(original / FILE_NAME), 32, 4, forbidden)


@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (32, 8)])
def test_a_file_made_with_other_settings_is_refused_with_both(original: Path, group_size: int, bits: int) -> None:
    with pytest.raises(UserError, match=f"holds 4 bits in groups of 32, .* QUANT_BITS={bits}, GROUP_SIZE={group_size}"):
        open_or_make(Checkpoint(original), None, group_size, bits, forbidden)


def test_weights_changed_after_the_conversion_are_noticed(quantized: Path) -> None:
    open_or_make(Checkpoint(quantized), None, 32, 4, forbidden)
    tensors = {n: t + 0.01 if "layers.1" in n else t.clone() for n, t in load_file(quantized / SINGLE_NAME).items()}
    save_file(tensors, quantized / SINGLE_NAME, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was made from other weights"):
        open_or_make(Checkpoint(quantized), None, 32, 4, forbidden)


def earlier_tool(weights: torch.Tensor, form: str) -> Any:
    """An entry of the earlier tool: groups of 128 cut from the flattened tensor, weight = q * scale + zero."""
    groups = weights.reshape(-1, 128).float()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).half()
    codes = ((groups - low) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    q = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    zero, shape = low.half(), tuple(weights.shape)
    if form == "tuple":
        return q, scale, zero, shape
    return {"q": q, "s": scale, "z": zero, "shape": shape, "group_size": 128}


@pytest.mark.parametrize("form", ["tuple", "dict", "quantize_4bit"])
def test_legacy_files_are_read_in_all_three_forms(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "model"
    changes = {"num_hidden_layers": 1, "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 16}
    reference = random_model("qwen3_moe", **changes)
    reference.save_pretrained(folder)
    names = [n for n, p in reference.named_parameters() if p.ndim == 3]
    weights = {n: reference.get_parameter(n).data for n in names}
    entries = {n: quantize_4bit(w) if form == "quantize_4bit" else earlier_tool(w, form) for n, w in weights.items()}
    torch.save(entries, folder / LEGACY_NAME)
    store = open_or_make(Checkpoint(folder), None, 128, 4, forbidden)
    assert set(store.entries) == set(names)
    assert store.source is None
    for name, weight in weights.items():
        step = (weight.amax() - weight.amin()) / 15
        assert (dequantize(store[name]) - weight).abs().max() < step
        if form == "tuple":
            q, scale, zero, shape = entries[name]
            codes = torch.stack([q.view(torch.uint8) & 15, q.view(torch.uint8) >> 4], -1).reshape(len(q), 128)
            expected = (codes.float() * scale.float() + zero.float()).half().reshape(shape)
            assert torch.equal(dequantize(store[name], torch.float16), expected)


class Payload:
    """Unpickling this makes a file: what a pickle with code could do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def pickled(path: Path, value: object) -> None:
    with open(path, "wb") as file:
        pickle.dump(value, file)


LEGACY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda p: torch.save({"x": Payload(str(p.with_name("owned")))}, p), "never pickled code"),
    "code, plain": (lambda p: pickled(p, Payload(str(p.with_name("owned")))), "cannot be read|never pickled code"),
    "an object": (lambda p: torch.save({"x": Path()}, p), "never pickled code"),
    "truncated": (
        lambda p: (torch.save({"x": quantize_4bit(torch.ones(2, 8, 256))}, p), os.truncate(p, p.stat().st_size // 2)),
        "cannot be read",
    ),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read|never pickled code"),
    "text": (lambda p: p.write_text("hello"), "cannot be read|never pickled code"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "must be a dict of 4-bit entries by parameter name"),
    "no entries": (lambda p: torch.save({}, p), "must be a dict of 4-bit entries by parameter name"),
    "weights": (lambda p: torch.save({"a.b": torch.ones(2)}, p), r"a\.b: 4-bit entry of type Tensor"),
    "another model": (
        lambda p: torch.save({"a.b": quantize_4bit(torch.ones(2, 8, 256))}, p), "has no experts for model.layers.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEGACY)
def test_legacy_files_that_do_not_serve_are_refused(folder: Path, what: str) -> None:
    write, pattern = LEGACY[what]
    path = folder / LEGACY_NAME
    write(path)
    with pytest.raises(UserError, match=f"{LEGACY_NAME}: .*({pattern})") as caught:
        open_or_make(Checkpoint(folder), None, 128, 4, forbidden)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (folder / "owned").exists()


def test_the_file_is_mapped_not_read(original: Path) -> None:
    """Its pages belong to the system's cache: opening takes no memory of its own, aligned for every type."""
    store = read_store(original / FILE_NAME)
    check_store(store, Checkpoint(original), 32, 4)
    with safe_open(original / FILE_NAME, "pt") as file:
        assert file.metadata()["source"] == store.source
    for entry in store.entries.values():
        assert entry.scale.data_ptr() % 2 == 0
        assert entry.offset.data_ptr() % 2 == 0


def test_content_hash_tells_one_flipped_bit(quantized: Path) -> None:
    before = read_store(quantized / FILE_NAME).content_hash()
    with open(quantized / FILE_NAME, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert read_store(quantized / FILE_NAME).content_hash() != before
