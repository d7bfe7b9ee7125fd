"""Perplexity of a set of sequences, layer by layer over chunks, and how the routers spread their tokens meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usaf.loss import loss_sum
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates

COLLAPSED_SHARE = 0.01
"""An expert with less than this part of its even share of the tokens counts as starved."""


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood in nats; routing_entropy: 1 is an even spread over experts, 0 a single one."""

    name: str
    loss: float
    tokens: int
    routing_entropy: float
    starved_experts: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def expert_counts(model: SparseModel, start: int) -> Iterator[dict[int, Tensor]]:
    """layer -> tokens that each expert got, counted while the block runs."""
    counts: dict[int, Tensor] = {}
    hooks = []
    for moe in model.moe_from(start):
        experts = model.model.get_submodule(moe.names[0].rpartition(".")[0])
        counts[moe.layer] = torch.zeros(moe.banks[0].num_experts, dtype=torch.int64)

        def count(_module: nn.Module, args: tuple[Tensor, ...], layer: int = moe.layer) -> None:
            ids = args[1].detach().cpu().reshape(-1)
            size = len(counts[layer])
            counts[layer] += torch.bincount(ids[ids < size], minlength=size)

        hooks.append(experts.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(
    model: SparseModel, states: BoundaryStates, name: str, head_chunk_tokens: int, progress: Callable[[int], None]
) -> Evaluation:
    """The loss over every chunk of `states`, in their order; `progress` gets the tokens of each."""
    total, tokens = [], 0
    with expert_counts(model, states.start) as counts:
        for chunk in states.chunks:
            batch = states.rows.batch(chunk)
            hidden = model.run_layers(batch, states.start, model.num_layers, states.hidden(chunk))
            summed, targets = loss_sum(model, hidden, batch, head_chunk_tokens)
            total.append(summed)
            tokens += targets
            progress(sum(batch.lengths))
    entropies = [_entropy(c) for c in counts.values()]
    starved = sum(int((c < COLLAPSED_SHARE * c.sum() / len(c)).sum()) for c in counts.values())
    return Evaluation(name, math.fsum(total) / max(1, tokens), tokens, sum(entropies) / max(1, len(entropies)), starved)


def _entropy(counts: Tensor) -> float:
    """Entropy of the shares over that of an even spread."""
    shares = counts[counts > 0].double() / max(1, int(counts.sum()))
    return float(-(shares * shares.log()).sum() / math.log(max(2, len(counts))))
