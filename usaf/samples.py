"""Training samples: JSONL files read once and checked, and samples turned into token ids and labels.

A file holds one JSON object a line, of one kind, told by its keys (a line that has the keys of several is what comes
first here):

    tokens    {"input_ids": [...], "labels": [...]}      labels may be missing: every token is then a target
    messages  {"messages": [{"role": ..., "content": ...}, ...]}      loss on the assistant's turns only
    prompt    {"prompt", "completion"} | {"question", "answer"} | {"instruction", "output"}      loss on the answer;
              an Alpaca "input" beside an "instruction" is part of the prompt
    text      {"text": ...}      loss on every token

Labels are *aligned* everywhere behind this module: labels[i] is the token at position i if it is a target and -100 if
not, and the loss predicts labels[i+1] from position i. Files with token ids come in two conventions,

    aligned   labels[i] == input_ids[i]        wherever labels[i] != -100
    shifted   labels[i] == input_ids[i+1]      wherever labels[i] != -100, i < n - 1; labels[n-1] is an extra target

and training on the second as if it were the first shifts twice without any visible fault, so the convention is read
off the data: every line must fit it, and one line alone cannot change it silently.

Only the byte offset of each line is kept (some 17 bytes a sample), so 100,000 samples stay small; a line is read again
when it is wanted. Left out: attention masks (all tokens of a sample count), content made of several parts (images),
and tool descriptions.

Sources: the label shift is transformers' `ForCausalLMLoss`; chat templates are transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from jinja2 import TemplateError

from usaf.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["tokens", "text", "messages", "prompt"]
LabelConvention = Literal["aligned", "shifted"]
Document = tuple[list[int], list[int]]
"""Token ids and aligned labels, equally long."""

NO_TARGET = -100
PROMPT_KEYS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = (
    '{"text"}, {"messages"}, {"prompt", "completion"}, {"question", "answer"}, {"instruction", "output"} '
    'or {"input_ids", "labels"}'
)
UTF8_BOM = b"\xef\xbb\xbf"
FITS_ALIGNED, FITS_SHIFTED = 1, 2
LARGEST_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, eq=False)
class SampleFile:
    """A checked JSONL file. `file[i]` reads sample i from the disk; `read(indices)` reads many through one open file.

    starts: int64 [samples], the byte at which each sample's line begins; lines: int64 [samples], its number, from 1;
    fits: uint8 [samples], the label conventions that each sample of token ids fits (bits FITS_ALIGNED, FITS_SHIFTED);
    largest_id: the largest token id or label of the file, -1 unless the kind is tokens.
    """

    path: Path
    kind: Kind
    starts: np.ndarray
    lines: np.ndarray
    fits: np.ndarray
    largest_id: int
    stamp: tuple[int, int]  # size in bytes and time of change in nanoseconds, when it was checked

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return next(self.read([index]))

    def read(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Samples in the order of `indices`. Raises UserError when the file has changed since it was checked."""
        with open_file(self.path) as stream:
            if _stamp(stream) != self.stamp:
                raise UserError(f"{place(self.path)}: the file changed while it was in use; start again")
            for index in indices:
                stream.seek(int(self.starts[index]))
                yield json.loads(stream.readline())

    def where(self, index: int) -> str:
        """`FILE, line N` of sample `index`, for messages."""
        return place(self.path, int(self.lines[index]))


def place(path: str | os.PathLike[str], line: int | None = None) -> str:
    """`FILE` or `FILE, line N`, on one line whatever the file is called."""
    name = str(path).replace("\n", " ").replace("\r", " ")
    return name if line is None else f"{name}, line {line}"


def read_samples(path: str | os.PathLike[str]) -> SampleFile:
    """Checks every line of a JSONL file in one pass. A byte order mark, CRLF and blank lines are tolerated.

    Raises UserError (file, line, what is wrong, remedy) for a file that cannot be read, is empty, is not UTF-8 or not
    JSONL, for a broken sample, and for a file of several kinds. Ids are compared with a vocabulary by `check_tokens`.
    """
    path = Path(path)
    starts, lines, fits = array("q"), array("q"), bytearray()
    kind: Kind | None = None
    largest_id = -1
    with open_file(path) as stream:
        stamp = _stamp(stream)
        for number, start, line in numbered_lines(stream):
            try:
                sample = parse_line(line)
                found = _kind_of(sample)
                if kind is not None and found != kind:
                    raise UserError(
                        f"this sample is of kind {found}, the samples before it (from line {lines[0]}) are of kind "
                        f"{kind}; a file holds one kind: split it"
                    )
                kind = found
                _CHECKS[kind](sample)
            except UserError as error:
                raise UserError(f"{place(path, number)}: {error}") from None
            starts.append(start)
            lines.append(number)
            fits.append(_label_fit(sample) if kind == "tokens" else 0)
            if kind == "tokens":
                largest_id = max(largest_id, *sample["input_ids"], *sample.get("labels", ()))
    if kind is None:
        raise UserError(f"{place(path)}: the file has no samples; write one JSON object a line: {FORMS}")
    return SampleFile(
        path, kind, np.array(starts, np.int64), np.array(lines, np.int64), np.array(fits, np.uint8), largest_id, stamp
    )


def check_tokens(samples: SampleFile, vocab_size: int) -> None:
    """Raises UserError naming the first line with an id or label that is not below `vocab_size`."""
    if samples.largest_id < vocab_size:
        return
    for index, sample in enumerate(samples.read(range(len(samples)))):
        for key in ("input_ids", "labels"):
            for position, token in enumerate(sample.get(key, ())):
                if token >= vocab_size:
                    raise UserError(
                        f"{samples.where(index)}: {key}[{position}] is {token}, outside the model's vocabulary of "
                        f"{vocab_size} tokens; tokenise the data with the model's own tokenizer"
                    )


def detect_label_convention(samples: SampleFile) -> LabelConvention:
    """Which convention the labels of a file of token ids follow, from every line; aligned if none of them tells.

    Raises UserError for a line that fits neither convention and for a mixture of both.
    """
    assert samples.kind == "tokens", "other kinds make their own labels"
    neither = np.flatnonzero(samples.fits == 0)
    if len(neither):
        raise UserError(
            f"{samples.where(neither[0])}: the labels are neither input_ids nor input_ids shifted by one; make each "
            f"label the token at its own position, or {NO_TARGET} where there is no loss"
        )
    aligned = np.flatnonzero(samples.fits == FITS_ALIGNED)
    shifted = np.flatnonzero(samples.fits == FITS_SHIFTED)
    if len(aligned) and len(shifted):
        raise UserError(
            f"{place(samples.path)}: a mixture of label conventions: line {samples.lines[aligned[0]]} is aligned "
            f"(labels[i] is input_ids[i]), line {samples.lines[shifted[0]]} is shifted (labels[i] is input_ids[i+1]); "
            f"make them all aligned"
        )
    return "shifted" if len(shifted) else "aligned"


def aligned_document(sample: dict[str, Any], convention: LabelConvention) -> Document:
    """Ids and aligned labels of a sample of token ids; a shifted row loses the extra target at its end."""
    ids: list[int] = sample["input_ids"]
    if "labels" not in sample:
        return ids, list(ids)
    labels: list[int] = sample["labels"]
    return ids, list(labels) if convention == "aligned" else [NO_TARGET, *labels[:-1]]


def encode_sample(sample: dict[str, Any], kind: Kind, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The documents of one sample of text, messages or prompt: one, save for an empty text (none) and for a
    conversation of which the chat template renders earlier turns otherwise than it does while they are the last
    (reasoning stripped, another end marker): there each such turn becomes a document, as the model meets it.

    Raises UserError (without file and line: the caller knows them) where the chat template is missing or fails.
    """
    if kind == "text":
        return _encode_text(sample["text"], tokenizer)
    if kind == "messages":
        if not has_chat_template(tokenizer):
            raise UserError(
                "the model's tokenizer has no chat template for messages; use the instruction-tuned model's "
                'tokenizer, or give {"prompt", "completion"} or {"text"}'
            )
        return _encode_messages(sample["messages"], tokenizer)
    assert kind == "prompt", f"{kind} needs no tokenizer"
    prompt, completion = prompt_and_completion(sample)
    if not has_chat_template(tokenizer):
        return _encode_prompt(prompt, completion, tokenizer)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _encode_messages(turns, tokenizer)


def prompt_and_completion(sample: dict[str, Any]) -> tuple[str, str]:
    """The two texts of a sample of kind prompt, under whichever names."""
    prompt_key, completion_key = _prompt_keys(sample) or PROMPT_KEYS[0]
    prompt = sample[prompt_key]
    if prompt_key == "instruction" and sample.get("input"):
        prompt = f"{prompt}\n\n{sample['input']}"
    return prompt, sample[completion_key]


# Reading and checking. Checks raise a UserError without the place; read_samples puts file and line before it.


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    if path.is_dir():  # Windows calls this a lack of permission
        raise UserError(f"{place(path)}: this is a folder; name a JSONL file")
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{place(path)}: no such file; name an existing JSONL file") from None
    except OSError as error:
        raise UserError(f"{place(path)}: the file cannot be read ({error.strerror}); check its permissions") from None
    with stream:
        yield stream


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of every line that is not blank; a byte order mark is skipped."""
    start = 0
    for number, line in enumerate(stream, 1):
        mark = len(UTF8_BOM) if number == 1 and line.startswith(UTF8_BOM) else 0
        if line[mark:].strip():
            yield number, start + mark, line[mark:]
        start += len(line)


def decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = " (it begins as UTF-16 does)" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}{utf16}; save the file as UTF-8"
        ) from None


def parse_line(line: bytes) -> dict[str, Any]:
    text = decode_line(line)
    if text.lstrip().startswith("["):
        raise UserError("a JSON array, not JSONL; write one object {...} a line, without the brackets around them")
    try:
        sample = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise UserError("not usable JSON: a number too long or nesting too deep; correct the line") from None
    if not isinstance(sample, dict):
        raise UserError(f"a JSON {_json_type(sample)}, not an object; each line must be one of {FORMS}")
    return sample


def _kind_of(sample: dict[str, Any]) -> Kind:
    """The most explicit form wins: tokenised or formatted data sets often carry the raw text along."""
    if "input_ids" in sample:
        return "tokens"
    if "messages" in sample:
        return "messages"
    if _prompt_keys(sample):
        return "prompt"
    if "text" in sample:
        return "text"
    keys = ", ".join(repr(key) for key in list(sample)[:8]) or "none"
    raise UserError(f"unknown form (keys: {keys}); write {FORMS}")


def _prompt_keys(sample: dict[str, Any]) -> tuple[str, str] | None:
    return next((keys for keys in PROMPT_KEYS if keys[0] in sample and keys[1] in sample), None)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _check_ids(key: str, ids: object, rule: str, allowed: Sequence[int] = ()) -> None:
    if not isinstance(ids, list):
        raise UserError(f"{key} is a JSON {_json_type(ids)}; it must be a list of token ids")
    if not ids:
        raise UserError(f"{key} is empty; remove the line or give at least one token id")
    if set(map(type, ids)) == {int}:  # the usual case, without a loop of Python's
        different = set(ids).difference(allowed)
        if min(different, default=0) >= 0 and max(different, default=0) <= LARGEST_TOKEN_ID:
            return
    for position, token in enumerate(ids):
        if type(token) is not int:  # a boolean is an int to isinstance
            raise UserError(f"{key}[{position}] is a {_describe(token)}; it must be a whole number")
        if token not in allowed and not 0 <= token <= LARGEST_TOKEN_ID:
            shown = token if abs(token) < 10**20 else "a huge number"
            raise UserError(f"{key}[{position}] is {shown}, outside any vocabulary; {rule}")


def _describe(value: object) -> str:
    shown = json.dumps(value)
    return f"JSON {_json_type(value)} ({shown if len(shown) <= 20 else shown[:17] + '...'})"


def _check_token_sample(sample: dict[str, Any]) -> None:
    _check_ids("input_ids", sample["input_ids"], "ids begin at 0")
    if "labels" not in sample:
        return
    _check_ids("labels", sample["labels"], f"labels are token ids, or {NO_TARGET} for no loss", (NO_TARGET,))
    lengths = len(sample["input_ids"]), len(sample["labels"])
    if lengths[0] != lengths[1]:
        raise UserError(f"input_ids has {lengths[0]} entries, labels has {lengths[1]}; they must be equally long")


def check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name} is a JSON {_json_type(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{name} has half of a surrogate pair (\\ud800 to \\udfff), not a character; remove it"
        ) from None


def _check_text_sample(sample: dict[str, Any]) -> None:
    check_text("text", sample["text"])


def _check_prompt_sample(sample: dict[str, Any]) -> None:
    prompt_key, completion_key = _prompt_keys(sample) or PROMPT_KEYS[0]
    check_text(prompt_key, sample[prompt_key])
    check_text(completion_key, sample[completion_key])
    if prompt_key == "instruction" and sample.get("input") is not None:
        check_text("input", sample["input"])
    if not sample[completion_key]:
        raise UserError(f"{completion_key} is empty, so there is nothing to learn; remove the line")


def check_turns(messages: object) -> None:
    """The form of a conversation, whoever speaks in it."""
    if not isinstance(messages, list):
        raise UserError(f"messages is a JSON {_json_type(messages)}; it must be a list of turns")
    if not messages:
        raise UserError("messages is empty; remove the line or give a user's and an assistant's turn")
    for position, turn in enumerate(messages):
        if not isinstance(turn, dict):
            raise UserError(f'messages[{position}] is a JSON {_json_type(turn)}; it must be {{"role", "content"}}')
        for key in ("role", "content"):
            if key not in turn:
                raise UserError(f"messages[{position}] has no {key}; each turn needs role and content")
            check_text(f"messages[{position}].{key}", turn[key])
        if turn["role"] not in ROLES:
            raise UserError(f"messages[{position}] has the unknown role {turn['role'][:40]!r}; use {', '.join(ROLES)}")


def _check_messages_sample(sample: dict[str, Any]) -> None:
    messages = sample["messages"]
    check_turns(messages)
    if all(turn["role"] != "assistant" for turn in messages):
        raise UserError(
            "messages has no assistant turn, so there is nothing to learn; remove the line or add the answer"
        )
    if messages[0]["role"] == "assistant":
        raise UserError("messages begins with the assistant's turn; put the user's or system turn it answers before it")


_CHECKS = {
    "tokens": _check_token_sample,
    "text": _check_text_sample,
    "messages": _check_messages_sample,
    "prompt": _check_prompt_sample,
}


def _label_fit(sample: dict[str, Any]) -> int:
    """Bits of the conventions that one sample's labels fit; a sample that fits both says nothing."""
    if "labels" not in sample:
        return FITS_ALIGNED | FITS_SHIFTED
    ids, labels = np.array(sample["input_ids"]), np.array(sample["labels"])
    target = labels != NO_TARGET
    aligned = bool((labels == ids)[target].all())
    shifted = bool((labels[:-1] == ids[1:])[target[:-1]].all())
    return FITS_ALIGNED * aligned | FITS_SHIFTED * shifted


# Encoding.


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.chat_template)


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids and the end-of-text token, once, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    if not text:
        return []
    ids = _with_end(list(tokenizer(text, verbose=False)["input_ids"]), tokenizer)
    return [(ids, list(ids))]


def on_its_own_line(prompt: str) -> str:
    """Without a chat template, what keeps an answer apart from its prompt."""
    return prompt if not prompt or prompt[-1].isspace() else prompt + "\n"


def encode_beginning(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text that is to go on: some tokenizers end every text, but the answer has yet to come."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids[:-1] if end is not None and ids[-1:] == [end] and not text.endswith(tokenizer.eos_token) else ids


def _encode_prompt(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Without a chat template. The two are tokenised apart, so that no token straddles the border, as in generation."""
    if not completion[0].isspace():
        prompt = on_its_own_line(prompt)
    prompt_ids = encode_beginning(prompt, tokenizer)
    completion_ids = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
    completion_ids = _with_end(completion_ids, tokenizer)
    return [(prompt_ids + completion_ids, [NO_TARGET] * len(prompt_ids) + completion_ids)]


def _encode_messages(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The model writes turn i after the rendering of messages[:i] with the generation prompt, and what it should
    write is the rest of the rendering of messages[:i+1]. Where that is how the whole conversation begins, the turn is
    learnt inside the whole; where not, in a document of its own, with the turns before it as mere context."""
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    whole = render_chat(messages[: turns[-1] + 1], tokenizer, generation_prompt=False)
    documents: list[Document] = []
    spans: list[tuple[int, int]] = []
    for i in turns:
        context = render_chat(messages[:i], tokenizer, generation_prompt=True)
        answered = render_chat(messages[: i + 1], tokenizer, generation_prompt=False)
        if not answered.startswith(context):
            raise UserError(
                f"the chat template renders messages[{i}] otherwise than its own generation prompt begins it, so the "
                f'answer cannot be told from its context; give {{"text"}} or token ids with labels'
            )
        span = (len(context), _end_of_turn(answered, len(context), tokenizer))
        if whole.startswith(answered):
            spans.append(span)
        else:
            documents.append(_tokenise_spans(answered, [span], tokenizer))
    documents.append(_tokenise_spans(whole, spans, tokenizer))
    return documents


def _end_of_turn(answered: str, begin: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the answer that begins at `begin` ends: right behind the token at which generation stops. What a template
    writes after it (ChatML a line break) is not the assistant's."""
    end = tokenizer.eos_token
    at = answered.rfind(end, begin) if end else -1
    return len(answered) if at < 0 else at + len(end)


def render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"the model's chat template refuses these messages ({reason}); change them") from None
    assert isinstance(rendered, str)
    return rendered


# Some templates write today's date, but a run resumed tomorrow must see the tokens of today. transformers hands
# templates plain data only, no functions, so the template's own macro takes the place of its global function.
_DATE_FIELDS = {
    **{"Y": "2025", "y": "25", "m": "01", "B": "January", "b": "Jan", "d": "01", "-d": "1", "e": " 1", "j": "001"},
    **{"A": "Wednesday", "a": "Wed", "H": "00", "I": "12", "M": "00", "S": "00", "p": "AM", "F": "2025-01-01"},
}
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{field}', '{value}')" for field, value in _DATE_FIELDS.items())
    + " }}{% endmacro %}"
)


def _tokenise_spans(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Ids of a rendered conversation; labels on every token that has a character of one of `spans` (sorted)."""
    if not tokenizer.is_fast:
        return _tokenise_pieces(text, spans, tokenizer)
    # The template brings the special tokens.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], np.int64)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    target = np.zeros(len(ids), bool)
    for begin, end in spans:
        # A white-space token whose offsets were trimmed to nothing ends where the span begins: not part of it.
        target |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    return ids.tolist(), np.where(target, ids, NO_TARGET).tolist()


def _tokenise_pieces(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """For tokenizers without offsets: contexts and answers tokenised apart, which is how generation meets them."""
    ids: list[int] = []
    labels: list[int] = []
    borders = [0, *(border for span in spans for border in span), len(text)]
    for number, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        piece = list(tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"])
        ids += piece
        labels += piece if number % 2 else [NO_TARGET] * len(piece)
    return ids, labels
