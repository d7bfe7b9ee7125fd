"""The loss over a few sequences, taken again and again while the trained layers' weights are moved: how learning rates
are found before the first step (`learning_rate`), and how much of the change counts after the last (`delta_scale`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from usaf.loss import loss_sum
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.workspace import PRIVATE, Memory

Part = tuple[BoundaryStates, list[int]]
"""A micro-batch: some rows of a set."""


def parts_of(states: BoundaryStates, rows: Sequence[int], microbatch: int) -> list[Part]:
    return [(states, list(rows[i : i + microbatch])) for i in range(0, len(rows), microbatch)]


class Probe:
    """parts: the sequences in micro-batches. memory: where what enters the trained layers lies, of all of them."""

    def __init__(
        self, model: SparseModel, parts: Sequence[Part], head_chunk_tokens: int, memory: Memory = PRIVATE
    ) -> None:  # fmt: skip
        self.model, self.head_chunk_tokens, self.memory = model, head_chunk_tokens, memory
        self.start = parts[0][0].start
        self.batches = [states.rows.batch(rows) for states, rows in parts]
        self.entering = [  # not computed anew at each point
            kept
            for states, of_one in groupby(parts, itemgetter(0))
            for kept in states.all_kept([rows for _, rows in of_one], memory)
        ]

    def hidden(self, i: int) -> Tensor:
        """What leaves the final norm, of micro-batch i."""
        kept = self.entering[i]
        entering = None if kept is None else kept.to(self.model.backend.device)
        return self.model.run_layers(self.batches[i], self.start, self.model.num_layers, entering)

    def mean_loss(self, hidden: Iterable[Tensor]) -> float:
        """Over the targets, in nats. hidden: what leaves the final norm, of every micro-batch."""
        chunk = self.head_chunk_tokens
        sums = [loss_sum(self.model, h, batch, chunk) for h, batch in zip(hidden, self.batches, strict=True)]
        return math.fsum(loss for loss, _ in sums) / max(1, sum(targets for _, targets in sums))

    @torch.no_grad()
    def loss(self) -> float:
        """With the weights as they are."""
        return self.mean_loss(self.hidden(i) for i in range(len(self.batches)))
