"""The loss of a plain head, z = W x + b, and its gradients, a block of the vocabulary at a time and without autograd.

Every core takes whole blocks (`workers`), makes their weights in a buffer of its own (widened where they are stored in
16 bits, with the deltas of a `SparseHead`), and turns the logits into exponentials where they lie. For block B of a
row, with its largest logit m_B and s_B = sum exp(z - m_B):

    lse  = log sum_B s_B exp(m_B)                            the row's log-normaliser; its loss is lse - z[target]
    dz   = exp(z - m_B) exp(m_B - lse) - onehot(target)
    dx   = sum_B dz_B W_B                                    dW at the trained entries: `kernels.sampled`

so one exponential a logit serves loss and gradients, and the weights are made once for each of the two products. `loss`
has the plain version, for every other head; a frozen head runs here on the CPU in fp32 alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usaf.linear import FrozenLinear
from usaf.sparse_head import HeadLoss, SparseHead, subtract_one_hot, wide_dtype
from usaf.workers import number_of_workers, run_shares, shares


@dataclass
class BlockOfLogits:
    """Logits of one block: exp(z - m) [n, rows], m and s [n] (see the module); which tokens' targets lie in it, and
    where; and the targets' logits, 0 of the others."""

    part: int
    exponentials: Tensor
    largest: Tensor
    summed: Tensor
    here: Tensor
    within: Tensor
    of_targets: Tensor


def runs_fused(hidden: Tensor) -> bool:
    """Whether a frozen head's loss is made here."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32


@torch.no_grad()
def loss_sum(layer: FrozenLinear | SparseHead, hidden: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood. hidden: [n, H]; targets: int64 [n]."""
    return _logits(as_sparse(layer), hidden, targets, keep=False)[0]


@torch.no_grad()
def loss_and_gradients(layer: FrozenLinear | SparseHead, hidden: Tensor, targets: Tensor) -> HeadLoss:
    """The loss with its gradients; arguments as in `loss_sum`."""
    head = as_sparse(layer)
    loss, normaliser, blocks = _logits(head, hidden, targets, keep=True)
    of_delta = torch.zeros(len(head.delta), dtype=normaliser.dtype, device=hidden.device)
    squares = None
    if head.captured is not None:
        squares = torch.zeros(head.out_features, dtype=normaliser.dtype, device=hidden.device)

    @torch.no_grad()
    def work(parts: list[int]) -> Tensor:
        gradient = torch.zeros(hidden.shape, dtype=normaliser.dtype, device=hidden.device)
        buffer = _buffer(head, hidden)
        for block in (blocks[part] for part in parts):
            dz = block.exponentials.mul_((block.largest - normaliser).exp_().unsqueeze(1))
            subtract_one_hot(dz, block.here, block.within)
            if squares is not None:
                squares[slice(*head.rows_of(block.part))] = dz.square().sum(0)
            dz = dz.to(hidden.dtype)
            _add_product(gradient, dz, head.block(block.part, hidden.dtype, buffer=buffer))
            span = head.span(block.part)
            if span.start < span.stop:
                of_delta[span] = head.sampled(block.part, dz, hidden).to(of_delta.dtype)
        return gradient

    gradient, *others = run_shares(work, _shares(head, hidden))
    for other in others:
        gradient += other
    return HeadLoss(loss, gradient.to(hidden.dtype), of_delta if len(of_delta) else None, normaliser, squares)


def as_sparse(layer: FrozenLinear | SparseHead) -> SparseHead:
    """A frozen layer as a head without deltas: a view, nothing is copied."""
    return layer if isinstance(layer, SparseHead) else SparseHead(layer)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logits(
    head: SparseHead, hidden: Tensor, targets: Tensor, keep: bool
) -> tuple[float, Tensor, list[BlockOfLogits]]:  # fmt: skip
    """(summed loss, log-normaliser [n], the blocks; without their exponentials unless `keep`)."""

    @torch.no_grad()
    def work(parts: list[int]) -> list[BlockOfLogits]:
        buffer, done = _buffer(head, hidden), []
        for p in parts:
            z = head.block_logits(p, hidden, head.block(p, hidden.dtype, buffer=buffer))
            here, within = head.targets_in(p, targets)
            of_targets = torch.where(here, z.gather(1, within.unsqueeze(1)).squeeze(1), torch.zeros_like(z[:, 0]))
            largest = z.amax(1)
            z.sub_(largest.unsqueeze(1)).exp_()
            done.append(BlockOfLogits(p, z if keep else z[:0], largest, z.sum(1), here, within, of_targets))
        return done

    blocks = [block for done in run_shares(work, _shares(head, hidden)) for block in done]
    blocks.sort(key=lambda block: block.part)
    of_target = torch.stack([block.of_targets for block in blocks]).sum(0)
    largest = torch.stack([block.largest for block in blocks]).amax(0)
    sums = [block.summed * (block.largest - largest).exp() for block in blocks]
    normaliser = largest + torch.stack(sums).sum(0).log()
    return float((normaliser - of_target).cpu().double().sum()), normaliser, blocks


def _shares(head: SparseHead, hidden: Tensor) -> list[list[int]]:
    rows = [head.rows_of(p) for p in range(head.num_parts)]
    workers = number_of_workers(len(hidden) * head.numel, head.num_parts) if hidden.device.type == "cpu" else 1
    return shares([end - first for first, end in rows], workers)


def _buffer(head: SparseHead, hidden: Tensor) -> Tensor:
    """Where a block's weights are made; empty memory is only touched where they are."""
    return torch.empty(head.part_rows, head.in_features, dtype=wide_dtype(hidden.dtype), device=hidden.device)
