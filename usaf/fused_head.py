"""The loss of a plain head, z = W x + b, and its gradient for x, with W frozen in 16 or 32 bits, on the CPU in fp32.

Logits are made a block of the vocabulary at a time; every core takes whole blocks (`workers`), widens their weights in
a buffer of its own, and turns the logits into exponentials where they lie. For block B of a row, with its largest logit
m_B and s_B = sum exp(z - m_B):

    lse  = log sum_B s_B exp(m_B)                            the row's log-normaliser; its loss is lse - z[target]
    dz   = exp(z - lse) - onehot(target)
    dx   = sum_B exp(m_B - lse) (exp(z - m_B) W_B)  -  W[target]

so one exponential a logit serves loss and gradient, neither probabilities nor a one-hot are formed, and the weights are
widened once for each of the two products. `loss` has the plain version, for every other head, device and type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from usaf.linear import FrozenLinear
from usaf.workers import number_of_workers, run_shares, shares

BLOCK_ELEMENTS = 1 << 21
"""Weights widened at a time by each core: 8 MB."""


@dataclass
class BlockOfLogits:
    """Logits of rows [first, end) of the head's weight: exp(z - m) [n, end - first], m and s [n] (see the module)."""

    first: int
    end: int
    exponentials: Tensor
    largest: Tensor
    summed: Tensor


def runs_fused(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32


@torch.no_grad()
def loss_sum(head: FrozenLinear, hidden: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood. hidden: fp32 [n, H]; targets: int64 [n]."""
    return _logits(head, hidden, targets, keep=False)[0]


@torch.no_grad()
def loss_and_gradient(head: FrozenLinear, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """(summed negative log-likelihood, its gradient at `hidden` [n, H]); arguments as in `loss_sum`."""
    loss, normaliser, blocks = _logits(head, hidden, targets, keep=True)

    @torch.no_grad()
    def work(parts: list[int]) -> Tensor:
        gradient, buffer = torch.zeros_like(hidden), _buffer(head)
        for part in parts:
            block = blocks[part]
            share = (block.largest - normaliser).exp_().unsqueeze(1)
            gradient.addcmul_(block.exponentials @ _widened(head, block.first, block.end, buffer), share)
        return gradient

    gradient, *others = run_shares(work, _shares(head, hidden))
    for other in others:
        gradient += other
    return loss, gradient.sub_(head.weight.index_select(0, targets))


def _logits(
    head: FrozenLinear, hidden: Tensor, targets: Tensor, keep: bool
) -> tuple[float, Tensor, list[BlockOfLogits]]:
    """(summed loss, log-normaliser [n], the blocks; without their exponentials unless `keep`)."""
    spans = list(_spans(head))

    @torch.no_grad()
    def work(parts: list[int]) -> list[tuple[BlockOfLogits, Tensor, Tensor]]:
        buffer, done = _buffer(head), []
        for first, end in (spans[part] for part in parts):
            z = hidden @ _widened(head, first, end, buffer).t()
            if head.bias is not None:
                z += head.bias[first:end]
            rows = ((targets >= first) & (targets < end)).nonzero().squeeze(1)
            of_targets = z[rows, targets[rows] - first]
            largest = z.amax(1)
            z.sub_(largest.unsqueeze(1)).exp_()
            summed = z.sum(1)
            done.append((BlockOfLogits(first, end, z if keep else z[:0], largest, summed), rows, of_targets))
        return done

    done = [block for blocks in run_shares(work, _shares(head, hidden)) for block in blocks]
    done.sort(key=lambda entry: entry[0].first)
    of_target = torch.zeros(len(hidden))
    for _, rows, values in done:
        of_target[rows] = values
    blocks = [block for block, _, _ in done]
    normaliser = torch.stack([block.summed.log() + block.largest for block in blocks]).logsumexp(0)
    return float((normaliser - of_target).double().sum()), normaliser, blocks


def _spans(head: FrozenLinear) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ELEMENTS // head.in_features)
    for first in range(0, head.out_features, step):
        yield first, min(first + step, head.out_features)


def _shares(head: FrozenLinear, hidden: Tensor) -> list[list[int]]:
    sizes = [end - first for first, end in _spans(head)]
    return shares(sizes, number_of_workers(len(hidden) * head.in_features * head.out_features, len(sizes)))


def _buffer(head: FrozenLinear) -> Tensor:
    rows = min(head.out_features, max(1, BLOCK_ELEMENTS // head.in_features))
    return torch.empty(rows if head.weight.dtype != torch.float32 else 0, head.in_features)


def _widened(head: FrozenLinear, first: int, end: int, buffer: Tensor) -> Tensor:
    """Rows of the weight in fp32, in `buffer` unless they are."""
    rows = head.weight[first:end]
    return rows if rows.dtype == torch.float32 else buffer[: end - first].copy_(rows)
