"""The instruments (recorder, DirectML judgement, fake device), then whole MoE models of transformers under them."""

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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from usaf.devices.directml import replace_silu

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


# --- models of transformers
# --------------------------------------------------------------------------------------------


def gathered_experts_forward(
    experts: Any, hidden_states: torch.Tensor, expert_ids: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """Route, then compute, by gather, mm and scatter_add: hidden_states [T, H], ids and weights [T, k]."""
    top_k, hidden_size = expert_ids.shape[1], hidden_states.shape[1]
    sorted_ids, pairs = expert_ids.reshape(-1).sort(stable=True)
    # MoE blocks mark tokens without an expert by the id num_experts: those sort to the end and are left out.
    counts = [sorted_ids.tolist().count(expert) for expert in range(experts.down_proj.shape[0])]
    out, start = torch.zeros_like(hidden_states), 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        pair = pairs[start : start + count]
        rows = pair.floor_divide(top_k).unsqueeze(1).expand(-1, hidden_size)
        up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        if not experts.is_transposed:
            up, down = up.t(), down.t()
        inner = hidden_states.gather(0, rows) @ up
        if experts.has_bias:
            inner = inner + experts.gate_up_proj_bias[expert]
        result = experts._apply_gate(inner) @ down
        if experts.has_bias:
            result = result + experts.down_proj_bias[expert]
        weight = routing_weights.reshape(-1).gather(0, pair).unsqueeze(1)
        out = out.scatter_add(0, rows, result * weight)
        start += count
    return out


ALL_EXPERTS_FUNCTIONS.register("gathered_experts", gathered_experts_forward)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 16, "num_experts": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "head_dim": 8,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def build(family: str) -> nn.Module:
    """A small model with eager attention and our experts; frozen but for its routers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]}),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="gathered_experts",
    ).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.05)
        parameter.requires_grad_(name.endswith((".gate.weight", ".router.weight")))
    assert any(parameter.requires_grad for parameter in model.parameters())
    return model


def forward_backward(
    model: nn.Module, ids: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits [B, S, V], gradients of the routers and, as "inputs_embeds", of the input) for next-token loss."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    logits = model(inputs_embeds=embedded, use_cache=False, **inputs).logits
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
    loss.backward()
    assert embedded.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits, {**gradients, "inputs_embeds": embedded.grad}


def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


def packed_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S] float32, made on the host: 0 where a query sees a key of its own document, at or before it, else the
    smallest float. A document begins where the position ids restart."""
    document = (position_ids == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    return torch.zeros(same.shape).masked_fill(~(same & causal), torch.finfo(torch.float32).min)[:, None]


PACKED = torch.cat([torch.arange(10), torch.arange(6)]).expand(2, -1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_stay_on_directml(family: str, packed: bool) -> None:
    model = build(family)
    replace_silu(model)
    inputs = {"position_ids": PACKED} if packed else {}
    with OperatorRecorder() as recorder:
        forward_backward(model, token_ids(), **inputs)
    assert directml_fallbacks(recorder) == []
    assert directml_types(recorder) == []


def test_without_the_silu_replacement_a_model_leaves_directml() -> None:
    model = build("qwen3_moe")
    with OperatorRecorder() as recorder:
        forward_backward(model, token_ids())
    assert [line.partition(":: ")[0].split(": ")[0] for line in directml_fallbacks(recorder)] == ["aten::silu_backward"]


def test_sdpa_leaves_directml() -> None:
    model = build("qwen3_moe")
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    with OperatorRecorder() as recorder:
        forward_backward(model, token_ids())
    assert any("_scaled_dot_product" in line for line in directml_fallbacks(recorder))


def test_a_mask_made_on_the_host_replaces_the_packed_one() -> None:
    """transformers builds the packed mask on the device with several index tensors; the ready mask needs none."""
    model, ids = build("qwen3_moe"), token_ids()
    by_positions, _ = forward_backward(model, ids, position_ids=PACKED)
    mask = packed_mask(PACKED)
    with OperatorRecorder() as recorder:
        by_mask, _ = forward_backward(model, ids, position_ids=PACKED, attention_mask=mask)
    assert torch.equal(by_positions, by_mask)
    assert not any(call.operator.startswith("aten::index") for call in recorder.calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_on_the_fake_device_as_on_the_cpu(family: str) -> None:
    model, ids = build(family), token_ids()
    replace_silu(model)
    expected_logits, expected = forward_backward(model, ids, position_ids=PACKED)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.zero_grad()
    with fake_device() as device:
        model.to(device)
        with OperatorRecorder() as recorder:
            logits, gradients = forward_backward(model, ids.to(device), position_ids=PACKED.to(device))
    assert logits.device.type == device.type
    assert mixed_devices(recorder) == []
    assert directml_fallbacks(recorder) == []
    torch.testing.assert_close(to_host(logits), expected_logits, rtol=0, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(to_host(gradient), expected[name], rtol=1e-5, atol=1e-7, msg=name)
