"""What the rest of the code may know of a device.

One object describes the backend a run uses: where tensors live, in which type activations and products are computed
and why, and which of torch's abilities are there. No other module names a device, asks for a vendor or tests
`torch.cuda`; it reads a field of this object instead, so a new backend is one more file in this folder.

Left out: several devices at a time. A backend is one device; where a machine has more, `reason` says that one is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


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
    has_sparse         `torch.sparse.sampled_addmm` exists for float32 (products sampled at the active indices)
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
    has_sparse: bool
    attention: str

    def memory_bytes(self) -> int | None:
        """Peak device memory that this process has held so far, in bytes; None where the backend has no figures."""
        return None

    def total_memory_bytes(self) -> int | None:
        """Memory of the device, in bytes; None where the backend has no figures or shares the host's."""
        return None

    def synchronize(self) -> None:
        """Return when all work queued on the device is done (for timings)."""

    def prepare_model(self, model: nn.Module) -> None:
        """Replace, in place, modules of `model` that this backend cannot run; values stay equal up to rounding."""
