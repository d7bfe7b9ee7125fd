"""Prompts for generation: read from flags and files, and turned into the token ids that the model goes on from.

Where the tokenizer has a chat template a prompt is a user's turn (a file's `messages` are several), rendered by the
function that renders training's contexts, so what the model meets here is what it was trained after; the template
brings every special token, and none is added to it. Raw prompts, and all prompts where there is no template, are the
text as it stands with what the tokenizer puts before any text; a `prompt` or `question` of JSONL then ends in a line
break, as it does in training.

A file of samples does as a file of prompts: the answers in it are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usaf.errors import UserError
from usaf.samples import (
    check_text,
    check_turns,
    decode_line,
    encode_beginning,
    has_chat_template,
    numbered_lines,
    on_its_own_line,
    open_file,
    parse_line,
    place,
    render_chat,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("prompt", "question", "instruction")
FORMS = '{"prompt"}, {"question"}, {"instruction"} or {"messages"}'


@dataclass(frozen=True)
class Prompt:
    """A text, or the turns of a conversation; `where` it is from, for messages."""

    content: str | list[dict[str, str]]
    where: str
    of_sample: bool = False  # the text is the first half of a training sample's form

    def turns(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content


def prompts_of_flags(texts: list[str], files: list[Path]) -> list[Prompt]:
    """Those of --prompt, then those of the files; UserError for an empty one, and where there is none at all."""
    prompts = [Prompt(text, "--prompt") for text in texts]
    for path in files:
        prompts += read_prompts(path)
    for prompt in prompts:
        if isinstance(prompt.content, str) and not prompt.content.strip():
            raise UserError(f"{prompt.where}: the prompt is empty; give the text that the model is to answer")
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT (several times, if you like), or --prompts FILE")
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line, blank lines left out. JSONL where the name ends so, or the first line is a JSON object."""
    with open_file(path) as stream:
        lines = [(number, line) for number, _, line in numbered_lines(stream)]
    if not lines:
        raise UserError(f"{place(path)}: the file has no prompts; write one a line, or JSONL: {FORMS}")
    is_jsonl = path.suffix.lower() == ".jsonl" or _is_object(lines[0][1])
    prompts = []
    for number, line in lines:
        where = place(path, number)
        try:
            prompts.append(_of_sample(parse_line(line), where) if is_jsonl else Prompt(_text_of(line), where))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return prompts


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _text_of(line: bytes) -> str:
    return decode_line(line).rstrip("\r\n")


def _of_sample(sample: dict[str, Any], where: str) -> Prompt:
    if "messages" in sample:
        messages = sample["messages"]
        check_turns(messages)
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise UserError("messages has the assistant's turns only; add the turn that it is to answer")
        return Prompt(turns, where)
    key = next((key for key in KEYS if key in sample), None)
    if key is None:
        keys = ", ".join(repr(key) for key in list(sample)[:8]) or "none"
        raise UserError(f"no prompt in it (keys: {keys}); write {FORMS}")
    check_text(key, sample[key])
    text = sample[key]
    if key == "instruction" and sample.get("input"):
        check_text("input", sample["input"])
        text = f"{text}\n\n{sample['input']}"
    return Prompt(text, where, of_sample=True)


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt after a system turn."""
    turns = prompt.turns()
    if turns[0]["role"] in ("system", "developer"):
        raise UserError(f"--system: {prompt.where} has a {turns[0]['role']} turn of its own; leave one of them out")
    return replace(prompt, content=[{"role": "system", "content": system}, *turns])


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, raw: bool = False) -> list[int]:
    """The ids after which the model is to write. raw: the text as it stands, whatever template there is."""
    try:
        if has_chat_template(tokenizer) and not raw:
            rendered = render_chat(prompt.turns(), tokenizer, generation_prompt=True)
            ids = list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
        elif isinstance(prompt.content, str):
            ids = _encode_raw(on_its_own_line(prompt.content) if prompt.of_sample and not raw else prompt.content,
                              tokenizer)  # fmt: skip
        else:
            raise UserError("turns need a chat template, and " + (
                "--raw turns it off; leave out --raw, or give text" if raw else
                "the model's tokenizer has none; give text"))  # fmt: skip
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None
    if not ids:
        raise UserError(f"{prompt.where}: the prompt comes to no token at all; give more text")
    return ids


def _encode_raw(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):  # a rendered conversation, say
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return encode_beginning(text, tokenizer)
