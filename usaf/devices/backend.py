"""What the rest of the code may know of a device.

One object describes the backend a run uses: where tensors live, in which type activations and products are computed
and why, and which of torch's abilities are there. No other module names a device, asks for a vendor or tests
`torch.cuda`; it reads a field of this object instead, so a new backend is one more file in this folder.

Left out: several devices at a time. A backend is one device; where a machine has more, `reason` says that one is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROUNDING_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Backend:
    """A device and what it can do. The base class answers for a backend with no figures and nothing to wait for.

    name               "cpu", "cuda", "rocm" or "directml"
    device             where parameters and activations live
    compute_dtype      type of activations and products; the deltas and the optimizer's state are float32 everywhere
    reason             one line for the user: why this device and this type
    description        the card's or the processor's name
    native_bf16        the device computes in bfloat16 rather than by converting to and fro
    has_pinned_memory  host memory can be page-locked, so that copies run beside the computation
    has_streams        copies and products can be queued side by side
    attention          the `attn_implementation` of transformers that stays on the device here: "sdpa" or "eager"
    """

    name: str
    device: torch.device
    compute_dtype: torch.dtype
    reason: str
    description: str
    native_bf16: bool
    has_pinned_memory: bool
    has_streams: bool
    attention: str

    def memory_bytes(self) -> int | None:
        """Peak device memory that this process has held so far, in bytes; None where the backend has no figures."""
        return None

    def total_memory_bytes(self) -> int | None:
        """Memory of the device, in bytes; None where the backend has no figures or shares the host's."""
        return None

    def synchronize(self) -> None:
        """Return when all work queued on the device is done (for timings)."""

    def held(self, weight: Tensor) -> Tensor:
        """A frozen dense weight (floating point, any shape) in the type it is kept in on this device.

        Where products are in 16 bits, the weight is rounded to their type once instead of at every use. A device
        without bfloat16 gets such weights as float16, of the same size, where that rounds off no more than float32
        arithmetic does anyway, and else as float32. All others stay as they are.
        """
        if self.compute_dtype.itemsize == 2:
            return weight.to(self.compute_dtype)
        if weight.dtype == torch.bfloat16 and not self.native_bf16:
            return without_bf16(weight)
        return weight

    def prepare_model(self, model: nn.Module) -> None:
        """Replace, in place, modules of `model` that this backend cannot run; values stay equal up to rounding."""


def without_bf16(weight: Tensor) -> Tensor:
    """A bfloat16 weight as float16, or as float32 where float16 would change it by more than float32's relative step.

    float16 has more digits than bfloat16 but ends at 65,504 and, with fewer and fewer digits, at 6e-8. Of weights as
    large as language models have (standard deviation 0.02) only the few below 8e-6 change, together by 2e-8 of the
    norm.
    """
    half = weight.to(torch.float16)
    error = total = 0.0
    rows = max(1, ROUNDING_BLOCK_ELEMENTS * len(weight) // max(1, weight.numel()))
    for exact, rounded in zip(weight.split(rows), half.split(rows), strict=True):
        wide = exact.to(torch.float32)
        total += float(wide.square().sum())
        error += float((rounded.to(torch.float32) - wide).square_().sum())
    # An overflow makes the error infinite or nan, and neither is below anything.
    return half if error <= torch.finfo(torch.float32).eps ** 2 * total else weight.to(torch.float32)
