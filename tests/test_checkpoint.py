"""The plan of a checkpoint against transformers' own loading, and one line for every way in which it can be broken."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from all_families import write_checkpoint as write_family
from families import COMMON, FAMILIES, random_model, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, core_model_loading

from usaf import source_folder
from usaf.checkpoint import Checkpoint
from usaf.errors import UserError
from usaf.source_folder import INDEX_NAME, SINGLE_NAME, resolve_model
from usaf.tensor_file import TensorFile

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of a family, made once; `changes` go to its configuration. Not to be written to."""
    made: dict[str, Path] = {}

    def folder(
        family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", **changes: Any
    ) -> Path:
        key = f"{family} {dtype} {shard} {sorted(changes.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            random_model(family, **changes).to(dtype).save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return folder


def check_against_transformers(folder: Path, dtype: torch.dtype) -> None:
    """Every parameter has a source or is tied, and every read equals what `from_pretrained` puts there."""
    checkpoint = Checkpoint(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    wanted = checkpoint.model.state_dict()
    assert set(wanted) == set(reference)
    assert not checkpoint.missing(wanted)
    assert not checkpoint.unexpected
    assert set(checkpoint.sources) | set(checkpoint.model.all_tied_weights_keys) == set(wanted)
    for target in checkpoint.sources:
        value = checkpoint.read(target)
        assert torch.equal(value.to(reference[target].dtype), reference[target]), target
        assert checkpoint.dtype(target) == value.dtype == dtype
    assert checkpoint.expert_parameters()
    for pair in checkpoint.expert_parameters().values():
        for target in pair:
            experts = len(reference[target])
            for e in range(experts):
                assert torch.equal(checkpoint.read_expert(target, e), reference[target][e]), (target, e)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "sharded"])
def test_reads_equal_from_pretrained(folders: Callable[..., Path], family: str, shard: str) -> None:
    folder = folders(family, shard=shard)
    assert (folder / INDEX_NAME).exists() == (shard == "40KB")
    check_against_transformers(folder, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_reads_every_float_type(folders: Callable[..., Path], family: str, dtype: torch.dtype) -> None:
    check_against_transformers(folders(family, dtype=dtype), dtype)


def test_more_than_nine_experts_come_in_their_order(folders: Callable[..., Path]) -> None:
    check_against_transformers(folders(num_experts=12, num_hidden_layers=2), torch.bfloat16)


def test_tied_embeddings_are_not_missing(folders: Callable[..., Path]) -> None:
    folder = folders(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / SINGLE_NAME)
    check_against_transformers(folder, torch.bfloat16)


def test_one_expert_is_read_from_its_own_tensors_alone(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(folders())
    read: list[str] = []
    whole = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key: (read.append(key), whole(self, key))[1])
    (name, (up, _)), *_ = checkpoint.expert_parameters().items()
    checkpoint.read_expert(up, 5)
    assert sorted(read) == [f"{name}.5.gate_proj.weight", f"{name}.5.up_proj.weight"]


def test_experts_of_several_parameters_in_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ERNIE-4.5-VL: the experts of vision follow those of text, and are not read for these."""
    if not hasattr(transformers, "Ernie4_5_VLMoeConfig"):
        pytest.skip("this transformers does not know the family")
    checkpoint = Checkpoint(write_family(tmp_path / "model", "ernie4_5_vl_moe"))
    (up, down), *_ = checkpoint.expert_parameters().values()
    assert "text_moe" in up
    wholes = {target: checkpoint.read(target) for target in (up, down)}
    monkeypatch.setattr(checkpoint, "read", lambda _: pytest.fail("read whole"))
    seen: list[str] = []
    read = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key: (seen.append(key), read(self, key))[1])
    for target, whole in wholes.items():
        for e in range(len(whole)):
            seen.clear()
            assert torch.equal(checkpoint.read_expert(target, e), whole[e])
            assert len(seen) == (2 if target == up else 1)


FUSED: dict[str, list[Any]] = {
    "rows interleaved": [("Interleave", {"dim": 1})],
    "turned": [("Transpose", {"dim0": 1, "dim1": 2})],
    "turned where it does not fit": [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": True})],
    "experts reordered": [("Interleave", {"dim": 0})],
}


@pytest.mark.parametrize("what", FUSED)
def test_one_expert_of_a_fused_source_is_read_through_its_converter(
    folders: Callable[..., Path], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Inkling, Qwen3-VL-MoE and Nemotron's speech models need; only one that mixes experts reads them all."""
    operations = []
    for name, arguments in FUSED[what]:
        if not hasattr(core_model_loading, name):
            pytest.skip(f"this transformers has no {name}")
        operations.append(getattr(core_model_loading, name)(**arguments))
    checkpoint = Checkpoint(folders("gpt_oss"))
    target = "model.layers.1.mlp.experts.gate_up_proj"  # [4, 64, 96], square it is not
    checkpoint.sources[target].converter = core_model_loading.WeightConverter(
        "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", operations=operations
    )
    checkpoint.sources[target].keys = [(target, "mlp.experts.gate_up_proj")]
    whole = checkpoint.read(target)
    assert torch.equal(whole, checkpoint.tensor(target)) == ("fit" in what)
    read: list[int] = []
    original = TensorFile._read
    monkeypatch.setattr(
        TensorFile, "_read", lambda self, start, shape, dtype: (read.append(math.prod(shape)),
                                                                original(self, start, shape, dtype))[1]
    )  # fmt: skip
    for e in range(4):
        read.clear()
        assert torch.equal(checkpoint.read_expert(target, e), whole[e])
        once = whole.numel() if e == 0 else 0  # one that mixes experts is read whole, and once
        assert sum(read) == (once if what == "experts reordered" else whole[e].numel())


def test_two_fused_tensors_are_joined_an_expert_at_a_time(folders: Callable[..., Path]) -> None:
    """As Step-3.7 stores gates and ups: a fused tensor of each."""
    checkpoint = Checkpoint(folders("gpt_oss"))
    target, other = (f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (1, 2))
    checkpoint.sources[target].converter = core_model_loading.WeightConverter(
        ["a", "b"], "mlp.experts.gate_up_proj", operations=[core_model_loading.Concatenate(dim=1)]
    )
    checkpoint.sources[target].keys = [(target, "a"), (other, "b")]
    whole = torch.cat([checkpoint.tensor(target), checkpoint.tensor(other)], dim=1)
    for e in range(4):
        assert torch.equal(checkpoint.read_expert(target, e), whole[e])


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "sharded"])
def test_experts_may_be_fused_where_their_family_has_them_apart(
    folders: Callable[..., Path], tmp_path: Path, shard: str
) -> None:
    """Named as the model's own parameters, as some tools save them; read an expert at a time."""
    apart, folder = Checkpoint(folders()), tmp_path / "model"
    model = random_model("qwen3_moe").to(torch.bfloat16)
    model.config.save_pretrained(folder)
    torch_state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if shard == "1GB":
        save_file(torch_state, folder / SINGLE_NAME, metadata={"format": "pt"})
    else:
        names = sorted(torch_state)
        where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({n: torch_state[n] for n in names if where[n] == file}, folder / file)
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    fused = Checkpoint(folder)
    assert not fused.unexpected
    assert set(fused.sources) == set(apart.sources)
    for target, source in fused.sources.items():
        assert source.converter is None
        assert torch.equal(fused.read(target), apart.read(target))
    for pair in fused.expert_parameters().values():
        for target in pair:
            assert torch.equal(fused.read_expert(target, 5), apart.read_expert(target, 5))


def test_tied_embeddings_in_shards_with_extra_heads(folders: Callable[..., Path], tmp_path: Path) -> None:
    """All at once: shards, tied embeddings, and a layer of multi-token prediction that the class does not know."""
    folder = Path(shutil.copytree(folders(shard="40KB", tie_word_embeddings=True), tmp_path / "model"))
    extra = {"model.layers.4.mlp.experts.0.up_proj.weight": torch.ones(48, 64).bfloat16(), "mtp.norm": torch.ones(64)}
    save_file(extra, folder / "mtp.safetensors", metadata={"format": "pt"})
    weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    edit_json(folder / INDEX_NAME, weight_map={**weight_map, **dict.fromkeys(extra, "mtp.safetensors")})
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.unexpected) == sorted(extra)
    assert not checkpoint.missing(checkpoint.model.state_dict())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for target in checkpoint.sources:
        assert torch.equal(checkpoint.read(target), reference[target]), target


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(changes)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def copy(folders: Callable[..., Path], tmp_path: Path) -> Path:
    """A qwen3_moe checkpoint in one file, to be broken."""
    return Path(shutil.copytree(folders(), tmp_path / "model"))


@pytest.fixture
def sharded(folders: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders(shard="40KB"), tmp_path / "model"))


def refused(folder: Path, pattern: str) -> None:
    """The checkpoint is refused in one line, and nothing in its folder changes."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=pattern) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "MODEL" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_tensors_that_the_model_does_not_know_are_tolerated(copy: Path) -> None:
    """Such as the heads for multi-token prediction, whatever they are stored in."""
    rewrite(copy, lambda t: t.update({"mtp.0.weight": torch.ones(3).to(torch.float8_e4m3fn), "x": torch.ones(2)}))
    checkpoint = Checkpoint(copy)
    assert sorted(checkpoint.unexpected) == ["mtp.0.weight", "x"]
    wanted = checkpoint.model.state_dict()
    assert set(checkpoint.sources) == set(wanted)


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one expert's tensor": (
        lambda t: t.pop("model.layers.2.mlp.experts.3.up_proj.weight"),
        r"layers\.2\.mlp\.experts\.gate_up_proj needs 8 tensors like .*up_proj.*checkpoint has 7",
    ),
    "all up projections of a layer": (
        lambda t: [t.pop(f"model.layers.2.mlp.experts.{e}.up_proj.weight") for e in range(8)],
        r"layers\.2\.mlp\.experts\.gate_up_proj needs 8 tensors like .*up_proj.*checkpoint has 0",
    ),
    "a router": (
        lambda t: t.pop("model.layers.1.mlp.gate.weight"),
        r"no tensor for model\.layers\.1\.mlp\.gate\.weight",
    ),
    "a norm": (lambda t: t.pop("model.norm.weight"), r"no tensor for model\.norm\.weight \(1 missing in all\)"),
    "shape of the embeddings": (
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(127, 64)}),
        r"embed_tokens\.weight has shape \(127, 64\), config\.json asks for \(128, 64\)",
    ),
    "shape of the experts": (
        lambda t: t.update({k: v[:, :-1].clone() for k, v in t.items() if "layers.3" in k and "down_proj" in k}),
        r"layers\.3\.mlp\.experts\.down_proj has shape \(8, 64, 47\), config\.json asks for \(8, 64, 48\)",
    ),
    "type of an expert": (
        lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if ".2.mlp.experts.3.up" in k}),
        r"experts\.3\.up_proj\.weight has dtype F8_E4M3 and no scale beside it, .*; use a checkpoint in F32, F16",
    ),
    "type of a dense weight": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e5m2)}),
        r"lm_head\.weight has dtype F8_E5M2 and no scale beside it",
    ),
    "integers for weights": (
        lambda t: t.update({"lm_head.weight": torch.ones(128, 64, dtype=torch.uint8)}),
        r"lm_head\.weight is stored as torch\.uint8",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_tensors_that_do_not_fit_are_refused_by_name(copy: Path, what: str) -> None:
    change, pattern = BROKEN[what]
    rewrite(copy, change)
    refused(copy, pattern)


def test_experts_may_all_be_absent(copy: Path) -> None:
    """They may come from a 4-bit file; the dense weights alone must be there."""
    rewrite(copy, lambda t: [t.pop(key) for key in list(t) if ".experts." in key])
    checkpoint = Checkpoint(copy)
    names = [target for pair in checkpoint.expert_parameters().values() for target in pair]
    assert checkpoint.missing(names) == names


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def some_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_a_truncated_file_is_refused(copy: Path) -> None:
    truncate(copy / SINGLE_NAME)
    refused(copy, rf"{SINGLE_NAME}: not a whole safetensors file \(.*\); download it again")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "pointer"])
def test_a_file_that_is_no_safetensors_is_refused(copy: Path, content: bytes) -> None:
    (copy / SINGLE_NAME).write_bytes(content)
    refused(copy, "not a whole safetensors file")


def test_a_truncated_shard_is_refused_by_name(sharded: Path) -> None:
    shard = some_shard(sharded)
    truncate(shard)
    refused(sharded, rf"{shard.name}: not a whole safetensors file")


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = some_shard(sharded)
    shard.unlink()
    refused(sharded, rf"{shard.name}: this file of the checkpoint is missing; download it again")


def test_an_index_of_other_shards_is_refused(sharded: Path) -> None:
    index = sharded / INDEX_NAME
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    key = next(iter(weight_map))
    other = next(shard for shard in weight_map.values() if shard != weight_map[key])
    edit_json(index, weight_map={**weight_map, key: other})
    refused(sharded, rf"{INDEX_NAME}: says that {other} holds {key}, which it does not")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_bytes(text.encode("latin-1"))
    refused(sharded, rf"{INDEX_NAME}: is not a checkpoint index \(JSON with a weight_map\)")


def test_an_empty_index_lacks_the_dense_weights(sharded: Path) -> None:
    edit_json(sharded / INDEX_NAME, weight_map={})
    refused(sharded, "has no tensor for .* missing in all")


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda p: p.unlink(), "has no config.json; give the folder of a Hugging Face checkpoint"),
    "not JSON": (lambda p: p.write_text("{", encoding="utf-8"), "config.json: transformers .* cannot read it"),
    "a list": (lambda p: p.write_text("[1]", encoding="utf-8"), "config.json: transformers .* cannot read it"),
    "wrong encoding": (lambda p: p.write_bytes(b"\xff\xfe{}"), "config.json: transformers .* cannot read it"),
    "no model_type": (lambda p: p.write_text("{}", encoding="utf-8"), "config.json: transformers .* cannot read it"),
    "unknown": (
        lambda p: edit_json(p, model_type="zork_moe", architectures=["ZorkForCausalLM"]),
        "config.json: transformers .* cannot read it.*zork_moe",
    ),
    "wrong type": (
        lambda p: edit_json(p, hidden_size="big"),
        "config.json: transformers .* cannot read it.*hidden_size",
    ),
    "own code": (
        lambda p: edit_json(
            p, model_type="zork", architectures=["Zork"], auto_map={"AutoConfig": "configuration_zork.ZorkConfig"}
        ),
        "config.json: transformers .* cannot read it",
    ),
    "quantised": (
        lambda p: edit_json(p, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config.json: quantization_config says gptq \(GPTQ, int4\), which cannot be read; use this model",
    ),
    "other experts": (
        lambda p: edit_json(p, num_experts=4, num_local_experts=4),  # the name in the file depends on transformers
        "needs 4 tensors like .*, and the checkpoint has 8",
    ),
    "other width": (
        lambda p: edit_json(p, moe_intermediate_size=64),
        r"shape \(8, 64, 48\), config\.json asks for \(8, 64, 64\)",
    ),
    "more layers": (lambda p: edit_json(p, num_hidden_layers=5), r"has no tensor for model\.layers\.4"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_does_not_serve_is_refused(copy: Path, what: str) -> None:
    change, pattern = CONFIGS[what]
    change(copy / "config.json")
    refused(copy, pattern)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**COMMON, intermediate_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    refused(tmp_path / "llama", "llama has no MoE layers .*; USAF trains experts, so choose a Mixture-of-Experts model")


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig(architectures=["ViTModelOfSomebody"]).save_pretrained(tmp_path / "vit")
    save_file({"x": torch.ones(1)}, tmp_path / "vit" / SINGLE_NAME)
    refused(tmp_path / "vit", r"no causal language model for model_type vit \(architecture ViTModelOfSomebody\)")


def test_a_checkpoint_without_safetensors_is_refused(copy: Path) -> None:
    (copy / SINGLE_NAME).unlink()
    refused(copy, f"has neither {SINGLE_NAME} nor {INDEX_NAME}; give a checkpoint in safetensors$")
    (copy / "pytorch_model.bin").write_bytes(b"")
    refused(copy, "in safetensors; convert its .bin files with save_pretrained first")


def test_fingerprint_tells_another_model_and_a_fine_tune(copy: Path, tmp_path: Path) -> None:
    fingerprint = Checkpoint(copy).sampled_fingerprint()
    moved = Path(shutil.copytree(copy, tmp_path / "moved"))
    assert Checkpoint(moved).sampled_fingerprint() == fingerprint
    rewrite(moved, lambda t: t.update({k: v + 0.01 for k, v in t.items() if "layers.3" in k}))
    assert Checkpoint(moved).sampled_fingerprint() != fingerprint
    assert Checkpoint(write_checkpoint(tmp_path / "other", seed=1)).sampled_fingerprint() != fingerprint


@pytest.mark.parametrize(
    "model", ["./models/typo", "/no/such/folder", "typo", "C:\\models\\typo", "~/no/such", "a/b/c"]
)
def test_a_misspelt_folder_is_refused_without_asking_the_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_folder, "from_hub", lambda _: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=r"MODEL=.*: no such folder; give a folder with config\.json") as caught:
        resolve_model(model)
    assert f"MODEL={model}:" in str(caught.value)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model(str(tmp_path / "x"))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub cache, and a hub at an address that takes connections and never answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as conftest sets it, nothing is asked
    monkeypatch.setattr(source_folder, "HUB_SECONDS", 0.2)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield tmp_path / "hub"


def test_a_hub_that_never_answers_is_given_up_in_seconds(no_hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"MODEL=some/model: .* check the name and the network, or download it"
    ) as caught:
        resolve_model("some/model")
    assert "\n" not in str(caught.value)
    assert "Timeout" in str(caught.value), "the hub was not asked"


def test_without_a_network_the_hubs_cache_serves(no_hub: Path, folders: Callable[..., Path]) -> None:
    repo = no_hub / "models--some--model"
    shutil.copytree(folders(), repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    assert Checkpoint(resolve_model("some/model")).num_layers() == 4


@pytest.mark.parametrize("error", [ConnectionError("x\ny"), ValueError("bad name")], ids=repr)
def test_what_the_hub_says_comes_in_one_line(no_hub: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(UserError, match=type(error).__name__):
        resolve_model("some/model")


def test_a_download_that_breaks_off_is_one_line(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> None:
        assert "*.safetensors" in allow_patterns
        raise source_folder.HTTPError("peer closed the connection")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="MODEL=some/model: .*peer closed the connection"):
        resolve_model("some/model")
