"""scripts/bench_model.py: work in a process of its own, and what counts of the steps that are timed.

No torch at the top: the processes that these tests start import this module.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_model
from bench_model import further_settings, measured_steps, run_apart

from usaf.errors import RunError, UserError


def test_warm_up_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 20.0, 25.0, 30.0, 33.0])
    monkeypatch.setattr(bench_model.time, "perf_counter", lambda: next(clock))
    losses = iter([4.0, 3.0, 2.0, 1.0])
    found = measured_steps(lambda: next(losses), 1, 3)
    assert found["warmup_seconds_each"] == [9.0]
    assert found["step_seconds_each"] == [1.0, 5.0, 3.0]
    assert found["step_seconds"] == 3.0
    assert found["losses"] == [4.0, 3.0, 2.0, 1.0]
    assert found["steps_peak_resident_bytes"] >= found["steps_peak_private_bytes"] > 0


def hold(size_bytes: int) -> dict[str, Any]:
    held = bytearray(size_bytes)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(0.2)
    return {"held_bytes": len(held)}


def fail(what: str) -> dict[str, Any]:
    if what == "user":
        raise UserError("SETTING=1: must be 2")
    if what == "killed":
        os.abort()
    raise ValueError("nothing of that kind")


def test_a_process_of_its_own_gives_its_peak_or_its_error(tmp_path: Path) -> None:
    small, large = (run_apart(hold, size << 20, log=tmp_path / "log")["peak_private_bytes"] for size in (1, 200))
    assert 180 << 20 < large - small < 260 << 20
    with pytest.raises(UserError, match="SETTING=1: must be 2"):
        run_apart(fail, "user", log=tmp_path / "log")
    with pytest.raises(RunError, match="ValueError: nothing of that kind"):
        run_apart(fail, "other", log=tmp_path / "log")
    with pytest.raises(RunError, match="killed by signal"):
        run_apart(fail, "killed", log=tmp_path / "killed.log")


def test_further_settings_are_names_and_values() -> None:
    assert further_settings(["FRAC=0.01", "USE_RESIDENT=0"]) == {"FRAC": "0.01", "USE_RESIDENT": "0"}


def test_the_benchmarks_answer_for_help_without_torch() -> None:
    heavy = ("torch", "transformers", "peft")
    code = f"import bench_peers, bench_scaling, sys; print([m for m in {heavy} if m in sys.modules])"
    scripts = Path(bench_model.__file__).parent
    found = subprocess.run([sys.executable, "-c", code], cwd=scripts, text=True, capture_output=True, check=True)
    assert found.stdout.strip() == "[]"
