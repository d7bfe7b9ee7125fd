"""How long the phases of a run take on this machine: from a few seconds of measurement and the run's counts.

What is measured is the code that will run, on weights of the model's own shapes: a few experts with random codes and a
few blocks of a head, forward, backward and scored, a frozen linear map, attention of one sequence, an update of Adam, a
file read. Seconds of an expert, or of a block, are taken at several row counts and interpolated in between, since a
product of 8 rows and one of 512 are different things; decoding and every overhead are part of them. A phase is then

    layers x (experts x seconds(rows each gets) + dense weights x seconds(tokens) + attention + elementwise)
    + the head's blocks x seconds(tokens of a chunk)

times its chunks or steps, or the time that the disk needs for the 4-bit weights where that is longer.

Left out: GPUs, imbalance between experts, what other programs on the machine take, and data preparation.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from usaf import head_loss
from usaf.budget import Work, trained_weights
from usaf.delta_scale import sequences_needed
from usaf.expert_bank import ExpertBank, PairGradients
from usaf.experts import attach_banks, experts_forward, is_experts_module
from usaf.importance import for_each_part, grow_candidates, part_gradient, score_bank
from usaf.kernels.decode import decode_expert
from usaf.kernels.scan import at_least
from usaf.learning_rate import ENOUGH_TARGETS, LEAST_SEQUENCES, most_sequences
from usaf.linear import FrozenLinear
from usaf.model_shape import Experts, LayerShape, ModelShape
from usaf.optimizer import Adam
from usaf.quantization import Encoding, QuantizedTensor, quantize
from usaf.sparse_head import BLOCK_ELEMENTS, HeadGradients, SparseHead

MOST_WEIGHTS = 40_000_000  # of the experts that are measured
MOST_OPERATIONS = 2e10  # of one measured product; more rows are extrapolated
ROWS = (4, 64, 256)
HEAD_BLOCKS, HEAD_ROWS = 2, (16, 256)  # of a head: blocks a thread
LONG_SECONDS = 0.3
ATTENTION_HEADS, ATTENTION_WIDTH = 8, 128
FILE_BYTES = 256 << 20
SCALE_PLACES = 3.5  # losses that it takes to find DELTA_SCALE, about
LINE_POINTS = 5  # losses that it takes to find where one turns, about; that at its beginning among them
FORWARD_PASSES, TRAINING_PASSES = 1, 3  # products of a weight and its tokens: forward; and gradients of both


@dataclass(frozen=True)
class Curve:
    """Seconds at several row counts; linear in between and beyond, and never less for more rows (a measurement may say
    so)."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: float) -> float:
        if len(self.rows) == 1:
            return self.seconds[0] * rows / self.rows[0]
        i = min(max(bisect.bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        rising = list(itertools.accumulate(self.seconds, max))
        (x0, x1), (y0, y1) = self.rows[i - 1 : i + 1], rising[i - 1 : i + 1]
        return max(rising[0] * min(1.0, rows / self.rows[0]), y0 + (y1 - y0) * (rows - x0) / (x1 - x0))


@dataclass(frozen=True)
class ExpertRates:
    """Seconds of one expert by its rows: forward; forward and backward with sampled gradients; its exact gradient
    scored, for importance and for a reselection. weights: that it has."""

    weights: int
    forward: Curve
    training: Curve
    scoring: Curve
    growing: Curve


@dataclass(frozen=True)
class HeadRates:
    """Seconds of one block of the head, of `blocks` in all. By the rows of a chunk: its loss, alone and with all
    gradients; by those of one kept backward: its dense gradient, and that of grown weights. selection: of the best of
    its dense gradient."""

    blocks: float
    selection: float
    forward: Curve
    training: Curve
    dense: Curve
    seeding: Curve


@dataclass(frozen=True)
class Rates:
    """What this machine does. product: rows -> operations a second of a plain fp32 product; experts: by their kind;
    linear_forward, linear_training: seconds a dense weight by rows; attention: operations a second, forward and with
    the backward; bytes and weights are a second's."""

    threads: int
    product: dict[int, float]
    experts: dict[Experts, ExpertRates]
    head: HeadRates
    linear_forward: Curve
    linear_training: Curve
    attention_forward: float
    attention_training: float
    copy_bytes: float
    decode_weights: float
    widen_weights: float
    quantize_weights: float
    adam_weights: float
    read_bytes: float
    write_bytes: float
    seconds: float = 0.0  # that measuring took

    def expert(self, experts: Experts) -> ExpertRates:
        return self.experts[experts]


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(
    model: PreTrainedModel, shape: ModelShape, work: Work, folder: Path, on_disk: Path | None
) -> Rates:  # fmt: skip
    """A few seconds of this machine at work on a model's shapes, as many weights of which train as `work` says.

    model: on the meta device; folder: where the cache will lie, for a file to write and read; on_disk: a large file
    that the run will read, if there is one.
    """
    began = time.perf_counter()
    kinds = {layer.experts for layer in shape.layers if layer.experts is not None}
    modules = [m for m in model.modules() if is_experts_module(m)]
    read, write = disk_rates(folder, on_disk)
    linear = linear_curves(shape)
    forward, training = attention_rates()
    one = max(kinds, key=lambda e: e.weights)
    decode, widen = decoding_rates(one)
    trains = trained_weights(shape, work)
    counts = dict(zip(all_experts(shape.layers[work.start :]), trains.experts, strict=True))
    return Rates(
        threads=torch.get_num_threads(),
        product={rows: product_rate(rows, shape.hidden, one.up[0]) for rows in (16, 64, 256, 512)},
        experts={e: expert_rates(module_of(modules, e), e, counts.get(e, (0, 0))) for e in kinds},
        head=head_rates(shape, trains.head),
        linear_forward=linear[0], linear_training=linear[1],
        attention_forward=forward, attention_training=training,
        copy_bytes=copy_rate(), decode_weights=decode, widen_weights=widen,
        quantize_weights=quantize_rate(), adam_weights=adam_rate(), read_bytes=read, write_bytes=write,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def best(work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of a few; the first warms caches and compiles, and counts where it took long anyway."""
    first = _timed(work)
    return min([first, *(_timed(work) for _ in range(times if first < LONG_SECONDS else 1))])


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def product_rate(rows: int, columns: int, out: int) -> float:
    x, w = torch.randn(rows, columns), torch.randn(out, columns)
    return 2 * rows * columns * out / best(lambda: x @ w.t())


def module_of(modules: Sequence[nn.Module], experts: Experts) -> nn.Module:
    """An experts module of this shape."""
    for module in modules:
        shapes = {tuple(p.shape[1:]) for p in module.parameters() if p.ndim == 3}
        if experts.up in shapes or experts.up[::-1] in shapes:
            return module
    return modules[0]


def random_bank(encoding: Encoding, shape: tuple[int, int, int]) -> QuantizedTensor:
    """Weights about as large as a model's, of random codes."""
    parts: dict[str, Tensor] = {}
    for name, (dtype, size) in encoding.tensors(shape).items():
        if name == "packed":
            parts[name] = torch.randint(0, 256, size, dtype=torch.uint8)
        elif name == "scale":
            parts[name] = (
                torch.full(size, 120, dtype=dtype) if dtype == torch.uint8 else torch.full(size, 4e-3).to(dtype)
            )
        else:
            parts[name] = torch.full(size, -3e-2).to(dtype)
    return encoding.of(parts, shape)


def some_experts(module: nn.Module, experts: Experts, counts: tuple[int, int]) -> tuple[Any, int]:
    """(a copy of an experts module with a few experts of random codes and random active weights, how many).

    counts: active weights of all experts, in the two projections."""
    count = max(1, min(experts.count, MOST_WEIGHTS // (experts.weights // experts.count)))
    copied: Any = copy.deepcopy(module)
    for owner in copied.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta and parameter.ndim != 3:
                size = (count, *parameter.shape[1:]) if parameter.ndim == 2 else parameter.shape  # a bias; a norm
                owner._parameters[name] = nn.Parameter(torch.ones(size), requires_grad=False)
    up, down = (random_bank(e, (count, *s)) for e, s in zip(experts.encodings, (experts.up, experts.down), strict=True))
    banks = attach_banks(copied, up, down)
    for bank, n in zip(banks, counts, strict=True):
        places = random_places(bank.numel, n * count // experts.count)
        bank.set_active(places, torch.zeros(len(places)))
    return copied, count


def random_places(numel: int, count: int) -> Tensor:
    return torch.randint(numel, (count,), generator=torch.Generator().manual_seed(0)).unique()


def expert_rates(module: nn.Module, experts: Experts, counts: tuple[int, int]) -> ExpertRates:
    copied, count = some_experts(module, experts, counts)
    a_row = 2 * count * experts.weights / experts.count
    rows = [r for r in ROWS if r * a_row <= MOST_OPERATIONS] or [ROWS[0]]
    forward, training, scoring, growing = [], [], [], []
    for r in rows:
        hidden, ids, weights = routed(count, experts, r)
        forward.append(best(partial(untrained, copied, hidden, ids, weights)) / count)
        training.append(best(partial(trained, copied, hidden, ids, weights), 2) / count)
        banks, pairs = captured(copied, hidden, ids, weights)
        each = [(bank, of_bank, len(bank.delta)) for bank, of_bank in zip(banks, pairs, strict=True)]
        scoring.append(seconds_of_one_more(scored, each, count))
        growing.append(seconds_of_one_more(grown, each, count))
    at = tuple(rows)
    # Scoring had every row twice, as even and as odd.
    return ExpertRates(
        experts.weights // experts.count, Curve(at, tuple(forward)), Curve(at, tuple(training)),
        Curve(tuple(2 * r for r in rows), tuple(scoring)), Curve(at, tuple(growing)),
    )  # fmt: skip


def seconds_of_one_more(
    work: Callable[[list[tuple[ExpertBank, PairGradients, int]]], None],
    each: list[tuple[ExpertBank, PairGradients, int]], count: int,
) -> float:  # fmt: skip
    """What an expert adds. The first ones cost more, while every weight is a candidate: of a few experts they are a
    large part, of a model's hardly any."""
    if count == 1:
        return best(partial(work, each), 1)
    half = [(first_experts(bank, count // 2), dataclasses.replace(pairs, starts=pairs.starts[: count // 2 + 1]), k)
            for bank, pairs, k in each]  # fmt: skip
    return max(1e-9, best(partial(work, each), 2) - best(partial(work, half), 2)) / (count - count // 2)


def first_experts(bank: ExpertBank, count: int) -> ExpertBank:
    chosen = {name: tensor[:count] for name, tensor in bank.base.tensors().items()}
    return ExpertBank(bank.base.replace(chosen, (count, *bank.base.shape[1:])))


def scored(each: list[tuple[ExpertBank, PairGradients, int]]) -> None:
    for bank, pairs, k in each:
        score_bank(bank, [pairs, pairs], k)


def grown(each: list[tuple[ExpertBank, PairGradients, int]]) -> None:
    for bank, pairs, k in each:
        grow_candidates(bank, [pairs], torch.zeros(0, dtype=torch.int64), max(1, k // 8))


def routed(count: int, experts: Experts, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids and routing weights that give each expert `rows` pairs."""
    k = min(count, max(1, round(experts.pairs_per_token)))
    tokens = -(-rows * count // k)
    ids = (torch.arange(tokens * k) % count).view(tokens, k)
    return torch.randn(tokens, experts.up[1]), ids, torch.full((tokens, k), 1 / k)


@torch.no_grad()
def untrained(copied: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
    experts_forward(copied, hidden, ids, weights)


def trained(copied: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Forward and backward, as in a step."""
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts_forward(copied, hidden, ids, weights)
    out.backward(torch.ones_like(out))


def captured(
    copied: Any, hidden: Tensor, ids: Tensor, weights: Tensor
) -> tuple[list[ExpertBank], list[PairGradients]]:  # fmt: skip
    banks = [bank for bank in (copied.up_bank, copied.down_bank) if len(bank.delta)]
    for bank in banks:
        bank.captured = []
    trained(copied, hidden, ids, weights)
    pairs = [bank.captured[0] for bank in banks]
    for bank in banks:
        bank.captured = None
    return banks, pairs


def head_rates(shape: ModelShape, active: int) -> HeadRates:
    """Of a few blocks of a head; active: trained weights of all of it."""
    vocabulary, hidden = shape.head
    rows_of_one = min(vocabulary, max(1, BLOCK_ELEMENTS // hidden))
    count = max(1, min(HEAD_BLOCKS * torch.get_num_threads(), vocabulary // rows_of_one))
    dtype = torch.float32 if shape.stored_bytes == 4 else torch.bfloat16
    head = SparseHead(FrozenLinear((torch.randn(count * rows_of_one, hidden) / 50).to(dtype), None))
    places = random_places(head.numel, active * head.numel // shape.head_weights)
    head.set_active(places, torch.full((len(places),), 1e-3))
    forward, training, dense, seeding = [], [], [], []
    rows = [r for r in HEAD_ROWS if 4 * r * head.numel <= MOST_OPERATIONS] or [HEAD_ROWS[0]]
    for r in rows:
        x, targets = torch.randn(r, hidden), torch.zeros(r, dtype=torch.int64)
        forward.append(best(partial(head_loss.loss_sum, head, x, targets)) / count)
        training.append(best(partial(head_loss.loss_and_gradients, head, x, targets), 2) / count)
        head.captured = []
        head.receive(x, targets, head_loss.loss_and_gradients(head, x, targets), 1 / r)
        (kept,) = head.take_captured()
        dense.append(best(partial(dense_gradients, kept), 2) / count)
        seeding.append(best(partial(seeded, kept), 2) / count)
    # Once a few blocks have passed, hardly any weight of the others is a candidate.
    gradient = torch.randn(rows_of_one * hidden)
    selection = best(lambda: at_least(gradient, 2.5)) / min(count, torch.get_num_threads())
    curves = (Curve(tuple(rows), tuple(seconds)) for seconds in (forward, training, dense, seeding))
    return HeadRates(vocabulary / rows_of_one, selection, *curves)


def dense_gradients(kept: HeadGradients) -> None:
    """Of all rows: how many need not be formed, only the data will tell."""

    def work(block: int, _: tuple[float, ...]) -> None:
        part_gradient(kept.head, [kept], block)

    for_each_part(kept.head, [kept], work, ())


def seeded(kept: HeadGradients) -> None:
    """The gradient of an eighth of the trained weights."""
    kept.head.delta_gradient(kept, kept.dtype, torch.arange(len(kept.head.delta)) % 8 == 0)


def linear_curves(shape: ModelShape) -> tuple[Curve, Curve]:
    """Seconds a weight of a frozen linear map, forward, and with the gradient of its input."""
    size = min(2048, max(64, shape.hidden))
    dtype = torch.float32 if shape.stored_bytes == 4 else torch.bfloat16
    linear = FrozenLinear((torch.randn(2 * size, size) / 50).to(dtype), None)
    forward, training = [], []
    rows = (16, 128, 1024)
    for r in rows:
        x = torch.randn(r, size, requires_grad=True)
        with torch.no_grad():
            forward.append(best(partial(linear, x)) / (2 * size * size))
        training.append(best(partial(backward_of, linear, x)) / (2 * size * size))
    return Curve(rows, tuple(forward)), Curve(rows, tuple(training))


def backward_of(module: nn.Module, x: Tensor) -> None:
    module(x).sum().backward()


def attention_rates(length: int = 512) -> tuple[float, float]:
    """Operations a second, all pairs of a row counted; with a mask, as packed rows have."""
    shape = (1, ATTENTION_HEADS, length, ATTENTION_WIDTH)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    operations = 4 * ATTENTION_HEADS * length * length * ATTENTION_WIDTH
    with torch.no_grad():
        forward = best(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    training = best(lambda: F.scaled_dot_product_attention(q, k, v, mask).sum().backward())
    return operations / forward, operations / training


def copy_rate() -> float:
    source = torch.randn(1 << 23)
    return 2 * source.nbytes / best(lambda: source * 2)


def decoding_rates(experts: Experts) -> tuple[float, float]:
    """Weights a second: 4 bits to fp32 on one core, by the kernel that runs, and 16 bits to fp32."""
    coded = random_bank(experts.encodings[0], (1, *experts.up))
    out, copied = torch.empty(experts.up), torch.zeros(experts.up, dtype=torch.float16)
    return out.numel() / best(lambda: decode_expert(coded, 0, out)), out.numel() / best(lambda: out.copy_(copied))


def quantize_rate() -> float:
    weights = torch.randn(1, 256, 2048) / 50
    return weights.numel() / best(lambda: quantize(weights), 1)


def adam_rate() -> float:
    parameter, gradient = torch.zeros(1 << 20), torch.ones(1 << 20)
    adam = Adam(parameter)
    return parameter.numel() / best(lambda: adam.step(parameter, gradient, 1e-4))


def disk_rates(folder: Path, on_disk: Path | None) -> tuple[float, float]:
    """Bytes a second (read, written). What is read is first dropped from the system's cache, where that can be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".measure.{os.getpid()}.partial"
    block = os.urandom(1 << 22)
    try:
        began = time.perf_counter()
        with open(path, "xb") as file:
            for _ in range(FILE_BYTES >> 22):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        write = FILE_BYTES / (time.perf_counter() - began)
        read = read_rate(on_disk or path)
    finally:
        path.unlink(missing_ok=True)
    return read, write


def read_rate(path: Path) -> float:
    size = min(FILE_BYTES, path.stat().st_size)
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, path.stat().st_size - size) // 2)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, done, buffer = time.perf_counter(), 0, bytearray(1 << 22)
        while done < size and (got := file.readinto(buffer)):
            done += got
    return max(1, done) / max(1e-9, time.perf_counter() - began)


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseTime:
    """seconds in all; each: of one (a step, an evaluation); operations: of products and attention, in all; disk: of the
    seconds that reading takes, which pass beside the products."""

    name: str
    seconds: float
    times: int = 1
    operations: float = 0.0
    disk_seconds: float = 0.0

    @property
    def each(self) -> float:
        return self.seconds / max(1, self.times)


@dataclass
class _Pass:
    """Tokens through layers: adds up seconds and operations."""

    shape: ModelShape
    rates: Rates
    row: int
    seconds: float = 0.0
    operations: float = 0.0
    layers: Sequence[LayerShape] = field(default_factory=list)

    def layer(self, layer: LayerShape, tokens: int, training: bool) -> None:
        """One chunk of tokens in one layer."""
        rates, experts = self.rates, layer.experts
        passes = TRAINING_PASSES - 1 if training else FORWARD_PASSES
        linear = rates.linear_training if training else rates.linear_forward
        self.seconds += layer.linear_weights * linear.at(tokens)
        self.operations += 2 * passes * tokens * layer.linear_weights
        if experts is not None:
            curves = rates.expert(experts)
            rows = tokens * experts.pairs_per_token / experts.count
            self.seconds += experts.count * (curves.training if training else curves.forward).at(rows)
            self.operations += 2 * passes * tokens * experts.pairs_per_token * experts.weights / experts.count
        attention = layer.activations.attention.at(tokens, self.row)
        self.seconds += attention / (rates.attention_training if training else rates.attention_forward)
        self.operations += attention * (1 if not training else 3.5)
        touched = layer.activations.backward if training else layer.activations.working
        self.seconds += (4 if training else 3) * touched.at(tokens, 0) / rates.copy_bytes

    def prefix(self, work: Work, tokens: int, all_tokens: int) -> None:
        """Without a cache: tokens pass the frozen layers whenever they are needed, a chunk of their set at a time."""
        if work.cached:
            return
        chunk = work.chunk_tokens(self.row, all_tokens)
        one = _Pass(self.shape, self.rates, self.row)
        for layer in self.shape.layers[: work.start]:
            one.layer(layer, chunk, training=False)
        self.seconds += one.seconds * tokens / chunk
        self.operations += one.operations * tokens / chunk

    def head(self, tokens: int, chunk: int, gradient: bool) -> None:
        vocabulary, hidden = self.shape.head
        chunks = -(-tokens // max(1, chunk))
        curve = self.rates.head.training if gradient else self.rates.head.forward
        self.seconds += chunks * self.rates.head.blocks * curve.at(tokens / chunks)
        self.operations += 2 * tokens * vocabulary * hidden * (2 if gradient else 1)


def time_plan(
    shape: ModelShape, rates: Rates, work: Work, steps: int, reselections: int, evaluations: int, saves: int
) -> list[PhaseTime]:
    """Seconds of each phase, in the order of a run."""
    return [
        *quantise_time(shape, rates, work), *prefix_time(shape, rates, work), importance_time(shape, rates, work),
        *learning_rates_time(shape, rates, work), step_time(shape, rates, work, steps),
        *reselect_time(shape, rates, work, reselections), *delta_scale_time(shape, rates, work),
        evaluate_time(shape, rates, work, evaluations), save_time(shape, rates, work, saves),
    ]  # fmt: skip


def all_experts(layers: Sequence[LayerShape]) -> list[Experts]:
    return [layer.experts for layer in layers if layer.experts is not None]


def quantise_time(shape: ModelShape, rates: Rates, work: Work) -> list[PhaseTime]:
    if not work.quantises:
        return []
    weights = sum(e.weights for e in all_experts(shape.layers))
    disk = 2 * weights / rates.read_bytes + 0.5 * weights / rates.write_bytes
    return [PhaseTime("quantise", weights / rates.quantize_weights + disk, disk_seconds=disk)]


def prefix_time(shape: ModelShape, rates: Rates, work: Work) -> list[PhaseTime]:
    frozen = shape.layers[: work.start]
    if not frozen or not work.cached:
        return []
    seconds = operations = disk = 0.0
    stored = sum(e.stored_bytes for e in all_experts(frozen))
    for row, tokens in ((work.train_row, work.train_tokens), (work.eval_row, work.eval_tokens)):
        chunk = work.chunk_tokens(row, tokens)
        one = _Pass(shape, rates, row)
        for layer in frozen:
            one.layer(layer, chunk, training=False)
        seconds += one.seconds * tokens / chunk
        operations += one.operations * tokens / chunk
        disk += stored * -(-tokens * 4 * shape.width // work.stretch_bytes) / rates.read_bytes
    disk += (work.train_tokens + work.eval_tokens) * shape.width * work.cache_itemsize / rates.write_bytes
    return [PhaseTime("prefix", max(seconds, disk), operations=operations, disk_seconds=disk)]


def importance_time(shape: ModelShape, rates: Rates, work: Work) -> PhaseTime:
    tokens = work.importance_rows * work.train_row
    chunk = min(tokens, work.chunk_tokens(work.train_row, tokens))
    one = _Pass(shape, rates, work.train_row)
    one.prefix(work, chunk, work.train_tokens)
    for layer in shape.layers[work.start :]:
        one.layer(layer, chunk, training=False)
        one.layer(layer, chunk, training=True)
    one.head(chunk, work.head_chunk_tokens, gradient=True)
    seconds, operations = one.seconds * tokens / chunk, one.operations * tokens / chunk
    trains = trained_weights(shape, work)
    for experts, counts in zip(all_experts(shape.layers[work.start :]), trains.experts, strict=True):
        rows = tokens * experts.pairs_per_token / experts.count
        seconds += experts.count * rates.expert(experts).scoring.at(rows)
        operations += 2 * rows * scored_weights(experts, counts)
    if trains.head:
        seconds += rates.head.blocks * (tokens / chunk * rates.head.dense.at(chunk) + 3 * rates.head.selection)
        operations += 2 * 2 * tokens * shape.head_weights  # logits again, and their product with the inputs
    return PhaseTime("importance", seconds, operations=operations)


def learning_rates_time(shape: ModelShape, rates: Rates, work: Work) -> list[PhaseTime]:
    """Forward passes alone; of the head's line one through the layers, and of both one through those that are
    frozen, where these sequences have not passed them before."""
    if not work.measured_rates:
        return []
    rows = min(max(LEAST_SEQUENCES, -(-ENOUGH_TARGETS // work.train_row)), most_sequences(work.importance_rows))
    entering, one = passes_taken_again(shape, rates, work, work.rates_pass_prefix)
    of_head = _Pass(shape, rates, work.train_row)
    of_head.head(work.step_tokens, work.head_chunk_tokens, gradient=False)
    passes = LINE_POINTS + (work.measured_rates - 1), LINE_POINTS * work.measured_rates
    parts = rows / work.microbatch
    seconds = parts * (entering.seconds + passes[0] * one.seconds + passes[1] * of_head.seconds)
    operations = parts * (entering.operations + passes[0] * one.operations + passes[1] * of_head.operations)
    return [PhaseTime("learning rates", seconds, operations=operations)]


def passes_taken_again(shape: ModelShape, rates: Rates, work: Work, pass_prefix: bool) -> tuple[_Pass, _Pass]:
    """A micro-batch's pass through the frozen layers, where that is to come yet, and one through the trainable ones."""
    entering, one = _Pass(shape, rates, work.train_row), _Pass(shape, rates, work.train_row)
    entering.prefix(dataclasses.replace(work, cached=not pass_prefix), work.step_tokens, work.train_tokens)
    for layer in shape.layers[work.start :]:
        one.layer(layer, work.step_tokens, training=False)
    return entering, one


def delta_scale_time(shape: ModelShape, rates: Rates, work: Work) -> list[PhaseTime]:
    """Forward passes alone, behind one through the frozen layers, which these sequences have not passed before."""
    if work.delta_scale is not None:
        return []
    entering, one = passes_taken_again(shape, rates, work, pass_prefix=True)
    one.head(work.step_tokens, work.head_chunk_tokens, gradient=False)
    parts = sequences_needed(work.train_row) / work.microbatch
    seconds = parts * (entering.seconds + SCALE_PLACES * one.seconds)
    operations = parts * (entering.operations + SCALE_PLACES * one.operations)
    return [PhaseTime("delta scale", seconds, operations=operations)]


def scored_weights(experts: Experts, counts: tuple[int, int]) -> int:
    """Of a layer: those whose dense gradients are formed."""
    return sum(n for n, active in zip(experts.bank_weights, counts, strict=True) if active)


def step_time(shape: ModelShape, rates: Rates, work: Work, steps: int) -> PhaseTime:
    one = _Pass(shape, rates, work.train_row)
    one.prefix(work, work.step_tokens, work.train_tokens)
    for layer in shape.layers[work.start :]:
        one.layer(layer, work.step_tokens, training=True)
    one.head(work.step_tokens, work.head_chunk_tokens, gradient=True)
    trains = trained_weights(shape, work)
    seconds = one.seconds * work.accum + (trains.active + trains.whole) / rates.adam_weights
    return PhaseTime("steps", seconds * steps, steps, one.operations * work.accum * steps)


def reselect_time(shape: ModelShape, rates: Rates, work: Work, times: int) -> list[PhaseTime]:
    if not times:
        return []
    tokens, seconds, operations = work.capture_steps * work.accum * work.step_tokens, 0.0, 0.0
    trains = trained_weights(shape, work)
    for experts, counts in zip(all_experts(shape.layers[work.start :]), trains.experts, strict=True):
        rows = tokens * experts.pairs_per_token / experts.count
        seconds += experts.count * rates.expert(experts).growing.at(rows)
        operations += 2 * rows * scored_weights(experts, counts)
    if trains.head:
        chunk = min(work.head_chunk_tokens, work.step_tokens)
        entries = work.capture_steps * work.accum * -(-work.step_tokens // chunk)
        head = rates.head
        seconds += head.blocks * (entries * (head.dense.at(chunk) + head.seeding.at(chunk)) + head.selection)
        operations += 3 * 2 * tokens * shape.head_weights  # dz, dW, and dz again for the moments of grown weights
    return [PhaseTime("reselections", seconds * times, times, operations * times)]


def evaluate_time(shape: ModelShape, rates: Rates, work: Work, times: int) -> PhaseTime:
    chunk = work.chunk_tokens(work.eval_row, work.eval_tokens)
    one = _Pass(shape, rates, work.eval_row)
    one.prefix(work, chunk, work.eval_tokens)
    for layer in shape.layers[work.start :]:
        one.layer(layer, chunk, training=False)
    one.head(chunk, work.head_chunk_tokens, gradient=False)
    share = work.eval_tokens / chunk
    return PhaseTime("evaluations", one.seconds * share * times, times, one.operations * share * times)


def save_time(shape: ModelShape, rates: Rates, work: Work, times: int) -> PhaseTime:
    trains = trained_weights(shape, work)
    size = 28 * trains.active + 16 * trains.whole
    return PhaseTime("checkpoints", times * size / rates.write_bytes, times)
