"""Adam for sparse deltas and whole routers and norms, and the learning-rate schedule.

One update of a weight of age t (updates it has seen, this one included), gradient g:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr decay) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

(Kingma and Ba 2015, algorithm 1; decoupled decay as in Loshchilov and Hutter 2019. On a delta, decay pulls the weight
back to its pretrained value.) What torch.optim.Adam lacks is an age per *weight*: reselection replaces some weights
while the others keep their moments, and one shared t would leave the new ones almost uncorrected. Weights born together
are a generation, so the powers are taken once a generation, in double, and gathered.

A grown weight starts with the moments that `seen` updates with the measured mean gradient would have left (SpIEL's
seeding, Ansell et al. 2024), so that bias correction gives back exactly that mean.

Only operators that DirectML runs itself: no lerp (inside torch's AdamW), nothing fused, no foreach, no linalg.
Left out: 8-bit moments, AMSGrad, parameter groups (one object per vector, the rate given at each step).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

LARGEST_NORM_RATE = 0.01
"""Norms multiply what passes them by factors near 1, so that this is a hundredth of one a step, whatever a model's
width; the loss hardly turns along them, and says nothing of a rate."""


class Adam:
    """Adam's state for one parameter of any shape, with an age per weight."""

    def __init__(self, shape_like: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Zero moments of `shape_like`'s shape on its device, all weights of age 0."""
        self.betas = betas
        self.eps = eps
        self.exp_avg = torch.zeros(shape_like.shape, dtype=torch.float32, device=shape_like.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.generation = torch.zeros(shape_like.shape, dtype=torch.int32, device=shape_like.device)
        """Per weight, the position of its generation in `births`."""
        self.births: list[int] = [0]
        """Per generation, the value of `updates` at which its age was 0."""
        self.updates = 0

    @torch.no_grad()
    def step(self, parameter: Tensor, gradient: Tensor, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Update `parameter` (float32) in place from `gradient` of the same shape."""
        assert parameter.shape == gradient.shape == self.exp_avg.shape, (parameter.shape, gradient.shape)
        assert parameter.dtype == torch.float32, parameter.dtype
        gradient = gradient.to(torch.float32)
        self.updates += 1
        beta1, beta2 = self.betas
        self.exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if weight_decay:
            parameter.mul_(1 - learning_rate * weight_decay)
        ages = [self.updates - birth for birth in self.births]
        rates = [-learning_rate / (1 - beta1**age) for age in ages]
        scales = [1 / math.sqrt(1 - beta2**age) for age in ages]
        denominator = self.exp_avg_sq.sqrt()
        if len(set(ages)) == 1:
            denominator.mul_(scales[0]).add_(self.eps)
            parameter.addcdiv_(self.exp_avg, denominator, value=rates[0])
        else:
            denominator.mul_(self._per_weight(scales)).add_(self.eps)
            parameter.addcdiv_(self._per_weight(rates).mul_(self.exp_avg), denominator)

    @torch.no_grad()
    def regrow(self, from_old: Tensor, mean_gradient: Tensor, mean_square: Tensor, seen: int) -> None:
        """Follow a reselection of a parameter vector `[n]` (see `selection.Reselection`).

        `from_old`: int64 `[n]`, each new weight's old position, or -1 where it is grown. Kept weights move with moments
        and age untouched. The grown ones, in the order in which they stand in `from_old`, get moments whose
        bias-corrected values are `mean_gradient` and `mean_square` (`[grown]`, means over the gradients of `seen`
        updates), and the age `seen`; with seen = 0 they start from zero.
        """
        assert from_old.shape == self.exp_avg.shape, (from_old.shape, self.exp_avg.shape)
        assert from_old.dim() == 1, "only a vector is reselected"
        assert seen >= 0, seen
        grown = (from_old < 0).nonzero().flatten()
        assert mean_gradient.shape == mean_square.shape == grown.shape, (mean_gradient.shape, grown.shape)
        source = from_old.clamp(min=0)
        beta1, beta2 = self.betas
        for state, mean, beta in ((self.exp_avg, mean_gradient, beta1), (self.exp_avg_sq, mean_square, beta2)):
            seeded = mean.to(torch.float32) * (1 - beta**seen)
            state.copy_(state.index_select(0, source).scatter_(0, grown, seeded))
        if len(grown) == 0:
            self.generation.copy_(self.generation.index_select(0, source))
            return
        self.births.append(self.updates - seen)
        newest = torch.full_like(grown, len(self.births) - 1, dtype=torch.int32)
        self.generation.copy_(self.generation.index_select(0, source).scatter_(0, grown, newest))

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """The whole state; the tensors are this object's own, not copies."""
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "generation": self.generation,
            "births": list(self.births),
            "updates": [self.updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the values of a `state_dict` of the same shape, from any device."""
        for name in ("exp_avg", "exp_avg_sq", "generation"):
            own = getattr(self, name)
            assert own.shape == state[name].shape, (name, own.shape, state[name].shape)
            own.copy_(state[name])
        self.births = [int(birth) for birth in state["births"]]
        (self.updates,) = (int(updates) for updates in state["updates"])

    def _per_weight(self, per_generation: list[float]) -> Tensor:
        table = torch.tensor(per_generation, dtype=torch.float32, device=self.generation.device)
        return table.index_select(0, self.generation.flatten()).reshape(self.generation.shape)


def learning_rate_at(step: int, steps: int, peak: float, warmup_fraction: float, floor: float) -> float:
    """The rate of the update number `step` (0 .. steps - 1): linear warm-up to `peak`, then cosine to floor * peak.

    The warm-up takes w = max(1, round(warmup_fraction * steps)) updates, the first at peak / w, the last at peak; the
    last update of the run has floor * peak (unless the run is all warm-up).
    Source: Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    assert 0 <= step < steps, (step, steps)
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def gradient_norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, float32 without dimensions; not finite where one of them is not."""
    sums = [torch.mul(gradient, gradient).sum() for gradient in (grad.to(torch.float32) for grad in grads)]
    assert sums, "no gradients"
    return torch.stack(sums).sum().sqrt()
