"""Training of dense models: full fine-tuning, PEFT's adapters, and masked weights, in one loop.

A `Unit` is one trained tensor, whole or at some of its entries. All units share the loop of USAF's trainer: the same
micro-batches, the mean loss over targets, gradients clipped together, Adam, warm-up and cosine; weight decay is 0. So
arms differ in what trains and where it starts from, and in nothing else.

Masked units are a second, plain implementation of USAF's method: the dense gradient is formed and gathered. It costs a
full backward, and any variant of the method is a few lines in it (`lab`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from comparison.bed import batch_loss
from usaf.optimizer import Adam, gradient_norm, learning_rate_at
from usaf.session import Session


@dataclass(eq=False)
class Unit:
    """A trained tensor. active: the flat indices that train, sorted int64, or None for all. rate: instead of the
    arm's."""

    name: str
    parameter: nn.Parameter
    active: Tensor | None = None
    rate: float | None = None
    delta: Tensor = field(init=False)  # what Adam moves: the tensor itself, or its entries' distance from the base
    base: Tensor = field(init=False)  # of the active entries
    adam: Adam = field(init=False)
    window: list[Tensor] = field(default_factory=list)  # dense gradients of the capture window
    left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # entries that were dropped moved

    def __post_init__(self) -> None:
        self.parameter.requires_grad_(True)
        if self.active is None:
            self.delta = self.parameter.data
        else:
            self.set_active(self.active, torch.zeros(len(self.active)))
        self.adam = Adam(self.delta)

    @property
    def flat(self) -> Tensor:
        return self.parameter.data.view(-1)

    def set_active(self, active: Tensor, delta: Tensor, undo: bool = True) -> None:
        """undo: what is dropped goes back to the base."""
        if self.active is not None and hasattr(self, "base"):
            stay = torch.isin(self.active, active)
            back = torch.ones_like(stay) if undo else stay
            self.flat[self.active[back]] = self.base[back]
            self.left = torch.cat([self.left, self.active[~back]])
        self.active, self.delta = active, delta
        self.base = self.flat[active].clone()
        self.flat[active] = self.base + delta

    def gradient(self) -> Tensor:
        gradient = self.parameter.grad
        if gradient is None:
            return torch.zeros_like(self.delta)
        return gradient if self.active is None else gradient.reshape(-1)[self.active]

    def update(self, gradient: Tensor, rate: float) -> None:
        self.adam.step(self.delta, gradient, rate)
        if self.active is not None:
            self.flat[self.active] = self.base + self.delta

    @property
    def numel(self) -> int:
        return self.delta.numel()

    def moved(self) -> int:
        """Entries that differ from the base, those that train no more among them."""
        return self.numel if self.active is None else len(torch.cat([self.active, self.left]).unique())


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    step_seconds: float  # median
    diverged: bool


def train(
    model: nn.Module, session: Session, units: Sequence[Unit], rate: float,
    after_backward: Callable[[int, float], None] | None = None, after_step: Callable[[int], None] | None = None,
    loss_of: Callable[[nn.Module, Any], Tensor] = batch_loss,
    moving: Callable[[int], Sequence[Unit]] | None = None,
) -> Trained:  # fmt: skip
    """The run's steps, counted from 0. after_backward(step, clip), after_step(step): for masks that move; moving(step):
    the units that a step updates, where not all."""
    values, order = session.settings.values, session.order
    assert order is not None
    losses: list[float] = []
    seconds: list[float] = []
    model.train()
    for step in range(values.steps):
        began = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, session.data.train.batch(order.micro_batch(step)))
        loss.backward()
        losses.append(float(loss.detach()))
        now = units if moving is None else moving(step)
        gradients = [unit.gradient() for unit in now]
        norm = float(gradient_norm(gradients))
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            return Trained(losses, math.nan, True)
        clip = min(1.0, values.grad_clip / (norm + 1e-6))
        if after_backward is not None:
            after_backward(step, clip)
        for unit, gradient in zip(now, gradients, strict=True):
            peak = rate if unit.rate is None else unit.rate
            unit.update(gradient * clip, learning_rate_at(step, values.steps, peak, values.warmup, values.lr_floor))
        if after_step is not None:
            after_step(step)
        seconds.append(time.perf_counter() - began)
    return Trained(losses, sorted(seconds)[len(seconds) // 2], False)
