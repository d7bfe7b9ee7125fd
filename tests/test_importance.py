"""Deferred importance against dense gradients of transformers' eager experts on the same dequantised base."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VOCAB, base_into, build, write_checkpoint
from test_experts import Layer as FusedExpertsLayer
from test_experts import experts_with
from test_experts import inputs_of as fused_inputs_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from usaf import importance, sparse_head
from usaf.data import Rows, pack
from usaf.devices import choose_backend
from usaf.expert_bank import ExpertBank, PairGradients
from usaf.importance import (
    Importance,
    active_count,
    counts_by_name,
    experts_are_only_added,
    find_important,
    grow_candidates,
    part_gradient,
    sample_chunks,
    score_bank,
)
from usaf.linear import FrozenLinear
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates, chunked
from usaf.quantization import quantize
from usaf.selection import overlap
from usaf.sparse_head import SparseHead
from usaf.sparse_weights import Factors, SparseWeights
from usaf.trained_parts import open_head

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3_moe from 2": ("qwen3_moe", 2, {}),
    "mixtral from 0": ("mixtral", 0, {}),
    "olmoe last layer": ("olmoe", 3, {}),
    "gpt_oss from 1": ("gpt_oss", 1, {}),  # biases, transposed tensors
    "deepseek_v3 dense first layer": ("deepseek_v3", 0, {}),
    "deepseek_v3 dense at start": ("deepseek_v3", 1, {"first_k_dense_replace": 2}),
    "qwen3_moe dense between": ("qwen3_moe", 1, {"mlp_only_layers": [2]}),
    "qwen3_moe dense on top": ("qwen3_moe", 2, {"mlp_only_layers": [3]}),
}


def make_rows(seed: int = 0) -> Rows:
    """Seven rows of different lengths; two are packed documents, and some labels do not count."""
    generator = torch.Generator().manual_seed(seed)

    def document(length: int, prompt: int = 0) -> tuple[list[int], list[int]]:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        return ids, [-100] * prompt + ids[prompt:]

    parts = [
        [document(9)], [document(5), document(12)], [document(4)], [document(24, prompt=10)], [document(12)],
        [document(7), document(6, prompt=3)], [document(20)],
    ]  # fmt: skip
    packed = [pack(documents, sum(len(ids) for ids, _ in documents), None, False) for documents in parts]
    offsets = torch.tensor([0, *(len(rows.input_ids) for rows in packed)]).cumsum(0).numpy()
    fields = ("input_ids", "labels", "positions")
    joined = [torch.cat([torch.from_numpy(getattr(rows, f).copy()) for rows in packed]).numpy() for f in fields]
    assert all(len(rows) == 1 for rows in packed)
    return Rows(*joined, offsets)


@dataclasses.dataclass
class Pair:
    """One checkpoint as our 4-bit model and as transformers' own with the dequantised weights, both in float64."""

    model: SparseModel
    reference: Any
    start: int

    def states(self, rows: Rows, chunk_rows: int = 3) -> BoundaryStates:
        chunks = chunked(len(rows), chunk_rows)
        return BoundaryStates(self.model, rows, chunks, self.start, torch.float32, {}, None)

    def names(self) -> list[str]:
        return list(self.model.sparse_weights(self.start))

    def dense(self, rows: Rows, samples: Sequence[int]) -> dict[str, Tensor]:
        """The gradient of the mean loss over all targets of the samples, by autograd: [E, out, in] by name, of a head
        that trains [vocabulary, H].

        One sample at a time and without padding; our shift of the labels is done here once more, by hand.
        """
        names = self.names()
        for name in names:
            self.reference.get_parameter(name).grad = None
            self.reference.get_parameter(name).requires_grad_(True)
        targets = 0
        for row in samples:
            batch = rows.batch([row])
            logits = self.reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            wanted = [(i, int(batch.labels[0, i + 1])) for i in range(batch.lengths[0] - 1)]
            wanted = [(i, label) for i, label in wanted if label != -100]
            at, labels = torch.tensor([i for i, _ in wanted]), torch.tensor([label for _, label in wanted])
            F.cross_entropy(logits[0, at], labels, reduction="sum").backward()
            targets += len(wanted)
        found = {}
        for name in names:
            gradient = self.reference.get_parameter(name).grad / targets
            transposed = getattr(self.reference.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
            found[name] = gradient.transpose(1, 2) if transposed else gradient
        return found


def make_pair(folder: Path, family: str, start: int, head: bool = False, **changes: Any) -> Pair:
    backend = dataclasses.replace(choose_backend(False, True), compute_dtype=torch.float64)
    model = build(write_checkpoint(folder, family, **changes), backend)
    assert not head or open_head(model)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    base_into(reference, model)
    for moe in model.moe:  # base_into goes through fp32; the base is 16 bits wide, so nothing is lost
        for bank in moe.banks:
            assert torch.equal(bank.weight(0, torch.float64), bank.weight(0, torch.float32).double())
    reference.requires_grad_(False)
    layer = reference.get_submodule(model.layers_name)[start]

    def rounded(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The one thing that this project does to a hidden state: it is rounded where it enters the trained layers."""
        if start == 0:
            return args, kwargs
        if args:
            return (args[0].float().double(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].float().double()}

    layer.register_forward_pre_hook(rounded, with_kwargs=True)
    return Pair(model, reference, start)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(case: str) -> Pair:
        if case not in made:
            family, start, changes = CASES[case]
            made[case] = make_pair(tmp_path_factory.mktemp("pair") / "checkpoint", family, start, **changes)
        return made[case]

    return pair


@pytest.fixture
def qwen(pairs: Callable[[str], Pair]) -> Pair:
    return pairs("qwen3_moe from 2")


def find(pair: Pair, rows: Rows, samples: Sequence[int], fraction: float = 0.02, chunk_rows: int = 2) -> Importance:
    return find_important(pair.model, pair.states(rows), rows, samples, fraction, chunk_rows, 16, lambda n: None)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """id of a bank or of the head -> its dense gradient as the deferred way has it, in float64, filled by
    `find_important`."""
    seen: dict[int, Tensor] = {}

    def recording(bank: SparseWeights[Any], pairs: Sequence[Factors], k: int, *score: bool) -> Any:
        parts = [part_gradient(bank, pairs, p, torch.float64) for p in range(bank.num_parts)]
        seen[id(bank)] = torch.cat(parts).reshape(bank.shape)
        return score_bank(bank, pairs, k, *score)

    monkeypatch.setattr(importance, "score_bank", recording)
    return seen


def banks_of(pair: Pair) -> dict[str, SparseWeights[Any]]:
    return pair.model.sparse_weights(pair.start)


def best(scores: Tensor, k: int) -> Tensor:
    """The k largest, ties to the lower index, by a full stable sort."""
    return torch.sort(torch.sort(scores.reshape(-1), descending=True, stable=True).indices[:k]).values


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    """transformers' norms and rotary tables stay fp32 in a float64 model: 1e-6 of the largest entry is their noise."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def assert_top_k(active: Tensor, gradient: Tensor, k: int) -> None:
    """Exactly k, sorted, without repeats; beyond a band of the fp32 scores' rounding none too weak, none left out."""
    scores = gradient.reshape(-1).abs()
    assert active.dtype == torch.int64
    assert len(active) == k
    assert (active[1:] > active[:-1]).all()
    threshold = float(scores.sort(descending=True).values[k - 1])
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[active] = True
    assert scores[chosen].min() >= threshold * (1 - 1e-5)
    assert scores[~chosen].max() <= threshold * (1 + 1e-5)
    assert threshold > 0


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_gradient_over_the_same_samples(
    pairs: Callable[[str], Pair], deferred: dict[int, Tensor], case: str
) -> None:
    """Entry by entry, then the chosen set; samples of different lengths, packed and masked, in any order."""
    pair, rows, samples = pairs(case), make_rows(), [5, 0, 3, 1, 6]
    found = find(pair, rows, samples)
    expected = pair.dense(rows, samples)
    assert found.active.keys() == expected.keys() == set(pair.names())
    assert found.sequences == 5
    for name, bank in banks_of(pair).items():
        assert_same_gradient(deferred[id(bank)], expected[name])
        assert_top_k(found.active[name], expected[name], active_count(bank.numel, 0.02))


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunks_do_not_matter(qwen: Pair, deferred: dict[int, Tensor], chunk_rows: int) -> None:
    rows = make_rows()
    find(qwen, rows, range(7), chunk_rows=chunk_rows)
    for name, gradient in qwen.dense(rows, range(7)).items():
        assert_same_gradient(deferred[id(banks_of(qwen)[name])], gradient)


def test_one_sample(qwen: Pair) -> None:
    rows = make_rows()
    found = find(qwen, rows, [4])
    assert math.isnan(found.half_overlap)  # there are no halves
    for name, gradient in qwen.dense(rows, [4]).items():
        assert_top_k(found.active[name], gradient, active_count(gradient.numel(), 0.02))


@pytest.mark.parametrize("case", ["qwen3_moe from 2", "mixtral from 0"])
def test_ties_go_to_the_lower_index(pairs: Callable[[str], Pair], case: str) -> None:
    """Three tokens leave experts without a gradient: k beyond the entries that have one takes the first zeros."""
    pair = pairs(case)
    ids = [7, 8, 9]
    rows = pack([(ids, ids)], None, None, False, one_document_per_row=True)
    found = find(pair, rows, [0], fraction=0.95)
    ties = 0
    for name, gradient in pair.dense(rows, [0]).items():
        scores, k = gradient.reshape(-1).abs(), active_count(gradient.numel(), 0.95)
        nonzero = int((scores > 0).sum())
        assert nonzero > 0
        ties += nonzero < k
        if nonzero < k:
            assert torch.equal(found.active[name], best(scores, k)), name
    assert ties >= 2


def test_same_bits_again(qwen: Pair) -> None:
    rows = make_rows()
    first, second = find(qwen, rows, range(6)), find(qwen, rows, range(6))
    assert first.half_overlap == second.half_overlap
    assert all(torch.equal(first.active[name], second.active[name]) for name in qwen.names())


def test_leaves_the_model_as_it_was(qwen: Pair) -> None:
    """Trainable routers get no gradient from it, banks capture nothing any more, nothing is hooked."""
    routers = [moe.router_weight for moe in qwen.model.moe_from(qwen.start)]
    for router in routers:
        router.requires_grad_(True)
    find(qwen, make_rows(), range(4))
    for router in routers:
        assert router.grad is None
        router.requires_grad_(False)
    for bank in banks_of(qwen).values():
        assert bank.captured is None
        assert bank.delta.grad is None
        assert bank.delta.numel() == 0
    for layer in qwen.model.layers:
        assert not layer._forward_hooks
        assert "forward" not in layer.__dict__


# -- halves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", range(1, 12))
@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 5, 100])
def test_sample_chunks(samples: int, chunk_rows: int) -> None:
    given = [10 * i for i in range(samples)]
    chunks = sample_chunks(given, chunk_rows)
    assert [row for chunk in chunks for row in chunk] == given
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= chunk_rows
    assert max(sizes) - min(sizes) <= 1
    assert len(chunks) == 1 if samples == 1 else len(chunks) % 2 == 0 or max(sizes) == 1
    assert len(chunks) <= -(-samples // chunk_rows) + 1


def test_half_overlap_is_that_of_the_masks_of_the_halves(qwen: Pair) -> None:
    """The even and the odd chunks, each half's gradients by autograd."""
    rows = make_rows()
    found = find(qwen, rows, [0, 1, 2, 3, 4, 5, 6], chunk_rows=2)
    assert sample_chunks([0, 1, 2, 3, 4, 5, 6], 2) == [[0], [1, 2], [3, 4], [5, 6]]
    even, odd = qwen.dense(rows, [0, 3, 4]), qwen.dense(rows, [1, 2, 5, 6])
    shares = []
    for name in qwen.names():
        k = active_count(even[name].numel(), 0.02)
        first, second = (set(best(g[name].abs(), k).tolist()) for g in (even, odd))
        shares.append(len(first & second) / k)
    assert 0 < sum(shares) / len(shares) < 1
    assert found.half_overlap == pytest.approx(sum(shares) / len(shares), abs=0.002)


def test_half_overlap_of_equal_halves_is_one(qwen: Pair) -> None:
    ids = list(range(10, 26))
    rows = pack([(ids, ids)] * 4, None, None, False, one_document_per_row=True)
    assert find(qwen, rows, range(4)).half_overlap == 1.0


def bank_of(experts: int, rows: int, columns: int) -> ExpertBank:
    weights = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(0))
    return ExpertBank(quantize(weights, group_size=8))


def pair_of(expert: int, experts: int, grad_output: list[float], inputs: list[float]) -> PairGradients:
    """One backward with one token, which went to `expert`."""
    starts = [0 if e <= expert else 1 for e in range(experts + 1)]
    return PairGradients(torch.tensor([inputs]), None, torch.tensor([grad_output]), None, None, starts)


def test_scores_by_hand() -> None:
    """Two experts of 2 x 3. Even backwards: dW[0] = [[4, 2, 0], [0, 0, 0]], odd: dW[0] = [[-4, 0, 0], [0, 0, 0]] and
    dW[1] = [[0, 0, 0], [0, 0, 3]]; flat index = 6 e + 3 row + column."""
    bank = bank_of(2, 2, 3)
    backwards = [pair_of(0, 2, [2.0, 0.0], [2.0, 1.0, 0.0]), pair_of(0, 2, [-4.0, 0.0], [1.0, 0.0, 0.0]),
                 pair_of(1, 2, [0.0, 0.0], [1.0, 1.0, 1.0]), pair_of(1, 2, [0.0, 1.5], [0.0, 0.0, 2.0])]  # fmt: skip
    whole, gradient, (even, odd) = score_bank(bank, backwards, 2)
    assert whole.tolist() == [1, 11]  # 4 - 4 cancels: 2 and 3 remain
    assert gradient.tolist() == [2, 3]
    assert even.tolist() == [0, 1]
    assert odd.tolist() == [0, 11]
    assert overlap(even, odd) == 0.5
    whole, gradient, (even, odd) = score_bank(bank, backwards, 4)
    assert whole.tolist() == [0, 1, 2, 11]  # zeros by index
    assert gradient.tolist() == [0, 2, 0, 3]
    assert even.tolist() == [0, 1, 2, 3]
    assert odd.tolist() == [0, 1, 2, 11]


def test_signs_cancel_over_samples_and_the_larger_wins() -> None:
    """|mean gradient|, not mean |gradient|."""
    bank = bank_of(1, 1, 2)
    backwards = [pair_of(0, 1, [1.0], [5.0, 1.0]), pair_of(0, 1, [1.0], [-5.0, 1.0])]
    assert score_bank(bank, backwards, 1)[0].tolist() == [1]


@pytest.mark.parametrize(
    ("projections", "fraction", "counts"),
    [("all", 0.01, (2, 1)), ("down", 0.01, (0, 3)), ("down", 0.5, (50, 100)), ("down", 1.0, (200, 100)),
     ("all", 1.0, (200, 100)), ("down", 1e-9, (0, 2))],
)  # fmt: skip
def test_as_many_weights_whichever_projections_train(
    projections: str, fraction: float, counts: tuple[int, int]
) -> None:
    assert importance.active_counts(200, 100, fraction, projections) == counts
    assert sum(counts) == sum(importance.active_counts(200, 100, fraction, "all"))


def test_down_projections_alone(qwen: Pair) -> None:
    """They are scored as they are beside the others, and nothing is captured for those."""
    rows = make_rows()
    states = qwen.states(rows)
    both = find_important(qwen.model, states, rows, range(6), 0.06, 2, 16, lambda n: None, projections="all")
    down = find_important(qwen.model, states, rows, range(6), 0.02, 2, 16, lambda n: None, projections="down")
    assert both.active.keys() == down.active.keys()
    for moe in qwen.model.moe_from(2):
        up_name, down_name = moe.names
        assert len(down.active[up_name]) == 0
        assert torch.equal(down.active[down_name], both.active[down_name])  # 6% of it are 2% of both
        assert all(bank.captured is None and bank.delta.grad is None for bank in moe.banks)


@pytest.mark.parametrize(("numel", "fraction", "count"), [
    (1000, 0.005, 5), (1000, 0.0059, 5), (100, 0.005, 1), (7, 1.0, 7), (402653184, 0.005, 2013265),
])  # fmt: skip
def test_active_count(numel: int, fraction: float, count: int) -> None:
    assert active_count(numel, fraction) == count


# -- a head that trains ------------------------------------------------------------------------------------------------

HEADS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(which: str) -> Pair:
        if which not in made:
            folder = tmp_path_factory.mktemp("headed") / "checkpoint"
            made[which] = make_pair(folder, "qwen3_moe", 2, head=True, **HEADS[which])
        return made[which]

    return pair


@pytest.fixture(params=[20, 128], ids=["blocks of 20 rows", "one block"])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rows of a head's block: of 128 in all, so that the last block of 20 has 8."""
    monkeypatch.setattr(sparse_head, "BLOCK_ELEMENTS", request.param * 64)
    return int(request.param)


def in_blocks(pair: Pair, rows: int) -> Pair:
    """The same with a head in blocks of so many rows."""
    head = pair.model.head
    assert head is not None
    pair.model.head = SparseHead(FrozenLinear(head.weight, head.bias))
    assert pair.model.head.part_rows == rows
    return pair


@pytest.mark.parametrize("projections", ["all", "down"])
@pytest.mark.parametrize("which", HEADS)
def test_the_heads_choice_is_that_of_its_dense_gradient(
    headed: Callable[[str], Pair], deferred: dict[int, Tensor], block_rows: int, which: str, projections: str
) -> None:
    """Of the output side alone where the embeddings share its tensor; the experts' choice beside it as well."""
    pair, rows, samples = in_blocks(headed(which), block_rows), make_rows(), [5, 0, 3, 1, 6]
    head = pair.model.head_name
    found = find_important(
        pair.model, pair.states(rows), rows, samples, 0.05, 2, 7, lambda n: None, projections=projections
    )  # fmt: skip
    expected = pair.dense(rows, samples)
    assert found.active.keys() == expected.keys() == {*pair.names(), head}
    for name, weights in banks_of(pair).items():
        if len(found.active[name]):
            assert_same_gradient(deferred[id(weights)], expected[name])
            assert_top_k(found.active[name], expected[name], len(found.active[name]))
    assert len(found.active[head]) > 50
    assert len(found.active[pair.names()[0]]) == 0 or projections == "all"


@pytest.mark.parametrize(("chunk_rows", "head_chunk_tokens"), [(1, 16), (3, 5), (100, 1000)])
def test_chunks_do_not_matter_to_the_head(
    headed: Callable[[str], Pair], deferred: dict[int, Tensor], chunk_rows: int, head_chunk_tokens: int
) -> None:
    """Neither those of the samples nor those of the tokens that go through the head at a time."""
    pair, rows = headed("untied"), make_rows()
    states = pair.states(rows)
    found = find_important(pair.model, states, rows, range(7), 0.05, chunk_rows, head_chunk_tokens, lambda n: None)
    head, expected = pair.model.head_name, pair.dense(rows, range(7))[pair.model.head_name]
    assert_same_gradient(deferred[id(pair.model.head)], expected)
    assert_top_k(found.active[head], expected, len(found.active[head]))
    assert pair.model.head is not None
    assert pair.model.head.captured is None
    assert pair.model.head.delta.grad is None


def test_half_overlap_counts_the_head(headed: Callable[[str], Pair], block_rows: int) -> None:
    pair, rows = in_blocks(headed("untied"), block_rows), make_rows()
    found = find(pair, rows, [0, 1, 2, 3, 4, 5, 6], fraction=0.05, chunk_rows=2)
    even, odd = pair.dense(rows, [0, 3, 4]), pair.dense(rows, [1, 2, 5, 6])
    shares = {}
    for name, active in found.active.items():
        k = len(active)
        first, second = (set(best(g[name].abs(), k).tolist()) for g in (even, odd))
        shares[name] = len(first & second) / k
    assert 0 < shares[pair.model.head_name] < 1
    assert found.half_overlap == pytest.approx(sum(shares.values()) / len(shares), abs=0.003)


def test_one_sample_and_a_short_last_block(headed: Callable[[str], Pair], block_rows: int) -> None:
    """The odd half is empty, and its gradient of the last block has that block's rows, not a whole block's."""
    pair, rows = in_blocks(headed("untied"), block_rows), make_rows()
    found = find(pair, rows, [4], fraction=0.05)
    assert math.isnan(found.half_overlap)
    head = pair.model.head_name
    assert_top_k(found.active[head], pair.dense(rows, [4])[head], len(found.active[head]))


def test_a_block_without_any_backward_has_no_gradient(block_rows: int) -> None:
    head = SparseHead(FrozenLinear(torch.randn(128, 64), None))
    shapes = [part_gradient(head, [], p).shape for p in range(head.num_parts)]
    assert [rows for rows, _ in shapes] == [end - first for first, end in map(head.rows_of, range(head.num_parts))]
    assert grow_candidates(head, [], torch.arange(100), 128 * 64 - 100).tolist() == list(range(100, 128 * 64))


def shaped_like(layers: int, up: int, down: int, head: int) -> SparseModel:
    """A model of which the counts alone are asked: weights of each layer's projections, and of the head."""
    moes = [
        SimpleNamespace(names=(f"{i}.up", f"{i}.down"), banks=(SimpleNamespace(numel=up), SimpleNamespace(numel=down)))
        for i in range(layers)
    ]
    own = SimpleNamespace(numel=head, in_features=1) if head else None
    model = SimpleNamespace(moe_from=lambda start: moes[start:], head=own, head_name="head")
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("projections", ["all", "down"])
@pytest.mark.parametrize("fraction", [1e-9, 0.005, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("head", [1, 60, 5_000, 64_000, 10_000_000])
@pytest.mark.parametrize(("layers", "up", "down"), [(3, 2_000, 1_000), (1, 100, 50), (2, 40_003, 19_999)])
def test_as_many_weights_with_a_head_as_without(
    layers: int, up: int, down: int, head: int, fraction: float, projections: str
) -> None:
    """In all: from a head of one weight to one that is far larger than all experts, and never more than there are."""
    without = counts_by_name(shaped_like(layers, up, down, 0), 0, fraction, projections, 0)
    counts = counts_by_name(shaped_like(layers, up, down, head), 0, fraction, projections, head)
    assert counts.keys() == {*without, "head"}
    assert sum(counts.values()) == sum(without.values())
    assert 0 <= counts["head"] <= head
    for name in without:
        assert 0 <= counts[name] <= (up if name.endswith("up") else down)
    of_down = layers * (up + down if projections == "all" else down)
    in_all = sum(without.values())
    share = min(head / (head + of_down), head / in_all)
    # Every layer gives whole weights: the head may lack one a tensor.
    assert share * in_all - 2 * layers <= counts["head"] <= share * in_all + 1e-6 * in_all


@pytest.mark.parametrize("different", [0, 1, 37, 400, 500, 10_000])
def test_only_tokens_of_the_text_count_for_the_heads_share(different: int) -> None:
    """As a head of two rows for each has it, whatever the vocabulary."""
    layers, up, down, hidden, vocabulary = 3, 2_000, 1_000, 8, 500
    model = shaped_like(layers, up, down, hidden * vocabulary)
    assert model.head is not None
    model.head.in_features = hidden
    counts = counts_by_name(model, 0, 0.05, "down", different)
    smaller = shaped_like(layers, up, down, hidden * min(2 * different, vocabulary))
    assert counts == {"head": 0, **counts_by_name(smaller, 0, 0.05, "down", hidden * vocabulary)}


def test_the_head_of_a_model_may_get_no_weight(headed: Callable[[str], Pair]) -> None:
    """Where experts train one weight each, none is left for it."""
    pair, rows = headed("untied"), make_rows()
    found = find(pair, rows, range(6), fraction=1e-9)
    assert {name: len(active) for name, active in found.active.items()} == {
        **dict.fromkeys(pair.names(), 1), pair.model.head_name: 0,
    }  # fmt: skip
    assert 0 <= found.half_overlap <= 1


@pytest.mark.parametrize("projections", ["all", "down"])
def test_counts_of_a_model(headed: Callable[[str], Pair], projections: str) -> None:
    """As found, in the model: also where everything trains."""
    pair, rows = headed("untied"), make_rows()
    states = pair.states(rows)
    for fraction in (0.01, 1.0):
        found = find_important(
            pair.model, states, rows, range(4), fraction, 4, 16, lambda n: None, projections=projections
        )
        sizes = {name: len(active) for name, active in found.active.items()}
        assert sizes == counts_by_name(pair.model, 2, fraction, projections, rows.different_targets())
        for name, weights in banks_of(pair).items():
            assert torch.equal(found.active[name], found.active[name].unique())
            assert sizes[name] == 0 or int(found.active[name][-1]) < weights.numel


# -- candidates of a reselection ---------------------------------------------------------------------------------------


def random_pairs(bank: ExpertBank, tokens: int, seed: int, shared: str) -> tuple[PairGradients, Tensor]:
    """A backward of `tokens` tokens with two experts each (none for the last), and its dense gradient by a loop."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(bank.num_experts - 1, generator=generator)[:2] for _ in range(tokens)])
    slot = torch.sort(ids.reshape(-1), stable=True).indices
    token = torch.div(slot, 2, rounding_mode="floor")
    experts = ids.reshape(-1)[slot]
    starts = [int((experts < e).sum()) for e in range(bank.num_experts + 1)]
    by_token = {"inputs": torch.randn(tokens, bank.in_features, generator=generator),
                "outputs": torch.randn(tokens, bank.out_features, generator=generator)}  # fmt: skip
    scale = torch.rand(2 * tokens, generator=generator)
    x, dy = by_token["inputs"][token], by_token["outputs"][token] * scale.unsqueeze(1)
    dense = torch.zeros(bank.base.shape, dtype=torch.float64)
    for p in range(2 * tokens):
        dense[experts[p]] += torch.outer(dy[p].double(), x[p].double())
    if shared == "inputs":  # as the first projection keeps them
        return PairGradients(by_token["inputs"], token, dy, None, None, starts), dense
    return PairGradients(x, None, by_token["outputs"], token, scale, starts), dense  # as the second does


@pytest.mark.parametrize("shared", ["inputs", "outputs"])
def test_grow_candidates(shared: str) -> None:
    """The largest over all captured backwards, none of the kept, whatever their order."""
    bank = bank_of(4, 6, 10)
    made = [random_pairs(bank, 9, seed, shared) for seed in range(3)]
    backwards, dense = [pairs for pairs, _ in made], sum((d for _, d in made), torch.zeros(4, 6, 10).double())
    for e in range(4):
        torch.testing.assert_close(part_gradient(bank, backwards, e, torch.float64), dense[e], rtol=1e-5, atol=1e-5)
    scores = dense.reshape(-1).abs()
    top = torch.sort(scores, descending=True, stable=True).indices
    kept = torch.sort(top[[0, 1, 4, 17, 100]]).values
    outside = [i for i in top.tolist() if i not in set(kept.tolist())]
    for count in (1, 7, 40):
        found = grow_candidates(bank, backwards, kept, count)
        assert found.tolist() == sorted(outside[:count])
    everything = grow_candidates(bank, backwards, kept, 235)
    assert everything.tolist() == sorted(outside)
    assert grow_candidates(bank, backwards, kept[:0], 3).tolist() == sorted(top[:3].tolist())


def squares_by_row(bank: ExpertBank, backwards: Sequence[PairGradients]) -> Tensor:
    """Of the gradients of single pairs, one after the other, in float64."""
    total = torch.zeros(bank.shape, dtype=torch.float64)
    for backward in backwards:
        for e in range(bank.num_parts):
            dy, x = backward.part(e, torch.float64)
            for row in range(len(dy)):
                total[e] += torch.outer(dy[row], x[row]).square()
    return total


@pytest.mark.parametrize("shared", ["inputs", "outputs"])
def test_squares_are_of_single_pairs(shared: str) -> None:
    bank = bank_of(4, 6, 10)
    made = [random_pairs(bank, 9, seed, shared) for seed in range(4)]
    backwards, dense = [pairs for pairs, _ in made], sum((d for _, d in made), torch.zeros(4, 6, 10).double())
    squares, before = squares_by_row(bank, backwards), [b.part(e)[1].clone() for b in backwards for e in range(4)]
    for e in range(4):
        found = part_gradient(bank, backwards, e, torch.float64, squares=True)
        torch.testing.assert_close(found, squares[e], rtol=1e-5, atol=1e-8)
    chosen, gradient, halves = score_bank(bank, backwards, 12, True)
    assert torch.equal(chosen, best(squares, 12))
    assert not torch.equal(chosen, best(dense.abs(), 12))
    torch.testing.assert_close(gradient.double(), dense.reshape(-1)[chosen], rtol=1e-5, atol=1e-6)
    for half, of in zip(halves, (backwards[0::2], backwards[1::2]), strict=True):
        assert torch.equal(half, best(squares_by_row(bank, of), 12))
    assert len(bank.active) == len(bank.delta) == 0  # as before
    for was, x in zip(before, (b.part(e)[1] for b in backwards for e in range(4)), strict=True):
        assert torch.equal(was, x)


def test_weights_may_be_chosen_by_squares(qwen: Pair) -> None:
    """Of every tensor; their gradients are those of the mean loss, as when they are chosen by these."""
    rows = make_rows()

    def chosen(score: str) -> Importance:
        return find_important(qwen.model, qwen.states(rows), rows, range(6), 0.02, 2, 16, lambda n: None, score=score)

    by_gradient, by_square = chosen("gradient"), chosen("square")
    for name, dense in qwen.dense(rows, range(6)).items():
        places = by_square.active[name]
        assert len(places) == len(by_gradient.active[name])
        assert not torch.equal(places, by_gradient.active[name])
        there = dense.reshape(-1)[places]
        torch.testing.assert_close(by_square.gradients[name].double(), there, rtol=1e-4, atol=1e-7)


def test_expert_without_tokens_has_no_gradient() -> None:
    bank = bank_of(4, 6, 10)
    backwards = [random_pairs(bank, 9, 0, "inputs")[0]]
    gradient = part_gradient(bank, backwards, 3)
    assert gradient.shape == (6, 10)
    assert gradient.dtype == torch.float32
    assert not gradient.any()
    assert part_gradient(bank, [], 0).shape == (6, 10)


# -- memory and work ---------------------------------------------------------------------------------------------------


class LargestTensors(TorchDispatchMode):
    """Remembers every floating-point tensor of at least `elements` that an operator gave back, and how many of those
    were alive at once."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.largest = elements, 0
        self.alive: list[weakref.ref[Any]] = []
        self.most_alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.largest = max(self.largest, leaf.numel())
                if leaf.numel() >= self.elements:
                    self.alive.append(weakref.ref(leaf))
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.most_alive = max(self.most_alive, len({ref().untyped_storage().data_ptr() for ref in self.alive}))
        return out


def test_never_a_dense_gradient_of_a_layer(tmp_path: Path) -> None:
    """24 experts of 96 x 64: no floating-point tensor beyond one expert's size and k, and few of that size at once.

    Activations are kept below the size of an expert by short samples, so that what is as large must be a weight.
    """
    folder = write_checkpoint(tmp_path / "model", num_experts=24, num_experts_per_tok=2, vocab_size=80)
    model = build(folder)
    ids = [list(range(3 + i, 13 + i)) for i in range(8)]
    rows = pack([(i, i) for i in ids], None, None, False, one_document_per_row=True)
    states = BoundaryStates(model, rows, chunked(8, 2), 2, torch.float32, {}, None)
    expert = 96 * 64
    with LargestTensors(expert) as seen:
        found = find_important(model, states, rows, range(8), 0.005, 2, 16, lambda n: None)
    k = active_count(24 * expert, 0.005)
    assert expert <= seen.largest <= expert + 2 * k  # the second where an expert's scores join the k best so far
    # While scored: two halves and what is computed of them. While decoded: codes, products and roundings of one expert.
    assert seen.most_alive <= 6
    assert all(len(active) == active_count(24 * size, 0.005) for active, size in
               zip(found.active.values(), [expert, expert // 2] * 2, strict=True))  # fmt: skip


def test_the_memory_test_sees_a_dense_layer() -> None:
    with LargestTensors(100) as seen:
        kept = [torch.zeros(10, 10) + i for i in range(5)]
        torch.stack(kept)
    assert seen.largest == 500
    assert seen.most_alive >= 5


def test_pairs_of_one_layer_at_a_time(qwen: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's backward begins, nothing that another layer captured is alive, nor the inputs of layers above."""
    captured: list[weakref.ref[Any]] = []
    entered: list[weakref.ref[Any]] = []
    backwards: list[int] = []

    def recording(bank: ExpertBank, pairs: Sequence[PairGradients], k: int, *score: bool) -> Any:
        captured.extend(weakref.ref(p) for p in pairs)
        captured.extend(weakref.ref(p.grad_outputs) for p in pairs)
        return score_bank(bank, pairs, k, *score)

    original = importance._backward

    def beginning(*args: Any) -> Any:
        assert not any(ref() is not None for ref in captured), "pairs of the layer above are still held"
        assert not any(ref() is not None for ref in entered), "inputs of the layer above are still held"
        entered.extend(weakref.ref(h) for h in args[5])
        backwards.append(args[2])
        return original(*args)

    monkeypatch.setattr(importance, "score_bank", recording)
    monkeypatch.setattr(importance, "_backward", beginning)
    find(qwen, make_rows(), range(6))
    assert backwards == [(3, 4), (2, 3)]
    assert captured
    assert entered


def test_each_expert_is_decoded_at_most_three_times_a_chunk(qwen: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and forward and backward again. The top layer has one forward, the lowest one's inputs need no gradient,
    and scoring decodes none."""
    decoded: Counter[tuple[int, int]] = Counter()

    def counted(decode: Any) -> Any:
        def count(self: ExpertBank, e: int, *args: Any) -> Tensor:
            decoded[id(self), e] += 1
            return decode(self, e, *args)

        return count

    for way in ("decode", "base_weight"):  # in fp32, and in the float64 of these tests
        monkeypatch.setattr(ExpertBank, way, counted(getattr(ExpertBank, way)))

    def scoring(bank: ExpertBank, pairs: Sequence[PairGradients], k: int, *score: bool) -> Any:
        before = decoded.total()
        result = score_bank(bank, pairs, k, *score)
        assert decoded.total() == before
        return result

    monkeypatch.setattr(importance, "score_bank", scoring)
    rows = make_rows()
    calls: list[int] = []
    find_important(qwen.model, qwen.states(rows), rows, range(6), 0.02, 2, 16, calls.append)
    chunks = sample_chunks(range(6), 2)
    up_of_first = id(qwen.model.moe[2].banks[0])
    most: Counter[int] = Counter()
    for (bank, _), count in decoded.items():
        most[bank] = max(most[bank], count)
    trained = [id(bank) for moe in qwen.model.moe_from(2) for bank in moe.banks]
    times = [2 if bank == up_of_first else 3 for bank in trained[:2]] + [2, 2]
    assert [most[bank] for bank in trained] == [n * len(chunks) for n in times]
    assert sum(calls) == 2 * len(chunks) * 2  # two trainable layers


# -- the experts' outputs, where no gradient depends on them -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_out_unused_outputs_changes_no_choice(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, where the fused experts run: the same active weights and no fewer second products than needed."""
    model = build(write_checkpoint(tmp_path / "model", family))
    rows = make_rows()
    down = {id(moe.banks[1]) for moe in model.moe}
    decoded: Counter[bool] = Counter()
    decode, found = ExpertBank.decode, []

    def counting(bank: ExpertBank, *args: Any) -> Tensor:
        decoded[id(bank) in down] += 1
        return decode(bank, *args)

    monkeypatch.setattr(ExpertBank, "decode", counting)
    for way in (experts_are_only_added, lambda out: False):
        monkeypatch.setattr(importance, "experts_are_only_added", way)
        states = BoundaryStates(model, rows, chunked(len(rows), 3), 1, torch.float32, {}, None)
        found.append((find_important(model, states, rows, range(6), 0.02, 2, 16, lambda n: None), decoded[True]))
        decoded.clear()
    (with_it, fewer), (without, all_of_them) = found
    assert all(torch.equal(active, without.active[name]) for name, active in with_it.active.items())
    assert fewer < all_of_them
    assert not any(bank.output_unused for moe in model.moe for bank in moe.banks)


@pytest.mark.parametrize(("norm", "expected"), [(False, True), (True, False)])
def test_a_norm_behind_the_experts_needs_their_output(norm: bool, expected: bool) -> None:
    layer = FusedExpertsLayer(experts_with(gate=True, bias=False, transposed=False, post_norm=False), active=60)
    hidden, ids, weights = fused_inputs_of(layer)
    hidden.requires_grad_()
    out = layer.run_banked(hidden, ids, weights)
    out = torch.nn.functional.rms_norm(out, (24,)) if norm else out.reshape(4, 5, 24)
    assert experts_are_only_added(hidden.reshape(out.shape) * 3 + out) is expected


def test_without_experts_nothing_is_unused() -> None:
    assert not experts_are_only_added(torch.ones(3, requires_grad=True) + 1)
