"""Runs of the main job on a tiny model: settings, what a run leaves behind, and processes that stop in the middle."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import write_checkpoint, write_tokens
from safetensors import safe_open

from usaf.expert_store import FILE_NAME
from usaf.memory import PeakMemory, private_bytes, resident_bytes
from usaf.run import RunFolder
from usaf.train import main

REPOSITORY = Path(__file__).resolve().parent.parent
# Steps 4 and 8 (of 12) end a capture window of two steps each; the last reselection may come at 0.7 * 12 = 8.
TINY = {
    "STEPS": "12", "TRAIN_FROM": "2", "FRAC": "0.05", "LR_PEAK": "5e-3", "ROUTER_LR": "1e-3", "RESELECT_EVERY": "4",
    "CAPTURE_STEPS": "2", "RESELECT_UNTIL": "0.7", "IMPORTANCE_SAMPLES": "8", "EVAL_SAMPLES": "4", "EVAL_EVERY": "4",
    "SAVE_EVERY": "3", "PREFIX_CHUNK_TOKENS": "100", "USE_CUDA": "0", "PROJECTIONS": "all",
}  # fmt: skip


class World:
    """A folder with a model, data and runs: `environ(...)` are the settings of a run in it, by its tag."""

    def __init__(self, root: Path, family: str = "qwen3_moe", **config: Any) -> None:
        self.root, self.model, self.runs = root, root / "model", root / "runs"
        write_checkpoint(self.model, family, **config)
        self.data = write_tokens(root / "data.jsonl")
        self.other = write_tokens(root / "other.jsonl", samples=6, seed=5)

    def environ(self, tag: str | None, **changes: object) -> dict[str, str]:
        """Settings for `main`; a change to None leaves a setting out."""
        given = {
            "MODEL": self.model, "DATASET_PATH": self.data, "HELDOUT_PATH": self.other, "OUTPUT_DIR": self.runs,
            "RUN_TAG": tag, **TINY, **changes,
        }  # fmt: skip
        return {name: str(value) for name, value in given.items() if value is not None}

    def train(self, tag: str | None, **changes: object) -> int:
        return main([], self.environ(tag, **changes))

    def finished(self, tag: str, **changes: object) -> Path:
        """The folder of a run that is carried out now unless it was before."""
        folder = self.runs / tag
        if not (folder / "summary.json").is_file():
            assert self.train(tag, **changes) == 0
        return folder


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all or those of some kinds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if not kinds or event["event"] in kinds]


def read_json(path: Path) -> Any:
    """Strict JSON: nan and inf, which Python would write and read, are refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def raw_tensors(folder: Path) -> dict[str, tuple[str, str, bytes]]:
    """Tensor -> (shard, type, bytes), read by hand."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == FILE_NAME:
            continue
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = path.name, entry["dtype"], data[start + begin : start + end]
    return found


def delta_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's delta; see `tensors_of_delta`."""
    return tensors_of_delta(folder / "delta.safetensors")


def tensors_of_delta(path: Path) -> dict[str, torch.Tensor]:
    """Read without the code under test, and with `.indices` in place of `.skips`: how many weights lie before each
    trained one, in bytes of which 255 is followed by more."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith(".skips")]:
        indices, here = [], -1
        for skipped in tensors.pop(name).tolist():
            here += skipped
            if skipped < 255:
                here += 1
                indices.append(here)
        tensors[name.replace(".skips", ".indices")] = torch.tensor(indices, dtype=torch.int32)
    return tensors


def same_delta(a: Path, b: Path) -> bool:
    one, other = delta_tensors(a), delta_tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: every step, evaluation and reselection, without times."""
    keys = {
        "step": ("step", "loss", "learning_rate", "head_learning_rate", "router_learning_rate", "grad_norm", "tokens"),
        "eval": ("step", "name", "loss", "perplexity", "tokens", "routing_entropy", "starved_experts"),
        "reselect": ("step", "active", "dropped", "grown", "turnover"),
        "importance": ("sequences", "active", "half_overlap"),
    }
    return [(e["event"], *(e[key] for key in keys[e["event"]])) for e in events(folder, *keys)]


def lasting(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary that must not depend on interruptions, nor on where the run lies."""
    measured = ("second", "bytes", "path")
    return {name: value for name, value in summary.items() if not any(word in name for word in measured)}


def on_event(monkeypatch: Any, matches: Callable[[str, dict[str, Any]], bool], then: Callable[[], None]) -> None:
    """Do something right after a matching line was logged, once."""
    log, done = RunFolder.log, []

    def logged(self: RunFolder, event: str, **values: Any) -> None:
        log(self, event, **values)
        if not done and matches(event, values):
            done.append(event)
            then()

    monkeypatch.setattr(RunFolder, "log", logged)


def signal_at_step(monkeypatch: Any, number: signal.Signals, step: int) -> None:
    """A signal to this process while it is at work on what follows step `step`."""
    on_event(
        monkeypatch, lambda event, v: event == "step" and v["step"] == step, lambda: signal.raise_signal(number)
    )  # fmt: skip


def peaks_of(work: Callable[[], object]) -> tuple[int, int]:
    """Private and resident bytes that `work` needs beyond those that the process has already."""
    gc.collect()
    private, resident, memory = private_bytes(), resident_bytes(), PeakMemory()
    work()
    memory.stop()
    return memory.private - private, memory.resident - resident


# ---- processes that are killed --------------------------------------------------------------------------------------

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def processes() -> Any:
    """Processes that start with torch and transformers imported, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["transformers.conversion_mapping", "transformers.models.qwen3_moe.modeling_qwen3_moe", "usaf.job"]
    )
    return context


def start(
    environ: Mapping[str, str], log: Path, before: Callable[..., None] | None = None, arguments: Sequence[object] = ()
) -> Any:
    """A process that runs the main job; stdout and stderr go to `log`. before: called in it first."""
    process = processes().Process(target=_child, args=(dict(environ), log, before, tuple(arguments)))
    process.start()
    return process


def _child(
    environ: dict[str, str], log: Path, before: Callable[..., None] | None, arguments: tuple[object, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        if before is not None:
            before(*arguments)
        status = main([], environ)
        file.flush()
        os._exit(status)


def die_at(folder: str, count: int) -> None:
    """Kill this process, without any warning, just before the `count`-th operation on a file in `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    sys.addaudithook(hook)


def wait(process: Any, seconds: float = 120) -> int:
    """The exit status (minus the signal's number where one killed it)."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the run did not end")
    return int(process.exitcode)


def copy_run(source: Path, target: Path) -> Path:
    """A run's folder under another name; settings are by folder, so the copy can be resumed."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target
