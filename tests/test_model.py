"""The whole model against transformers' own, its pieces against the whole, and what it keeps in memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import (
    COMMON,
    FAMILIES,
    VOCAB,
    Float64Kept,
    activate,
    build,
    random_batch,
    random_model,
    reference_of,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from usaf.checkpoint import Checkpoint
from usaf.data import Batch
from usaf.devices import Backend, choose_backend
from usaf.errors import UserError
from usaf.expert_bank import ExpertBank
from usaf.linear import FrozenEmbedding, FrozenLinear, WidenedLinear
from usaf.loss import count_targets, loss_and_gradient, loss_sum
from usaf.model import SparseModel, find_router, keeps_fp32
from usaf.packing import keeps_documents_apart
from usaf.quantization import dequantize

PACKED = [family for family in FAMILIES if family != "gpt_oss"]  # its masks know nothing of documents
ROUTERS = {"gpt_oss": "router"}  # all others call it gate
BATCH = random_batch([[9, 7], [11], [5, 3, 6]])
# Without a cache: transformers tells packed documents apart only then.
RAW: dict[str, Any] = {"input_ids": BATCH.input_ids, "position_ids": BATCH.position_ids, "use_cache": False}
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SMALLER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint; made once."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = write_checkpoint(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return get


def in_type(dtype: torch.dtype) -> Backend:
    """The CPU, computing in `dtype`."""
    return dataclasses.replace(choose_backend(False, True), compute_dtype=dtype)


def hidden_of(model: SparseModel, batch: Batch = BATCH) -> Tensor:
    return model.run_layers(batch, 0, model.num_layers)


def logits_of(model: SparseModel, batch: Batch = BATCH) -> Tensor:
    """[B, S, vocabulary]."""
    with torch.no_grad():
        hidden = hidden_of(model, batch)
        return model.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


@torch.no_grad()
def reference_logits(reference: transformers.PreTrainedModel) -> Tensor:
    return reference(**RAW).logits


def training_step(model: SparseModel, start: int = 0, batch: Batch = BATCH) -> float:
    """The mean loss, with its gradients in deltas and routers at or above layer `start`."""
    with torch.no_grad():
        below = model.run_layers(batch, 0, start) if start else None
    hidden = model.run_layers(batch, start, model.num_layers, below)
    loss, gradient = loss_and_gradient(model, hidden, batch, 7, 1 / count_targets(batch))
    hidden.backward(gradient)
    return loss / count_targets(batch)


# -- against transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_eager_experts(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    activate(model)
    expected = reference_logits(reference_of(checkpoint_of(family), model))
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    assert expected.std() > 0.1  # or the comparison would say little


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_dense_ones(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """The judge is transformers' own loss with its own shift, differentiated by every dense expert weight."""
    model = build(checkpoint_of(family))
    activate(model)
    reference = reference_of(checkpoint_of(family), model)
    loss = reference(**RAW, labels=BATCH.labels).loss
    loss.backward()
    assert training_step(model) == pytest.approx(loss.item(), rel=1e-6)
    assert len(model.moe) == (3 if family == "deepseek_v3" else 4)
    for moe in model.moe:
        transposed = reference.get_submodule(moe.names[0].rpartition(".")[0]).is_transposed
        for name, bank in zip(moe.names, moe.banks, strict=True):
            dense = reference.get_parameter(name).grad
            assert dense is not None
            dense = dense.transpose(1, 2) if transposed else dense
            torch.testing.assert_close(bank.delta.grad, dense.reshape(-1)[bank.active], rtol=1e-4, atol=1e-7)
            assert dense.reshape(-1)[bank.active].abs().max() > 1e-5
        torch.testing.assert_close(
            moe.router_weight.grad, reference.get_parameter(moe.router_name).grad, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """In float64, along random directions of all deltas together and of all router weights together."""
    model = build(write_checkpoint(tmp_path, family, **SMALLER), in_type(torch.float64))
    activate(model, per_bank=80)
    for moe in model.moe:
        for bank in moe.banks:
            bank.delta = nn.Parameter(bank.delta.detach().double())  # fp32 would be too coarse to move a little
    groups = [[bank.delta for moe in model.moe for bank in moe.banks], [moe.router_weight for moe in model.moe]]
    batch = random_batch([[5, 4]])
    with Float64Kept():
        training_step(model, batch=batch)
        for group in groups:
            direction = [torch.randn(p.shape, dtype=p.dtype) for p in group]
            slope = sum(float((p.grad * d).sum()) for p, d in zip(group, direction, strict=True))
            losses = []
            for step in (1e-5, -1e-5):
                for p, d in zip(group, direction, strict=True):
                    p.data.add_(d, alpha=step)
                total, targets = loss_sum(model, hidden_of(model, batch).detach(), batch, 64)
                losses.append(total / targets)
                for p, d in zip(group, direction, strict=True):
                    p.data.sub_(d, alpha=step)
            assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)
            assert abs(slope) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_in_bfloat16_is_close_and_keeps_routers_in_fp32(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    wide, narrow = build(checkpoint_of(family)), build(checkpoint_of(family), in_type(torch.bfloat16))
    logit_types: list[torch.dtype] = []
    for model in (wide, narrow):
        activate(model)
    for moe in narrow.moe:
        moe.router.register_forward_hook(
            lambda _m, _a, out: logit_types.append((out if isinstance(out, Tensor) else out[0]).dtype)
        )
    assert hidden_of(narrow).dtype == torch.bfloat16
    assert training_step(narrow) == pytest.approx(training_step(wide), rel=0.01)
    assert set(logit_types) == {torch.float32}
    for moe, expected in zip(narrow.moe, wide.moe, strict=True):
        pairs = [(moe.router_weight, expected.router_weight)]
        pairs += [(bank.delta, other.delta) for bank, other in zip(moe.banks, expected.banks, strict=True)]
        for got, want in pairs:
            assert got.dtype == got.grad.dtype == torch.float32  # type: ignore[union-attr]
            assert torch.nn.functional.cosine_similarity(got.grad.flatten(), want.grad.flatten(), 0) > 0.9  # type: ignore[union-attr]


def test_tied_embeddings_are_one_tensor_and_give_the_same_logits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    model = build(folder)
    head = model.model.get_parameter("lm_head.weight")
    assert head is model.model.get_parameter("model.embed_tokens.weight")
    assert head.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(model), reference_logits(reference_of(folder, model)), **CLOSE)


def test_a_tied_head_that_a_family_keeps_in_fp32_is_not_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HY-V4 rounds hidden states to the type of its head, which must not be that of the embedding it is tied to."""
    folder = write_checkpoint(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"])
    model = build(folder)
    head = model.model.get_parameter("lm_head.weight")
    assert head is model.model.get_parameter("model.embed_tokens.weight")
    assert head.dtype == torch.float32
    torch.testing.assert_close(logits_of(model), reference_logits(reference_of(folder, model)), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_resident_weights_give_the_same_bits(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    results = []
    for resident in (False, True):
        model = build(checkpoint_of(family))
        activate(model)
        for moe in model.moe:
            for bank in moe.banks:
                bank.resident = dequantize(bank.base, torch.float16) if resident else None
        loss = torch.tensor(training_step(model))
        gradients = [p.grad for moe in model.moe for p in (moe.router_weight, *(bank.delta for bank in moe.banks))]
        results.append([loss, logits_of(model), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


# -- any stretch of layers


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stretches_give_the_bits_of_the_whole_at_every_split(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    model = build(checkpoint_of(family))
    with torch.no_grad():
        whole = hidden_of(model)
        for split in range(1, model.num_layers + 1):
            below = model.run_layers(BATCH, 0, split) if split < model.num_layers else before_the_norm(model)
            assert torch.equal(model.run_layers(BATCH, split, model.num_layers, below), whole), split


def before_the_norm(model: SparseModel) -> Tensor:
    kept: list[Tensor] = []
    handle = model.layers[-1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    hidden_of(model)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_gives_the_bits_of_the_whole(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    with torch.no_grad():
        hidden = None
        for layer in range(model.num_layers):
            hidden = model.run_layers(BATCH, layer, layer + 1, hidden)
        assert torch.equal(hidden, hidden_of(model))  # type: ignore[arg-type]


def test_only_the_asked_for_layers_run(checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of("qwen3_moe"))
    ran: list[int] = []
    for i, layer in enumerate(model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))  # type: ignore[union-attr,misc]
    below = model.run_layers(BATCH, 0, 1)
    assert ran == [0]
    ran.clear()
    model.run_layers(BATCH, 1, 3, below)
    assert ran == [1, 2]


def replaced_forwards(model: SparseModel) -> list[nn.Module]:
    return [m for m in (*model.layers, model.decoder) if "forward" in m.__dict__]


def test_the_model_is_whole_again_after_a_run_and_after_an_exception(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(checkpoint_of("qwen3_moe"))
    expected = logits_of(model)
    below = model.run_layers(BATCH, 0, 2)
    assert replaced_forwards(model) == []

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(ExpertBank, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.run_layers(BATCH, 2, 3, below)
    assert replaced_forwards(model) == []
    with pytest.raises(RuntimeError, match="shapes"):
        model.logits(torch.zeros(3, 5))
    assert replaced_forwards(model) == []
    assert torch.equal(logits_of(model), expected)


# -- documents in one row


@pytest.mark.parametrize("family", PACKED)
def test_editing_one_document_leaves_its_neighbours_logits_unchanged(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    """They move by no more than the rounding of products with other row counts; the next test is the exact one."""
    model = build(checkpoint_of(family))
    before = logits_of(model)
    edited = BATCH.input_ids.clone()
    edited[2, 5:8] = (edited[2, 5:8] + 17) % VOCAB  # the middle document of [5, 3, 6]
    changed = (logits_of(model, dataclasses.replace(BATCH, input_ids=edited)) - before).abs().amax(-1)
    assert changed[2, 5:8].min() > 0.01
    changed[2, 5:8] = 0
    assert changed.max() < 1e-5


def crossing_gradients(model: SparseModel, batch: Batch, row: int, begin: int, end: int) -> Tensor:
    """[B, S]: how much every position's embedding moves what leaves the last layer at tokens begin..end of a row."""
    entering: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        entering.append(out.detach().requires_grad_())
        return entering[0]

    handle = model.model.get_input_embeddings().register_forward_hook(keep)
    (gradient,) = torch.autograd.grad(hidden_of(model, batch)[row, begin:end].sum(), entering[0])
    handle.remove()
    return gradient.abs().amax(-1)


@pytest.mark.parametrize("family", PACKED)
def test_nothing_crosses_from_one_document_to_another(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Exactly nothing, padding included."""
    model = build(checkpoint_of(family))
    documents = {0: [(0, 9), (9, 16)], 1: [(0, 11), (11, 16)], 2: [(0, 5), (5, 8), (8, 14), (14, 16)]}
    for row, spans in documents.items():
        for begin, end in spans:
            moved = crossing_gradients(model, BATCH, row, begin, end)
            assert moved[row, begin:end].min() > 0
            moved[row, begin:end] = 0
            assert torch.equal(moved, torch.zeros_like(moved)), (row, begin, end)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_other_rows_reach_a_document(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """One document a row: what families get that do not keep packed documents apart (gpt_oss)."""
    model = build(checkpoint_of(family))
    batch = random_batch([[13], [9], [5]])
    for row, length in enumerate(batch.lengths):
        moved = crossing_gradients(model, batch, row, 0, length)
        assert moved[row, :length].min() > 0
        moved[row, :length] = 0
        assert torch.equal(moved, torch.zeros_like(moved)), row


def test_the_families_that_are_packed_here_are_packed_in_a_run(checkpoint_of: Callable[[str], Path]) -> None:
    apart = [family for family in FAMILIES if keeps_documents_apart(Checkpoint(checkpoint_of(family)).model)]
    assert apart == PACKED


@pytest.mark.parametrize("family", PACKED)
def test_a_packed_document_gives_the_logits_it_gives_alone(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    packed = logits_of(model)
    for row, begin, end in ((0, 9, 16), (1, 0, 11), (2, 5, 8), (2, 8, 14)):
        ids = BATCH.input_ids[row : row + 1, begin:end]
        positions = torch.arange(end - begin).unsqueeze(0)
        alone = logits_of(model, Batch(ids, ids, positions, [end - begin]))
        torch.testing.assert_close(packed[row : row + 1, begin:end], alone, rtol=1e-4, atol=1e-5)


# -- which weights are what


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_experts_are_found(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    first = 1 if family == "deepseek_v3" else 0  # its first layer is dense
    assert [moe.layer for moe in model.moe] == list(range(first, 4))
    assert model.moe_from(2) == model.moe[-2:]
    assert model.moe_from(4) == []
    for moe in model.moe:
        block = f"model.layers.{moe.layer}.mlp"
        assert moe.router_name == f"{block}.{ROUTERS.get(family, 'gate')}.weight"
        assert moe.names == (f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj")
        assert moe.router_weight is model.model.get_parameter(moe.router_name)
        assert moe.router_weight.dtype == torch.float32
        assert not moe.router_weight.requires_grad  # until a trainer wants it


def test_a_shared_expert_of_the_router_s_shape_is_not_taken_for_it(tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path, "deepseek_v3", moe_intermediate_size=8))
    shared = model.model.get_submodule(f"model.layers.{model.moe[0].layer}.mlp.shared_experts.gate_proj")
    assert shared.weight.shape == model.moe[0].router_weight.shape  # type: ignore[union-attr]
    assert all(moe.router_name.endswith("mlp.gate.weight") for moe in model.moe)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["gate", "other"], "gate, other of shape"), ([], "none of shape"), (["shared_gate"], "none of")],
)
def test_a_router_that_cannot_be_told_is_refused(names: list[str], message: str) -> None:
    block = nn.Module()
    block.experts = nn.Linear(6, 8, bias=False)  # the experts' own weights never count
    block.proj = nn.Linear(6, 7)
    for name in names:
        setattr(block, name, nn.Linear(6, 8))
    with pytest.raises(UserError, match=message) as refused:
        find_router(block, "experts", 8)
    assert "\n" not in str(refused.value)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**COMMON, intermediate_size=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="llama has no MoE layers") as refused:
        build(tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("experts_q4*"))


def void(_: object) -> None:
    pass


def changed_copy(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The checkpoint and its 4-bit file, with other tensors in it."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "experts_q4.safetensors").unlink(missing_ok=True)
    return to


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"])
def test_a_missing_tensor_is_named(name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed_copy(checkpoint_of("qwen3_moe"), tmp_path / "m", lambda tensors: void(tensors.pop(name)))
    with pytest.raises(UserError, match=f"no tensor for {name}"):
        build(folder)


def test_a_tensor_of_another_shape_is_named(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    folder = changed_copy(checkpoint_of("qwen3_moe"), tmp_path / "m", cut)
    with pytest.raises(UserError, match=r"model.norm.weight has shape \(63,\), config.json asks for \(64,\)"):
        build(folder)


def test_the_base_fingerprint_tells_other_weights_and_settings(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of("qwen3_moe")
    base = build(folder).base_fingerprint
    assert build(folder).base_fingerprint == base
    seen = {base}
    for i, name in enumerate(("model.norm.weight", "model.layers.3.mlp.experts.7.down_proj.weight", "lm_head.weight")):

        def nudge(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name].view(-1)[0] += 1

        seen.add(build(changed_copy(folder, tmp_path / str(i), nudge)).base_fingerprint)
    other = changed_copy(folder, tmp_path / "config", lambda _: None)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    for key, value in (("rms_norm_eps", 1e-3), ("transformers_version", "0.0")):
        config[key] = value
        (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
        seen.add(build(other).base_fingerprint)
    assert len(seen) == 5  # the version of transformers that wrote it does not count


# -- memory


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_stay_in_16_bits(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    dense = {id(p): p for name, p in model.model.named_parameters() if "_bank." not in name}
    assert not [m for m in model.model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    layers = [m for m in model.model.modules() if isinstance(m, (FrozenLinear, FrozenEmbedding))]
    frozen = {id(p) for m in layers for p in m.parameters()}
    assert {id(p) for p in dense.values() if p.dtype == torch.bfloat16} == frozen
    parameters = sum(p.numel() for p in random_model(family).parameters())
    experts = sum(bank.numel for moe in model.moe for bank in moe.banks)
    dense_bytes = sum(p.numel() * p.element_size() for p in dense.values())
    small = sum(p.numel() for p in dense.values() if id(p) not in frozen)
    assert sum(p.numel() for p in dense.values()) == parameters - experts
    assert dense_bytes == 2 * (parameters - experts - small) + 4 * small
    assert small < 0.1 * (parameters - experts)  # norms, routers, biases of experts
    assert all(p.device.type == "cpu" for p in (*model.model.parameters(), *model.model.buffers()))


def test_expert_weights_are_held_in_4_bits_alone(checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of("qwen3_moe"))
    for moe in model.moe:
        for bank in moe.banks:
            held = sum(t.numel() * t.element_size() for t in (bank.base.packed, bank.base.scale, bank.base.offset))
            assert held <= bank.numel * 0.6
            assert bank.resident is None
            assert len(bank.delta) == 0
    assert not [p for p in model.model.parameters() if p.ndim == 3]


class LargestFloat(TorchDispatchMode):
    """The largest floating-point tensor that any operator returns, in elements, and which operator that was."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operator = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > self.elements:
                self.elements, self.operator = value.numel(), str(func)
        return result


def test_the_largest_tensor_is_seen(checkpoint_of: Callable[[str], Path]) -> None:
    """The next test's instrument: it sees a dense gradient of a layer's experts, and their decoding."""
    model = build(checkpoint_of("qwen3_moe"))
    bank = model.moe[0].banks[0]
    reference = reference_of(checkpoint_of("qwen3_moe"), model)
    with LargestFloat() as largest:
        reference(input_ids=BATCH.input_ids, labels=BATCH.input_ids).loss.backward()
    assert largest.elements >= bank.numel
    with LargestFloat() as largest:
        dequantize(bank.base)
    assert largest.elements == bank.numel


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_holds_more_than_one_dense_expert(family: str, capture: bool, tmp_path: Path) -> None:
    """16 experts of 64 x 128 and few tokens: two experts' weights would be the largest tensor of the step by far."""
    model = build(write_checkpoint(
        tmp_path, family, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=64, num_experts=16,
        num_local_experts=16, n_routed_experts=16, vocab_size=64,
    ))  # fmt: skip
    batch = random_batch([[10, 6], [14]], vocab=64)
    activate(model, per_bank=500)
    for moe in model.moe:
        for bank in moe.banks:
            bank.captured = [] if capture else None
    bank = model.moe[0].banks[0]
    with LargestFloat() as largest:
        training_step(model, batch=batch)
    assert bank.numel == 16 * bank.part_size
    assert largest.elements <= bank.part_size, largest.operator
    assert all(bool(bank.captured) == capture for moe in model.moe for bank in moe.banks)


def test_the_first_trained_layer_computes_no_gradient_for_its_input(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its up projection is decoded in the forward only, and none of its dense products has a backward; the next
    layer's have."""
    model = build(checkpoint_of("qwen3_moe"))
    activate(model)
    start = 2
    decoded: list[ExpertBank] = []
    decode, backward = ExpertBank.decode, WidenedLinear.backward
    dense_backwards: list[int] = []

    def count_decoding(bank: ExpertBank, *args: Any) -> Tensor:
        decoded.append(bank)
        return decode(bank, *args)

    def count_backward(ctx: Any, grad: Tensor) -> Any:
        dense_backwards.append(ctx.saved_tensors[0].data_ptr())
        return backward(ctx, grad)

    monkeypatch.setattr(ExpertBank, "decode", count_decoding)
    monkeypatch.setattr(WidenedLinear, "backward", staticmethod(count_backward))
    with torch.no_grad():
        below = model.run_layers(BATCH, 0, start)
    decoded.clear()
    hidden = model.run_layers(BATCH, start, 4, below)
    in_forward = {id(bank): decoded.count(bank) for bank in decoded}
    hidden.sum().backward()
    for moe in model.moe_from(start):
        up, down = moe.banks
        assert in_forward[id(up)] > 1
        assert decoded.count(down) == 2 * in_forward[id(down)]
        assert decoded.count(up) == (1 if moe.layer == start else 2) * in_forward[id(up)]
        weights = [m.weight for m in model.layers[moe.layer].modules() if isinstance(m, FrozenLinear)]
        assert [w.data_ptr() in dense_backwards for w in weights] == [moe.layer != start] * 4
    assert below.grad is None


def test_autograd_keeps_no_widened_weight_and_no_decoded_expert(checkpoint_of: Callable[[str], Path]) -> None:
    """But for the weights themselves, nothing that the backward waits for is as large as an expert or a weight."""
    model = build(checkpoint_of("qwen3_moe"))
    activate(model)
    own = {p.data_ptr() for p in model.model.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        hidden_of(model, random_batch([[6]]))
    others = [t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in own]
    assert len(others) > 20
    assert max(others) < 64 * 48 / 2


def test_what_a_family_keeps_in_fp32_is_not_rounded_to_the_compute_type() -> None:
    """A correction bias in 16 bits would choose other experts: all below the router, and what a family declares."""
    stub: Any = SimpleNamespace(_keep_in_fp32_modules_strict={"expert_bias"}, _keep_in_fp32_modules=None)
    routers = {"layers.1.mlp.gate"}
    assert keeps_fp32(stub, "layers.1.mlp.gate.moe_statics.e_score_correction_bias", routers)
    assert keeps_fp32(stub, "layers.1.mlp.expert_bias", routers)
    assert keeps_fp32(stub, "layers.1.mlp.gate.weight", routers)
    assert not keeps_fp32(stub, "layers.1.mlp.gate_proj.weight", routers)
