"""Finding the large entries of a dense gradient: machine code against the plain operators."""

from __future__ import annotations

import pytest
import torch

from usaf.kernels.scan import at_least, at_least_reference


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.5, 100.0])
def test_equals_the_operators(length: int, threshold: float) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    values[::7] = threshold  # at the threshold counts
    for found, expected in zip(at_least(values, threshold), at_least_reference(values, threshold), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_strided_view_and_a_gradient() -> None:
    values = torch.randn(40, 2, requires_grad=True)[:, 0]
    assert torch.equal(at_least(values, 1.0)[0], at_least_reference(values, 1.0)[0])


@pytest.mark.parametrize("way", [at_least, at_least_reference])
def test_nan_and_inf_are_found(way) -> None:  # type: ignore[no-untyped-def]
    values = torch.tensor([0.0, float("nan"), float("-inf"), 1.0])
    positions, sizes = way(values, 5.0)
    assert positions.tolist() == [1, 2]
    assert sizes[0].isnan()
    assert sizes[1] == float("inf")
