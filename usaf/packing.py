"""Whether a family keeps packed documents apart: asked of the model's own code, not of a list of names.

Documents packed into one row are told apart by position ids that restart; most of transformers' decoders turn that
into a block-diagonal causal mask. Some do not (gpt_oss never hands the position ids to its mask functions), and layers
with recurrent or linear-attention state take no such mask at all. `keeps_documents_apart` runs the decoder with its
layers replaced by recorders, on a row of two documents, and looks at the mask that each layer would get.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usaf.model import find_decoder

DOCUMENT = 4  # tokens of each of the two documents of the question


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether every layer gets a mask that hides the first of two packed documents from the second.

    Args:
        model: on the meta device; it is not changed, and no weights are needed.
    """
    model = copy.deepcopy(model)
    decoder, name, layers = find_decoder(model)
    masks: list[object] = []

    def record(hidden_states: Tensor, *_: Any, attention_mask: object = None, **__: Any) -> Tensor:
        masks.append(attention_mask)
        return hidden_states

    for layer in layers:
        layer.forward = record
    materialise_small_parts(model, layers)
    width = model.config.get_text_config().hidden_size
    positions = torch.arange(DOCUMENT).repeat(2).unsqueeze(0)
    try:
        with torch.no_grad():
            decoder(inputs_embeds=torch.zeros(1, 2 * DOCUMENT, width), position_ids=positions, use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return (
            False  # a decoder that wants more than embeddings and positions cannot be asked; one document a row is safe
        )
    return len(masks) == len(layers) and all(hides_first_document(mask) for mask in masks)


def hides_first_document(mask: object) -> bool:
    """A [1, 1, 8, 8] mask, boolean (True = seen) or additive, that hides all of the first document from the second."""
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (2 * DOCUMENT, 2 * DOCUMENT):
        return False
    crossing = mask[..., DOCUMENT:, :DOCUMENT]
    return not bool(crossing.any()) if mask.dtype == torch.bool else bool((crossing < -1e4).all())


def materialise_small_parts(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Norms as zeros and rotary tables as they are, on the host; layers and embeddings stay on meta."""
    inside = {id(module) for module in layers.modules()}
    for module in model.modules():
        if id(module) in inside or isinstance(module, (nn.Embedding, nn.Linear)):
            continue
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    value = torch.zeros_like(tensor, device="cpu")
                    store[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value  # type: ignore
        if module._non_persistent_buffers_set:
            model._init_weights(module)
