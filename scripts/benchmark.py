"""What the benchmarks share: the machine, the rate of a plain matrix product, medians, counts of arithmetic, a report.

A time alone says little about another machine, so every benchmark measures, in the same run, how fast this one
multiplies matrices in fp32, and gives each phase the share of that rate that it reached:

    share = counted arithmetic / seconds / rate of the plain product

Counted is the least that a phase has to compute, by the model's shapes: the products of the experts that tokens are
sent to, the other projections, causal attention, the head; a multiplication and its addition are two operations.
Counted once, what is computed twice costs share: a forward repeated in a backward, logits formed again for the head's
weight gradients, decoded weights, masked halves of attention. Left out, being small: norms, rotary tables, softmax, the
router's own weight gradient, the optimizer.

Heavy imports wait until they are needed, so that `--help` of a benchmark answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from usaf import files

REPOSITORY = Path(__file__).resolve().parent.parent
SHORTEST_SECONDS = 0.2  # a product is repeated until it has taken this long, so that the clock's grain is nothing


# The machine.


def machine() -> dict[str, Any]:
    """What a reader needs to compare figures: processor, threads, memory, versions."""
    import psutil
    import torch

    from usaf.devices.cpu import processor_name

    return {
        "processor": processor_name(), "cores": psutil.cpu_count(logical=False), "processors": os.cpu_count(),
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": int(psutil.virtual_memory().total), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.platform(),
    }  # fmt: skip


def machine_line(found: Mapping[str, Any]) -> str:
    return (f"{found['processor']}, {found['threads']} threads, {found['cpu_capability']}, "
            f"{found['memory_bytes'] / 1e9:.1f} GB of memory, torch {found['torch']}")  # fmt: skip


# Time.


def timed(work: Callable[[], object], n: int = 3, synchronize: Callable[[], object] | None = None) -> float:
    """Median seconds of `n` calls. synchronize: waits for a device whose work goes on after the call."""
    taken = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        if synchronize is not None:
            synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matmul_rate(rows: int, k: int, n: int) -> float:
    """Operations a second of a plain fp32 product [rows, k] x [n, k]^T on the CPU: the median of three."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    out = torch.empty(rows, n)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(x, weight.t(), out=out)

    products(1)  # the first one sets up threads and buffers
    repeats = max(1, math.ceil(SHORTEST_SECONDS / timed(lambda: products(1))))
    return 2.0 * rows * k * n * repeats / timed(lambda: products(repeats))


# Arithmetic.


@dataclass(frozen=True)
class LayerWork:
    """Of one layer, in operations a token, but for attention, which depends on the sequence's length.

    up, down: the two projections of the experts that a token is sent to; projections: all others, router and shared
    experts among them; attention: a token and one that it sees.
    """

    up: int
    down: int
    projections: int
    attention: int

    @property
    def has_experts(self) -> bool:
        return self.up > 0


@dataclass(frozen=True)
class Work:
    """Operations by part."""

    experts: float = 0.0
    projections: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.experts + self.projections + self.attention + self.head

    def __add__(self, other: Work) -> Work:
        return Work(self.experts + other.experts, self.projections + other.projections,
                    self.attention + other.attention, self.head + other.head)  # fmt: skip

    def gflop(self) -> dict[str, float]:
        """For a report in JSON."""
        parts = {"experts": self.experts, "projections": self.projections, "attention": self.attention,
                 "head": self.head, "total": self.total}  # fmt: skip
        return {f"{name}_gflop": value / 1e9 for name, value in parts.items()}


@dataclass(frozen=True)
class ModelWork:
    """The arithmetic of one model; `lengths` are those of the sequences, `layers` (first, end)."""

    layers: tuple[LayerWork, ...]
    head: int  # a token

    def forward(self, lengths: Sequence[int], layers: tuple[int, int], head: bool = False) -> Work:
        """One pass through some layers, and through the head for every token with a successor where `head` is set."""
        tokens, seen = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        used = self.layers[slice(*layers)]
        return Work(
            float(tokens * sum(layer.up + layer.down for layer in used)),
            float(tokens * sum(layer.projections for layer in used)),
            float(seen * sum(layer.attention for layer in used)),
            float(self.head * sum(n - 1 for n in lengths)) if head else 0.0,
        )

    def input_gradients(self, lengths: Sequence[int], start: int) -> Work:
        """The backward of layers from `start` and of the head, without weight gradients. Nothing below the first
        trainable weights needs a gradient: of their layer only the experts' second projection is gone through.
        Attention has two inputs at each of its two products, so its backward is twice its forward."""
        tokens = sum(lengths)
        moe = [i for i in range(start, len(self.layers)) if self.layers[i].has_experts]
        first = moe[0] if moe else len(self.layers)
        above = self.forward(lengths, (first + 1, len(self.layers)), head=True)
        return Work(
            above.experts + tokens * sum(self.layers[i].down for i in moe[:1]),
            above.projections, 2 * above.attention, above.head,
        )  # fmt: skip

    def weight_gradients(
        self, lengths: Sequence[int], start: int, density: float = 1.0, of_head: float = 0.0
    ) -> Work:  # fmt: skip
        """The gradients of the experts' weights in layers from `start`, at a share `density` of them, and of the head's
        at a share `of_head`."""
        whole = self.forward(lengths, (start, len(self.layers)), head=True)
        return Work(experts=density * whole.experts, head=of_head * whole.head)

    def dense_gradients(self, lengths: Sequence[int], start: int, projections: str, head: bool = True) -> Work:
        """Those that importance and reselection form: of the projections that train (`PROJECTIONS`), and of a head that
        does."""
        found = self.weight_gradients(lengths, start, 1.0, float(head))
        if projections == "all":
            return found
        return dataclasses.replace(
            found, experts=float(sum(lengths) * sum(layer.down for layer in self.layers[start:]))
        )  # fmt: skip

    def step(self, lengths: Sequence[int], start: int, density: float, of_head: float = 0.0) -> Work:
        """Forward and backward of a training step, from the states that enter layer `start`."""
        forward = self.forward(lengths, (start, len(self.layers)), head=True)
        return forward + self.input_gradients(lengths, start) + self.weight_gradients(lengths, start, density, of_head)

    def importance(self, lengths: Sequence[int], start: int, projections: str = "all", head: bool = True) -> Work:
        """As a step, with the gradient of every weight of those projections and of a head that trains."""
        return self.step(lengths, start, 0.0) + self.dense_gradients(lengths, start, projections, head)


def model_work(config: Any) -> ModelWork:
    """Counted on the modules that transformers builds from `config` (without weights), so that shared experts and dense
    layers are counted as they are. Attention is taken to be plain: every head sees all earlier tokens."""
    from usaf.architecture import meta_model
    from usaf.experts import is_experts_module
    from usaf.skeleton import find_decoder

    model = meta_model(config)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = []
    for layer in find_decoder(model)[2]:
        experts = [module for module in layer.modules() if is_experts_module(module)]
        within = {id(parameter) for module in experts for parameter in module.parameters()}
        fused = [(p.shape[1] * p.shape[2], n) for m in experts for n, p in m.named_parameters() if p.ndim == 3]
        up, down = (
            2 * text.num_experts_per_tok * sum(size for size, name in fused if name.startswith("down") == is_down)
            for is_down in (False, True)
        )
        others = sum(p.numel() for p in layer.parameters() if p.ndim == 2 and id(p) not in within)
        layers.append(LayerWork(up, down, 2 * others, 2 * 2 * heads * width))
    return ModelWork(tuple(layers), 2 * text.hidden_size * text.vocab_size)


# The report.


def commit() -> str | None:
    """The commit that is measured, with a mark where files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=REPOSITORY, text=True,
                               capture_output=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """The figures, with the command and the commit that gave them."""
    files.write_json(path, {"command": " ".join(sys.argv), "commit": commit(), **figures})
