"""The experts forward against transformers' own on the same dequantised weights; its gradients against dense ones."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, Float64Kept, random_model
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from usaf.expert_bank import ExpertBank, PairGradients, Routing
from usaf.experts import (
    add_rows,
    attach_banks,
    experts_forward,
    is_experts_module,
    projection_names,
)
from usaf.model import find_router
from usaf.quantization import QuantizedTensor, dequantize, quantize

HIDDEN, TOKENS, TOP_K = 64, 20, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Layer:
    """One layer's experts twice over: `eager` with dense weights that want gradients, `banked` with 4-bit banks."""

    def __init__(self, experts: nn.Module, active: int | None = 300, std: float = 0.02) -> None:
        torch.manual_seed(0)
        self.eager, self.banked = experts, copy.deepcopy(experts)
        self.names = projection_names(experts)
        self.banks = self.up, self.down = attach_banks(self.banked, *quantized_once(experts))
        for bank in self.banks:
            count = bank.numel if active is None else active
            bank.set_active(torch.randperm(bank.numel)[:count].sort().values, torch.randn(count) * std)
        for name, bank in zip(self.names, self.banks, strict=True):
            dense = torch.stack([bank.weight(e, torch.float32) for e in range(bank.num_experts)])
            experts.get_parameter(name).data.copy_(self.as_stored(dense))

    def as_stored(self, dense: Tensor) -> Tensor:
        """From the module's layout to [E, out, in], or back."""
        return dense.transpose(1, 2).contiguous() if self.eager.is_transposed else dense

    def dense_gradients(self) -> list[Tensor]:
        return [self.as_stored(self.eager.get_parameter(name).grad) for name in self.names]  # type: ignore[arg-type]

    def run_eager(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return type(self.eager).forward(self.eager, hidden, ids, weights)

    def run_banked(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts_forward(self.banked, hidden, ids, weights)


@cache
def experts_of(family: str) -> nn.Module:
    return next(m for m in random_model(family, num_hidden_layers=2).modules() if is_experts_module(m))


def layer_of(family: str, **options: Any) -> Layer:
    return Layer(copy.deepcopy(experts_of(family)), **options)


QUANTIZED: dict[str, tuple[QuantizedTensor, ...]] = {}


def quantized_once(experts: nn.Module) -> tuple[QuantizedTensor, ...]:
    """The 4-bit weights of an experts module; quantising the same ones for every test would take most of the time."""
    weights = [experts.get_parameter(name).detach() for name in projection_names(experts)]
    key = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
    if key not in QUANTIZED:
        stored = [w.transpose(1, 2).contiguous() if experts.is_transposed else w for w in weights]
        QUANTIZED[key] = tuple(quantize(weight) for weight in stored)
    return QUANTIZED[key]


def inputs_of(layer: Layer, tokens: int = TOKENS, top_k: int = TOP_K, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, expert ids, routing weights)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.up.in_features, generator=generator)
    weights, ids = torch.rand(tokens, layer.up.num_experts, generator=generator).softmax(-1).topk(top_k)
    return hidden, ids, weights


def with_gradients(run: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradient of hidden, gradient of the routing weights); every element of the output counts differently."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(hidden, ids, weights)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    assert hidden.grad is not None
    assert weights.grad is not None
    return out.detach(), hidden.grad, weights.grad


def assert_equal_to_eager(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Outputs, the gradients of both inputs, and the gradients of the deltas."""
    expected = with_gradients(layer.run_eager, hidden, ids, weights)
    got = with_gradients(layer.run_banked, hidden, ids, weights)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, **CLOSE)
    for bank, dense in zip(layer.banks, layer.dense_gradients(), strict=True):
        torch.testing.assert_close(bank.delta.grad, dense.reshape(-1)[bank.active], **CLOSE)


# -- against the dense experts
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_all_gradients_equal_the_dense_experts(family: str) -> None:
    layer = layer_of(family)
    assert_equal_to_eager(layer, *inputs_of(layer))
    assert all(bank.delta.grad.abs().max() > 1e-2 for bank in layer.banks)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_density_one_the_delta_gradient_is_the_whole_dense_gradient(family: str) -> None:
    layer = layer_of(family, active=None)
    assert_equal_to_eager(layer, *inputs_of(layer))
    for bank, dense in zip(layer.banks, layer.dense_gradients(), strict=True):
        torch.testing.assert_close(bank.delta.grad.view(bank.base.shape), dense, **CLOSE)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_nothing_active_gives_the_base_and_still_passes_gradients_on(family: str) -> None:
    layer = layer_of(family, active=0)
    assert_equal_to_eager(layer, *inputs_of(layer))
    assert torch.equal(layer.up.weight(1, torch.float32), dequantize(layer.up.base)[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (2, 3), (TOKENS, 1), (TOKENS, 4)])
def test_few_tokens_and_other_top_k(family: str, tokens: int, top_k: int) -> None:
    layer = layer_of(family)
    assert_equal_to_eager(layer, *inputs_of(layer, tokens, top_k))


def test_no_token_at_all() -> None:
    layer = layer_of("qwen3_moe")
    out, hidden_gradient, _ = with_gradients(layer.run_banked, *inputs_of(layer, tokens=0))
    assert out.shape == hidden_gradient.shape == (0, HIDDEN)
    assert all(torch.equal(bank.delta.grad, torch.zeros(300)) for bank in layer.banks)


def test_all_tokens_at_one_expert_leave_the_others_without_gradient() -> None:
    layer = layer_of("qwen3_moe")
    hidden, ids, weights = inputs_of(layer, top_k=1)
    assert_equal_to_eager(layer, hidden, torch.full_like(ids, 3), weights)
    for bank in layer.banks:
        own = slice(bank.part_starts[3], bank.part_starts[4])
        assert bank.delta.grad[own].abs().min() > 0
        bank.delta.grad[own] = 0
        assert torch.equal(bank.delta.grad, torch.zeros(300))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_slot_counts_for_nothing(family: str) -> None:
    """Expert parallelism marks slots by an id past the last expert. The judge: the same slot with weight 0."""
    layer = layer_of(family)
    hidden, ids, weights = inputs_of(layer)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[::3, 1] = True
    masked[4] = True  # a token without any expert
    weights = weights.masked_fill(masked, 0.0)
    got = with_gradients(layer.run_banked, hidden, ids.masked_fill(masked, layer.up.num_experts), weights)
    expected = with_gradients(layer.run_eager, hidden, ids, weights)
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
    torch.testing.assert_close(got[1], expected[1], **CLOSE)
    torch.testing.assert_close(got[2], expected[2].masked_fill(masked, 0.0), **CLOSE)
    for bank, dense in zip(layer.banks, layer.dense_gradients(), strict=True):
        torch.testing.assert_close(bank.delta.grad, dense.reshape(-1)[bank.active], **CLOSE)


def test_every_slot_masked() -> None:
    layer = layer_of("qwen3_moe")
    hidden, ids, weights = inputs_of(layer)
    for values in with_gradients(layer.run_banked, hidden, torch.full_like(ids, 8), weights):
        assert torch.equal(values, torch.zeros_like(values))


KNOWS_POST_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


def experts_with(gate: bool, bias: bool, transposed: bool, post_norm: bool) -> nn.Module:
    """An experts module of any kind, computed by transformers' batched products."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 5, nn.SiLU()
            shapes = {"gate_up_proj": (32, 24)} if gate else {"up_proj": (16, 24)}
            for name, (rows, columns) in {**shapes, "down_proj": (24, 16)}.items():
                shape = (5, columns, rows) if transposed else (5, rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.1))
                if bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(5, rows)))
            if post_norm:
                self.post_expert_norm = nn.LayerNorm(24)

        def forward(self, *inputs: Tensor) -> Tensor:
            return batched_mm_experts_forward(self, *inputs)

    options = {"has_gate": gate, "has_bias": bias, "is_transposed": transposed}
    options |= {"has_post_expert_norm": True} if post_norm else {}
    torch.manual_seed(3)
    return use_experts_implementation(Experts, **options)(SimpleNamespace(_experts_implementation="eager"))


@pytest.mark.parametrize(("gate", "bias", "transposed", "post_norm"), list(itertools.product([True, False], repeat=4)))
def test_every_kind_of_experts_module(gate: bool, bias: bool, transposed: bool, post_norm: bool) -> None:
    """With and without gate, biases, transposed storage, and a norm after each expert (Muse Spark)."""
    if post_norm and not KNOWS_POST_NORM:
        pytest.skip("this transformers has no family with a norm after each expert")
    layer = Layer(experts_with(gate, bias, transposed, post_norm), active=60)
    assert is_experts_module(layer.banked)
    assert_equal_to_eager(layer, *inputs_of(layer))


# -- finite differences
@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_through_router_and_experts(family: str) -> None:
    """The MoE block as a function of its input, the router weight and both deltas, in float64."""
    model = random_model(family, std=0.3, num_hidden_layers=2, hidden_size=16, moe_intermediate_size=12,
                         intermediate_size=12, num_experts=4, num_local_experts=4, n_routed_experts=4)  # fmt: skip
    name, experts = next((n, m) for n, m in model.named_modules() if is_experts_module(m))
    block = model.get_submodule(name.rpartition(".")[0])
    layer = Layer(experts, active=25)
    router = find_router(block, name.rpartition(".")[2], layer.up.num_experts)
    setattr(block, name.rpartition(".")[2], layer.banked)
    layer.banked.forward = layer.run_banked  # type: ignore[assignment]
    block.double()
    owner = block.get_submodule(router)
    hidden = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def run(hidden: Tensor, router_weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        owner._parameters["weight"] = router_weight  # type: ignore[assignment]
        layer.up._parameters["delta"], layer.down._parameters["delta"] = up, down  # type: ignore[assignment]
        out = block(hidden)
        return out[0] if isinstance(out, tuple) else out

    points = [hidden, owner.weight, layer.up.delta, layer.down.delta]
    with Float64Kept():
        inputs = [point.detach().clone().double().requires_grad_() for point in points]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# -- what a backward leaves for the weight gradients
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_pairs_give_the_exact_dense_gradient_of_every_expert(family: str) -> None:
    layer = layer_of(family)
    for bank in layer.banks:
        bank.captured = []
    assert_equal_to_eager(layer, *inputs_of(layer))
    for bank, dense in zip(layer.banks, layer.dense_gradients(), strict=True):
        (pairs,) = bank.captured or []
        for e in range(bank.num_experts):
            grad_output, inputs = pairs.part(e)
            torch.testing.assert_close(grad_output.t() @ inputs, dense[e], **CLOSE)
        assert torch.equal(bank.delta_gradient(pairs, torch.float32), bank.delta.grad)
        for chosen in (torch.arange(len(bank.delta)) % 3 == 1, torch.arange(len(bank.delta)) < 0):
            some = bank.delta_gradient(pairs, torch.float32, chosen)
            assert torch.equal(some, bank.delta.grad[chosen])


def test_captured_pairs_share_what_a_token_s_experts_share() -> None:
    layer = layer_of("qwen3_moe")
    for bank in layer.banks:
        bank.captured = []
    assert_equal_to_eager(layer, *inputs_of(layer))
    up, down = (bank.captured[0] for bank in layer.banks if bank.captured)
    assert up.inputs.shape == down.grad_outputs.shape == (TOKENS, HIDDEN)
    assert up.grad_outputs.shape[0] == down.inputs.shape[0] == TOKENS * TOP_K


def test_nothing_is_kept_unless_asked_for() -> None:
    layer = layer_of("qwen3_moe")
    assert_equal_to_eager(layer, *inputs_of(layer))
    assert all(bank.captured is None for bank in layer.banks)


@pytest.mark.parametrize("which", [0, 1], ids=["up", "down"])
def test_pairs_survive_a_checkpoint(which: int) -> None:
    layer = layer_of("gpt_oss")
    layer.banks[which].captured = []
    assert_equal_to_eager(layer, *inputs_of(layer))
    (pairs,) = layer.banks[which].captured or []
    again = PairGradients.from_tensors({name: tensor.clone() for name, tensor in pairs.tensors().items()})
    assert again.starts == pairs.starts
    assert all(torch.equal(value, pairs.tensors()[name]) for name, value in again.tensors().items())
    for e in range(4):
        assert all(torch.equal(a, b) for a, b in zip(again.part(e), pairs.part(e), strict=True))
    assert (again.input_token is None) == (pairs.input_token is None)
    assert (again.output_scale is None) == (pairs.output_scale is None)


# -- the bank
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_resident_and_decoding_give_the_same_bits(family: str, dtype: torch.dtype) -> None:
    layer = layer_of(family)
    layer.banked.to(dtype)  # the biases; deltas are put back to fp32
    for bank in layer.banks:
        bank.set_active(bank.active, bank.delta.detach().float())
    hidden, ids, weights = inputs_of(layer)
    results = []
    for resident in (False, True):
        for bank in layer.banks:
            bank.resident = dequantize(bank.base, torch.float16) if resident else None
            bank.delta.grad = None
        values = with_gradients(layer.run_banked, hidden.to(dtype), ids, weights)
        results.append([*values, *(bank.delta.grad for bank in layer.banks)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(bank.resident.dtype == torch.float16 for bank in layer.banks if bank.resident is not None)


def test_the_resident_copy_is_not_written_to() -> None:
    layer = layer_of("qwen3_moe")
    layer.up.resident = dequantize(layer.up.base, torch.float16)
    before = layer.up.resident.clone()
    for e in range(8):
        layer.up.weight(e, torch.float32)
        layer.up.weight(e, torch.float16)
    assert torch.equal(layer.up.resident, before)


def test_deltas_are_added_in_fp32_and_rounded_once() -> None:
    layer = layer_of("qwen3_moe", active=1000, std=1e-3)
    exact = dequantize(layer.up.base, torch.float64).reshape(-1)
    exact[layer.up.active] += layer.up.delta.detach().double()
    expected = exact.view(layer.up.base.shape).float()
    for dtype in (torch.float32, torch.bfloat16):
        got = torch.stack([layer.up.weight(e, dtype) for e in range(8)])
        assert torch.equal(got, expected.to(dtype))


def test_a_dropped_weight_is_at_its_base_value() -> None:
    layer = layer_of("qwen3_moe")
    kept = torch.arange(300) % 3 != 0
    layer.up.set_active(layer.up.active[kept], layer.up.delta.detach()[kept])
    base = dequantize(layer.up.base).reshape(-1)
    now = torch.stack([layer.up.weight(e, torch.float32) for e in range(8)]).reshape(-1)
    assert set((now != base).nonzero().squeeze(1).tolist()) <= set(layer.up.active.tolist())


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4), (4, 1, 6)])
def test_active_indices_are_told_apart_by_expert_row_and_column(shape: tuple[int, int, int]) -> None:
    """Against the definition, with experts and rows that have none, and the first and the last weight active."""
    bank = ExpertBank(quantize(torch.randn(shape)))
    numel = bank.numel
    active = torch.tensor(sorted({0, *range(2, numel // 2, 3), numel - 1}))
    bank.set_active(active, torch.arange(len(active)).float())
    for e in range(shape[0]):
        own = [(i // shape[2] % shape[1], i % shape[2]) for i in active.tolist() if i // (shape[1] * shape[2]) == e]
        span = slice(bank.part_starts[e], bank.part_starts[e + 1])
        assert list(zip(bank.rows[span].tolist(), bank.columns[span].tolist(), strict=True)) == own
        assert bank.row_starts[e].tolist() == [sum(r < row for r, _ in own) for row in range(shape[1] + 1)]


# -- routing
def test_pairs_are_sorted_by_expert_and_in_token_order_within() -> None:
    routing = Routing.of(torch.tensor([[2, 0], [0, 3], [4, 2]]), 4)  # id 4: masked
    assert routing.token_P.tolist() == [0, 1, 0, 2, 1]
    assert routing.slot_P.tolist() == [1, 2, 0, 5, 3]
    assert routing.starts == [0, 2, 2, 4, 5]
    assert list(routing.used()) == [(0, 0, 2), (2, 2, 4), (3, 4, 5)]


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["index_add", "scatter_add"])
def test_rows_are_added_the_same_way_on_devices_without_index_add(
    devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("usaf.experts.INDEX_ADD_DEVICES", devices)
    target = torch.ones(4, 2)
    add_rows(target, torch.tensor([3, 0, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert target.tolist() == [[4, 5], [1, 1], [1, 1], [7, 9]]


# ---- 16-bit arithmetic ----------------------------------------------------------------------------------------------


def test_deltas_lost_to_rounding_are_counted() -> None:
    """By the whole dense weight: what bf16 does not show of base + delta."""
    torch.manual_seed(0)
    bank = ExpertBank(quantize(torch.randn(3, 5, 130) * 0.02))
    active = torch.randperm(bank.numel)[:400].sort().values
    delta = torch.randn(400) * 3e-4
    delta[::7] = 0
    bank.set_active(active, delta)
    base = torch.stack([bank.base_weight(e, torch.float32) for e in range(3)]).view(-1)[active]
    expected = int((((base + delta).bfloat16() == base.bfloat16()) & (delta != 0)).sum())
    lost, moved = bank.lost_to_rounding(torch.bfloat16)
    assert (lost, moved) == (expected, int((delta != 0).sum()))
    assert 0 < lost < moved
    assert bank.lost_to_rounding(torch.float32)[0] == 0
