"""Frozen dense weights in 16 bits: widened a block of rows at a time, so that no fp32 copy exists.

A checkpoint's bf16 weights are exact in fp32, so computing in fp32 from 16-bit storage loses nothing and halves the
memory; autograd would keep the widened copy for the backward, therefore the product is its own function, which widens
again. Where the device computes in the stored type itself (bf16 on a GPU), it is an ordinary linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements widened at a time: 64 MiB in fp32, where the head of a 151,936-wide vocabulary would be 1.2 GB at once.
WIDENED_ELEMENTS = 1 << 24


class WidenedLinear(torch.autograd.Function):
    """y = x W^T + b with a frozen W in 16 bits and x in a wider type."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        blocks = weight.split(_rows_at_once(weight))
        biases = [None] * len(blocks) if bias is None else bias.to(x.dtype).split(_rows_at_once(weight))
        parts = [F.linear(x, rows.to(x.dtype), b) for rows, b in zip(blocks, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad_y):
        (weight,) = ctx.saved_tensors
        step = _rows_at_once(weight)
        blocks = zip(grad_y.split(step, dim=-1), weight.split(step), strict=True)
        grad_x, *rest = (part @ rows.to(grad_y.dtype) for part, rows in blocks)
        for part in rest:
            grad_x += part
        return grad_x, None, None


def _rows_at_once(weight: Tensor) -> int:
    return max(1, WIDENED_ELEMENTS // max(1, weight.shape[1]))


class FrozenLinear(nn.Module):
    """An `nn.Linear` whose weight never changes and stays in the checkpoint's 16-bit type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return WidenedLinear.apply(x, self.weight, self.bias)


class FrozenEmbedding(nn.Module):
    """An `nn.Embedding` that stays in 16 bits and gives vectors in the compute type."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)
