"""Reading ahead: what is asked for, by either way, and that the prefix asks for the next layer before it runs one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build, write_checkpoint

from usaf.data import pack
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates, chunked
from usaf.read_ahead import Span, read_ahead, read_through


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_a_thread_reads_the_spans_and_no_more(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    future = read_ahead([Span(file, 10, 5000), Span(file, 6000, 6001)])
    assert future is not None
    assert future.result(10) == 4991


def test_the_system_is_asked_for_the_spans(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, n, how: asked.append((at, n)), raising=False)
    assert read_ahead([Span(file, 10, 5000), Span(file, 6000, 6001)]) is None
    assert asked == [(10, 4990), (6000, 1)]


def test_what_cannot_be_read_is_left_to_its_user(file: Path, tmp_path: Path) -> None:
    assert read_ahead([Span(tmp_path / "gone", 0, 10)]) is None
    assert read_through([Span(tmp_path / "gone", 0, 10), Span(file, 0, 10)]) == 0
    assert read_through([Span(file, 16_000, 99_999)]) == 384  # cut short


def test_the_prefix_asks_for_each_following_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(write_checkpoint(tmp_path / "model", num_hidden_layers=4))
    order: list[tuple[str, int]] = []
    ran = SparseModel.run_layers

    def running(self: SparseModel, batch: Any, first: int, *rest: Any, **named: Any) -> torch.Tensor:
        order.append(("run", first))
        return ran(self, batch, first, *rest, **named)

    monkeypatch.setattr(SparseModel, "run_layers", running)
    monkeypatch.setattr("usaf.model.read_ahead", lambda spans: order.append(("read", len(spans))))
    ids = [[3 + i % (VOCAB - 3) for i in range(8)] for _ in range(4)]
    rows = pack([(i, i) for i in ids], None, None, False, one_document_per_row=True)
    states = BoundaryStates(model, rows, chunked(4, 2), 3, torch.float32, {}, None)
    states._compute([0, 1])
    spans = 6  # packed, scale and offset of two projections
    assert order == [("read", spans), ("run", 0), ("run", 0), ("read", spans), ("run", 1), ("run", 1), ("run", 2),
                     ("run", 2)]  # fmt: skip
    for layer in range(4):
        covered = sum(span.end - span.start for span in model.spans[layer])
        moe = next(moe for moe in model.moe if moe.layer == layer)
        assert covered == sum(t.nbytes for bank in moe.banks for t in bank.base.tensors().values())
