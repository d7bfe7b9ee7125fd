"""Peak learning rates that nobody has set: how far the chosen weights may go before the loss turns.

Before the first step all chosen weights of a kind, the experts' or the head's, move against the sign of their mean
gradient by one and the same amount t, as Adam would move them, and the loss is taken on sequences that had no say in
choosing them (on those that had one it turns later). It falls, turns, and rises. Where it turns tells what no rule of
widths can see: how many layers and weights move together, how large a model's activations are, how near to a minimum it
already is.

    experts    LR_PEAK = sqrt(by width * turn), and no more than 2 * turn
    head       HEAD_LR = turn / 4

By width: 2 / hidden size, which falls with the root of FRAC above 2%. It and the turn are two estimates with errors of
their own, which is why LR_PEAK is their mean (docs/decisions.md has the sweeps of three models).

Left out: norms, whose loss hardly turns, and which have LR_PEAK up to `optimizer.LARGEST_NORM_RATE`; routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usaf.console import say
from usaf.data import DataOrder, Rows
from usaf.importance import Importance
from usaf.loss import count_targets
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.probe import Part, Probe, parts_of
from usaf.settings import Settings
from usaf.sparse_weights import SparseWeights
from usaf.workspace import PRIVATE, Memory

RATE_TIMES_WIDTH, RATE_DENSITY = 2.0, 0.02
"""LR_PEAK by width alone, times the hidden size, up to this density; above, it falls with the square root."""
MOST_TURNS = 2.0
"""LR_PEAK at most, in turns."""
HEAD_TURNS = 0.25
"""HEAD_LR, in turns of its own."""

LEAST_SEQUENCES, ENOUGH_TARGETS = 8, 4096
"""Sequences along the line: so many, and more until they have so many targets, but no more than chose the weights."""
MOST_POINTS = 12
"""Places along a line at which the loss is taken."""


def rate_by_width(hidden_size: int, frac: float) -> float:
    """The wider a layer and the denser what trains, the more weights move together in each of its sums, and the less
    each may."""
    return RATE_TIMES_WIDTH / hidden_size * min(1.0, math.sqrt(RATE_DENSITY / frac))


@dataclass(frozen=True)
class Turn:
    """Where the loss along a line turns: `at`, None where it never fell. rest: the loss at its beginning, least: the
    lowest that was seen, mean over the targets, in nats; points: how many were taken."""

    at: float | None
    rest: float
    least: float
    points: int


def most_sequences(chosen_from: int) -> int:
    """How many go along the line at most, where so many have chosen the weights."""
    return max(chosen_from, LEAST_SEQUENCES)


def unset_rates(settings: Settings) -> list[str]:
    """The fields of those to be measured. (That a head cannot train is found out when there is a model.)"""
    head = ["head_lr"] if settings.head_lr is None and settings.train_head else []
    return ["lr_peak", *head] if settings.lr_peak is None else head


def rows_beyond(settings: Settings, rows: int) -> int:
    """How many sequences are to be read beyond `rows` for training, so that the line has those that it may want. (As
    many where the rates are set, as they are when a run is resumed: these sequences serve `delta_scale` too.)"""
    samples = settings.importance_samples
    return max(0, samples + most_sequences(samples) - rows)


class LineRows(NamedTuple):
    """The sequences along the line: rows that train, the first `met` of which have had a say in choosing the weights,
    and rows that do not train."""

    trained: list[int]
    unseen: list[int]
    met: int


def fresh_rows(order: DataOrder, rows: Rows, seen: int, unseen: BoundaryStates | None = None) -> LineRows:
    """The first of training's order that importance, which had the first `seen`, has not met; then those of `unseen`.
    Where the data end before there are `LEAST_SEQUENCES`, some that it has met."""
    taken = order.first_rows(min(seen + most_sequences(seen), len(rows)))
    further = [] if unseen is None else [row for chunk in unseen.chunks for row in chunk]
    begin = max(0, min(seen, len(taken) + len(further) - LEAST_SEQUENCES))
    candidates = [(rows, row) for row in taken[begin:]]
    candidates += [] if unseen is None else [(unseen.rows, row) for row in further]
    count = targets = 0
    for source, row in candidates[: most_sequences(seen)]:
        if count >= LEAST_SEQUENCES and targets >= ENOUGH_TARGETS:
            break
        count += 1
        targets += count_targets(source.batch([row]))
    trained = taken[begin : begin + count]
    return LineRows(trained, further[: count - len(trained)], min(count, seen - begin))


def turning_point(loss: Callable[[float], float], rest: float, guess: float) -> Turn:
    """Doublings and halvings of `guess` until the least loss has a larger one on either side; `at` is the vertex of the
    parabola through these three, over log t. A loss that is not finite counts as infinite."""
    tried: dict[int, float] = {}  # doublings of the guess -> loss

    def take(i: int) -> None:
        found = loss(guess * 2.0**i)
        tried[i] = found if math.isfinite(found) else math.inf

    take(0)
    while len(tried) < MOST_POINTS:
        best = min(tried, key=lambda i: (tried[i], i))
        missing = [i for i in (best + 1, best - 1) if i not in tried]
        if not missing:
            break
        take(missing[0])
    best = min(tried, key=lambda i: (tried[i], i))
    least = tried[best]
    if not least < rest:
        return Turn(None, rest, least, len(tried))
    below, above = tried.get(best - 1, math.inf), tried.get(best + 1, math.inf)
    curvature = below - 2 * least + above
    vertex = (below - above) / (2 * curvature) if math.isfinite(curvature) and curvature > 0 else 0.0
    return Turn(guess * 2.0 ** (best + vertex), rest, least, len(tried))


class Line(Probe):
    """The loss over some sequences with the chosen weights of a kind moved; afterwards all deltas are 0 again.

    parts, memory: see `Probe`; what enters the head lies there too. gradients: tensor -> the mean loss's gradient at
    its active weights, in their order.
    """

    def __init__(
        self, model: SparseModel, parts: Sequence[Part], head_chunk_tokens: int, gradients: Mapping[str, Tensor],
        memory: Memory = PRIVATE,
    ) -> None:  # fmt: skip
        super().__init__(model, parts, head_chunk_tokens, memory)
        self.gradients = gradients
        self.to_head: list[Tensor] = []
        head = model.head_name if model.head is not None else None
        self.experts = {n: w for n, w in model.sparse_weights(self.start).items() if n != head}
        self.head: dict[str, SparseWeights[Any]] = {} if model.head is None else {model.head_name: model.head}

    def _move(self, weights: Mapping[str, SparseWeights[Any]], t: float) -> None:
        for name, own in weights.items():
            own.delta.data.copy_(self.gradients[name].sign().mul(-t))

    def loss_with_experts(self, t: float) -> float:
        """With the experts' chosen weights moved by t."""
        self._move(self.experts, t)
        loss = self.loss()
        self._move(self.experts, 0.0)
        return loss

    @torch.no_grad()
    def loss_with_head(self, t: float) -> float:
        """With the head's chosen weights moved by t. What the head is given does not depend on them, and is kept."""
        if not self.to_head:
            self.to_head = [self.memory.keep(self.hidden(i)) for i in range(len(self.batches))]
        self._move(self.head, t)
        loss = self.mean_loss(hidden.to(self.model.backend.device) for hidden in self.to_head)
        self._move(self.head, 0.0)
        return loss


def measure_learning_rates(
    settings: Settings, model: SparseModel, states: BoundaryStates, rows: Rows, order: DataOrder, found: Importance,
    progress: Callable[[int], None], memory: Memory = PRIVATE, unseen: BoundaryStates | None = None,
) -> tuple[dict[str, float], dict[str, Turn]]:  # fmt: skip
    """(LR_PEAK and HEAD_LR as far as they are not set and something trains at them, by the names of the fields; where
    their lines turned). The chosen weights are active, their deltas 0, before and after.

    `progress` is called after each point of a line. `memory`: see `Line`. `unseen`: rows that do not train.
    """
    if settings.lr_peak is not None and (settings.head_lr is not None or model.head is None):
        return {}, {}
    by_width = rate_by_width(model.moe_from(states.start)[0].banks[0].part_columns, settings.frac)
    chosen = fresh_rows(order, rows, found.sequences, unseen)
    if chosen.met:
        say(f"learning rates: the data have but {len(chosen.trained) + len(chosen.unseen) - chosen.met} sequences that "
            f"had no say in choosing the weights; {chosen.met} that had one are measured on too")  # fmt: skip
    parts = parts_of(states, chosen.trained, settings.microbatch)
    parts += [] if unseen is None else parts_of(unseen, chosen.unseen, settings.microbatch)
    line = Line(model, parts, settings.head_chunk_tokens, found.gradients, memory)

    def turn_of(loss: Callable[[float], float]) -> Turn:
        def told(t: float) -> float:
            value = loss(t)
            progress(1)
            return value

        return turning_point(told, told(0.0), by_width)

    rates: dict[str, float] = {}
    turns: dict[str, Turn] = {}
    if settings.lr_peak is None:
        turns["lr_peak"] = turn = turn_of(line.loss_with_experts)
        rates["lr_peak"] = by_width if turn.at is None else min(math.sqrt(by_width * turn.at), MOST_TURNS * turn.at)
    if settings.head_lr is None and model.head is not None:
        turns["head_lr"] = turn = turn_of(line.loss_with_head)
        rates["head_lr"] = HEAD_TURNS * (by_width if turn.at is None else turn.at)
    return {name: min(1.0, float(f"{rate:.2g}")) for name, rate in rates.items()}, turns
