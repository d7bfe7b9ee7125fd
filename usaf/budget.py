"""How much memory and disk a run needs, phase by phase, from shapes and settings alone; and the settings for a limit.

    peak = max over phases of (what is always there + what the phase holds at its fullest moment)

Every figure is a named item, so that a plan can be read, and a wrong one found. Counted are the tensors that the phases
hold by their code: T tokens of width H, P = T top_k pairs, n active weights,

    importance   inputs of every trainable layer [T, H], and one layer's pairs: X, dOut [T, H], dh [P, out], a [P, in];
                 with those of the top layer, what enters the head [T, H] until it is scored
    rates        what enters the trainable layers, and the head, of the sequences that they are measured on [T, H]
    step         what each trainable layer keeps (`model_shape`) and h [P, out]; one chunk's logits
    scale        what enters the trainable layers, of the sequences that DELTA_SCALE is measured on [T, H]
    capture      pairs of CAPTURE_STEPS x ACCUM micro-batches, of every trainable layer, and what the head needs
    always       delta, rows and columns, two moments, generation: 24 bytes an active weight, and 4 for its gradient

beside what the process holds before the model is there, which is measured (`baseline_bytes`). Mapped files (4-bit
experts, dense weights of a 16-bit checkpoint, a workspace) are the system's page cache and count apart.

`fit` lowers, for a limit, only what leaves the training as it was asked for: chunk sizes, the stretch, buffers in
mapped files, resident copies. What shapes a run (MICROBATCH, IMPORTANCE_SAMPLES and so on) is the user's.

Left out: what allocators waste beyond `SLACK`, and operators' own scratch memory beyond `SCRATCH_BYTES`. Whether a head
can train (it cannot where its logits are scaled or capped) is known only when the model is built; here it is taken to,
where TRAIN_HEAD is 1. As many weights train either way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from usaf.delta_scale import MOST_SEQUENCES as SCALE_SEQUENCES
from usaf.errors import UserError
from usaf.importance import ROWS_AT_ONCE, head_weights_that_count, trained_counts
from usaf.learning_rate import most_sequences, unset_rates
from usaf.model_shape import Experts, LayerShape, ModelShape
from usaf.prefix import STRETCH_BYTES
from usaf.settings import Settings, parse_size
from usaf.sparse_head import BLOCK_ELEMENTS
from usaf.workers import MOST_WORKERS

# -- calibrated against runs (docs/decisions.md)
SLACK = 1.03  # of what tensors take: pages that allocators hold and do not use
SCRATCH_BYTES = 64 << 20  # libraries that load with their first use, their threads' buffers, compiled kernels
WIDENED_BYTES = 64 << 20  # rows of a 16-bit dense weight in fp32 (`linear.WIDENED_ELEMENTS`)
SKEW = 4.0  # the busiest expert's tokens over an even share
STATE_BYTES = 24  # an active weight: delta, row, column, two moments, generation
GRADIENT_BYTES = 4
PAIR_INDEX_BYTES = 28  # a pair: its token and slot, int64, its expert, its routing weight
TARGET_BYTES = 12  # a token that the head's gradients need: its target, int64, and its normaliser
HEAD_GRADIENT_BYTES = 12  # an active weight of the head: a chunk's gradient as it is made, scaled and added
UPDATE_BYTES = 16  # an active weight of one tensor, while Adam works on it
CHOICE_BYTES = 140  # a chosen weight of one tensor, while three selections run
HEAD_CHOICE_BYTES = 180  # the same of the head, by whose larger parts they gather more before they choose
SCORE_BYTES = 32  # a weight of one expert while a core scores it: gradients of both halves, candidates
RESELECT_BYTES = 96  # an active weight of one tensor, while its places are drawn anew

CHEAP_CHUNK_TOKENS, CHEAP_HEAD_TOKENS, CHEAP_STRETCH_BYTES = 1024, 64, 128 << 20
SMALLEST_CHUNK_TOKENS, SMALLEST_HEAD_TOKENS, SMALLEST_STRETCH_BYTES = 64, 16, 4 << 20
ON_DEVICE = {
    "training state", "captured pairs", "one chunk in one layer", "one chunk in one layer, or logits", "one chunk",
    "pairs of one layer", "inputs of the head", "selection", "experts' gradients", "head's gradients",
    "dense gradients", "kept for the backward", "beside the layers", "logits of a chunk", "one layer's backward",
    "update of one tensor", "resident experts",
}  # fmt: skip
"""Items that a GPU holds where there is one."""
SPILLABLE = ("captured", "importance", "stretch")
"""What may lie in mapped files (`workspace`): captured pairs, inputs and pairs of importance, states of a stretch."""


@dataclass(frozen=True)
class Work:
    """What a run does, as far as memory goes. train_row, eval_row: tokens of the longest sequences; train_tokens,
    eval_tokens: of all that are cached. spilled: those of `SPILLABLE` that lie in mapped files."""

    start: int
    frac: float
    microbatch: int
    accum: int
    capture_steps: int  # 0: nothing is reselected
    evaluates_in_window: bool
    importance_rows: int
    train_row: int
    train_tokens: int
    eval_row: int
    eval_tokens: int
    router_trains: bool
    head_trains: bool
    norms_train: bool
    cached: bool
    cache_itemsize: int
    prefix_chunk_tokens: int
    head_chunk_tokens: int
    keep_checkpoints: int
    threads: int
    resident: bool = False
    stretch_bytes: int = STRETCH_BYTES
    spilled: frozenset[str] = frozenset()
    quantises: bool = False  # the 4-bit file is made in this process
    on_device: bool = False  # products run on a GPU, whose memory counts apart
    measured_rates: int = 0  # of LR_PEAK and HEAD_LR (`learning_rate`)
    delta_scale: float | None = 1.0  # None: measured
    projections: str = "down"
    squares: bool = False  # IMPORTANCE_SCORE=square
    different_targets: int | None = None  # of the training text (`Rows`); None before it is read: the whole vocabulary

    @property
    def rates_pass_prefix(self) -> bool:
        """Whether what learning rates are measured on passes the frozen layers for that: where it is not cached, or, of
        few steps, may not be among the rows that train."""
        wanted = (self.importance_rows + most_sequences(self.importance_rows)) * self.train_row
        return not self.cached or self.train_tokens < wanted

    @property
    def step_tokens(self) -> int:
        """Of one micro-batch."""
        return self.microbatch * self.train_row

    def chunk_tokens(self, row: int, tokens: int) -> int:
        """Of the largest chunk of sequences of `row` tokens, `tokens` in all."""
        return min(max(1, self.prefix_chunk_tokens // max(1, row)) * row, max(row, tokens))


@dataclass(frozen=True)
class Phase:
    """One moment of a run at its fullest: named private bytes."""

    name: str
    items: dict[str, int]

    @property
    def private(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class MemoryPlan:
    """always: private bytes in every phase; mapped: page cache wanted for full speed; disk: files that are written;
    device: what a GPU would hold (counted from shapes, never measured); least: see `fit`."""

    always: dict[str, int]
    phases: list[Phase]
    mapped: dict[str, int]
    disk: dict[str, int]
    device: dict[str, int] = field(default_factory=dict)

    def total(self, phase: Phase) -> int:
        return sum(self.always.values()) + phase.private

    @property
    def highest(self) -> Phase:
        return max(self.phases, key=self.total)

    @property
    def peak_bytes(self) -> int:
        return self.total(self.highest)


# ---- what a run does ------------------------------------------------------------------------------------------------


def work_of(
    values: Settings, start: int, train_row: int, train_tokens: int, train_rows: int, eval_row: int, eval_tokens: int,
    cache_itemsize: int, threads: int, **more: object,
) -> Work:  # fmt: skip
    """The `Work` of settings whose data are known (or guessed, before there are any)."""
    reselects = 0 < values.reselect_every <= last_reselection(values) and values.drop_fraction > 0
    capture = min(values.capture_steps, values.reselect_every) if reselects else 0
    known: dict[str, object] = dict(
        start=start, frac=values.frac, microbatch=values.microbatch, accum=values.accum, capture_steps=capture,
        evaluates_in_window=reselects and evaluates_in_window(values, capture),
        importance_rows=min(values.importance_samples, train_rows), train_row=train_row, train_tokens=train_tokens,
        eval_row=eval_row, eval_tokens=eval_tokens, router_trains=values.router_lr > 0, head_trains=values.train_head,
        norms_train=values.train_norms, cached=values.use_frozen_cache, cache_itemsize=cache_itemsize,
        prefix_chunk_tokens=values.prefix_chunk_tokens, head_chunk_tokens=values.head_chunk_tokens,
        keep_checkpoints=values.keep_checkpoints, threads=threads,
        resident=values.use_resident == "1", projections=values.projections,
        squares=values.importance_score == "square",
        measured_rates=len(unset_rates(values)), delta_scale=values.delta_scale,
    )  # fmt: skip
    return Work(**{**known, **more})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trained:
    """How many weights train: of the two fused tensors of each trainable layer that has experts, of the head, and those
    of routers and norms, which train whole."""

    experts: list[tuple[int, int]]
    head: int
    whole: int

    @property
    def active(self) -> int:
        return sum(map(sum, self.experts)) + self.head


def trained_weights(shape: ModelShape, work: Work) -> Trained:
    layers = shape.layers[work.start :]
    moe = [layer.experts for layer in layers if layer.experts is not None]
    vocabulary, hidden = shape.head
    different = vocabulary if work.different_targets is None else work.different_targets
    head = head_weights_that_count(shape.head_weights, hidden, different) if work.head_trains else 0
    experts, of_head = trained_counts(head, [e.bank_weights for e in moe], work.frac, work.projections)
    whole = sum(e.router_weights for e in moe) if work.router_trains else 0
    if work.norms_train:
        whole += sum(layer.norm_weights for layer in layers) + shape.last_norm_weights
    return Trained(experts, of_head, whole)


def last_reselection(values: Settings) -> int:
    """As in `trainer`: no reselection follows a later step."""
    return min(math.floor(values.reselect_until * values.steps + 1e-9), values.steps - 1)


def evaluates_in_window(values: Settings, capture: int) -> bool:
    """Whether an evaluation falls on a step whose captured pairs wait for their reselection."""
    if values.eval_every == 0:
        return False
    due = range(values.reselect_every, last_reselection(values) + 1, values.reselect_every)
    return any(step % values.eval_every == 0 for end in due for step in range(end - capture + 1, end))


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_plan(shape: ModelShape, work: Work, baseline_bytes: int) -> MemoryPlan:
    """Every phase of the run that `work` describes.

    baseline_bytes: private memory of the process with its libraries and data, before the model is built.
    """
    count = _Count(shape, work)
    phases = [
        count.load(), *count.prefix(), count.evaluation("evaluate before", 0), *count.importance(),
        *count.learning_rates(), *count.step(), *count.reselection(), count.checkpoint(),
        *count.scaling(), count.evaluation("evaluate", count.state_bytes()),
    ]  # fmt: skip
    elsewhere = ON_DEVICE if work.on_device else set()
    always = {"process": baseline_bytes + SCRATCH_BYTES, **count.weights()}
    always = {name: size for name, size in always.items() if size and name not in elsewhere}
    phases = [
        Phase(p.name, {n: int(size * SLACK) for n, size in p.items.items() if size and n not in elsewhere})
        for p in phases
    ]
    return MemoryPlan(always, phases, count.mapped(), count.disk(), count.device())


class _Count:
    """The arithmetic of `memory_plan`, an item a method. Bytes everywhere; activations are in fp32."""

    def __init__(self, shape: ModelShape, work: Work) -> None:
        self.shape, self.work = shape, work
        self.trainable = shape.layers[work.start :]
        self.moe = [layer.experts for layer in self.trainable if layer.experts is not None]
        self.banks = [n for experts in self.moe for n in experts.bank_weights]
        self.trained = trained_weights(shape, work)
        self.active, self.head_active = self.trained.active, self.trained.head
        self.active_of = dict(zip(self.moe, self.trained.experts, strict=True))
        self.largest_of_experts = max(map(max, self.trained.experts))
        self.largest_active = max(self.largest_of_experts, self.head_active)
        self.largest_expert = max(e.up[0] * e.up[1] for e in self.moe)
        self.hidden = 4 * shape.width
        self.head_block = min(shape.head[0], max(1, BLOCK_ELEMENTS // shape.hidden))  # rows of the vocabulary
        self.cores = min(MOST_WORKERS, work.threads)

    # -- weights

    def weights(self) -> dict[str, int]:
        """Private: what is not used from a mapped file as it is."""
        every = self.shape.layers
        routers = sum(layer.experts.router_weights for layer in every if layer.experts is not None)
        others = sum(layer.other_weights + (layer.experts.bias_weights if layer.experts else 0) for layer in every)
        dense = sum(layer.linear_weights for layer in every) + self.shape.shared_weights
        found = {"routers and small weights": 4 * (routers + others)}
        found["dense weights"] = int(dense * self.shape.stored_bytes * (1 - self.shape.mapped_share))
        if self.work.resident:
            found["resident experts"] = 2 * sum(self.banks)
        return found

    def mapped(self) -> dict[str, int]:
        experts = [layer.experts.stored_bytes if layer.experts else 0 for layer in self.shape.layers]
        dense = sum(layer.linear_weights for layer in self.shape.layers) + self.shape.shared_weights
        return {
            "4-bit experts of trainable layers": sum(experts[self.work.start :]),
            "4-bit experts of frozen layers, once a stretch": sum(experts[: self.work.start]),
            "dense weights": int(dense * self.shape.stored_bytes * self.shape.mapped_share),
        }

    def load(self) -> Phase:
        copied = self.shape.stored_bytes * self.widest() * (2 if self.shape.mapped_share < 1 else 0)
        items = {"largest dense weight": copied}
        if self.work.quantises:
            items["an expert being quantised"] = self.largest_expert * 12
        return Phase("load", items)

    def widest(self) -> int:
        return max(self.shape.head[0] * self.shape.head[1], *(layer.widest_linear for layer in self.shape.layers))

    def widened(self) -> int:
        """A dense weight's rows in fp32."""
        return min(WIDENED_BYTES, 4 * max(layer.widest_linear for layer in self.shape.layers))

    # -- passes without gradients

    def working(self, layers: Iterable[LayerShape], tokens: int, row: int) -> int:
        """The largest of these layers, run without gradients; its input counts elsewhere."""
        return max(
            (
                max(layer.activations.working.at(tokens, row), self.hidden * tokens + self.one_expert(layer, tokens))
                for layer in layers
            ),
            default=0,
        )

    def one_expert(self, layer: LayerShape, tokens: int) -> int:
        """Experts without gradients: a result a core, the index of all pairs, and what each core works on."""
        experts = layer.experts
        if experts is None:
            return 0
        pairs = int(tokens * experts.pairs_per_token)
        index = pairs * (PAIR_INDEX_BYTES + experts.count)
        a_pair = experts.up[1] + experts.up[0] + 3 * experts.down[1] + experts.down[0]
        return index + (self.cores - 1) * self.hidden * tokens + self.at_work(experts, tokens, a_pair)

    def at_work(self, experts: Experts, tokens: int, a_pair: int) -> int:
        """On all cores: an expert's weights in fp32, and `a_pair` numbers for each of its pairs."""
        weights = max(experts.up[0] * experts.up[1], experts.down[0] * experts.down[1])
        return int(self.cores * 4 * (weights + self.busiest(experts, tokens) * a_pair))

    def busiest(self, experts: Experts, tokens: int) -> float:
        return min(tokens, SKEW * tokens * experts.pairs_per_token / experts.count)

    def prefix(self) -> list[Phase]:
        work = self.work
        frozen = self.shape.layers[: work.start]
        if not frozen or not work.cached:
            return []
        phases = []
        for row, tokens in ((work.train_row, work.train_tokens), (work.eval_row, work.eval_tokens)):
            chunk = work.chunk_tokens(row, tokens)
            held = self.states_of_stretch(chunk, tokens)
            working = self.working(frozen, chunk, row) + self.shape.outside.at(chunk, row) + self.widened()
            rounding = chunk * self.shape.width * work.cache_itemsize
            states = {} if "stretch" in work.spilled else {"states of a stretch": held}
            phases.append(Phase("prefix", {**states, "one chunk in one layer": max(working, rounding)}))
        return phases

    def evaluation(self, name: str, state_bytes: int) -> Phase:
        work, shape = self.work, self.shape
        row, chunk = work.eval_row, work.chunk_tokens(work.eval_row, work.eval_tokens)
        working = self.working(self.trainable, chunk, row) + shape.outside.at(chunk, row) + self.widened()
        items = {
            "training state": state_bytes,
            "captured pairs": self.captured() if state_bytes and work.evaluates_in_window else 0,
            "hidden states": chunk * (self.hidden + shape.width * work.cache_itemsize) if work.start else 0,
            "one chunk in one layer, or logits": max(working, chunk * self.hidden + self.head(False)),
        }
        if not work.cached:
            items["recomputed prefix"] = self.recomputed(row, chunk)
        return Phase(name, items)

    def frozen_chunk(self, row: int, chunk: int) -> int:
        """Beside the states of a chunk, while it passes one frozen layer."""
        return self.working(self.shape.layers[: self.work.start], chunk, row) + self.widened()

    def states_of_stretch(self, chunk: int, tokens: int) -> int:
        """Of so many tokens in all, a chunk at least, as they pass the frozen layers together."""
        return min(max(self.work.stretch_bytes, chunk * self.hidden), tokens * self.hidden)

    def recomputed(self, row: int, chunk: int) -> int:
        """Without a cache: a chunk passes the frozen layers when it is needed, and the last two are kept."""
        return 2 * chunk * self.shape.width * self.work.cache_itemsize + chunk * self.hidden

    # -- the head

    def head(self, gradient: bool) -> int:
        """A chunk's logits, whole for the gradient and else a block of them a core, and a block's weights, where they
        are made; or, once the logits are gone, the gradient of its trained weights."""
        vocabulary, hidden = self.shape.head
        rows, block = self.work.head_chunk_tokens, self.head_block
        made = self.cores * 4 * block * hidden if self.shape.stored_bytes < 4 or self.work.head_trains else 0
        logits = vocabulary if gradient else self.cores * block
        of_chunk = 4 * rows * (logits + (self.cores + 2) * hidden) + made
        return max(of_chunk + 4 * self.head_active, HEAD_GRADIENT_BYTES * self.head_active) if gradient else of_chunk

    def head_kept(self, tokens: int) -> int:
        """What a backward of so many tokens leaves for the head's weight gradients, beside the deltas as they were."""
        return tokens * (4 * self.shape.hidden + TARGET_BYTES) if self.work.head_trains else 0

    def head_scored(self, tokens: int) -> int:
        """On all cores: a block's weights, its dz of one kept backward of so many tokens, and its dense gradients and
        candidates. Short backwards are gathered before they are multiplied."""
        if not self.work.head_trains:
            return 0
        (vocabulary, hidden), block = self.shape.head, self.head_block
        cores = min(self.cores, -(-vocabulary // block))
        numbers = tokens * block if tokens >= ROWS_AT_ONCE else (ROWS_AT_ONCE + tokens) * (2 * block + hidden)
        squared = max(tokens, ROWS_AT_ONCE) * (block + hidden) if self.work.squares else 0
        return cores * ((4 + SCORE_BYTES) * block * hidden + 4 * (numbers + squared))

    # -- passes with gradients

    def kept_by_experts(self, experts: Experts | None, tokens: int) -> int:
        """h alone; where a norm follows the products, they and a as well."""
        if experts is None:
            return 0
        a_pair = 4 * (experts.up[0] + (experts.down[1] + experts.down[0] if experts.normed else 0))
        return int(tokens * experts.pairs_per_token * (a_pair + PAIR_INDEX_BYTES))

    def pairs(self, experts: Experts | None, tokens: int) -> int:
        """What the weight gradients of one layer need: X and dh of the first projection, a and dOut of the second; X
        and dOut by token, the others by pair."""
        if experts is None:
            return 0
        of_up, of_down = (int(n > 0) for n in self.active_of[experts])
        by_token = 4 * (of_up * experts.up[1] + of_down * experts.down[0])
        by_pair = 4 * (of_up * experts.up[0] + of_down * experts.down[1]) + PAIR_INDEX_BYTES
        return int(tokens * (by_token + experts.pairs_per_token * by_pair))

    def kept(self, layer: LayerShape, tokens: int, row: int, first: bool) -> int:
        activations = layer.activations
        # A first layer whose norms train keeps what stands before its experts too.
        own = activations.kept_first if first and not self.work.norms_train else activations.kept
        return own.at(tokens, row) + self.kept_by_experts(layer.experts, tokens)

    def on_the_way_back(self, layer: LayerShape, tokens: int, row: int, captures: bool) -> int:
        """Most that one layer's backward holds beyond what it kept."""
        activations, experts = layer.activations, layer.experts
        own = activations.backward.at(tokens, row) - activations.kept.at(tokens, row)
        if experts is None:
            return max(0, own)
        a_pair = 3 * experts.up[1] + 2 * experts.up[0] + 4 * experts.down[1]
        of_up, of_down = (int(n > 0) for n in self.active_of[experts])
        captured = 4 * (of_up * experts.up[0] + of_down * experts.down[1])
        captured = captured if captures else 4 * experts.up[0] * experts.normed
        return int(
            max(own, (1 + self.cores) * self.hidden * tokens + self.at_work(experts, tokens, a_pair))
            + tokens * experts.pairs_per_token * captured
        )

    def importance(self) -> list[Phase]:
        work, shape = self.work, self.shape
        row, total = work.train_row, work.importance_rows * work.train_row
        chunk = self.importance_chunk()
        segments = shape.segments(work.start)
        an_input = 0 if "importance" in work.spilled else total * self.hidden
        working = self.working(self.trainable, chunk, row) + shape.outside.at(chunk, row) + self.widened()
        forward = {"inputs of lower layers": self.lower_inputs(len(segments)) * an_input,
                   "one chunk in one layer": working}  # fmt: skip
        phases = [Phase("importance, forward", forward if len(segments) > 1 else {})]
        backwards = [
            self.importance_backward(i, *segment, an_input, chunk, total) for i, segment in enumerate(segments)
        ]
        scorings = [self.scoring(i, *segment, an_input, total) for i, segment in enumerate(segments)]
        return [*phases, *(max(found, key=lambda phase: phase.private) for found in (backwards, scorings))]

    def lower_inputs(self, segments: int) -> int:
        """Of the lowest so many segments; the first layer of all has token ids."""
        return segments if self.work.start else max(0, segments - 1)

    def importance_backward(self, i: int, first: int, end: int, an_input: int, chunk: int, total: int) -> Phase:
        """The last chunk in segment i, layers [first, end)."""
        work, row, layers = self.work, self.work.train_row, self.shape.layers[first:end]
        pairs = 0 if "importance" in work.spilled else sum(self.pairs(layer.experts, total - chunk) for layer in layers)
        way_back = max(self.on_the_way_back(layer, chunk, row, True) for layer in layers)
        of_head = 0
        if end == len(self.shape.layers):
            joined = self.head_kept(chunk)  # of a chunk's pieces; both are there for a moment
            way_back = max(way_back, 3 * chunk * self.hidden + joined + max(self.head(True), joined))
            of_head = self.head_inputs(total - chunk)
        kept = sum(self.kept(layer, chunk, row, first == work.start) for layer in layers)
        return Phase("importance, backward", {
            "inputs of lower layers": self.lower_inputs(i) * an_input, "gradients": an_input,
            "pairs of one layer": pairs, "one chunk in one layer": kept + way_back + self.shape.outside.at(chunk, row)
            + self.widened(), "inputs of the head": of_head, "chosen indices": self.chosen(end),
        })  # fmt: skip

    def head_inputs(self, tokens: int) -> int:
        """Kept of so many tokens by importance; in mapped files but for their targets."""
        return TARGET_BYTES * tokens if "importance" in self.work.spilled and self.work.head_trains else (
            self.head_kept(tokens))  # fmt: skip

    def chosen(self, end: int) -> int:
        """Indices found in the layers from `end` on, and with the top one in the head, int64."""
        moe = [layer.experts for layer in self.shape.layers[end:] if layer.experts is not None]
        of_head = self.head_active if end < len(self.shape.layers) else 0
        return 8 * (sum(sum(self.active_of[experts]) for experts in moe) + of_head)

    def scoring(self, i: int, first: int, end: int, an_input: int, total: int) -> Phase:
        """Of a segment's tensors, one after the other; after those of the top one the head's, whose inputs wait."""
        layers, is_top = self.shape.layers[first:end], end == len(self.shape.layers)
        spilled = "importance" in self.work.spilled
        beside = {"inputs of lower layers": self.lower_inputs(i) * an_input, "gradients": an_input,
                  "inputs of the head": self.head_inputs(total) if is_top else 0}  # fmt: skip
        own = Phase("importance, scoring", {
            **beside, "pairs of one layer": 0 if spilled else sum(self.pairs(layer.experts, total) for layer in layers),
            "chosen indices": self.chosen(first), "selection": CHOICE_BYTES * self.largest_of_experts,
            "experts' gradients": max((self.scored(layer.experts, total) for layer in layers if layer.experts),
                                      default=0),
        })  # fmt: skip
        of_head = Phase("importance, scoring", {
            **beside, "chosen indices": self.chosen(first), "selection": HEAD_CHOICE_BYTES * self.head_active,
            "head's gradients": self.head_scored(self.importance_chunk()),
        })  # fmt: skip
        return max((own, of_head), key=lambda phase: phase.private) if is_top and self.head_active else own

    def scored(self, experts: Experts, tokens: int) -> int:
        """On all cores: an expert's dense gradients and candidates, its rows gathered, and these squared."""
        weights = max(experts.up[0] * experts.up[1], experts.down[0] * experts.down[1])
        rows = self.busiest(experts, tokens) * 4 * (1 + self.work.squares) * (experts.up[0] + experts.up[1])
        return int(self.cores * (SCORE_BYTES * weights + rows))

    def importance_chunk(self) -> int:
        """Tokens of a chunk: an even number of them, as equal as can be (`importance.sample_chunks`)."""
        work = self.work
        rows = max(1, work.prefix_chunk_tokens // max(1, work.train_row))
        chunks = min(2 * -(-work.importance_rows // (2 * rows)), work.importance_rows)
        return -(-work.importance_rows // max(1, chunks)) * work.train_row

    # -- learning rates

    def line_inputs(self) -> int:
        """What enters the trainable layers, and the head, of as many sequences as may go along the line."""
        kinds = int(self.work.start > 0) + int(self.work.head_trains)
        return most_sequences(self.work.importance_rows) * self.work.train_row * self.hidden * kinds

    def learning_rates(self) -> list[Phase]:
        """Those of importance are still there."""
        work = self.work
        if not work.measured_rates:
            return []
        held = {
            "training state": self.state_bytes(), "chosen indices": 8 * self.active,
            "inputs of the line": 0 if "importance" in work.spilled else self.line_inputs(),
        }  # fmt: skip
        return self.losses_taken_again(
            "learning rates", held, most_sequences(work.importance_rows), work.rates_pass_prefix
        )

    def losses_taken_again(self, name: str, held: dict[str, int], sequences: int, pass_prefix: bool) -> list[Phase]:
        """Of `probe`: a micro-batch at a time without gradients, behind the frozen layers where that is to come yet."""
        work, row, tokens = self.work, self.work.train_row, self.work.step_tokens
        working = self.working(self.trainable, tokens, row) + self.shape.outside.at(tokens, row) + self.widened()
        phases = [Phase(name, {
            **held, "one chunk in one layer, or logits": max(working, tokens * self.hidden + self.head(False)),
        })]  # fmt: skip
        if pass_prefix and work.start:
            chunk = work.chunk_tokens(row, max(work.train_tokens, sequences * row))
            whole = -(-sequences * row // chunk) * chunk  # of rows that train a chunk may have more than are wanted
            stretch = self.states_of_stretch(chunk, whole)
            phases.append(Phase(f"{name}, prefix", {
                **held, "states of a stretch": 0 if "stretch" in work.spilled else stretch,
                "recomputed prefix": (stretch // self.hidden + chunk) * self.shape.width * work.cache_itemsize,
                "one chunk in one layer": self.frozen_chunk(row, chunk),
            }))  # fmt: skip
        return phases

    # -- steps

    def state_bytes(self) -> int:
        """Deltas and their moments, gradients included; those of routers and norms too, and what these were before, for
        DELTA_SCALE."""
        of_whole = 16 if self.work.delta_scale == 1 else 20
        return self.active * (STATE_BYTES + GRADIENT_BYTES) + of_whole * self.trained.whole

    def step(self) -> list[Phase]:
        work, shape = self.work, self.shape
        row, tokens = work.train_row, work.step_tokens
        kept = sum(self.kept(layer, tokens, row, i == 0) for i, layer in enumerate(self.trainable))
        captures = work.capture_steps > 0
        captured = self.captured(max(0, self.captures() - 1), under_way=False)
        if captures and self.head_active:
            captured += self.head_kept(tokens) + 4 * self.head_active
        common = {
            "training state": self.state_bytes(), "captured pairs": captured, "kept for the backward": kept,
            "beside the layers": shape.outside.at(tokens, row), "hidden states": 2 * tokens * self.hidden,
        }  # fmt: skip
        back = max(self.on_the_way_back(layer, tokens, row, captures) for layer in self.trainable) + self.widened()
        phases = [
            Phase("step, head", {**common, "logits of a chunk": self.head(True) + tokens * self.hidden}),
            Phase("step, backward", {**common, "one layer's backward": back}),
            Phase("step, update", {"training state": self.state_bytes(), "captured pairs": self.captured(),
                                   "update of one tensor": UPDATE_BYTES * self.largest_active}),
        ]  # fmt: skip
        if not work.cached and work.start:
            chunk = work.chunk_tokens(row, work.train_tokens)
            phases.append(Phase("step, prefix", {
                "training state": self.state_bytes(), "captured pairs": captured,
                "recomputed prefix": self.recomputed(row, chunk),
                "one chunk in one layer": self.frozen_chunk(row, chunk),
            }))  # fmt: skip
        return phases

    def captures(self) -> int:
        return self.work.capture_steps * self.work.accum

    def captured(self, micro_batches: int | None = None, under_way: bool = True) -> int:
        """What a whole capture window, or so many of its micro-batches, leave: pairs, and what the head's gradients
        need. In mapped files lies all but the head's deltas and targets, and what the micro-batch that is under way has
        left, before it goes there."""
        count = self.captures() if micro_batches is None else micro_batches
        spilled = "captured" in self.work.spilled
        private = min(count, int(under_way)) if spilled else count
        tokens = self.work.step_tokens
        of_one = sum(self.pairs(experts, tokens) for experts in self.moe) + self.head_kept(tokens)
        of_head = 4 * self.head_active + (TARGET_BYTES * tokens if spilled and self.work.head_trains else 0)
        return of_one * private + of_head * count

    def reselection(self) -> list[Phase]:
        if not self.work.capture_steps:
            return []
        tokens = self.captures() * self.work.step_tokens
        of_head = self.head_scored(min(self.work.step_tokens, self.work.head_chunk_tokens))
        return [Phase("reselection", {
            "training state": self.state_bytes(), "captured pairs": self.captured(),
            "selection": (RESELECT_BYTES + 4 * self.work.capture_steps) * self.largest_active,
            "dense gradients": max(of_head, *(self.scored(e, tokens) for e in self.moe)),
        })]  # fmt: skip

    def checkpoint(self) -> Phase:
        return Phase("checkpoint", {"training state": self.state_bytes(), "flat indices": 12 * self.active})

    def scale_inputs(self) -> int:
        """What enters the trainable layers, of as many sequences as DELTA_SCALE may be measured on."""
        return SCALE_SEQUENCES * self.work.train_row * self.hidden * int(self.work.start > 0)

    def scaling(self) -> list[Phase]:
        """What was trained takes the gradients' place meanwhile."""
        if self.work.delta_scale is not None:
            return []
        held = {
            "training state": self.state_bytes(),
            "inputs of the places": 0 if "importance" in self.work.spilled else self.scale_inputs(),
        }  # fmt: skip
        return self.losses_taken_again("delta scale", held, SCALE_SEQUENCES, pass_prefix=True)

    # -- disk and device

    def disk(self) -> dict[str, int]:
        work = self.work
        whole = self.trained.whole
        tokens = work.train_tokens + work.eval_tokens if work.cached and work.start else 0
        return {
            "4-bit experts": sum(layer.experts.stored_bytes for layer in self.shape.layers if layer.experts),
            "prefix cache": tokens * self.shape.width * work.cache_itemsize,
            "checkpoints": (work.keep_checkpoints + 1) * (self.active * STATE_BYTES + 16 * whole),
            "delta": self.active * 8 + 4 * whole,  # at most: of an index that is stored as an index
            "workspace": self.workspace(),
        }

    def workspace(self) -> int:
        """Mapped files that are gone when the run ends: the fullest moment of those that are spilled."""
        work, total = self.work, self.work.importance_rows * self.work.train_row
        sizes = [0]
        if "stretch" in work.spilled:
            sizes.append(min(work.stretch_bytes, max(work.train_tokens, work.eval_tokens) * self.hidden))
        if "captured" in work.spilled:
            of_one = sum(self.pairs(experts, work.step_tokens) for experts in self.moe)
            sizes.append(self.captures() * (of_one + self.head_kept(work.step_tokens)))
        if "importance" in work.spilled:
            inputs = (len(self.shape.segments(work.start)) + 2) * total * self.hidden
            sizes.append(inputs + max(self.pairs(experts, total) for experts in self.moe) + self.head_kept(total))
            sizes.append(self.line_inputs() if work.measured_rates else 0)
            sizes.append(self.scale_inputs() if work.delta_scale is None else 0)
        return max(sizes)

    def device(self) -> dict[str, int]:
        """On a GPU with 16-bit arithmetic. From the same counts, halved where types are; never tried."""
        work, row, tokens = self.work, self.work.train_row, self.work.step_tokens
        kept = sum(self.kept(layer, tokens, row, i == 0) for i, layer in enumerate(self.trainable))
        way_back = max(self.on_the_way_back(layer, tokens, row, False) for layer in self.trainable)
        frozen = [layer.linear_weights * 2 + (layer.experts.stored_bytes if layer.experts else 0)
                  for layer in self.shape.layers[: work.start]]  # fmt: skip
        return {
            "4-bit experts of trainable layers": sum(e.stored_bytes for e in self.moe),
            "dense weights of trainable layers, embeddings, head": 2 * (
                sum(layer.linear_weights for layer in self.trainable) + self.shape.shared_weights),
            "one frozen layer": max(frozen, default=0),
            "training state": self.state_bytes(), "captured pairs": self.captured() // 2,
            "kept for the backward": kept // 2,
            "one layer's backward": way_back // 2,
            "one expert in 16 bits": 2 * self.largest_expert, "logits of a chunk": self.head(True),
        }  # fmt: skip


# ---- a limit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knobs:
    """What `fit` may turn: the chunk sizes only where the user has not set them, the others always. spill: what can lie
    in mapped files here."""

    prefix_chunk: bool = True
    head_chunk: bool = True
    spill: tuple[str, ...] = ()


def fit(shape: ModelShape, work: Work, baseline_bytes: int, limit_bytes: int, knobs: Knobs) -> Work:
    """The work with what is lowered so that it keeps to the limit, or as low as it goes.

    In the order of `turns`, the first that lowers the peak is turned by one notch, again and again, until the peak is
    below the limit or none helps any more.
    """
    peak = memory_plan(shape, work, baseline_bytes).peak_bytes
    while peak > limit_bytes:
        for turn in turns(knobs):
            turned = turn(work)
            lowered = memory_plan(shape, turned, baseline_bytes).peak_bytes if turned is not None else peak
            if turned is not None and lowered < peak:
                work, peak = turned, lowered
                break
        else:
            break
    return work


def turns(knobs: Knobs) -> list[Callable[[Work], Work | None]]:
    """One notch of each knob; None where it is at its end.

    Chunks and stretch come down a little first, which costs next to nothing; then buffers go to mapped files, at the
    price of writing them; only then chunks become so small that products run slower.
    """
    return [
        *_smaller(knobs, CHEAP_CHUNK_TOKENS, CHEAP_HEAD_TOKENS, CHEAP_STRETCH_BYTES),
        *(partial(_spilled, what=what) for what in knobs.spill),
        *_smaller(knobs, SMALLEST_CHUNK_TOKENS, SMALLEST_HEAD_TOKENS, SMALLEST_STRETCH_BYTES),
    ]


def _smaller(knobs: Knobs, chunk: int, head: int, stretch: int) -> list[Callable[[Work], Work | None]]:
    found: list[Callable[[Work], Work | None]] = []
    if knobs.prefix_chunk:
        found.append(partial(_shorter_chunks, least=chunk))
    if knobs.head_chunk:
        found.append(partial(_halved, name="head_chunk_tokens", least=head))
    return [*found, partial(_halved, name="stretch_bytes", least=stretch)]


def _halved(work: Work, name: str, least: int) -> Work | None:
    value = getattr(work, name)
    return dataclasses.replace(work, **{name: max(least, value // 2)}) if value > least else None


def _shorter_chunks(work: Work, least: int) -> Work | None:
    """Below the longest sequence a chunk holds one sequence anyway."""
    return _halved(work, "prefix_chunk_tokens", max(least, min(work.train_row, work.eval_row)))


def _spilled(work: Work, what: str) -> Work | None:
    return None if what in work.spilled else dataclasses.replace(work, spilled=work.spilled | {what})


def plan_for_limit(
    shape: ModelShape, work: Work, baseline_bytes: int, memory_limit: str, knobs: Knobs
) -> tuple[Work, MemoryPlan]:
    """The work that keeps to MEMORY_LIMIT, and its plan.

    Raises:
        UserError: none does; the line says the least that would.
    """
    limit = parse_size(memory_limit)
    fitted = fit(shape, work, baseline_bytes, limit, knobs)
    plan = memory_plan(shape, fitted, baseline_bytes)
    if plan.peak_bytes <= limit:
        return fitted, plan
    least = fit(shape, work, baseline_bytes, 0, knobs)
    needed = memory_plan(shape, least, baseline_bytes)
    raise UserError(
        f"MEMORY_LIMIT={memory_limit}: the least that would do is {rounded_up(needed.peak_bytes)} (in "
        f"{needed.highest.name}: {largest_items(needed)}); allow that much, or {remedy(least, needed)}"
    )


def rounded_up(size: int) -> str:
    """A size that, given as MEMORY_LIMIT, is no less than `size`."""
    return f"{math.ceil(size / 1e7) / 100:.2f}GB"


def largest_items(plan: MemoryPlan, count: int = 2) -> str:
    items = sorted({**plan.always, **plan.highest.items}.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in items)


def remedy(work: Work, plan: MemoryPlan) -> str:
    """What a user can change for the phase that is highest."""
    phase = plan.highest.name
    if work.resident:
        return "set USE_RESIDENT=0"
    if phase.startswith("importance"):
        return "lower IMPORTANCE_SAMPLES or SEQ_LEN, or raise TRAIN_FROM"
    if "captured pairs" in plan.highest.items and plan.highest.items["captured pairs"] > plan.highest.private / 2:
        return "lower CAPTURE_STEPS or MICROBATCH, or raise TRAIN_FROM"
    if phase.startswith("learning rates"):
        return "set LR_PEAK and HEAD_LR, lower SEQ_LEN, or raise TRAIN_FROM"
    if phase.startswith("delta scale"):
        return "set DELTA_SCALE, lower SEQ_LEN, or raise TRAIN_FROM"
    if phase.startswith(("step", "reselection", "checkpoint")):
        return "lower MICROBATCH or SEQ_LEN, or raise TRAIN_FROM"
    return "lower SEQ_LEN, or raise TRAIN_FROM"
