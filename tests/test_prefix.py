"""Boundary states: transformers' own hidden states as judge; the cache against no cache, and against every accident."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, base_into, build, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from usaf import prefix, workspace
from usaf.data import Rows, pack
from usaf.errors import UserError
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates, cache_dtype, chunked
from usaf.session import Session
from usaf.workspace import PRIVATE, Workspace

LENGTHS = [9, 17, 4, 24, 12, 7, 20]  # in tokens; 93 in all
CHUNKS = [[3, 0], [5, 2, 6], [1], [4]]
IDENTITY: dict[str, object] = {"model": "m", "torch": "2", "threads": 1, "cpu": "AVX2", "attention": "sdpa"}
Usage = namedtuple("Usage", "total used free")


def make_rows(lengths: list[int], seed: int = 0) -> Rows:
    """A row a document, with random ids."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return pack([(ids, ids) for ids in documents], None, None, False, one_document_per_row=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SparseModel]:
    built: dict[str, SparseModel] = {}

    def model(family: str) -> SparseModel:
        if family not in built:
            built[family] = build(write_checkpoint(tmp_path_factory.mktemp("models") / family, family))
        return built[family]

    return model


@pytest.fixture
def model(models: Callable[[str], SparseModel]) -> SparseModel:
    return models("qwen3_moe")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return make_rows(LENGTHS)


@pytest.fixture
def passes(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer, sequences) of every pass of a chunk through a layer, in order."""
    made: list[tuple[int, int]] = []
    run_layers = SparseModel.run_layers

    def counted(self: SparseModel, batch: Any, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        assert stop == start + 1
        made.append((start, len(batch.lengths)))
        return run_layers(self, batch, start, stop, hidden)

    monkeypatch.setattr(SparseModel, "run_layers", counted)
    return made


def states_of(model: SparseModel, rows: Rows, folder: Path | None, **changes: Any) -> BoundaryStates:
    given: dict[str, Any] = {
        "chunks": CHUNKS, "start": 2, "dtype": torch.bfloat16, "identity": IDENTITY, "folder": folder, **changes
    }  # fmt: skip
    return BoundaryStates(model, rows, **given)


def fill(states: BoundaryStates) -> list[str]:
    return states.fill(lambda tokens: None)


def all_rows(states: BoundaryStates) -> dict[int, Tensor]:
    found = {}
    for chunk in states.chunks:
        for row in chunk:
            hidden = states.hidden([row])
            assert hidden is not None
            found[row] = hidden
    return found


def assert_same_bits(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for row, hidden in expected.items():
        assert torch.equal(found[row], hidden), row


@pytest.fixture
def expected(model: SparseModel, rows: Rows) -> dict[int, Tensor]:
    return all_rows(states_of(model, rows, None))


# -- the states themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_what_enters_the_layer_in_transformers(
    models: Callable[[str], SparseModel], family: str, rows: Rows
) -> None:
    """Each row alone and without padding in the reference; chunked and padded here."""
    model = models(family)
    folder = model.config._name_or_path
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    base_into(reference, model)
    entered: list[Tensor] = []
    layer = reference.get_submodule(model.layers_name)[2]
    layer.register_forward_pre_hook(lambda _m, args, kwargs: entered.append((*args, *kwargs.values())[0]),
                                    with_kwargs=True)  # fmt: skip
    found = all_rows(states_of(model, rows, None, dtype=torch.float32))
    for row in range(len(rows)):
        batch = rows.batch([row])
        with torch.no_grad():
            reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        torch.testing.assert_close(found[row], entered[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_cached_equals_uncached_to_the_bit(
    models: Callable[[str], SparseModel], rows: Rows, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Whole, partly and not at all cached, in the filling process and the next: micro-batches across chunk borders."""
    micro_batches = [[3, 0], [0, 5], [2, 6, 1], [4, 4], [6], [1, 3]]
    plain = states_of(models(family), rows, None, dtype=dtype)
    results = [[plain.hidden(batch) for batch in micro_batches]]
    for cached_rows in (3, 0):
        for _process in range(2):
            states = states_of(models(family), rows, tmp_path, dtype=dtype, cached_rows=cached_rows)
            assert fill(states) == []
            results.append([states.hidden(batch) for batch in micro_batches])
    for result in results[1:]:
        for hidden, uncached in zip(result, results[0], strict=True):
            assert torch.equal(hidden, uncached)
    for batch, hidden in zip(micro_batches, results[0], strict=True):
        assert hidden.dtype == torch.float32  # the compute type
        assert torch.equal(hidden, hidden.to(dtype).float())  # rounded where it was never on the disk, too
        assert hidden.shape == (len(batch), max(LENGTHS[row] for row in batch), 64)
        for i, row in enumerate(batch):
            assert hidden[i, : LENGTHS[row]].any(1).all()
            assert not hidden[i, LENGTHS[row] :].any()


def test_partly_cached_holds_whole_chunks_from_the_first(model: SparseModel, rows: Rows, tmp_path: Path) -> None:
    for cached_rows, chunks in [(1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (7, 4), (99, 4), (0, 4)]:
        states = states_of(model, rows, tmp_path / str(cached_rows), cached_rows=cached_rows)
        fill(states)
        assert states.cache is not None
        assert sorted(states.cache.done) == list(range(chunks))
        assert states.cache.path.stat().st_size == sum(LENGTHS[r] for c in CHUNKS[:chunks] for r in c) * 64 * 2


def test_a_larger_limit_goes_on_with_the_same_cache(
    model: SparseModel, rows: Rows, tmp_path: Path, passes: list[tuple[int, int]], expected: dict[int, Tensor]
) -> None:
    fill(states_of(model, rows, tmp_path, cached_rows=3))
    passes.clear()
    more = states_of(model, rows, tmp_path)
    fill(more)
    assert passes == [(0, 1), (0, 1), (1, 1), (1, 1)]  # the third and fourth chunk alone
    assert_same_bits(all_rows(more), expected)
    fewer = states_of(model, rows, tmp_path, cached_rows=2)
    assert fewer.pending_tokens() == 0
    assert_same_bits(all_rows(fewer), expected)


def test_other_chunks_are_another_composition_and_another_cache(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor]
) -> None:
    """Bits may differ between compositions, so they never share a cache; the values agree up to rounding."""
    fill(states_of(model, rows, tmp_path))
    other = states_of(model, rows, tmp_path, chunks=chunked(len(rows), 4), dtype=torch.float32)
    assert other.pending_tokens() == 2 * sum(LENGTHS)
    for row, hidden in all_rows(other).items():
        torch.testing.assert_close(hidden, expected[row], rtol=2**-7, atol=1e-5)


def test_start_zero_needs_nothing(model: SparseModel, rows: Rows, tmp_path: Path) -> None:
    states = states_of(model, rows, tmp_path / "cache", start=0)
    assert states.pending_tokens() == 0
    assert fill(states) == []
    assert states.hidden([0, 1]) is None
    assert not (tmp_path / "cache").exists()


def test_nothing_is_written_before_the_first_states(model: SparseModel, rows: Rows, tmp_path: Path) -> None:
    states = states_of(model, rows, tmp_path / "cache")
    assert states.pending_tokens() == 2 * sum(LENGTHS)
    assert not (tmp_path / "cache").exists()


# -- the order of work -------------------------------------------------------------------------------------------------


def test_every_layer_runs_once_per_chunk_and_layer_major(
    model: SparseModel, rows: Rows, tmp_path: Path, passes: list[tuple[int, int]]
) -> None:
    states = states_of(model, rows, tmp_path, start=3)
    progress: list[int] = []
    assert states.pending_tokens() == 3 * sum(LENGTHS)
    assert states.fill(progress.append) == []
    assert passes == [(layer, len(chunk)) for layer in range(3) for chunk in CHUNKS]
    assert sum(progress) == 3 * sum(LENGTHS)
    assert states.tokens_computed == sum(LENGTHS)
    passes.clear()
    fill(states)
    again = states_of(model, rows, tmp_path, start=3)
    assert again.pending_tokens() == 0
    fill(again)
    all_rows(again)
    assert passes == []
    assert again.tokens_computed == 0


@pytest.mark.parametrize(("stretch_bytes", "stretches"), [(1, [1, 1, 1, 1]), (2 * 24 * 256 + 3 * 20 * 256, [2, 2])])
def test_cutting_into_stretches_changes_nothing(
    model: SparseModel, rows: Rows, tmp_path: Path, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
    stretch_bytes: int, stretches: list[int],
) -> None:  # fmt: skip
    """Padded fp32 activations of 64 features: 256 bytes a token; the first two chunks are 2 x 24 and 3 x 20 tokens."""
    whole = states_of(model, rows, tmp_path / "whole")
    fill(whole)
    passes.clear()
    monkeypatch.setattr(prefix, "STRETCH_BYTES", stretch_bytes)
    cut = states_of(model, rows, tmp_path / "cut")
    fill(cut)
    order, begin = [], 0
    for count in stretches:
        order += [(layer, len(chunk)) for layer in range(2) for chunk in CHUNKS[begin : begin + count]]
        begin += count
    assert passes == order
    assert whole.cache is not None
    assert cut.cache is not None
    assert cut.cache.path.read_bytes() == whole.cache.path.read_bytes()
    assert cut.cache.done == whole.cache.done


def test_states_in_mapped_files_are_the_same(
    model: SparseModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "SMALLEST_BYTES", 1)
    whole, memory = states_of(model, rows, tmp_path / "whole"), Workspace(tmp_path / "mapped")
    mapped = states_of(model, rows, tmp_path / "cut", memory=memory)
    fill(whole)
    fill(mapped)
    assert memory.bytes == 256 * sum(len(c) * max(rows.length(r) for r in c) for c in CHUNKS), "one buffer a chunk"
    assert mapped.cache is not None
    assert whole.cache is not None
    assert mapped.cache.path.read_bytes() == whole.cache.path.read_bytes()


def test_uncached_chunks_are_computed_once_while_in_use(
    model: SparseModel, rows: Rows, passes: list[tuple[int, int]]
) -> None:
    """Training uses a chunk up before the next; micro-batches may reach across the border."""
    states = states_of(model, rows, None, start=1)
    for batch in [[3], [0, 5], [2], [6, 1], [4]]:
        states.hidden(batch)
    assert passes == [(0, len(chunk)) for chunk in CHUNKS]


@pytest.mark.parametrize(("stretch_bytes", "stretches"), [(None, 1), (2 * 24 * 256 + 3 * 20 * 256, 2), (1, 4)])
def test_uncached_chunks_pass_a_stretch_at_a_time_where_all_are_wanted(
    model: SparseModel, rows: Rows, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
    stretch_bytes: int | None, stretches: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(prefix, "STRETCH_BYTES", stretch_bytes or prefix.STRETCH_BYTES)
    parts = [[3], [0, 5], [2], [6, 1], [4]]
    one_by_one = [states_of(model, rows, None).kept(part, PRIVATE) for part in parts]
    passes.clear()
    states, asked = states_of(model, rows, None), []
    compute = BoundaryStates._compute
    monkeypatch.setattr(BoundaryStates, "_compute", lambda self, c, *a: (asked.append(len(c)), compute(self, c, *a))[1])
    found = states.all_kept(parts, PRIVATE)
    assert len(asked) == stretches
    assert sum(asked) == len(CHUNKS)
    assert sorted(passes) == sorted((layer, len(chunk)) for layer in range(2) for chunk in CHUNKS)
    assert len(states.recent) <= 2
    for one, other in zip(one_by_one, found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert states_of(model, rows, None, start=0).all_kept(parts, PRIVATE) == [None] * len(parts)


# -- what makes another cache ------------------------------------------------------------------------------------------


def with_changed_token(rows: Rows) -> Rows:
    ids = rows.input_ids.copy()
    ids[5] += 1
    return Rows(ids, rows.labels, rows.positions, rows.offsets)


def with_changed_position(rows: Rows) -> Rows:
    positions = rows.positions.copy()
    positions[5:9] -= 5  # the first row becomes two packed documents
    return Rows(rows.input_ids, rows.labels, positions, rows.offsets)


@pytest.mark.parametrize(
    "changes",
    [
        *[{"identity": {**IDENTITY, name: "another"}} for name in IDENTITY],
        {"identity": {**IDENTITY, "more": 1}},
        {"start": 1},
        {"dtype": torch.float16},
        {"chunks": [[0, 3], *CHUNKS[1:]]},
        {"chunks": [CHUNKS[1], CHUNKS[0], *CHUNKS[2:]]},
        {"chunks": chunked(7, 2)},
        {"rows": with_changed_token},
        {"rows": with_changed_position},
        {"layout": 3},
    ],
    ids=lambda changes: re.sub(r"<function (\w+) at \w+>", r"\1", str(changes)),  # no address: workers must agree
)
def test_every_ingredient_makes_another_cache(
    model: SparseModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    fill(states_of(model, rows, tmp_path))
    assert states_of(model, make_rows(LENGTHS), tmp_path).pending_tokens() == 0
    changes = dict(changes)
    monkeypatch.setattr(prefix, "LAYOUT", changes.pop("layout", prefix.LAYOUT))
    changed_rows = changes.pop("rows", lambda same: same)(rows)
    other = states_of(model, changed_rows, tmp_path, **changes)
    assert other.pending_tokens() == other.start * sum(LENGTHS)


def test_identity_of_a_session_names_what_decides_the_bits() -> None:
    """A stand-in for a session, since `identity` reads only these."""

    def identity(**changes: Any) -> dict[str, object]:
        given = {"base": "b", "name": "cpu", "compute": torch.float32, "threads": 1, "cpu": "AVX2", "attention": "sdpa",
                 **changes}  # fmt: skip
        return Session.identity(SimpleNamespace(  # type: ignore[arg-type]
            model=SimpleNamespace(base_fingerprint=given["base"]),
            backend=SimpleNamespace(name=given["name"], compute_dtype=given["compute"], description="a processor"),
            decisions={"threads": given["threads"], "cpu_capability": given["cpu"], "attention": given["attention"]},
        ))  # fmt: skip

    for changes in ({"base": "c"}, {"name": "cuda"}, {"compute": torch.float64}, {"threads": 2}, {"cpu": "AVX512"},
                    {"attention": "eager"}):  # fmt: skip
        assert identity(**changes) != identity()
    assert identity() == identity()
    assert {"torch", "transformers"} <= identity().keys()
    json.dumps(identity())


def test_a_changed_checkpoint_or_4_bit_file_changes_the_model_fingerprint(tmp_path: Path) -> None:
    """What `identity` holds of the model: dense weights, configuration, the 4-bit file's content."""
    fingerprints = [build(write_checkpoint(tmp_path / "same")).base_fingerprint]
    assert build(tmp_path / "same").base_fingerprint == fingerprints[0]
    assert build(write_checkpoint(tmp_path / "twin")).base_fingerprint == fingerprints[0]
    fingerprints.append(build(write_checkpoint(tmp_path / "weights", seed=1)).base_fingerprint)
    fingerprints.append(build(write_checkpoint(tmp_path / "config", rms_norm_eps=1e-5)).base_fingerprint)
    fingerprints.append(build(write_checkpoint(tmp_path / "group"), group_size=32).base_fingerprint)
    store = tmp_path / "twin" / "experts_q4.safetensors"
    data = bytearray(store.read_bytes())
    data[-1] ^= 1
    store.write_bytes(data)
    fingerprints.append(build(tmp_path / "twin").base_fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_folder_says_what_it_holds(model: SparseModel, rows: Rows, tmp_path: Path) -> None:
    states = states_of(model, rows, tmp_path)
    fill(states)
    assert states.cache is not None
    about = json.loads((states.cache.folder / "about.json").read_text(encoding="utf-8"))
    assert about["fingerprint"].startswith(states.cache.folder.name)
    assert about.items() >= {**IDENTITY, "start": 2, "dtype": "torch.bfloat16"}.items()


# -- killed processes, damaged files -----------------------------------------------------------------------------------


def assert_recovers(model: SparseModel, rows: Rows, folder: Path, expected: dict[int, Tensor]) -> BoundaryStates:
    """Right without filling, right after filling, and the process after that has nothing left to do."""
    assert_same_bits(all_rows(states_of(model, rows, folder)), expected)
    filling = states_of(model, rows, folder)
    assert fill(filling) == []
    assert_same_bits(all_rows(filling), expected)
    after = states_of(model, rows, folder)
    assert after.pending_tokens() == 0
    assert_same_bits(all_rows(after), expected)
    assert after.tokens_computed == 0
    return after


@pytest.fixture
def cache(model: SparseModel, rows: Rows, tmp_path: Path) -> prefix._CacheFile:
    """A full cache in `tmp_path`."""
    states = states_of(model, rows, tmp_path)
    fill(states)
    assert states.cache is not None
    return states.cache


def test_a_torn_listing_is_never_believed(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], cache: prefix._CacheFile
) -> None:
    """Cut at many lengths. The states of what is not listed are overwritten with noise: they must not be read."""
    whole, good = cache.listing.read_bytes(), cache.path.read_bytes()
    for length in range(0, len(whole), 29):
        cache.listing.write_bytes(whole[:length])
        states = states_of(model, rows, tmp_path)
        assert states.cache is not None
        spans = {c: (states.cache.starts[chunk[0]] * 128, sum(LENGTHS[r] for r in chunk) * 128)
                 for c, chunk in enumerate(CHUNKS)}  # fmt: skip
        data = bytearray(good)
        for c in states.cache.missing():
            data[spans[c][0] : spans[c][0] + spans[c][1]] = b"\x3f" * spans[c][1]
        cache.path.write_bytes(data)
        assert len(states.cache.missing()) >= 4 - whole[: length + 1].count(b"}")
        assert_recovers(model, rows, tmp_path, expected)


def test_a_torn_line_does_not_join_the_next(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], cache: prefix._CacheFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed while listing the first chunk, then killed again after the next process had listed it."""
    first = cache.listing.read_bytes().split(b"\n")[1]
    for length in range(1, len(first), 11):
        cache.listing.write_bytes(b"\n" + first[:length])
        monkeypatch.setattr(prefix, "STRETCH_BYTES", 1)
        states = states_of(model, rows, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            states.fill(stop_after(4))
        after = states_of(model, rows, tmp_path)
        assert after.cache is not None
        assert sorted(after.cache.done) == [0, 1]
    assert_recovers(model, rows, tmp_path, expected)


def stop_after(calls: int) -> Callable[[int], None]:
    """A progress function that kills the process, so to speak, at its (calls + 1)-th call."""
    made: list[int] = []

    def progress(tokens: int) -> None:
        made.append(tokens)
        if len(made) > calls:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("leftover", ["states.bin", "done.jsonl", "about.json"])
def test_a_missing_file_costs_work_not_bits(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], cache: prefix._CacheFile, leftover: str
) -> None:
    (cache.folder / leftover).unlink()
    states = states_of(model, rows, tmp_path)
    assert (states.pending_tokens() == 0) == (leftover == "about.json")
    assert_recovers(model, rows, tmp_path, expected)


def test_states_written_but_not_listed(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each of the writes and flushes of each stretch."""
    monkeypatch.setattr(prefix, "STRETCH_BYTES", 1)
    for kill_at in (0, 1, 2, 3, 4, 5, 6, 7, 11, 12):  # a stretch is 7 steps and more
        folder = tmp_path / str(kill_at)
        calls = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > kill_at:  # noqa: B023  (called within this turn of the loop)
                    raise KeyboardInterrupt
                return original(*args)

            return step

        with monkeypatch.context() as patched:
            for name in ("flush", "flush_folder"):
                patched.setattr(prefix, name, dying(getattr(prefix, name)))
            for name in ("_write_row", "_list", "_prepare_folder"):
                original = getattr(prefix._CacheFile, name)
                patched.setattr(prefix._CacheFile, name, dying(original))
            with pytest.raises(KeyboardInterrupt):
                fill(states_of(model, rows, folder))
        assert_recovers(model, rows, folder, expected)


@pytest.mark.parametrize("kept_bytes", [0, 1, 33 * 128 - 1, 33 * 128, 64 * 128 + 5, 93 * 128 - 1])
def test_a_truncated_file_is_not_trusted(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], cache: prefix._CacheFile,
    monkeypatch: pytest.MonkeyPatch, kept_bytes: int,
) -> None:  # fmt: skip
    """Chunks end after 33, 64, 81 and 93 tokens of 128 bytes."""
    with open(cache.path, "r+b") as file:
        file.truncate(kept_bytes)
    states = states_of(model, rows, tmp_path)
    assert states.cache is not None
    assert sorted(states.cache.done) == [c for c, end in enumerate([33, 64, 81, 93]) if end * 128 <= kept_bytes]
    assert_same_bits(all_rows(states), expected)
    # The repair is interrupted as well: the old lines still stand, and the last chunk comes back as a hole of zeros.
    with open(cache.path, "r+b") as file:
        file.truncate(93 * 128)
    assert_same_bits(all_rows(states_of(model, rows, tmp_path)), expected)
    assert_recovers(model, rows, tmp_path, expected)


@pytest.mark.parametrize("at", [0, 40 * 128, 93 * 128 - 1])
def test_a_changed_byte_is_found_said_and_repaired(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], cache: prefix._CacheFile, at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = bytearray(cache.path.read_bytes())
    data[at] ^= 64
    cache.path.write_bytes(data)
    states = states_of(model, rows, tmp_path)
    assert_same_bits(all_rows(states), expected)
    assert "damaged" in capsys.readouterr().out
    assert states.tokens_computed in (33, 31, 12)  # that chunk alone, once
    assert_recovers(model, rows, tmp_path, expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("can_rewrite", [True, False])
def test_deleting_the_cache_while_it_is_in_use(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch,
    can_rewrite: bool,
) -> None:  # fmt: skip
    states = states_of(model, rows, tmp_path / "cache")
    fill(states)
    prefix.shutil.rmtree(tmp_path / "cache")
    if not can_rewrite:
        monkeypatch.setattr(prefix._CacheFile, "_prepare_folder", refuse(errno.EACCES))
    assert_same_bits(all_rows(states), expected)


# -- disks -------------------------------------------------------------------------------------------------------------


def refuse(number: int, after: int = 0) -> Callable[..., Any]:
    """A stand-in that fails as the system does."""
    calls = iter(range(10**6))

    def failing(*_: Any) -> int:
        if next(calls) >= after:
            raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Permission denied")
        return 0

    return failing


@pytest.mark.parametrize("free_chunks", [0, 1, 2, 3])
def test_full_disk(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[int, int]], free_chunks: int,
) -> None:  # fmt: skip
    """The cache keeps what fits, says so once, and the rest is computed on demand, to the same bits. What does not fit
    is not computed in advance, in the first process as little as in the next."""
    ends = [0, 33, 64, 81, 93]
    spare = 1000  # 5% of a disk of 20,000 bytes are left alone
    room = spare + ends[free_chunks] * 128 + 1
    monkeypatch.setattr(prefix, "STRETCH_BYTES", 1)

    def usage(folder: Path) -> Usage:
        used = sum(path.stat().st_size for path in Path(folder).glob("states.bin"))
        return Usage(20_000, 0, room - used)

    monkeypatch.setattr(prefix.shutil, "disk_usage", usage)
    states = states_of(model, rows, tmp_path)
    (note,) = fill(states)
    assert "\n" not in note
    assert "the disk is full" in note
    assert f"{free_chunks} of 4 chunks are cached" in note
    assert str(tmp_path) in note
    assert "PREFIX_CACHE_DIR" in note
    assert states.cache is not None
    assert sorted(states.cache.done) == list(range(free_chunks))
    assert [size for _, size in passes] == [len(chunk) for chunk in CHUNKS[:free_chunks] for _ in range(2)]
    assert states.cache.folder.is_dir() == (free_chunks > 0)
    assert_same_bits(all_rows(states), expected)
    passes.clear()
    assert len(fill(states_of(model, rows, tmp_path))) == 1
    assert passes == []
    monkeypatch.undo()
    assert_recovers(model, rows, tmp_path, expected)


@pytest.mark.parametrize("fault", [PermissionError(errno.EACCES, "Permission denied"), UserError("F:: no such drive")])
def test_a_disk_that_cannot_be_asked(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[int, int]], fault: Exception,
) -> None:  # fmt: skip
    def raises(folder: Path) -> Path:
        raise fault

    monkeypatch.setattr(prefix, "existing_parent", raises)
    states = states_of(model, rows, tmp_path)
    (note,) = fill(states)
    assert str(fault.args[-1]) in note
    assert passes == []
    assert_same_bits(all_rows(states), expected)


@pytest.mark.parametrize(
    ("place", "after"), [("_write_row", 0), ("_write_row", 3), ("_list", 0), ("_list", 2), ("_prepare_folder", 0)]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failing_write_is_a_note(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], place: str, after: int, number: int
) -> None:
    """A disk that fills between the check and the write, a quota, a folder that may not be written."""
    original, failing = getattr(prefix._CacheFile, place), refuse(number, after)

    def step(*args: Any) -> Any:
        failing()
        return original(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefix, "STRETCH_BYTES", 1)
        patched.setattr(prefix._CacheFile, place, step)
        states = states_of(model, rows, tmp_path)
        (note,) = fill(states)
        assert "could not be written" in note
        assert ("No space left" in note) == (number == errno.ENOSPC)
        assert_same_bits(all_rows(states), expected)
    assert_recovers(model, rows, tmp_path, expected)


def test_a_file_in_the_place_of_the_folder(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor]
) -> None:
    (tmp_path / "cache").write_text("not a folder", encoding="utf-8")
    states = states_of(model, rows, tmp_path / "cache")
    (note,) = fill(states)
    assert "could not be written" in note
    assert_same_bits(all_rows(states), expected)


# -- two runs, one cache -----------------------------------------------------------------------------------------------


def test_two_runs_fill_one_cache(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find it empty; one goes ahead, the other overwrites with the same bytes, a third reads in between."""
    monkeypatch.setattr(prefix, "STRETCH_BYTES", 1)
    first, second = states_of(model, rows, tmp_path), states_of(model, rows, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.fill(stop_after(5))  # two chunks of two layers, and a part of the third
    with pytest.raises(KeyboardInterrupt):
        second.fill(stop_after(3))
    third = states_of(model, rows, tmp_path)
    assert third.cache is not None
    assert sorted(third.cache.done) == [0, 1]
    assert fill(second) == []
    assert fill(first) == []
    for states in (first, second, third):
        assert_same_bits(all_rows(states), expected)
    after = assert_recovers(model, rows, tmp_path, expected)
    assert after.cache is not None
    lines = [line for line in after.cache.listing.read_text(encoding="ascii").split("\n") if line]
    assert sorted({json.loads(line)["chunk"] for line in lines}) == [0, 1, 2, 3]


def test_a_file_made_by_another_run_meanwhile_is_kept(
    model: SparseModel, rows: Rows, tmp_path: Path, expected: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run fills the whole cache between this one's look for the file and its making of it."""
    other, late = states_of(model, rows, tmp_path), states_of(model, rows, tmp_path, cached_rows=1)
    write_text = Path.write_text

    def meanwhile(path: Path, *args: Any, **kwargs: Any) -> int:
        monkeypatch.setattr(Path, "write_text", write_text)
        fill(other)
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", meanwhile)
    fill(late)
    after = states_of(model, rows, tmp_path)
    assert_same_bits(all_rows(after), expected)
    assert other.tokens_computed == sum(LENGTHS)
    assert after.tokens_computed == 0


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    """Four writers list 40 chunks each, in their own order, while a reader opens the cache again and again."""
    lengths = [3 + i % 5 for i in range(40)]
    rows, chunks = make_rows(lengths), [[i] for i in range(40)]
    values = {i: torch.randn(n, 6, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)}

    def opened() -> prefix._CacheFile:
        return prefix._CacheFile(tmp_path, {"start": 1}, rows, chunks, len(chunks), torch.float32, (6,))

    def write(seed: int) -> None:
        cache = opened()
        for c in torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist():
            cache.write({c: {c: values[c]}})

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        cache = opened()
        for c in list(cache.done):
            state = cache.read(c, c)
            assert state is not None
            assert torch.equal(state, values[c])
            seen += 1
    for writer in writers:
        writer.join()
    assert opened().missing() == []
    assert seen


# -- values that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("dtype", "factor", "mark"),
    [
        (torch.float16, 1e7, "CACHE_DTYPE=fp16: "),
        (torch.float16, float("inf"), "MODEL: "),
        (torch.bfloat16, float("nan"), "MODEL: "),
    ],
)
def test_overflow_is_one_line(
    model: SparseModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, dtype: torch.dtype,
    factor: float, mark: str,
) -> None:  # fmt: skip
    """Raised by the chunk that holds it, here the second; nothing of it is listed."""
    run_layers = SparseModel.run_layers

    def enlarged(self: SparseModel, batch: Any, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        out = run_layers(self, batch, start, stop, hidden)
        return out * factor if start == 1 and batch.lengths == [7, 4, 20] else out

    monkeypatch.setattr(SparseModel, "run_layers", enlarged)
    monkeypatch.setattr(prefix, "STRETCH_BYTES", 1)
    states = states_of(model, rows, tmp_path / "cache" if cached else None, dtype=dtype)
    with pytest.raises(UserError, match=mark) as error:
        fill(states) if cached else states.hidden([3, 2])
    assert "layer 2" in str(error.value)
    if mark.startswith("CACHE_DTYPE"):
        assert "CACHE_DTYPE=bf16" in str(error.value).partition(": ")[2]
    if cached:
        again = states_of(model, rows, tmp_path / "cache", dtype=dtype)
        assert again.cache is not None
        assert sorted(again.cache.done) == [0]


def test_overflow_in_the_padding_is_nobodys_business(
    model: SparseModel, rows: Rows, monkeypatch: pytest.MonkeyPatch, expected: dict[int, Tensor]
) -> None:
    run_layers = SparseModel.run_layers

    def poisoned(self: SparseModel, batch: Any, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        out = run_layers(self, batch, start, stop, hidden)
        for i, length in enumerate(batch.lengths):
            out[i, length:] = float("inf") if start == 1 else out[i, length:]
        return out

    monkeypatch.setattr(SparseModel, "run_layers", poisoned)
    assert_same_bits(all_rows(states_of(model, rows, None)), expected)


# -- small parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.float32, torch.bfloat16),
        ("bf16", torch.float16, torch.bfloat16),
        ("fp16", torch.bfloat16, torch.float16),
        ("fp32", torch.float16, torch.float32),
    ],
)
def test_cache_dtype(name: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    assert cache_dtype(name, stored) == dtype


def test_chunked() -> None:
    assert chunked(5, 2) == [[0, 1], [2, 3], [4]]
    assert chunked(4, 9) == [[0, 1, 2, 3]]
    assert chunked(0, 3) == []
