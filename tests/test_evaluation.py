"""Evaluation against transformers' own loss, and router figures counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, base_into, build, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf.data import Rows, pack
from usaf.evaluation import COLLAPSED_SHARE, Evaluation, ExpertLoad, evaluate, routing_entropy, starved_experts
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates, chunked

PARTS = [[(9, 0)], [(5, 0), (12, 0)], [(4, 0)], [(24, 10)], [(7, 0), (6, 3), (8, 7)], [(20, 0)]]
"""A list a row, its documents as (tokens, tokens without a label at their beginning)."""


def make_rows(parts: list[list[tuple[int, int]]], seed: int = 0) -> tuple[Rows, list[tuple[list[int], list[int]]]]:
    """The rows, and their documents one by one as (ids, labels)."""
    generator = torch.Generator().manual_seed(seed)
    documents, packed = [], []
    for part in parts:
        row = []
        for length, prompt in part:
            ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            row.append((ids, [-100] * prompt + ids[prompt:]))
        packed.append(pack(row, sum(length for length, _ in part), None, False))
        documents += row
    fields = ("input_ids", "labels", "positions")
    joined = [torch.cat([torch.from_numpy(getattr(rows, f).copy()) for rows in packed]).numpy() for f in fields]
    offsets = torch.tensor([0, *(len(rows.input_ids) for rows in packed)]).cumsum(0).numpy()
    return Rows(*joined, offsets), documents


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SparseModel, Any]]:
    """Our 4-bit model, and transformers' eager one with the dequantised experts."""
    made: dict[str, tuple[SparseModel, Any]] = {}

    def pair(family: str) -> tuple[SparseModel, Any]:
        if family not in made:
            folder: Path = write_checkpoint(tmp_path_factory.mktemp("models") / family, family)
            model = build(folder)
            reference = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation="eager"
            ).eval()
            base_into(reference, model)
            made[family] = model, reference
        return made[family]

    return pair


@pytest.fixture
def model(both: Callable[[str], tuple[SparseModel, Any]]) -> SparseModel:
    return both("qwen3_moe")[0]


def states_of(
    model: SparseModel, rows: Rows, chunk_rows: int = 3, start: int = 2, dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> BoundaryStates:  # fmt: skip
    states = BoundaryStates(model, rows, chunked(len(rows), chunk_rows), start, dtype, {}, folder)
    states.fill(lambda n: None)
    return states


def run(model: SparseModel, states: BoundaryStates, head_chunk_tokens: int = 16) -> Evaluation:
    return evaluate(model, states, "heldout", head_chunk_tokens, lambda n: None)


@torch.no_grad()
def reference_loss(reference: Any, documents: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """transformers' own loss, each document alone; its mean is over the labels from the second on."""
    total, tokens = 0.0, 0
    for ids, labels in documents:
        count = sum(label != -100 for label in labels[1:])
        total += float(reference(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * count
        tokens += count
    return total / tokens, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_transformers_own(both: Callable[[str], tuple[SparseModel, Any]], family: str) -> None:
    """Rows of different lengths in a chunk, packed documents, labels of -100; from the first layer and a later one."""
    model, reference = both(family)
    packed = family != "gpt_oss"  # it gets one document a row, since transformers does not keep its documents apart
    rows, documents = make_rows(PARTS if packed else [[part] for row in PARTS for part in row])
    loss, tokens = reference_loss(reference, documents)
    for start in (0, 2):
        result = run(model, states_of(model, rows, start=start))
        assert result.name == "heldout"
        assert result.tokens == tokens == rows.target_tokens()
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_decides_no_bit(model: SparseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    rows, _ = make_rows(PARTS)
    uncached = run(model, states_of(model, rows, dtype=dtype))
    for _process in range(2):
        assert run(model, states_of(model, rows, dtype=dtype, folder=tmp_path)) == uncached


@pytest.mark.parametrize("head_chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("chunk_rows", [1, 2, 10])
def test_chunks_matter_only_in_rounding(model: SparseModel, head_chunk_tokens: int, chunk_rows: int) -> None:
    rows, _ = make_rows(PARTS)
    result = run(model, states_of(model, rows, chunk_rows), head_chunk_tokens)
    expected = run(model, states_of(model, rows))
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.tokens == expected.tokens
    assert result.routing_entropy == expected.routing_entropy  # padding counts for nothing
    assert result.starved_experts == expected.starved_experts


def test_a_changed_document_leaves_its_neighbours_loss(model: SparseModel) -> None:
    """Packed side by side: the loss of the whole changes by the changed document's own loss alone."""
    rows, _ = make_rows([[(7, 0), (9, 0)]])
    ids = rows.input_ids.copy()
    ids[:7] = (ids[:7] + 5) % VOCAB
    labels = rows.labels.copy()
    labels[1:7] = -100
    alone, _ = make_rows([[(9, 0)]])
    alone = Rows(rows.input_ids[7:], rows.labels[7:], rows.positions[7:], alone.offsets)
    changed = run(model, states_of(model, Rows(ids, labels, rows.positions, rows.offsets)))
    assert changed.tokens == 8
    assert changed.loss == pytest.approx(run(model, states_of(model, alone)).loss, rel=1e-5)


def test_progress_is_told_every_token(model: SparseModel) -> None:
    rows, _ = make_rows(PARTS)
    told: list[int] = []
    evaluate(model, states_of(model, rows), "heldout", 16, told.append)
    assert sum(told) == len(rows.input_ids)


# -- routers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def counts_by_hand(model: SparseModel, reference: Any, rows: Rows, start: int) -> dict[int, list[int]]:
    """layer -> tokens of each expert in the reference, every row alone and without padding."""
    counts = {moe.layer: [0] * moe.banks[0].num_experts for moe in model.moe_from(start)}
    hooks = []
    for moe in model.moe_from(start):

        def count(_module: Any, args: tuple[Tensor, ...], layer: int = moe.layer) -> None:
            for expert in args[1].flatten().tolist():
                counts[layer][expert] += 1

        experts = reference.get_submodule(moe.names[0].rpartition(".")[0])
        hooks.append(experts.register_forward_pre_hook(count))
    for row in range(len(rows)):
        batch = rows.batch([row])
        reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_load_by_hand(both: Callable[[str], tuple[SparseModel, Any]], family: str) -> None:
    """Counts, entropy and starved experts; short data, so that some expert goes without a token."""
    model, reference = both(family)
    rows, _ = make_rows([[(4, 0)], [(2, 0)]])
    expected = counts_by_hand(model, reference, rows, 2)
    states = states_of(model, rows)
    with ExpertLoad(model, 2) as load:
        batch = rows.batch([0, 1])
        load.expect(batch)
        model.run_layers(batch, 2, model.num_layers, states.hidden([0, 1]))
    assert {layer: counts.tolist() for layer, counts in load.counts.items()} == expected
    entropies = []
    for counts in expected.values():
        assert sum(counts) == 6 * 2  # six tokens, two experts each
        shares = [count / sum(counts) for count in counts if count]
        entropies.append(-sum(share * math.log(share) for share in shares) / math.log(len(counts)))
    result = run(model, states)
    assert result.routing_entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-12)
    assert result.starved_experts == sum(count == 0 for counts in expected.values() for count in counts)


@pytest.mark.parametrize(
    ("counts", "entropy", "starved"),
    [
        ([4, 4, 4, 4], 1.0, 0),
        ([8, 0, 0, 0], 0.0, 3),
        ([3, 3, 0, 0], 0.5, 2),
        ([2, 1, 1, 0], 0.75, 1),
        ([0, 0, 0, 0], 0.0, 0),  # no token at all: nobody is to blame
        ([5], 0.0, 0),
        ([1000, 1000, 1000, 7], None, 1),  # a hundredth of the even share is 7.5175
        ([1000, 1000, 1000, 8], None, 0),
    ],
)
def test_entropy_and_starvation(counts: list[int], entropy: float | None, starved: int) -> None:
    assert COLLAPSED_SHARE == 0.01
    if entropy is not None:
        assert routing_entropy(torch.tensor(counts)) == pytest.approx(entropy, abs=1e-12)
        assert math.copysign(1, routing_entropy(torch.tensor(counts))) == 1  # never -0.0
    assert starved_experts(torch.tensor(counts)) == starved


def test_hooks_are_gone_afterwards(model: SparseModel) -> None:
    rows, _ = make_rows(PARTS)
    experts = [model.model.get_submodule(moe.names[0].rpartition(".")[0]) for moe in model.moe]

    def stop(tokens: int) -> None:
        assert [bool(e._forward_pre_hooks) for e in experts] == [False, False, True, True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, states_of(model, rows), "heldout", 16, stop)
    assert not any(e._forward_pre_hooks for e in experts)


# -- edges -------------------------------------------------------------------------------------------------------------


def test_empty_set(model: SparseModel) -> None:
    """No sequence, no loss: not a perfect one."""
    rows, _ = make_rows(PARTS)
    result = run(model, BoundaryStates(model, rows, [], 2, torch.float32, {}, None))
    assert result.tokens == result.starved_experts == result.routing_entropy == 0
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)


def test_set_without_targets(model: SparseModel) -> None:
    rows, _ = make_rows([[(6, 0)]])
    rows.labels[:] = -100
    result = run(model, states_of(model, rows))
    assert result.tokens == 0
    assert math.isnan(result.loss)


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(0.0, 1.0), (2.0, math.exp(2)), (709.0, math.exp(709)), (710.0, math.inf)]
)
def test_perplexity(loss: float, perplexity: float) -> None:
    assert Evaluation("x", loss, 1, 1.0, 0).perplexity == perplexity
    assert Evaluation("x", math.inf, 1, 1.0, 0).perplexity == math.inf
