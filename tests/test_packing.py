"""Which families keep packed documents apart, asked of their code and checked against what they compute."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB, random_model, tiny_config

from usaf.architecture import meta_model
from usaf.packing import DOCUMENT, hides_first_document, keeps_documents_apart


def leaks(family: str) -> bool:
    """Whether editing the first of two packed documents moves the second's logits, by transformers' own model."""
    model = random_model(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, 20), generator=generator)
    edited = ids.clone()
    edited[0, :9] = torch.randint(3, VOCAB, (9,), generator=generator)
    positions = torch.cat([torch.arange(9), torch.arange(11)]).unsqueeze(0)
    with torch.no_grad():
        rows = [model(input_ids=i, position_ids=positions, use_cache=False).logits[0, 9:] for i in (ids, edited)]
    # Not equal to the bit: the edit sends other tokens to the experts, and a product's rounding depends on its rows.
    return float((rows[0] - rows[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_agrees_with_the_logits(family: str) -> None:
    assert keeps_documents_apart(meta_model(tiny_config(family))) == (not leaks(family))


def test_both_answers_occur() -> None:
    answers = {family: keeps_documents_apart(meta_model(tiny_config(family))) for family in FAMILIES}
    assert answers["qwen3_moe"]
    assert not answers["gpt_oss"]


def test_the_asked_model_is_not_changed() -> None:
    model = meta_model(tiny_config("qwen3_moe"))
    keeps_documents_apart(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_masks() -> None:
    length = 2 * DOCUMENT
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    block = causal.clone()
    block[..., DOCUMENT:, :DOCUMENT] = False
    assert hides_first_document(block)
    assert not hides_first_document(causal)
    assert hides_first_document(torch.zeros(block.shape).masked_fill(~block, -1e9))
    assert not hides_first_document(torch.zeros(block.shape).masked_fill(~causal, -1e9))
    assert not hides_first_document(None)
