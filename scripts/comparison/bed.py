"""What every arm of a comparison shares: one model, data in fixed splits, the order of the steps, and the evaluation.

All arms read their rows through USAF's own data pipeline and take them in the order of its `DataOrder`, so that arms of
one seed see the same tokens in the same micro-batches. Splits of the training file, by a seed that never changes:

    train        what the arms learn from
    validation   chooses learning rates, and nothing else
    test         reported, and never looked at for a choice

Whole held-out files (`heldout_*`) are reported too, and `forgetting`, text like that of the pretraining.

A "base" is what an arm starts from: `original`, the checkpoint's own weights in fp32; `hqq4`, its experts in 4-bit HQQ,
dequantised; `hqq4-64`, `hqq8-128`: other groups or bits; `minmax4`, 4 bits with plain min-max rounding,
as the earlier tool had it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usaf.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from usaf.data import Rows
    from usaf.session import Session

HELD_BACK = 0.05  # of the training file, for validation and for test each
LEAST_HELD_BACK = 8  # documents
SPLIT_SEED = 20_26
EVALUATION_ROWS = 8  # at a time


@dataclass(frozen=True)
class Bed:
    """One comparison's ground. heldout, forgetting: JSONL files as `DATASET_PATH` takes them."""

    folder: Path
    model: Path
    dataset: Path
    heldout: tuple[Path, ...]
    forgetting: Path | None
    train_from: int
    frac: float
    steps: int
    microbatch: int
    seq_len: int
    eval_samples: int
    threads: int
    scales: tuple[float, ...] = ()
    """how much of what was trained counts, beside all of it, in further evaluations"""

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def split(self) -> None:
        """Write the splits of the training file, where they are not there yet."""
        if (self.data / "test.jsonl").is_file():
            return
        from usaf.files import replacing

        # not splitlines(), which would cut a sample at U+2028 and its like inside
        lines = [line for line in self.dataset.read_text(encoding="utf-8").split("\n") if line.strip()]
        random.Random(SPLIT_SEED).shuffle(lines)
        held = max(LEAST_HELD_BACK, round(HELD_BACK * len(lines)))
        if len(lines) < 4 * held:
            raise UserError(f"--dataset {self.dataset}: {len(lines)} samples are too few to hold back {held} for "
                            f"validation and {held} for test; give at least {4 * held}")  # fmt: skip
        self.data.mkdir(parents=True, exist_ok=True)
        parts = {"train": lines[2 * held :], "validation": lines[:held], "test": lines[held : 2 * held]}
        for name, part in parts.items():  # test, whose presence means all, comes last
            with replacing(self.data / f"{name}.jsonl") as file:
                file.write("\n".join([*part, ""]).encode("utf-8"))

    def evaluated(self) -> dict[str, Path]:
        """Evaluation set -> its file."""
        sets = {name: self.data / f"{name}.jsonl" for name in ("validation", "test")}
        sets |= {f"heldout_{path.stem}": path for path in self.heldout}
        return sets | ({"forgetting": self.forgetting} if self.forgetting is not None else {})

    def settings(self, seed: int, further: dict[str, str] | None = None) -> dict[str, str]:
        """Of a USAF run on this ground, as environment variables."""
        return {
            "MODEL": str(self.model), "DATASET_PATH": str(self.data / "train.jsonl"),
            "HELDOUT_PATH": ",".join(str(path) for path in self.evaluated().values()),
            "OUTPUT_DIR": str(self.folder / "runs"), "USE_CUDA": "0", "CPU_THREADS": str(self.threads),
            "TRAIN_FROM": str(self.train_from), "FRAC": repr(self.frac), "STEPS": str(self.steps),
            "MICROBATCH": str(self.microbatch), "SEQ_LEN": str(self.seq_len), "SEED": str(seed),
            "EVAL_SAMPLES": str(self.eval_samples), "IN_DOMAIN_FRACTION": "0.002", **(further or {}),
        }  # fmt: skip

    def session(self, seed: int, further: dict[str, str] | None = None) -> Session:
        from usaf.session import prepare
        from usaf.settings import load_settings

        return prepare(load_settings([], self.settings(seed, further), {}))

    def rows(self, session: Session) -> dict[str, Rows]:
        """Evaluation set -> its rows."""
        return {name: session.data.heldout[f"heldout_{path.stem}"] for name, path in self.evaluated().items()}

    def describe(self, further: dict[str, str]) -> dict[str, Any]:
        """For a run's file: everything that decides its figures but the arm."""
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in self.evaluated().values()))
        digest.update((self.data / "train.jsonl").read_bytes())
        return {
            "model": self.model.name, "dataset": self.dataset.name, "texts": digest.hexdigest()[:12],
            "settings": " ".join(f"{name}={value}" for name, value in sorted(further.items())),
            "train_from": self.train_from, "frac": self.frac,
            "steps": self.steps, "microbatch": self.microbatch, "seq_len": self.seq_len,
            "eval_samples": self.eval_samples, "threads": self.threads,
        }  # fmt: skip


# ---- models as transformers has them --------------------------------------------------------------------------------


def dense_model(bed: Bed, session: Session, base: str) -> PreTrainedModel:
    """The model in fp32 with plain dense weights, on one of the bases."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bed.model, dtype=torch.float32)
    if base == "original":
        return model
    from usaf.expert_store import open_or_make
    from usaf.experts import projection_names
    from usaf.quantization import dequantize, quantize, quantize_minmax

    values = session.settings.values
    store = session.store or open_or_make(
        session.checkpoint, values.quant_path, values.group_size, values.quant_bits, lambda *_: None
    )
    for name, targets in session.checkpoint.expert_parameters().items():
        experts = model.get_submodule(name)
        assert not experts.is_transposed, "a family whose experts are stored the other way round"
        for attribute, target in zip(projection_names(experts), targets, strict=True):
            weight = experts.get_parameter(attribute)
            if base == "hqq4":
                stored = store[target]
            elif base == "minmax4":
                stored = quantize_minmax(weight.data, values.group_size)
            else:
                bits, group = base.removeprefix("hqq").split("-")
                stored = quantize(weight.data, int(group), int(bits))
            weight.data.copy_(dequantize(stored, torch.float32))
    return model


def batch_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The mean loss of a batch, by transformers."""
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False).loss


class Loads:
    """Counts, while it is entered, the tokens that each expert gets, padding included. counts: block -> int64 [E]."""

    def __init__(self, model: nn.Module, experts: Iterable[str]) -> None:
        import torch

        found = dict(model.named_modules())
        self.modules = {name: next(m for n, m in found.items() if n.endswith(name)) for name in experts}
        self.counts = {name: torch.zeros(m.num_experts, dtype=torch.int64) for name, m in self.modules.items()}

    def __enter__(self) -> Loads:
        self.hooks = [m.register_forward_pre_hook(partial(self._count, n)) for n, m in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        import torch

        self.counts[name] += torch.bincount(args[1].reshape(-1), minlength=len(self.counts[name]))


def evaluate_dense(model: nn.Module, sets: dict[str, Rows]) -> dict[str, float]:
    """Set -> its mean negative log-likelihood a target, in nats."""
    import torch
    import torch.nn.functional as F

    from usaf.data import NO_TARGET, batch_loss_targets

    model.eval()
    found = {}
    with torch.no_grad():
        for name, rows in sets.items():
            sums, targets = [], 0
            for first in range(0, len(rows), EVALUATION_ROWS):
                batch = rows.batch(range(first, min(len(rows), first + EVALUATION_ROWS)))
                wanted = batch_loss_targets(batch.labels).reshape(-1)
                logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=NO_TARGET, reduction="sum")
                sums.append(float(loss))
                targets += int((wanted != NO_TARGET).sum())
            found[name] = math.fsum(sums) / targets if targets else math.nan
    model.train()
    return found


def routing_figures(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How experts are loaded, over blocks. Counts: block -> int64 [E]."""
    from usaf.evaluation import routing_entropy, starved_experts

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    moved = [
        float((a / a.sum() - b / b.sum()).abs().sum() / 2)
        for b, a in ((before[n].double(), after[n].double()) for n in before)
    ]
    return {
        "entropy_before": mean(routing_entropy(c) for c in before.values()),
        "entropy": mean(routing_entropy(c) for c in after.values()),
        "starved_experts": sum(starved_experts(c) for c in after.values()), "load_moved": mean(moved),
    }  # fmt: skip


def tokens_of(sets: dict[str, Rows]) -> dict[str, int]:
    return {name: rows.target_tokens() for name, rows in sets.items()}


def read_result(path: Path) -> dict[str, Any] | None:
    """A finished run's figures; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
