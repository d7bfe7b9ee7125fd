"""Shapes of models: weights against transformers' own count, activations against the real layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, build, random_batch, tiny_config, write_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from usaf.architecture import meta_model
from usaf.checkpoint import Checkpoint
from usaf.expert_store import FILE_NAME
from usaf.experts import is_experts_module
from usaf.model_shape import (
    Growth,
    ModelShape,
    Watch,
    shape_of_checkpoint,
    shape_of_config,
    stand_in_experts,
    watch_layer,
)
from usaf.trained_parts import trained_norms

LENGTH = 192  # tokens of the row with which a shape is checked; not one of those that were asked about


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json alone, a family a folder."""
    root = tmp_path_factory.mktemp("configs")
    for family in FAMILIES:
        config = tiny_config(family)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(root / family)
    return root


def shape(folders: Path, family: str) -> ModelShape:
    return shape_of_config(folders / family, 128, 4)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_one_role(folders: Path, family: str) -> None:
    found, model = shape(folders, family), meta_model(tiny_config(family))
    counted = found.shared_weights + sum(
        layer.linear_weights + layer.other_weights
        + (layer.experts.weights + layer.experts.router_weights + layer.experts.bias_weights if layer.experts else 0)
        for layer in found.layers
    )  # fmt: skip
    rest = sum(p.numel() for n, p in model.named_parameters() if n.endswith("model.norm.weight"))
    assert counted == sum(p.numel() for p in model.parameters()) - rest
    assert len(found.layers) == 4
    assert found.hidden == 64
    assert found.head == (VOCAB, 64)
    assert not found.tied


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_that_would_train(tmp_path: Path, folders: Path, family: str) -> None:
    found, model = shape(folders, family), build(write_checkpoint(tmp_path, family))
    last = found.last_norm_weights
    for start in (3, 0):
        trained = sum(model.model.get_parameter(f"{name}.weight").numel() for name in trained_norms(model, start))
        assert last + sum(layer.norm_weights for layer in found.layers[start:]) == trained
    assert last == 64
    assert all(layer.norm_weights <= layer.other_weights for layer in found.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_as_configured(folders: Path, family: str) -> None:
    found, config = shape(folders, family), tiny_config(family)
    experts = found.layers[-1].experts
    assert experts is not None
    assert experts.pairs_per_token == config.num_experts_per_tok
    assert experts.up[1] == experts.down[0] == 64
    assert experts.up[0] == 2 * experts.down[1]
    assert experts.count * 64 == experts.router_weights
    assert (found.layers[0].experts is None) == (family == "deepseek_v3")


def test_the_four_bit_file_has_the_size_that_is_planned(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    build(folder)
    found = shape_of_checkpoint(Checkpoint(folder), 128, 4)
    planned = sum(layer.experts.stored_bytes for layer in found.layers if layer.experts)
    written = (folder / FILE_NAME).stat().st_size
    assert planned <= written < planned + 10_000  # a header


def test_headers_and_config_tell_the_same(tmp_path: Path, folders: Path) -> None:
    folder = write_checkpoint(tmp_path)
    from_headers, (from_config, _, unknown) = (
        shape_of_checkpoint(Checkpoint(folder), 128, 4), shape_of_config(folder, 128, 4)
    )  # fmt: skip
    assert from_headers == from_config
    assert from_config.mapped_share == 1
    assert unknown == []


def test_experts_that_ship_in_four_bits_are_counted_as_such_and_it_is_said(tmp_path: Path) -> None:
    config = tiny_config("gpt_oss")
    config.architectures = ["GptOssForCausalLM"]
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    found, _, unknown = shape_of_config(tmp_path, 128, 4)
    experts = found.layers[0].experts
    assert experts is not None
    assert experts.encodings[0].name == "mxfp4"
    per_expert = sum(out * (inner // 2 + -(-inner // 32)) for out, inner in (experts.up, experts.down))
    assert experts.stored_bytes == experts.count * per_expert
    assert any("mxfp4" in what for what in unknown)


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [True, False])
def test_activations_are_those_of_the_real_layer(tmp_path: Path, family: str, masked: bool) -> None:
    """The model with its weights, its frozen linear maps and its router; its experts still answer by a stand-in, since
    what they hold is counted by itself."""
    folder = write_checkpoint(tmp_path, family)
    found = shape_of_checkpoint(Checkpoint(folder), 128, 4, masked)
    model = build(folder)
    trained, pairs, last = torch.zeros(1, requires_grad=True), [], model.num_layers - 1
    for module in model.model.modules():
        if is_experts_module(module):
            vars(module)["forward"] = partial(stand_in_experts, trained, pairs)
    for moe in model.moe:
        moe.router_weight.requires_grad_(True)
    answers = []

    def watched(layer: nn.Module, *args: object, **kwargs: object) -> object:
        run = partial(type(layer).forward, layer)
        answers.append(watch_layer(run, pairs, args, kwargs))
        return run(*args, **kwargs)

    layer = model.layers[last]
    layer.forward = partial(watched, layer)
    half = LENGTH // 2
    with torch.no_grad():
        model.run_layers(random_batch([[half, half] if masked else [LENGTH]]), 0, last + 1)
    (real,), planned = answers, found.layers[last].activations
    for name in ("working", "kept", "kept_first", "forward", "backward"):
        growth: Growth = getattr(planned, name)
        assert growth.at(LENGTH, LENGTH) == pytest.approx(getattr(real, name), rel=0.08), name
    assert planned.attention.at(LENGTH, LENGTH) == pytest.approx(real.attention, rel=0.02)
    heads, width = 4, 24 + 16 if family == "deepseek_v3" else 32
    assert real.attention == 2 * heads * width * LENGTH**2  # scores of all pairs, and their sums


def test_what_is_freed_is_not_alive() -> None:
    with Watch() as watch:
        a = torch.zeros(1000)
        b = a + 1
        del a
        view = b[:10]
        assert watch.bytes() == 4000
        del b
        assert watch.bytes() == 4000, "a view holds its storage"
        del view
        assert watch.bytes() == 0
    assert watch.peak == 8000


def test_growth_goes_through_both_points() -> None:
    from usaf.model_shape import LENGTHS, growth

    for truth in (Growth(100.0), Growth(100.0, 3.0), Growth(0.0, 1.0)):
        short, long = (truth.at(n, n) for n in LENGTHS)
        found = growth(short, long)
        assert found == pytest.approx(truth)
