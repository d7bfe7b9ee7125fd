"""Frozen dense weights in 16 bits: widened for one product at a time, so that no fp32 copy of the model exists.

A checkpoint's bf16 weights are exact in fp32, so computing in fp32 from 16-bit storage loses nothing and halves the
memory; autograd would keep the widened copy for the backward, therefore the product is its own function, which widens
again. Where the device computes in the stored type itself (bf16 on a GPU), it is an ordinary linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDENED_TYPES = (torch.float16, torch.bfloat16)


class WidenedLinear(torch.autograd.Function):
    """y = x W^T + b with a frozen W in 16 bits and x in a wider type."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return grad_y @ weight.to(grad_y.dtype), None, None


class FrozenLinear(nn.Module):
    """An `nn.Linear` whose weight never changes and stays in the checkpoint's 16-bit type."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
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

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)
