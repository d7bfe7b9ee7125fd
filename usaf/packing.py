"""Whether a family keeps packed documents apart: asked of the model's own code, not of a list of names.

Documents packed into one row are told apart by position ids that restart; most of transformers' decoders turn that
into a block-diagonal causal mask. Some do not (gpt_oss never hands the position ids to its mask functions), and layers
with recurrent or linear-attention state, convolutions or compressed tokens look past any such mask.
`keeps_documents_apart` runs the family's code without its weights (`skeleton`) on a row of two documents: every layer
must get a mask that hides the first from the second, and an edit of the first must leave the second's states alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usaf.skeleton import find_decoder, skeleton

DOCUMENT = 136
"""Tokens of each of the two documents of the question: more than a block of 128, which some families compress into one
entry of the attention."""

MOVED = 1e-4
"""The part of its size by which a state must change to count as reached: far above rounding."""


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether nothing of the first of two packed documents reaches the second.

    Of layers that are made alike one is asked.

    Args:
        model: on the meta device; it is not changed, and no weights are needed.
    """
    model = skeleton(model)
    decoder, _, layers = find_decoder(model)
    answers: dict[object, Any] = {}  # what a layer is made of, and its mask -> what it returned

    def ask(layer: nn.Module, kind: object, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        question = (kind, id(mask))
        if question not in answers:
            answers[question] = type(layer).forward(layer, *args, **kwargs)
            if not hides_first_document(mask) or moved(answers[question]):
                raise _Crossed
        return answers[question]

    for layer, kind in zip(layers, kinds(layers), strict=True):
        layer.forward = partial(ask, layer, kind)
    ids = torch.arange(2 * DOCUMENT).unsqueeze(0) % 11
    edited = torch.cat((ids[:, :DOCUMENT] + 5, ids[:, DOCUMENT:]), dim=1)
    positions = torch.arange(DOCUMENT).repeat(2).expand(2, -1)
    try:
        with torch.no_grad():
            decoder(input_ids=torch.cat((ids, edited)), position_ids=positions, use_cache=False)
    except _Crossed:
        return False
    return True


class _Crossed(Exception):
    """One layer sees the first document from the second: there is nothing more to ask."""


def kinds(layers: nn.ModuleList) -> list[tuple[object, ...]]:
    """What each layer is made of: equal for layers that are the same but for their number."""
    values: dict[str, list[bool]] = {}
    for i, layer in enumerate(layers):
        for name, value in (item for module in layer.modules() for item in vars(module).items()):
            values.setdefault(name, []).append(type(value) is int and value == i)
    numbers = {name for name, are_number in values.items() if all(are_number)}
    return [tuple(made_of(module, numbers) for module in layer.named_modules()) for layer in layers]


def made_of(named: tuple[str, nn.Module], numbers: set[str]) -> tuple[object, ...]:
    name, module = named
    settings = {k: v for k, v in vars(module).items() if k not in numbers and isinstance(v, (int, float, str, tuple))}
    tensors = {k: t.shape for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    return name, type(module), repr(sorted(settings.items())), repr(sorted(tensors.items()))


def moved(out: Any) -> bool:
    """Whether the second document's states differ between the row and the row whose first document was edited."""
    state = out if isinstance(out, Tensor) else out[0]
    row, edited = state[:, DOCUMENT:]
    return not bool((row - edited).abs().max() <= MOVED * row.abs().max())


def hides_first_document(mask: object) -> bool:
    """A [B, 1, n, n] mask of two documents, boolean (True = seen) or additive, that hides all of the first from the
    second."""
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (2 * DOCUMENT, 2 * DOCUMENT):
        return False
    crossing = mask[..., DOCUMENT:, :DOCUMENT]
    return not bool(crossing.any()) if mask.dtype == torch.bool else bool((crossing < -1e4).all())
