"""Device choice with mocked torch.cuda, ROCm and torch_directml: no accelerator is needed, or touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from usaf.devices import backend as backend_module
from usaf.devices import choose_backend, cuda, directml
from usaf.devices.backend import Backend, without_bf16
from usaf.errors import UserError

WORKING = """
import torch
def is_available(): return True
def device_count(): return 2
def default_device(): return 1
def device_name(index): return "Radeon RX 6700 XT" + chr(0)
def device(index): return torch.device("cpu")
"""


@pytest.fixture(autouse=True)
def no_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, a test starts without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(directml, "installed", lambda: False)


def mock_cuda(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    count: int = 1,
    hip: str | None = None,
    bf16: bool = True,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Mock GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.version, "hip" if hip else "cuda", hip or "12.4")
    monkeypatch.setattr(cuda, "_first_product", lambda: None)


def mock_directml(monkeypatch: pytest.MonkeyPatch, fault: str | None = None) -> None:
    module = type(sys)("torch_directml")
    module.device = lambda index: torch.device("cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_directml", module)
    monkeypatch.setattr(directml, "installed", lambda: True)
    monkeypatch.setattr(directml, "probe", lambda: directml.Probe(fault=fault, name="Mock adapter"))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Put a stand-in for torch_directml where this process and its children find it."""

    def put(source: str) -> None:
        (tmp_path / "torch_directml.py").write_text(source, encoding="utf-8")
        monkeypatch.undo()  # the real `installed` looks for it
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    yield put
    sys.modules.pop("torch_directml", None)


@pytest.mark.parametrize(
    ("has_cuda", "has_directml", "use_cuda", "expected"),
    [
        (True, True, None, "cuda"),
        (True, True, True, "cuda"),
        (True, True, False, "directml"),
        (True, False, False, "cpu"),
        (False, True, None, "directml"),
        (False, True, False, "directml"),
        (False, False, None, "cpu"),
        (False, False, False, "cpu"),
    ],
)
def test_order_of_preference(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, has_directml: bool, use_cuda: bool | None, expected: str
) -> None:
    if has_cuda:
        mock_cuda(monkeypatch)
    if has_directml:
        mock_directml(monkeypatch)
    assert choose_backend(use_cuda, use_amp=True).name == expected


def test_use_cuda_0_never_touches_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> bool:
        raise AssertionError("torch.cuda was asked")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    backend = choose_backend(False, use_amp=True)
    assert backend.name == "cpu"
    assert "USE_CUDA=0" in backend.reason


@pytest.mark.parametrize(
    ("capability", "hip", "bf16", "use_amp", "dtype", "why"),
    [
        ((8, 0), None, True, True, torch.bfloat16, "sm_80"),
        ((12, 0), None, True, True, torch.bfloat16, "sm_120"),
        # torch answers True for emulated bfloat16 too, so the capability decides
        ((7, 5), None, True, True, torch.float32, "loss scaler"),
        ((9, 0), None, True, False, torch.float32, "USE_AMP=0"),
        ((10, 3), "6.2", True, True, torch.bfloat16, "ROCm 6.2"),
        ((10, 3), "6.2", False, True, torch.float32, "loss scaler"),
    ],
)
def test_compute_dtype_of_cuda_and_rocm(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    bf16: bool,
    use_amp: bool,
    dtype: torch.dtype,
    why: str,
) -> None:
    mock_cuda(monkeypatch, capability=capability, hip=hip, bf16=bf16)
    backend = choose_backend(None, use_amp)
    assert backend.compute_dtype == dtype
    assert why in backend.reason
    assert backend.name == ("rocm" if hip else "cuda")
    assert backend.native_bf16 == (bf16 and (hip is not None or capability >= (8, 0)))
    assert (backend.attention, backend.device.type, backend.description) == ("sdpa", "cuda", "Mock GPU")


@pytest.mark.parametrize(("count", "said"), [(1, False), (2, True), (8, True)])
def test_several_gpus_are_said_to_be_unused(monkeypatch: pytest.MonkeyPatch, count: int, said: bool) -> None:
    mock_cuda(monkeypatch, count=count)
    assert (f"one of {count} GPUs" in choose_backend(None, use_amp=True).reason) == said


def test_use_cuda_1_without_a_cuda_build() -> None:
    with pytest.raises(
        UserError, match=r"USE_CUDA=1 .*torch\.version\.cuda and torch\.version\.hip are None.*install.*unset"
    ):
        choose_backend(True, use_amp=True)


@pytest.mark.parametrize("version", ["cuda", "hip"])
def test_use_cuda_1_without_a_card(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch.version, version, "12.4")
    with pytest.raises(UserError, match="USE_CUDA=1 .*finds no card; check the driver"):
        choose_backend(True, use_amp=True)


def test_a_card_that_torch_cannot_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    mock_cuda(monkeypatch, capability=(6, 1))
    monkeypatch.setattr(cuda, "_first_product", fail)
    with pytest.raises(UserError, match="Mock GPU failed .*no kernel image"):
        choose_backend(True, use_amp=True)
    backend = choose_backend(None, use_amp=True)
    assert backend.name == "cpu"
    assert "no kernel image" in backend.reason


def test_memory_figures_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    mock_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 456}))
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    backend = choose_backend(None, use_amp=True)
    assert (backend.memory_bytes(), backend.total_memory_bytes()) == (123, 456)
    backend.synchronize()
    assert waited == [torch.device("cuda", 0)]


def test_cpu_backend() -> None:
    backend = choose_backend(None, use_amp=True)
    assert (backend.device, backend.compute_dtype) == (torch.device("cpu"), torch.float32)
    assert not any((backend.has_pinned_memory, backend.has_streams, backend.native_bf16))
    assert (backend.memory_bytes(), backend.total_memory_bytes()) == (None, None)
    assert backend.description
    assert "\n" not in backend.reason
    backend.synchronize()
    model = nn.Sequential(nn.SiLU())
    backend.prepare_model(model)
    assert type(model[0]) is nn.SiLU


def test_windows_without_torch_directml_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "torch-directml is not installed" in choose_backend(None, use_amp=True).reason


def directml_mock_backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    mock_directml(monkeypatch)
    return choose_backend(None, use_amp=True)


def test_directml_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = directml_mock_backend(monkeypatch)
    assert (backend.name, backend.compute_dtype, backend.attention) == ("directml", torch.float32, "eager")
    assert not any((backend.has_pinned_memory, backend.has_streams, backend.native_bf16))
    assert (backend.memory_bytes(), backend.total_memory_bytes()) == (None, None)
    backend.synchronize()


def test_directml_replaces_silu_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.activations import ACT2FN

    shared = ACT2FN["silu"]
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 4), nn.SiLU(), shared), "act_fn": shared, "other": nn.GELU()}
    )
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expected = nn.functional.silu(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    directml_mock_backend(monkeypatch).prepare_model(model)
    assert not any(isinstance(module, (nn.SiLU, type(shared))) for module in model.modules())
    assert type(model["other"]) is nn.GELU
    out = model["act_fn"](x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_failed_probe_falls_to_the_cpu_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    mock_directml(monkeypatch, fault="torch_directml crashed its process (SIGSEGV)")
    backend = choose_backend(None, use_amp=True)
    assert backend.name == "cpu"
    assert "SIGSEGV" in backend.reason


def test_probe_of_a_working_package(install) -> None:
    install(WORKING)
    backend = choose_backend(None, use_amp=True)
    assert (backend.name, backend.description) == ("directml", "Radeon RX 6700 XT")
    assert "one of 2 adapters" in backend.reason
    assert "torch_directml" in sys.modules


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('DXCore.dll not found')", "DXCore.dll not found"),
        ("def is_available(): return False", "finds no adapter"),
        ("def is_available(): raise RuntimeError('no device')", "no device"),
        ("import os; os._exit(3)", "status 3"),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "SIGSEGV",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="no signals there"),
        ),
    ],
)
def test_probe_of_a_broken_package(install, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    monkeypatch.setattr(
        directml, "PROBE", directml.PROBE.replace("import torch_directml, torch", "import torch_directml")
    )
    probe = directml.PROBE  # torch is left out: these packages fail before it is needed, and it takes seconds to import
    install(source)
    monkeypatch.setattr(directml, "PROBE", probe)
    backend = choose_backend(None, use_amp=True)
    assert backend.name == "cpu"
    assert said in backend.reason
    assert "\n" not in backend.reason
    assert "torch_directml" not in sys.modules, "imported here in spite of the failed probe"


def test_probe_that_hangs_is_ended(install) -> None:
    install("import time; time.sleep(600)")
    assert directml.probe(limit_seconds=0.5).fault == "torch_directml did not answer within 0.5 s"


def test_probe_that_dies_after_its_answer_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = directml.PROBE_MARK + '{"index": 0, "name": "x", "count": 1}'
    monkeypatch.setattr(directml, "PROBE", f"import os\nprint({answer!r}, flush=True)\nos._exit(7)")
    assert directml.probe().fault == "torch_directml ended its process with status 7"


def test_windows_exception_codes_are_named() -> None:
    assert "0xc0000005" in directml._fault(0xC0000005, "")


def test_installed_does_not_import(install) -> None:
    install("raise AssertionError('imported')")
    assert directml.installed()


# --- the type of frozen weights -------------------------------------------------------------------


def a_backend(name: str, compute: torch.dtype, native_bf16: bool) -> Backend:
    return Backend(name, torch.device("cpu"), compute, "", "", native_bf16, False, False, "eager")


def weights(scale: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


@pytest.mark.parametrize(
    ("compute", "native_bf16", "stored", "held"),
    [
        (torch.float32, False, torch.bfloat16, torch.float16),
        (torch.float32, False, torch.float16, torch.float16),
        (torch.float32, False, torch.float32, torch.float32),
        (torch.float32, True, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, True, torch.float32, torch.bfloat16),
        (torch.bfloat16, True, torch.float16, torch.bfloat16),
    ],
)
def test_type_in_which_a_device_holds_a_weight(
    compute: torch.dtype, native_bf16: bool, stored: torch.dtype, held: torch.dtype
) -> None:
    weight = weights(0.02, stored)
    found = a_backend("any", compute, native_bf16).held(weight)
    assert found.dtype == held
    torch.testing.assert_close(found.float(), weight.to(held).float(), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e4, 1e6])
def test_weights_that_float16_would_change_become_float32(scale: float) -> None:
    """Too small: digits are lost; too large: the largest of them overflow (1e6), or fit (1e4)."""
    weight = weights(scale, torch.bfloat16)
    held = a_backend("directml", torch.float32, False).held(weight)
    assert held.dtype == (torch.float16 if scale == 1e4 else torch.float32)
    assert (held.double() - weight.double()).norm() <= torch.finfo(torch.float32).eps * weight.double().norm()


def test_rounding_is_judged_block_by_block_over_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "ROUNDING_BLOCK_ELEMENTS", 300)
    weight = weights(0.02, torch.bfloat16)
    assert without_bf16(weight).dtype == torch.float16
    weight[-1, -1] = 1e5  # beyond float16
    assert without_bf16(weight).dtype == torch.float32
    assert without_bf16(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float16


def test_the_cpu_holds_the_checkpoints_own_type() -> None:
    weight = weights(0.02, torch.bfloat16)
    assert choose_backend(False, True).held(weight) is weight
