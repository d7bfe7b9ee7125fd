"""Measured learning rates: lines whose turn is known, and losses against transformers' eager experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import build, random_model
from test_importance import Pair, make_pair, make_rows
from test_trainer import ROWS
from torch import Tensor

from usaf import workspace
from usaf.data import DataOrder, Rows
from usaf.importance import Importance, find_important
from usaf.learning_rate import (
    ENOUGH_TARGETS,
    LEAST_SEQUENCES,
    MOST_POINTS,
    Line,
    fresh_rows,
    measure_learning_rates,
    rate_by_width,
    rows_beyond,
    turning_point,
)
from usaf.loss import count_targets
from usaf.model import SparseModel
from usaf.prefix import BoundaryStates
from usaf.probe import parts_of
from usaf.settings import Settings
from usaf.trained_parts import open_head
from usaf.workspace import PRIVATE, Memory, Workspace

# ---- the search along a line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [3e-4, 0.0101, 0.02, 0.9])
@pytest.mark.parametrize("guess", [0.001, 0.01, 0.016])
def test_the_turn_of_a_parabola_over_log_t(where: float, guess: float) -> None:
    asked: list[float] = []

    def loss(t: float) -> float:
        asked.append(t)
        return 2.0 + math.log(t / where) ** 2 - 3

    turn = turning_point(loss, 2.0, guess)
    assert turn.at == pytest.approx(where, rel=1e-6)
    assert turn.least == min(map(loss, asked[:]))
    assert turn.rest == 2.0
    assert turn.points <= 3 + abs(math.log2(where / guess)) + 1
    assert len(set(asked)) == turn.points  # none twice


def test_the_turn_lies_within_half_a_doubling_of_the_least_that_was_seen() -> None:
    """Of what falls slowly and rises fast, as losses do."""
    turn = turning_point(lambda t: -100 * t + 0.1 * math.expm1(300 * t), 0.0, 0.5)
    best = min((0.5 * 2.0**i for i in range(-11, 1)), key=lambda t: -100 * t + 0.1 * math.expm1(300 * t))
    assert turn.at is not None
    assert best / math.sqrt(2) <= turn.at <= best * math.sqrt(2)


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_beyond_the_turn(beyond: float) -> None:
    turn = turning_point(lambda t: beyond if t > 0.02 else -t, 0.0, 0.01)
    assert turn.at == 0.02
    assert turn.least == -0.02
    assert turning_point(lambda t: beyond, 0.0, 0.01).at is None


def test_a_line_that_never_falls_has_no_turn_and_one_that_never_rises_ends() -> None:
    uphill = turning_point(lambda t: t, 0.0, 0.01)
    assert (uphill.at, uphill.points) == (None, MOST_POINTS)
    downhill = turning_point(lambda t: -t, 0.0, 0.01)
    assert downhill.points == MOST_POINTS
    assert downhill.at == pytest.approx(0.01 * 2.0 ** (MOST_POINTS - 1))


# ---- which sequences ------------------------------------------------------------------------------------------------


def rows_of(count: int, length: int) -> Rows:
    ids = torch.arange(count * length).remainder(90).numpy()
    offsets = torch.arange(0, count * length + 1, length).numpy()
    return Rows(ids, ids, torch.arange(length).repeat(count).numpy(), offsets)


@pytest.mark.parametrize(
    ("count", "length", "seen", "expected"),
    [
        (1000, 513, 64, 8),  # 512 targets each
        (1000, 129, 64, 32),
        (1000, 9, 64, 64),  # never more than have chosen
        (1000, 9, 2, 8),
        (70, 129, 64, 8),  # the data end: the last that there are
        (6, 129, 6, 6),
    ],
)
def test_sequences_that_importance_has_not_met(count: int, length: int, seen: int, expected: int) -> None:
    rows, order = rows_of(count, length), DataOrder(count, 4, 2, seed=0)
    chosen, unseen, met = fresh_rows(order, rows, seen)
    assert len(chosen) == len(set(chosen)) == expected
    assert unseen == []
    assert set(order.first_rows(seen)) & set(chosen) == set(chosen[:met])
    assert met == max(0, min(seen, seen + LEAST_SEQUENCES - count, expected))
    if expected > LEAST_SEQUENCES and expected < seen:
        enough = sum(count_targets(rows.batch([row])) for row in chosen)
        assert ENOUGH_TARGETS <= enough < ENOUGH_TARGETS + length


@pytest.mark.parametrize(
    ("count", "length", "more", "expected"),
    [
        (64, 513, 64, (0, 8, 0)),  # all that train have chosen
        (64, 129, 64, (0, 32, 0)),
        (64, 9, 99, (0, 64, 0)),  # never more than have chosen
        (70, 129, 64, (6, 26, 0)),
        (80, 513, 64, (8, 0, 0)),  # what trains is enough
        (64, 513, 3, (5, 3, 5)),  # the data end
        (66, 513, 3, (5, 3, 3)),
        (67, 513, 5, (3, 5, 0)),
    ],
)
def test_sequences_that_do_not_train(count: int, length: int, more: int, expected: tuple[int, int, int]) -> None:
    rows, order = rows_of(count, length), DataOrder(count, 4, 2, seed=0)
    unseen: Any = SimpleNamespace(rows=rows_of(2 * more, length), chunks=[[2 * i] for i in range(more)])
    chosen = fresh_rows(order, rows, 64, unseen)
    assert (len(chosen.trained), len(chosen.unseen), chosen.met) == expected
    assert set(order.first_rows(64)) & set(chosen.trained) == set(chosen.trained[: chosen.met])
    assert chosen.unseen == [2 * i for i in range(expected[1])]


@pytest.mark.parametrize(
    ("samples", "rows", "beyond"), [(64, 64, 64), (64, 100, 28), (64, 128, 0), (64, 720, 0), (2, 4, 6), (100, 64, 136)]
)
def test_sequences_are_read_beyond_those_that_train(samples: int, rows: int, beyond: int) -> None:
    for rate in (None, 1e-3):  # a resumed run has them set, and reads the same
        assert rows_beyond(Settings(importance_samples=samples, lr_peak=rate, head_lr=rate), rows) == beyond


# ---- losses along lines ---------------------------------------------------------------------------------------------


def importance_of(model: SparseModel, states: BoundaryStates, rows: Rows, samples: range) -> Importance:
    found = find_important(model, states, rows, samples, 0.05, 2, 16, lambda _: None, projections="down")
    for name, weights in model.sparse_weights(states.start).items():
        weights.set_active(found.active[name], torch.zeros(len(found.active[name])))
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair") / "checkpoint", "qwen3_moe", 2, head=True)


def reference_loss(pair: Pair, rows: Rows, moved: dict[str, Tensor]) -> float:
    """By transformers' own model, one sequence at a time. moved: tensor -> what is added to it."""
    total, targets = 0.0, 0
    with torch.no_grad():
        for name, change in moved.items():
            pair.reference.get_parameter(name).add_(change)
        for row in range(len(rows)):
            batch = rows.batch([row])
            logits = pair.reference(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits  # fmt: skip
            labels = batch.labels[0, 1:]
            total += float(F.cross_entropy(logits[0, :-1], labels, reduction="sum", ignore_index=-100))
            targets += int((labels != -100).sum())
        for name, change in moved.items():
            pair.reference.get_parameter(name).sub_(change)
    return total / targets


@pytest.mark.parametrize("kind", ["experts", "head"])
def test_losses_along_a_line_are_those_of_transformers_with_the_weights_moved(pair: Pair, kind: str) -> None:
    rows = make_rows()
    states = pair.states(rows)
    found = importance_of(pair.model, states, rows, range(7))
    other = pair.states(rows)  # micro-batches may be of different sets
    line = Line(
        pair.model, [*parts_of(states, range(4), 2), *parts_of(other, range(4, 7), 2)], 16, found.gradients
    )  # fmt: skip
    weights = line.experts if kind == "experts" else line.head
    loss: Callable[[float], float] = getattr(line, f"loss_with_{kind}")
    at_rest = loss(0.0)
    for t in (1e-3, 0.03):
        moved = {}
        for name, own in weights.items():
            change = torch.zeros(own.numel, dtype=torch.float64)
            change[found.active[name]] = -t * found.gradients[name].double().sign()
            moved[name] = change.view(pair.reference.get_parameter(name).shape)
        assert any(bool(change.any()) for change in moved.values())
        assert loss(t) == pytest.approx(reference_loss(pair, rows, moved), abs=1e-6)
    assert loss(0.0) == at_rest  # nothing is left of it
    assert all(not bool(own.delta.any()) for own in {**line.experts, **line.head}.values())


@pytest.mark.parametrize("kind", ["experts", "head"])
def test_the_loss_falls_at_first_by_the_sum_of_the_gradients(pair: Pair, kind: str) -> None:
    """On the sequences that chose the weights: their gradients are those of this very loss."""
    rows = make_rows()
    states = pair.states(rows)
    found = importance_of(pair.model, states, rows, range(7))
    line = Line(pair.model, parts_of(states, range(7), 3), 16, found.gradients)
    slope = sum(float(found.gradients[n].abs().sum()) for n in (line.experts if kind == "experts" else line.head))
    loss: Callable[[float], float] = getattr(line, f"loss_with_{kind}")
    t = 1e-5
    assert slope > 0
    assert (loss(t) - loss(0.0)) / t == pytest.approx(-slope, rel=1e-2)


# ---- the rates ------------------------------------------------------------------------------------------------------


def measured(
    folder: Path, memory: Memory = PRIVATE, factor: float = 1.0, **settings: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Of a model whose up projections are divided, and down projections multiplied by `factor`: the same function."""
    model = random_model("qwen3_moe")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate_up_proj"):
                weight[:, weight.shape[1] // 2 :] /= factor
            elif name.endswith("experts.down_proj"):
                weight *= factor
    model.to(torch.bfloat16).save_pretrained(folder)
    ours = build(folder)
    assert open_head(ours)
    order = DataOrder(len(ROWS), 4, 2, seed=0)
    states = BoundaryStates(ours, ROWS, order.chunks, 2, torch.float32, {}, None)
    found = importance_of(ours, states, ROWS, range(8))
    points: list[int] = []
    rates, turns = measure_learning_rates(Settings(**settings), ours, states, ROWS, order, found, points.append, memory)
    assert len(points) == sum(turn.points + 1 for turn in turns.values())
    return rates, turns


def test_a_model_that_computes_the_same_with_larger_weights_gets_a_larger_turn(tmp_path: Path) -> None:
    """What no rule of widths sees: the rate of the experts goes with the root of it, the head's not at all."""
    rates, turns = measured(tmp_path / "a")
    scaled_rates, scaled = measured(tmp_path / "b", factor=4.0)
    assert scaled["lr_peak"].at == pytest.approx(4 * turns["lr_peak"].at, rel=0.05)
    assert scaled["head_lr"].at == pytest.approx(turns["head_lr"].at, rel=0.01)
    assert scaled_rates["lr_peak"] == pytest.approx(2 * rates["lr_peak"], rel=0.1)
    assert scaled_rates["head_lr"] == pytest.approx(rates["head_lr"], rel=0.05)


def test_rates_by_hand(tmp_path: Path) -> None:
    rates, turns = measured(tmp_path / "a")
    width = 2 / 64
    expected = min(math.sqrt(width * turns["lr_peak"].at), 2 * turns["lr_peak"].at)
    assert rates == {
        "lr_peak": pytest.approx(expected, rel=0.05), "head_lr": pytest.approx(turns["head_lr"].at / 4, rel=0.05),
    }  # fmt: skip
    assert measured(tmp_path / "a", lr_peak=1e-3)[0].keys() == {"head_lr"}
    assert measured(tmp_path / "a", head_lr=1e-3)[0].keys() == {"lr_peak"}
    assert measured(tmp_path / "a", lr_peak=1e-3, head_lr=1e-3)[0] == {}


def test_what_enters_the_trained_layers_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache, however many points the lines have; and wherever it lies meanwhile, the rates are the same."""
    monkeypatch.setattr(workspace, "SMALLEST_BYTES", 1)
    chosen = fresh_rows(DataOrder(len(ROWS), 4, 2, seed=0), ROWS, 8).trained
    asked: list[list[int]] = []
    hidden, begin = BoundaryStates.hidden, Line.__init__

    def noted(self: BoundaryStates, rows: list[int]) -> Tensor | None:
        asked.append(rows)
        return hidden(self, rows)

    def begun(self: Line, *args: Any) -> None:
        asked.clear()  # by importance
        begin(self, *args)

    monkeypatch.setattr(BoundaryStates, "hidden", noted)
    monkeypatch.setattr(Line, "__init__", begun)
    rates = measured(tmp_path / "a")[0]
    assert asked == [chosen[i : i + 2] for i in range(0, len(chosen), 2)]
    mapped = Workspace(tmp_path / "mapped")
    assert measured(tmp_path / "a", mapped)[0] == rates
    tokens = sum(2 * max(map(ROWS.length, chosen[i : i + 2])) for i in range(0, len(chosen), 2))  # with their padding
    assert mapped.bytes == 2 * tokens * 64 * 4  # and what enters the head


def test_a_gradient_that_leads_nowhere_leaves_the_rule_of_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Line, "loss_with_experts", lambda self, t: 1.0 + t)
    monkeypatch.setattr(Line, "loss_with_head", lambda self, t: 1.0 + t)
    rates, turns = measured(tmp_path / "a")
    assert turns["lr_peak"].at is turns["head_lr"].at is None
    assert rates == {"lr_peak": 0.031, "head_lr": 0.0078}


@pytest.mark.parametrize(("frac", "rate"), [(0.005, 1e-3), (0.02, 1e-3), (0.08, 5e-4)])
def test_the_rate_by_width_falls_with_the_root_of_the_density(frac: float, rate: float) -> None:
    assert rate_by_width(2000, frac) == pytest.approx(rate)
