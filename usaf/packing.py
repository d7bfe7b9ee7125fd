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

    def ask(layer: nn.Module, made_of: object, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        kind = (made_of, id(mask))
        if kind not in answers:
            answers[kind] = type(layer).forward(layer, *args, **kwargs)
            if not hides_first_document(mask) or moved(answers[kind]):
                raise _Crossed
        return answers[kind]

    for i, layer in enumerate(layers):
        layer.forward = partial(ask, layer, made_of(layer, i))
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


def made_of(layer: nn.Module, index: int) -> tuple[object, ...]:
    """Equal for layers that are the same but for their number, `index`."""
    parts = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        plain = {k: v for k, v in plain.items() if isinstance(v, bool) or v != index}
        shapes = {
            k: tuple(p.shape) for k, p in (*module._parameters.items(), *module._buffers.items()) if p is not None
        }
        parts.append((name, type(module), repr(sorted(plain.items())), repr(sorted(shapes.items()))))
    return tuple(parts)


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
