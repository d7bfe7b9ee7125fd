"""Frozen 16-bit layers against `nn.Linear` and `nn.Embedding` with the widened weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from usaf import linear
from usaf.linear import FrozenEmbedding, FrozenLinear

ROWS, COLUMNS = 30, 12


def pair(dtype: torch.dtype, bias: bool) -> tuple[FrozenLinear, nn.Linear]:
    """A frozen layer in `dtype` and an ordinary one with the same weights in fp32."""
    torch.manual_seed(0)
    wide = nn.Linear(COLUMNS, ROWS, bias)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(dtype).float()
    narrow = [nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in wide.parameters()]
    return FrozenLinear(narrow[0], narrow[1] if bias else None), wide


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1)).requires_grad_()


class LargestWidened(TorchDispatchMode):
    """The largest fp32 tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("block", [1 << 24, 7 * COLUMNS, 1], ids=["whole", "blocks", "rows"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_an_ordinary_layer(dtype: torch.dtype, bias: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WIDENED_ELEMENTS", block)
    frozen, wide = pair(dtype, bias)
    x, reference = inputs(2, 5), inputs(2, 5)
    weights = torch.randn(2, 5, ROWS)
    y, expected = frozen(x), wide(reference)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    if block > ROWS * COLUMNS:
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, reference.grad)  # type: ignore[arg-type]


def test_a_layer_without_inputs_gives_zeros() -> None:
    """Of a shared expert that a configuration leaves out (n_shared_experts 0)."""
    layer = FrozenLinear(nn.Parameter(torch.zeros(ROWS, 0, dtype=torch.bfloat16), requires_grad=False), None)
    x = torch.zeros(2, 0, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, ROWS))
    assert x.grad is not None
    assert x.grad.shape == (2, 0)


def test_float64_activations() -> None:
    frozen, wide = pair(torch.bfloat16, True)
    x = inputs(3).detach().double()
    assert torch.equal(frozen(x), wide.double()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_the_types_agree_it_is_the_ordinary_product(dtype: torch.dtype) -> None:
    frozen, _ = pair(dtype, True)
    x = inputs(4).detach().to(dtype).requires_grad_()
    y = frozen(x)
    assert y.dtype == dtype
    assert torch.equal(y, nn.functional.linear(x, frozen.weight, frozen.bias))
    y.sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


def test_the_backward_keeps_no_widened_weight() -> None:
    frozen, _ = pair(torch.bfloat16, True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen(inputs(2, 5))
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16]
    assert kept[0].data_ptr() == frozen.weight.data_ptr()


def test_no_gradient_is_computed_for_an_input_that_wants_none() -> None:
    frozen, _ = pair(torch.bfloat16, True)
    assert not frozen(inputs(2).detach()).requires_grad


def test_only_a_block_of_the_weight_is_ever_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the head of a wide vocabulary; sharp, since one token's result is far smaller than the weight."""
    monkeypatch.setattr(linear, "WIDENED_ELEMENTS", 5 * COLUMNS)
    frozen, _ = pair(torch.bfloat16, False)
    with LargestWidened() as largest:
        frozen(inputs(1)).sum().backward()
    assert largest.elements == 5 * COLUMNS


def test_shapes_are_told() -> None:
    frozen, wide = pair(torch.bfloat16, True)
    assert (frozen.in_features, frozen.out_features) == (wide.in_features, wide.out_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embedding_gives_the_stored_vectors_in_the_compute_type(dtype: torch.dtype) -> None:
    table = nn.Parameter(torch.randn(10, 4).bfloat16(), requires_grad=False)
    ids = torch.tensor([[3, 0], [9, 3]])
    vectors = FrozenEmbedding(table, dtype)(ids)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, table[ids].to(dtype))
