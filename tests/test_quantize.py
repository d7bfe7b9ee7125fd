"""`python -m usaf.quantize`: the file, the figures, and one line and nothing written for every bad argument."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import write_checkpoint
from source_checkpoints import to_mxfp4

from usaf import expert_store
from usaf.checkpoint import Checkpoint
from usaf.expert_store import FILE_NAME, open_or_make
from usaf.quantize import main

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS = 2 * 8 * (96 * 64 + 64 * 48)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", num_hidden_layers=2)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_makes_the_file_beside_the_model_and_reports(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    assert main([str(folder), "--group-size", "32", "--json", str(tmp_path / "out" / "q.json")]) == 0
    assert files(tmp_path) - before == {f"model/{FILE_NAME}", "out", "out/q.json"}
    size = (folder / FILE_NAME).stat().st_size
    figures = json.loads((tmp_path / "out" / "q.json").read_text(encoding="utf-8"))
    assert set(figures) == {
        "path", "file_bytes", "expert_parameters", "bits_per_weight", "bits_per_code", "group_size_weights",
        "seconds_total", "peak_memory_bytes", "peak_resident_bytes", "expert_parameters_as_stored",
    }  # fmt: skip
    assert figures["path"] == str(folder / FILE_NAME)
    assert figures["file_bytes"] == size
    assert figures["expert_parameters"] == WEIGHTS
    assert figures["bits_per_weight"] == pytest.approx(8 * size / WEIGHTS)
    assert figures["bits_per_code"] == 4
    assert figures["expert_parameters_as_stored"] == 0
    assert figures["group_size_weights"] == 32
    assert 1e7 < figures["peak_memory_bytes"] < 1e11
    out, err = capsys.readouterr()
    assert f"{WEIGHTS:,} expert weights" in out
    assert "32/32" in err or "32.0/32.0" in err  # the bar: two projections of eight experts in two layers
    store = open_or_make(Checkpoint(folder), None, 32, 4, lambda *_: pytest.fail("made again"))
    assert {(entry.group_size, entry.bits) for entry in store.entries.values()} == {(32, 4)}


def test_experts_in_four_bits_are_said_to_be_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = to_mxfp4(write_checkpoint(tmp_path / "model", "gpt_oss", num_hidden_layers=2, intermediate_size=64))
    assert main([str(folder), "--json", str(tmp_path / "q.json")]) == 0
    assert "in 4 bits are used as they are (mxfp4 in groups of 32)" in capsys.readouterr().out
    figures = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert figures["expert_parameters_as_stored"] == figures["expert_parameters"] == 2 * 4 * (128 * 64 + 64 * 64)


def test_output_and_bits(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "e.safetensors"
    assert main([str(folder), "--bits", "8", "--output", str(path)]) == 0
    assert not (folder / FILE_NAME).exists()
    assert open_or_make(Checkpoint(folder), str(path), 128, 8, lambda *_: pytest.fail("made again")).path == path


BAD: dict[str, tuple[list[str], str]] = {
    "no model": ([], r"python -m usaf\.quantize: the following arguments are required: model; see --help"),
    "unknown flag": (["{model}", "--gruop-size", "32"], "unrecognized arguments: --gruop-size 32"),
    "abbreviated flag": (["{model}", "--group", "32"], "unrecognized arguments: --group 32"),
    "not a number": (["{model}", "--group-size", "x"], "argument --group-size: invalid int value: 'x'"),
    "odd group": (
        ["{model}", "--group-size", "33"],
        "--group-size 33: must be even, from 8 to 1024; 128 is the default",
    ),
    "small group": (["{model}", "--group-size", "6"], "--group-size 6: must be even, from 8 to 1024"),
    "bits": (["{model}", "--bits", "3"], "argument --bits: invalid choice: 3"),
    "no such model": (["{tmp}/nothing"], "MODEL=.*nothing: no such folder"),
    "not a model": (["{tmp}"], "has no config.json"),
    "output of another kind": (["{model}", "--output", "{tmp}/x.bin"], r"--output=.*x\.bin: must end in \.safetensors"),
    "legacy output": (["{model}", "--output", "{tmp}/x.pt"], r"--output=.*x\.pt: no such file, and new ones"),
    "output is a folder": (
        ["{model}", "--output", "{tmp}/d.safetensors"],
        "--output=.*: is a folder; name a file such as",
    ),
    "output below a file": (["{model}", "--output", "{tmp}/file/x.safetensors"], "--output, .*could not be written"),
    "output is there": (
        ["{model}", "--output", "{tmp}/there.safetensors"],
        "is there already; delete it, or give another",
    ),
    "json is a folder": (
        ["{model}", "--json", "{tmp}/d.safetensors"],
        "--json .*: is a folder; give the name of a file",
    ),
    "json below a file": (["{model}", "--json", "{tmp}/file/q.json"], "--json .*: could not be written"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_one_line_before_any_work(
    folder: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "there.safetensors").write_bytes(b"")
    monkeypatch.setattr(expert_store, "quantize", lambda *_: pytest.fail("worked before refusing"))
    before = files(tmp_path)
    arguments, pattern = BAD[what]
    assert main([argument.format(model=folder, tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", [FILE_NAME, "experts_q4.pt"])
def test_a_file_beside_the_model_is_not_made_again(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_bytes(b"x")
    assert main([str(folder)]) == 2
    assert f"{name}: is there already; delete it, or give another --output" in capsys.readouterr().err
    assert (folder / name).read_bytes() == b"x"


@pytest.mark.slow
def test_as_a_command_of_its_own(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "usaf.quantize", str(folder), "--bits", "8"],
        cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(folder / FILE_NAME))
    again = subprocess.run(
        [sys.executable, "-m", "usaf.quantize", str(folder)],
        cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert again.returncode == 2
    assert again.stdout == ""
    assert again.stderr.count("\n") == 1
