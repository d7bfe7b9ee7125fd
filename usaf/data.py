"""From sample files to token rows, and the order in which training takes them.

A row is one training sequence: several documents packed one behind the other (text, messages, prompts) or one sample
of token ids as it is. Neither attention nor loss crosses documents:

    positions restart at 0 at every document    transformers isolates documents by that, when no attention mask is given
    labels[first token of a document] = -100    it would be predicted from the document before it

and padding, on the right, is a document of its own (id 0, label -100, positions 0, 1, 2, ...). Labels are aligned;
`batch_loss_targets` makes the one shift. Text is cut at the end of a row and goes on in the next as a new document;
conversations and prompts are never split: one that does not fit begins a new row, one longer than a row loses its end.

Everything random follows from the seed, and the order of training is a pure function of (seed, rows, chunk size, micro-
batch), so a run resumes at any step without stored state. Left out: best-fit packing (it would reorder documents for a
few per cent of padding) and deduplication.

Source: position restarts as document borders are transformers' `find_packed_sequence_indices` (masking_utils).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from usaf.errors import UserError
from usaf.samples import (
    NO_TARGET,
    Document,
    LabelConvention,
    SampleFile,
    aligned_document,
    check_tokens,
    detect_label_convention,
    encode_sample,
    place,
    read_samples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Second entries of the seeds, so that no two uses of SEED share a random stream.
SPLIT_STREAM, CHUNK_STREAM, EPOCH_STREAM = 1, 2, 3

LABELS_AT_ONCE = 1 << 20

ROWS_OF_A_DOCUMENT = 8
"""One in so many rows of further text is kept."""

FEWEST = 8
"""Further rows of so many samples are `enough`: fewer would speak for themselves alone. None gives more than one in so
many of the rows that are packed."""


@dataclass(frozen=True)
class Batch:
    """int64 [B, S] each: input_ids, aligned labels, position_ids; lengths: tokens of each row without its padding."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class Rows:
    """Many sequences in flat arrays: 12 bytes a token.

    input_ids, labels (aligned, -100 none), positions: int32 [tokens]; offsets: int64 [rows + 1], where rows begin and
    end. truncated: documents that lost their end to the row's length; dropped: documents and rows without any target.
    samples: how many of a file these rows were cut from; ends_with: int64 [rows], the sample that a row ends with, as
    `pack` leaves them the document; where that is known.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    dropped: int = 0
    samples: int = 0
    ends_with: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return int(self.offsets[row + 1] - self.offsets[row])

    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.offsets).max())

    def target_tokens(self) -> int:
        """Labels that count in the loss: nothing predicts the first position of a row."""
        return int(np.count_nonzero(self.labels != NO_TARGET)) - int(
            np.count_nonzero(self.labels[self.offsets[:-1]] != NO_TARGET)
        )

    def different_targets(self) -> int:
        """How many tokens of the vocabulary occur among the labels that count in the loss."""
        counted = self.labels != NO_TARGET
        counted[self.offsets[:-1]] = False
        seen = np.zeros(int(self.labels.max(initial=0)) + 1, np.bool_)
        for begin in range(0, len(counted), LABELS_AT_ONCE):  # as indices they are widened to 64 bits
            span = slice(begin, begin + LABELS_AT_ONCE)
            seen[self.labels[span][counted[span]]] = True
        return int(np.count_nonzero(seen))

    def fingerprint(self) -> str:
        """SHA-256 over all four arrays, the same on every machine."""
        digest = hashlib.sha256()
        for values in (self.offsets, self.input_ids, self.labels, self.positions):
            little_endian = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
            digest.update(f"{little_endian.dtype.str}{little_endian.shape}".encode())
            digest.update(little_endian.data)
        return digest.hexdigest()

    def picked(self, rows: Sequence[int]) -> Rows:
        """The given rows alone, in this order."""
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        of_all = (self.input_ids, self.labels, self.positions)
        ids, labels, positions = (np.concatenate([values[:0], *(values[span] for span in spans)]) for values in of_all)
        lengths = np.array([0, *map(self.length, rows)], np.int64)
        counts = (self.truncated, self.dropped, self.samples)
        return Rows(ids, labels, positions, np.cumsum(lengths), *counts, self.ends_with[np.array(rows, np.int64)])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows, padded on the right to the longest of them."""
        lengths = [self.length(row) for row in rows]
        shape = len(lengths), max(lengths)
        input_ids = np.zeros(shape, np.int64)
        labels = np.full(shape, NO_TARGET, np.int64)
        positions = np.zeros(shape, np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            span = slice(self.offsets[row], self.offsets[row + 1])
            input_ids[i, :length] = self.input_ids[span]
            labels[i, :length] = self.labels[span]
            positions[i, :length] = self.positions[span]
            positions[i, length:] = np.arange(shape[1] - length)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions), lengths)


def batch_loss_targets(labels: Tensor) -> Tensor:
    """What each position predicts: aligned labels [B, S] moved left by one, -100 at the last. The only shift."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], NO_TARGET)], dim=1)


def pack(
    documents: Iterable[Document],
    seq_len: int | None,
    rows_needed: int | None,
    split_long: bool,
    one_document_per_row: bool = False,
) -> Rows:
    """Rows of at most seq_len tokens (None: as long as their documents) from documents in the order given.

    split_long: a document runs on into the next row; otherwise it begins a new row where it does not fit, and loses
    what exceeds seq_len. Takes no more documents than `rows_needed` full rows want; a last partial row is kept. A
    document that cannot teach anything (no target behind its first token) is dropped and counted.
    """
    assert rows_needed is None or rows_needed >= 1
    builder = _RowBuilder(seq_len)
    numbered = enumerate(documents)
    while not builder.has(rows_needed) and (document := next(numbered, None)) is not None:
        number, (ids, labels) = document
        assert len(ids) == len(labels)
        if seq_len is not None and not split_long and len(ids) > seq_len:
            ids, labels = ids[:seq_len], labels[:seq_len]
            builder.truncated += 1
        if _targets(labels) == 0:
            builder.dropped += 1
            continue
        if not split_long and len(ids) > builder.room:
            builder.close_row()
        builder.document = number
        begin = 0
        while begin < len(ids) and not builder.has(rows_needed):
            end = min(len(ids), begin + int(min(builder.room, len(ids))))
            builder.add(ids[begin:end], labels[begin:end])
            begin = end
        if one_document_per_row:
            builder.close_row()
    if not builder.has(rows_needed):
        builder.close_row()
    return builder.rows()


def _targets(labels: Sequence[int]) -> int:
    """Labels of one document that count: nothing predicts its first token."""
    return len(labels) - 1 - labels[1:].count(NO_TARGET) if len(labels) else 0


class _RowBuilder:
    """Rows under construction, in growing arrays of 4 bytes an entry."""

    def __init__(self, seq_len: int | None):
        self.seq_len = float("inf") if seq_len is None else seq_len
        self.input_ids, self.labels, self.positions = array("i"), array("i"), array("i")
        self.offsets, self.ends_with = array("q", [0]), array("q")
        self.document = 0  # whose tokens are added
        self.row_targets = 0
        self.truncated = self.dropped = 0

    @property
    def room(self) -> float:
        """Tokens that still fit in the open row."""
        return self.seq_len - (len(self.input_ids) - self.offsets[-1])

    def has(self, rows: int | None) -> bool:
        return rows is not None and len(self.offsets) > rows

    def add(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """Puts a piece that fits into the open row, and closes the row when it is full."""
        assert 0 < len(ids) <= self.room
        self.input_ids.extend(ids)
        self.labels.append(NO_TARGET)
        self.labels.extend(labels[1:])
        self.positions.extend(range(len(ids)))
        self.row_targets += _targets(labels)
        if not self.room:
            self.close_row()

    def close_row(self) -> None:
        begin = self.offsets[-1]
        if len(self.input_ids) == begin:
            return
        if self.row_targets:
            self.offsets.append(len(self.input_ids))
            self.ends_with.append(self.document)
        else:
            self.dropped += 1
            for values in (self.input_ids, self.labels, self.positions):
                del values[begin:]
        self.row_targets = 0

    def rows(self) -> Rows:
        """The closed rows. The arrays are shared, not copied: nothing may be added any more."""
        assert len(self.input_ids) == self.offsets[-1], "the last row is still open"
        ids, labels, positions = (
            np.frombuffer(values, np.int32) if values else np.zeros(0, np.int32)
            for values in (self.input_ids, self.labels, self.positions)
        )
        offsets, ends_with = (np.array(values, np.int64) for values in (self.offsets, self.ends_with))
        return Rows(ids, labels, positions, offsets, self.truncated, self.dropped, ends_with=ends_with)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on. heldout: `heldout_<file stem>` or an extra evaluation's name -> rows; notes:
    lines to print, on what was found in the files and what became of it; unseen: rows, as far as there are any, that
    nothing trains on or evaluates; untrained: where these are not `enough`, rows of their samples and of in_domain's,
    evaluated or not. None of either is longer than the longest that trains, for which a run is planned."""

    train: Rows
    in_domain: Rows
    heldout: dict[str, Rows]
    notes: list[str]
    unseen: Rows
    untrained: Rows


def enough(rows: Rows) -> bool:
    """For a measurement; `rows` are further ones."""
    return len(np.unique(rows.ends_with)) >= FEWEST


def build_training_data(
    dataset_path: str | PathLike[str],
    heldout_paths: Sequence[str | PathLike[str]] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    seq_len: int,
    rows_needed: int | None,
    eval_rows: int,
    in_domain_fraction: float,
    seed: int,
    one_document_per_row: bool = False,
    extra_eval: Mapping[str, str | PathLike[str]] | None = None,
    unseen_rows: int = 0,
) -> TrainingData:
    """Reads, checks, splits, tokenises and packs all data of a run.

    The samples of `dataset_path` are permuted by the seed; the first max(1, round(fraction * samples)) are in_domain,
    never trained on; without held-out files the next as many are `heldout_<stem of dataset_path>`; the rest trains, in
    permuted order, as far as `rows_needed` rows go (None: all), and `unseen_rows` more come from the samples behind,
    then from those of these splits that are not evaluated, or as many as there are, and where these are not
    `enough`, from all of in_domain's too. Each evaluation set has at most `eval_rows` rows (0: all), those of held-out
    files drawn alike for every seed, so that runs compare. tokenizer may be None for token ids.

    Raises UserError for every fault of the files, for two held-out files of one stem, and for too few samples.
    """
    encoder = _Encoder(tokenizer, vocab_size, seq_len, one_document_per_row)
    corpus = _Corpus.read(dataset_path, vocab_size)
    paths = _evaluation_paths(heldout_paths or (), extra_eval or {})
    evaluations = {name: _Corpus.read(path, vocab_size) for name, path in paths.items()}
    notes = list(dict.fromkeys(c.note for c in (corpus, *evaluations.values())))
    if any(c.samples.path.resolve() == corpus.samples.path.resolve() for c in evaluations.values()):
        notes.append(
            f"warning: {place(corpus.samples.path)} is both trained on and held out: that figure proves nothing"
        )

    splits = ["in_domain"] if heldout_paths else ["in_domain", f"heldout_{corpus.samples.path.stem}"]
    assert not set(splits) & evaluations.keys()
    order, held_back = _split(corpus, in_domain_fraction, seed, len(splits))
    rest = order[held_back * len(splits) :]
    train = encoder.rows(corpus, rest, rows_needed, "train", notes)
    evaluated, left = {}, {"train": rest[train.samples :]}
    for i, name in enumerate(splits):
        split = order[held_back * i : held_back * (i + 1)]
        evaluated[name] = encoder.rows(corpus, split, eval_rows or None, name, notes)
        left[name] = split[evaluated[name].samples :]
    longest = train.longest()
    unseen = encoder.further_rows(corpus, left.values(), unseen_rows, longest)
    either = {**left, "in_domain": order[:held_back]}
    untrained = encoder.further_rows(corpus, either.values(), 0 if enough(unseen) else unseen_rows, longest)
    for name, other in evaluations.items():
        any_seed = np.random.default_rng([0, SPLIT_STREAM]).permutation(len(other.samples))
        evaluated[name] = encoder.rows(other, any_seed, eval_rows or None, name, notes)
    return TrainingData(train, evaluated.pop("in_domain"), evaluated, notes, unseen, untrained)


def _evaluation_paths(
    heldout_paths: Sequence[str | PathLike[str]], extra_eval: Mapping[str, str | PathLike[str]]
) -> dict[str, str | PathLike[str]]:
    paths: dict[str, str | PathLike[str]] = {}
    for path in heldout_paths:
        name = f"heldout_{Path(path).stem}"
        if name in paths:
            raise UserError(
                f"HELDOUT_PATH: {place(paths[name])} and {place(path)} would both be called {name}; rename one file"
            )
        paths[name] = path
    assert not paths.keys() & extra_eval.keys()
    return {**paths, **extra_eval}


def _split(corpus: _Corpus, fraction: float, seed: int, parts: int) -> tuple[np.ndarray, int]:
    """The seeded order of the samples, and how many of them each of the `parts` held-back splits takes."""
    samples = len(corpus.samples)
    held_back = max(1, round(fraction * samples))
    if samples <= parts * held_back:
        splits = "in_domain" if parts == 1 else "in_domain and held-out"
        raise UserError(
            f"{place(corpus.samples.path)}: {samples} samples are too few: {splits} evaluation would take "
            f"{parts * held_back} of them and leave none to train on; give more samples"
            + (" or a HELDOUT_PATH" if parts == 2 else "")
        )
    return np.random.default_rng([seed, SPLIT_STREAM]).permutation(samples), held_back


@dataclass(frozen=True)
class _Corpus:
    """A checked file and, where it holds token ids, its label convention."""

    samples: SampleFile
    convention: LabelConvention

    @classmethod
    def read(cls, path: str | PathLike[str], vocab_size: int) -> _Corpus:
        samples = read_samples(Path(path).expanduser())
        if samples.kind != "tokens":
            return cls(samples, "aligned")
        check_tokens(samples, vocab_size)
        return cls(samples, detect_label_convention(samples))

    @property
    def note(self) -> str:
        note = f"{place(self.samples.path)}: {len(self.samples)} samples of kind {self.samples.kind}"
        if self.samples.kind != "tokens":
            return note
        meaning = {
            "aligned": "labels[i] is input_ids[i]",
            "shifted": "labels[i] is input_ids[i+1]; shifted back, and the extra target at each end dropped",
        }
        return f"{note}, labels {self.convention} ({meaning[self.convention]})"


@dataclass(frozen=True)
class _Encoder:
    """How samples become rows: what is the same for all splits of a run."""

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    seq_len: int
    one_document_per_row: bool

    def rows(self, corpus: _Corpus, order: np.ndarray, rows_needed: int | None, name: str, notes: list[str]) -> Rows:
        """Packed rows of the samples `order`, tokenised only as far as needed; a line on them goes to `notes`."""
        counts: Counter[str] = Counter()
        rows = self._packed(corpus, order, rows_needed, counts)
        if not len(rows):
            raise UserError(
                f"{place(corpus.samples.path)}: none of the {len(order)} samples for {name} has a token to learn; give "
                f"more or longer samples" + (" or raise SEQ_LEN" if rows.truncated else "")
            )
        note = f"{name}: {len(rows)} rows, {len(rows.input_ids)} tokens, {rows.target_tokens()} targets"
        note += f", from {rows.samples} of {len(order)} samples"
        if counts["divided"]:
            note += f"; {counts['divided']} conversations made several documents, one a turn that the template alters"
        if rows.truncated:
            note += f"; {rows.truncated} documents cut at SEQ_LEN={self.seq_len}"
        if rows.dropped:
            note += f"; {rows.dropped} without any target dropped"
        notes.append(note)
        return rows

    def further_rows(self, corpus: _Corpus, orders: Iterable[np.ndarray], at_most: int, longest: int) -> Rows:
        """The same without a line, as few as there are, and none of more than `longest` tokens. Of long documents not
        every row, and of books not all: those of one document are alike, and these are for measurements, which a few
        documents would mislead."""
        text = corpus.samples.kind == "text"
        among = at_most * (ROWS_OF_A_DOCUMENT if text else 1)
        order = np.concatenate([*orders]) if at_most else np.zeros(0, np.int64)
        most = max(1, among // FEWEST) * self.seq_len if text else None
        rows = self._packed(corpus, order, among or None, Counter(), most)
        picked = np.linspace(0, len(rows), min(at_most, len(rows)), endpoint=False).astype(np.int64)
        return rows.picked([row for row in picked.tolist() if rows.length(row) <= longest])

    def _packed(
        self, corpus: _Corpus, order: np.ndarray, rows_needed: int | None, counts: Counter[str], most: int | None = None
    ) -> Rows:
        """most: tokens of a document that are taken, from its beginning."""
        kind, sample_of = corpus.samples.kind, array("q")

        def documents() -> Iterator[Document]:
            for ids, labels in self._documents(corpus, order, counts):
                sample_of.append(counts["samples"])
                yield (ids, labels) if most is None else (ids[:most], labels[:most])

        rows = pack(
            documents(),
            seq_len=None if kind == "tokens" else self.seq_len,
            rows_needed=rows_needed,
            split_long=kind == "text",
            one_document_per_row=self.one_document_per_row or kind == "tokens",
        )
        return replace(rows, samples=counts["samples"], ends_with=np.array(sample_of, np.int64)[rows.ends_with])

    def _documents(self, corpus: _Corpus, order: np.ndarray, counts: Counter[str]) -> Iterator[Document]:
        samples = corpus.samples
        for index, sample in zip(order, samples.read(order), strict=True):
            counts["samples"] += 1
            if samples.kind == "tokens":
                yield aligned_document(sample, corpus.convention)
                continue
            if self.tokenizer is None:
                raise UserError(
                    f"{place(samples.path)}: samples of kind {samples.kind} need the model's tokenizer, and MODEL's "
                    f"folder has none; add its files or give token ids"
                )
            try:
                documents = encode_sample(sample, samples.kind, self.tokenizer)
            except UserError as error:
                raise UserError(f"{samples.where(index)}: {error}") from None
            counts["divided"] += len(documents) > 1
            for ids, labels in documents:
                if max(ids, default=0) >= self.vocab_size:
                    raise UserError(
                        f"{samples.where(index)}: the tokenizer gives the id {max(ids)}, outside the model's "
                        f"vocabulary of {self.vocab_size} tokens; use the model's own tokenizer"
                    )
                yield ids, labels


class DataOrder:
    """Which rows each micro-batch takes: a pure function of (n_rows, chunk_rows, microbatch, seed), without state.

    Rows are permuted once and cut into chunks of `chunk_rows` (the last may be shorter), the unit of the frozen prefix.
    Each epoch shuffles the order of the chunks and the rows inside each chunk, so that a chunk is used up before the
    next begins and the prefix can be computed a chunk at a time where it is not cached whole.
    """

    def __init__(self, n_rows: int, chunk_rows: int, microbatch: int, seed: int):
        assert min(n_rows, chunk_rows, microbatch) >= 1
        self.n_rows = n_rows
        self.microbatch = microbatch
        self.seed = seed
        permuted = np.random.default_rng([seed, CHUNK_STREAM]).permutation(n_rows)
        self.chunks: list[list[int]] = [
            permuted[begin : begin + chunk_rows].tolist() for begin in range(0, n_rows, chunk_rows)
        ]
        self._chunk_of = np.empty(n_rows, np.int64)
        self._chunk_of[permuted] = np.arange(n_rows) // chunk_rows
        self._epochs: dict[int, np.ndarray] = {}

    def micro_batch(self, index: int) -> list[int]:
        """Rows of the index-th micro-batch since the beginning: always `microbatch`, across chunk and epoch borders."""
        first = index * self.microbatch
        taken = (divmod(number, self.n_rows) for number in range(first, first + self.microbatch))
        return [int(self._epoch(epoch)[position]) for epoch, position in taken]

    def first_rows(self, count: int) -> list[int]:
        """The first `count` rows that training takes, each once (an epoch may end before all were seen)."""
        assert count <= self.n_rows, (count, self.n_rows)
        rows: dict[int, None] = {}
        index = 0
        while len(rows) < count:
            rows.update(dict.fromkeys(self.micro_batch(index)))
            index += 1
        return list(rows)[:count]

    def steps_per_epoch(self, accum: int) -> int:
        """Optimizer steps until every row was taken once: the last step may reach into the next epoch."""
        return -(-self.n_rows // (self.microbatch * accum))

    def chunk_of(self, row: int) -> int:
        """Number of the chunk that holds a row."""
        return int(self._chunk_of[row])

    def _epoch(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch; the last two epochs asked for are kept, for batches across the border."""
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, EPOCH_STREAM, epoch])
            order = rng.permutation(len(self.chunks))
            shuffled = [rng.permutation(self.chunks[chunk]) for chunk in order]
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = np.concatenate(shuffled)
        return self._epochs[epoch]
