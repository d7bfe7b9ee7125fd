"""The language-model loss in chunks of tokens: logits of a 151,936-wide vocabulary are never held for a whole batch.

Each chunk's logits, loss and input gradient are formed at once and only the gradient is kept. Positions without a
target (padding, prompts, the last of a document) never reach the head. Where it is a plain linear layer that trains, or
one on the CPU, `head_loss` computes the same without autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from usaf import head_loss
from usaf.data import NO_TARGET, Batch, batch_loss_targets
from usaf.linear import FrozenLinear
from usaf.model import SparseModel
from usaf.sparse_head import SparseHead


def count_targets(batch: Batch) -> int:
    return int((batch_loss_targets(batch.labels) != NO_TARGET).sum())


def _chunks(batch: Batch, chunk_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(flat positions that have a target, their targets) a chunk, int64 on the host; none without targets."""
    targets = batch_loss_targets(batch.labels).reshape(-1)
    positions = (targets != NO_TARGET).nonzero().squeeze(1)
    pieces = (positions[i : i + chunk_tokens] for i in range(0, len(positions), chunk_tokens))
    return [(piece, targets[piece]) for piece in pieces]


def _chunk_loss(model: SparseModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood, in fp32 whatever 16-bit type the logits have (float64 stays)."""
    logits = model.logits(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum")


@torch.no_grad()
def loss_sum(model: SparseModel, hidden: Tensor, batch: Batch, chunk_tokens: int) -> tuple[float, int]:
    """(summed negative log-likelihood, targets) of a batch. hidden: [B, S, H] after the final norm."""
    device, flat = hidden.device, hidden.reshape(-1, hidden.shape[-1])
    chunks = _chunks(batch, chunk_tokens)
    head = fused(model, hidden)
    sums = []
    for p, t in chunks:
        chunk, t = flat.index_select(0, p.to(device)), t.to(device)
        sums.append(float(_chunk_loss(model, chunk, t)) if head is None else head_loss.loss_sum(head, chunk, t))
    return math.fsum(sums), sum(len(targets) for _, targets in chunks)


def fused(model: SparseModel, hidden: Tensor) -> FrozenLinear | SparseHead | None:
    """The head, where `head_loss` is to compute its loss for this hidden state."""
    if model.head is not None:
        return model.head
    return model.plain_head if head_loss.runs_fused(hidden) else None


def loss_and_gradient(
    model: SparseModel, hidden: Tensor, batch: Batch, chunk_tokens: int, scale: float
) -> tuple[float, Tensor]:
    """(summed negative log-likelihood, scale * its gradient at `hidden`); a head that trains receives its own.

    Args:
        hidden: [B, S, H] after the final norm, detached or not.
        scale: 1 / number of targets gives the gradient of the mean. The gradient is scaled, never the loss, so that
            a 16-bit loss cannot overflow.

    Returns:
        The sum as a float (the caller checks that it is finite), the gradient [B, S, H].
    """
    device, width = hidden.device, hidden.shape[-1]
    flat = hidden.detach().reshape(-1, width)
    gradient = torch.zeros_like(flat)
    head = fused(model, hidden)
    sums = []
    for p, t in _chunks(batch, chunk_tokens):
        p, t = p.to(device), t.to(device)
        chunk = flat.index_select(0, p)
        if head is not None:
            found = head_loss.loss_and_gradients(head, chunk, t)
            loss, chunk_gradient = found.loss, found.hidden
            if isinstance(head, SparseHead):
                head.receive(chunk, t, found, scale)
        else:
            loss, chunk_gradient = _loss_and_gradient(model, chunk, t)
        sums.append(loss)
        gradient.scatter_(0, p.unsqueeze(1).expand(-1, width), chunk_gradient * scale)
    return math.fsum(sums), gradient.view_as(hidden)


def _loss_and_gradient(model: SparseModel, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """As `loss_and_gradient`, of one chunk and unscaled."""
    hidden = hidden.requires_grad_()
    loss = _chunk_loss(model, hidden, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return float(loss.detach()), gradient
