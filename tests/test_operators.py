"""The instruments: recorder, DirectML judgement and fake device. `test_device_training.py` puts them to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import fake_device, to_host
from operators import (
    COMPOSITES,
    OperatorRecorder,
    directml_fallbacks,
    directml_types,
    fallback_reason,
    mixed_devices,
)
from torch import nn
from torch.nn import functional as F

VOCABULARY = 128


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def record(block: Callable[[], Any]) -> OperatorRecorder:
    with OperatorRecorder() as recorder:
        block()
    return recorder


def backward(block: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        block(seeded(4, 6).requires_grad_()).sum().backward()

    return run


def adamw() -> None:
    parameter = nn.Parameter(seeded(4, 6))
    parameter.grad = seeded(4, 6)
    torch.optim.AdamW([parameter], foreach=False).step()


QUERY = seeded(1, 2, 4, 8)
INDEX = torch.tensor([0, 2, 2])
CODES = torch.tensor([[1, 200], [3, 255]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("block", "flagged"),
    [
        (backward(F.silu), "aten::silu_backward"),
        (lambda: seeded(4, 6).index_add(0, INDEX, seeded(3, 6)), "aten::index_add"),
        (lambda: seeded(4, 6).index_add_(0, INDEX, seeded(3, 6)), "aten::index_add_"),
        (backward(lambda x: x.index_select(0, INDEX)), "aten::index_add"),
        (lambda: seeded(4).lerp(seeded(4), 0.5), "aten::lerp.Scalar"),
        (adamw, "aten::lerp_.Scalar"),
        (lambda: CODES >> 4, "aten::__rshift__.Scalar"),
        (lambda: CODES << 4, "aten::__lshift__.Scalar"),
        (lambda: torch.bitwise_right_shift(CODES, 4), "aten::bitwise_right_shift.Tensor_Scalar"),
        (lambda: torch.bincount(INDEX), "aten::bincount"),
        (lambda: INDEX.repeat_interleave(INDEX), "aten::repeat_interleave.Tensor"),
        (lambda: torch.searchsorted(INDEX, INDEX), "aten::searchsorted.Tensor"),
        (lambda: seeded(4).scatter_reduce(0, INDEX, seeded(3), "amax"), "aten::scatter_reduce.two"),
        (lambda: seeded(4).scatter_reduce_(0, INDEX, seeded(3), "amax"), "aten::scatter_reduce_.two"),
        (lambda: seeded(4, 6).index_put_((INDEX, INDEX), seeded(3)), "aten::index_put_"),
        (lambda: seeded(4, 6).index_put((INDEX, INDEX), seeded(3)), "aten::index_put"),
        (backward(lambda x: x[INDEX, INDEX]), "aten::index_put"),
        (lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY), "aten::_scaled_dot_product"),
        (lambda: torch._foreach_lerp_([seeded(4)], [seeded(4)], 0.5), "aten::_foreach_lerp_"),
    ],
)
def test_known_fallbacks_are_flagged(block: Callable[[], Any], flagged: str) -> None:
    found = directml_fallbacks(record(block))
    assert any(line.startswith(flagged) for line in found), found


@pytest.mark.parametrize(
    "block",
    [
        backward(lambda x: x * torch.sigmoid(x)),
        backward(lambda x: x.gather(0, INDEX.unsqueeze(1).expand(-1, 6))),
        backward(lambda x: torch.zeros(4, 6).scatter_add(0, INDEX.unsqueeze(1).expand(-1, 6), x[:3])),
        backward(lambda x: x[INDEX]),
        backward(lambda x: x.topk(2).values),
        backward(lambda x: F.layer_norm(x, (6,)).softmax(-1).log_softmax(-1)),
        backward(lambda x: F.cross_entropy(x, torch.tensor([0, 5, -100, 1]))),
        backward(lambda x: torch.stack([x, x.clone()]).mean(0).t() @ x),
        backward(lambda x: torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x > 1, 0.0)),
        backward(lambda x: torch.cat(x.chunk(2, -1)).to(torch.float16).float()),
        lambda: torch.stack((CODES.remainder(16), CODES.floor_divide(16)), -1).reshape(2, 4),
        lambda: INDEX.sort(stable=True),
        lambda: (
            seeded(4).mul_(0.9).addcmul_(seeded(4), seeded(4), value=0.1).addcdiv_(seeded(4), seeded(4).abs_().sqrt_())
        ),
        lambda: seeded(4, 6)[1:].zero_(),
        lambda: seeded(4, 6).index_put_((INDEX,), seeded(3, 6)),
    ],
)
def test_native_operators_are_not_flagged(block: Callable[[], Any]) -> None:
    assert directml_fallbacks(record(block)) == []


def test_inference_mode_records_the_parts_of_composites() -> None:
    with torch.inference_mode():
        recorder = record(lambda: F.linear(seeded(4, 6), seeded(3, 6)))
    assert "aten::mm" in recorder.operators
    assert directml_fallbacks(recorder) == []


@pytest.mark.parametrize("key", sorted(COMPOSITES))
def test_the_table_holds_composite_kernels_made_of_native_parts(key: str) -> None:
    name = "aten::" + key
    generic = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    assert any(torch._C._dispatch_has_kernel_for_dispatch_key(name, kind) for kind in generic)
    shifts = "bitwise_left_shift", "bitwise_right_shift"  # the two whose parts are known to be missing
    assert (fallback_reason(name) is None) == (not key.startswith(shifts))


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("_to_copy", lambda x: x.to(torch.float16)),
        ("clone", lambda x: x.clone()),
        ("zeros_like", lambda x: torch.zeros_like(x)),
        ("new_full", lambda x: x.new_full((2,), 3.0)),
        ("remainder.Scalar", lambda x: x.remainder(2)),
        ("floor_divide.Scalar", lambda x: torch.ops.aten.floor_divide.Scalar(x, 2)),
        ("logical_and", lambda x: torch.logical_and(x, x)),
        ("masked_fill.Scalar", lambda x: x.masked_fill(x > 0, 1.0)),
        ("zeros", lambda x: torch.zeros(3)),
        ("stack", lambda x: torch.stack((x, x))),
        ("abs", lambda x: x.abs()),
        ("select_backward", lambda x: torch.ops.aten.select_backward(x[0], (4, 6), 0, 1)),
        ("slice_backward", lambda x: torch.ops.aten.slice_backward(x, (8, 6), 0, 0, 4, 1)),
        ("index_put", lambda x: x.index_put((INDEX,), x[:3])),
    ],
)
def test_the_table_agrees_with_what_the_profiler_sees(key: str, block: Callable[[torch.Tensor], Any]) -> None:
    """The profiler counts the calls a kernel makes inside itself: all of them follow from the parts in the table."""
    x = seeded(4, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(x)
    called: set[str] = set()
    events = [event for event in profile.events() if event.name == "aten::" + key.partition(".")[0]]
    assert events
    while events:
        children = events.pop().cpu_children
        called.update(child.name for child in children)
        events.extend(child for child in children if child.name.removeprefix("aten::") in COMPOSITES)
    # what any kernel does to make room for its result, and to turn a number into an argument
    allowed = {"aten::resize_", "aten::as_strided", "aten::empty", "aten::empty_strided", "aten::to", "aten::_to_copy"}
    pending = [key]
    while pending:
        for part in COMPOSITES.get(pending.pop(), ()):
            allowed |= {"aten::" + part.partition(".")[0], "aten::" + part.partition(".")[0].rstrip("_")}
            pending.append(part)
    assert called <= allowed, called - allowed


def test_mixed_devices_and_types() -> None:
    # meta reads host indices, so a mixture gets through to be recorded
    recorder = record(lambda: torch.empty(4, 6, device="meta")[INDEX])
    assert mixed_devices(recorder) == ["aten::index.Tensor: cpu, meta"]
    legal = record(lambda: (torch.empty(4, device="meta") * torch.tensor(2.0), seeded(4).to("meta")))
    assert mixed_devices(legal) == []
    assert directml_types(record(lambda: seeded(4).bfloat16() + 1)) == [
        "aten::_to_copy: torch.bfloat16",
        "aten::add.Tensor: torch.bfloat16",
    ]
    assert directml_types(record(lambda: seeded(4) * torch.tensor(2.0, dtype=torch.float64))) == []


def test_recorder_keeps_devices_types_and_counts() -> None:
    recorder = record(lambda: [seeded(4, 6) @ seeded(6, 2) for _ in range(3)])
    (call,) = [call for call in recorder.calls if call.operator == "aten::mm"]
    assert recorder.calls[call] == 3
    assert [(kind.device, kind.dtype, kind.dimensions) for kind in (*call.inputs, *call.outputs)] == [
        ("cpu", torch.float32, 2)
    ] * 3


# --- the fake device
# ---------------------------------------------------------------------------------------------------


def test_fake_device_refuses_to_mix_and_what_it_lacks() -> None:
    with fake_device() as device:
        x = seeded(4, 6).to(device)
        assert x.device == device
        for mixture in (lambda: x + seeded(6), lambda: x[INDEX], lambda: seeded(2, 4) @ x, lambda: x.mul_(seeded(6))):
            with pytest.raises(RuntimeError, match="host and device tensors meet"):
                mixture()
        for lacking in (x.bfloat16, x.double, lambda: torch.zeros(2, dtype=torch.float64, device=device)):
            with pytest.raises(RuntimeError, match="has no torch"):
                lacking()
        with pytest.raises(RuntimeError, match="no sparse"):
            x.to_sparse()
        assert (x * torch.tensor(2.0)).device == device  # a scalar of the host is legal
    with fake_device(refuse=()) as device:
        assert seeded(2).to(device).double().dtype == torch.float64


def test_fake_device_keeps_views_identity_and_values() -> None:
    with fake_device() as device:
        x = torch.zeros(4, 6, device=device)
        x[1:3].add_(1.0)
        assert x.mul_(2.0) is x
        x.t()[0].copy_(torch.arange(4.0))
        expected = torch.zeros(4, 6)
        expected[1:3] = 2.0
        expected[:, 0] = torch.arange(4.0)
        assert torch.equal(x.cpu(), expected)
        assert x.cpu().device.type == "cpu"
        assert x.sum().item() == expected.sum().item()
        assert x.tolist() == expected.tolist()
        parameter = nn.Parameter(x)
        assert isinstance(parameter, nn.Parameter)
        assert parameter.device == device
    assert torch.equal(to_host(x), expected)
