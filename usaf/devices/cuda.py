"""NVIDIA cards, and AMD cards under ROCm builds of torch, which answer to the same `torch.cuda` interface.

The compute type: bfloat16 where the card computes in it (NVIDIA from sm_80 on; AMD where torch says so). Older cards
get float32, not float16: gradients of the experts' inner activations underflow float16 and would need a loss scaler,
whose skipped steps and scale would become part of the result. USE_AMP=0 gives float32 everywhere.

Left out: several cards at once; grouped products and fused kernels, which are chosen in `usaf.kernels`.
"""

from __future__ import annotations

import torch

from usaf.devices.backend import Backend

FIRST_BF16_CAPABILITY = (8, 0)


class CudaBackend(Backend):
    def memory_bytes(self) -> int | None:
        """The most that torch's allocator has reserved: what the card must have, cached blocks included."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def total_memory_bytes(self) -> int | None:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def why_not_cuda() -> tuple[str, str] | None:
    """(Why `torch.cuda` cannot be used, the remedy), or None where a product on the card works.

    A card can be visible and still unusable (an architecture this build of torch has no kernels for, memory taken by
    another process), which shows only when something runs on it.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                f"torch {torch.__version__} was built without them (torch.version.cuda and torch.version.hip are None)",
                "install a CUDA or ROCm build of torch",
            )
        return f"torch was built for {_built_for()} but finds no card", "check the driver and CUDA_VISIBLE_DEVICES"
    try:
        _first_product()
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        return (
            f"a first product on {torch.cuda.get_device_name(0)} failed ({first_line})",
            f"free its memory, or install a torch whose {_built_for()} kernels cover this card",
        )
    return None


def _first_product() -> None:
    ones = torch.ones(8, 8, device="cuda")
    torch.mm(ones, ones).sum().item()


def _built_for() -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else f"CUDA {torch.version.cuda}"


def choose_dtype(use_amp: bool) -> tuple[torch.dtype, bool, str]:
    """(type of activations and products, whether bfloat16 is native, why) for the current card."""
    if torch.version.hip is not None:
        native = bool(torch.cuda.is_bf16_supported())
        card = "this card under ROCm"
    else:
        major, minor = torch.cuda.get_device_capability(0)
        native = (major, minor) >= FIRST_BF16_CAPABILITY
        card = f"sm_{major}{minor}"
    if not use_amp:
        return torch.float32, native, "float32 because USE_AMP=0"
    if native:
        return torch.bfloat16, native, f"bfloat16, which {card} has"
    return torch.float32, native, f"float32, since {card} has no bfloat16 and float16 would need a loss scaler"


def cuda_backend(use_amp: bool) -> Backend:
    """The backend of the first visible card. Call it only where `why_not_cuda()` is None."""
    rocm = torch.version.hip is not None
    dtype, native_bf16, why_dtype = choose_dtype(use_amp)
    count = torch.cuda.device_count()
    which = f"one of {count} GPUs (only one is used)" if count > 1 else "the GPU that torch sees"
    return CudaBackend(
        name="rocm" if rocm else "cuda",
        device=torch.device("cuda", 0),
        compute_dtype=dtype,
        reason=f"{_built_for()}: {which}; {why_dtype}",
        description=torch.cuda.get_device_name(0),
        native_bf16=native_bf16,
        has_pinned_memory=True,
        has_streams=True,
        # cuSPARSE computes sampled products in float32; torch does not build its hipSPARSE twin on every ROCm platform.
        attention="sdpa",
    )
