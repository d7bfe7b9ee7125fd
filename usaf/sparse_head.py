"""The output layer with sparse trainable deltas: logits = (base + delta) x + b, a block of the vocabulary's rows at a
time.

Its base is the checkpoint's own weight, in the type it is stored in and never written to, so it may be a view of the
file, or the embeddings' (a head that shares these is trained alone: the input side stays as it is).

What weight gradients need of a backward would be dz for every logit, 600 KB a token at a vocabulary of 151,936. Kept
are the hidden state, the target and the row's log-normaliser instead, from which dz = exp(z - lse) - onehot(target) is
formed again a block at a time, with the deltas as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from usaf.linear import FrozenLinear
from usaf.sparse_weights import Deltas, Factors, SparseWeights
from usaf.workspace import Memory

BLOCK_ELEMENTS = 1 << 21
"""Weights of a block: 8 MB in fp32."""


def rows_of_block(layer: FrozenLinear) -> int:
    return min(layer.out_features, max(1, BLOCK_ELEMENTS // layer.in_features))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are computed in: fp32, or float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class HeadGradients(Factors):
    """n tokens that met the head in one backward."""

    head: SparseHead
    inputs: Tensor  # [n, H]
    targets: Tensor  # int64 [n]
    normaliser: Tensor  # [n], log of the sum of exponentials, fp32 or float64
    deltas: Deltas  # as they were
    loss_scale: float  # of the gradient: 1 / targets of the step
    scale: float = 1.0  # of the gradient as a whole, where its step was clipped

    @cached_property
    def starts(self) -> list[int]:  # type: ignore[override]
        return [len(self.inputs) * p for p in range(self.head.num_parts + 1)]

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    @torch.no_grad()
    def part(self, p: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        logits = self.head.block_logits(p, self.inputs, self.head.block(p, self.inputs.dtype, self.deltas))
        dz = logits.sub_(self.normaliser.unsqueeze(1)).exp_()
        at, within = self.head.targets_in(p, self.targets)
        dz[at, within] -= 1.0
        return dz.mul_(self.loss_scale * self.scale).to(dtype), self.inputs.to(dtype)

    def scaled(self, scale: float) -> HeadGradients:
        return dataclasses.replace(self, scale=scale)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.normaliser).all() and torch.isfinite(self.inputs).all())

    def tensors(self) -> dict[str, Tensor]:
        return {
            "inputs": self.inputs, "targets": self.targets, "normaliser": self.normaliser, "delta": self.deltas.values,
            "loss_scale": torch.tensor(self.loss_scale, dtype=torch.float64),
        }  # fmt: skip

    def kept(self, memory: Memory) -> HeadGradients:
        return dataclasses.replace(self, inputs=memory.keep(self.inputs))

    @classmethod
    def joined(cls, entries: Sequence[HeadGradients]) -> HeadGradients:
        """Of several chunks of one backward."""
        return dataclasses.replace(
            entries[0], inputs=torch.cat([e.inputs for e in entries]), targets=torch.cat([e.targets for e in entries]),
            normaliser=torch.cat([e.normaliser for e in entries]),
        )  # fmt: skip


class SparseHead(SparseWeights[HeadGradients]):
    """An output layer [vocabulary, H] whose best entries train; a part is a block of rows."""

    def __init__(self, layer: FrozenLinear) -> None:
        rows = rows_of_block(layer)
        super().__init__(-(-layer.out_features // rows), rows, layer.in_features, layer.weight.device,
                         layer.weight.numel())  # fmt: skip
        self.weight, self.bias = layer.weight, layer.bias
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def rows_of(self, p: int) -> tuple[int, int]:
        """The first row of block p and the end of its rows."""
        first = p * self.part_rows
        return first, min(first + self.part_rows, self.out_features)

    def base_weight(self, p: int, dtype: torch.dtype) -> Tensor:
        first, end = self.rows_of(p)
        return self.weight[first:end].to(dtype)

    def restored(self, named: dict[str, Tensor]) -> HeadGradients:
        inputs, targets, normaliser, delta = (
            named[name].to(self.device) for name in ("inputs", "targets", "normaliser", "delta")
        )
        deltas = dataclasses.replace(self.present(), values=delta)  # no reselection has come between
        return HeadGradients(self, inputs, targets, normaliser, deltas, float(named["loss_scale"]))

    def block(
        self, p: int, dtype: torch.dtype, deltas: Deltas | None = None, buffer: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """[rows, H] of block p: base + delta, summed in fp32 (float64 for float64) and rounded once to `dtype`.

        buffer: [part_rows, H] of that wider type, which may be written to and returned in parts.
        """
        first, end = self.rows_of(p)
        base, deltas, wide = self.weight[first:end], deltas or self.present(), wide_dtype(dtype)
        if deltas.part_starts[p] == deltas.part_starts[p + 1] and base.dtype == dtype:
            return base
        weight = base.to(wide, copy=True) if buffer is None else buffer[: end - first].copy_(base)
        deltas.add_to(weight, p)
        return weight.to(dtype)

    def block_logits(self, p: int, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, rows] of block p, whose weights are `weight`, in fp32 or float64."""
        z = (hidden @ weight.t()).to(wide_dtype(hidden.dtype))
        if self.bias is not None:
            first, end = self.rows_of(p)
            z += self.bias[first:end]
        return z

    def targets_in(self, p: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(the tokens whose target lies in block p, its place there)."""
        first, end = self.rows_of(p)
        at = ((targets >= first) & (targets < end)).nonzero().squeeze(1)
        return at, targets[at] - first

    def forward(self, x: Tensor) -> Tensor:
        """[..., vocabulary], in the type of x. Deltas are constants here: `head_loss` has their gradients."""
        spans = (self.rows_of(p) for p in range(self.num_parts))
        biases = [None if self.bias is None else self.bias[first:end].to(x.dtype) for first, end in spans]
        return torch.cat([F.linear(x, self.block(p, x.dtype), bias) for p, bias in enumerate(biases)], dim=-1)

    def receive(
        self, inputs: Tensor, targets: Tensor, normaliser: Tensor, gradient: Tensor | None, loss_scale: float
    ) -> None:  # fmt: skip
        """What one chunk's backward gave: the deltas' gradient, unscaled, is added to `delta.grad`; and while
        `captured` is a list, what weight gradients need is kept."""
        if gradient is not None and self.delta.requires_grad:
            scaled = gradient.to(self.delta.dtype) * loss_scale
            self.delta.grad = scaled if self.delta.grad is None else self.delta.grad + scaled
        if self.captured is not None:
            now = self.present()
            deltas = self.captured[0].deltas if self.captured else dataclasses.replace(now, values=now.values.clone())
            self.captured.append(HeadGradients(self, inputs, targets, normaliser, deltas, loss_scale))
