"""The training loop: step, reselection, cadence, and a state that resumes to the bit.

One step: `accum` micro-batches enter the first trainable layer from the prefix cache, run through the trainable layers
and the head, and back; the deltas, the router weights and the norms get their Adam update. Gradients of sparse weights
are computed at the active indices alone. In the last `capture_steps` steps before a reselection the backwards also
leave what their weight gradients need (`sparse_weights.Factors`), which ranks the candidates without a pass of its own.

A step whose loss or gradient is not finite is skipped and counted; `MAX_SKIPPED` in a row end the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from usaf.data import Batch, DataOrder, Rows
from usaf.delta import Delta
from usaf.delta_scale import Change
from usaf.errors import RunError
from usaf.importance import grow_candidates
from usaf.loss import count_targets, loss_and_gradient
from usaf.model import SparseModel
from usaf.optimizer import LARGEST_NORM_RATE, Adam, gradient_norm, learning_rate_at
from usaf.prefix import BoundaryStates
from usaf.run import SavedState, random_states, restore_random_states
from usaf.selection import drop_fraction_at, reselect, smallest_k_positions
from usaf.settings import Settings
from usaf.sparse_weights import Factors, SparseWeights
from usaf.workers import number_of_workers, run_shares, shares
from usaf.workspace import Workspace

MAX_SKIPPED = 5

RESELECTED_AT_ONCE = 4
"""Fused tensors whose places are drawn anew side by side: each takes some 100 bytes an active weight meanwhile."""

SORTING_PASSES = 50
"""What drawing anew costs an active weight, in the multiplications of `workers`."""


class Rates(NamedTuple):
    """Learning rates: of the experts' deltas, the head's, the norms, the routers; 0 for a head or routers that are
    frozen."""

    experts: float
    head: float
    norms: float
    routers: float


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; loss is the mean negative log-likelihood per target, in nats."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    head_learning_rate: float  # 0 where the head is frozen, as the routers'
    router_learning_rate: float
    tokens: int
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class ReselectResult:
    """Counts over all sparse weights. One dropped and grown again at once (from delta zero) counts in both."""

    step: int
    active: int
    dropped: int
    grown: int

    @property
    def turnover(self) -> float:
        return self.dropped / self.active


@dataclass
class Captured:
    """One micro-batch's factors of one tensor, and by how much its step's gradient was scaled (clipping)."""

    step: int  # finished steps when it ran
    scale: float
    factors: Factors


class Trainer:
    """Owns the training state of deltas, routers and norms. `step` counts finished optimizer steps. `workspace`: where
    captured factors wait for their reselection, on the CPU; None is private memory."""

    def __init__(
        self, model: SparseModel, states: BoundaryStates, rows: Rows, order: DataOrder, settings: Settings, steps: int,
        workspace: Workspace | None = None,
    ) -> None:  # fmt: skip
        self.model, self.states, self.rows, self.order = model, states, rows, order
        self.settings, self.steps, self.workspace = settings, steps, workspace
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.losses: dict[str, list[float]] = {"first": [], "last": []}
        self.trained = model.moe_from(states.start)
        self.banks = model.sparse_weights(states.start)
        self.routers = {moe.router_name: moe.router for moe in self.trained} if settings.router_lr > 0 else {}
        for moe in self.trained:
            moe.router_weight.requires_grad_(moe.router_name in self.routers)
        for weight in model.norms.values():
            weight.requires_grad_(True)
        scaled = settings.delta_scale != 1
        self.base = {name: weight.detach().clone() for name, weight in self.whole().items()} if scaled else {}
        self.adam: dict[str, Adam] = {name: Adam(weight) for name, weight in self.whole().items()}
        self.captured: dict[str, list[Captured]] = {name: [] for name in self.banks}

    # -- the trained weights -------------------------------------------------------------------------------------------

    def activate(self, active: dict[str, Tensor]) -> None:
        """Start training the given flat indices of each fused tensor, and of the head, from delta zero."""
        for name, bank in self.banks.items():
            bank.set_active(active[name], torch.zeros(len(active[name])))
            self.adam[name] = Adam(bank.delta)

    def whole(self) -> dict[str, nn.Parameter]:
        """What trains in all its weights: routers and norms."""
        return self.model.whole_weights(self.states.start, routers=bool(self.routers))

    def parameters(self) -> dict[str, Tensor]:
        """Read anew each time: a reselection replaces the deltas."""
        return {**{name: bank.delta for name, bank in self.banks.items()}, **self.whole()}

    def active_parameters(self) -> int:
        return sum(bank.delta.numel() for bank in self.banks.values())

    def delta(self, about: dict[str, Any]) -> Delta:
        sparse = {n: (b.active.cpu(), b.delta.detach().cpu()) for n, b in self.banks.items()}
        whole = {name: weight.detach().cpu() for name, weight in self.whole().items()}
        return Delta(sparse, whole, self.model.base_fingerprint, about)

    def free_gradients(self) -> None:
        """Behind the last step: they make room for what follows."""
        for weight in self.parameters().values():
            weight.grad = None

    def change(self) -> Change:
        """What has been trained, to keep a part of it (`delta_scale`)."""
        return Change(self.parameters(), {**dict.fromkeys(self.banks), **self.base})

    @torch.no_grad()
    def round_deltas(self) -> None:
        """Behind the last step: to DELTA_DTYPE, in which they are saved, so that what is judged is what is saved.

        In fp16 a delta keeps 11 bits, below 6e-5 it is a multiple of 6e-8; a tensor with one beyond 65,504 stays.
        """
        if self.settings.delta_dtype == "fp32":
            return
        for bank in self.banks.values():
            rounded = bank.delta.to(torch.float16).to(torch.float32)
            if bool(torch.isfinite(rounded).all()):
                bank.delta.copy_(rounded)

    # -- one step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """One optimizer step on the next micro-batches."""
        began = time.perf_counter()
        capturing = self._in_window()
        micro_batches = [
            self.order.micro_batch(self.step * self.settings.accum + i) for i in range(self.settings.accum)
        ]
        batches = [self.rows.batch(rows) for rows in micro_batches]
        scale = 1.0 / max(1, sum(count_targets(batch) for batch in batches))
        parameters = self.parameters()
        for parameter in parameters.values():
            parameter.grad = None
        if self.model.head is not None:
            self.model.head.snapshot = None
        loss = math.fsum(
            self._micro_step(batch, rows, scale, capturing) for batch, rows in zip(batches, micro_batches, strict=True)
        )
        gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in parameters.items()}
        norm = float(gradient_norm(gradients.values()))
        loss *= scale
        skipped = not (math.isfinite(loss) and math.isfinite(norm) and self._captured_are_finite())
        rates = self._learning_rates()
        if skipped:
            self._skip()
        else:
            self._update(gradients, norm, rates)
        self.step += 1
        self._remember_loss(loss, skipped)
        tokens, seconds = sum(sum(batch.lengths) for batch in batches), time.perf_counter() - began
        return StepResult(
            self.step, loss, norm, rates.experts, rates.head, rates.routers, tokens, seconds, skipped
        )  # fmt: skip

    def _micro_step(self, batch: Batch, rows: list[int], scale: float, capturing: bool) -> float:
        """Forward and backward of one micro-batch; returns its summed loss."""
        for bank in self.banks.values():
            bank.captured = [] if capturing and len(bank.delta) else None
        hidden = self.model.run_layers(batch, self.states.start, self.model.num_layers, self.states.hidden(rows))
        loss, gradient = loss_and_gradient(self.model, hidden, batch, self.settings.head_chunk_tokens, scale)
        if math.isfinite(loss):
            hidden.backward(gradient)
        for name, bank in self.banks.items():
            self.captured[name] += [Captured(self.step, 1.0, self._kept(factors)) for factors in bank.take_captured()]
        return loss

    def _kept(self, factors: Factors) -> Factors:
        return factors if self.workspace is None else factors.kept(self.workspace)

    def _update(self, gradients: dict[str, Tensor], norm: float, rates: Rates) -> None:
        """Clip all gradients together, then Adam."""
        clip = min(1.0, self.settings.grad_clip / (norm + 1e-6))
        for name, parameter in self.parameters().items():
            gradient = gradients[name] * clip if clip < 1.0 else gradients[name]
            decay = self.settings.weight_decay if name in self.banks else 0.0
            self.adam[name].step(parameter, gradient, self._rate_of(name, rates), decay)
        for entry in self._captured_now():
            entry.scale = clip
        self.skipped_in_a_row = 0

    def _captured_now(self) -> list[Captured]:
        """What the step now running has captured, of all banks."""
        return [entry for entries in self.captured.values() for entry in entries if entry.step == self.step]

    def _captured_are_finite(self) -> bool:
        """The norm sees active weights only; an expert without any may have met an overflow in 16 bits unseen."""
        return all(entry.factors.is_finite() for entry in self._captured_now())

    def _skip(self) -> None:
        """Leave the weights alone; what the step captured is not finite either."""
        for name, entries in self.captured.items():
            self.captured[name] = [entry for entry in entries if entry.step != self.step]
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(self._diverged())

    def _diverged(self) -> str:
        head = self.model.head is not None
        rates = f"LR_PEAK={self.settings.lr_peak:g}" + (f", HEAD_LR={self.settings.head_lr:g}" if head else "")
        return (
            f"{rates}: the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row (the last is step "
            f"{self.step + 1}); lower LR_PEAK{', HEAD_LR' if head else ''} or ROUTER_LR and start a new run, since a "
            "resumed one keeps them"
        )

    def _rate_of(self, name: str, rates: Rates) -> float:
        """That of a tensor that trains."""
        if name in self.routers:
            return rates.routers
        if name in self.banks:
            return rates.head if name == self.model.head_name else rates.experts
        return rates.norms

    def _learning_rates(self) -> Rates:
        """Of this step."""
        values, head = self.settings, self.model.head is not None
        assert values.lr_peak is not None, "settled before the first step"
        assert values.head_lr is not None or not head, "settled before the first step"
        peaks = Rates(
            values.lr_peak, values.head_lr if head and values.head_lr is not None else 0.0,
            min(values.lr_peak, LARGEST_NORM_RATE), values.router_lr if self.routers else 0.0,
        )  # fmt: skip
        return Rates(*(learning_rate_at(self.step, self.steps, p, values.warmup, values.lr_floor) for p in peaks))

    def _remember_loss(self, loss: float, skipped: bool) -> None:
        """The losses of the first and the last tenth of the steps, whose means the summary shows."""
        tenth = max(1, self.steps // 10)
        if not skipped and self.step <= tenth:
            self.losses["first"].append(loss)
        if not skipped and self.step > self.steps - tenth:
            self.losses["last"].append(loss)

    # -- reselection ---------------------------------------------------------------------------------------------------

    # Steps are numbered from 1; `step` is the number of the last finished one, so the one that runs is step + 1. With
    # RESELECT_EVERY = 10 and CAPTURE_STEPS = 4, steps 7 to 10 capture, and the reselection follows step 10.

    def _last_reselection(self) -> int:
        """No reselection follows a later step: RESELECT_UNTIL as a step, and never the last of the run."""
        until = math.floor(self.settings.reselect_until * self.steps + 1e-9)  # 0.29 * 100 is just below 29
        return min(until, self.steps - 1)

    def next_reselection(self) -> int | None:
        """The next step, after those finished, that a reselection follows; None: no more."""
        every = self.settings.reselect_every
        if every == 0 or self.settings.drop_fraction == 0:
            return None
        due = (self.step // every + 1) * every
        return due if due <= self._last_reselection() else None

    def _in_window(self) -> bool:
        """Whether the step now running is one of the CAPTURE_STEPS that end with the next reselection's."""
        due = self.next_reselection()
        return due is not None and due - self.step <= self.settings.capture_steps

    def in_capture_window(self) -> bool:
        """Whether captured gradients wait for their reselection: no ordinary checkpoint falls here."""
        return any(self.captured.values())

    def reselect_if_due(self) -> ReselectResult | None:
        """Right after the step that closes a capture window: drop, grow, and forget what was captured.

        Where every step of the window was skipped there is nothing to choose by, and the active weights stay.
        """
        every = self.settings.reselect_every
        if every == 0 or self.step % every != 0 or not self.in_capture_window():
            return None
        fraction = drop_fraction_at(self.step, self._last_reselection() + 1, self.settings.drop_fraction)
        names = list(self.banks)
        grown = [self._grow(name, fraction) for name in names]

        # Finding candidates keeps every core busy by itself, as the head's moments do, whose factors are formed again;
        # the rest sorts, on one, a tensor at a time each.
        alone = [i for i, name in enumerate(names) if name != self.model.head_name]
        exchanged = sum(self._reselect_bank(names[i], grown[i]) for i in range(len(names)) if i not in alone)

        def work(parts: list[int]) -> int:
            return sum(self._reselect_bank(names[alone[i]], grown[alone[i]]) for i in parts)

        sizes = [self.banks[names[i]].delta.numel() for i in alone]
        on_cpu = self.model.backend.device.type == "cpu"
        workers = min(RESELECTED_AT_ONCE, number_of_workers(SORTING_PASSES * sum(sizes), len(sizes))) if on_cpu else 1
        exchanged += sum(run_shares(work, shares(sizes, workers)))
        for name in names:
            self.captured[name] = []
        return ReselectResult(self.step, self.active_parameters(), dropped=exchanged, grown=exchanged)

    @torch.no_grad()
    def _grow(self, name: str, fraction: float) -> Tensor:
        """The flat indices that a tensor is to grow, as many as it drops; int64, sorted."""
        bank = self.banks[name]
        active = bank.active
        count = min(int(fraction * len(active)), bank.numel - len(active))
        if count == 0 or not self.captured[name]:  # the head, where no row of the window had a target
            return active[:0]
        stays = torch.ones(len(active), dtype=torch.bool, device=active.device)
        stays[smallest_k_positions(bank.delta.detach(), count)] = False
        scaled = [entry.factors.scaled(entry.scale) for entry in self.captured[name]]
        return grow_candidates(bank, scaled, active[stays].cpu(), count).to(active.device)

    @torch.no_grad()
    def _reselect_bank(self, name: str, grown: Tensor) -> int:
        """Drop and grow in one tensor; returns how many weights were exchanged."""
        if len(grown) == 0:
            return 0
        bank, captured = self.banks[name], self.captured[name]
        delta, active = bank.delta.detach(), bank.active
        change = reselect(active, delta, len(grown), grown)
        kept = change.from_old >= 0
        values = torch.where(kept, delta.index_select(0, change.from_old.clamp(min=0)), torch.zeros_like(delta))
        bank.set_active(change.active, values)
        mean, mean_square, seen = self._grown_moments(bank, captured, kept)
        self.adam[name].regrow(change.from_old, mean, mean_square, seen)
        return len(grown)

    def _grown_moments(
        self, bank: SparseWeights[Any], captured: list[Captured], kept: Tensor
    ) -> tuple[Tensor, Tensor, int]:  # fmt: skip
        """Mean gradient and mean squared gradient over the captured steps, at the grown weights; and how many steps."""
        by_step: dict[int, Tensor] = {}
        for entry in captured:
            gradient = bank.delta_gradient(entry.factors, entry.factors.dtype, ~kept) * entry.scale
            by_step[entry.step] = by_step[entry.step] + gradient if entry.step in by_step else gradient
        stacked = torch.stack(list(by_step.values()))
        return stacked.mean(0), (stacked * stacked).mean(0), len(by_step)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> SavedState:
        """Everything a resume needs, beside the settings and the data they name.

        The tensors are the trainer's own, not copies: write them before the next step.
        """
        tensors: dict[str, Tensor] = random_states()
        about: dict[str, Any] = {
            "step": self.step, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
            "losses": self.losses, "adam": {}, "captured": {},
        }  # fmt: skip
        for name, bank in self.banks.items():
            tensors[f"active/{name}"], tensors[f"delta/{name}"] = bank.active, bank.delta.detach()
        for name, weight in self.whole().items():
            tensors[f"whole/{name}"] = weight.detach()
        for name, adam in self.adam.items():
            state = adam.state_dict()
            tensors.update({f"adam/{name}/{k}": v for k, v in state.items() if isinstance(v, Tensor)})
            about["adam"][name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        for name, entries in self.captured.items():
            about["captured"][name] = [{"step": entry.step, "scale": entry.scale} for entry in entries]
            for i, entry in enumerate(entries):
                tensors.update({f"captured/{name}/{i}/{k}": v for k, v in entry.factors.tensors().items()})
        return SavedState(tensors, about)

    def restore(self, saved: SavedState) -> None:
        """The state that `state` gave, so that the next step computes the same bits as if nothing had happened."""
        tensors, about = saved.tensors, saved.about
        self.step, self.skipped = about["step"], about["skipped"]
        self.skipped_in_a_row, self.losses = about["skipped_in_a_row"], about["losses"]
        for name, bank in self.banks.items():
            bank.set_active(tensors[f"active/{name}"], tensors[f"delta/{name}"])
            self.adam[name] = Adam(bank.delta)
        for name, weight in self.whole().items():
            saved_as = f"whole/{name}" if f"whole/{name}" in tensors else f"router/{name}"  # before norms trained
            weight.data.copy_(tensors[saved_as])
        for name, adam in self.adam.items():
            moments = {k: tensors[f"adam/{name}/{k}"] for k in ("exp_avg", "exp_avg_sq", "generation")}
            adam.load_state_dict({**about["adam"][name], **moments})
        for name, entries in about["captured"].items():
            self.captured[name] = []
            for i, entry in enumerate(entries):
                prefix = f"captured/{name}/{i}/"
                named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.captured[name].append(Captured(entry["step"], entry["scale"], self.banks[name].restored(named)))
        restore_random_states(tensors)

    def run(self, after_step: Callable[[StepResult, ReselectResult | None], bool]) -> None:
        """Steps to the end, or until `after_step` (log, evaluate, save) says to stop."""
        while self.step < self.steps:
            result = self.train_step()
            if not after_step(result, self.reselect_if_due()):
                return
