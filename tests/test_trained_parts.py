"""What trains beside experts and routers, for every family: which norms, their gradients, heads that stay frozen.

Judged by transformers' own model, whose calls are watched: which modules run, and which only after the last layer.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import adapted_families
import all_families
import families
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import activate, base_into, build, random_batch
from runs import events, read_json
from test_families import (
    BATCH,
    RAW,
    REPRESENTATIVE,
    Record,
    deepseek_v4_computes_in_16_bits,
    read_again,
    reference_of,
    trained,
)
from torch import nn
from transformers import PreTrainedModel

from usaf.data import NO_TARGET
from usaf.delta import load_delta
from usaf.devices import choose_backend
from usaf.linear import FrozenLinear
from usaf.loss import count_targets, loss_and_gradient
from usaf.model import SparseModel
from usaf.sparse_head import SparseHead
from usaf.trained_parts import open_head, open_norms, trained_norms

SCALED = {"beam", "gemma4_text", "gemma4", "granitemoe", "inkling2_text", "inkling2", "mistral_large4", "muse_spark"}
"""Families of `all_families` whose logits are more than what the output layer returns."""


def middle_cut(model: SparseModel) -> int:
    """A layer from which on it can train, with frozen ones below it where the family lets it."""
    cuts = model.handover.splits
    return cuts[(len(cuts) - 1) // 2]


def watched(reference: PreTrainedModel, layers: nn.ModuleList) -> tuple[set[str], set[str], bool]:
    """(the modules that a forward calls; those that it calls only after the last layer; whether the logits are the
    output layer's own, of the last hidden state as it is)."""
    called: dict[str, bool] = {}
    after, states, out = [], [], []
    hooks = [layers[-1].register_forward_hook(lambda *_: after.append(True))]

    def note(name: str, *_: Any) -> None:
        called.setdefault(name, bool(after))

    for name, module in reference.named_modules():
        hooks.append(module.register_forward_pre_hook(functools.partial(note, name)))
    decoder = reference.get_submodule(next(n for n, m in reference.named_modules() if m is layers).rpartition(".")[0])
    hooks.append(decoder.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state)))
    head: Any = reference.get_output_embeddings()
    hooks.append(head.register_forward_hook(lambda _, inputs, output: out.append((inputs[0].clone(), output.clone()))))
    with torch.no_grad():
        logits = reference(**RAW).logits
    for hook in hooks:
        hook.remove()
    plain = torch.equal(out[0][0], states[0]) and torch.equal(out[0][1], logits)
    return set(called), {name for name, late in called.items() if late}, plain


def expected_norms(model: SparseModel, reference: PreTrainedModel, start: int) -> tuple[set[str], bool]:
    """(the modules, whether the head is plain)."""
    called, late, plain = watched(reference, reference.get_submodule(model.layers_name))  # type: ignore[arg-type]
    found = set()
    for name, module in reference.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1 or name not in called:
            continue
        inside = [int(part) for part in name.removeprefix(f"{model.layers_name}.").split(".")[:1] if part.isdigit()]
        if inside if name.startswith(f"{model.layers_name}.") else name in late:
            found |= {name} if not inside or inside[0] >= start else set()
    for moe in model.moe:
        experts = moe.names[0].split(".")[:-1]
        block = experts[:-1]
        for part in (experts, moe.router_name.split(".")[: len(block) + 1]):
            found = {name for name in found if name.split(".")[: len(part)] != part}
    return found, plain


def open_parts(model: SparseModel, start: int) -> None:
    open_norms(model, start)
    if model.plain_head is not None:
        assert open_head(model)
        assert model.head is not None
        generator = torch.Generator().manual_seed(3)
        active = torch.randperm(model.head.numel, generator=generator)[:500].sort().values
        model.head.set_active(active, torch.randn(500, generator=generator) * 0.02)


def step(model: SparseModel) -> float:
    """Forward and backward of a batch; the summed loss."""
    for weight in model.norms.values():
        weight.requires_grad_(True)
    hidden = model.run_layers(BATCH, 0, model.num_layers)
    loss, gradient = loss_and_gradient(model, hidden, BATCH, 7, 1 / count_targets(BATCH))
    hidden.backward(gradient)
    return loss


def same_gradients(model: SparseModel, reference: PreTrainedModel) -> float:
    """Of norms and head, against autograd in transformers' own model; the summed loss."""
    base_into(reference, model)
    reference.requires_grad_(False)
    whole = {name: reference.get_parameter(name).requires_grad_() for name in model.norms}
    head: Any = reference.get_output_embeddings()
    head.weight.requires_grad_(True)
    logits = reference(**RAW).logits
    targets = BATCH.labels[:, 1:].flatten()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=NO_TARGET).backward()
    loss, moved = step(model), 0
    for name, weight in whole.items():
        mine = model.norms[name].grad
        zeros = torch.zeros_like(weight)  # the norms of an indexer choose tokens, and no gradient flows through that
        assert (mine is None) == (weight.grad is None), name
        theirs = zeros if weight.grad is None else weight.grad
        torch.testing.assert_close(zeros if mine is None else mine, theirs, rtol=1e-4, atol=1e-6)
        moved += bool(theirs.abs().max() > 1e-5)
    assert moved >= 2
    if model.head is not None:
        expected = head.weight.grad.reshape(-1)[model.head.active]
        torch.testing.assert_close(model.head.delta.grad, expected, rtol=1e-4, atol=1e-7)
        assert expected.abs().max() > 1e-4
    return loss


def close_in_16_bits(folder: Path, start: int, loss: float) -> None:
    """Masters in fp32, whose norms return 16 bits; everything else goes on in 16 bits."""
    model = build(folder, dataclasses.replace(choose_backend(False, True), compute_dtype=torch.bfloat16))
    activate(model)
    open_parts(model, start)
    left = {name: types_of(module) for name, module in trained_norms(model, start).items()}
    assert step(model) == pytest.approx(loss, rel=0.02)
    assert model.run_layers(BATCH, 0, model.num_layers).dtype == torch.bfloat16
    for name, seen in left.items():
        assert set(seen) == {torch.bfloat16}, name
    for name, weight in model.norms.items():
        assert weight.dtype == torch.float32, name
        assert weight.grad is None or (weight.grad.dtype == torch.float32 and bool(torch.isfinite(weight.grad).all()))
    if model.head is not None:
        assert model.head.delta.grad is not None
        assert model.head.delta.grad.dtype == torch.float32


def types_of(module: nn.Module) -> list[torch.dtype]:
    """Filled as the module runs: the types of what leaves it."""
    seen: list[torch.dtype] = []
    module.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    return seen


@pytest.mark.parametrize(
    "family", [f if f in REPRESENTATIVE else pytest.param(f, marks=pytest.mark.slow) for f in all_families.FAMILIES]
)
def test_norms_and_head_of_a_family(family: str, tmp_path: Path) -> None:
    """Which train, with transformers' gradients, and in 16 bits."""
    if not all_families.has_interface(family):
        pytest.skip(f"transformers {transformers.__version__} has no experts interface for {family}")
    folder = all_families.write_checkpoint(tmp_path, family)
    model, reference = build(folder), reference_of(folder)
    start = middle_cut(model)
    expected, plain = expected_norms(model, reference, start)
    assert set(trained_norms(model, start)) == expected
    assert any(not name.startswith(f"{model.layers_name}.") for name in expected)
    assert any(name.startswith(f"{model.layers_name}.") for name in expected)
    assert (model.plain_head is not None) == plain == (family not in SCALED)
    activate(model)
    open_parts(model, start)
    assert set(model.norms) == {f"{name}.weight" for name in expected}
    loss = same_gradients(model, reference)
    if family != "deepseek_v4" or deepseek_v4_computes_in_16_bits():
        close_in_16_bits(folder, start, loss)


@pytest.mark.parametrize("family", adapted_families.KNOWN)
def test_norms_of_a_family_with_an_adapter(family: str, tmp_path: Path) -> None:
    folder = adapted_families.write_checkpoint(tmp_path, family)
    model = build(folder)
    start = middle_cut(model)
    reference = adapted_families.reference_of(folder, family, model)
    expected, plain = expected_norms(model, reference, start)
    assert {name for name in trained_norms(model, start)} == expected
    assert (model.plain_head is not None) == plain


def test_more_layers_train_with_a_lower_start(tmp_path: Path) -> None:
    model = build(families.write_checkpoint(tmp_path))
    found = [set(trained_norms(model, start)) for start in range(5)]
    of_layer = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
    for start, names in enumerate(found):
        assert names == {"model.norm", *(f"model.layers.{i}.{n}" for i in range(start, 4) for n in of_layer)}


def test_opening_changes_no_bit_of_the_forward(tmp_path: Path) -> None:
    """In fp32: masters are the weights that were there, and a head without deltas is its base."""
    model = build(families.write_checkpoint(tmp_path, tie_word_embeddings=True))
    batch = random_batch([[20], [17]])
    plain, embeddings = families.logits_of(model, batch), model.model.get_input_embeddings()
    open_norms(model, 2)
    assert open_head(model)
    assert torch.equal(families.logits_of(model, batch), plain)
    assert isinstance(model.model.get_output_embeddings(), SparseHead)
    assert model.head is not None
    model.head.set_active(torch.arange(50), torch.ones(50))
    assert not torch.equal(families.logits_of(model, batch), plain)
    assert model.model.get_input_embeddings() is embeddings
    with torch.no_grad():
        first = embeddings(torch.tensor([0]))
    assert torch.equal(first[0, :50], model.head.weight[0, :50].float()), "the input side stays at its base"


@pytest.mark.parametrize("family", ["granitemoe", "cohere2_moe", "gemma4_text"])
def test_a_head_that_is_more_than_its_layer_stays_frozen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Divided, multiplied, capped: said in one line, and the rest trains, is saved and evaluated."""
    monkeypatch.setitem(
        all_families.CONFIGS, "cohere2_moe", {**all_families.CONFIGS["cohere2_moe"], "logit_scale": 0.25}
    )
    folder, record = all_families.write_checkpoint(tmp_path / "model", family), Record(family, "")
    model = build(folder)
    assert model.plain_head is None
    assert not open_head(model)
    assert model.head is None
    assert isinstance(model.model.get_output_embeddings(), FrozenLinear)
    path = trained(folder, tmp_path, record)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("head: frozen")]
    assert len(said) == 1
    assert "TRAIN_HEAD=0" in said[0]
    delta = load_delta(path)
    assert all(".experts." in name for name in delta.sparse)
    assert "model.norm.weight" in delta.whole
    assert read_json(path.parent / "summary.json")["head_parameters"] == 0
    assert all(not event["skipped"] for event in events(path.parent, "step") if "skipped" in event)
    read_again(path, tmp_path, record)
