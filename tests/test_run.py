"""A run's folder: checkpoints whole or absent whatever fails, one process at a time, metrics that are always JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import usaf.run
from usaf.errors import UserError
from usaf.run import (
    RunFolder,
    SavedState,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    random_states,
    read_settings,
    restore_random_states,
)

ROOT = Path(__file__).parent.parent


def state(value: float = 1.0) -> SavedState:
    tensors = {
        "active": torch.tensor([1, 5, 2**40]), "delta": torch.tensor([value, -0.0, float("inf")]),
        "rng": torch.arange(7, dtype=torch.uint8), "half": torch.tensor([[value]], dtype=torch.bfloat16),
        "generation": torch.zeros(3, dtype=torch.int32), "empty": torch.zeros(0, 4), "scalar": torch.tensor(value),
        "wide": torch.tensor([value], dtype=torch.float64),
    }  # fmt: skip
    return SavedState(tensors, {"step": 3, "losses": [0.1 + 0.2, 1e-300], "name": "Gruß", "half_overlap": None})


def assert_equal(a: SavedState, b: SavedState) -> None:
    assert a.about == b.about
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        assert torch.equal(tensor, b.tensors[name]), name


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "tag")
    yield folder
    folder.close()


def names(run: RunFolder) -> list[str]:
    return sorted(p.name for p in run.checkpoints.iterdir())


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_to_the_bit(run: RunFolder) -> None:
    path = run.save(3, state(), keep=2)
    assert path == run.folder / "checkpoints" / "step-000003"
    assert_equal(load_checkpoint(path), state())


def test_the_newest_are_kept(run: RunFolder) -> None:
    for step in (30, 999_999, 1_000_000, 1_000_030):
        run.save(step, state(step), keep=2)
    assert names(run) == ["step-1000000", "step-1000030"]
    assert [p.name for p in list_checkpoints(run.folder)] == names(run)
    run.save(1_000_060, state(), keep=1)
    assert names(run) == ["step-1000060"]


def test_checkpoints_are_listed_by_number(run: RunFolder) -> None:
    for name in ("step-1000000", "step-000060", "step-999999", ".partial-000090", "step-12", "step-000070x", "other"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-000080").write_text("a file", encoding="utf-8")
    assert [p.name for p in list_checkpoints(run.folder)] == ["step-000060", "step-999999", "step-1000000"]
    assert list_checkpoints(run.folder / "nothing") == []


def test_a_step_saved_twice_stays_whole(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run may save a step again. At no moment may the only checkpoint be gone."""
    run.save(3, state(), keep=1)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for call in ((os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(*call, killed)
    run.save(3, state(), keep=1)
    assert_equal(load_checkpoint(list_checkpoints(run.folder)[-1]), state())


class Killed(BaseException):
    """Stands for SIGKILL: no `except` of the program knows it."""


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("module", "call"), [(os, "fsync"), (os, "replace"), (usaf.run.TensorFileWriter, "write"),
                                              (json, "dump")])  # fmt: skip
def test_a_full_disk_leaves_the_earlier_checkpoints(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, module: Any, call: str
) -> None:
    run.save(30, state(30.0), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, call, full_disk)
        with pytest.raises(UserError, match=r"step-000060: could not be saved \(No space left.*whole: free some space"):
            run.save(60, state(60.0), keep=1)
    assert names(run) == ["step-000030"]
    assert_equal(load_checkpoint(run.checkpoints / "step-000030"), state(30.0))
    run.save(60, state(60.0), keep=1)
    assert names(run) == ["step-000060"]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rmtree"])
@pytest.mark.parametrize("when", range(4))
def test_killed_anywhere_in_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, when: int
) -> None:  # fmt: skip
    """After which the next process opens the folder again."""
    run = RunFolder(tmp_path / "tag")
    run.save(30, state(30.0), keep=1)
    owner: Any = {"mkdir": Path, "fsync": os, "replace": os, "rmtree": shutil}[call]
    true, calls = getattr(owner, call), iter(range(99))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= when:  # at the first such call and, as no handler of a killed process runs, at all others
            if call == "rmtree":  # in the middle of it
                (args[0] / "state.json").unlink(missing_ok=True)
            raise Killed
        return true(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, killed)
        try:
            run.save(60, state(60.0), keep=1)
            finished = True
        except Killed:
            finished = False
    found = list_checkpoints(run.folder)
    assert found, "no checkpoint is left"
    for path in found:
        assert_equal(load_checkpoint(path), state(float(path.name[5:])))
    if finished:
        assert found[-1].name == "step-000060"
    run.close()
    again = RunFolder(tmp_path / "tag")
    assert names(again) == [path.name for path in found], "what was left half-written must be gone"
    again.save(90, state(90.0), keep=1)
    assert names(again) == ["step-000090"]
    again.close()


def test_a_damaged_checkpoint_is_refused(run: RunFolder) -> None:
    path = run.save(30, state(), keep=1)
    tensors, about = path / "state.safetensors", path / "state.json"
    whole = tensors.read_bytes(), about.read_bytes()

    def refused(file: Path, rule: str) -> None:
        with pytest.raises(UserError, match=rf"{file.name}: {rule}.*; delete .*step-000030, and RESUME goes on"):
            load_checkpoint(path)

    for length in (0, 10, len(whole[0]) - 1):
        tensors.write_bytes(whole[0][:length])
        refused(tensors, r"not a whole safetensors file \(")
    tensors.unlink()
    refused(tensors, "this file of the checkpoint is missing")
    tensors.write_bytes(whole[0])
    for text in (b"", b"{", whole[1][: len(whole[1]) // 2], b"\xff\xfe"):
        about.write_bytes(text)
        refused(about, r"is damaged \(")
    about.unlink()
    refused(about, r"is damaged \(")
    about.write_bytes(whole[1])
    assert_equal(load_checkpoint(path), state())


def test_a_loaded_checkpoint_does_not_hold_its_files(run: RunFolder) -> None:
    path = run.save(30, state(), keep=1)
    loaded = load_checkpoint(path)
    file = path / "state.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_equal(loaded, state())


# ---- the lock -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from usaf.run import RunFolder
run = RunFolder(Path(sys.argv[1]))
(run.checkpoints / ".partial-000030").mkdir()
print("locked", flush=True)
time.sleep(600)
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "tag"
    first = RunFolder(folder)
    with pytest.raises(UserError, match=r"tag: another run is using this folder"):
        RunFolder(folder)
    first.close()
    RunFolder(folder).close()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "tag"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"locked"
        with pytest.raises(UserError, match="another run is using this folder"):
            RunFolder(folder)
        assert (folder / "checkpoints" / ".partial-000030").is_dir(), "the other process's work must stay"
    finally:
        holder.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
    run = RunFolder(folder)
    assert names(run) == []
    run.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "tag"):
        with pytest.raises(UserError, match="^OUTPUT_DIR: .*file.* cannot be made or written"):
            RunFolder(folder)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="rights do not bind")
def test_a_folder_without_rights_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="^OUTPUT_DIR: .*Permission denied"):
        RunFolder(tmp_path / "tag")
    tmp_path.chmod(0o700)


# ---- metrics and summary --------------------------------------------------------------------------------------------


def reject(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_metrics_are_json_lines(run: RunFolder) -> None:
    nan = float("nan")
    run.log("step", step=1, loss=nan, grad_norm=float("inf"), tokens=5, name="Gruß\nline")
    run.log("eval", step=2, entropy={"layer": [nan, 1.5, (-float("inf"),)]}, none=None, flag=True)
    lines = run.metrics_path.read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    first, second = (json.loads(line, parse_constant=reject) for line in lines)
    assert first.pop("time") > 0
    assert first == {"event": "step", "step": 1, "loss": None, "grad_norm": None, "tokens": 5, "name": "Gruß\nline"}
    assert second["entropy"] == {"layer": [None, 1.5, [None]]}
    assert second["flag"] is True


def test_metrics_go_back_to_what_a_checkpoint_saw(run: RunFolder) -> None:
    assert run.metrics_bytes() == 0
    run.truncate_metrics(0)  # nothing there yet
    run.log("step", step=1)
    kept, size = run.metrics_path.read_bytes(), run.metrics_bytes()
    assert size == len(kept)
    run.log("step", step=2)
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"event": "st')  # torn by a power loss
    run.truncate_metrics(size)
    assert run.metrics_path.read_bytes() == kept
    run.truncate_metrics(size + 100)
    assert run.metrics_path.read_bytes() == kept
    run.log("step", step=2)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text(encoding="utf-8").splitlines()] == [1, 2]


def test_a_log_that_cannot_be_written_is_one_line(run: RunFolder) -> None:
    run.metrics_path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: could not be saved"):
        run.log("step", step=1)


def test_summary_is_json_and_replaced_whole(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.folder / "summary.json"
    run.write_summary({"importance_half_overlap": float("nan"), "evaluations": [{"perplexity_after": float("inf")}]})
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=reject)
    assert found == {"importance_half_overlap": None, "evaluations": [{"perplexity_after": None}]}
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"summary\.json: could not be written"):
        run.write_summary({})
    assert json.loads(path.read_text(encoding="utf-8")) == found


# ---- resuming -------------------------------------------------------------------------------------------------------


def make_run(output_dir: Path, tag: str, written: int, finished: bool = False) -> Path:
    folder = output_dir / tag
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"settings": {}}', encoding="utf-8")
    os.utime(folder / "settings.json", (written, written))
    if finished:
        (folder / "summary.json").write_text("{}", encoding="utf-8")
    return folder


def test_find_resumable(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    assert find_resumable(output, None) is None
    assert find_resumable(output, "a") is None
    make_run(output, "finished", 400, finished=True)
    (output / "cache").mkdir()
    (output / "no-settings").mkdir()
    assert find_resumable(output, None) is None
    newest = make_run(output, "b-newest", 300)
    older = make_run(output, "c-older", 200)
    make_run(output, "a-oldest", 100)
    assert find_resumable(output, None) == newest
    assert find_resumable(output, "c-older") == older
    assert find_resumable(output, "finished") == output / "finished"
    assert find_resumable(output, "no-settings") is None
    assert find_resumable(output, "other") is None


def test_settings_come_back_or_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "tag", 100)
    assert read_settings(folder) == {"settings": {}}
    path = folder / "settings.json"
    for text, rule in (("{", "is not JSON"), ("[]", "has no settings"), ('{"settings": 3}', "has no settings")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"settings\.json: {rule}"):
            read_settings(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"settings\.json: cannot be read \(No such file.*give the folder of a run"):
        read_settings(folder)


def test_random_states() -> None:
    torch.manual_seed(3)
    saved = random_states()
    expected = torch.rand(4)
    torch.manual_seed(4)
    restore_random_states(saved)
    assert torch.equal(torch.rand(4), expected)
