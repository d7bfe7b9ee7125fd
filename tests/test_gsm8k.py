"""scripts/gsm8k.sh on a tiny model in the place of the real one: every step runs and hands over to the next."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from smollm2 import tiny_llama, tiny_moe
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "scripts" / "gsm8k.sh"
DATA = REPOSITORY / "data" / "gsm8k"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here; on Windows, Git brings one")


def gsm8k(work: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    given = {"WORK": work, "PYTHON": sys.executable, "OUTPUT_DIR": work / "runs", "RUN_TAG": "a", "USE_CUDA": 0,
             **settings}  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, encoding="utf-8", check=False)


def test_the_data_are_gsm8k_with_its_licence() -> None:
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7473
    assert all(set(json.loads(line)) == {"question", "answer"} for line in lines)
    assert "MIT License" in (DATA / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.slow
def test_from_model_to_answers(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    tiny_moe(tmp_path / "moe")
    done = gsm8k(tmp_path, STEPS=3, TRAIN_FROM=1, IMPORTANCE_SAMPLES=4, EVAL_SAMPLES=4, QUESTIONS=2, MAX_NEW_TOKENS=4)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "a"
    names = [found["name"] for found in json.loads((run / "summary.json").read_text(encoding="utf-8"))["evaluations"]]
    assert names == ["in_domain", "heldout_gsm8k_heldout"]
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert bool(exported(torch.tensor([[1, 4093, 198]])).logits.isfinite().all())

    train, heldout = ((tmp_path / f"gsm8k_{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "heldout"))
    assert train + heldout == (DATA / "train.jsonl").read_text(encoding="utf-8")
    assert len(heldout.splitlines()) == 473
    for line in heldout.splitlines()[:2]:  # asked, and answered before and after
        assert " ".join(json.loads(line)["question"].split())[:40] in " ".join(done.stdout.split())
    assert "answers.json" in {file.name for file in run.iterdir()}


@pytest.mark.slow
def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    done = gsm8k(tmp_path, HELDOUT=7473)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: HELDOUT=7473: must be from 1 to 7472"
    assert not (tmp_path / "moe").exists()
