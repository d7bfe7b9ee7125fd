"""What the benchmarks run on: a random Qwen3-MoE of a chosen size with token data, USAF's session on it, and processes.

Everything that is measured runs in a process of its own (`run_apart`), so that memory is fresh and a peak belongs to
one measurement. Peaks are sampled every 50 ms (`usaf.memory`): private memory, and resident memory, which adds mapped
files. Nothing but `Sizes` shapes the model: weights are random, so routing is nearly even, and perplexities mean
nothing.

Left out: GPUs. Heavy imports wait until they are needed, so that `--help` of a benchmark answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf.errors import RunError, UserError
from usaf.memory import PeakMemory, private_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from usaf.session import Session
    from usaf.trainer import Trainer


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen3-MoE all of whose layers have experts; the default has 0.9 B weights."""

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    experts: int = 64
    top_k: int = 8
    intermediate: int = 512  # of one expert
    vocab: int = 32_000

    @property
    def expert_parameters(self) -> int:
        """Of one layer."""
        return 3 * self.experts * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of the whole model, norms included; embeddings and head are not tied."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        layer = self.expert_parameters + self.experts * self.hidden + attention + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


def add_size_flags(parser: argparse.ArgumentParser, default: Sizes) -> None:
    for field in fields(Sizes):
        value = getattr(default, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """Raises UserError for sizes that make no model."""
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    for field in fields(Sizes):
        require_at_least(arguments, field.name, 1)
    if sizes.top_k > sizes.experts:
        raise UserError(f"--top-k {sizes.top_k}: there are {sizes.experts} experts; choose at most that many")
    if sizes.heads % sizes.kv_heads:
        raise UserError(f"--kv-heads {sizes.kv_heads}: must divide --heads {sizes.heads}; choose such a number")
    return sizes


def require_at_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(arguments, name)
    if value < least:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}; give such a number")


def further_settings(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as settings of the run; raises UserError for a word of another form."""
    settings = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or name != name.upper():
            raise UserError(f"{word}: must be a setting such as TRAIN_FROM=4; write NAME=VALUE")
        settings[name] = value
    return settings


# Model, data and settings on disk.


@dataclass(frozen=True)
class Inputs:
    """Model and data of one measurement below `folder`, found again by those who share them."""

    folder: Path
    sizes: Sizes
    sequences: int
    """that train; others are held back as a run would"""
    sequence_tokens: int

    @property
    def model(self) -> Path:
        return self.folder / ("model-" + "-".join(str(getattr(self.sizes, field.name)) for field in fields(Sizes)))

    @property
    def data(self) -> Path:
        return self.folder / f"data-{self.sizes.vocab}-{self.sequences}x{self.sequence_tokens}.jsonl"

    def settings(self, threads: int, steps: int, further: dict[str, str]) -> dict[str, str]:
        """Of a USAF run, as environment variables.

        RESELECT_EVERY=0: what is timed is an ordinary step, as all but CAPTURE_STEPS of RESELECT_EVERY are.
        """
        return {
            "MODEL": str(self.model), "DATASET_PATH": str(self.data), "OUTPUT_DIR": str(self.folder / "runs"),
            "USE_CUDA": "0", "CPU_THREADS": str(threads), "STEPS": str(steps), "RESELECT_EVERY": "0",
            "IN_DOMAIN_FRACTION": "0.01", "LR_PEAK": "1e-3", "HEAD_LR": "1e-4", **further,
        }  # fmt: skip

    def make(self, settings: dict[str, str]) -> dict[str, Any]:
        """Checkpoint, data and 4-bit file: whatever of them is not there yet."""
        if not self.model.is_dir():
            partial = self.model.with_suffix(".partial")
            write_model(partial, self.sizes)
            partial.rename(self.model)
        held_back = 8 + self.sequences // 10  # more than twice IN_DOMAIN_FRACTION
        write_data(self.data, self.sequences + held_back, self.sequence_tokens, self.sizes.vocab)
        began = time.perf_counter()
        quantise(settings)
        return {"quantise_seconds": time.perf_counter() - began}


def model_config(sizes: Sizes) -> Any:
    from transformers import Qwen3MoeConfig

    shape: dict[str, Any] = {
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim, "moe_intermediate_size": sizes.intermediate, "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3MoeConfig(**shape)


def write_model(folder: Path, sizes: Sizes) -> None:
    """A random bf16 checkpoint in shards."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")


def write_data(path: Path, sequences: int, length: int, vocab: int) -> None:
    """Random token ids, every sequence one sample of the same length."""
    import numpy as np

    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(sequences):
            file.write(json.dumps({"input_ids": rng.integers(3, vocab, length).tolist()}) + "\n")


def prepare_session(settings: dict[str, str]) -> Session:
    """What a run's settings name, read and checked; the model is not loaded yet."""
    from usaf.session import prepare
    from usaf.settings import load_settings

    return prepare(load_settings([], settings, {}))


def quantise(settings: dict[str, str]) -> None:
    """The 4-bit file of a session's experts, made now where there is none."""
    from usaf.expert_store import open_or_make

    session = prepare_session(settings)
    values = session.settings.values
    open_or_make(session.checkpoint, values.quant_path, values.group_size, values.quant_bits, lambda *_: None)


# Measuring.


def measured_steps(step: Callable[[], float], warmup: int, timed: int) -> dict[str, Any]:
    """`step` trains once and returns its loss. Times of the timed steps alone; the peak is that of all of them."""
    return_freed_memory()
    before = private_bytes()
    memory = PeakMemory()
    losses, seconds = [], []
    for _ in range(warmup + timed):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    memory.stop()
    return {
        "step_seconds": statistics.median(seconds[warmup:]), "step_seconds_each": seconds[warmup:],
        "warmup_seconds_each": seconds[:warmup], "losses": losses,
        "before_steps_private_bytes": before, "steps_peak_private_bytes": memory.private,
        "steps_peak_resident_bytes": memory.resident,
    }  # fmt: skip


def return_freed_memory() -> None:
    """So that a peak of steps holds nothing of what came before: glibc keeps freed blocks for the process, after
    transformers has loaded a model as much as two thirds of the model's own size."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def random_active(trainer: Trainer, fraction: float, seed: int = 0) -> dict[str, Tensor]:
    """A seeded choice of `fraction` of each expert tensor, in place of importance: sorted flat indices.

    As many as importance would choose, and spread evenly; how long a step takes depends on their number.
    """
    import numpy as np
    import torch

    from usaf.importance import counts_by_name

    rng = np.random.default_rng(seed)
    chosen = {}
    counts = counts_by_name(
        trainer.model, trainer.states.start, fraction, trainer.settings.projections, trainer.rows.different_targets()
    )
    for name, bank in trainer.banks.items():
        indices = rng.choice(bank.numel, counts[name], replace=False, shuffle=False)
        chosen[name] = torch.from_numpy(np.sort(indices))
    return chosen


def usaf_trainer(session: Session, states: Any) -> Trainer:
    """The trainer of a run, before its active weights are chosen."""
    from usaf.trainer import Trainer

    assert session.order is not None
    values = session.settings.values
    return Trainer(session.model, states, session.data.train, session.order, values, values.steps)


def trained_figures(trainer: Trainer) -> dict[str, Any]:
    """What trains, counted after a step; the last figure proves that its gradient reached it."""
    whole = sum(weight.numel() for weight in trainer.whole().values())
    return {
        "trainable_parameters": trainer.active_parameters() + whole,
        "active_parameters": trainer.active_parameters(), "whole_parameters": whole,
        "parameters_with_gradient": with_gradient(list(trainer.parameters().values())),
    }  # fmt: skip


def with_gradient(parameters: Sequence[Tensor]) -> int:
    """How many weights got a gradient other than zero in the last backward."""
    return sum(int((p.grad != 0).sum()) for p in parameters if p.grad is not None)


# A process of its own.


@contextlib.contextmanager
def working_folder(kept: Path | None) -> Iterator[Path]:
    """The folder to be kept, or one that goes when the block ends."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def run_apart(function: Callable[..., dict[str, Any]], *arguments: Any, log: Path) -> dict[str, Any]:
    """function(*arguments) in a new process, with the peaks of its memory: `peak_private_bytes`, `peak_resident_bytes`.

    What it prints goes to `log`. Raises the UserError that it raised; RunError where it ended in another way.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(sender, log, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(_what_happened(function.__name__, process.exitcode, log)) from None
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()
    if isinstance(found, UserError):
        raise found
    return found


def _apart(sender: Connection, log: Path, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    memory = PeakMemory()
    try:
        found: dict[str, Any] | UserError = function(*arguments)
    except UserError as error:
        found = error
    except Exception:
        traceback.print_exc()  # into the log
        sys.exit(1)
    memory.stop()
    if isinstance(found, dict):
        for kind, whole in (("private", memory.private), ("resident", memory.resident)):
            # Samplers of parts may have caught what the other one slept through.
            parts = [value for name, value in found.items() if name.endswith(f"_peak_{kind}_bytes")]
            found[f"peak_{kind}_bytes"] = max(whole, *parts, 0)
    sender.send(found)


def _what_happened(name: str, status: int | None, log: Path) -> str:
    if status is not None and status < 0:
        return f"{name}: was killed by signal {-status}, as a system does that runs out of memory"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{name}: ended with status {status} ({lines[-1][:200] if lines else 'no output'})"
