"""AMD (and any DirectX 12) cards on Windows, by torch-directml.

torch-directml is closed source and in maintenance: float32 only here (no bfloat16, no autocast, float64 not
trustworthy), no sparse tensors, no pinned memory, no streams, no memory figures. Operators it lacks run on the CPU,
slowly or wrongly, so the code for this backend uses only those of its list (tests/directml_operators.json, held by
tests/operators.py): eager attention, and SiLU written as x * sigmoid(x), because the derivative of the fused form is
missing.

Where no adapter exists its import or first call can crash the process, or poison it so that a later backward on the
CPU aborts. So a subprocess with a time limit tries the whole way first (import, product, backward, reading back), and
this process imports the package only after that succeeded, before its first backward.

Never run on real hardware by this project's tests: they use a stand-in module, and a fake device for the operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import nn

from usaf.devices.backend import Backend

PROBE_SECONDS = 60.0
PROBE_MARK = "usaf-directml-probe "
# SetErrorMode(3): a crash ends the child at once instead of opening a dialog that waits for a click.
PROBE = f"""
import json, sys
if sys.platform == "win32":
    import ctypes
    ctypes.windll.kernel32.SetErrorMode(3)
import torch_directml, torch
if not torch_directml.is_available():
    raise SystemExit("torch_directml finds no adapter")
index = int(torch_directml.default_device())
device = torch_directml.device(index)
a = torch.ones(8, 8, device=device, requires_grad=True)
torch.mm(a, a).sum().backward()
assert float(a.grad.cpu()[0, 0]) == 16.0, "a first product came out wrong"
print({PROBE_MARK!r} + json.dumps({{"index": index, "name": str(torch_directml.device_name(index)),
                                   "count": int(torch_directml.device_count())}}), flush=True)
"""


@dataclass(frozen=True)
class Probe:
    """What the subprocess found: the adapter's `index` and name, the number of adapters; or `fault`, why it failed."""

    fault: str | None
    index: int = 0
    name: str = ""
    count: int = 1


class SigmoidGate(nn.Module):
    """silu(x) = x * sigmoid(x) from two operators whose derivatives DirectML has (it lacks silu_backward)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class DirectMLBackend(Backend):
    def synchronize(self) -> None:
        """The package has no such call; reading an element back waits for the queue."""
        torch.zeros(1, device=self.device).item()

    def prepare_model(self, model: nn.Module) -> None:
        """Replace every SiLU module of `model`, in place."""
        replace_silu(model)


def replace_silu(model: nn.Module) -> int:
    """Put `SigmoidGate` in the place of every SiLU module of `model`; returns how many were replaced."""
    from transformers.activations import ACT2FN  # a few seconds to import, and only this backend needs it

    silu = (nn.SiLU, type(ACT2FN["silu"]))
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, silu):
                setattr(module, name, SigmoidGate())
                replaced += 1
    return replaced


def installed() -> bool:
    """Whether torch_directml can be imported, found without importing it."""
    return importlib.util.find_spec("torch_directml") is not None


def probe(limit_seconds: float = PROBE_SECONDS) -> Probe:
    """Try torch_directml in a child process: crash, exception and time-out come back as `fault`."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return Probe(fault=f"torch_directml did not answer within {limit_seconds:g} s")
    for line in done.stdout.splitlines():
        # The child can still die while it shuts down, so its exit status counts as much as its answer.
        if line.startswith(PROBE_MARK) and done.returncode == 0:
            found = json.loads(line[len(PROBE_MARK) :])
            return Probe(fault=None, index=found["index"], name=found["name"].strip(" \0"), count=found["count"])
    return Probe(fault=_fault(done.returncode, done.stderr))


def _fault(status: int, errors: str) -> str:
    """One line from a failed child: the signal or Windows exception that ended it, or the last line it wrote."""
    if status < 0:
        return f"torch_directml crashed its process ({signal.Signals(-status).name})"
    if status > 255:  # Windows reports the exception code, e.g. 0xC0000005 for an access violation
        return f"torch_directml crashed its process (exception {status:#010x})"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"torch_directml failed: {lines[-1]}" if lines else f"torch_directml ended its process with status {status}"


def directml_backend(found: Probe) -> Backend:
    """The backend of the adapter that `probe()` found. Imports torch_directml: only for a successful probe."""
    assert found.fault is None
    torch_directml = importlib.import_module("torch_directml")
    which = (
        f"one of {found.count} adapters (only one is used)" if found.count > 1 else "the adapter that Windows offers"
    )
    return DirectMLBackend(
        name="directml",
        device=torch_directml.device(found.index),
        compute_dtype=torch.float32,
        reason=f"DirectML: {which}; float32, for want of bfloat16 and autocast (untested on real cards)",
        description=found.name,
        native_bf16=False,
        has_pinned_memory=False,
        has_streams=False,
        attention="eager",
    )
