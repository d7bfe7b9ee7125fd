"""`python -m usaf.evaluate`: one line for every bad argument, before any work. Its figures: see test_train_command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from usaf import delta
from usaf.evaluate import main

BAD: dict[str, tuple[list[str], str]] = {
    "no delta": ([], r"python -m usaf\.evaluate: the following arguments are required: --delta; see --help"),
    "unknown flag": (["--delta", "{tmp}/x", "--modle", "y"], "unrecognized arguments: --modle y"),
    "abbreviated flag": (["--delta", "{tmp}/x", "--held", "y"], "unrecognized arguments: --held y"),
    "a flag without its value": (["--delta"], "argument --delta: expected one argument"),
    "no such delta": (["--delta", "{tmp}/none.safetensors"], r"none\.safetensors: no such file"),
    "a folder for a delta": (["--delta", "{tmp}/folder"], "--delta .*folder: no such file"),
    "a delta that is none": (["--delta", "{tmp}/tensors.safetensors"], "is not a delta of this program"),
    "a truncated delta": (["--delta", "{tmp}/half.safetensors"], "a whole safetensors file"),
    "json is a folder": (["--delta", "{tmp}/x", "--json", "{tmp}/folder"], "--json .*folder: is a folder"),
    "json below a file": (
        ["--delta", "{tmp}/x", "--json", "{tmp}/half.safetensors/e.json"],
        "--json .*could not be written",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_one_line(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "tensors.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "tensors.safetensors").read_bytes()[:-2])
    before = sorted(tmp_path.rglob("*"))
    arguments, pattern = BAD[what]
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_json_is_refused_before_the_delta_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "load_delta", lambda _: pytest.fail("worked before refusing"))
    assert main(["--delta", str(tmp_path / "x"), "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
