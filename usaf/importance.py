"""Which weights to train: the exact mean gradient over many samples, never holding a dense gradient of a whole layer.

Deferred weight gradients, layer-major. Forward: every trainable layer's input is kept for all samples. Backward, from
the top layer down: all samples go through one layer, and for each token-expert pair only what its weight gradients need
is kept (`expert_bank.PairGradients`). Then one expert at a time gets its exact dense gradient over all samples,

    dL/dW[e] = sum over its pairs of dY^T X,

is scored by |gradient|, its best entries compete for the k places of the fused tensor, and it is freed. Memory grows
with tokens, not with weights, and every expert's product sees the tokens of all samples. An output layer that trains is
scored first, a block of its rows at a time (`sparse_head`).

The same factors, captured from the last ordinary training steps, rank the candidates of a reselection
(`grow_candidates`).

Left out: keeping the pairs of more than one layer, or on the disk, to decode each expert once for all chunks. An expert
is decoded at most three times a chunk here (forward, and forward and backward again), and memory stays that of a layer.

Source: |mean gradient| as the score, SPEFT (arXiv 2412.13488).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from usaf.data import Batch, Rows
from usaf.expert_bank import ExpertBank, PairGradients
from usaf.fused_experts import FusedExperts
from usaf.loss import count_targets, loss_and_gradient
from usaf.model import MoeLayer, SparseModel
from usaf.prefix import BoundaryStates
from usaf.selection import RunningTopK, overlap
from usaf.sparse_head import HeadGradients
from usaf.sparse_weights import Factors, SparseWeights
from usaf.workers import number_of_workers, run_shares, shares
from usaf.workspace import PRIVATE, Memory, Workspace

Progress = Callable[[int], None]
"""Called after each unit of work (a chunk through a layer, or the scoring of a layer)."""


@dataclass(frozen=True)
class Importance:
    """active: parameter name -> sorted flat indices, int64; gradients: that of the mean loss at each of them, fp32.
    half_overlap: the share of their indices that masks from two disjoint halves of the samples have in common, averaged
    over the tensors; nan where there is one sample only."""

    active: dict[str, Tensor]
    gradients: dict[str, Tensor]
    half_overlap: float
    sequences: int


def active_count(numel: int, fraction: float) -> int:
    """Weights of a fused tensor that train: the given share of it, at least one."""
    return max(1, int(numel * fraction))


def active_counts(up: int, down: int, fraction: float, projections: str, to_head: float = 0.0) -> tuple[int, int]:
    """Weights of a layer's two fused expert tensors that train; up, down: how many they have.

    projections: "all", the same share of each; "down", as many in all, of the second one alone as far as it has them.
    to_head: the share of these that the head has instead (`head_share`).
    """
    both = active_count(up, fraction), active_count(down, fraction)
    if projections == "all":
        return both[0] - int(to_head * both[0]), both[1] - int(to_head * both[1])
    assert projections == "down", projections
    left = sum(both) - int(to_head * sum(both))
    of_down = min(left, down)
    return left - of_down, of_down


def head_share(head: int, layers: Sequence[tuple[int, int]], fraction: float, projections: str) -> float:
    """The head's part of all that trains: as it is of the tensors that do, and no more weights than it has. head: its
    weights that count (`head_weights_that_count`), 0 where it is frozen; layers: those of each layer's two fused expert
    tensors."""
    experts = sum(up + down if projections == "all" else down for up, down in layers)
    in_all = sum(sum(active_counts(up, down, fraction, projections)) for up, down in layers)
    return min(head / (head + experts), head / in_all)


def trained_counts(
    head: int, layers: Sequence[tuple[int, int]], fraction: float, projections: str
) -> tuple[list[tuple[int, int]], int]:
    """(Of each layer's two fused expert tensors, of the head): how many weights train, as many in all as without the
    head. Arguments as in `head_share`."""
    to_head = head_share(head, layers, fraction, projections)
    counts = [active_counts(*weights, fraction, projections, to_head) for weights in layers]
    in_all = sum(sum(active_counts(*weights, fraction, projections)) for weights in layers)
    return counts, min(in_all - sum(map(sum, counts)), head)


ROWS_A_TARGET = 2
"""Rows of the head that count for each token of the training text: its own, and that of one that it is taken for
(docs/decisions.md has the shares that were tried)."""


def head_weights_that_count(weights: int, hidden: int, different_targets: int) -> int:
    """Of a head's weights, as many as its share of FRAC goes by. Of a large vocabulary a text may have a small part:
    by its size a head of 49,152 tokens, 1,184 of which occurred, had 61% of FRAC for no gain."""
    return min(weights, hidden * ROWS_A_TARGET * different_targets)


def counts_by_name(
    model: SparseModel, start: int, fraction: float, projections: str, different_targets: int
) -> dict[str, int]:  # fmt: skip
    """Fused tensor, or the head -> how many of its weights train. different_targets: `Rows.different_targets` of the
    training text."""
    moes = model.moe_from(start)
    layers = [(moe.banks[0].numel, moe.banks[1].numel) for moe in moes]
    head = model.head
    counting = 0 if head is None else head_weights_that_count(head.numel, head.in_features, different_targets)
    of_layers, of_head = trained_counts(counting, layers, fraction, projections)
    counts = {
        name: count for moe, both in zip(moes, of_layers, strict=True)
        for name, count in zip(moe.names, both, strict=True)
    }  # fmt: skip
    return counts if model.head is None else {**counts, model.head_name: of_head}


def sample_chunks(samples: Sequence[int], chunk_rows: int) -> list[list[int]]:
    """The samples in their order, in an even number of chunks of at most `chunk_rows`, as equal as can be.

    The even and the odd chunks are the halves whose masks are compared.
    """
    pairs_of_chunks = -(-len(samples) // (2 * chunk_rows))
    count = min(2 * pairs_of_chunks, len(samples))
    bounds = [i * len(samples) // count for i in range(count + 1)]
    return [list(samples[begin:end]) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def find_important(
    model: SparseModel, states: BoundaryStates, rows: Rows, samples: Sequence[int], fraction: float,
    chunk_rows: int, head_chunk_tokens: int, progress: Progress, workspace: Workspace | None = None,
    projections: str = "all", score: str = "gradient",
) -> Importance:  # fmt: skip
    """The weights of each fused expert tensor with the largest mean gradient over the sequences `samples`, as many as
    `active_counts` says; with the `score` "square", with the largest mean of their tokens' squared gradients.

    Ties go to the lower index. `progress` is called twice for each chunk (`sample_chunks`) and trainable layer.
    `workspace`: where inputs, gradients and pairs of all samples lie, on the CPU; None is private memory.
    """
    memory = workspace or PRIVATE
    chunks = sample_chunks(samples, chunk_rows)
    batches = [rows.batch(chunk) for chunk in chunks]
    entering = [states.kept(chunk, memory) for chunk in chunks]
    segments = model.handover.segments(states.start, model.num_layers)
    inputs = _forward(model, batches, entering, segments[:-1], memory, progress)
    gradients: list[Tensor] = []  # of the loss, at what leaves the segment, by chunk
    scale = 1.0 / max(1, sum(count_targets(batch) for batch in batches))
    head = _Head(model, head_chunk_tokens, scale, memory)
    counts = counts_by_name(model, states.start, fraction, projections, rows.different_targets())
    active: dict[str, Tensor] = {}
    gradients_there: dict[str, Tensor] = {}
    overlaps: list[float] = []
    unused: dict[type, bool] = {}
    squares = score == "square"
    for segment in reversed(segments):
        moes = [moe for moe in model.moe if moe.layer in range(*segment)]
        needs_input_gradient = segment[0] > states.start
        above = None if gradients else head
        own = {n: bank for moe in moes for n, bank in zip(moe.names, moe.banks, strict=True)}
        banks = {n: bank for n, bank in own.items() if counts[n]}
        captured = _backward(
            model, batches, segment, moes, list(banks.values()), inputs.pop(), gradients, above, needs_input_gradient,
            unused, memory, progress,
        )  # fmt: skip
        for name in own:
            if name not in banks:
                active[name], gradients_there[name] = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
                continue
            pairs = captured.pop(0)
            active[name], gradients_there[name], halves = score_bank(banks[name], pairs, counts[name], squares)
            overlaps.append(overlap(*halves))
            del pairs  # a layer's pairs are gone before the next layer's are captured
        if above is not None and model.head is not None:
            name = model.head_name
            active[name], gradients_there[name] = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
            if counts[name]:
                active[name], gradients_there[name], halves = score_bank(
                    model.head, head.captured, counts[name], squares
                )
                overlaps.append(overlap(*halves))
            head.captured.clear()
    half_overlap = sum(overlaps) / len(overlaps) if len(chunks) > 1 else float("nan")
    return Importance(active, gradients_there, half_overlap, len(samples))


@torch.no_grad()
def _forward(
    model: SparseModel, batches: list[Batch], hidden: list[Tensor | None], segments: list[tuple[int, int]],
    memory: Memory, progress: Progress,
) -> list[list[Tensor | None]]:  # fmt: skip
    """inputs[i][c]: what enters segment i in chunk c, on the host; one more entry, what leaves the last of them."""
    inputs: list[list[Tensor | None]] = [hidden]
    for first, end in segments:
        outputs: list[Tensor | None] = []
        for batch, h in zip(batches, inputs[-1], strict=True):
            h = None if h is None else h.to(model.backend.device)
            outputs.append(memory.keep(model.run_layers(batch, first, end, h, norm=False)))
            progress(end - first)
        inputs.append(outputs)
    return inputs


@dataclass(frozen=True)
class _Head:
    """Final norm, head and loss. scale: 1 / the targets of all samples, for the gradient of the mean loss; captured:
    of each chunk what the gradients of a head that trains need."""

    model: SparseModel
    chunk_tokens: int
    scale: float
    memory: Memory
    captured: list[HeadGradients] = field(default_factory=list)

    def gradient(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The gradient of the mean loss over all samples at what enters the final norm: [B, S, H]."""
        head = self.model.head
        if head is not None:
            head.captured = []
        h = hidden.detach().requires_grad_()
        normed = self.model.run_layers(batch, self.model.num_layers, self.model.num_layers, h)
        _, gradient = loss_and_gradient(self.model, normed, batch, self.chunk_tokens, self.scale)
        if head is not None:
            taken = head.take_captured()
            self.captured.extend(f.kept(self.memory) if isinstance(self.memory, Workspace) else f for f in taken)
        return torch.autograd.grad(normed, h, gradient)[0]


def _backward(
    model: SparseModel, batches: list[Batch], segment: tuple[int, int], moes: list[MoeLayer], banks: list[ExpertBank],
    inputs: list[Tensor | None], gradients: list[Tensor], head: _Head | None, needs_input_gradient: bool,
    unused: dict[type, bool], memory: Memory, progress: Progress,
) -> list[list[PairGradients]]:  # fmt: skip
    """All chunks through one segment's backward: in nearly every family, one layer's. `gradients` [c] goes in as its
    output gradient, unless `head` gives that, and comes out as its input gradient; `inputs` is emptied. Returns, for
    each of `banks`, what its weight gradients need, one entry a chunk.

    With `head` this is the top segment, whose forward has not run before. Elsewhere it has, and only gradients are
    wanted of this one: `unused` remembers for which classes of layers those do not depend on the experts' outputs.
    """
    first, end = segment
    layer_class = type(model.layers[first])
    for bank in banks:
        bank.captured = []
        bank.delta.requires_grad_(True)  # still empty, but it makes autograd come by
    deltas = [bank.delta for bank in banks]
    for c, batch in enumerate(batches):
        for moe in moes:
            moe.banks[1].output_unused = head is None and unused.get(layer_class, False)
        h = inputs[c]
        inputs[c] = None
        if h is not None:
            h = h.to(model.backend.device).detach().requires_grad_(needs_input_gradient)
        if needs_input_gradient or deltas:
            wanted = [h, *deltas] if needs_input_gradient and h is not None else deltas  # and nothing of the routers'
            out = model.run_layers(batch, first, end, h, norm=False)
            above = gradients[c].to(out.device) if head is None else head.gradient(batch, out)
            if layer_class not in unused:
                unused[layer_class] = experts_are_only_added(out)
            torch.autograd.backward(out, above, inputs=wanted)
            del out, above  # the chunk's graph is gone before the next one's is made
        if isinstance(memory, Workspace):  # before the gradient is written over, which pairs may share
            for bank in banks:
                bank.captured = [*(bank.captured or [])[:c], *(p.kept(memory) for p in (bank.captured or [])[c:])]
        if h is not None and h.grad is not None:
            earlier = gradients[c] if c < len(gradients) else None
            gradients[c : c + 1] = [memory.keep(h.grad, earlier)]  # head: one more
        progress((end - first) * (1 if head is None else 2))
    captured = [bank.captured or [] for bank in banks]
    for bank in banks:
        bank.captured, bank.delta.grad = None, None
    for moe in moes:
        moe.banks[1].output_unused = False
    return captured


VALUES_UNUSED = {
    "AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0",
    "AliasBackward0", "CloneBackward0",
}  # fmt: skip
"""Operators whose gradient does not depend on the values that they were given."""


def experts_are_only_added(out: Tensor) -> bool:
    """Whether on every way from the experts' outputs to `out` they are but added, viewed or cast: then no gradient
    depends on their values. A norm behind the experts, or a gate, makes it False."""
    reaches: dict[Any, bool] = {}  # a node of autograd's graph -> whether experts lie below it
    waiting = [out.grad_fn]
    while waiting:  # depth first: a node is judged when all that it leads to have been
        node = waiting[-1]
        below = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        unseen = [n for n in below if n not in reaches]
        if unseen and node not in reaches:
            waiting += unseen
            continue
        waiting.pop()
        if node is not None and node not in reaches:
            reaches[node] = node.name() == FusedExperts.__name__ + "Backward" or any(reaches[n] for n in below)
    carriers = [node for node, found in reaches.items() if found]
    ways = [node.name() for node in carriers if node.name() != FusedExperts.__name__ + "Backward"]
    return bool(carriers) and all(name in VALUES_UNUSED for name in ways)


ROWS_AT_ONCE = 1024
"""Rows of a part that are multiplied at a time: several backwards of an expert with few tokens each go together, and
those of the head, which all tokens meet, do not."""


FEW_ROWS = 0.75
"""Share of a part's rows above which all of them are formed."""


def part_gradient(
    weights: SparseWeights[Any], backwards: Sequence[Factors], p: int, dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None, squares: bool = False,
) -> Tensor:  # fmt: skip
    """The exact dense gradient [out, in] of part p over all given backwards; with `rows` (int64) of these alone, zeros
    elsewhere; with `squares` the sum of the squares of what each token (of an expert: pair) adds to it."""
    total: Tensor | None = None
    waiting: list[tuple[Tensor, Tensor]] = []
    used = [b for b in backwards if b.starts[p] < b.starts[p + 1]]
    for i, backward in enumerate(used):
        waiting.append(backward.part(p, dtype, rows))
        if sum(len(x) for _, x in waiting) >= ROWS_AT_ONCE or i == len(used) - 1:
            dy, x = (torch.cat(both) if len(both) > 1 else both[0] for both in zip(*waiting, strict=True))
            if squares:
                dy, x = dy.square(), x.square()
            total = dy.t() @ x if total is None else total.addmm_(dy.t(), x)
            waiting = []
    if rows is None and total is not None:
        return total
    whole = torch.zeros(weights.rows_in(p), weights.part_columns, dtype=dtype, device=weights.device)
    return whole if rows is None or total is None else whole.index_copy_(0, rows, total)


def promising_rows(
    p: int, wanted: Sequence[tuple[Sequence[Factors], float]], squares: bool = False
) -> Tensor | None:  # fmt: skip
    """The rows of part p whose gradient, over some of the sets of backwards, may have an entry as large as its least;
    int64, None for all. wanted: (backwards, least size that is wanted of their sum); squares: as in `part_gradient`."""
    found: Tensor | None = None
    for backwards, least in wanted:
        bounds = [bound for bound in (backward.bounds(p, squares) for backward in backwards) if bound is not None]
        if not backwards or len(bounds) < len(backwards):
            return None
        here = torch.stack(bounds).sum(0) * (1 + BOUND_ERROR) >= least
        found = here if found is None else found | here
    assert found is not None
    return None if int(found.sum()) > FEW_ROWS * len(found) else found.nonzero().squeeze(1)


BOUND_ERROR = 1e-3
"""Relative rounding of bounds and gradients in fp32, generously."""

WAVE = 8
"""Parts with bounds that go together: before each wave it is looked anew what size still counts. What a part is offered
with must not depend on how far other threads are, since the rounding of a product depends on its rows."""


def score_bank(
    bank: SparseWeights[Any], pairs: Sequence[Factors], k: int, squares: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """(the k best flat indices, the gradient there, the k best by the even and by the odd entries alone); indices are
    int64 and sorted.

    `pairs`: one entry for each backward; squares: whether the best are by `part_gradient` with squares. One part at a
    time is dense on each core.
    """
    whole, even, odd = RunningTopK(k), RunningTopK(k), RunningTopK(k)
    halves = pairs[0::2], pairs[1::2]

    def score(p: int, least: tuple[float, ...]) -> None:
        first = p * bank.part_size
        rows = promising_rows(p, list(zip((*halves, pairs), least, strict=True)), squares)
        if rows is not None and len(rows) == 0:
            return
        gradient_even, gradient_odd = (part_gradient(bank, half, p, rows=rows, squares=squares) for half in halves)
        even.update(gradient_even.reshape(-1), first)
        odd.update(gradient_odd.reshape(-1), first)
        whole.update(gradient_even.add_(gradient_odd).reshape(-1), first)

    for_each_part(bank, pairs, score, (even, odd, whole))
    best = whole.indices()
    return best, gradient_at(bank, pairs, best) if squares else whole.values(), (even.indices(), odd.indices())


def gradient_at(bank: SparseWeights[Any], pairs: Sequence[Factors], indices: Tensor) -> Tensor:
    """The gradient over all given backwards at some of the weights, fp32, of a bank that has no active ones yet."""
    none = torch.zeros(0, dtype=torch.int64)
    bank.set_active(indices, torch.zeros(len(indices)))
    total = torch.zeros(len(indices), device=bank.device)
    for backward in pairs:
        total += bank.delta_gradient(backward, backward.dtype)
    bank.set_active(none, torch.zeros(0))
    return total.cpu()


def grow_candidates(bank: SparseWeights[Any], pairs: Sequence[Factors], kept: Tensor, count: int) -> Tensor:
    """The `count` flat indices outside `kept` (sorted) with the largest gradient over the captured backwards."""
    best = RunningTopK(count)

    def offer(p: int, least: tuple[float, ...]) -> None:
        rows = promising_rows(p, [(pairs, least[0])])
        if rows is None or len(rows):
            best.update(part_gradient(bank, pairs, p, rows=rows).reshape(-1), p * bank.part_size, exclude=kept)

    for_each_part(bank, pairs, offer, (best,))
    return best.indices()


def for_each_part(
    bank: SparseWeights[Any], pairs: Sequence[Factors], work: Callable[[int, tuple[float, ...]], None],
    best: Sequence[RunningTopK],
) -> None:  # fmt: skip
    """`work(p, least)` for every part, on the CPU by several threads (`workers`). least: of each of `best` the size
    that still counts."""
    tokens = [sum(f.starts[p + 1] - f.starts[p] for f in pairs) for p in range(bank.num_parts)]
    workers = number_of_workers(sum(tokens) * bank.part_size, len(tokens)) if bank.device.type == "cpu" else 1
    wave = WAVE if any(f.bounds(0) is not None for f in pairs) else bank.num_parts
    for first in range(0, bank.num_parts, wave):
        parts = range(first, min(first + wave, bank.num_parts))
        least = tuple(top.settled_threshold() if first else 0.0 for top in best)

        @torch.no_grad()
        def share(taken: list[int], parts: range = parts, least: tuple[float, ...] = least) -> None:
            for i in taken:
                work(parts[i], least)

        run_shares(share, shares([1 + tokens[p] for p in parts], min(workers, len(parts))))
