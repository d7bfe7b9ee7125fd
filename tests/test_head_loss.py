"""The loss of a plain head and its gradient, against torch's cross entropy on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from usaf import head_loss, importance, sparse_head
from usaf.importance import grow_candidates, part_gradient, score_bank
from usaf.linear import FrozenLinear
from usaf.sparse_head import HeadGradients, SparseHead

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
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", block)
    head, (hidden, targets) = head_of(dtype, bias), rows()
    loss, gradient = expected(head, hidden, targets)
    got, got_gradient, *_ = head_loss.loss_and_gradients(head, hidden, targets)
    assert got == pytest.approx(loss, rel=1e-6)
    assert head_loss.loss_sum(head, hidden, targets) == got
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(head_loss.loss_and_gradients(head, hidden, targets).hidden, got_gradient), "the same bits again"


def test_large_logits_neither_overflow_nor_vanish(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", 20 * WIDTH)
    head, (hidden, targets) = head_of(torch.float32, False), rows()
    hidden = hidden * 300
    loss, gradient = expected(head, hidden, targets)
    got, got_gradient, *_ = head_loss.loss_and_gradients(head, hidden, targets)
    assert got == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_the_loss_so(poison: float, threads: int) -> None:
    head, (hidden, targets) = head_of(torch.bfloat16, False), rows()
    hidden[3, 5] = poison
    loss, *_ = head_loss.loss_and_gradients(head, hidden, targets)
    assert not torch.isfinite(torch.tensor(loss))


def test_no_moment_holds_the_widened_head(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are widened a block at a time: each twice for loss and gradient, once for the loss."""
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", 10 * WIDTH)
    widened: list[int] = []
    true = SparseHead.block

    def counting(head: SparseHead, p: int, dtype: torch.dtype, *, buffer: Tensor) -> Tensor:
        widened.extend(range(*head.rows_of(p)))
        assert len(buffer) == 10
        return true(head, p, dtype, buffer=buffer)

    monkeypatch.setattr(SparseHead, "block", counting)
    head, (hidden, targets) = head_of(torch.bfloat16, False), rows()
    head_loss.loss_sum(head, hidden, targets)
    assert sorted(widened) == list(range(VOCAB))
    widened.clear()
    head_loss.loss_and_gradients(head, hidden, targets)
    assert sorted(widened) == sorted([*range(VOCAB)] * 2)


# ---- a head that trains ---------------------------------------------------------------------------------------------


def trained_head(dtype: torch.dtype, bias: bool, share: float = 0.1) -> tuple[SparseHead, Tensor]:
    """(a head with random deltas, the dense weight that it stands for, float64)."""
    layer, generator = head_of(dtype, bias), torch.Generator().manual_seed(2)
    head = SparseHead(layer)
    active = torch.randperm(VOCAB * WIDTH, generator=generator)[: int(share * VOCAB * WIDTH)].sort().values
    head.set_active(active, 0.3 * torch.randn(len(active), generator=generator))
    dense = layer.weight.double().clone()
    dense.view(-1)[active] += head.delta.detach().double()
    return head, dense


def dense_figures(head: SparseHead, dense: Tensor, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """(loss, gradient at the hidden states, at the whole weight), by autograd in float64."""
    weight, wide = dense.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = F.cross_entropy(F.linear(wide, weight, None if head.bias is None else head.bias.double()), targets,
                           reduction="sum")  # fmt: skip
    return float(loss.detach()), *torch.autograd.grad(loss, (wide, weight))


@pytest.mark.parametrize("block", [1, 7 * WIDTH, 1 << 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trained_head_equals_its_dense_weight(
    dtype: torch.dtype, bias: bool, block: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", block)
    head, dense = trained_head(dtype, bias)
    hidden, targets = rows()
    loss, at_hidden, at_weight = dense_figures(head, dense, hidden, targets)
    found = head_loss.loss_and_gradients(head, hidden, targets)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert head_loss.loss_sum(head, hidden, targets) == found.loss
    torch.testing.assert_close(found.hidden, at_hidden.float(), rtol=1e-4, atol=1e-4)
    assert found.delta is not None
    torch.testing.assert_close(found.delta, at_weight.view(-1)[head.active].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        head(hidden),
        F.linear(hidden, dense.float(), None if head.bias is None else head.bias.float()),
        rtol=1e-4,
        atol=1e-4,
    )
    for p in range(head.num_parts):
        first, end = head.rows_of(p)
        assert torch.equal(head.block(p, torch.float32), dense[first:end].float())


@pytest.mark.parametrize("block", [7 * WIDTH, 1 << 20])
def test_its_dense_gradient_is_formed_again_from_what_was_captured(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the deltas as they were, through a checkpoint and back, at all weights and at chosen ones."""
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", block)
    head, dense = trained_head(torch.bfloat16, True)
    hidden, targets = rows()
    _, _, at_weight = dense_figures(head, dense, hidden, targets)
    head.captured = []
    for part in (slice(0, 9), slice(9, ROWS)):
        found = head_loss.loss_and_gradients(head, hidden[part], targets[part])
        head.receive(hidden[part], targets[part], found, 0.25)
    captured = HeadGradients.joined(head.captured).scaled(0.5)
    assert len(captured.starts) == head.num_parts + 1
    assert head.delta.grad is not None
    torch.testing.assert_close(
        head.delta.grad, 0.25 * at_weight.view(-1)[head.active].float(), rtol=1e-4, atol=1e-4
    )  # fmt: skip
    head.delta.data.zero_()
    named = {name: tensor.clone() for name, tensor in captured.tensors().items()}
    for factors in (captured, head.restored(named).scaled(0.5)):
        whole = torch.cat([part_gradient(head, [factors], p) for p in range(head.num_parts)])
        torch.testing.assert_close(whole, 0.125 * at_weight.float(), rtol=1e-4, atol=1e-5)
        for chosen in (None, torch.arange(len(head.delta)) % 3 == 0):
            places = head.active if chosen is None else head.active[chosen]
            of_delta = head.delta_gradient(factors, torch.float32, chosen)
            torch.testing.assert_close(of_delta, whole.view(-1)[places], rtol=1e-4, atol=1e-6)
        assert factors.is_finite()
        for p in range(head.num_parts):
            first, end = head.rows_of(p)
            largest = whole[first:end].abs().amax(1)
            assert bool((factors.bounds(p) * (1 + 1e-3) >= largest).all()), "not a bound"
            dy, x = factors.part(p, torch.float64)
            squares = part_gradient(head, [factors], p, torch.float64, squares=True)
            torch.testing.assert_close(squares, torch.einsum("to,ti->oi", dy**2, x**2))
            assert bool((factors.bounds(p, squares=True) * (1 + 1e-3) >= squares.amax(1)).all()), "not a bound"
            some = torch.arange(0, end - first, 3)
            alone = part_gradient(head, [factors], p, rows=some)
            torch.testing.assert_close(alone[some], whole[first:end][some], rtol=1e-5, atol=1e-7)
            assert int(alone.abs().sum(1).count_nonzero()) <= len(some)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_rows_that_cannot_have_the_best_are_not_formed(
    threads: int, squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary of which a text uses a few words; what is chosen is the same as when all rows are formed."""
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", 50 * WIDTH)
    generator = torch.Generator().manual_seed(3)
    head = SparseHead(FrozenLinear(0.5 * torch.randn(1003, WIDTH, generator=generator), None))
    factors = []
    for _ in range(4):
        hidden = torch.randn(200, WIDTH, generator=generator)
        targets = torch.randint(0, 30, (200,), generator=generator) ** 2
        head.captured = []
        head.receive(hidden, targets, head_loss.loss_and_gradients(head, hidden, targets), 1 / 800)
        factors += head.take_captured()
    formed: list[int] = []
    true = HeadGradients.part

    def counting(self: HeadGradients, p: int, dtype: torch.dtype, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = true(self, p, dtype, rows)
        formed.append(found[0].shape[1])
        return found

    monkeypatch.setattr(HeadGradients, "part", counting)
    kept = torch.arange(0, 1003 * WIDTH, 97)
    chosen = score_bank(head, factors, 60, squares), grow_candidates(head, factors, kept, 40)
    few = sum(formed)
    formed.clear()
    monkeypatch.setattr(importance, "FEW_ROWS", -1.0)
    everything = score_bank(head, factors, 60, squares), grow_candidates(head, factors, kept, 40)
    assert torch.equal(chosen[0][0], everything[0][0])
    assert torch.allclose(chosen[0][1], everything[0][1], rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(chosen[0][2], everything[0][2], strict=True))
    assert torch.equal(chosen[1], everything[1])
    assert sum(formed) - 2 * 4 * 1003 <= 4 * 60 * squares  # and for the gradients at what squares have chosen
    assert sum(formed) >= 2 * 4 * 1003
    assert few < 0.7 * sum(formed)


def test_in_16_bits_sums_are_wide_and_weights_rounded_once() -> None:
    head, dense = trained_head(torch.bfloat16, False)
    hidden, targets = rows()
    hidden = hidden.bfloat16()
    rounded = dense.to(torch.float32).bfloat16()
    assert torch.equal(head.block(0, torch.bfloat16), rounded)
    loss, at_hidden, at_weight = dense_figures(head, rounded.double(), hidden, targets)
    found = head_loss.loss_and_gradients(head, hidden, targets)
    assert found.loss == pytest.approx(loss, rel=1e-2)
    assert found.hidden.dtype == torch.bfloat16
    torch.testing.assert_close(found.hidden.float(), at_hidden.float(), rtol=0.05, atol=0.05)
    assert found.delta is not None
    assert found.delta.dtype == torch.float32
    torch.testing.assert_close(found.delta, at_weight.view(-1)[head.active].float(), rtol=0.05, atol=0.1)


def test_rounding_loses_the_deltas_below_half_a_step() -> None:
    head = SparseHead(head_of(torch.bfloat16, False))
    base = head.weight.view(-1)
    active = torch.tensor([3, 50, 700])
    head.set_active(active, torch.stack([base[3].float() * 1e-4, torch.tensor(0.0), base[700].float() * 0.5]))
    assert head.lost_to_rounding(torch.bfloat16) == (1, 2)
