"""The loss of a plain head and its gradient, against torch's cross entropy on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from usaf import fused_head
from usaf.linear import FrozenLinear

VOCAB, WIDTH, ROWS = 101, 24, 17


def head_of(dtype: torch.dtype, bias: bool) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    return FrozenLinear(weight, torch.randn(VOCAB, generator=generator).to(dtype) if bias else None)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[0], targets[1] = 0, VOCAB - 1
    return torch.randn(ROWS, WIDTH, generator=generator), targets


def expected(head: FrozenLinear, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    hidden = hidden.double().requires_grad_()
    logits = F.linear(hidden, head.weight.double(), None if head.bias is None else head.bias.double())
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return float(loss), torch.autograd.grad(loss, hidden)[0].float()


@pytest.mark.parametrize("block", [1, 7 * WIDTH, 50 * WIDTH, 1 << 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_cross_entropy_of_all_logits(
    dtype: torch.dtype, bias: bool, block: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "BLOCK_ELEMENTS", block)
    head, (hidden, targets) = head_of(dtype, bias), rows()
    loss, gradient = expected(head, hidden, targets)
    got, got_gradient = fused_head.loss_and_gradient(head, hidden, targets)
    assert got == pytest.approx(loss, rel=1e-6)
    assert fused_head.loss_sum(head, hidden, targets) == got
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused_head.loss_and_gradient(head, hidden, targets)[1], got_gradient), "the same bits again"


def test_large_logits_neither_overflow_nor_vanish(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "BLOCK_ELEMENTS", 20 * WIDTH)
    head, (hidden, targets) = head_of(torch.float32, False), rows()
    hidden = hidden * 300
    loss, gradient = expected(head, hidden, targets)
    got, got_gradient = fused_head.loss_and_gradient(head, hidden, targets)
    assert got == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_the_loss_so(poison: float, threads: int) -> None:
    head, (hidden, targets) = head_of(torch.bfloat16, False), rows()
    hidden[3, 5] = poison
    loss, _ = fused_head.loss_and_gradient(head, hidden, targets)
    assert not torch.isfinite(torch.tensor(loss))


def test_no_moment_holds_the_widened_head(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are widened a block at a time: each twice for loss and gradient, once for the loss."""
    monkeypatch.setattr(fused_head, "BLOCK_ELEMENTS", 10 * WIDTH)
    widened: list[int] = []
    true = fused_head._widened

    def counting(head: FrozenLinear, first: int, end: int, buffer: Tensor) -> Tensor:
        widened.extend(range(first, end))
        assert len(buffer) == 10
        return true(head, first, end, buffer)

    monkeypatch.setattr(fused_head, "_widened", counting)
    head, (hidden, targets) = head_of(torch.bfloat16, False), rows()
    fused_head.loss_sum(head, hidden, targets)
    assert sorted(widened) == list(range(VOCAB))
    widened.clear()
    fused_head.loss_and_gradient(head, hidden, targets)
    assert sorted(widened) == sorted([*range(VOCAB)] * 2)
