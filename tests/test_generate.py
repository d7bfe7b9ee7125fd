"""`python -m usaf.generate`: tokens are those of transformers' own model of the same weights, prompts are encoded once
and as in training, and every bad argument is one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from data_fixtures import (
    CHATML,
    END_OF_TEXT,
    NO_SYSTEM,
    TURN_BEGIN,
    TURN_END,
    build_tokenizer,
    chat,
    write_jsonl,
)
from fake_device import AVAILABLE, fake_device
from runs import World, read_json
from test_device_training import directml_backend
from torch import Tensor
from transformers import PreTrainedModel

from usaf.errors import UserError
from usaf.generate import main
from usaf.generation import (
    CONTEXT,
    MAX_NEW_TOKENS,
    STOP_STRING,
    STOP_TOKEN,
    Ending,
    Generated,
    Sampling,
    base_alone,
    generate,
    layers_on_device,
    read_ending,
)
from usaf.model import SparseModel
from usaf.prompts import Prompt, encode_prompt, prompts_of_flags, read_prompts, with_system
from usaf.samples import encode_sample

PROMPT = [5, 9, 11, 40, 77, 3]
NO_ENDING = Ending([], [])
TOKENIZER = build_tokenizer(CHATML)
VOCABULARY = len(TOKENIZER)
RECURRENT: dict[str, Any] = {
    "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip


@pytest.fixture(scope="module", params=[*families.FAMILIES, "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; one family carries recurrent state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "qwen3_next", RECURRENT)
        patch.setitem(families.CLASSES, "qwen3_next", "Qwen3NextConfig")
        return families.write_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param)


def tune(model: SparseModel, start: int = 0) -> None:
    """What a delta does, from layer `start` on: active weights and other routers."""
    generator = torch.Generator().manual_seed(1)
    for moe in model.moe_from(start):
        for bank in moe.banks:
            active = torch.randperm(bank.numel, generator=generator)[:400].sort().values
            bank.set_active(active, 0.1 * torch.randn(400, generator=generator))
        change = 0.05 * torch.randn(moe.router_weight.shape, generator=generator)
        moe.router_weight.data += change.to(moe.router_weight.device)


def reference_of(folder: Path, model: SparseModel) -> PreTrainedModel:
    """transformers' own model with the tuned weights, routers included."""
    reference = families.reference_of(folder, model)
    for moe in model.moe:
        reference.get_parameter(moe.router_name).data.copy_(moe.router_weight)
    return reference


def greedy(reference: Any, ids: list[int], new: int, stop: int | None = None) -> list[int]:
    reference.generation_config.eos_token_id = stop
    given = torch.tensor([ids])
    found = reference.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return found[0, len(ids) :].tolist()


def answer(model: SparseModel, new: int = 20, **changes: Any) -> Generated:
    given: dict[str, Any] = {"ending": NO_ENDING, "sampling": Sampling(), "context": 256, **changes}
    return generate(model, TOKENIZER, given.pop("prompt", PROMPT), max_new_tokens=new, **given)


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers_own_model(folder: Path) -> None:
    model = families.build(folder)
    without = answer(model).token_ids
    own = model.own_weights()
    tune(model)
    found = answer(model)
    assert found.token_ids == greedy(reference_of(folder, model), PROMPT, 20)
    assert len(found.token_ids) == 20
    assert found.stopped_by == MAX_NEW_TOKENS
    assert found.token_ids != without  # else the delta were not tested
    with base_alone(model, own):
        assert answer(model).token_ids == without
    assert answer(model).token_ids == found.token_ids


@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(folder: Path) -> None:
    model = families.build(folder)
    tune(model)
    ids = torch.randint(3, families.VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    whole = model.model(ids, use_cache=False).logits
    step = model.model(ids[:, :6], use_cache=True)
    logits = [step.logits]
    for i in range(6, ids.shape[1]):
        step = model.model(ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.skipif(not AVAILABLE, reason="needs a torch that can have a device written in Python")
def test_a_device_gives_the_tokens_of_the_cpu_and_the_host_keeps_its_own(folder: Path) -> None:
    expected = families.build(folder)
    tune(expected, start=2)
    with fake_device() as device:
        model = families.build(folder, directml_backend(device))
        for layer in (2, 3):
            model.place(layer, device)
        untuned = model.own_weights()
        without = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        tune(model, start=2)
        own = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        assert own != without
        with layers_on_device(model):
            assert {p.device.type for p in model.model.parameters()} == {device.type}
            found = answer(model, 8)
            assert found.token_ids == answer(expected, 8).token_ids
            with base_alone(model, untuned):
                assert answer(model, 8).token_ids == answer(families.build(folder), 8).token_ids != found.token_ids
        assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == own
        assert {p.device.type for p in model.layers[0].parameters()} == {"cpu"}


def tensors_of(model: SparseModel) -> dict[str, Tensor]:
    """Every tensor of the layers, those of the banks' bases included."""
    named: dict[str, Tensor] = dict(model.layers.named_parameters())
    for moe in model.moe:
        for i, bank in enumerate(moe.banks):
            named[f"{moe.layer}.{i}.packed"] = bank.base.packed
    return named


def test_frozen_experts_are_fetched_one_at_a_time(tmp_path: Path) -> None:
    """A device never holds a whole frozen bank while tokens come."""
    if not AVAILABLE:
        pytest.skip("needs a torch that can have a device written in Python")
    families.write_checkpoint(tmp_path)
    with fake_device() as device:
        model = families.build(tmp_path, directml_backend(device))
        whole = model.moe[0].banks[0].base
        with layers_on_device(model):
            base = model.moe[0].banks[0].base
            fetched = base.expert(3)
            assert fetched.packed.device.type == device.type
            assert fetched.packed.shape[0] == 1
            assert torch.equal(fetched.packed.raw, whole.packed[3:4])  # type: ignore[attr-defined]
            assert whole.packed.device.type == "cpu"
        assert model.moe[0].banks[0].base is whole


# ---- endings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """A model with the tests' vocabulary."""
    return families.build(families.write_checkpoint(tmp_path_factory.mktemp("text"), vocab_size=VOCABULARY))


def test_a_stop_token_ends_an_answer(text_model: SparseModel) -> None:
    free = answer(text_model, 12).token_ids
    place = next(i for i, token in enumerate(free) if i > 0 and token not in free[:i])
    found = answer(text_model, 12, ending=Ending([free[place], 1], []))
    assert found.token_ids == free[: place + 1]
    assert found.stopped_by == STOP_TOKEN


def test_a_stop_string_ends_an_answer(text_model: SparseModel) -> None:
    free = answer(text_model, 12)
    string = re.search("[ -~]{2}", free.text)
    assert string is not None
    found = answer(text_model, 12, ending=Ending([], [string[0]]))
    assert len(found.token_ids) < 12
    assert found.stopped_by == STOP_STRING


def test_the_context_ends_an_answer(text_model: SparseModel) -> None:
    assert answer(text_model, 12, context=len(PROMPT) + 5).stopped_by == CONTEXT
    assert len(answer(text_model, 12, context=len(PROMPT) + 5).token_ids) == 5
    assert answer(text_model, 5, context=len(PROMPT) + 5).stopped_by == MAX_NEW_TOKENS
    assert len(answer(text_model, 12, context=None).token_ids) == 12


@pytest.mark.parametrize(
    ("written", "tokens", "strings"),
    [
        (None, {2, 261}, []),
        ({"eos_token_id": [7, 8]}, {7, 8, 261}, []),
        ({"eos_token_id": 7, "stop_strings": ["###"], "temperature": 0.6, "do_sample": True}, {7, 261}, ["###"]),
        ({}, {261}, []),
    ],
)
def test_the_models_generation_config_says_what_ends_an_answer(
    tmp_path: Path, written: dict[str, Any] | None, tokens: set[int], strings: list[str]
) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.eos_token_id is not None
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written), encoding="utf-8")
    found = read_ending(tmp_path, families.tiny_config("qwen3_moe"), tokenizer)
    assert found == Ending(sorted(tokens - {261} | {tokenizer.eos_token_id}), strings)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        read_ending(tmp_path, families.tiny_config("qwen3_moe"), build_tokenizer())


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_seed(text_model: SparseModel) -> None:
    def drawn(**changes: Any) -> list[int]:
        return answer(text_model, sampling=Sampling(**{"temperature": 2.0, **changes})).token_ids

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1) != answer(text_model).token_ids
    assert drawn(seed=1, top_k=1) == drawn(seed=2, top_p=1e-6) == answer(text_model).token_ids


def test_sampling_draws_from_all_tokens_unless_told(text_model: SparseModel) -> None:
    """transformers' own default of the 50 likeliest does not slip in."""

    def lowest_place(**limits: Any) -> int:
        found = answer(text_model, 16, sampling=Sampling(temperature=1e6, **limits)).token_ids
        with torch.no_grad():
            logits = text_model.model(torch.tensor([PROMPT + found]), use_cache=False).logits[0, len(PROMPT) - 1 : -1]
        places = logits.argsort(-1, descending=True).argsort(-1)
        return int(places.gather(1, torch.tensor(found).unsqueeze(1)).max())

    assert lowest_place() > 50
    assert lowest_place(top_k=3) < 3


# ---- text as it comes -----------------------------------------------------------------------------------------------


def test_the_parts_of_a_stream_are_the_text(text_model: SparseModel) -> None:
    parts: list[str] = []
    found = answer(text_model, 30, write=parts.append, sampling=Sampling(temperature=3.0))
    assert "".join(parts) == found.text
    assert len(parts) > 5
    assert found.text == TOKENIZER.decode(found.token_ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_whole() -> None:
    from usaf.generation import Stream

    parts: list[str] = []
    stream = Stream(TOKENIZER, parts.append)
    stream.put(torch.tensor([PROMPT]))
    for token in TOKENIZER("a → b€")["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert parts == ["a", " ", "→", " ", "b", "€"]


# ---- prompts --------------------------------------------------------------------------------------------------------


def text_of(ids: list[int], tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode(ids)


def test_the_chat_template_is_applied_once() -> None:
    ids = encode_prompt(Prompt("hello", "--prompt"), TOKENIZER)
    assert text_of(ids) == f"{TURN_BEGIN}user\nhello{TURN_END}\n{TURN_BEGIN}assistant\n"
    assert ids == TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert text_of(encode_prompt(Prompt("hello", "--prompt"), TOKENIZER, raw=True)) == "hello"


def beginning_tokenizer(chat_template: str | None) -> Any:
    """One that puts a token before every text, as Llama's does, and a template that writes it too."""
    from tokenizers import processors

    tokenizer = build_tokenizer(chat_template)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def test_the_beginning_token_is_there_once() -> None:
    tokenizer = beginning_tokenizer("<|begin|>" + CHATML)
    for prompt, raw in (("hello", False), ("hello", True), ("<|begin|>hello", True)):
        ids = encode_prompt(Prompt(prompt, "--prompt"), tokenizer, raw)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize(
    "sample", [{"prompt": "hello", "completion": "hi"}, {"instruction": "add", "input": "1 2", "output": "3"}]
)
def test_a_sample_is_encoded_as_training_encodes_its_context(
    tmp_path: Path, template: str | None, sample: dict[str, str]
) -> None:
    tokenizer = build_tokenizer(template)
    [(ids, labels)] = encode_sample(sample, "prompt", tokenizer)
    [prompt] = read_prompts(write_jsonl(tmp_path / "p.jsonl", [sample]))
    context = sum(label == -100 for label in labels)
    assert encode_prompt(prompt, tokenizer) == ids[:context]


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.eos_token_id)]
    )
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id
    assert text_of(encode_prompt(Prompt("hello", "--prompt"), tokenizer), tokenizer) == "hello"


def test_the_end_of_text_may_be_a_prompt() -> None:
    tokenizer = build_tokenizer()
    assert encode_prompt(Prompt(END_OF_TEXT, "--prompt"), tokenizer) == [tokenizer.eos_token_id]


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_bytes('\ufeffone\r\n\r\n  two {"a": 1}\n'.encode())
    assert [(p.content, p.where) for p in read_prompts(lines)] == [
        ("one", f"{lines}, line 1"), ('  two {"a": 1}', f"{lines}, line 3")
    ]  # fmt: skip
    samples = [{"question": "q", "answer": "a"}, chat("u1", "a1", "u2", "a2"), {"prompt": "p"}]
    expected = ["q", chat("u1", "a1", "u2")["messages"], "p"]
    for name in ("p.jsonl", "p.json", "samples.txt"):
        assert [p.content for p in read_prompts(write_jsonl(tmp_path / name, samples))] == expected
    assert [p.content for p in prompts_of_flags(["x", "y"], [lines])] == ["x", "y", "one", '  two {"a": 1}']


def test_a_system_turn_goes_first() -> None:
    asked = with_system(Prompt("hello", "--prompt"), "be brief")
    rendered = text_of(encode_prompt(asked, TOKENIZER))
    assert rendered.startswith(f"{TURN_BEGIN}system\nbe brief{TURN_END}\n{TURN_BEGIN}user\nhello")
    with pytest.raises(UserError, match="has a system turn of its own"):
        with_system(Prompt(chat("system: x", "user: y")["messages"], "--prompt"), "be brief")
    with pytest.raises(UserError, match="refuses these messages"):
        encode_prompt(asked, build_tokenizer(NO_SYSTEM))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model with a tokenizer, trained for some steps; its data are gone."""
    world = World(tmp_path_factory.mktemp("trained"))
    shutil.rmtree(world.model)
    families.write_checkpoint(world.model, vocab_size=VOCABULARY, eos_token_id=TOKENIZER.eos_token_id)
    TOKENIZER.save_pretrained(world.model)
    world.finished("run", LR_PEAK="3e-2", ROUTER_LR="1e-2")
    world.data.unlink()
    world.other.unlink()
    return world


def delta_of(world: World) -> str:
    return str(world.runs / "run" / "delta.safetensors")


def loaded(world: World, with_delta: bool) -> PreTrainedModel:
    """transformers' own model of a finished run, by the delta's file alone."""
    model = families.with_delta(world.model, Path(delta_of(world))) if with_delta else families.build(world.model)
    return reference_of(world.model, model)


def expected_text(world: World, prompt: str, new: int, with_delta: bool = True, raw: bool = False) -> str:
    ids: Any = TOKENIZER(prompt)["input_ids"]
    if not raw:
        turns = [{"role": "user", "content": prompt}]
        ids = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    found = greedy(loaded(world, with_delta), ids, new, TOKENIZER.eos_token_id)
    return TOKENIZER.decode(found, skip_special_tokens=True)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_text_comes_from_the_trained_model(
    trained: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("usaf.session.read_data")
    figures = tmp_path / "figures.json"
    assert run("--delta", delta_of(trained), "--prompt", "hello", "--max-new-tokens", 16, "--json", figures) == 0
    text = expected_text(trained, "hello", 16)
    written = read_json(figures)
    assert written["base_only"] is False
    [found] = written["generations"]
    assert found["prompt"] == "hello"
    assert found["text"] == text
    assert found["tokens"] == 16
    assert found["prompt_tokens"] == len(encode_prompt(Prompt("hello", ""), TOKENIZER))
    assert found["stopped_by"] == MAX_NEW_TOKENS
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("(16 tokens, ")


def test_raw_base_and_compare(trained: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tuned, base = (expected_text(trained, "hello", 16, with_delta, raw=True) for with_delta in (True, False))
    assert tuned != base
    given = ["--delta", delta_of(trained), "--raw", "--max-new-tokens", 16, "--json", tmp_path / "f.json"]
    # The second prompt shows that the tuned model is back after the base has answered.
    assert run(*given, "--compare", "--prompt", "hello", "--prompt", "hello") == 0
    for found in read_json(tmp_path / "f.json")["generations"]:
        assert (found["text"], found["base"]["text"]) == (tuned, base)
    assert "[2 of 2] hello" in capsys.readouterr().out
    assert run(*given, "--base", "--prompt", "hello") == 0
    written = read_json(tmp_path / "f.json")
    assert written["base_only"] is True
    assert written["generations"][0]["text"] == base
    assert run("--base", "--model", trained.model, *given[2:], "--use-cuda", 0, "--prompt", "hello") == 0
    assert read_json(tmp_path / "f.json")["generations"][0]["text"] == base


def test_a_hundredth_of_the_change_answers_as_the_base(trained: World, tmp_path: Path) -> None:
    given = ["--delta", delta_of(trained), "--raw", "--max-new-tokens", 16, "--json", tmp_path / "f.json"]
    assert run(*given, "--prompt", "hello", "--scale", "0.01") == 0
    written = read_json(tmp_path / "f.json")
    assert written["scale"] == 0.01
    assert written["generations"][0]["text"] == expected_text(trained, "hello", 16, with_delta=False, raw=True)


@pytest.mark.parametrize(("columns", "divided"), [(100, True), (40, False)])
def test_compare_fits_the_terminal(
    trained: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, divided: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    capsys.readouterr()
    assert run("--delta", delta_of(trained), "--prompt", "x", "--max-new-tokens", 8, "--compare") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"base +\| tuned", line) for line in lines) == divided
    assert divided or {"base", "tuned"} <= set(lines)


def test_a_base_that_has_moved(trained: World, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained.model, moved)
    given = ["--delta", delta_of(trained), "--prompt", "hello", "--max-new-tokens", 4, "--json", tmp_path / "f.json"]
    assert run(*given, "--model", moved) == 0
    written = read_json(tmp_path / "f.json")
    assert written["model"] == str(moved)
    assert written["generations"][0]["text"] == expected_text(trained, "hello", 4)


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    "no delta": (["--prompt", "x"], "--delta: is missing"),
    "unknown flag": (["--delta", "{delta}", "--promt", "x"], "unrecognized arguments: --promt x"),
    "abbreviated flag": (["--delta", "{delta}", "--temp", "1"], "unrecognized arguments: --temp 1"),
    "no prompt": (["--delta", "{delta}"], "no prompt; give --prompt"),
    "empty prompt": (["--delta", "{delta}", "--prompt", ""], "--prompt: the prompt is empty"),
    "blank prompt": (["--delta", "{delta}", "--prompt", " \n"], "--prompt: the prompt is empty"),
    "no such delta": (["--delta", "{tmp}/none", "--prompt", "x"], "--delta .*none: no such file"),
    "no such file of prompts": (["--delta", "{delta}", "--prompts", "{tmp}/none"], "none: no such file"),
    "a folder of prompts": (["--delta", "{delta}", "--prompts", "{tmp}"], "this is a folder"),
    "a file without prompts": (["--delta", "{delta}", "--prompts", "{tmp}/empty.txt"], "the file has no prompts"),
    "broken JSONL": (["--delta", "{delta}", "--prompts", "{tmp}/broken.jsonl"], "line 2: not valid JSON"),
    "no prompt in it": (["--delta", "{delta}", "--prompts", "{tmp}/text.jsonl"], r"line 1: no prompt in it \(keys: 't"),
    "the answer only": (["--delta", "{delta}", "--prompts", "{tmp}/answer.jsonl"], "line 1: .*assistant's turns only"),
    "an empty line's prompt": (["--delta", "{delta}", "--prompts", "{tmp}/blank.jsonl"], "line 1: the prompt is empty"),
    "not UTF-8": (["--delta", "{delta}", "--prompts", "{tmp}/latin.txt"], "line 1: not UTF-8"),
    "turns and raw": (["--delta", "{delta}", "--raw", "--prompts", "{tmp}/chat.jsonl"], "line 1: turns need a chat"),
    "two systems": (["--delta", "{delta}", "--system", "s", "--prompts", "{tmp}/system.jsonl"], "line 1 has a system"),
    "system and raw": (["--delta", "{delta}", "--system", "s", "--raw", "--prompt", "x"], "--system contradicts --raw"),
    "empty system": (["--delta", "{delta}", "--system", "", "--prompt", "x"], "--system: is empty"),
    "base and compare": (["--delta", "{delta}", "--base", "--compare", "--prompt", "x"], "--base contradicts"),
    "no new tokens": (["--delta", "{delta}", "--max-new-tokens", "0", "--prompt", "x"], "--max-new-tokens 0: must be"),
    "half a token": (["--delta", "{delta}", "--max-new-tokens", "1.5", "--prompt", "x"], "--max-new-tokens: invalid"),
    "cold": (["--delta", "{delta}", "--temperature", "-1", "--prompt", "x"], "--temperature -1.0: must be"),
    "no temperature": (["--delta", "{delta}", "--temperature", "nan", "--prompt", "x"], "--temperature nan: must be"),
    "top-p": (["--delta", "{delta}", "--top-p", "0", "--prompt", "x"], "--top-p 0.0: must be"),
    "top-k": (["--delta", "{delta}", "--top-k", "0", "--prompt", "x"], "--top-k 0: must be"),
    "greedy and top-k": (["--delta", "{delta}", "--temperature", "0", "--top-k", "3", "--prompt", "x"], "contradicts"),
    "two scales": (["--delta", "{delta}", "--scale", "0.5,1", "--prompt", "x"], "--scale 0.5,1: must be a n"),
    "a scaled base": (["--delta", "{delta}", "--base", "--scale", "0.5", "--prompt", "x"], "--scale contradicts"),
    "seed": (["--delta", "{delta}", "--seed", "-1", "--prompt", "x"], "--seed -1: must be"),
    "too long": (["--delta", "{delta}", "--prompt", "x" * 300], "--prompt: the prompt has 3.. tokens, and .* 256"),
    "json is a folder": (["--delta", "{delta}", "--json", "{tmp}", "--prompt", "x"], "--json .*: is a folder"),
    "no such model": (["--delta", "{delta}", "--model", "{tmp}/none", "--prompt", "x"], "MODEL=.*none: no such folder"),
    "without a tokenizer": (["--delta", "{delta}", "--model", "{tmp}/mute", "--prompt", "x"], "mute: has no tokenizer"),
    "a broken ending": (["--delta", "{delta}", "--model", "{tmp}/cut", "--prompt", "x"], "config.json: cannot be read"),
    "a broken tokenizer": (["--delta", "{delta}", "--model", "{tmp}/odd", "--prompt", "x"], "odd: its tokenizer can"),
    "a foreign tokenizer": (
        ["--base", "--model", "{tmp}/small", "--use-cuda", "0", "--prompt", "x"],
        "small: its tokenizer gives token .*, and the model knows 128",
    ),
    "no template": (
        ["--delta", "{delta}", "--model", "{tmp}/plain", "--system", "s", "--prompt", "x"],
        "plain has no chat template",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(trained: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are wrong."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.txt").write_text("\n", encoding="utf-8")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    write_jsonl(root / "broken.jsonl", [{"prompt": "x"}, '{"prompt": "x'])
    write_jsonl(root / "text.jsonl", [{"text": "x"}])
    write_jsonl(root / "answer.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    write_jsonl(root / "blank.jsonl", [{"prompt": ""}])
    write_jsonl(root / "chat.jsonl", [chat("x")])
    write_jsonl(root / "system.jsonl", [chat("system: x", "user: y")])
    for name in ("mute", "odd", "plain", "cut"):
        shutil.copytree(trained.model, root / name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "mute" / file).unlink(missing_ok=True)
    (root / "cut" / "generation_config.json").write_text("{", encoding="utf-8")
    (root / "odd" / "tokenizer.json").write_text("{", encoding="utf-8")
    build_tokenizer().save_pretrained(root / "plain")
    (root / "plain" / "chat_template.jinja").unlink()
    families.write_checkpoint(root / "small")
    TOKENIZER.save_pretrained(root / "small")
    return root


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_one_line(
    trained: World, bad: Path, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded, and nothing is written."""
    monkeypatch.delattr("usaf.session.load")
    monkeypatch.setattr("usaf.session.load", lambda *_: pytest.fail("worked before refusing"), raising=False)
    before = sorted(bad.rglob("*"))
    capsys.readouterr()
    arguments, pattern = BAD[what]
    assert run(*(argument.format(tmp=bad, delta=delta_of(trained)) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert sorted(bad.rglob("*")) == before


def test_a_delta_of_another_base_is_refused(trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = families.write_checkpoint(tmp_path / "other", seed=1, vocab_size=VOCABULARY)
    TOKENIZER.save_pretrained(other)
    assert run("--delta", delta_of(trained), "--model", other, "--prompt", "x") == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(lines) == 1
    assert "was trained on another base" in lines[0]
