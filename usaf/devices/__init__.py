"""The choice of the device: CUDA or ROCm, then DirectML, then the CPU.

`USE_CUDA` unset picks the first of them that works; 1 demands CUDA or ROCm; 0 leaves them out (DirectML stays
possible). What was tried and failed is part of the chosen backend's reason, so the printed line explains why a card
stands idle.
"""

from __future__ import annotations

import sys

from usaf.devices import cpu, cuda, directml
from usaf.devices.backend import Backend
from usaf.errors import UserError

__all__ = ["Backend", "choose_backend"]


def choose_backend(use_cuda: bool | None, use_amp: bool) -> Backend:
    """The backend for settings USE_CUDA and USE_AMP.

    Raises UserError for USE_CUDA=1 where neither CUDA nor ROCm works.
    """
    passed_over = []
    if use_cuda is False:
        passed_over.append("USE_CUDA=0")
    else:
        fault = cuda.why_not_cuda()
        if fault is None:
            return cuda.cuda_backend(use_amp)
        if use_cuda:
            why, remedy = fault
            raise UserError(f"USE_CUDA=1 needs CUDA or ROCm, but {why}; {remedy}, or leave USE_CUDA unset")
        passed_over.append(f"no CUDA or ROCm, since {fault[0]}")
    if directml.installed():
        found = directml.probe()
        if found.fault is None:
            return directml.directml_backend(found)
        passed_over.append(found.fault)
    elif sys.platform == "win32":
        passed_over.append("torch-directml is not installed")
    return cpu.cpu_backend("; ".join(passed_over))
