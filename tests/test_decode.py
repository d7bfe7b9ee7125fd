"""Fused decoding against `dequantize`, which defines the bits: every store, size and type, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from usaf.expert_bank import ExpertBank
from usaf.kernels import decode
from usaf.kernels.decode import can_decode, converts_half, decode_expert
from usaf.quantization import E2M1_VALUES, INT4_VALUES, QuantizedTensor, dequantize, quantize

SHAPES = [((3, 40, 256), 128), ((2, 16, 200), 128), ((2, 5, 7), 4), ((2, 6, 31), 32), ((1, 1, 2), 8), ((2, 3, 65), 64)]


def decoded(base: QuantizedTensor, e: int) -> Tensor:
    out = torch.full(base.shape[1:], float("nan"))
    decode_expert(base, e, out)
    return out


@pytest.fixture(autouse=True, params=[True, False], ids=["hardware", "bits"])
def way_of_rounding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not converts_half():
        pytest.skip("this processor has no instruction for it")
    monkeypatch.setattr(decode, "converts_half", lambda: request.param)


def assert_same_bits(base: QuantizedTensor) -> None:
    assert can_decode(base)
    for e in range(base.shape[0]):
        expected = dequantize(base.expert(e))[0]
        assert torch.equal(decoded(base, e).view(torch.int32), expected.view(torch.int32))  # -0.0 is not 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 0.02, 3000.0], ids=str)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_offsets(shape: tuple[int, int, int], group: int, size: float, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_same_bits(quantize(torch.randn(shape) * size, group, bits)._replace(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [INT4_VALUES, E2M1_VALUES], ids=["int4", "e2m1"])
@pytest.mark.parametrize("scales", ["fp16", "bf16", "e8m0"])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_tables(
    shape: tuple[int, int, int], group: int, scales: str, values: tuple[float, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = quantize(torch.randn(shape) * 0.02, group)
    scale = base.scale if scales == "fp16" else base.scale.bfloat16()
    if scales == "e8m0":
        scale = torch.randint(105, 135, base.scale.shape, dtype=torch.uint8)
    assert_same_bits(base._replace(scale=scale, offset=None, table=torch.tensor(values), dtype=dtype))


def every_sum(dtype: torch.dtype) -> QuantizedTensor:
    """code * scale + offset over many fp32 numbers: ties, subnormals, the largest numbers of fp16, inf and nan."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.randint(0, 0x7BFF, (1, 4096, 1), generator=generator, dtype=torch.int16).view(torch.float16)
    offset = torch.randint(-0x8000, 0x7BFF, (1, 4096, 1), generator=generator, dtype=torch.int16).view(torch.float16)
    special = torch.tensor([65504.0, 2.0**-24, 2.0**-14, float("inf"), float("nan"), 0.0], dtype=torch.float16)
    scale[0, :6, 0], offset[0, 6:12, 0] = special, special
    packed = torch.tensor([low + 16 * high for low, high in zip(range(0, 16, 2), range(1, 16, 2), strict=True)])
    packed = packed.to(torch.uint8).expand(1, 4096, 8).contiguous()
    return QuantizedTensor(packed, scale, offset, (1, 4096, 16), 16, 4, None, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_over_all_of_fp16(dtype: torch.dtype) -> None:
    base = every_sum(dtype)
    got, expected = decoded(base, 0), dequantize(base)[0]
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert (expected.abs() < 2.0**-14).any()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_odd_groups_take_the_reference() -> None:
    base = quantize(torch.randn(2, 4, 12), 3)
    assert not can_decode(base)
    assert torch.equal(decoded(base, 1), dequantize(base)[1])


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_deltas_are_added_as_the_plain_way_adds_them(density: float, resident: bool) -> None:
    torch.manual_seed(0)
    bank = ExpertBank(quantize(torch.randn(3, 20, 130) * 0.02))
    active = (torch.rand(bank.numel) < density).nonzero().squeeze(1)
    active = active[(active < bank.part_size) | (active >= 2 * bank.part_size)]  # expert 1 has none
    bank.set_active(active, torch.randn(len(active)) * 1e-3)
    if resident:
        bank.resident = dequantize(bank.base, torch.float16)
    buffer = torch.empty(bank.part_size + 7)
    for e in range(3):
        assert torch.equal(bank.decode(e, buffer, bank.delta), bank.weight(e, torch.float32))


def test_a_read_only_folder_costs_compiling_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from usaf.kernels import compiled

    asked: list[bool] = []
    true = compiled.numba.njit

    def njit(cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return true(**options)

    monkeypatch.setattr(compiled.numba, "njit", njit)
    double = compiled.compiled(lambda x: x + x)
    assert double(2.5) == 5.0
    assert asked == [True, False]


def test_the_kernel_is_made_once_for_a_format() -> None:
    base = quantize(torch.randn(2, 4, 16), 8)
    before = decode._nibble_decoder.cache_info().misses
    decoded(base, 0), decoded(base, 1)
    assert decode._nibble_decoder.cache_info().misses <= before + 1
