"""The experts on several cores against the plain version: outputs, gradients, captured pairs, and the same bits again.

`test_experts.py` holds both against transformers' own; here they meet at sizes at which the threads share the work.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_experts import Layer, experts_with, inputs_of, with_gradients

from usaf import experts, fused_experts
from usaf.expert_bank import ExpertBank

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KINDS = [(gate, bias) for gate in (True, False) for bias in (True, False)]


def layer_with(gate: bool, bias: bool) -> Layer:
    return Layer(experts_with(gate, bias, transposed=False, post_norm=False), active=60)


def everything(layer: Layer, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of both inputs and of both deltas, and all that is captured."""
    for bank in layer.banks:
        bank.captured, bank.delta.grad = [], None
    values = [*with_gradients(layer.run_banked, *inputs), *(bank.delta.grad for bank in layer.banks)]
    captured = [pairs for bank in layer.banks for pairs in bank.captured or []]
    assert len(captured) == 2
    return [*values, *(pairs.part(e)[side] for pairs in captured for e in range(5) for side in (0, 1))]


@pytest.mark.parametrize(("gate", "bias"), KINDS)
def test_equals_the_plain_version(gate: bool, bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_with(gate, bias)
    inputs = inputs_of(layer, tokens=40, top_k=3)
    fused = everything(layer, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(fused, everything(layer, *inputs), strict=True)), "the same bits"
    monkeypatch.setattr(experts, "runs_fused", lambda *_: False)
    for value, reference in zip(fused, everything(layer, *inputs), strict=True):
        torch.testing.assert_close(value, reference, **CLOSE)


def test_without_gradients_the_output_has_the_same_bits_and_nothing_is_kept(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_with(gate=True, bias=False)
    inputs = inputs_of(layer, tokens=40, top_k=3)
    expected = with_gradients(layer.run_banked, *inputs)[0]
    monkeypatch.setattr(fused_experts, "FusedExperts", None)  # autograd is not asked
    with torch.no_grad():
        assert torch.equal(layer.run_banked(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(layer.run_banked(*inputs), expected)


def test_each_expert_is_decoded_once_a_product(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_with(gate=True, bias=False)
    hidden, ids, weights = inputs_of(layer, tokens=40, top_k=3)
    decoded: list[tuple[str, int]] = []
    decode = ExpertBank.decode

    def counting(bank: ExpertBank, e: int, *args: Any) -> torch.Tensor:
        decoded.append(("up" if bank is layer.up else "down", e))
        return decode(bank, e, *args)

    monkeypatch.setattr(ExpertBank, "decode", counting)
    once = sorted((name, e) for name in ("up", "down") for e in range(5))
    with torch.no_grad():
        layer.run_banked(hidden, ids, weights)
    assert sorted(decoded) == once
    decoded.clear()
    with_gradients(layer.run_banked, hidden, ids, weights)
    assert sorted(decoded) == sorted(once * 2)
    decoded.clear()
    layer.run_banked(hidden, ids, weights).sum().backward()  # the input wants no gradient
    assert sorted(decoded) == sorted([*once, *(("down", e) for e in range(5))])


def test_autograd_keeps_one_tensor_of_pairs(threads: int) -> None:
    """h; the activations are computed again, and no product is kept."""
    layer = layer_with(gate=True, bias=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        hidden, ids, weights = inputs_of(layer, tokens=40, top_k=3)
        layer.run_banked(hidden.requires_grad_(), ids, weights.requires_grad_())
    assert [tuple(t.shape) for t in kept if t.shape[:1] == (120,) and t.dim() == 2] == [(120, layer.up.out_features)]


def test_an_error_in_a_worker_reaches_the_caller(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_with(gate=True, bias=False)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ExpertBank, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.run_banked(*inputs_of(layer))
