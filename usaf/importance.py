"""Which weights to train: the exact mean gradient over many samples, never holding a dense gradient of a whole layer.

Deferred weight gradients, layer-major. Forward: every trainable layer's input is kept for all samples. Backward, from
the top layer down: all samples go through one layer, and for each token-expert pair only what its weight gradients need
is kept (`expert_bank.PairGradients`). Then one expert at a time gets its exact dense gradient over all samples,

    dL/dW[e] = sum over its pairs of dY^T X,

is scored by |gradient|, its best entries compete for the k places of the fused tensor, and it is freed. Memory grows
with tokens, not with weights, and every expert's product sees the tokens of all samples.

The same pairs, captured from the last ordinary training steps, rank the candidates of a reselection
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
    """active: parameter name -> sorted flat indices, int64. half_overlap: the share of their indices that masks from
    two disjoint halves of the samples have in common, averaged over the tensors; nan where there is one sample only."""

    active: dict[str, Tensor]
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


def head_share(head: int, layers: Sequence[tuple[int, int]], projections: str) -> float:
    """The head's part of all that trains: as it is of the tensors that do. head: its weights, 0 where it is frozen;
    layers: those of each layer's two fused expert tensors."""
    experts = sum(up + down if projections == "all" else down for up, down in layers)
    return head / (head + experts)


def counts_by_name(model: SparseModel, start: int, fraction: float, projections: str) -> dict[str, int]:
    """Fused tensor, or the head -> how many of its weights train: as many in all as without the head."""
    moes = model.moe_from(start)
    layers = [(moe.banks[0].numel, moe.banks[1].numel) for moe in moes]
    in_all = sum(sum(active_counts(up, down, fraction, projections)) for up, down in layers)
    head = model.head.numel if model.head is not None else 0
    to_head = min(head_share(head, layers, projections), head / in_all)  # no more than it has
    counts: dict[str, int] = {}
    for moe, (up, down) in zip(moes, layers, strict=True):
        counts |= zip(moe.names, active_counts(up, down, fraction, projections, to_head), strict=True)
    if model.head is not None:
        counts[model.head_name] = in_all - sum(counts.values())
    return counts


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
    projections: str = "all",
) -> Importance:  # fmt: skip
    """The weights of each fused expert tensor with the largest mean gradient over the sequences `samples`, as many as
    `active_counts` says.

    Ties go to the lower index. `progress` is called twice for each chunk (`sample_chunks`) and trainable layer.
    `workspace`: where inputs, gradients and pairs of all samples lie, on the CPU; None is private memory.
    """
    memory = workspace or PRIVATE
    chunks = sample_chunks(samples, chunk_rows)
    batches = [rows.batch(chunk) for chunk in chunks]
    entering = [_kept(memory, states.hidden(chunk)) for chunk in chunks]
    segments = model.handover.segments(states.start, model.num_layers)
    inputs = _forward(model, batches, entering, segments[:-1], memory, progress)
    gradients: list[Tensor] = []  # of the loss, at what leaves the segment, by chunk
    scale = 1.0 / max(1, sum(count_targets(batch) for batch in batches))
    head = _Head(model, head_chunk_tokens, scale, memory)
    counts = counts_by_name(model, states.start, fraction, projections)
    active: dict[str, Tensor] = {}
    overlaps: list[float] = []
    unused: dict[type, bool] = {}
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
                active[name] = torch.zeros(0, dtype=torch.int64)
                continue
            pairs = captured.pop(0)
            active[name], halves = score_bank(banks[name], pairs, counts[name])
            overlaps.append(overlap(*halves))
            del pairs  # a layer's pairs are gone before the next layer's are captured
        if above is not None and model.head is not None:
            active[model.head_name], halves = score_bank(model.head, head.captured, counts[model.head_name])
            overlaps.append(overlap(*halves))
            head.captured.clear()
    half_overlap = sum(overlaps) / len(overlaps) if len(chunks) > 1 else float("nan")
    return Importance(active, half_overlap, len(samples))


def _kept(memory: Memory, hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else memory.keep(hidden)


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
            if head.captured:
                self.captured.append(HeadGradients.joined(head.captured).kept(self.memory))
            head.captured = None
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


def part_gradient(
    weights: SparseWeights[Any], backwards: Sequence[Factors], p: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The exact dense gradient [out, in] of part p over all given backwards."""
    total: Tensor | None = None
    waiting: list[tuple[Tensor, Tensor]] = []
    used = [b for b in backwards if b.starts[p] < b.starts[p + 1]]
    for i, backward in enumerate(used):
        waiting.append(backward.part(p, dtype))
        if sum(len(x) for _, x in waiting) >= ROWS_AT_ONCE or i == len(used) - 1:
            dy, x = (torch.cat(both) if len(both) > 1 else both[0] for both in zip(*waiting, strict=True))
            total = dy.t() @ x if total is None else total.addmm_(dy.t(), x)
            waiting = []
    if total is None:
        rows = min(weights.part_rows, weights.numel // weights.part_columns - p * weights.part_rows)
        return torch.zeros(rows, weights.part_columns, dtype=dtype, device=weights.device)
    return total


def score_bank(
    bank: SparseWeights[Any], pairs: Sequence[Factors], k: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """(the k best flat indices, the k best by the even and by the odd entries alone); int64, sorted.

    `pairs`: one entry for each backward. One part at a time is dense on each core.
    """
    whole, even, odd = RunningTopK(k), RunningTopK(k), RunningTopK(k)

    def score(e: int) -> None:
        first = e * bank.part_size
        gradient_even = part_gradient(bank, pairs[0::2], e)
        gradient_odd = part_gradient(bank, pairs[1::2], e)
        even.update(gradient_even.reshape(-1), first)
        odd.update(gradient_odd.reshape(-1), first)
        whole.update(gradient_even.add_(gradient_odd).reshape(-1), first)

    _for_each_part(bank, pairs, score)
    return whole.indices(), (even.indices(), odd.indices())


def grow_candidates(bank: SparseWeights[Any], pairs: Sequence[Factors], kept: Tensor, count: int) -> Tensor:
    """The `count` flat indices outside `kept` (sorted) with the largest gradient over the captured backwards."""
    best = RunningTopK(count)

    def offer(e: int) -> None:
        best.update(part_gradient(bank, pairs, e).reshape(-1), e * bank.part_size, exclude=kept)

    _for_each_part(bank, pairs, offer)
    return best.indices()


def _for_each_part(bank: SparseWeights[Any], pairs: Sequence[Factors], work: Callable[[int], None]) -> None:
    """`work(p)` for every part, on the CPU by several threads (`workers`)."""
    tokens = [sum(p.starts[e + 1] - p.starts[e] for p in pairs) for e in range(bank.num_parts)]
    workers = number_of_workers(sum(tokens) * bank.part_size, len(tokens)) if bank.device.type == "cpu" else 1

    @torch.no_grad()
    def share(experts: list[int]) -> None:
        for e in experts:
            work(e)

    run_shares(share, shares([1 + n for n in tokens], workers))
