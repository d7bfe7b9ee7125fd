"""MEMORY_LIMIT in real runs: kept, stored, taken over by resume, refused in a line; and no bit of a result moved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import write_checkpoint, write_tokens
from runs import REPOSITORY, World, curve, events, read_json, same_delta

from usaf import memory_limit, workspace
from usaf.budget import Knobs, Work, plan_for_limit
from usaf.model_shape import ModelShape
from usaf.run import read_settings
from usaf.session import Session


def chosen(folder: Path) -> dict[str, Any]:
    return {name: read_settings(folder)["settings"][name] for name in ("PREFIX_CHUNK_TOKENS", "HEAD_CHUNK_TOKENS")}


def test_a_generous_limit_changes_nothing_but_says_so(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    free, limited = world.finished("free"), world.finished("generous", MEMORY_LIMIT="100GB")
    assert "of MEMORY_LIMIT=100GB planned, in " in capsys.readouterr().out
    assert same_delta(free, limited)
    assert chosen(free) == chosen(limited)


def test_mapped_buffers_give_the_same_bits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in mapped files; a process that resumes inside a capture window included."""
    monkeypatch.setattr(workspace, "SMALLEST_BYTES", 1)
    used: list[str] = []

    def mapped(self: Session, what: str) -> workspace.Workspace:
        used.append(what)
        return workspace.Workspace(self.settings.values and world.root / "mapped")

    free = world.finished("free-from-1", TRAIN_FROM=1)  # three layers: the middle one writes over a gradient
    monkeypatch.setattr(Session, "workspace", mapped)
    limited = world.finished("mapped", TRAIN_FROM=1)
    assert {"captured", "importance", "stretch"} <= set(used)
    assert same_delta(free, limited)
    assert curve(free) == curve(limited)


def lowered(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A plan that lowers what it is told, whatever the limit."""

    def plan(shape: ModelShape, work: Work, baseline: int, limit: str, knobs: Knobs) -> Any:
        for name in changes:
            if not getattr(knobs, name.removesuffix("_tokens"), True):
                return plan_for_limit(shape, work, baseline, "100GB", knobs)
        import dataclasses

        return plan_for_limit(shape, dataclasses.replace(work, **changes), baseline, "100GB", knobs)

    monkeypatch.setattr(memory_limit, "plan_for_limit", plan)


def test_what_is_chosen_is_stored_and_taken_over_by_resume_and_evaluation(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lowered(monkeypatch, head_chunk_tokens=7)
    whole = world.finished("chosen", MEMORY_LIMIT="8GB")
    assert chosen(whole)["HEAD_CHUNK_TOKENS"] == {"value": 7, "source": "memory limit"}
    assert "settled: HEAD_CHUNK_TOKENS = 7 (memory limit)" in capsys.readouterr().out
    # As if interrupted after step 6: with the limit lifted and another plan at work, the same chunks and bits.
    again = world.runs / "again"
    import shutil

    shutil.copytree(whole, again)
    for name in ("summary.json", "delta.safetensors"):
        (again / name).unlink()
    shutil.rmtree(sorted((again / "checkpoints").iterdir())[-1])
    lowered(monkeypatch, head_chunk_tokens=5)
    assert world.train(None, RESUME=again, MEMORY_LIMIT="100GB") == 0
    assert chosen(again)["HEAD_CHUNK_TOKENS"] == {"value": 7, "source": "memory limit"}
    assert same_delta(whole, again)
    from usaf.evaluate import main as evaluate

    monkeypatch.setattr(memory_limit, "plan_for_limit", None)  # an evaluation plans nothing
    path = world.root / "evaluated.json"
    assert evaluate(["--delta", str(whole / "delta.safetensors"), "--json", str(path)]) == 0
    last = {e["name"]: e["loss"] for e in events(whole, "eval")}
    assert {e["name"]: e["loss"] for e in read_json(path)["evaluations"]} == last


def test_what_the_user_set_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered(monkeypatch, head_chunk_tokens=7)
    folder = world.finished("explicit", MEMORY_LIMIT="8GB", HEAD_CHUNK_TOKENS="64", STEPS="1")
    assert chosen(folder)["HEAD_CHUNK_TOKENS"] == {"value": 64, "source": "environment"}


def test_a_limit_too_low_is_refused_in_a_line_and_leaves_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.train("refused", MEMORY_LIMIT="200MB") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: MEMORY_LIMIT=200MB: the least that would do is ")
    assert "allow that much, or" in error
    assert not (world.runs / "refused").exists()


def test_a_resumed_run_is_refused_where_its_chunks_no_longer_do(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.finished("free")
    assert world.train(None, RESUME=folder, MEMORY_LIMIT="200MB") == 2
    assert "MEMORY_LIMIT=200MB" in capsys.readouterr().err


def test_resident_copies_need_room_within_the_limit(world: World) -> None:
    from usaf.session import decide_resident

    class Bank:
        numel = 1000

        class base:
            @staticmethod
            def resident_dtype() -> Any:
                import torch

                return torch.float16

    class Backend:
        name = "cpu"

        class device:
            type = "cpu"

    keeps, reason = decide_resident([Bank()] * 2, "auto", Backend(), room_bytes=3999)  # type: ignore[arg-type, list-item]
    assert not keeps
    assert "MEMORY_LIMIT leaves" in reason
    assert decide_resident([Bank()], "1", Backend(), room_bytes=0)[0]  # type: ignore[arg-type, list-item]


# ---- under a real wall ----------------------------------------------------------------------------------------------

CHILD = """
import json, resource, sys
limit, environ = int(sys.argv[1]), json.loads(sys.argv[2])
from usaf.train import main
import usaf.job, numpy
if limit:  # the system refuses private writable memory beyond it; mapped files are free
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main([], environ))
"""
MIDDLE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "moe_intermediate_size": 128, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 4000,
    "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model and data whose phases take several hundred MB each."""
    root = tmp_path_factory.mktemp("middle")
    world = World(root)
    write_checkpoint(root / "middle", **MIDDLE)
    world.model = root / "middle"
    write_tokens(world.data, samples=120, length=512, vocab=4000)
    write_tokens(world.other, samples=32, length=512, seed=5, vocab=4000)
    return world


def run_child(world: World, tag: str, wall: int, **changes: object) -> subprocess.CompletedProcess[str]:
    environ = world.environ(
        tag, STEPS=6, RESELECT_EVERY=4, CAPTURE_STEPS=2, RESELECT_UNTIL=0.9, EVAL_EVERY=0, IMPORTANCE_SAMPLES=64,
        PREFIX_CHUNK_TOKENS=None, USE_RESIDENT=0, FRAC=0.005, **changes,
    )  # fmt: skip
    command = [sys.executable, "-c", CHILD, str(wall), json.dumps(environ)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=1200, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory there")
def test_the_limit_is_kept_under_a_real_wall(middle: World) -> None:
    """Private memory sampled every 50 ms, and a wall that the system itself holds, at the limit and what threads'
    stacks and libraries reserve without using."""
    done = run_child(middle, "wide", 0, MEMORY_LIMIT="8GB")
    assert done.returncode == 0, done.stderr[-2000:]
    wide = read_json(middle.runs / "wide" / "summary.json")["peak_memory_bytes"]
    planned = float(done.stdout.split("memory: at most ")[1].split(" ")[0]) * 1e9
    assert wide < planned < 1.3 * wide
    refused = run_child(middle, "least", 0, MEMORY_LIMIT="100MB")
    least = refused.stderr.split("least that would do is ")[1].split(" ")[0]
    limit = int(float(least.removesuffix("GB")) * 1e9) + 20_000_000
    assert limit < 0.8 * wide
    done = run_child(middle, "tight", limit + (256 << 20), MEMORY_LIMIT=f"{limit // 1000}KB")
    assert done.returncode == 0, done.stderr[-2000:]
    tight = middle.runs / "tight"
    assert read_json(tight / "summary.json")["peak_memory_bytes"] < limit
    assert chosen(tight)["PREFIX_CHUNK_TOKENS"]["source"] == "memory limit"
