"""Rows and their packing, the data of a whole run, and the order of training."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import CHATML, END_OF_TEXT, STRIPS_REASONING, build_tokenizer, chat, write_jsonl
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from usaf.data import FEWEST, DataOrder, Rows, TrainingData, batch_loss_targets, build_training_data, enough, pack
from usaf.errors import UserError
from usaf.samples import NO_TARGET

VOCAB = 300


def document(*ids: int, masked: int = 0) -> tuple[list[int], list[int]]:
    return list(ids), [NO_TARGET] * masked + list(ids)[masked:]


def row_lists(rows: Rows, values: np.ndarray) -> list[list[int]]:
    return [values[begin:end].tolist() for begin, end in itertools.pairwise(rows.offsets)]


def predictions(rows: Rows) -> list[tuple[int, ...]]:
    """(context within the document..., target) of every target that counts, by a plain loop: the judge of the rows."""
    found = []
    for ids, labels, positions in zip(
        *(row_lists(rows, values) for values in (rows.input_ids, rows.labels, rows.positions)), strict=True
    ):
        for i in range(len(ids) - 1):
            if labels[i + 1] != NO_TARGET:
                found.append((*ids[i - positions[i] : i + 1], labels[i + 1]))
    return found


# Packing


def test_text_is_cut_at_the_row_and_goes_on_as_a_new_document() -> None:
    rows = pack([document(1, 2, 3), document(4, 5, 6, 7, 8), document(9, 10)], 4, None, split_long=True)
    assert row_lists(rows, rows.input_ids) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert row_lists(rows, rows.positions) == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1]]
    assert row_lists(rows, rows.labels) == [[-100, 2, 3, -100], [-100, 6, 7, 8], [-100, 10]]
    assert [rows.length(i) for i in range(len(rows))] == [4, 4, 2]
    assert rows.target_tokens() == rows.different_targets() == 6
    assert (rows.truncated, rows.dropped) == (0, 0)


def test_conversations_are_never_split() -> None:
    documents = [document(1, 2, 3), document(4, 5), document(6, 7, 8, 9, 10, 11), document(12, 13, masked=1)]
    rows = pack(documents, 4, None, split_long=False)
    assert row_lists(rows, rows.input_ids) == [[1, 2, 3], [4, 5], [6, 7, 8, 9], [12, 13]]
    assert row_lists(rows, rows.labels) == [[-100, 2, 3], [-100, 5], [-100, 7, 8, 9], [-100, 13]]
    assert (rows.truncated, rows.dropped) == (1, 0)
    rows = pack(documents, 7, None, split_long=False)
    assert row_lists(rows, rows.input_ids) == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13]]
    assert row_lists(rows, rows.positions)[0] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("split_long", [False, True])
def test_one_document_a_row(split_long: bool) -> None:
    documents = [document(1, 2), document(3, 4, 5, 6, 7), document(8, 9)]
    rows = pack(documents, 3, None, split_long, one_document_per_row=True)
    middle = [[3, 4, 5], [6, 7]] if split_long else [[3, 4, 5]]
    assert row_lists(rows, rows.input_ids) == [[1, 2], *middle, [8, 9]]
    assert all(positions == list(range(len(positions))) for positions in row_lists(rows, rows.positions))


def test_what_has_no_target_is_dropped_and_counted() -> None:
    documents = [document(1), ([], []), document(2, 3, masked=2), ([4, 5], [4, -100]), document(6, 7), document(8, 9)]
    rows = pack(documents, 3, None, split_long=True)
    assert row_lists(rows, rows.input_ids) == [[6, 7, 8]]  # the last row would hold 9 alone
    assert rows.dropped == 5
    assert len(pack([document(1)], 3, None, split_long=True)) == 0
    answer_cut_off = pack([document(1, 2, 3, 4, masked=3)], 3, None, split_long=False)
    assert (len(answer_cut_off), answer_cut_off.truncated, answer_cut_off.dropped) == (0, 1, 1)


@pytest.mark.parametrize("split_long", [False, True])
@pytest.mark.parametrize("one_document_per_row", [False, True])
@pytest.mark.parametrize("rows_needed", [1, 2, 7, None])
def test_packing_of_random_documents(split_long: bool, one_document_per_row: bool, rows_needed: int | None) -> None:
    rng = random.Random(3)
    counter = itertools.count(1)
    documents = [document(*itertools.islice(counter, rng.randint(1, 30))) for _ in range(60)]
    rows = pack(documents, 16, rows_needed, split_long, one_document_per_row)
    assert len(rows) == (rows_needed or len(rows))
    assert max(map(len, row_lists(rows, rows.input_ids))) <= 16
    successor_within = {(a, b) for ids, _ in documents for a, b in itertools.pairwise(ids)}
    found = predictions(rows)
    assert len(found) == rows.target_tokens()
    for (
        *context,
        target,
    ) in found:  # nothing is learnt from another document, and no context is missing but what was cut
        assert all(pair in successor_within for pair in itertools.pairwise([*context, target]))
    if not split_long:
        starts = {ids[0] for ids, _ in documents}
        assert all(context[0] in starts for *context, _ in found)
    prefix = pack(iter(documents), 16, None, split_long, one_document_per_row)
    assert rows.input_ids.tolist() == prefix.input_ids[: len(rows.input_ids)].tolist()  # rows_needed only stops earlier


def test_only_as_many_documents_are_read_as_the_rows_need() -> None:
    endless = (document(i % 100 + 1, 2, 3) for i in itertools.count())
    assert len(pack(endless, 8, 5, split_long=True)) == 5
    assert len(pack(endless, 8, 5, split_long=False)) == 5
    assert len(pack(endless, None, 5, split_long=False, one_document_per_row=True)) == 5
    exactly = iter([document(1, 2)] * 6)
    assert len(pack(exactly, None, 5, split_long=False, one_document_per_row=True)) == 5
    assert len(list(exactly)) == 1


# Rows and batches


def test_rows_are_compact_and_typed() -> None:
    rows = pack([document(*range(1, 100))] * 50, 32, None, split_long=True)
    for values in (rows.input_ids, rows.labels, rows.positions):
        assert values.dtype == np.int32
    assert rows.offsets.dtype == np.int64
    empty = pack([], 8, None, split_long=True)
    assert (len(empty), empty.target_tokens(), empty.input_ids.dtype) == (0, 0, np.int32)


def test_fingerprint_tells_every_array() -> None:
    rows = pack([document(1, 2, 3), document(4, 5, 6)], 4, None, split_long=False)
    again = pack([document(1, 2, 3), document(4, 5, 6)], 4, None, split_long=False)
    assert rows.fingerprint() == again.fingerprint()
    others = [
        pack([document(1, 2, 3), document(4, 5, 7)], 4, None, split_long=False),
        pack([document(1, 2, 3), document(4, 5, 6, masked=2)], 4, None, split_long=False),
        pack([document(1, 2, 3), document(4, 5, 6)], 6, None, split_long=False),
        Rows(rows.input_ids, rows.labels, np.zeros_like(rows.positions), rows.offsets),
    ]
    assert len({r.fingerprint() for r in (rows, *others)}) == 5
    big_endian = rows.input_ids.astype(">i4"), rows.labels.astype(">i4"), rows.positions, rows.offsets
    assert Rows(*big_endian).fingerprint() == rows.fingerprint()


def test_targets_at_a_rows_first_position_do_not_count() -> None:
    rows = Rows(np.array([1, 2, 3, 4]), np.array([1, 2, 3, -100]), np.array([0, 1, 0, 1]), np.array([0, 2, 4]))
    assert rows.target_tokens() == rows.different_targets() == 1


def test_different_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all blocks, each token once; none of a row's first, of masked ones, or where there is no row."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(500) < 0.3, -100, rng.integers(0, 90, 500)).astype(np.int32)
    offsets = np.arange(0, 501, 20)
    firsts = set(offsets[:-1].tolist())
    wanted = len({int(label) for i, label in enumerate(labels) if label != -100 and i not in firsts})
    rows = Rows(labels, labels, labels, offsets)
    for at_once in (1, 7, 500, 1 << 20):
        monkeypatch.setattr("usaf.data.LABELS_AT_ONCE", at_once)
        assert rows.different_targets() == wanted < 90
    none = np.full(4, -100, np.int32)
    assert Rows(none, none, none, np.array([0, 4])).different_targets() == 0
    empty = np.zeros(0, np.int32)
    assert Rows(empty, empty, empty, np.array([0])).different_targets() == 0


def test_batches_are_padded_by_a_document_of_their_own() -> None:
    rows = pack([document(1, 2, 3, 4, 5), document(6, 7), document(8, 9, 10)], 5, None, split_long=False)
    batch = rows.batch([1, 0])
    assert batch.input_ids.tolist() == [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    short = pack([document(1, 2, 3, 4, 5), document(6, 7)], 5, None, split_long=False).batch([1, 0, 1])
    assert short.input_ids.tolist() == [[6, 7, 0, 0, 0], [1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert short.labels.tolist() == [[-100, 7, -100, -100, -100], [-100, 2, 3, 4, 5], [-100, 7, -100, -100, -100]]
    assert short.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    assert short.lengths == [2, 5, 2]
    assert {short.input_ids.dtype, short.labels.dtype, short.position_ids.dtype} == {torch.int64}


def test_the_one_shift_is_transformers_own() -> None:
    labels = torch.tensor([[-100, 2, 3, -100, 5], [-100, -100, 8, 9, -100]])
    assert batch_loss_targets(labels).tolist() == [[2, 3, -100, 5, -100], [-100, 8, 9, -100, -100]]
    logits = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    from transformers.loss.loss_utils import ForCausalLMLoss

    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_loss_targets(labels).flatten())
    torch.testing.assert_close(ours, ForCausalLMLoss(logits, labels, vocab_size=12))


def test_neither_attention_nor_loss_crosses_documents() -> None:
    """A real model, given packed and padded rows without a mask, has the loss of the documents one at a time."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    rng = random.Random(1)
    documents = [document(*(rng.randrange(1, 32) for _ in range(length))) for length in (5, 3, 6, 4)]

    def summed_loss(batch) -> float:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        targets = batch_loss_targets(batch.labels)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()

    packed = pack(documents, 9, None, split_long=False)
    assert row_lists(packed, packed.positions) == [[*range(5), *range(3)], [*range(6)], [*range(4)]]
    apart = [pack([d], 9, None, split_long=False).batch([0]) for d in documents]
    assert summed_loss(packed.batch([0, 1, 2])) == pytest.approx(sum(map(summed_loss, apart)), rel=1e-5)


# The data of a run


def build(dataset: Path, heldout: list[Path] | None = None, tokenizer=None, **options) -> TrainingData:
    settings: dict = dict(
        vocab_size=VOCAB, seq_len=16, rows_needed=None, eval_rows=0, in_domain_fraction=0.1, seed=0, extra_eval={}
    )
    return build_training_data(dataset, heldout, tokenizer, **{**settings, **options})


def numbered(count: int, length: int = 4) -> list[dict]:
    """Token samples that begin with their own number."""
    return [{"input_ids": [i, *range(200, 200 + length - 1)]} for i in range(count)]


def first_ids(rows: Rows) -> list[int]:
    return rows.input_ids[rows.offsets[:-1]].tolist()


def write_conventions(tmp_path: Path, masked: int) -> tuple[Path, Path]:
    """The same token streams as an aligned file and as a file shifted before, the last token of each cut off."""
    rng = random.Random(5)
    streams = [[rng.randrange(VOCAB) for _ in range(rng.randint(12, 20))] for _ in range(40)]
    aligned = [{"input_ids": s[:-1], "labels": [-100] * masked + s[masked:-1]} for s in streams]
    shifted = [{"input_ids": s[:-1], "labels": [-100] * max(0, masked - 1) + s[max(1, masked) :]} for s in streams]
    return write_jsonl(tmp_path / "a" / "text.jsonl", aligned), write_jsonl(tmp_path / "b" / "text.jsonl", shifted)


@pytest.mark.parametrize("masked", [0, 1, 5])
def test_both_conventions_give_the_same_rows_and_say_so(tmp_path: Path, masked: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = [build(path) for path in write_conventions(tmp_path, masked)]
    for name, one, other in [
        ("train", data[0].train, data[1].train),
        ("in_domain", data[0].in_domain, data[1].in_domain),
        ("held out", data[0].heldout["heldout_text"], data[1].heldout["heldout_text"]),
    ]:
        assert one.fingerprint() == other.fingerprint(), name
        assert one.target_tokens() == len(one.input_ids) - len(one) * max(1, masked)
    assert "labels aligned" in data[0].notes[0]
    assert "labels shifted" in data[1].notes[0]


def test_a_mixture_of_conventions_is_refused(tmp_path: Path) -> None:
    lines = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [2, 3, 4]}] * 10
    with pytest.raises(UserError, match=r"mix\.jsonl: a mixture .* line 1 is aligned .* line 2 is shifted"):
        build(write_jsonl(tmp_path / "mix.jsonl", lines))


def test_token_samples_stay_as_they_are(tmp_path: Path) -> None:
    data = build(write_jsonl(tmp_path / "a.jsonl", numbered(20, length=40)), seq_len=8)
    assert {data.train.length(i) for i in range(len(data.train))} == {40}
    assert (len(data.train), len(data.in_domain), len(data.heldout["heldout_a"])) == (16, 2, 2)
    assert data.train.truncated == 0


def test_splits_share_no_sample_and_follow_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(100))
    seen = {}
    for seed in (0, 1):
        data = build(path, seed=seed)
        parts = [first_ids(rows) for rows in (data.in_domain, data.heldout["heldout_a"], data.train)]
        assert [len(part) for part in parts] == [10, 10, 80]
        assert sorted(sum(parts, [])) == list(range(100))
        assert parts[2] != sorted(parts[2])
        again = build(path, seed=seed)
        assert again.train.fingerprint() == data.train.fingerprint()
        seen[seed] = parts
    assert seen[0][0] != seen[1][0]


def test_held_out_files_replace_the_second_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(100))
    others = [write_jsonl(tmp_path / f"{name}.jsonl", numbered(30, length)) for name, length in [("x", 5), ("y.v2", 6)]]
    data = build(path, others, extra_eval={"forgetting_python": others[0]}, eval_rows=7)
    assert list(data.heldout) == ["heldout_x", "heldout_y.v2", "forgetting_python"]
    assert [len(rows) for rows in (data.in_domain, *data.heldout.values())] == [7, 7, 7, 7]
    assert len(data.train) == 90
    assert not set(first_ids(data.train)) & set(first_ids(data.in_domain))
    assert data.heldout["heldout_x"].length(0) == 5
    other_seed = build(path, others, seed=9, eval_rows=7)
    assert other_seed.heldout["heldout_x"].fingerprint() == data.heldout["heldout_x"].fingerprint()
    assert other_seed.in_domain.fingerprint() != data.in_domain.fingerprint()


def test_a_held_out_file_has_its_own_kind_and_convention(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "hello the end"}] * 20)
    shifted = [{"input_ids": [1, 2, 3], "labels": [2, 3, 4]}] * 3
    data = build(path, [write_jsonl(tmp_path / "b.jsonl", shifted)], build_tokenizer())
    assert row_lists(data.heldout["heldout_b"], data.heldout["heldout_b"].labels) == [[-100, 2, 3]] * 3
    assert data.notes[0].endswith("20 samples of kind text")
    assert "3 samples of kind tokens, labels shifted" in data.notes[1]


def test_rows_needed_bounds_the_work(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.tokenizer, self.calls = build_tokenizer(), 0

        def __getattr__(self, name: str):
            return getattr(self.tokenizer, name)

        def __call__(self, *arguments, **options):
            self.calls += 1
            return self.tokenizer(*arguments, **options)

    tokenizer = Counting()
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"hello number {i}"} for i in range(1000)])
    data = build(path, tokenizer=tokenizer, rows_needed=5, eval_rows=3)
    assert (len(data.train), len(data.in_domain)) == (5, 3)
    assert tokenizer.calls < 30
    assert f"train: 5 rows, {5 * 16} tokens" in "\n".join(data.notes)
    few = build(path, tokenizer=tokenizer, rows_needed=10**6)
    assert 100 < len(few.train) < 10**6


@pytest.mark.parametrize("kind", ["tokens", "text", "prompt"])
def test_unseen_rows_come_from_samples_behind_those_that_train(tmp_path: Path, kind: str) -> None:
    texts = [" ".join(str(1000 * i + j) for j in range(1 + i % 9)) for i in range(60)]
    samples = {
        "tokens": numbered(60),
        "text": [{"text": text} for text in texts],
        "prompt": [{"prompt": "?", "completion": text} for text in texts],
    }[kind]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    everything = build(path, tokenizer=build_tokenizer())
    plain = build(path, tokenizer=build_tokenizer(), rows_needed=5)
    data = build(path, tokenizer=build_tokenizer(), rows_needed=5, unseen_rows=7)
    assert data.train.fingerprint() == plain.train.fingerprint()
    assert (data.notes, len(data.unseen), len(plain.unseen)) == (plain.notes, 7, 0)
    sets = {"unseen": data.unseen, "train": data.train, "in_domain": data.in_domain, **data.heldout}
    found = {name: set(map(tuple, row_lists(rows, rows.input_ids))) for name, rows in sets.items()}
    assert [name for name in found if found[name] & found["unseen"]] == ["unseen"]
    every = everything.train.input_ids.tolist()
    first = data.unseen.input_ids[: data.unseen.length(0)].tolist()
    at = next(i for i in range(len(every)) if every[i : i + len(first)] == first)
    assert at >= len(data.train.input_ids)
    ends = build(path, tokenizer=build_tokenizer(), rows_needed=5, unseen_rows=10**6).unseen
    assert 7 < len(ends) <= len(everything.train) - 5
    assert len(build(path, tokenizer=build_tokenizer(), unseen_rows=3).unseen) == 0


def test_unseen_rows_of_text_are_of_many_documents(tmp_path: Path) -> None:
    """Each is far longer than a row."""
    samples = [{"text": f"<{i}> " * 16} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    tokenizer = build_tokenizer()

    def documents(rows: Rows) -> list[set[str]]:
        return [set(re.findall(r"<(\d+)>", str(tokenizer.decode(ids)))) for ids in row_lists(rows, rows.input_ids)]

    data = build(path, tokenizer=tokenizer, rows_needed=30, unseen_rows=12)
    consecutive, unseen = documents(data.train)[:12], documents(data.unseen)
    assert len(unseen) == 12
    assert len(set.union(*consecutive)) <= 4
    assert len(set.union(*unseen)) >= 12
    assert not set.union(*unseen) & set.union(*documents(data.train))
    few = build(path, tokenizer=tokenizer, rows_needed=len(build(path, tokenizer=tokenizer).train) - 9, unseen_rows=12)
    assert 0 < len(few.unseen) < 12
    assert len(data.untrained) == 0
    assert few.unseen.samples < FEWEST  # so those of in_domain join in, evaluated or not
    untrained, in_domain = set.union(*documents(few.untrained)), set.union(*documents(few.in_domain))
    assert len(few.untrained) == 12
    assert len(untrained & in_domain) >= FEWEST
    assert not untrained & set.union(*documents(few.train), *documents(few.heldout["heldout_a"]))
    plain = build(path, tokenizer=tokenizer, rows_needed=len(few.train))
    assert (len(plain.unseen), len(plain.untrained)) == (0, 0)


def test_unseen_rows_of_books_are_of_many_of_them(tmp_path: Path) -> None:
    """Of which the first would do, as far as rows go."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"<{i}> " * 1000} for i in range(60)])
    tokenizer = build_tokenizer()
    data = build(path, tokenizer=tokenizer, rows_needed=30, unseen_rows=12)
    decoded = [str(tokenizer.decode(ids)) for ids in row_lists(data.unseen, data.unseen.input_ids)]
    assert (data.unseen.samples, len(data.unseen)) == (FEWEST, 12)
    assert len(set(re.findall(r"<(\d+)>", " ".join(decoded)))) == FEWEST
    assert enough(data.unseen)
    assert len(data.untrained) == 0


def test_unseen_rows_longer_than_those_that_train_are_left_out(tmp_path: Path) -> None:
    """And the others alone are counted: where they are too few, in_domain's samples join in."""
    lengths = [5] * 36 + [9]
    samples = [{"input_ids": [i, *range(200, 200 + length - 1)]} for i, length in enumerate(lengths)]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    other = write_jsonl(tmp_path / "b.jsonl", samples[:3])
    for needed, left in ((20, 13), (25, 8), (26, 7)):
        for seed in range(40):
            data = build(path, [other], rows_needed=needed, unseen_rows=64, seed=seed)
            long = data.train.longest() == 9 or 36 in first_ids(data.in_domain)
            assert len(data.unseen) == left - (not long)
            assert data.train.longest() >= data.unseen.longest()
            assert enough(data.unseen) == (len(data.unseen) >= FEWEST)
            either = set(first_ids(data.unseen)) | {i for i in first_ids(data.in_domain) if i < 36}
            if data.train.longest() == 5:
                assert set(first_ids(data.untrained)) == (set() if enough(data.unseen) else either)


@pytest.mark.parametrize(("rows", "samples", "expected"), [(7, 7, False), (40, 7, False), (8, 8, True), (0, 0, False)])
def test_enough_for_a_measurement(rows: int, samples: int, expected: bool) -> None:
    """rows: how many, of how many samples; that more samples were read says nothing."""
    ids = np.zeros(3 * rows, np.int32)
    ends_with = np.arange(rows) % max(1, samples) + 100
    assert enough(Rows(ids, ids, ids, np.arange(rows + 1) * 3, samples=50, ends_with=ends_with)) == expected


@pytest.mark.parametrize("few", [True, False])
def test_one_long_document_gives_few_of_the_unseen_rows(tmp_path: Path, few: bool) -> None:
    """Among short ones, or among enough others. It is cut before its rows are all there are."""
    texts = [f"<{i}> " * (20000 if i % 8 == 0 else 1 if few else 40) for i in range(16 if few else 400)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    tokenizer = build_tokenizer()
    for seed in range(3):
        data = build(path, tokenizer=tokenizer, rows_needed=4, unseen_rows=16, seed=seed)
        rows = row_lists(data.unseen, data.unseen.input_ids)
        found = Counter(re.findall(r"<(\d+)>", str(tokenizer.decode(ids)))[-1] for ids in rows)
        assert len(found) == len(np.unique(data.unseen.ends_with))
        assert enough(data.unseen) == (len(found) >= FEWEST)
        if few:
            assert not enough(data.unseen)
        else:
            assert max(found.values()) <= 16 // FEWEST + 1
            assert enough(data.unseen)


def test_picked_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "completion": "a b c " * (1 + i % 5)} for i in range(40)])
    rows = build(path, tokenizer=build_tokenizer()).train
    for wanted in ([3, 0, 7], [], list(range(len(rows)))):
        picked = rows.picked(wanted)
        assert len(picked) == len(wanted)
        for name in ("input_ids", "labels", "positions"):
            lists = row_lists(rows, getattr(rows, name))
            assert row_lists(picked, getattr(picked, name)) == [lists[row] for row in wanted]
            assert getattr(picked, name).dtype == np.int32
    assert rows.picked(range(len(rows))).fingerprint() == rows.fingerprint()


def test_text_is_packed_to_seq_len_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = [f"hello {'the end ' * (i % 7)}{i}" for i in range(50)]
    tokenizer = build_tokenizer()
    data = build(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), tokenizer=tokenizer)
    assert {data.train.length(i) for i in range(len(data.train) - 1)} == {16}
    parts = [data.train, data.in_domain, data.heldout["heldout_a"]]
    found = END_OF_TEXT.join(str(tokenizer.decode(rows.input_ids.tolist())) for rows in parts).split(END_OF_TEXT)
    assert set(texts) == set(found) - {""}
    assert data.train.truncated == 0


def test_conversations_begin_new_rows_and_are_cut_with_a_note(tmp_path: Path) -> None:
    samples = [chat("hi", "hello" * (1 + i % 3)) for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    data = build(path, tokenizer=build_tokenizer(CHATML), seq_len=27)
    begins = data.train.input_ids[np.flatnonzero(data.train.positions == 0)]
    assert set(begins.tolist()) == {build_tokenizer(CHATML).convert_tokens_to_ids("<|im_start|>")}
    assert data.train.truncated > 0
    assert f"{data.train.truncated} documents cut at SEQ_LEN=27" in "\n".join(data.notes)


def test_families_with_recurrent_state_get_one_document_a_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    data = build(path, tokenizer=build_tokenizer(), one_document_per_row=True)
    assert len(data.train) == 16
    assert np.flatnonzero(data.train.positions == 0).tolist() == data.train.offsets[:-1].tolist()


def test_divided_conversations_are_noted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "one", "and?", "two")] * 20)
    data = build(path, tokenizer=build_tokenizer(STRIPS_REASONING), seq_len=512)
    assert any("train:" in note and "16 conversations made several documents" in note for note in data.notes)
    starts = int(np.count_nonzero(data.train.positions == 0))
    assert starts == 2 * 16


@pytest.mark.parametrize(("samples", "heldout", "fits"), [(1, True, False), (2, True, True), (2, False, False)])
def test_too_few_samples_to_split(tmp_path: Path, samples: int, heldout: bool, fits: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(samples))
    others = [write_jsonl(tmp_path / "b.jsonl", numbered(3))] if heldout else None
    if fits:
        assert len(build(path, others).train) == 1
        return
    with pytest.raises(
        UserError, match=rf"a\.jsonl: {samples} samples are too few: .* would take {1 if heldout else 2}"
    ):
        build(path, others)


def test_held_out_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    paths = [write_jsonl(tmp_path / "x.jsonl", numbered(3)), write_jsonl(tmp_path / "sub" / "x.jsonl", numbered(3))]
    with pytest.raises(UserError, match=r"HELDOUT_PATH: .* would both be called heldout_x; rename"):
        build(write_jsonl(tmp_path / "a.jsonl", numbered(20)), paths)


def test_the_training_file_as_held_out_file_is_warned_of(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(20))
    notes = build(path, [path]).notes
    assert any(note.startswith("warning: ") and "both trained on and held out" in note for note in notes)
    assert sum("20 samples of kind tokens" in note for note in notes) == 1


def test_faults_name_file_and_line(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", numbered(20))
    outside = write_jsonl(tmp_path / "bad.jsonl", ["", *numbered(3), {"input_ids": [1, VOCAB]}])
    with pytest.raises(UserError, match=r"bad\.jsonl, line 5: input_ids\[1\] is 300, outside"):
        build(good, [outside])
    texts = write_jsonl(tmp_path / "text.jsonl", [{"text": "hello"}] * 5)
    with pytest.raises(
        UserError, match=r"text\.jsonl, line \d: the tokenizer gives the id \d+, outside .* of 50 tokens"
    ):
        build(texts, tokenizer=build_tokenizer(), vocab_size=50)
    with pytest.raises(UserError, match=r"text\.jsonl: samples of kind text need the model's tokenizer"):
        build(texts)
    chats = write_jsonl(tmp_path / "chat.jsonl", [chat("hi", "hello")] * 5)
    with pytest.raises(UserError, match=r"chat\.jsonl, line \d: the model's tokenizer has no chat template"):
        build(chats, tokenizer=build_tokenizer())
    masked = write_jsonl(tmp_path / "masked.jsonl", [{"input_ids": [1, 2], "labels": [-100, -100]}] * 5)
    with pytest.raises(UserError, match=r"masked\.jsonl: none of the 3 samples for train has a token to learn"):
        build(masked)
    with pytest.raises(UserError, match=r"chat\.jsonl: none of the 3 samples .* or raise SEQ_LEN"):
        build(chats, tokenizer=build_tokenizer(CHATML), seq_len=8)


# Order


@pytest.mark.parametrize(
    ("n_rows", "chunk_rows", "microbatch"), [(10, 4, 2), (7, 3, 2), (5, 100, 3), (1, 1, 1), (12, 1, 5)]
)
def test_every_row_once_an_epoch_and_chunk_by_chunk(n_rows: int, chunk_rows: int, microbatch: int) -> None:
    order = DataOrder(n_rows, chunk_rows, microbatch, seed=3)
    assert sorted(sum(order.chunks, [])) == list(range(n_rows))
    assert [len(chunk) for chunk in order.chunks[:-1]] == [chunk_rows] * (len(order.chunks) - 1)
    assert all(order.chunk_of(row) == i for i, chunk in enumerate(order.chunks) for row in chunk)
    taken = sum((order.micro_batch(i) for i in range(4 * n_rows)), [])
    assert len(taken) == 4 * n_rows * microbatch
    for begin in range(0, len(taken), n_rows):
        epoch = taken[begin : begin + n_rows]
        assert sorted(epoch) == list(range(n_rows))
        assert len([chunk for chunk, _ in itertools.groupby(map(order.chunk_of, epoch))]) == len(order.chunks)


def test_epochs_differ_in_chunks_and_within_them() -> None:
    order = DataOrder(64, 8, 64, seed=0)
    first, second = order.micro_batch(0), order.micro_batch(1)
    chunks = [[chunk for chunk, _ in itertools.groupby(map(order.chunk_of, epoch))] for epoch in (first, second)]
    assert chunks[0] != chunks[1]
    inside = [[row for row in epoch if order.chunk_of(row) == 0] for epoch in (first, second)]
    assert inside[0] != inside[1]
    assert DataOrder(64, 8, 64, seed=1).micro_batch(0) != first
    assert DataOrder(64, 8, 64, seed=1).chunks != order.chunks


def test_order_is_a_pure_function_of_the_index() -> None:
    straight = DataOrder(23, 5, 4, seed=2**63 - 1)
    batches = [straight.micro_batch(i) for i in range(50)]
    resumed = DataOrder(23, 5, 4, seed=2**63 - 1)
    assert [resumed.micro_batch(i) for i in range(30, 50)] == batches[30:]
    backwards = DataOrder(23, 5, 4, seed=2**63 - 1)
    assert [backwards.micro_batch(i) for i in reversed(range(50))] == batches[::-1]


def test_late_and_large_micro_batches_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    order = DataOrder(100, 10, 4, seed=0)
    made: list[object] = []
    default_rng = np.random.default_rng

    def counting(seed):
        made.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    assert len(order.micro_batch(10**6)) == 4
    assert len(made) == 1  # one epoch's permutation, not all before it
    for index in range(10**6, 10**6 + 100):
        order.micro_batch(index)
    assert len(made) <= 6
    assert len(DataOrder(2, 2, 7, seed=0).micro_batch(3)) == 7


@pytest.mark.parametrize(
    ("n_rows", "microbatch", "accum", "steps"), [(10, 2, 1, 5), (11, 2, 1, 6), (10, 2, 3, 2), (1, 4, 4, 1)]
)
def test_steps_per_epoch(n_rows: int, microbatch: int, accum: int, steps: int) -> None:
    assert DataOrder(n_rows, 4, microbatch, 0).steps_per_epoch(accum) == steps
