"""A tiny byte-level tokenizer, chat templates and sample files, shared by the tests of samples and data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Merges that join a turn's border to its content when the template leaves white space there.
MERGES = [("Ċ", "Ċ"), ("Ġ", "h"), ("h", "e"), ("l", "l"), ("he", "ll"), ("a", "n"), ("t", "h")]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: the last answer keeps its reasoning (an empty one is written), earlier ones lose it.
STRIPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '' if '</think>' in m['content'] else '<think></think>' }}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a reasoning that the rendered turn does not have.
OPENS_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SPACE_BEFORE_ANSWER = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "Today is {{ strftime_now('%Y-%m-%d, %-d %B') }}.\n" + CHATML
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}" + CHATML


def build_tokenizer(
    chat_template: str | None = None, end_of_text: bool = True, trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with seven merges, fast, without a file."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES)
    tokenizer = Tokenizer(model)
    # One piece a text, so that merges are not kept from crossing words and borders.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets, use_regex=False
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    if trim_offsets:
        from tokenizers import processors

        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = {"eos_token": END_OF_TEXT} if end_of_text else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=[TURN_BEGIN, TURN_END]
    )
    fast.chat_template = chat_template
    return fast


def write_jsonl(path: Path, samples: Iterable[Any]) -> Path:
    """One sample a line; strings are written as they are, anything else as JSON."""
    lines = (sample if isinstance(sample, str) else json.dumps(sample, ensure_ascii=False) for sample in samples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def chat(*turns: str) -> dict[str, Any]:
    """User, assistant, user, ... ; a turn given as "role: text" has its own role."""
    messages = []
    for i, turn in enumerate(turns):
        role, _, text = turn.rpartition(": ")
        messages.append({"role": role or ("user", "assistant")[i % 2], "content": text})
    return {"messages": messages}
