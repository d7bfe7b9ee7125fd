"""What a family's code says of itself: what layers hand on, where a model can be cut, what text never calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from all_families import tiny_config, write_checkpoint
from families import build, write_tokens
from transformers import MixtralConfig, Qwen3OmniMoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from usaf import train
from usaf.architecture import meta_model
from usaf.checkpoint import Checkpoint
from usaf.errors import UserError
from usaf.packing import kinds
from usaf.skeleton import Handover, find_decoder, get, handover, put, skeleton

KV = "shared_kv_states"


def asked(family: str) -> Handover:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {family}")
    return handover(meta_model(tiny_config(family)))


def crossing(found: Handover, boundary: int) -> list[tuple[Any, ...]]:
    return [(p.layer, p.where, p.features) for p in found.needed[boundary]]


def test_the_hidden_state_alone_crosses_in_most_families() -> None:
    found = asked("qwen3_moe")
    assert found.splits == [0, 1, 2, 3, 4]
    assert [crossing(found, b) for b in range(5)] == [[]] + [[(b, ("out",), (64,))] for b in range(4)]
    assert found.segments(1, 4) == [(1, 2), (2, 3), (3, 4)]
    assert found.width(2) == 64
    assert found.token_shape(2) == (64,)


def test_a_shared_expert_without_neurons_is_no_obstacle() -> None:
    config = tiny_config("deepseek_v3")
    config.n_shared_experts = 0
    assert handover(meta_model(config)).splits == [0, 1, 2, 3, 4]


def test_several_residual_streams_are_one_state() -> None:
    found = asked("deepseek_v4")
    assert crossing(found, 2) == [(1, ("out",), (2, 64))]
    assert found.token_shape(2) == (2, 64)


def test_a_routers_state_goes_along() -> None:
    found = asked("zaya")
    assert crossing(found, 2) == [(1, ("out", 0), (64,)), (1, ("out", 1), (16,))]
    assert crossing(found, 4) == [(3, ("out", 0), (64,))]  # nothing routes after the last layer
    assert found.width(2) == 80
    assert found.token_shape(2) == (80,)


def test_keys_and_values_go_along_as_long_as_a_later_layer_uses_them() -> None:
    found = asked("gemma4_text")  # layers 2 and 3 use those of 0 and 1
    sliding = [(0, ("kwargs", KV, "sliding_attention", i), (2, 16)) for i in (0, 1)]
    full = [(1, ("kwargs", KV, "full_attention", i), (2, 16)) for i in (0, 1)]
    assert crossing(found, 1) == [*sliding, (0, ("out",), (64,))]
    assert crossing(found, 2) == [*sliding, *full, (1, ("out",), (64,))]
    assert crossing(found, 3) == [*full, (2, ("out",), (64,))]
    assert all(p.token_axis == 2 for p in found.needed[1][:2])


def test_what_the_decoder_keeps_between_layers_goes_along() -> None:
    """Layers of inkling2 attend to what entered each earlier block of two layers."""
    found = asked("inkling2_text")
    assert crossing(found, 3) == [(1, ("out",), (64,)), (2, ("out",), (64,))]
    assert crossing(found, 4) == [(1, ("out",), (64,)), (3, ("out",), (64,))]


def test_no_cut_where_more_than_vectors_cross() -> None:
    found = asked("glm_moe_dsa")  # layer 2 attends to the tokens that layer 1 has selected
    assert crossing(found, 2)[1] == (1, ("out", 1), None)
    assert found.splits == [0, 1, 3, 4]
    assert found.segments(0, 4) == [(0, 1), (1, 3), (3, 4)]


def test_towers_and_experts_of_other_modalities_are_not_called_nor_loaded(tmp_path: Path) -> None:
    for family, absent in (("kimi_k25", "vision_tower"), ("ernie4_5_vl_moe", "vision_moe.experts")):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"this transformers does not know {family}")
        checkpoint = Checkpoint(write_checkpoint(tmp_path / family, family))
        assert any(absent in name for name in checkpoint.sources)
        assert not any(absent in name for name in checkpoint.handover.called)
        model = build(checkpoint.folder)
        assert not [name for name, _ in model.model.named_parameters() if absent in name]
        assert len(model.moe) == len(checkpoint.expert_parameters()) == 3


def test_the_asked_model_is_not_changed() -> None:
    model = meta_model(tiny_config("qwen3_moe"))
    handover(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_pre_hooks]


def test_a_skeleton_takes_no_memory_for_its_weights() -> None:
    model = skeleton(meta_model(MixtralConfig(num_hidden_layers=2)))  # 3 billion weights
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    assert sum(p.numel() for p in model.parameters()) > 2e9
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 5e6


def test_a_model_that_cannot_be_asked_is_refused_in_one_line() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 4, "vocab_size": 128}  # fmt: skip
    config = Qwen3OmniMoeConfig(thinker_config={"text_config": small}, enable_audio_output=False)
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    with pytest.raises(UserError, match="qwen3_omni_moe.*token ids and positions alone") as caught:
        handover(meta_model(config))
    assert "\n" not in str(caught.value)


def test_train_from_must_be_where_the_model_can_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "glm_moe_dsa" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know glm_moe_dsa")
    folder = write_checkpoint(tmp_path / "model", "glm_moe_dsa")
    data = write_tokens(tmp_path / "data.jsonl", samples=8)
    environ = {"MODEL": folder, "DATASET_PATH": data, "OUTPUT_DIR": tmp_path / "runs", "USE_CUDA": 0, "TRAIN_FROM": 2}
    assert train.main([], {name: str(value) for name, value in environ.items()}) == 2
    assert "TRAIN_FROM=2: in this family layer 2 goes on with what" in capsys.readouterr().err
    assert not (folder / "experts_q4.safetensors").exists()


@pytest.mark.parametrize(
    "where",
    [("kwargs", "dict", "key"), ("kwargs", "dict", "key", 1), ("kwargs", "dict", "tuple", 1),
     ("kwargs", "list", 2), ("args", 0, "key", 0)],
)  # fmt: skip
def test_what_is_put_somewhere_is_got_there(where: tuple[Any, ...]) -> None:
    value, other = torch.ones(2), torch.zeros(2)
    shared: dict[str, Any] = {"tuple": (other, other, other)}
    given = {"args": (shared,), "kwargs": {"dict": shared, "list": [other]}}
    put(given, where, value)
    assert get(given, where) is value
    assert given["args"][0] is shared  # type: ignore[index]
    assert shared["tuple"][0] is other
    assert shared["tuple"][2] is other


def test_layers_that_differ_in_their_number_alone_are_of_one_kind() -> None:
    """Also where a setting happens to equal the number (2 key-value groups in layer 2)."""
    _, _, layers = find_decoder(meta_model(tiny_config("gpt_oss")))
    sliding, full, *others = kinds(layers)
    assert others == [sliding, full]
    assert sliding != full


def test_remote_code_names_of_known_architectures_are_read(tmp_path: Path) -> None:
    """Kimi K2 is a DeepSeek-V3 by another model_type, and K2.5 names a class that transformers spells otherwise."""
    folder = write_checkpoint(tmp_path / "k2", "deepseek_v3")
    change_config(folder, model_type="kimi_k2")
    checkpoint = Checkpoint(folder)
    assert type(checkpoint.model).__name__ == "DeepseekV3ForCausalLM"
    assert not checkpoint.missing(checkpoint.model.state_dict()), (
        "its experts are apart in the file, fused in the model"
    )
    if "kimi_k25" in CONFIG_MAPPING:
        folder = write_checkpoint(tmp_path / "k25", "kimi_k25")
        change_config(folder, architectures=["KimiK25ForConditionalGeneration"])
        assert type(Checkpoint(folder).model).__name__ == "Kimi_K25ForConditionalGeneration"
    change_config(folder, model_type="unheard_of", architectures=["UnheardOfForCausalLM"])
    with pytest.raises(UserError, match="cannot read it"):
        Checkpoint(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
