"""Families with an adapter against transformers' own model of them: values, gradients, reading, whole runs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted_families import (
    FAMILIES,
    KNOWN,
    LLAMA4_WHOLE,
    VOCAB,
    own_class,
    own_gradients,
    own_weights,
    random_model,
    randomise,
    reference_of,
    tiny_config,
    write_checkpoint,
)
from families import activate, build, leaks, logits_of, random_batch, with_delta, write_tokens
from families import tiny_config as config_with_the_interface
from runs import World, delta_tensors, events, read_json
from safetensors.torch import load_file
from test_model import in_type, training_step
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import Chunk, Concatenate, ConversionOps, Transpose, WeightConverter

from usaf import adapters, evaluate, export
from usaf.adapters.dbrx import RowsToExperts
from usaf.adapters.fused import FusedExperts
from usaf.architecture import meta_model
from usaf.checkpoint import Checkpoint
from usaf.delta import load_delta
from usaf.errors import UserError
from usaf.expert_store import shapes_of
from usaf.experts import is_experts_module
from usaf.packing import keeps_documents_apart
from usaf.source_folder import SINGLE_NAME
from usaf.weight_plan import expert_by_expert

BATCH = random_batch([[9, 7], [11], [5, 3, 6]])  # llama4's chunks are of 8 tokens, step3p7's windows too
RAW: dict[str, Any] = {"input_ids": BATCH.input_ids, "position_ids": BATCH.position_ids, "use_cache": False}
# The same products, but transformers adds a token's experts up in another order (dbrx, longcat_flash: 8e-7; the others
# are equal to the bit).
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint; made once."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), family)
        return folders[family]

    return get


# -- which families there are


def test_adapters_serve_what_transformers_does_not() -> None:
    """Fails when transformers gains the interface for a family: then drop its adapter."""
    for family in KNOWN:
        with torch.device("meta"):
            own = own_class(family)._from_config(tiny_config(family))
        assert not any(is_experts_module(module) for module in own.modules()), family
        assert own.config.model_type in adapters.ADAPTERS


def test_every_adapter_is_tested() -> None:
    tested = {family.partition(",")[0] for family in FAMILIES}
    assert set(adapters.ADAPTERS) - {"llama4"} == tested  # llama4: the multimodal whole, see below
    assert set(FAMILIES) - set(KNOWN) <= {"dbrx", "step3p7"}  # what older versions of transformers lack


def test_a_model_with_the_interface_is_left_alone() -> None:
    model = meta_model(config_with_the_interface("qwen3_moe"))
    assert not any(isinstance(module, FusedExperts) for module in model.modules())
    assert adapters.conversions(model) == []


@pytest.mark.parametrize("family", KNOWN)
def test_a_rewritten_model_has_the_ordinary_structure(family: str) -> None:
    model = meta_model(tiny_config(family))
    experts = [module for module in model.modules() if is_experts_module(module)]
    assert len(experts) >= 2
    assert all(parameter.is_meta for parameter in model.parameters())
    for module in experts:
        assert (module.gate_up_proj.ndim, module.down_proj.ndim) == (3, 3)


def test_doge_is_refused_in_one_line() -> None:
    config = transformers.DogeConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, is_moe=True,
                                     num_experts=16, num_experts_per_tok=2, vocab_size=VOCAB)  # fmt: skip
    with pytest.raises(UserError, match=r"doge has no MoE layers that transformers' experts interface or an adapter"):
        meta_model(config)


# -- reading a checkpoint


@pytest.mark.checks("load")
@pytest.mark.parametrize("family", KNOWN)
def test_every_parameter_is_read_as_transformers_reads_it(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:  # fmt: skip
    checkpoint = Checkpoint(checkpoint_of(family))
    reference = own_class(family).from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    own = reference.state_dict()
    shapes = shapes_of(checkpoint)
    shared = set(own) & set(checkpoint.sources) - set(shapes)
    assert len(shared) > 20
    for target in shared:
        assert torch.equal(checkpoint.read(target).to(own[target].dtype), own[target]), target
    for name, pair in checkpoint.expert_parameters().items():
        is_transposed = checkpoint.model.get_submodule(name).is_transposed
        expected = own_weights(reference, family, pair, shapes[pair[0]][0])
        for target, weight in zip(pair, expected, strict=True):
            whole = checkpoint.read(target)
            assert torch.equal(whole.transpose(1, 2) if is_transposed else whole, weight), target
    zero_experts = [key for key in checkpoint.unexpected if family == "longcat_flash" and ".experts." in key]
    assert checkpoint.unexpected == zero_experts


@pytest.mark.parametrize("family", KNOWN)
def test_the_converters_of_experts_run_backwards_to_the_bytes(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:  # fmt: skip
    """Of every expert parameter: the tensors that the checkpoint holds, under their names in the layer."""
    checkpoint = Checkpoint(checkpoint_of(family))
    stored = load_file(checkpoint.folder / SINGLE_NAME)
    for target in shapes_of(checkpoint):
        source, whole = checkpoint.sources[target], checkpoint.read(target)
        if source.converter is None:
            assert torch.equal(whole, stored[source.keys[0][0]])
            continue
        back = copy.deepcopy(source.converter).reverse_transform()
        name = back.rename_source_key(target)[0].replace(".*.", ".0.")
        back.add_tensor(name, target, back.source_patterns[0], whole)  # type: ignore[arg-type]
        parts = back.convert(name, model=checkpoint.model, config=checkpoint.config)
        in_layer = {re.sub(r".*?\.\d+\.", "", key, count=1): stored[key] for key, _ in source.keys}
        assert len(in_layer) == len(source.keys) == len(parts)
        for key, tensor in parts.items():
            assert torch.equal(tensor, in_layer[re.sub(r".*?\.\d+\.", "", key, count=1)]), key


@pytest.mark.parametrize("family", KNOWN)
def test_one_expert_is_read_at_a_time(
    family: str, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(checkpoint_of(family))
    targets = [target for pair in checkpoint.expert_parameters().values() for target in pair]
    whole = {target: checkpoint.read(target) for target in targets}
    by_expert = checkpoint.sources[targets[0]].experts_apart
    assert by_expert == (family == "longcat_flash")  # there a tensor is one expert's
    if not by_expert:
        monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("read a tensor of all experts"))
    for target in targets:
        for e in range(len(whole[target])):
            assert torch.equal(checkpoint.read_expert(target, e), whole[target][e]), (target, e)


@pytest.mark.parametrize(
    ("operation", "apart"),
    [(Concatenate(dim=1), True), (Concatenate(dim=0), False), (Transpose(1, 2), True), (Transpose(0, 1), False),
     (RowsToExperts(4), True), (Chunk(dim=1), False)],
    ids=repr,
)  # fmt: skip
def test_converters_that_mix_experts_are_told(operation: ConversionOps, apart: bool) -> None:
    assert expert_by_expert(WeightConverter("a", "b", operations=[operation])) == apart


# -- the model against transformers


@pytest.mark.checks("logits")
@pytest.mark.parametrize("family", KNOWN)
def test_logits_equal_those_of_transformers(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    activate(model)
    with torch.no_grad():
        expected = reference_of(checkpoint_of(family), family, model)(**RAW).logits
    assert expected.std() > 0.1  # or the comparison would say little
    torch.testing.assert_close(logits_of(model, BATCH), expected, **CLOSE)


@pytest.mark.checks("gradients")
@pytest.mark.parametrize("family", KNOWN)
def test_loss_and_gradients_equal_the_dense_ones(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of(family))
    activate(model)
    reference = reference_of(checkpoint_of(family), family, model)
    loss = reference(**RAW, labels=BATCH.labels).loss
    loss.backward()
    assert training_step(model, batch=BATCH) == pytest.approx(loss.item(), rel=1e-6)
    assert model.moe
    for moe in model.moe:
        dense = own_gradients(reference, family, moe.names, moe.banks[0].num_experts)
        for bank, expected in zip(moe.banks, dense, strict=True):
            expected = expected.reshape(-1)[bank.active]
            torch.testing.assert_close(bank.delta.grad, expected, rtol=1e-4, atol=1e-7)
            assert expected.abs().max() > 1e-5
        router = reference.get_parameter(moe.router_name).grad
        assert router is not None
        torch.testing.assert_close(moe.router_weight.grad, router, rtol=1e-4, atol=1e-7)
        assert router.abs().max() > 1e-5


@pytest.mark.parametrize("family", KNOWN)
def test_the_router_chooses_and_weighs(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Another router gives other logits, and tokens go to different experts: nothing above is compared in vain."""
    model = build(checkpoint_of(family))
    chosen: list[Tensor] = []
    for moe in model.moe:
        experts = model.model.get_submodule(moe.names[0].rpartition(".")[0])
        experts.register_forward_pre_hook(lambda _module, args: chosen.append(args[1]))
    before = logits_of(model, BATCH)
    for ids, moe in zip(chosen, model.moe, strict=True):
        assert ids.shape[0] == BATCH.input_ids.numel()
        assert len(ids.unique()) > ids.shape[1]
        assert bool((ids >= moe.banks[0].num_experts).any()) == (family == "longcat_flash")  # its zero experts
        moe.router_weight.data.mul_(0.5)
    assert (logits_of(model, BATCH) - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", KNOWN)
def test_only_chosen_experts_are_computed(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """One token-expert pair for each choice of an expert that has weights."""
    model = build(checkpoint_of(family))
    activate(model)
    chosen: list[int] = []
    for moe in model.moe:
        experts = model.model.get_submodule(moe.names[0].rpartition(".")[0])
        experts.register_forward_pre_hook(
            lambda _module, args, e=moe.banks[0].num_experts: chosen.append(int((args[1] < e).sum()))  # type: ignore
        )
        for bank in moe.banks:
            bank.captured = []
    training_step(model, batch=BATCH)
    for pairs, moe in zip(chosen, model.moe, strict=True):
        for bank in moe.banks:
            assert [captured.starts[-1] for captured in bank.captured or []] == [pairs]


@pytest.mark.checks("split")
@pytest.mark.parametrize("family", KNOWN)
def test_two_stretches_give_the_bits_of_the_whole_at_every_split(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    model = build(checkpoint_of(family))
    assert model.num_layers == 4 == Checkpoint(checkpoint_of(family)).num_layers()
    with torch.no_grad():
        whole = model.run_layers(BATCH, 0, model.num_layers)
        layer_by_layer = None
        for split in range(1, model.num_layers):
            below = model.run_layers(BATCH, 0, split)
            assert torch.equal(model.run_layers(BATCH, split, model.num_layers, below), whole), split
            layer_by_layer = model.run_layers(BATCH, split - 1, split, layer_by_layer)
            assert torch.equal(layer_by_layer, below)


@pytest.mark.parametrize("family", KNOWN)
def test_computing_in_bfloat16_is_close_and_keeps_routers_in_fp32(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    wide, narrow = build(checkpoint_of(family)), build(checkpoint_of(family), in_type(torch.bfloat16))
    for model in (wide, narrow):
        activate(model)
    assert narrow.run_layers(BATCH, 0, 4).dtype == torch.bfloat16
    assert training_step(narrow, batch=BATCH) == pytest.approx(training_step(wide, batch=BATCH), rel=0.01)
    for moe, expected in zip(narrow.moe, wide.moe, strict=True):
        pairs = [(moe.router_weight, expected.router_weight)]
        pairs += [(bank.delta, other.delta) for bank, other in zip(moe.banks, expected.banks, strict=True)]
        for got, want in pairs:
            assert got.dtype == got.grad.dtype == torch.float32  # type: ignore[union-attr]
            assert torch.nn.functional.cosine_similarity(got.grad.flatten(), want.grad.flatten(), 0) > 0.9  # type: ignore[union-attr]


@pytest.mark.checks("packing")
@pytest.mark.parametrize("family", KNOWN)
def test_the_answer_about_packed_documents_agrees_with_the_logits(family: str) -> None:
    assert keeps_documents_apart(meta_model(tiny_config(family))) == (not leaks(random_model(family)))


# -- one family's own


def test_jetmoe_keeps_the_experts_of_its_attention_in_16_bits(checkpoint_of: Callable[[str], Path]) -> None:
    model = build(checkpoint_of("jetmoe"))
    frozen = {n: p for n, p in model.model.named_parameters() if "self_attention.experts" in n and "_linear" in n}
    assert len(frozen) == 8
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in frozen.values())
    assert {name.split(".")[3] for moe in model.moe for name in moe.names} == {"mlp"}


def test_llama4_by_its_multimodal_checkpoint(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    """`config.json` says llama4; what is read is the text part, and it is the whole's text part."""
    config = transformers.Llama4Config(**LLAMA4_WHOLE)
    whole = randomise(transformers.Llama4ForConditionalGeneration._from_config(config, dtype=torch.float32))
    whole.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama4"
    model = build(tmp_path)
    own = transformers.Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text = {name.removeprefix("language_model."): value for name, value in own.state_dict().items()}
    alone = transformers.Llama4ForCausalLM(config.text_config)
    assert not alone.load_state_dict(text, strict=False).missing_keys
    alone.to(torch.bfloat16).save_pretrained(tmp_path / "text")
    reference = reference_of(tmp_path / "text", "llama4_text", model)
    own.language_model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        # Its text part, not the whole: transformers 5.24 wants images of that ("no attribute 'image_outputs'").
        torch.testing.assert_close(logits_of(model, BATCH), own.language_model(**RAW).logits, **CLOSE)
    checkpoint = Checkpoint(tmp_path)
    assert all(key.startswith(("vision_model.", "multi_modal_projector.")) for key in checkpoint.unexpected)
    assert checkpoint.unexpected


def test_dbrx_of_another_width_is_refused_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dbrx")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["ffn_config"]["ffn_hidden_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"gate_up_proj: 384 rows are no whole number of experts of 40 rows"):
        Checkpoint(tmp_path)


def test_longcat_without_zero_experts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "longcat_flash", zero_expert_num=0)
    model = build(folder)
    assert Checkpoint(folder).unexpected == []
    with torch.no_grad():
        expected = reference_of(folder, "longcat_flash", model)(**RAW).logits
    torch.testing.assert_close(logits_of(model, BATCH), expected, **CLOSE)


def test_longcat_as_published_without_tensors_for_zero_experts(
    tmp_path: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    from safetensors.torch import save_file

    source = Checkpoint(checkpoint_of("longcat_flash"))
    tensors = load_file(source.folder / SINGLE_NAME)
    assert len(source.unexpected) == 4 * 2 * 2  # layers, zero experts, gate and up
    save_file({k: v for k, v in tensors.items() if k not in source.unexpected}, tmp_path / SINGLE_NAME,
              {"format": "pt"})  # fmt: skip
    (tmp_path / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    model = build(tmp_path)
    assert Checkpoint(tmp_path).unexpected == []
    assert torch.equal(logits_of(model, BATCH), logits_of(build(source.folder), BATCH))


# -- whole runs


class AdaptedWorld(World):
    def __init__(self, root: Path, family: str) -> None:
        self.root, self.model, self.runs = root, root / "model", root / "runs"
        write_checkpoint(self.model, family)
        self.data = write_tokens(root / "data.jsonl")
        self.other = write_tokens(root / "other.jsonl", samples=6, seed=5)


@pytest.mark.checks("run", "reload", "export")
@pytest.mark.parametrize("family", KNOWN)
def test_a_whole_run_and_its_delta_evaluated_again(family: str, tmp_path: Path) -> None:
    world = AdaptedWorld(tmp_path, family)
    folder = world.finished("run")
    assert [event["step"] for event in events(folder, "reselect")] == [4, 8]
    assert all(event["grown"] > 0 for event in events(folder, "reselect"))
    assert any(tensor.abs().max() > 0 for name, tensor in delta_tensors(folder).items() if "values" in name)
    out = tmp_path / "figures.json"
    assert evaluate.main(["--delta", str(folder / "delta.safetensors"), "--json", str(out)]) == 0
    final = {e["name"]: e["loss"] for e in events(folder, "eval") if e["step"] == 12}
    first = {e["name"]: e["loss"] for e in events(folder, "eval") if e["step"] == 0}
    assert {e["name"]: e["loss"] for e in read_json(out)["evaluations"]} == final
    assert sum(final.values()) < sum(first.values())
    check_export(family, world, folder / "delta.safetensors")


def export_to(output: Path, path: Path, *flags: str) -> dict[str, Tensor]:
    assert export.main(["--delta", str(path), "--output", str(output), "--no-evaluate", *flags]) == 0
    return load_file(output / SINGLE_NAME)


def check_export(family: str, world: World, path: Path) -> None:
    """Both bases, loaded by transformers itself under the family's own names."""
    delta, model = load_delta(path), with_delta(world.model, path)
    whole = world.root / "dequantized"
    export_to(whole, path, "--base", "dequantized", "--dtype", "fp32")
    own = own_class(family).from_pretrained(whole, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(own(**RAW).logits, logits_of(model, BATCH), **CLOSE)
    source = load_file(world.model / SINGLE_NAME)
    merged = export_to(world.root / "original", path, "--dtype", "fp32")
    untied = merged.keys() - source.keys()
    assert untied <= {"lm_head.weight"}
    source |= {key: source["model.embed_tokens.weight"] for key in untied}
    changed = {key: int((merged[key].float() != source[key].float()).sum()) for key in source}
    plan = Checkpoint(world.model).sources
    routers = {key for name in delta.whole for key, _ in plan[name].keys}
    experts = {key for name in delta.sparse.keys() - untied for key, _ in plan[name].keys} | untied
    assert all(changed[key] > 0 for key in routers)
    assert sum(changed[key] for key in experts) == sum(int((v != 0).sum()) for _, v in delta.sparse.values()) > 0
    assert not any(changed[key] for key in source.keys() - routers - experts)
