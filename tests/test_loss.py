"""The chunked loss against torch's cross entropy on full logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, build, random_batch, write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usaf.data import NO_TARGET, Batch
from usaf.devices import choose_backend
from usaf.loss import count_targets, loss_and_gradient, loss_sum
from usaf.model import SparseModel

BATCH = random_batch([[9, 7], [11], [5, 3, 6]])
WIDTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    return build(write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1))


def hidden_of(batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*batch.input_ids.shape, WIDTH, generator=generator).to(dtype)


def full(model: SparseModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed loss, its gradient) from all logits at once, labels shifted by hand."""
    hidden = hidden.clone().requires_grad_()
    head = model.model.get_parameter("lm_head.weight").to(hidden.dtype)
    logits = hidden @ head.t()
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=NO_TARGET, reduction="sum"
    )
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("chunk", [1, 7, 16, 10_000])
def test_loss_and_gradient_equal_those_of_full_logits(model: SparseModel, chunk: int) -> None:
    hidden = hidden_of(BATCH)
    loss, gradient = full(model, hidden, BATCH)
    got, got_gradient = loss_and_gradient(model, hidden, BATCH, chunk, 1.0)
    assert got == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-6)
    assert loss_sum(model, hidden, BATCH, chunk) == (got, count_targets(BATCH))


def test_float64_stays_float64(model: SparseModel) -> None:
    hidden = hidden_of(BATCH, torch.float64)
    loss, gradient = full(model, hidden, BATCH)
    got, got_gradient = loss_and_gradient(model, hidden, BATCH, 5, 1.0)
    assert got == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-12, atol=1e-14)


def test_the_scale_scales_the_gradient_alone(model: SparseModel) -> None:
    hidden = hidden_of(BATCH)
    loss, gradient = loss_and_gradient(model, hidden, BATCH, 7, 1.0)
    scaled_loss, scaled = loss_and_gradient(model, hidden, BATCH, 7, 0.25)
    assert scaled_loss == loss
    assert torch.equal(scaled, gradient * 0.25)


def test_positions_without_a_target_have_no_gradient(model: SparseModel) -> None:
    """The end of a document, of a row, padding, and masked labels; everything else has one."""
    labels = BATCH.labels.clone()
    labels[0, 4] = NO_TARGET
    batch = dataclasses.replace(BATCH, labels=labels)
    _, gradient = loss_and_gradient(model, hidden_of(batch), batch, 7, 1.0)
    has = gradient.abs().amax(-1) > 0
    assert (~has[0]).nonzero().squeeze(1).tolist() == [3, 8, 15]
    assert (~has[1]).nonzero().squeeze(1).tolist() == [10, 11, 12, 13, 14, 15]
    assert (~has[2]).nonzero().squeeze(1).tolist() == [4, 7, 13, 14, 15]
    assert count_targets(batch) == int(has.sum()) == 48 - 14


def test_a_batch_without_targets_costs_nothing(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = dataclasses.replace(BATCH, labels=torch.full_like(BATCH.labels, NO_TARGET))
    monkeypatch.setattr(SparseModel, "logits", None)  # never called
    loss, gradient = loss_and_gradient(model, hidden_of(batch), batch, 7, 1.0)
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros_like(hidden_of(batch)))
    assert loss_sum(model, hidden_of(batch), batch, 7) == (0.0, 0)


def test_bfloat16_logits_are_reduced_in_fp32(tmp_path: Any) -> None:
    """The same head in bf16: its logits are rounded, the sum over them is not."""
    narrow = build(write_checkpoint(tmp_path, num_hidden_layers=1),
                   dataclasses.replace(choose_backend(False, True), compute_dtype=torch.bfloat16))  # fmt: skip
    hidden = hidden_of(BATCH, torch.bfloat16)
    loss, gradient = loss_and_gradient(narrow, hidden, BATCH, 7, 1.0)
    logits = (hidden @ narrow.model.get_parameter("lm_head.weight").t()).float()
    targets = BATCH.labels[:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=NO_TARGET, reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.dtype == torch.bfloat16
    _, wide = full(narrow, hidden.float(), BATCH)
    assert F.cosine_similarity(gradient.float().flatten(), wide.flatten(), 0) > 0.999


def test_a_poisoned_hidden_state_shows_in_the_loss(model: SparseModel) -> None:
    hidden = hidden_of(BATCH)
    hidden[1, 2, 3] = float("nan")
    loss, _ = loss_and_gradient(model, hidden, BATCH, 7, 1.0)
    assert loss != loss


class LogitsSeen(TorchDispatchMode):
    """The most rows of vocabulary-wide tensors that any operator returns, and the most elements of any tensor."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.elements = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
                if value.ndim and value.shape[-1] == self.vocabulary:
                    self.rows = max(self.rows, value.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("gradient", [True, False])
def test_logits_of_all_tokens_never_exist(model: SparseModel, gradient: bool) -> None:
    """142 targets, of which 70 at a time reach the head: more than the rows of the head turned round (64)."""
    batch = random_batch([[70, 10], [65]])
    hidden = hidden_of(batch)
    with LogitsSeen(VOCAB) as seen:
        if gradient:
            loss_and_gradient(model, hidden, batch, 70, 1.0)
        else:
            loss_sum(model, hidden, batch, 70)
    assert seen.rows == 70 > WIDTH
    assert seen.elements <= hidden.numel() < count_targets(batch) * VOCAB
    with LogitsSeen(VOCAB) as seen:
        full(model, hidden, batch)
    assert seen.rows == batch.input_ids.numel()  # what the instrument sees where they do
