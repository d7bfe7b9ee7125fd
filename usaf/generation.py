"""Generation on the 4-bit base plus delta, by transformers' own `generate`: its cache, its sampling, its stopping.

Of the model's generation config only what ends an answer is taken (end and stop tokens, stop strings); sampling is what
the caller asks for and nothing else, so greedy is the plain argmax of the logits.

Experts are decoded from 4 bits at every use, one at a time, so memory stays what it is in training, and a token costs
the decoding of its own experts. On a device other than the host, the frozen layers' dense weights move there for the
time of generation, and of their experts those that tokens choose: a token of Qwen3-30B-A3B chooses 0.9 GB of 15 GB.

Left out: several prompts at a time, and a cache of decoded experts, which would take gigabytes to be of use there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from usaf.errors import UserError, one_line
from usaf.model import SparseModel
from usaf.quantization import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOP_TOKEN, STOP_STRING, MAX_NEW_TOKENS, CONTEXT = "stop_token", "stop_string", "max_new_tokens", "context"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without a temperature the likeliest is taken. top_k 0 and top_p 1 leave nothing out."""

    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """The fields of a GenerationConfig."""
        if self.temperature is None:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True)
class Ending:
    """What ends an answer."""

    tokens: list[int]
    strings: list[str]


@dataclass(frozen=True)
class Generated:
    """An answer. token_ids: all of them, the stop token included; text: without special tokens."""

    token_ids: list[int]
    text: str
    seconds: float  # of the prompt's own pass and of all steps
    stopped_by: str

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def read_ending(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> Ending:
    """From generation_config.json, else from the model's config; and the tokenizer's own end, which training writes."""
    found: Any = config.get_text_config()
    if (folder / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'generation_config.json'}: cannot be read ({one_line(error)[:200]}); "
                            "restore it, or delete it and do with the model's config") from None  # fmt: skip
    ends = getattr(found, "eos_token_id", None)
    tokens = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    strings = getattr(found, "stop_strings", None) or []
    return Ending(sorted(tokens - {None}), [strings] if isinstance(strings, str) else list(strings))


class Stream(BaseStreamer):
    """Hands on the text of the tokens as they come, whole characters only; all parts together are the whole text.

    (transformers' own TextStreamer decodes each line apart, which loses indentation under sentencepiece tokenizers.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.token_ids: list[int] = []
        self.written = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # transformers hands over the prompt first
            self.prompt_seen = True
            return
        self.token_ids += value.reshape(-1).tolist()
        text = decode(self.tokenizer, self.token_ids)
        if not text.endswith("\ufffd"):  # else a character whose other bytes are still to come
            self._hand_on(text)

    def end(self) -> None:
        self._hand_on(decode(self.tokenizer, self.token_ids))

    def _hand_on(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def generate(
    model: SparseModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ending: Ending, sampling: Sampling,
    max_new_tokens: int, context: int | None, write: Callable[[str], object] | None = None,
) -> Generated:  # fmt: skip
    """The model's answer to one prompt, inside `layers_on_device`.

    Args:
        context: tokens that the model can see in all, None without a limit; the prompt leaves room for one.
        write: gets the text piece by piece as it comes.
    """
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt_ids))
    assert room > 0
    options = sampling.options()
    if ending.tokens:
        options.update(eos_token_id=ending.tokens, pad_token_id=ending.tokens[0])
    if ending.strings:
        options.update(stop_strings=ending.strings)
    config = GenerationConfig(max_new_tokens=room, use_cache=True, num_beams=1, **options)
    model.model.generation_config = config  # from which transformers would fill what the other leaves open
    ids = torch.tensor([prompt_ids]).to(model.backend.device)
    stream = Stream(tokenizer, write) if write is not None else None
    torch.manual_seed(sampling.seed)
    began = time.perf_counter()
    found = model.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=stream, tokenizer=tokenizer
    )
    token_ids = found[0, len(prompt_ids) :].tolist()
    seconds = time.perf_counter() - began
    if token_ids[-1] in ending.tokens:
        stopped_by = STOP_TOKEN
    elif len(token_ids) < room:
        stopped_by = STOP_STRING
    else:
        stopped_by = MAX_NEW_TOKENS if room == max_new_tokens else CONTEXT
    return Generated(token_ids, decode(tokenizer, token_ids), seconds, stopped_by)


# ---- base and tuned -------------------------------------------------------------------------------------------------


@contextmanager
def base_alone(model: SparseModel, own: dict[str, Tensor]) -> Iterator[None]:
    """For as long as it lasts the model is its 4-bit base with the checkpoint's own routers and norms, whatever was
    applied. own: `SparseModel.own_weights`."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, weight in own.items():
        module: Any = model.model.get_submodule(name.rpartition(".")[0])
        replaced.append((module, "weight", module.weight))
        module.weight = nn.Parameter(weight.to(module.weight.device), requires_grad=False)  # a frozen layer has moved
    for sparse in model.sparse_weights(0).values():
        replaced.append((sparse, "delta", sparse.delta))
        sparse.delta = nn.Parameter(torch.zeros_like(sparse.delta), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)


# ---- devices --------------------------------------------------------------------------------------------------------


class FetchedExperts:
    """Stands in for a bank's base that lives on the host: an expert goes to the device when it is asked for."""

    def __init__(self, base: QuantizedTensor, device: torch.device) -> None:
        self.base, self.device, self.shape = base, device, base.shape

    def expert(self, index: int) -> QuantizedTensor:
        return self.base.expert(index).to(self.device)


@contextmanager
def layers_on_device(model: SparseModel) -> Iterator[None]:
    """For as long as it lasts every layer computes on the model's device. Layers that are there already stay as they
    are; the others' dense weights move, and their experts are fetched one at a time. Afterwards the host has its own
    again."""
    device = model.backend.device
    with ExitStack() as stack:
        for layer in range(model.num_layers):
            banks = [bank for moe in model.moe if moe.layer == layer for bank in moe.banks]
            if device.type == "cpu" or on_device(model.layers[layer], device):
                continue
            bases = [bank.base for bank in banks]
            stack.enter_context(model.placed(layer))
            for bank, base in zip(banks, bases, strict=True):
                bank.base = FetchedExperts(base, device)  # type: ignore[assignment]
        yield


def on_device(layer: nn.Module, device: torch.device) -> bool:
    return all(parameter.device.type == device.type for parameter in layer.parameters())
