"""The output layer with sparse trainable deltas: logits = (base + delta) x + b, a block of the vocabulary's rows at a
time.

Its base is the checkpoint's own weight, in the type it is stored in and never written to, so it may be a view of the
file, or the embeddings' (a head that shares these is trained alone: the input side stays as it is).

What weight gradients need of a backward would be dz for every logit, 600 KB a token at a vocabulary of 151,936. Kept
are the hidden state x, the target and the log-normaliser of each token instead, from which dz = exp(z - lse) -
onehot(target) is formed again a block at a time, with the deltas as they were. And, for each row r of the weight, the
sum of dz_r^2 over the tokens: by Cauchy and Schwarz

    |dW[r, c]| <= |dz_r| |x_c|,

so rows that cannot have one of the largest gradients, in language most of them, need not be formed again at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usaf.linear import FrozenLinear
from usaf.sparse_weights import Deltas, Factors, SparseWeights
from usaf.workspace import Memory, own_pages

BLOCK_ELEMENTS = 1 << 21
"""Weights of a block: 8 MB in fp32."""


def rows_of_block(layer: FrozenLinear) -> int:
    return min(layer.out_features, max(1, BLOCK_ELEMENTS // layer.in_features))


def subtract_one_hot(dz: Tensor, here: Tensor, within: Tensor) -> None:
    """Of each row of dz [n, rows] for which `here` [n] holds, 1 from the entry `within` [n]."""
    dz.scatter_add_(1, within.unsqueeze(1), -here.to(dz.dtype).unsqueeze(1))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are computed in: fp32, or float64."""
    return torch.promote_types(dtype, torch.float32)


class HeadLoss(NamedTuple):
    """Of n tokens, by `head_loss`. loss: the summed negative log-likelihood; hidden: its gradient at the hidden states
    [n, H]; delta: that at the head's deltas [trained], None where it has none; normaliser: [n]; squares: see
    `HeadGradients`, None unless the head captures."""

    loss: float
    hidden: Tensor
    delta: Tensor | None
    normaliser: Tensor
    squares: Tensor | None


@dataclass(frozen=True)
class HeadGradients(Factors):
    """n tokens that met the head in one backward."""

    head: SparseHead
    inputs: Tensor  # [n, H]
    targets: Tensor  # int64 [n]
    normaliser: Tensor  # [n], log of the sum of exponentials, fp32 or float64
    squares: Tensor  # [vocabulary]: sum of dz^2 over the tokens
    deltas: Deltas  # as they were
    loss_scale: float  # of the gradient: 1 / targets of the step
    scale: float = 1.0  # of the gradient as a whole, where its step was clipped

    @cached_property
    def starts(self) -> list[int]:  # type: ignore[override]
        return [len(self.inputs) * p for p in range(self.head.num_parts + 1)]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.inputs.dtype)  # dz times 1 / targets would vanish in 16 bits

    @torch.no_grad()
    def part(
        self, p: int, dtype: torch.dtype = torch.float32, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight = self.head.block(p, self.inputs.dtype, self.deltas)
        if outputs is not None:
            weight = weight.index_select(0, outputs)
        logits = self.head.block_logits(p, self.inputs, weight, outputs)
        dz = logits.sub_(self.normaliser.unsqueeze(1)).exp_()
        here, within = self.head.targets_in(p, self.targets)
        if outputs is not None:
            place = torch.full((self.head.part_rows,), -1, device=within.device)
            place.scatter_(0, outputs.to(torch.int64), torch.arange(len(outputs), device=within.device))
            within = place.index_select(0, within)
            here, within = here & (within >= 0), within.clamp(min=0)
        subtract_one_hot(dz, here, within)
        return dz.mul_(self.loss_scale * self.scale).to(dtype), self.inputs.to(dtype)

    @cached_property
    def largest_column(self) -> Tensor:
        """max |x_c|."""
        return self.inputs.to(self.squares.dtype).square().sum(0).amax().sqrt()

    @cached_property
    def largest_input(self) -> Tensor:
        """max |x_tc|."""
        return self.inputs.to(self.squares.dtype).abs().amax()

    def bounds(self, p: int, squares: bool = False) -> Tensor | None:
        if self.inputs.device.type != "cpu" or self.inputs.dtype != self.dtype:
            return None  # formed again in 16 bits, logits may be off by more than any bound allows
        first, end = self.head.rows_of(p)
        if squares:  # the sum of dz^2 x^2 is at most that of dz^2 times the largest x^2
            return self.squares[first:end] * (self.largest_input * (self.loss_scale * self.scale)).square()
        return self.squares[first:end].sqrt() * (self.largest_column * (self.loss_scale * self.scale))

    def scaled(self, scale: float) -> HeadGradients:
        return dataclasses.replace(self, scale=scale)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.normaliser).all() and torch.isfinite(self.inputs).all())

    def tensors(self) -> dict[str, Tensor]:
        return {
            "inputs": self.inputs, "targets": self.targets, "normaliser": self.normaliser, "squares": self.squares,
            "delta": self.deltas.values,
            "loss_scale": torch.tensor(self.loss_scale, dtype=torch.float64),
        }  # fmt: skip

    def kept(self, memory: Memory) -> HeadGradients:
        return dataclasses.replace(self, inputs=memory.keep(self.inputs))

    @classmethod
    def joined(cls, entries: Sequence[HeadGradients]) -> HeadGradients:
        """Of several chunks of one backward, in memory that outlives its step well (`own_pages`)."""
        inputs = torch.cat([e.inputs for e in entries])
        if inputs.device.type == "cpu":
            inputs = own_pages(tuple(inputs.shape), inputs.dtype).copy_(inputs)
        return dataclasses.replace(
            entries[0], inputs=inputs, targets=torch.cat([e.targets for e in entries]),
            normaliser=torch.cat([e.normaliser for e in entries]),
            squares=torch.stack([e.squares for e in entries]).sum(0),
        )  # fmt: skip


class SparseHead(SparseWeights[HeadGradients]):
    """An output layer [vocabulary, H] whose best entries train; a part is a block of rows."""

    def __init__(self, layer: FrozenLinear) -> None:
        rows = rows_of_block(layer)
        super().__init__(-(-layer.out_features // rows), rows, layer.in_features, layer.weight.device,
                         layer.weight.numel())  # fmt: skip
        self.weight, self.bias = layer.weight, layer.bias
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.snapshot: Deltas | None = None  # what captures of one step share; to be forgotten before the next

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
        inputs, targets, normaliser, squares, delta = (
            named[name].to(self.device) for name in ("inputs", "targets", "normaliser", "squares", "delta")
        )
        deltas = dataclasses.replace(self.present(), values=delta)  # no reselection has come between
        return HeadGradients(self, inputs, targets, normaliser, squares, deltas, float(named["loss_scale"]))

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

    def block_logits(self, p: int, hidden: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """[n, rows] of block p, or of some rows of it, whose weights are `weight`, in fp32 or float64."""
        z = (hidden @ weight.t()).to(wide_dtype(hidden.dtype))
        if self.bias is not None:
            first, end = self.rows_of(p)
            bias = self.bias[first:end]
            z += bias if rows is None else bias.index_select(0, rows)
        return z

    def targets_in(self, p: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [n]: the tokens whose target lies in block p; int64 [n]: its place there, of the others any)."""
        first, end = self.rows_of(p)
        return (targets >= first) & (targets < end), (targets - first).clamp(0, end - first - 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., vocabulary], in the type of x. Deltas are constants here: `head_loss` has their gradients."""
        spans = (self.rows_of(p) for p in range(self.num_parts))
        biases = [None if self.bias is None else self.bias[first:end].to(x.dtype) for first, end in spans]
        return torch.cat([F.linear(x, self.block(p, x.dtype), bias) for p, bias in enumerate(biases)], dim=-1)

    def receive(
        self, inputs: Tensor, targets: Tensor, found: HeadLoss, loss_scale: float
    ) -> None:  # fmt: skip
        """What one chunk's backward gave: the deltas' gradient, unscaled, is added to `delta.grad`; and while
        `captured` is a list, what weight gradients need is kept."""
        if found.delta is not None and self.delta.requires_grad:
            scaled = found.delta.to(self.delta.dtype) * loss_scale
            self.delta.grad = scaled if self.delta.grad is None else self.delta.grad + scaled
        if self.captured is not None:
            if self.snapshot is None:
                now = self.present()
                self.snapshot = dataclasses.replace(now, values=now.values.clone())
            assert found.squares is not None
            self.captured.append(
                HeadGradients(self, inputs, targets, found.normaliser, found.squares, self.snapshot, loss_scale)
            )

    def take_captured(self) -> list[HeadGradients]:
        captured = super().take_captured()
        return [HeadGradients.joined(captured)] if captured else []
