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
from torch import Tensor
from transformers import PreTrainedModel

from usaf.skeleton import find_decoder, skeleton

DOCUMENT = 136
"""Tokens of each of the two documents of the question: more than a block of 128, which some families compress into one
entry of the attention."""

MOVED = 1e-4
"""The part of its size by which a state must change to count as reached: far above rounding."""


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether nothing of the first of two packed documents reaches the second.

    Args:
        model: on the meta device; it is not changed, and no weights are needed.
    """
    model = skeleton(model)
    decoder, _, layers = find_decoder(model)
    masks: list[object] = []
    states: list[Tensor] = []  # of the second document after each layer

    def record(forward: Any, *args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs.get("attention_mask"))
        out = forward(*args, **kwargs)
        states.append((out if isinstance(out, Tensor) else out[0])[:, DOCUMENT:])
        if len(states) <= len(layers) and not hides_first_document(masks[-1]):
            raise _Seen
        return out

    for layer in layers:
        layer.forward = partial(record, layer.forward)
    positions = torch.arange(DOCUMENT).repeat(2).unsqueeze(0)
    ids = torch.arange(2 * DOCUMENT).unsqueeze(0) % 11
    edited = torch.cat((torch.flip(ids[:, :DOCUMENT], (1,)) + 3, ids[:, DOCUMENT:]), dim=1)
    try:
        with torch.no_grad():
            for row in (ids, edited):
                decoder(input_ids=row, position_ids=positions, use_cache=False)
    except _Seen:
        return False
    pairs = zip(states[: len(layers)], states[len(layers) :], strict=True)
    return all(bool((a - b).abs().max() <= MOVED * a.abs().max()) for a, b in pairs)


class _Seen(Exception):
    """A layer's mask shows it the first document: there is nothing more to ask."""


def hides_first_document(mask: object) -> bool:
    """A [1, 1, n, n] mask of two documents, boolean (True = seen) or additive, that hides all of the first from the
    second."""
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (2 * DOCUMENT, 2 * DOCUMENT):
        return False
    crossing = mask[..., DOCUMENT:, :DOCUMENT]
    return not bool(crossing.any()) if mask.dtype == torch.bool else bool((crossing < -1e4).all())
