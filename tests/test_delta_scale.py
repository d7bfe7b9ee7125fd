"""How much of the change counts: places whose loss is known, losses against transformers' eager experts, and runs."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import build_tokenizer, write_jsonl
from runs import World, copy_run, delta_tensors, events, on_event, read_json, same_delta, signal_at_step
from safetensors import safe_open
from test_importance import Pair, make_pair, make_rows
from test_learning_rate import reference_loss, rows_of
from test_train_command import evaluated, final_evaluations
from torch import Tensor

from usaf import delta_scale
from usaf.data import FEWEST
from usaf.delta import load_delta, partly
from usaf.delta_scale import (
    ENOUGH_TARGETS,
    LEAST_SEQUENCES,
    MOST_SEQUENCES,
    Change,
    Sequences,
    chosen_rows,
    lowest_place,
    measure_delta_scale,
    sequences_needed,
)
from usaf.session import prepare
from usaf.settings import ResolvedSettings, Settings
from usaf.trained_parts import open_norms
from usaf.trainer import Trainer

# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0.13, 0.3, 0.5, 0.77, 0.8, 0.9, 0.96, 1.0])
def test_the_lowest_place_of_a_parabola(where: float) -> None:
    asked: list[float] = []

    def loss(scale: float) -> float:
        asked.append(scale)
        return 2.0 + 3.0 * (scale - where) ** 2

    place, losses = lowest_place(loss)
    assert place == pytest.approx(where, abs=1e-9)
    assert asked[:3] == [1.0, 0.9, 0.8]
    assert len(set(asked)) == len(asked) <= max(3, math.ceil(10 * (1 - where) - 1e-9) + 2)  # none twice, none beyond
    assert losses == {scale: 2.0 + 3.0 * (scale - where) ** 2 for scale in asked}


def test_never_more_than_all_of_it_nor_nothing() -> None:
    assert lowest_place(lambda scale: (scale - 1.2) ** 2)[0] == 1.0
    assert lowest_place(lambda scale: -scale)[0] == 1.0  # no parabola goes through a line
    place, losses = lowest_place(lambda scale: scale)
    assert place == 0.1
    assert sorted(losses) == [i / 10 for i in range(1, 11)]
    assert lowest_place(lambda scale: (scale + 0.2) ** 2)[0] == 0.1


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_never_the_lowest(beyond: float) -> None:
    place, losses = lowest_place(lambda scale: beyond if scale > 0.85 else (scale - 0.4) ** 2)
    assert place == pytest.approx(0.4)
    assert losses[1.0] == losses[0.9] == math.inf
    assert lowest_place(lambda scale: beyond)[0] == 1.0
    assert lowest_place(lambda scale: beyond if scale > 0.95 else 1 - scale)[0] == 0.9


# ---- which sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "length", "expected"),
    [
        (64, 1025, 16),  # 1,024 targets each: the least
        (64, 257, 32),
        (64, 9, 64),
        (128, 9, 64),  # no more
        (40, 9, 40),  # as many as there are
        (40, 513, 16),
        (8, 9, 8),
    ],
)
def test_which_sequences(count: int, length: int, expected: int) -> None:
    """Spread over those that there are, since neighbours may be of one document."""
    chosen = chosen_rows(rows_of(count, length))
    assert len(chosen) == len(set(chosen)) == expected
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    gaps = [after - before for before, after in itertools.pairwise([*chosen, count])]
    assert max(gaps) - min(gaps) <= 1
    assert expected == min(count, sequences_needed(length - 1))
    assert (FEWEST, LEAST_SEQUENCES, ENOUGH_TARGETS, MOST_SEQUENCES) == (8, 16, 8192, 64)


# ---- the change -----------------------------------------------------------------------------------------------------


def test_a_change_goes_anywhere_and_back_to_the_bit() -> None:
    torch.manual_seed(0)
    start = {"router": torch.randn(4, 3), "delta": torch.zeros(9)}
    weights = {name: torch.nn.Parameter(torch.randn_like(weight)) for name, weight in start.items()}
    end = {name: weight.detach().clone() for name, weight in weights.items()}
    change = Change(weights, {"router": start["router"].clone(), "delta": None})
    for scale in (0.3, 1.7, 0.9, 1.0):
        change.move_to(scale)
        for name, weight in weights.items():
            expected = start[name].double() + scale * (end[name].double() - start[name].double())
            torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-6)
            assert scale != 1.0 or torch.equal(weight, end[name])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = make_pair(tmp_path_factory.mktemp("pair") / "checkpoint", "qwen3_moe", 2, head=True)
    open_norms(made.model, 2)
    return made


def test_losses_are_those_of_transformers_with_a_part_of_the_change(pair: Pair) -> None:
    """Of experts, head, routers and norms together."""
    torch.manual_seed(1)
    rows, model = make_rows(), pair.model
    whole = model.whole_weights(2, routers=True)
    base = {name: weight.detach().clone() for name, weight in whole.items()}
    changed: dict[str, Tensor] = {}
    for name, bank in model.sparse_weights(2).items():
        places = torch.randperm(bank.numel)[:50].sort().values
        bank.set_active(places, 0.3 * torch.randn(50))
        flat = torch.zeros(bank.numel, dtype=torch.float64)
        flat[places] = bank.delta.detach().double()
        changed[name] = flat.view(pair.reference.get_parameter(name).shape)
    with torch.no_grad():
        for name, weight in whole.items():
            weight.add_(0.2 * torch.randn_like(weight))
            changed[name] = (weight - base[name]).double()
    weights = {**{n: b.delta for n, b in model.sparse_weights(2).items()}, **whole}
    points: list[int] = []
    states = pair.states(rows)
    change = Change(weights, {**dict.fromkeys(model.sparse_weights(2)), **base})
    found = measure_delta_scale(Settings(microbatch=2), model, change, Sequences(states, True), points.append)
    assert (found.sequences, found.evaluated) == (len(rows), True)
    assert len(points) == len(found.losses) >= 3
    for scale, loss in found.losses.items():
        moved = {name: scale * change for name, change in changed.items()}
        assert loss == pytest.approx(reference_loss(pair, rows, moved), abs=1e-6)
    assert len(set(found.losses.values())) == len(found.losses)
    change.move_to(1.0)
    for name, weight in whole.items():
        torch.testing.assert_close(weight.detach().double(), base[name].double() + changed[name])


# ---- runs -----------------------------------------------------------------------------------------------------------

FAST: dict[str, object] = {"LR_PEAK": "0.03", "HEAD_LR": "0.03"}  # beyond what random tokens bear out


@pytest.fixture(scope="module")
def fast(world: World) -> Path:
    return world.finished("fast", **FAST)


def checkpoint_of(folder: Path, step: str = "step-000012") -> dict[str, Tensor]:
    with safe_open(folder / "checkpoints" / step / "state.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_run_measures_it_and_says_so(fast: Path) -> None:
    (event,) = events(fast, "delta_scale")
    settings = read_json(fast / "settings.json")["settings"]
    assert 0.1 <= event["scale"] < 0.9
    assert settings["DELTA_SCALE"] == {"value": event["scale"], "source": "measured"}
    assert read_json(fast / "summary.json")["delta_scale"] == event["scale"]
    assert load_delta(fast / "delta.safetensors").about["settings"]["DELTA_SCALE"]["value"] == event["scale"]
    assert FEWEST <= event["sequences"] <= 38 - 24  # what 12 steps of 2 leave
    losses = {float(place): loss for place, loss in event["losses"].items()}
    assert abs(event["scale"] - min(losses, key=lambda place: losses[place])) <= 0.1
    assert "delta scale" in [e["name"] for e in events(fast, "phase")]
    assert event["evaluated"] is False


def test_it_is_measured_on_what_nothing_trained_on_or_evaluates(
    world: World, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_on: list[tuple[int, ...]] = []
    begin = delta_scale.Probe.__init__

    def begun(self: Any, model: Any, parts: Any, *args: Any) -> None:
        measured_on.extend(
            tuple(states.rows.batch([row]).input_ids[0].tolist()) for states, rows in parts for row in rows
        )
        begin(self, model, parts, *args)

    monkeypatch.setattr(delta_scale.Probe, "__init__", begun)
    assert world.train("again", **FAST) == 0
    assert same_delta(world.runs / "again", fast)
    stored = read_json(fast / "settings.json")
    data = prepare(ResolvedSettings.from_json(stored["settings"]), stored["decisions"]).data
    others = {
        tuple(rows.batch([row]).input_ids[0].tolist())
        for rows in (data.train, data.in_domain, *data.heldout.values()) for row in range(len(rows))
    }  # fmt: skip
    assert len(set(measured_on)) == events(fast, "delta_scale")[0]["sequences"]
    assert not set(measured_on) & others


def test_what_is_saved_is_that_part_of_the_checkpoint(world: World, fast: Path) -> None:
    """And the run's last evaluation is of it, while its checkpoint keeps all."""
    scale = events(fast, "delta_scale")[0]["scale"]
    state, saved, first = checkpoint_of(fast), delta_tensors(fast), world.finished("first", **FAST, STEPS="1")
    base = {n.removeprefix("whole/"): t for n, t in checkpoint_of(first, "step-000000").items() if n[:6] == "whole/"}
    assert base
    for name, tensor in saved.items():
        stem, _, part = name.rpartition(".")
        if part == "values":
            assert torch.equal(tensor, (scale * state[f"delta/{stem}"]).half())
        elif part == "indices":
            assert torch.equal(tensor.long(), state[f"active/{stem}"])
        else:
            assert torch.equal(tensor, partly(state[f"whole/{name}"], scale, base[name]))
            assert not torch.equal(tensor, state[f"whole/{name}"])
    reloaded = {e["name"]: e["loss"] for e in evaluated(fast, world.root)}
    assert reloaded == {name: e["loss"] for name, e in final_evaluations(fast).items()}


def test_a_finished_run_can_be_finished_again_with_all_of_it(world: World, fast: Path) -> None:
    whole = world.finished("whole", **FAST, DELTA_SCALE="1")
    assert [(e["scale"], e["losses"]) for e in events(whole, "delta_scale")] == [(1.0, {})]
    assert not same_delta(whole, fast)
    again = copy_run(fast, world.runs / "all-again")
    assert world.train(None, RESUME=again, DELTA_SCALE="1", **FAST) == 0
    assert same_delta(again, whole)
    part = copy_run(whole, world.runs / "part")
    scale = events(fast, "delta_scale")[0]["scale"]
    assert world.train(None, RESUME=part, DELTA_SCALE=scale, **FAST) == 0
    assert same_delta(part, fast)
    for one, other in ((again, whole), (part, fast)):
        assert {n: e["loss"] for n, e in final_evaluations(one).items()} == {
            n: e["loss"] for n, e in final_evaluations(other).items()
        }


def test_a_run_that_ends_while_it_is_measured_goes_on(
    world: World, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_event(patch, lambda event, v: event == "delta_scale", lambda: signal.raise_signal(signal.SIGTERM))
        assert world.train("ended", **FAST) == 130
    assert not (world.runs / "ended" / "delta.safetensors").exists()
    assert world.train("ended", RESUME="auto", **FAST) == 0
    assert same_delta(world.runs / "ended", fast)
    (event,) = events(world.runs / "ended", "delta_scale")  # the first is behind the last checkpoint
    assert event["scale"] == events(fast, "delta_scale")[0]["scale"]


@pytest.mark.parametrize("settings", [{"STEPS": None, "EPOCHS": 1}, {"STEPS": 18}])
def test_data_that_leave_too_few_sequences_keep_all_of_it(
    world: World, capsys: pytest.CaptureFixture[str], settings: dict[str, object]
) -> None:
    """38 samples train: an epoch takes all of them, 18 steps 36; two are held back."""
    tag = f"few-{settings.get('STEPS')}"
    assert world.train(tag, **{**FAST, **settings}) == 0
    (event,) = events(world.runs / tag, "delta_scale")
    assert event == {**event, "scale": 1.0, "sequences": 0, "evaluated": False, "losses": {}}
    out = capsys.readouterr().out
    assert "settled: DELTA_SCALE = 1 (to measure it there are not 8 sequences, of as many samples, that neither" in out
    assert world.train(f"{tag}-all", **{**FAST, **settings, "DELTA_SCALE": 1}) == 0
    assert same_delta(world.runs / tag, world.runs / f"{tag}-all")


EPOCH: dict[str, object] = {**FAST, "STEPS": None, "EPOCHS": 1, "IN_DOMAIN_FRACTION": "0.4"}


@pytest.mark.parametrize(
    ("evaluated", "expected"), [(4, (12, False)), (8, (8, False)), (9, (16, True)), (0, (16, True))]
)
def test_an_epoch_is_measured_on_samples_held_back(
    world: World, evaluated: int, expected: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 of 40: on those that are not evaluated, or where they are too few, on all; a resumed run does the same."""
    tag = f"epoch-{evaluated}"
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 3)
        assert world.train(tag, **EPOCH, EVAL_SAMPLES=evaluated) == 130
    assert world.train(tag, **EPOCH, EVAL_SAMPLES=evaluated, RESUME="auto") == 0
    folder = world.finished(f"{tag}-through", **EPOCH, EVAL_SAMPLES=evaluated)
    assert same_delta(world.runs / tag, folder)
    (event,) = events(folder, "delta_scale")
    assert (event["sequences"], event["evaluated"]) == expected
    assert len(event["losses"]) >= 3
    (resumed,) = events(world.runs / tag, "delta_scale")
    assert {**resumed, "time": 0} == {**event, "time": 0}
    if evaluated == 0:  # the same sequences
        whole = world.finished("epoch-whole", **EPOCH, EVAL_SAMPLES=0, DELTA_SCALE=1)
        assert final_evaluations(whole)["in_domain"]["loss"] == pytest.approx(event["losses"]["1"], abs=1e-4)


def test_one_long_document_does_not_say_how_much_counts(tmp_path: Path) -> None:
    """Two of 32 documents are held back, of many rows each."""
    world = text_world(tmp_path)
    world.data = write_jsonl(tmp_path / "long.jsonl", [{"text": f"{i} {i % 7} hello " * 40} for i in range(32)])
    given = {**FAST, "STEPS": None, "EPOCHS": 1, "SEQ_LEN": 32, "EVAL_SAMPLES": 8, "MICROBATCH": 64}
    assert world.train("long", **given) == 0
    (event,) = events(world.runs / "long", "delta_scale")
    assert (event["scale"], event["sequences"]) == (1.0, 0)
    data = prepare(ResolvedSettings.from_json(read_json(world.runs / "long" / "settings.json")["settings"])).data
    assert (data.in_domain.samples, data.unseen.samples, data.untrained.samples) == (1, 1, 2)
    assert len(data.untrained) >= FEWEST
    assert world.train("longer", **given, IN_DOMAIN_FRACTION=0.25) == 0
    (event,) = events(world.runs / "longer", "delta_scale")
    assert event["sequences"] >= FEWEST
    assert event["evaluated"]  # of all 8 that are held back, of which evaluation takes one


def text_world(root: Path) -> World:
    """Its data are documents of four rows of 32 tokens, some 250 rows."""
    tokenizer = build_tokenizer()
    world = World(root, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(world.model)
    texts = [{"text": f"{i} {j} hello " * 13} for i in range(16) for j in range(4)]
    world.data, world.other = (write_jsonl(root / f"{n}.jsonl", texts[k:]) for n, k in (("text", 0), ("rest", 60)))
    return world


@pytest.mark.parametrize("samples", [8, 100])
def test_text_that_ends_soon_is_measured_alike_by_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Whose rates are set when it reads the data; and by one that is begun with DELTA_SCALE=1 and finished again."""
    world = text_world(tmp_path)
    few: dict[str, object] = {"STEPS": 9, "LR_PEAK": None, "IMPORTANCE_SAMPLES": samples, "SEQ_LEN": 32}
    assert world.train("through", **few) == 0
    assert events(world.runs / "through", "delta_scale")[0]["sequences"] > 0
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 3)
        assert world.train("resumed", **few) == 130
    assert world.train("resumed", **{**few, "RESUME": "auto"}) == 0
    assert same_delta(world.runs / "through", world.runs / "resumed")
    one, other = (events(world.runs / tag, "delta_scale")[0] for tag in ("through", "resumed"))
    assert (one["scale"], one["losses"]) == (other["scale"], other["losses"])
    assert world.train("whole", **few, DELTA_SCALE=1) == 0
    for kind in ("learning_rate", "step"):
        found = [[e.get("rate", e.get("loss")) for e in events(world.runs / tag, kind)] for tag in ("through", "whole")]
        assert found[0] == found[1]


@pytest.mark.parametrize("changes", [{"TRAIN_FROM": "0"}, {"ROUTER_LR": "0", "TRAIN_NORMS": "0", "TRAIN_HEAD": "0"}])
def test_whatever_trains_is_measured(world: World, changes: dict[str, object]) -> None:
    folder = world.finished("-".join(changes), **{**FAST, **changes})
    assert len(events(folder, "delta_scale")[0]["losses"]) >= 3
    assert {e["name"]: e["loss"] for e in evaluated(folder, world.root)} == {
        name: e["loss"] for name, e in final_evaluations(folder).items()
    }


@pytest.mark.parametrize("scale", ["1", "0.5", None])
def test_gradients_make_room(world: World, scale: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left: list[bool] = []
    rounded = Trainer.round_deltas
    monkeypatch.setattr(
        Trainer, "round_deltas",
        lambda self: (left.extend(w.grad is not None for w in self.parameters().values()), rounded(self))[1],
    )  # fmt: skip
    assert world.train(tmp_path.name, **{**FAST, "STEPS": 2, "DELTA_SCALE": scale}) == 0
    assert len(left) > 2
    assert not any(left)


def test_old_runs_had_all_of_it(world: World, fast: Path) -> None:
    stored = read_json(fast / "settings.json")["settings"]
    del stored["DELTA_SCALE"]
    assert ResolvedSettings.from_json(stored).values.delta_scale == 1.0


def test_memory_for_it_may_lie_in_files(world: World, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usaf import workspace

    kept: list[Callable[..., Any]] = []
    monkeypatch.setattr(workspace, "SMALLEST_BYTES", 1)
    own = delta_scale.Probe.__init__

    def begun(self: Any, model: Any, parts: Any, chunk: int, memory: Any) -> None:
        kept.append(memory)
        own(self, model, parts, chunk, memory)

    monkeypatch.setattr(delta_scale.Probe, "__init__", begun)
    monkeypatch.setattr("usaf.session.Session.workspace", lambda self, what: workspace.Workspace(world.root / "mapped"))
    assert world.train("mapped", **FAST) == 0
    assert same_delta(world.runs / "mapped", fast)
    assert isinstance(kept[-1], workspace.Workspace)
    assert kept[-1].bytes > 0
