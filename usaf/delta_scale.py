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

from usaf.delta import partly
from usaf.loss import count_targets
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.probe import Probe, parts_of
from usaf.settings import Settings
from usaf.workspace import PRIVATE, Memory

FEWEST_SEQUENCES, LEAST_SEQUENCES, ENOUGH_TARGETS, MOST_SEQUENCES = 8, 16, 8192, 64
"""Sequences that it is measured on: so many at least, else all of the change counts; 16, and more until they have so
many targets, but no more than 64."""
STEPS_A_UNIT = 10
"""Places between base and trained model at which the loss is taken are so many."""


@dataclass(frozen=True)
class Measured:
    """scale: what of the change counts; losses: place -> mean loss in nats, of those that were tried, empty where there
    were too few sequences; sequences: how many there were."""

    scale: float
    losses: dict[float, float]
    sequences: int


class Change:
    """What training has changed: the model can be put anywhere between the base, 0, and the trained one, 1, where it is
    now.

    weights: name -> what trained, which is moved in place. base: name -> what it was, of those that were not 0.
    """

    def __init__(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        self.weights, self.base = weights, base
        self.end = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def move_to(self, scale: float) -> None:
        for name, weight in self.weights.items():
            weight.copy_(partly(self.end[name], scale, self.base.get(name)))


def unseen_rows_wanted(settings: Settings) -> int:
    """How many sequences beyond those that train are to be read."""
    return MOST_SEQUENCES if settings.delta_scale is None else 0


def sequences_needed(targets: int) -> int:
    """On how many it is measured, of so many targets each."""
    return min(max(LEAST_SEQUENCES, -(-ENOUGH_TARGETS // targets)), MOST_SEQUENCES)


def chosen_rows(unseen: BoundaryStates) -> list[int]:
    """Those of them that it is measured on."""
    rows: list[int] = []
    targets = 0
    for row in (row for chunk in unseen.chunks for row in chunk):
        if len(rows) == MOST_SEQUENCES or (len(rows) >= LEAST_SEQUENCES and targets >= ENOUGH_TARGETS):
            break
        rows.append(row)
        targets += count_targets(unseen.rows.batch([row]))
    return rows if len(rows) >= FEWEST_SEQUENCES and targets else []


def lowest_place(loss: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """(where between 0.1 and 1 the loss is lowest, what was tried). A loss that is not finite counts as infinite."""
    tried: dict[int, float] = {}  # tenths -> loss

    def take(i: int) -> float:
        found = loss(i / STEPS_A_UNIT)
        tried[i] = found if math.isfinite(found) else math.inf
        return tried[i]

    i = STEPS_A_UNIT
    for i in (STEPS_A_UNIT, STEPS_A_UNIT - 1, STEPS_A_UNIT - 2):
        take(i)
    while i > 1 and tried[i] < tried[i + 1]:
        i -= 1
        take(i)
    best = min(tried, key=lambda i: (tried[i], -i))
    middle = min(max(best, min(tried) + 1), STEPS_A_UNIT - 1)
    below, at, above = (tried[middle + k] for k in (-1, 0, 1))
    curvature = below - 2 * at + above
    place = middle + (below - above) / (2 * curvature) if math.isfinite(curvature) and curvature > 0 else float(best)
    place = min(max(place, best - 1.0, 1.0), best + 1.0, float(STEPS_A_UNIT))
    return round(place / STEPS_A_UNIT, 2), {i / STEPS_A_UNIT: value for i, value in tried.items()}


def measure_delta_scale(
    settings: Settings, model: SparseModel, change: Change, unseen: BoundaryStates, progress: Callable[[int], None],
    memory: Memory = PRIVATE,
) -> Measured:  # fmt: skip
    """The model is at the end of `change`, before and after. `progress` is called after each place."""
    rows = chosen_rows(unseen)
    if not rows:
        return Measured(1.0, {}, 0)
    probe = Probe(model, parts_of(unseen, rows, settings.microbatch), settings.head_chunk_tokens, memory)

    def loss(scale: float) -> float:
        change.move_to(scale)
        value = probe.loss()
        progress(1)
        return value

    scale, losses = lowest_place(loss)
    change.move_to(1.0)
    return Measured(scale, losses, len(rows))
