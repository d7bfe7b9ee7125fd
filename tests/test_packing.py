"""Which families keep packed documents apart, asked of their code and checked against what they compute."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, leaks, random_model, tiny_config

from usaf.architecture import meta_model
from usaf.packing import DOCUMENT, hides_first_document, keeps_documents_apart


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_agrees_with_the_logits(family: str) -> None:
    assert keeps_documents_apart(meta_model(tiny_config(family))) == (not leaks(random_model(family)))


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
