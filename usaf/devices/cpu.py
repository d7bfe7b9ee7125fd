"""The processor: always there, and the reference for the bits of every other backend.

Products are float32. Most processors have no bfloat16 arithmetic (torch then converts to and fro, slower than
float32), and a result must not depend on which processor ran it more than it has to.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from usaf.devices.backend import Backend


class CpuBackend(Backend):
    """Memory of the processor is the host's, which the run reports by itself: no figures here."""

    def held(self, weight: Tensor) -> Tensor:
        """As it is: every processor converts bfloat16 well, and the host's memory holds the checkpoint's own type."""
        return weight


def processor_name() -> str:
    """The processor's marketing name where the system tells it (Linux, /proc/cpuinfo), else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_backend(why: str) -> Backend:
    """The CPU backend; `why` says why no other device was taken."""
    return CpuBackend(
        name="cpu",
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        reason=f"CPU: {why}; float32, the one type every processor computes in at full speed",
        description=f"{processor_name()}, {os.cpu_count() or 1} logical cores",
        native_bf16=False,
        has_pinned_memory=False,
        has_streams=False,
        attention="sdpa",
    )
