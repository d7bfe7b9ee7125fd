"""The forms of training data with a real tokenizer and its chat template: SmolLM2-135M-Instruct's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fixtures import chat, write_jsonl
from families import build
from smollm2 import END_OF_TURN, SYSTEM, VOCABULARY, give_tokenizer, real_tokenizer, tiny_moe
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3NextConfig

from usaf.data import Rows, TrainingData, build_training_data
from usaf.packing import keeps_documents_apart
from usaf.samples import NO_TARGET, encode_sample
from usaf.train import main

QUESTION = "Natalia sold 48 clips in April, and 24 in May.\nHow many in all?"
ANSWER = "She sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return real_tokenizer()


def data_of(path: Path, tokenizer: PreTrainedTokenizerBase | None, **changes: Any) -> TrainingData:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "seq_len": 128, "rows_needed": None, "eval_rows": 0, "in_domain_fraction": 0.05,
        "seed": 0, **changes,
    }  # fmt: skip
    return build_training_data(path, [path], tokenizer, **options)


def documents_of(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Ids and labels between one restart of the positions and the next."""
    begins = [*np.flatnonzero(rows.positions == 0).tolist(), len(rows.positions)]
    return [(rows.input_ids[a:b].tolist(), rows.labels[a:b].tolist()) for a, b in zip(begins, begins[1:], strict=False)]


def learnt(labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([label for label in labels if label != NO_TARGET])


# The tokenizer is the published one.


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_the_tokenizer_is_smollm2s(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> None:
    """Ids of the published tokenizer: numbers are cut into digits, and a space before one stands alone."""
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token == END_OF_TURN


# Each form of a sample.


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        (chat(QUESTION, ANSWER), "messages"),
        ({"prompt": QUESTION, "completion": ANSWER}, "prompt"),
        ({"question": QUESTION, "answer": ANSWER}, "prompt"),
        ({"instruction": QUESTION, "output": ANSWER}, "prompt"),
    ],
)
def test_forms_of_one_conversation_are_the_same_tokens(
    tokenizer: PreTrainedTokenizerBase, sample: dict[str, Any], kind: Any
) -> None:
    """The system turn comes from the template, no user's text is learnt, and the answer with its end is, exactly."""
    [(ids, labels)] = encode_sample(sample, kind, tokenizer)
    context = f"{SYSTEM}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == f"{context}{ANSWER}{END_OF_TURN}\n"
    assert learnt(labels, tokenizer) == ANSWER + END_OF_TURN
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    begin = next(i for i, label in enumerate(labels) if label != NO_TARGET)
    assert ids[:begin] == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)


def test_every_assistant_turn_is_learnt_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = chat("system: Be brief.", "user: 2+2?", "assistant: 4", "user: And 3+3?", "assistant: 6\n", "user: Thanks")
    [(ids, labels)] = encode_sample(sample, "messages", tokenizer)
    text = tokenizer.decode(ids)
    assert "SmolLM" not in text  # a system turn of one's own takes the place of the template's
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n")
    assert text.endswith(f"6\n{END_OF_TURN}\n")  # what comes after the last answer teaches nothing
    assert learnt(labels, tokenizer) == f"4{END_OF_TURN}6\n{END_OF_TURN}"


def test_text_is_learnt_whole_and_ended_once(tokenizer: PreTrainedTokenizerBase) -> None:
    [(ids, labels)] = encode_sample({"text": ANSWER}, "text", tokenizer)
    assert ids == labels == [*tokenizer(ANSWER)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == ANSWER + END_OF_TURN


def test_prompt_without_chat_template_joins_the_two_texts() -> None:
    tokenizer = real_tokenizer()
    tokenizer.chat_template = None
    [(ids, labels)] = encode_sample({"question": "2+2?", "answer": "4"}, "prompt", tokenizer)
    assert tokenizer.decode(ids) == f"2+2?\n4{END_OF_TURN}"
    assert learnt(labels, tokenizer) == f"4{END_OF_TURN}"


@pytest.mark.parametrize("answer", ["\n\nYes", "  indented", "\tx", "🙂 1.5 €", "Ŝi diris: «ne»", "x\n\n\n"])
def test_answers_that_merge_with_nothing_come_back_to_the_letter(
    tokenizer: PreTrainedTokenizerBase, answer: str
) -> None:
    """The template puts a line break before the answer; white space may share a token with it, but no word may."""
    [(ids, labels)] = encode_sample({"prompt": "Say.", "completion": answer}, "prompt", tokenizer)
    assert tokenizer.decode(ids).endswith(f"<|im_start|>assistant\n{answer}{END_OF_TURN}\n")
    text = learnt(labels, tokenizer)
    assert text.endswith(answer + END_OF_TURN)
    assert text.removesuffix(answer + END_OF_TURN).strip() == ""
    assert len(text) <= len(answer + END_OF_TURN) + 1


def test_bytes_that_the_vocabulary_lacks_teach_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """SmolLM2 has no token for some control characters and drops them without a word."""
    assert tokenizer("\x04\x06")["input_ids"] == []
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "\x04\x06"}] * 3 + [{"text": "a b c"}] * 30)
    data = data_of(path, tokenizer)
    assert any("without any target dropped" in note for note in data.notes)
    assert all(tokenizer.decode(ids) == f"a b c{END_OF_TURN}" for ids, _ in documents_of(data.train))


# Token ids, packing.


@pytest.mark.parametrize("answers_only", [False, True])
def test_both_label_conventions_are_the_text_they_came_from(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, answers_only: bool
) -> None:
    samples = [{"question": f"{QUESTION} {i}", "answer": f"{ANSWER}{i}"} for i in range(24)]
    encoded = [encode_sample(sample, "prompt", tokenizer)[0] for sample in samples]
    if not answers_only:
        encoded = [(ids, ids) for ids, _ in encoded]
    aligned = [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
    shifted = [{"input_ids": ids, "labels": [*labels[1:], 198]} for ids, labels in encoded]
    read = {
        name: data_of(write_jsonl(tmp_path / f"{name}.jsonl", lines), None)
        for name, lines in (("aligned", aligned), ("shifted", shifted))
    }
    assert any("labels shifted" in note for note in read["shifted"].notes)
    assert any("labels aligned" in note for note in read["aligned"].notes)
    one, other = read["aligned"].train, read["shifted"].train
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.target_tokens() == other.target_tokens()
    for ids, labels in documents_of(other):
        assert tokenizer.decode(ids).startswith(SYSTEM + "<|im_start|>user\nNatalia")
        text = learnt(labels, tokenizer)
        assert text.startswith("She sold" if answers_only else "system\nYou are")
        assert END_OF_TURN in text


def test_packed_conversations_restart_positions_and_keep_their_losses(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    samples = [{"question": f"What is {i}+{i}?", "answer": f"{2 * i}\n#### {2 * i}"} for i in range(40)]
    rows = data_of(write_jsonl(tmp_path / "a.jsonl", samples), tokenizer, seq_len=256).train
    assert any(list(rows.positions[rows.offsets[r] : rows.offsets[r + 1]]).count(0) > 2 for r in range(len(rows)))
    found = documents_of(rows)
    expected = {f"{2 * i}\n#### {2 * i}{END_OF_TURN}" for i in range(40)}
    assert {learnt(labels, tokenizer) for _, labels in found} < expected  # in_domain has the others
    for ids, labels in found:
        assert labels[0] == NO_TARGET
        assert tokenizer.decode(ids).count("<|im_start|>") == 3


def test_neither_attention_nor_loss_crosses_packed_documents(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The model that trains gives each document of a row the logits that it has alone."""
    samples = [{"question": f"{'x ' * i}{i}?", "answer": f"{i} apples"} for i in range(1, 13)]
    rows = data_of(write_jsonl(tmp_path / "a.jsonl", samples), tokenizer, seq_len=256).train
    batch = rows.batch([0])
    model = build(tiny_moe(tmp_path / "model"))
    begins = [*np.flatnonzero(batch.position_ids[0].numpy() == 0).tolist(), batch.lengths[0]]
    assert len(begins) > 3
    with torch.no_grad():
        packed = model.logits(model.run_layers(batch, 0, model.num_layers)[0])
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        together = reference(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        unaware = reference(batch.input_ids, use_cache=False).logits[0]
        for begin, end in zip(begins, begins[1:], strict=False):
            alone = reference(batch.input_ids[:, begin:end]).logits[0]
            torch.testing.assert_close(together[begin:end], alone, rtol=0, atol=1e-5)
            ids = batch.input_ids[:, begin:end]
            own = rows.batch([0])
            own = type(own)(ids, batch.labels[:, begin:end], batch.position_ids[:, begin:end], [end - begin])
            single = model.logits(model.run_layers(own, 0, model.num_layers)[0])
            torch.testing.assert_close(packed[begin:end], single, rtol=0, atol=1e-5)
    leak = (unaware[begins[1] : begins[2]] - together[begins[1] : begins[2]]).abs().max()
    assert leak > 1e-3, "this model would not show a leak"


def test_recurrent_families_get_one_conversation_a_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        recurrent = AutoModelForCausalLM.from_config(config)
    apart = keeps_documents_apart(recurrent)
    assert not apart
    samples = [chat(f"What is {i}+{i}?", str(2 * i), "Sure?", "Yes") for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    rows = data_of(path, tokenizer, seq_len=512, one_document_per_row=not apart).train
    assert len(rows) == 19  # one is in_domain
    for row in range(len(rows)):
        span = slice(rows.offsets[row], rows.offsets[row + 1])
        assert rows.positions[span].tolist() == list(range(rows.length(row)))
        assert tokenizer.decode(rows.input_ids[span]).count("<|im_start|>system") == 1
        assert learnt(rows.labels[span].tolist(), tokenizer).endswith(f"Yes{END_OF_TURN}")


# The whole job.


def settings(folder: Path, data: Path, **changes: str) -> dict[str, str]:
    return {
        "MODEL": str(folder), "DATASET_PATH": str(data), "OUTPUT_DIR": str(data.parent / "runs"), "RUN_TAG": "a",
        "STEPS": "3", "TRAIN_FROM": "1", "FRAC": "0.05", "SEQ_LEN": "128", "IMPORTANCE_SAMPLES": "2",
        "EVAL_SAMPLES": "2", "RESELECT_EVERY": "0", "USE_CUDA": "0", **changes,
    }  # fmt: skip


def test_question_and_answer_train_through_the_chat_template(tmp_path: Path) -> None:
    samples = [{"question": f"What is {i}+{i}?", "answer": f"{2 * i}\n#### {2 * i}"} for i in range(60)]
    data = write_jsonl(tmp_path / "sums.jsonl", samples)
    assert main([], settings(tiny_moe(tmp_path / "model"), data)) == 0
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text(encoding="utf-8"))
    assert [found["name"] for found in summary["evaluations"]] == ["in_domain", "heldout_sums"]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2's tokenizer beside a model of 4,096 tokens."""
    model = give_tokenizer(tiny_moe(tmp_path / "model", vocab_size=4096))
    data = write_jsonl(tmp_path / "sums.jsonl", [{"question": QUESTION, "answer": ANSWER}] * 30)
    assert main([], settings(model, data)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {data}, line ")
    assert "outside the model's vocabulary of 4096 tokens; use the model's own tokenizer" in error
    assert not (tmp_path / "runs").exists()
