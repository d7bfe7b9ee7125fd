"""Sampled weight gradients against the dense product, every version of the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from usaf.kernels import sampled
from usaf.kernels.sampled import sampled_gradient, sampled_gradient_reference

OUT, IN = 23, 17
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def places(density: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, row_starts) of a random pattern; rows 3 and the last stay empty below density 1."""
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < density
    if density < 1:
        mask[[3, OUT - 1]] = False
    rows, columns = mask.nonzero().unbind(1)
    return rows, columns, torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])


def tokens_of(tokens: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, n, generator=generator).to(dtype) for n in (OUT, IN))  # type: ignore[return-value]


def by_reference(grad_output: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    return sampled_gradient_reference(grad_output, inputs, rows, columns)


VERSIONS = [by_reference, sampled_gradient]


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", VERSIONS)
def test_equals_the_dense_product(kernel, dtype: torch.dtype, tokens: int, density: float) -> None:  # type: ignore[no-untyped-def]
    rows, columns, row_starts = places(density)
    grad_output, inputs = tokens_of(tokens, dtype)
    dense = grad_output.double().t() @ inputs.double()
    got = kernel(grad_output, inputs, rows, columns, row_starts)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense[rows, columns], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 300])
def test_bfloat16_sums_in_fp32(tokens: int) -> None:
    """Products of bf16 numbers are exact in fp32, so nothing is rounded to bf16 again."""
    rows, columns, row_starts = places(0.3)
    grad_output, inputs = tokens_of(tokens, torch.bfloat16)
    dense = (grad_output.double().t() @ inputs.double())[rows, columns]
    got = sampled_gradient(grad_output, inputs, rows, columns, row_starts)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), dense, rtol=0, atol=TOLERANCE[torch.float32] * tokens**0.5)


@pytest.mark.parametrize("kernel", VERSIONS)
def test_strided_inputs(kernel) -> None:  # type: ignore[no-untyped-def]
    """What a backward hands over may be a slice or a transposed view."""
    rows, columns, row_starts = places(0.3)
    grad_output, inputs = tokens_of(40, torch.float32)
    expected = (grad_output.t() @ inputs)[rows, columns]
    grad_output, inputs = grad_output.t().contiguous().t(), torch.cat([inputs, inputs], 1)[:, :IN]
    torch.testing.assert_close(kernel(grad_output, inputs, rows, columns, row_starts), expected)


@pytest.mark.parametrize("block", [1, 40, 7 * 40, 10**9])
def test_the_reference_s_blocks_do_not_change_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, _ = places(0.3)
    grad_output, inputs = tokens_of(40, torch.float32)
    expected = sampled_gradient_reference(grad_output, inputs, rows, columns)
    monkeypatch.setattr(sampled, "GATHER_BLOCK_ELEMENTS", block)
    torch.testing.assert_close(sampled_gradient_reference(grad_output, inputs, rows, columns), expected)


@pytest.mark.parametrize("kernel", VERSIONS)
def test_no_places(kernel) -> None:  # type: ignore[no-untyped-def]
    none = torch.zeros(0, dtype=torch.int64)
    got = kernel(*tokens_of(5, torch.float32), none, none, torch.zeros(OUT + 1, dtype=torch.int64))
    assert got.shape == (0,)


@pytest.mark.parametrize("kernel", VERSIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(kernel, poison: float) -> None:  # type: ignore[no-untyped-def]
    """A skipped step is told by its gradient; no kernel may lose a NaN."""
    rows, columns, row_starts = places(0.3)
    grad_output, inputs = tokens_of(40, torch.float32)
    grad_output[11, 5] = poison
    got = kernel(grad_output, inputs, rows, columns, row_starts)
    assert not got[rows == 5].isfinite().any()
    assert got[rows != 5].isfinite().all()


@pytest.mark.parametrize("kernel", VERSIONS)
def test_the_same_bits_every_time(kernel) -> None:  # type: ignore[no-untyped-def]
    pattern, values = places(0.3), tokens_of(333, torch.float32)
    first = kernel(*values, *pattern)
    assert all(torch.equal(kernel(*values, *pattern), first) for _ in range(5))


def test_the_version_follows_from_device_and_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code on the CPU in fp32; gathers everywhere else."""
    calls: list[str] = []
    monkeypatch.setattr(sampled, "sampled_gradient_compiled", lambda *_: calls.append("compiled"))
    monkeypatch.setattr(sampled, "sampled_gradient_reference", lambda *_: calls.append("reference"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sampled_gradient(*tokens_of(2, dtype), *places(0.3))
    sampled_gradient(*(t.to("meta") for t in (*tokens_of(2, torch.float32), *places(0.3))))
    assert calls == ["compiled", "reference", "reference", "reference"]
