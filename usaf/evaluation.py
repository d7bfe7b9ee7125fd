"""Perplexity of a set of sequences, chunk by chunk, and how the routers of trainable layers spread their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from usaf.data import Batch
from usaf.loss import loss_sum
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates

COLLAPSED_SHARE = 0.01
"""An expert with less than this part of its even share of the tokens counts as starved."""


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood in nats (nan without a token); tokens: predicted ones, which the loss counts.

    routing_entropy: mean over the layers, 1 for an even spread over the experts, 0 for a single one.
    starved_experts: experts below `COLLAPSED_SHARE` of their even share, over all layers.
    """

    name: str
    loss: float
    tokens: int
    routing_entropy: float
    starved_experts: int

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that exceeds a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class ExpertLoad:
    """Counts, while it is entered, the tokens that each expert of the layers from `start` gets.

    counts: layer -> int64 [num_experts]. real: bool [T], the tokens of the batch that runs which are no padding.
    """

    def __init__(self, model: SparseModel, start: int) -> None:
        self.model, self.layers = model, model.moe_from(start)
        self.counts = {moe.layer: torch.zeros(moe.banks[0].num_experts, dtype=torch.int64) for moe in self.layers}
        self.real = torch.zeros(0, dtype=torch.bool)

    def expect(self, batch: Batch) -> None:
        """Announce the batch that runs next."""
        lengths = torch.tensor(batch.lengths).unsqueeze(1)
        self.real = (torch.arange(batch.input_ids.shape[1]) < lengths).reshape(-1)

    def __enter__(self) -> ExpertLoad:
        self.hooks = []
        for moe in self.layers:
            experts = self.model.model.get_submodule(moe.names[0].rpartition(".")[0])
            self.hooks.append(experts.register_forward_pre_hook(partial(self._count, self.counts[moe.layer])))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, counts: Tensor, _experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        ids = args[1].detach().cpu()[self.real].reshape(-1)
        counts += torch.bincount(ids[ids < len(counts)], minlength=len(counts))  # ids >= E are masked slots


@torch.no_grad()
def evaluate(
    model: SparseModel, states: BoundaryStates, name: str, head_chunk_tokens: int, progress: Callable[[int], None]
) -> Evaluation:
    """The loss over every chunk of `states`, in their order; `progress` gets the tokens of each."""
    total, tokens = [], 0
    with ExpertLoad(model, states.start) as load:
        for chunk in states.chunks:
            batch = states.rows.batch(chunk)
            load.expect(batch)
            hidden = model.run_layers(batch, states.start, model.num_layers, states.hidden(chunk))
            summed, targets = loss_sum(model, hidden, batch, head_chunk_tokens)
            total.append(summed)
            tokens += targets
            progress(sum(batch.lengths))
    counts = list(load.counts.values())
    entropy = math.fsum(routing_entropy(c) for c in counts) / max(1, len(counts))
    loss = math.fsum(total) / tokens if tokens else math.nan
    return Evaluation(name, loss, tokens, entropy, sum(starved_experts(c) for c in counts))


def routing_entropy(counts: Tensor) -> float:
    """Entropy of the experts' shares of the tokens over that of an even spread. counts: int64 [num_experts]."""
    shares = counts[counts > 0].double() / max(1, int(counts.sum()))
    return abs(float((shares * shares.log()).sum())) / math.log(max(2, len(counts)))


def starved_experts(counts: Tensor) -> int:
    """Experts that got less than `COLLAPSED_SHARE` of an even share of the tokens. counts: int64 [num_experts]."""
    return int((counts < COLLAPSED_SHARE * int(counts.sum()) / len(counts)).sum())
