"""Sample files: what is accepted, what each broken line says, label conventions, and ids and labels of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (
    CHATML,
    DATED,
    END_OF_TEXT,
    NO_SYSTEM,
    OPENS_OTHERWISE,
    SPACE_BEFORE_ANSWER,
    STRIPS_REASONING,
    build_tokenizer,
    chat,
    write_jsonl,
)
from transformers import ByT5Tokenizer

from usaf.errors import UserError
from usaf.samples import (
    NO_TARGET,
    aligned_document,
    check_tokens,
    detect_label_convention,
    encode_sample,
    prompt_and_completion,
    read_samples,
)


def learnt(documents, tokenizer) -> list[str]:
    """The labelled text of each document: the independent judge of where the loss lies."""
    for ids, labels in documents:
        assert len(ids) == len(labels)
        assert all(label in (token, NO_TARGET) for token, label in zip(ids, labels, strict=True))
    return [tokenizer.decode([label for label in labels if label != NO_TARGET]) for _, labels in documents]


# Reading


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "tokens"),
        ({"text": "hello"}, "text"),
        ({"text": ""}, "text"),
        (chat("hi", "hello"), "messages"),
        ({"prompt": "2+2?", "completion": "4"}, "prompt"),
        ({"question": "2+2?", "answer": "4"}, "prompt"),
        ({"instruction": "Add.", "output": "4"}, "prompt"),
        ({"instruction": "Add.", "input": "2 2", "output": "4", "text": "Below is ..."}, "prompt"),
        ({"prompt": "hi", **chat("hi", "hello")}, "messages"),
        ({"text": "hello", "input_ids": [1, 2]}, "tokens"),
    ],
)
def test_kinds_are_told_apart_by_keys(tmp_path: Path, sample: dict, kind: str) -> None:
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", [sample, sample]))
    assert (samples.kind, len(samples), samples[0], samples[1]) == (kind, 2, sample, sample)


def test_names_of_prompt_and_completion_may_differ_by_line(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b"}, {"question": "c", "answer": "d"}]
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", lines))
    assert [prompt_and_completion(samples[i]) for i in (0, 1)] == [("a", "b"), ("c", "d")]


def test_alpaca_input_belongs_to_the_prompt() -> None:
    sample = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert prompt_and_completion(sample) == ("Add.\n\n2 2", "4")
    assert prompt_and_completion({**sample, "input": ""}) == ("Add.", "4")


def test_byte_order_mark_crlf_blank_lines_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["grüße", "日本語\u2028line", "plain"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n  \n" + lines[1] + b"\r\n" + lines[2])
    samples = read_samples(path)
    assert [samples[i]["text"] for i in range(3)] == texts
    assert [sample["text"] for sample in samples.read([2, 0, 1])] == [texts[2], texts[0], texts[1]]
    assert samples.where(1) == f"{path}, line 4"


def test_a_sample_costs_bytes_not_its_text(tmp_path: Path) -> None:
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", ({"text": "x" * 5000} for _ in range(200))))
    kept = [value for value in vars(samples).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept) == 200 * 17


BROKEN = [
    ('{"text": "a"', "not valid JSON"),
    ("hello", "not valid JSON"),
    ("{", "one whole JSON object"),
    ('[{"text": "a"}, {"text": "b"}]', "a JSON array, not JSONL"),
    ("[", "a JSON array, not JSONL"),
    ('"text"', "a JSON string, not an object"),
    ("null", "a JSON null, not an object"),
    ("{}", "unknown form (keys: none)"),
    ('{"prompt": "a"}', "unknown form (keys: 'prompt')"),
    ('{"labels": [1]}', "unknown form (keys: 'labels')"),
    ('{"con\\ntent": "a"}', "unknown form"),
    ('{"text": 3}', "text is a JSON number"),
    ('{"text": ["a"]}', "text is a JSON array"),
    ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ('{"input_ids": "1 2"}', "input_ids is a JSON string"),
    ('{"input_ids": []}', "input_ids is empty"),
    ('{"input_ids": [1, 2.0]}', "input_ids[1] is a JSON number (2.0)"),
    ('{"input_ids": [true, 2]}', "input_ids[0] is a JSON boolean (true)"),
    ('{"input_ids": [1, null]}', "input_ids[1] is a JSON null"),
    ('{"input_ids": [1, "' + "x" * 999 + '"]}', "input_ids[1] is a JSON string"),
    ('{"input_ids": [-1, 2]}', "input_ids[0] is -1"),
    ('{"input_ids": [-100, 2]}', "input_ids[0] is -100"),
    ('{"input_ids": [1, ' + "9" * 400 + "]}", "input_ids[1] is a huge number"),
    ('{"input_ids": [1, ' + "9" * 9999 + "]}", "a number too long"),
    ("{" + '"a":{' * 100_000, "nesting too deep"),
    ('{"input_ids": [1, 2], "labels": null}', "labels is a JSON null"),
    ('{"input_ids": [1, 2], "labels": []}', "labels is empty"),
    ('{"input_ids": [1, 2], "labels": [1]}', "input_ids has 2 entries, labels has 1"),
    ('{"input_ids": [1, 2], "labels": [1, -1]}', "labels[1] is -1"),
    ('{"messages": "hi"}', "messages is a JSON string"),
    ('{"messages": []}', "messages is empty"),
    ('{"messages": ["hi"]}', "messages[0] is a JSON string"),
    ('{"messages": [{"role": "user"}]}', "messages[0] has no content"),
    ('{"messages": [{"content": "hi"}]}', "messages[0] has no role"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content is a JSON null"),
    ('{"messages": [{"role": "gpt\\n", "content": "hi"}]}', "unknown role 'gpt\\n'"),
    ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
    ('{"messages": [{"role": "assistant", "content": "hi"}]}', "begins with the assistant's turn"),
    ('{"prompt": 1, "completion": "a"}', "prompt is a JSON number"),
    ('{"question": "a", "answer": null}', "answer is a JSON null"),
    ('{"instruction": "a", "output": ""}', "output is empty"),
    ('{"instruction": "a", "output": "b", "input": 3}', "input is a JSON number"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN, ids=[f"{i}-{problem}" for i, (_, problem) in enumerate(BROKEN)])
def test_a_broken_line_is_named_by_file_line_and_fault(tmp_path: Path, line: str, problem: str) -> None:
    for number, before in [(1, ""), (3, "\n \n")]:
        path = tmp_path / "broken.jsonl"
        path.write_text(before + line + "\n", encoding="utf-8")
        with pytest.raises(UserError) as raised:
            read_samples(path)
        message = str(raised.value)
        assert message.startswith(f"{path}, line {number}: ")
        assert problem in message
        assert len(message) < len(str(path)) + 300


GOOD = [{"input_ids": [1, 2]}, {"text": "a"}, chat("a", "b"), {"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("first", GOOD)
@pytest.mark.parametrize("second", GOOD)
def test_kinds_do_not_mix_in_a_file(tmp_path: Path, first: dict, second: dict) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [first, first, second])
    if first == second:
        assert len(read_samples(path)) == 3
        return
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: .* of kind \w+, .* \(from line 1\) are of kind .*split it"):
        read_samples(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no samples"),
        (b"\n\r\n  \n", "no samples"),
        (b"\xef\xbb\xbf", "no samples"),
        (b'{"text": "a"}\n{"text": "gr\xfc\xdfe"}\n', "line 2: not UTF-8: byte 0xfc at column 13; save"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8: byte 0xff at column 1 (it begins as UTF-16 does)"),
        (b"\x1f\x8b\x08\x00", "line 1: not UTF-8: byte 0x8b"),
        (b"PAR1\x00\x00", "line 1: not valid JSON"),
    ],
)
def test_empty_and_wrongly_encoded_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_samples(path)
    assert str(raised.value).startswith(str(path))
    assert problem in str(raised.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="this is a folder"):
        read_samples(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(write_jsonl(tmp_path / "a.jsonl", GOOD[:1]) / "below a file")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second"}]))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "another first"}, {"text": "second"}])
    with pytest.raises(UserError, match=r"a\.jsonl: the file changed"):
        samples[1]


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_ids_outside_the_vocabulary(tmp_path: Path, key: str) -> None:
    bad = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} | {key: [1, 2, 50]}
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 49]}, "", bad, bad]))
    check_tokens(samples, 51)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {key}\[2\] is 50, outside .* vocabulary of 50"):
        check_tokens(samples, 50)


# Label conventions

IDS = [5, 7, 7, 9, 2, 11]


def aligned(ids: list[int], masked: int = 0) -> dict:
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def shifted(ids: list[int], extra: int, masked: int = 0) -> dict:
    """What an earlier shift by one leaves: labels[i] is the next token, the last one a token that is not in the row."""
    return {"input_ids": ids, "labels": [-100] * masked + [*ids[1:], extra][masked:]}


AMBIGUOUS = [
    {"input_ids": [4, 4, 4], "labels": [4, 4, 4]},
    {"input_ids": [4, 5, 6], "labels": [-100, -100, -100]},
    {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]},
    {"input_ids": [4, 5, 6]},
    {"input_ids": [4], "labels": [4]},
]


@pytest.mark.parametrize(
    ("lines", "convention"),
    [
        ([aligned(IDS)], "aligned"),
        ([aligned(IDS, masked=3)], "aligned"),
        ([shifted(IDS, 8)], "shifted"),
        ([shifted(IDS, -100)], "shifted"),
        ([shifted(IDS, 8, masked=3)], "shifted"),
        (AMBIGUOUS, "aligned"),
        ([*AMBIGUOUS, aligned(IDS)], "aligned"),
        ([*AMBIGUOUS, shifted(IDS, 8)], "shifted"),
    ],
)
def test_the_convention_is_read_off_the_data(tmp_path: Path, lines: list[dict], convention: str) -> None:
    assert detect_label_convention(read_samples(write_jsonl(tmp_path / "a.jsonl", lines))) == convention


def test_a_mixture_of_conventions_is_refused_with_a_line_of_each(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [AMBIGUOUS[0], "", shifted(IDS, 8), aligned(IDS), aligned(IDS)])
    with pytest.raises(UserError, match=r"a\.jsonl: a mixture .* line 4 is aligned .* line 3 is shifted"):
        detect_label_convention(read_samples(path))


@pytest.mark.parametrize("labels", [[7, 7, 9, 2, 3, -100], [5, 7, 7, 9, 2, 12], [1, 1, 1, 1, 1, 1]])
def test_a_line_of_neither_convention_is_refused(tmp_path: Path, labels: list[int]) -> None:
    lines = [aligned(IDS), {"input_ids": IDS, "labels": labels}]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the labels are neither"):
        detect_label_convention(read_samples(write_jsonl(tmp_path / "a.jsonl", lines)))


def test_shifted_rows_become_aligned_and_lose_the_extra_target() -> None:
    assert aligned_document(shifted(IDS, 8), "shifted") == (IDS, [-100, *IDS[1:]])
    assert aligned_document(shifted(IDS, 8, masked=2), "shifted") == (IDS, [-100, -100, -100, *IDS[3:]])
    assert aligned_document(aligned(IDS, masked=2), "aligned") == (IDS, [-100, -100, *IDS[2:]])
    for convention in ("aligned", "shifted"):
        assert aligned_document({"input_ids": IDS}, convention) == (IDS, IDS)


# Encoding


def test_text_is_learnt_whole_and_ended_once() -> None:
    tokenizer = build_tokenizer()
    for text in ("hello grüße", f"hello grüße{END_OF_TEXT}"):
        [(ids, labels)] = encode_sample({"text": text}, "text", tokenizer)
        assert ids == labels
        assert tokenizer.decode(ids) == f"hello grüße{END_OF_TEXT}"
    assert encode_sample({"text": ""}, "text", tokenizer) == []


def test_text_without_an_end_token_stays_as_it_is() -> None:
    tokenizer = build_tokenizer(end_of_text=False)
    [(ids, labels)] = encode_sample({"text": "hello"}, "text", tokenizer)
    assert ids == labels
    assert tokenizer.decode(ids) == "hello"


def test_loss_on_the_assistants_turns_only() -> None:
    tokenizer = build_tokenizer(CHATML)
    sample = chat("system: be brief", "user: hi", "assistant: hello", "user: and?", "assistant: \nthe end", "user: ok")
    [document] = encode_sample(sample, "messages", tokenizer)
    rendered = tokenizer.apply_chat_template(sample["messages"][:5], tokenize=False)
    assert tokenizer.decode(document[0]) == rendered
    assert learnt([document], tokenizer)[0].replace("\n\n", "\n") == "hello<|im_end|>\n\nthe end<|im_end|>\n"


def test_neighbouring_assistant_turns_are_both_learnt() -> None:
    tokenizer = build_tokenizer(CHATML)
    documents = encode_sample(chat("user: hi", "assistant: a", "assistant: b"), "messages", tokenizer)
    assert learnt(documents, tokenizer) == ["a<|im_end|>\nb<|im_end|>\n"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_white_space_before_the_answer_is_context_unless_it_merges(trim_offsets: bool) -> None:
    tokenizer = build_tokenizer(SPACE_BEFORE_ANSWER, trim_offsets=trim_offsets)
    apart = encode_sample(chat("hi", "yes"), "messages", tokenizer)
    assert learnt(apart, tokenizer) == ["yes<|im_end|>"]
    merged = encode_sample(chat("hi", "hay"), "messages", tokenizer)  # " h" is one token here
    assert learnt(merged, tokenizer) == [" hay<|im_end|>"]


def test_a_template_that_alters_earlier_turns_gives_each_its_own_document() -> None:
    tokenizer = build_tokenizer(STRIPS_REASONING)
    sample = chat("hi", "<think>first</think>one", "and?", "two")
    documents = encode_sample(sample, "messages", tokenizer)
    assert learnt(documents, tokenizer) == [
        "<think>first</think>one<|im_end|>\n",
        "<think></think>two<|im_end|>\n",
    ]
    for (ids, labels), count in zip(documents, (1, 3), strict=True):  # context as the model meets it when it answers
        prompt = tokenizer.apply_chat_template(
            sample["messages"][:count], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [NO_TARGET] * len(prompt)
        assert labels[len(prompt) :] == ids[len(prompt) :]


def test_templates_cannot_bring_todays_date_into_the_data() -> None:
    tokenizer = build_tokenizer(DATED)
    [(ids, _)] = encode_sample(chat("hi", "hello"), "messages", tokenizer)
    assert str(tokenizer.decode(ids)).startswith("Today is 2025-01-01, 1 January.\n<|im_start|>user")


@pytest.mark.parametrize(
    ("template", "sample", "problem"),
    [
        (None, chat("hi", "hello"), "has no chat template"),
        (OPENS_OTHERWISE, chat("hi", "hello"), r"renders messages\[1\] otherwise .* give \{\"text\"\}"),
        (NO_SYSTEM, chat("system: a", "user: b", "assistant: c"), r"refuses these messages \(No system role\)"),
    ],
)
def test_chat_templates_that_cannot_serve(template: str | None, sample: dict, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        encode_sample(sample, "messages", build_tokenizer(template))


@pytest.mark.parametrize(
    ("prompt", "completion", "whole"),
    [
        ("2+2?", "hell", "2+2?\nhell"),
        ("2+2? ", "hell", "2+2? hell"),
        ("2+2?", "\nhell", "2+2?\nhell"),
        ("2+2?\n", "\nhell", "2+2?\n\nhell"),
        ("", "hell", "hell"),
    ],
)
def test_prompt_and_completion_without_chat_template(prompt: str, completion: str, whole: str) -> None:
    tokenizer = build_tokenizer()
    documents = encode_sample({"prompt": prompt, "completion": completion}, "prompt", tokenizer)
    assert tokenizer.decode(documents[0][0]) == whole + END_OF_TEXT
    assert learnt(documents, tokenizer) == [completion + END_OF_TEXT]  # exactly, whatever would merge over the border


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.eos_token_id)]
    )
    [(ids, _)] = encode_sample({"prompt": "a", "completion": "b"}, "prompt", tokenizer)
    assert tokenizer.decode(ids) == f"a\nb{END_OF_TEXT}"
    [(ids, _)] = encode_sample({"text": "a"}, "text", tokenizer)
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}"


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer"), ("instruction", "output")])
def test_prompt_and_completion_with_chat_template_are_a_conversation(names: tuple[str, str]) -> None:
    tokenizer = build_tokenizer(CHATML)
    documents = encode_sample(dict(zip(names, ("hi", "hello"), strict=True)), "prompt", tokenizer)
    assert documents == encode_sample(chat("hi", "hello"), "messages", tokenizer)
    assert learnt(documents, tokenizer) == ["hello<|im_end|>\n"]


def test_a_tokenizer_without_offsets_learns_the_same_text() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = SPACE_BEFORE_ANSWER.replace("<|im_end|>", "\n")
    documents = encode_sample(chat("hi", "hello", "and?", "the end"), "messages", tokenizer)
    assert learnt(documents, tokenizer) == ["hello\nthe end\n"]
    assert tokenizer.decode(documents[0][0]) == "user: hi\nassistant: hello\nuser: and?\nassistant: the end\n"
