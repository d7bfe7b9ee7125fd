"""A device written in Python, for tests: tensors that are not CPU tensors, computed by the CPU.

Code that runs here gives the CPU's values, but a host tensor that meets a device tensor raises, as on a
real card, and so does a type or layout that the imitated backend lacks. It stands on torch's PrivateUse1 device: a
wrapper subclass holds the CPU tensor (`raw`), and a dispatch mode catches what has no device tensor among its
arguments yet (torch.zeros(..., device=...), tensor.to(device)).

Importing this module registers the device, once and for the rest of the process, since torch's autograd counts the
devices at the first backward: import it at the top of a test module, where pytest's collection runs it before any
test. Tests are skipped where torch lacks `_setup_privateuseone_for_python_backend` (2.4.1), and beside a CUDA device,
which torch's choice of "the" accelerator would pass over for this one.

Left out: speed, streams, memory figures, sparse tensors, in-place changes of shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from operators import tensors_in
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE_NAME = "fakedevice"
TRANSFERS = ("aten::_to_copy", "aten::copy_")
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend") and not torch.cuda.is_available()
if AVAILABLE:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE_NAME)

DIRECTML_LACKS = (torch.bfloat16, torch.float64, torch.complex64, torch.complex128)


class FakeTensor(torch.Tensor):
    """A tensor on the fake device. `raw` is the CPU tensor it stands for; views share `raw`'s memory."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> FakeTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(DEVICE_NAME, 0),
        )
        wrapper.raw = raw
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FakeTensor({self.raw!r})"

    def tolist(self) -> Any:
        """torch refuses this for subclasses, though every real device copies the values to the host here."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, _CURRENT[-1] if _CURRENT else None)


class _FakeDeviceMode(TorchDispatchMode):
    """Sends calls to the fake device that name it or hold one of its tensors; all others go their usual way."""

    def __init__(self, refuse: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _names_fake(kwargs) or any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
            return _run(func, args, kwargs, self)
        return func(*args, **kwargs)

    def check(self, tensor: torch.Tensor, operator: str) -> None:
        """Raise for a tensor that the imitated backend could not hold."""
        if tensor.dtype in self.refuse:
            raise RuntimeError(f"{operator}: the fake device has no {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise RuntimeError(f"{operator}: the fake device has no sparse tensors")


_CURRENT: list[_FakeDeviceMode] = []


def _names_fake(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == DEVICE_NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any], mode: _FakeDeviceMode | None) -> Any:
    """Run `func` on the raw tensors and wrap its results, after checking that device and host do not meet."""
    name = func._schema.name
    tensors = list(tensors_in((args, kwargs)))
    on_device = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    # torch lets a device read scalars of the host: they travel with the launch.
    on_host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim() > 0]
    if on_host and on_device and name not in TRANSFERS:
        raise RuntimeError(f"{name}: host and device tensors meet on the fake device")
    stays = bool(on_device)
    if kwargs.get("device") is not None:
        stays = _names_fake(kwargs)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = _map(lambda leaf: leaf.raw if isinstance(leaf, FakeTensor) else leaf, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)
    if mode is not None and stays:
        for tensor in tensors_in((raw_args, raw_kwargs, out)):
            if tensor.dim() > 0 or tensor.layout != torch.strided:
                mode.check(tensor, name)
    return _wrap(out, on_device, stays)


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    """`function` of every leaf of an operator's arguments or results."""
    if isinstance(values, (tuple, list)):
        return type(values)(_map(function, value) for value in values)
    if isinstance(values, dict):
        return {key: _map(function, value) for key, value in values.items()}
    return function(values)


def _wrap(out: Any, arguments: list[FakeTensor], stays: bool) -> Any:
    """Wrap results; a result that is an argument (in-place and out= operators) comes back as that very argument."""
    wrappers = {id(argument.raw): argument for argument in arguments}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) in wrappers:
            argument = wrappers[id(leaf)]
            assert argument.shape == leaf.shape, "in-place changes of shape are not imitated"
            return argument
        return FakeTensor(leaf) if stays else leaf

    return _map(wrap, out)


_torch_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """torch.tensor allocates below every dispatch mode; a real device has memory to give it."""
    if device is None or torch.device(device).type != DEVICE_NAME:
        return _torch_tensor(data, device=device, **kwargs)
    return _torch_tensor(data, **kwargs).to(device)


@contextlib.contextmanager
def fake_device(refuse: tuple[torch.dtype, ...] = DIRECTML_LACKS) -> Iterator[torch.device]:
    """The device, for use inside the block: `with fake_device() as device: x = x.to(device)`.

    `refuse` lists the types that raise there; sparse tensors always do. Skips the test where the device is not
    AVAILABLE. A test that records operators opens the recorder inside this block.
    """
    if not AVAILABLE:
        pytest.skip("needs a torch that can have a device written in Python (not 2.4.1), and no CUDA device beside it")
    mode = _FakeDeviceMode(refuse)
    _CURRENT.append(mode)
    try:
        with mode, mock.patch.object(torch, "tensor", _tensor):
            yield torch.device(DEVICE_NAME, 0)
    finally:
        _CURRENT.pop()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor behind a tensor of the fake device (no copy), or the tensor itself; works after the block too."""
    return tensor.raw if isinstance(tensor, FakeTensor) else tensor
