"""How much of the change counts, where nobody has set it: the place between the base, 0, and the trained model, 1,
where the loss is lowest on sequences that nothing was trained on.

Rates that are right for most of a run carry the weights beyond what new text bears out; less of the whole change then
loses nothing in domain and forgets less (WiSE-FT, Wortsman et al. 2022). How much less depends on how many weights
train and on how small a change the data ask for (docs/decisions.md has the lines of several models), so it is measured:
after the last step the loss is taken at 1, 0.9, 0.8, and on by tenths while it falls, and a parabola through the lowest
and its neighbours gives the place, never beyond 1. Checkpoints keep all of the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from usaf.data import Rows
from usaf.delta import partly
from usaf.loss import count_targets
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.probe import Probe, parts_of
from usaf.settings import Settings
from usaf.workspace import PRIVATE, Memory

LEAST_SEQUENCES, ENOUGH_TARGETS, MOST_SEQUENCES = 16, 8192, 64
"""Sequences that it is measured on: so many at least where there are enough, and more until they have so many targets,
but no more than 64."""
TENTHS = 10
"""The loss is taken at so many places between base and trained model at most."""


@dataclass(frozen=True)
class Measured:
    """scale: what of the change counts; losses: place -> mean loss in nats, of those that were tried, empty where there
    were too few sequences; sequences: how many there were; evaluated: as in `Sequences`."""

    scale: float
    losses: dict[float, float]
    sequences: int
    evaluated: bool = False


@dataclass(frozen=True)
class Sequences:
    """Those that it is measured on, all rows of `states`. evaluated: whether some are of samples that are evaluated,
    since too little else was left."""

    states: BoundaryStates
    evaluated: bool


class Change:
    """What training has changed: the model can be put anywhere between the base, 0, and the trained one, 1, where it is
    now.

    weights: name -> what trained, which is moved in place. base: name -> what it was, None for zeros.
    """

    def __init__(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor | None]) -> None:
        self.weights, self.base = weights, base
        self.end = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        for name, weight in self.weights.items():
            weight.copy_(partly(self.end[name], scale, self.base[name]))


def sequences_needed(targets: float) -> int:
    """On how many it is measured, of so many targets each."""
    return min(max(LEAST_SEQUENCES, math.ceil(ENOUGH_TARGETS / targets)), MOST_SEQUENCES)


def chosen_rows(rows: Rows) -> list[int]:
    """Those that it is measured on, spread over the given ones, which are enough."""
    there = len(rows)
    mean = count_targets(rows.batch(range(there))) / there  # above 0: rows without any are dropped
    count = min(there, sequences_needed(mean))
    return [i * there // count for i in range(count)]


def lowest_place(loss: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """(where between 0.1 and 1 the loss is lowest, what was tried). A loss that is not finite counts as infinite."""
    tried: dict[int, float] = {}  # tenths -> loss

    def take(i: int) -> float:
        found = loss(i / TENTHS)
        tried[i] = found if math.isfinite(found) else math.inf
        return tried[i]

    i = TENTHS
    for i in (TENTHS, TENTHS - 1, TENTHS - 2):
        take(i)
    while i > 1 and tried[i] < tried[i + 1]:
        i -= 1
        take(i)
    best = min(tried, key=lambda i: (tried[i], -i))
    middle = min(max(best, min(tried) + 1), TENTHS - 1)
    below, at, above = (tried[middle + k] for k in (-1, 0, 1))
    curvature = below - 2 * at + above
    place = middle + (below - above) / (2 * curvature) if math.isfinite(curvature) and curvature > 0 else float(best)
    place = min(max(place, best - 1.0, 1.0), best + 1.0, float(TENTHS))
    return round(place / TENTHS, 2), {i / TENTHS: value for i, value in tried.items()}


def measure_delta_scale(
    settings: Settings, model: SparseModel, change: Change, on: Sequences, progress: Callable[[int], None],
    memory: Memory = PRIVATE,
) -> Measured:  # fmt: skip
    """`progress` is called after each place; the model is left at the last of them."""
    rows = [row for chunk in on.states.chunks for row in chunk]
    probe = Probe(model, parts_of(on.states, rows, settings.microbatch), settings.head_chunk_tokens, memory)

    def loss(scale: float) -> float:
        change.move_to(scale)
        value = probe.loss()
        progress(1)
        return value

    return Measured(*lowest_place(loss), len(rows), on.evaluated)
