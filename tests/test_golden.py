"""A golden loss curve: twelve steps of a tiny fixed model, whose losses are in golden.json.

Weights and data come from numpy, so that no other random generator decides them, and every weight is an exact multiple
of 2^-12 that bfloat16 holds, so that the checkpoint is the same to the bit everywhere.

Tolerance: 2e-4 of each loss. Between processors, numbers of threads and versions of torch the order of sums differs,
which moves these losses by less than 1e-6 (measured: one or two threads, torch 2.4.1 and 2.13); a weight that a near
tie puts in or out of the active set could move them by some 1e-5. What a fault does is larger, and
`test_the_tolerance_tells_faults` holds that for the smallest that one would want to see.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, random_model, write_tokens
from runs import TINY, events

from usaf.train import main

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 2e-4
SETTINGS = {**TINY, "LR_PEAK": "3e-2", "HEAD_LR": "1.5e-2", "ROUTER_LR": "1e-2", "MICROBATCH": "4",
            "CPU_THREADS": "1", "FRAC": "0.2", "TRAIN_FROM": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the data."""
    root = tmp_path_factory.mktemp("golden")
    model = random_model("qwen3_moe")
    rng = np.random.default_rng(20260101)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                units = np.clip(np.round(rng.standard_normal(tuple(parameter.shape)) * 40), -127, 127)
                parameter.copy_(torch.from_numpy(units / 512.0))
            else:
                parameter.fill_(1.0)
    model.to(torch.bfloat16).save_pretrained(root / "model")
    write_tokens(root / "data.jsonl", samples=80, length=32, seed=3, vocab=VOCAB)
    return root


def losses(folder: Path, tag: str, **changes: str) -> dict[str, list[float]]:
    environ = {
        "MODEL": str(folder / "model"), "DATASET_PATH": str(folder / "data.jsonl"), "OUTPUT_DIR": str(folder / "runs"),
        "RUN_TAG": tag, **SETTINGS, **changes,
    }  # fmt: skip
    assert main([], environ) == 0
    run = folder / "runs" / tag
    curves = {"train": [e["loss"] for e in events(run, "step")]}
    for e in events(run, "eval"):
        curves.setdefault(e["name"], []).append(e["loss"])
    return curves


def largest_difference(curves: dict[str, list[float]], golden: dict[str, list[float]]) -> float:
    """Relative, over all losses of all curves."""
    assert curves.keys() == golden.keys()
    return max(float(np.max(np.abs(np.divide(curves[name], golden[name]) - 1))) for name in golden)


def golden() -> dict[str, list[float]]:
    curves = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    assert isinstance(curves, dict)
    return curves


def test_golden_losses(folder: Path) -> None:
    """After a change that is meant to change losses: write golden.json anew with what this test shows."""
    found = losses(folder, "golden")
    shown = json.dumps({name: [round(loss, 7) for loss in curve] for name, curve in found.items()})
    assert largest_difference(found, golden()) < TOLERANCE, shown


def test_the_curve_falls() -> None:
    for name in ("in_domain", "heldout_data"):
        assert golden()[name][-1] < golden()[name][0] - 0.05


FAULTS = [
    {"LR_PEAK": "2.9e-2"}, {"ROUTER_LR": "0"}, {"RESELECT_EVERY": "0"}, {"FRAC": "0.19"}, {"GRAD_CLIP": "0.1"},
    {"WARMUP": "0.2"}, {"LR_FLOOR": "0.2"}, {"DROP_FRACTION": "0.25"}, {"GROUP_SIZE": "32"}, {"SEED": "1"},
]  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[] if i < 3 else [pytest.mark.slow], id=next(iter(fault)))
        for i, fault in enumerate(FAULTS)
    ],
)
def test_the_tolerance_tells_faults(folder: Path, fault: dict[str, str]) -> None:
    """The first three always: a wrong learning rate, routers that do not train, no reselection."""
    changes = {**fault, "QUANT_PATH": str(folder / "q32.safetensors")} if "GROUP_SIZE" in fault else fault
    difference = largest_difference(losses(folder, f"fault-{next(iter(fault))}", **changes), golden())
    assert difference > 3 * TOLERANCE, difference
