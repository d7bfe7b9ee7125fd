"""The training loop against a dense reference: transformers' eager model, dense gradients, torch's own optimizer."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import usaf.trainer
from usaf.data import NO_TARGET, DataOrder, Rows, pack
from usaf.errors import RunError
from usaf.fused_experts import Capture, ExpertLayer
from usaf.loss import count_targets
from usaf.model import SparseModel
from usaf.optimizer import learning_rate_at
from usaf.prefix import BoundaryStates
from usaf.run import RunFolder, SavedState, load_checkpoint
from usaf.selection import drop_fraction_at
from usaf.settings import Settings
from usaf.sparse_head import SparseHead
from usaf.trained_parts import open_head, open_norms
from usaf.trainer import ReselectResult, StepResult, Trainer

START = 1  # of three layers
RESELECTING: dict[str, Any] = {"reselect_every": 3, "capture_steps": 2, "drop_fraction": 0.4}  # after steps 3 and 6
BETAS = (0.9, 0.999)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe", num_hidden_layers=3)


@pytest.fixture
def model(folder: Path) -> SparseModel:
    return families.build(folder)


@pytest.fixture(params=["experts", "head and norms", "shared head"])
def parts(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by what is to train of it: experts and routers alone; head and norms too, the head its own tensor
    or the embeddings'."""
    if request.param != "shared head":
        return folder
    return families.write_checkpoint(
        tmp_path_factory.mktemp("tied"), "qwen3_moe", num_hidden_layers=3, tie_word_embeddings=True
    )


@pytest.fixture
def opened(request: pytest.FixtureRequest, parts: Path) -> SparseModel:
    model = families.build(parts)
    if request.node.callspec.params["parts"] != "experts":
        assert open_head(model)
        open_norms(model, START)
    return model


def learnable_rows(samples: int = 16) -> Rows:
    """Rows of unequal lengths, some with prompts that are no targets; each next id is a function of the last."""
    rng = np.random.default_rng(1)
    successor = np.random.default_rng(2).permutation(families.VOCAB)
    documents = []
    for i in range(samples):
        ids = [int(rng.integers(3, families.VOCAB))]
        while len(ids) < 8 + 3 * (i % 5):
            ids.append(int(successor[ids[-1]]))
        prompt = (0, 5, 2)[i % 3]
        documents.append((ids, [NO_TARGET] * prompt + ids[prompt:]))
    return pack(documents, None, None, split_long=False, one_document_per_row=True)


ROWS = learnable_rows()


def random_active(bank_numel: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(bank_numel, generator=generator)[:count].sort().values


def make_trainer(model: SparseModel, steps: int = 12, share: float = 0.05, **settings: Any) -> Trainer:
    values = Settings(
        **{"microbatch": 2, "reselect_every": 0, "lr_peak": 5e-3, "head_lr": 2e-3, "router_lr": 1e-3, **settings}
    )
    order = DataOrder(len(ROWS), 4, values.microbatch, seed=0)
    states = BoundaryStates(model, ROWS, order.chunks, START, torch.float32, {}, None)
    trainer = Trainer(model, states, ROWS, order, values, steps)
    trainer.activate(
        {name: random_active(b.numel, int(share * b.numel), i) for i, (name, b) in enumerate(trainer.banks.items())}
    )
    return trainer


def advance(trainer: Trainer, steps: int) -> list[tuple[StepResult, ReselectResult | None]]:
    return [(trainer.train_step(), trainer.reselect_if_due()) for _ in range(steps)]


def snapshot(trainer: Trainer) -> SavedState:
    """A state that later steps do not change."""
    state = trainer.state()
    return SavedState({name: t.clone() for name, t in state.tensors.items()}, copy.deepcopy(state.about))


def assert_same_state(a: SavedState, b: SavedState, ignore: str = "random.") -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        if not name.startswith(ignore):
            assert torch.equal(tensor, b.tensors[name]), name
    assert a.about == b.about


# ---- a dense reference ----------------------------------------------------------------------------------------------


class DenseReference:
    """transformers' own model with the dequantised experts as dense weights, all of whose gradients are formed."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.trainer = trainer
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        families.base_into(self.model, trainer.model)
        self.base = {name: self.model.get_parameter(name).detach().clone() for name in trainer.banks}
        self.model.requires_grad_(False)
        self.experts = {name: self.model.get_parameter(name).requires_grad_() for name in trainer.banks}
        self.whole = {name: self.model.get_parameter(name).requires_grad_() for name in trainer.whole()}
        self.routers = {name: weight for name, weight in self.whole.items() if name in trainer.routers}
        self.norms = {name: weight for name, weight in self.whole.items() if name not in trainer.routers}

    @torch.no_grad()
    def set_deltas(self, active: dict[str, Tensor], deltas: dict[str, Tensor]) -> None:
        for name, parameter in self.experts.items():
            parameter.copy_(self.base[name])
            parameter.view(-1)[active[name]] += deltas[name]

    def follow(self) -> None:
        """Take over the trainer's present weights."""
        self.set_deltas(
            {n: b.active for n, b in self.trainer.banks.items()},
            {n: b.delta.detach() for n, b in self.trainer.banks.items()},
        )
        for name, parameter in self.whole.items():
            parameter.data.copy_(self.trainer.whole()[name].detach())

    def backward(self, step: int) -> float:
        """The mean loss over all targets of a step's sequences, one sequence at a time; leaves dense gradients."""
        settings = self.trainer.settings
        rows = [
            row
            for i in range(settings.accum)
            for row in self.trainer.order.micro_batch(step * settings.accum + i)
        ]  # fmt: skip
        batches = [ROWS.batch([row]) for row in rows]
        targets = sum(count_targets(batch) for batch in batches)
        self.model.zero_grad()
        total = 0.0
        for batch in batches:
            logits = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0, :-1]
            loss = F.cross_entropy(logits, batch.labels[0, 1:], ignore_index=NO_TARGET, reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        return total

    def gradient(self, name: str) -> Tensor:
        grad = self.experts[name].grad
        assert grad is not None
        return grad.reshape(-1)


@pytest.mark.parametrize("settings", [
    {"grad_clip": 100.0},
    {"grad_clip": 0.05, "weight_decay": 20.0},
    {"grad_clip": 0.05, "accum": 2, "microbatch": 1},
    {"router_lr": 0.0},
], ids=["plain", "clip-decay", "accum", "router-frozen"])  # fmt: skip
def test_steps_equal_the_dense_reference(parts: Path, opened: SparseModel, settings: dict[str, Any]) -> None:
    trainer = make_trainer(opened, **settings)
    reference = DenseReference(parts, trainer)
    assert len(reference.norms) == (0 if opened.head is None else 2 * 4 + 1)  # qwen's layers have four, and the last
    active = {name: bank.active.clone() for name, bank in trainer.banks.items()}
    deltas = {name: nn.Parameter(torch.zeros(len(indices))) for name, indices in active.items()}
    values = trainer.settings
    of_head = [delta for name, delta in deltas.items() if name == opened.head_name]
    optimizer = torch.optim.AdamW(
        [{"params": [d for n, d in deltas.items() if n != opened.head_name], "weight_decay": values.weight_decay},
         {"params": of_head or [nn.Parameter(torch.zeros(1))], "weight_decay": values.weight_decay},
         {"params": list(reference.norms.values()) or [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0},
         {"params": list(reference.routers.values()) or [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}],
        betas=BETAS, eps=1e-8,
    )  # fmt: skip
    for step in range(3):
        reference.set_deltas(active, {n: d.detach() for n, d in deltas.items()})
        expected_loss = reference.backward(step)
        for name, delta in deltas.items():
            delta.grad = reference.gradient(name)[active[name]]
        norm = nn.utils.clip_grad_norm_([*deltas.values(), *reference.whole.values()], values.grad_clip)
        peaks = (values.lr_peak, values.head_lr, values.lr_peak, values.router_lr)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate_at(step, trainer.steps, peak, values.warmup, values.lr_floor)
        optimizer.step()
        result = trainer.train_step()
        assert result.loss == pytest.approx(expected_loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, bank in trainer.banks.items():
        peak = values.head_lr if name == opened.head_name else values.lr_peak
        off = (bank.delta.detach() - deltas[name].detach()).abs()
        # Adam divides by sqrt(v): where a gradient is nothing but rounding its sign is anybody's
        assert float((off > 1e-2 * peak).float().mean()) < 0.002, (name, float(off.max()))
        assert float(bank.delta.detach().abs().max()) > peak
    for name, weight in trainer.whole().items():
        off = (weight.detach() - reference.whole[name].detach()).abs()
        assert float((off > 1e-4).float().mean()) < (0.005 if name in trainer.routers else 0.05), (name, off.max())
    assert bool(trainer.routers) == (values.router_lr > 0)


def test_the_loss_falls(model: SparseModel) -> None:
    trainer = make_trainer(model, steps=30, lr_peak=2e-2, reselect_every=10)
    results: list[tuple[StepResult, ReselectResult | None]] = []

    def keep(step: StepResult, reselection: ReselectResult | None) -> bool:
        results.append((step, reselection))
        return True

    trainer.run(keep)
    losses = [step.loss for step, _ in results]
    assert [step.step for step, _ in results] == list(range(1, 31))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert trainer.losses == {"first": losses[:3], "last": losses[-3:]}
    assert all(step.tokens > 0 and step.seconds > 0 and not step.skipped for step, _ in results)


def test_run_stops_when_told(model: SparseModel) -> None:
    trainer = make_trainer(model)
    trainer.run(lambda step, _: step.step < 2)
    assert trainer.step == 2


def test_accumulation_equals_a_larger_micro_batch(folder: Path) -> None:
    """The rows of a step have unequal numbers of targets, so a mean of means would differ."""
    one, two = make_trainer(families.build(folder)), make_trainer(families.build(folder), microbatch=1, accum=2)
    targets = [count_targets(ROWS.batch([row])) for row in two.order.micro_batch(0) + two.order.micro_batch(1)]
    assert targets[0] != targets[1]
    for (a, _), (b, _) in zip(advance(one, 4), advance(two, 4), strict=True):
        assert (a.tokens, a.step) == (b.tokens, b.step)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    for name, parameter in one.parameters().items():
        off = (parameter - two.parameters()[name]).detach().abs()
        assert float((off > 1e-2 * 5e-3).float().mean()) < 0.002, name


# ---- the router -----------------------------------------------------------------------------------------------------


def test_a_frozen_router_stays_and_is_not_in_the_delta(model: SparseModel) -> None:
    routers = {moe.router_name: moe.router_weight.detach().clone() for moe in model.moe}
    make_trainer(model)  # whatever an earlier trainer of the same model trained
    trainer = make_trainer(model, router_lr=0.0)
    results = advance(trainer, 3)
    for moe in model.moe:
        assert torch.equal(moe.router_weight, routers[moe.router_name])
        assert moe.router_weight.grad is None
    assert {step.router_learning_rate for step, _ in results} == {0.0}
    delta = trainer.delta({})
    assert delta.whole == {}
    assert delta.sparse.keys() == trainer.banks.keys()


def test_the_delta_holds_what_trained(opened: SparseModel) -> None:
    model, trainer = opened, make_trainer(opened)
    advance(trainer, 2)
    delta = trainer.delta({"step": 2})
    assert delta.whole.keys() == {moe.router_name for moe in model.moe if moe.layer >= START} | model.norms.keys()
    assert ("lm_head.weight" in delta.sparse) == (model.head is not None)
    for name, (indices, values) in delta.sparse.items():
        assert torch.equal(indices, trainer.banks[name].active)
        assert torch.equal(values, trainer.banks[name].delta)
    assert (delta.base_fingerprint, delta.about) == (model.base_fingerprint, {"step": 2})


def test_deltas_are_rounded_to_what_is_saved(model: SparseModel) -> None:
    """To the nearest of fp16, where they fit into it; in fp32 nothing changes."""
    trainer = make_trainer(model)
    advance(trainer, 2)
    trained = {name: bank.delta.detach().clone() for name, bank in trainer.banks.items()}
    trainer.settings = dataclasses.replace(trainer.settings, delta_dtype="fp32")
    trainer.round_deltas()
    assert all(torch.equal(bank.delta, trained[name]) for name, bank in trainer.banks.items())
    trainer.settings = dataclasses.replace(trainer.settings, delta_dtype="fp16")
    large = next(iter(trainer.banks))
    trained[large][0] = trainer.banks[large].delta.data[0] = 7e4
    trainer.round_deltas()
    for name, bank in trainer.banks.items():
        expected = trained[name] if name == large else torch.from_numpy(trained[name].numpy().astype("float16"))
        assert torch.equal(bank.delta, expected.float())
        assert bank.delta.requires_grad
    assert not all(torch.equal(bank.delta, trained[name]) for name, bank in trainer.banks.items())


# ---- when to reselect -----------------------------------------------------------------------------------------------


def schedule(model: SparseModel, steps: int, **settings: Any) -> tuple[list[int], list[int]]:
    """(the steps, from 1, that capture; those that a reselection follows)."""
    trainer = make_trainer(model, steps, **settings)
    capturing, reselected = [], []

    def after_step(step: StepResult, reselection: ReselectResult | None) -> bool:
        if trainer.in_capture_window() or reselection is not None:
            capturing.append(step.step)
        if reselection is not None:
            assert reselection.step == step.step
            reselected.append(step.step)
            assert not trainer.in_capture_window()
        return True

    trainer.run(after_step)
    return capturing, reselected


@pytest.mark.parametrize(("settings", "capturing", "reselected"), [
    ({"reselect_every": 3, "capture_steps": 1}, [3, 6], [3, 6]),
    ({"reselect_every": 3, "capture_steps": 2}, [2, 3, 5, 6], [3, 6]),
    ({"reselect_every": 3, "capture_steps": 3}, [1, 2, 3, 4, 5, 6], [3, 6]),
    ({"reselect_every": 2, "capture_steps": 4}, [1, 2, 3, 4, 5, 6], [2, 4, 6]),
    ({"reselect_every": 1, "capture_steps": 4, "reselect_until": 0.2}, [1, 2], [1, 2]),
    ({"reselect_every": 7}, [], []),
    ({"reselect_every": 5, "capture_steps": 1, "reselect_until": 1.0}, [5], [5]),
    ({"reselect_every": 2, "capture_steps": 1, "reselect_until": 1.0}, [2, 4, 6, 8], [2, 4, 6, 8]),
    ({"reselect_every": 3, "reselect_until": 0.0}, [], []),
    ({"reselect_every": 0}, [], []),
    ({"reselect_every": 3, "drop_fraction": 0.0}, [], []),
    ({"reselect_every": 20}, [], []),
], ids=str)  # fmt: skip
def test_schedule(
    model: SparseModel, settings: dict[str, Any], capturing: list[int], reselected: list[int]
) -> None:  # fmt: skip
    """Of ten steps, the last at or before RESELECT_UNTIL (0.6) and never the run's last."""
    assert schedule(model, 10, **settings) == (capturing, reselected)


def test_reselect_until_is_not_a_step_early_by_rounding(model: SparseModel) -> None:
    trainer = make_trainer(model, 100, reselect_every=29, reselect_until=0.29)  # 0.29 * 100 = 28.999999999999996
    assert trainer.next_reselection() == 29


@pytest.mark.parametrize("off", [{"reselect_every": 0}, {"reselect_every": 3, "drop_fraction": 0.0},
                                 {"reselect_every": 3, "drop_fraction": 1e-9, "capture_steps": 2}],
                         ids=["static mask", "nothing dropped", "captured, but too little to drop"])  # fmt: skip
def test_no_reselection_means_the_same_bits(folder: Path, off: dict[str, Any]) -> None:
    static, other = make_trainer(families.build(folder)), make_trainer(families.build(folder), **off)
    active = {name: bank.active.clone() for name, bank in static.banks.items()}
    a = [step.loss for step, _ in advance(static, 12)]
    b = [step.loss for step, _ in advance(other, 12)]
    assert a == b
    assert_same_state(static.state(), other.state())
    assert all(torch.equal(bank.active, active[name]) for name, bank in static.banks.items())


# ---- what a reselection does ----------------------------------------------------------------------------------------


def entries(active: Tensor, *values: Tensor) -> dict[int, tuple[float, ...]]:
    return {int(i): row for i, row in zip(active, zip(*(v.tolist() for v in values), strict=True), strict=True)}


def adam_entries(trainer: Trainer, name: str) -> dict[int, tuple[float, ...]]:
    """Flat index -> (delta, both moments, age)."""
    bank, adam = trainer.banks[name], trainer.adam[name]
    ages = adam.updates - torch.tensor(adam.births)[adam.generation.long()]
    return entries(bank.active, bank.delta.detach(), adam.exp_avg, adam.exp_avg_sq, ages)


@pytest.mark.parametrize("settings", [
    {"grad_clip": 100.0},
    {"grad_clip": 0.2, "accum": 2, "microbatch": 1},
], ids=["plain", "clipped, two micro-batches"])  # fmt: skip
def test_reselection_by_brute_force(parts: Path, opened: SparseModel, settings: dict[str, Any]) -> None:
    """Against the dense gradients of the captured steps, clipped as their steps were, from transformers' own model."""
    trainer = make_trainer(opened, **RESELECTING, **settings)
    reference = DenseReference(parts, trainer)
    window: list[dict[str, Tensor]] = []
    scales = []
    for step in range(3):
        reference.follow()
        reference.backward(step)
        tracked = [reference.gradient(name)[bank.active] for name, bank in trainer.banks.items()]
        tracked += [weight.grad.reshape(-1) for weight in reference.whole.values()]
        scales.append(min(1.0, trainer.settings.grad_clip / (float(torch.cat(tracked).norm()) + 1e-6)))
        if step >= 1:  # CAPTURE_STEPS=2: steps 2 and 3
            window.append({name: reference.gradient(name).clone() * scales[-1] for name in trainer.banks})
        trainer.train_step()
    assert (len(set(scales)) == 3) == (trainer.settings.grad_clip < 1)

    before = {name: adam_entries(trainer, name) for name in trainer.banks}
    result = trainer.reselect_if_due()
    fraction = drop_fraction_at(3, 8, 0.4)  # the cosine ends after step 7, the last at or before 0.6 * 12
    assert fraction == pytest.approx(0.2 * (1 + math.cos(math.pi * 3 / 8)))
    exchanged = 0
    for name, bank in trainer.banks.items():
        count = int(fraction * len(before[name]))
        exchanged += count
        by_size = sorted(before[name], key=lambda i: (abs(before[name][i][0]), i))
        dropped, kept = set(by_size[:count]), set(by_size[count:])
        mean = torch.stack([gradients[name] for gradients in window]).mean(0)
        square = torch.stack([gradients[name] ** 2 for gradients in window]).mean(0)
        score = mean.abs()
        score[torch.tensor(sorted(kept))] = -1.0
        threshold = float(score.topk(count).values[-1])
        after = adam_entries(trainer, name)
        grown = set(after) - kept
        assert kept <= set(after)
        assert len(after) == len(before[name])
        assert torch.equal(bank.active, bank.active.unique())
        # The count-th place goes to the larger one even where two gradients differ by rounding alone, so the sets
        # may differ there, and nowhere else.
        for index in grown ^ set(score.topk(count).indices.tolist()):
            assert float(score[index]) == pytest.approx(threshold, rel=1e-4), name
        assert all(after[i] == before[name][i] for i in kept), "kept weights: delta, moments and age to the bit"
        for i in grown:
            delta, exp_avg, exp_avg_sq, age = after[i]
            assert (delta, age) == (0.0, 2)
            assert exp_avg == pytest.approx((1 - BETAS[0] ** 2) * float(mean[i]), rel=1e-3, abs=1e-9)
            assert exp_avg_sq == pytest.approx((1 - BETAS[1] ** 2) * float(square[i]), rel=2e-3, abs=1e-14)
        for i in dropped | grown:
            e, within = divmod(i, bank.part_size)
            base = bank.base_weight(e, torch.float32).reshape(-1)[within]
            now = bank.block(e, torch.float32) if isinstance(bank, SparseHead) else bank.weight(e, torch.float32)
            assert torch.equal(now.reshape(-1)[within], base), "not at its base value"
    assert result == ReselectResult(3, trainer.active_parameters(), exchanged, exchanged)
    assert result.turnover == exchanged / trainer.active_parameters()
    assert exchanged > 0


def test_captured_pairs_are_freed(model: SparseModel) -> None:
    trainer = make_trainer(model, **RESELECTING)
    advance(trainer, 2)
    assert all(len(captured) == 1 for captured in trainer.captured.values())
    advance(trainer, 1)
    assert not any(trainer.captured.values())
    assert all(bank.captured is None for bank in trainer.banks.values())
    assert not any(name.startswith("captured/") for name in trainer.state().tensors)


def test_density_one_has_nothing_to_grow(model: SparseModel) -> None:
    trainer = make_trainer(model, share=1.0, **RESELECTING)
    (_, result) = advance(trainer, 3)[-1]
    assert result is not None
    assert (result.dropped, result.grown) == (0, 0)
    assert not trainer.in_capture_window()


# ---- steps that are not finite --------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], loss: float, gradient: float) -> None:
    """Micro-batches, counted from 0, for which `bad` holds get this loss and this factor on the gradient."""
    true, calls = usaf.trainer.loss_and_gradient, iter(range(10**6))

    def wrapped(*args: Any) -> tuple[float, Tensor]:
        found, slope = true(*args)
        return (found + loss, slope * gradient) if bad(next(calls)) else (found, slope)

    monkeypatch.setattr(usaf.trainer, "loss_and_gradient", wrapped)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("accum", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(
    model: SparseModel, monkeypatch: pytest.MonkeyPatch, loss: float, accum: int
) -> None:
    """With accum=2 the second micro-batch is whole, and its gradient and captures must not be used either."""
    trainer = make_trainer(model, accum=accum, microbatch=2 // accum, **RESELECTING)
    poison(monkeypatch, lambda call: call == accum, loss, 1.0 if loss else float("inf"))  # in step 2, which captures
    advance(trainer, 1)
    before = snapshot(trainer)
    ((step, _),) = advance(trainer, 1)
    assert step.skipped
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row) == (2, 1, 1)
    after = trainer.state()
    assert_same_state(before, SavedState(after.tensors, {**before.about}))
    assert not trainer.in_capture_window()
    ((step, reselection),) = advance(trainer, 1)
    assert not step.skipped
    assert reselection is not None
    assert trainer.skipped_in_a_row == 0
    for name in trainer.banks:  # one captured step is left
        assert {age for _, _, _, age in adam_entries(trainer, name).values()} == {2, 1}
    assert math.isfinite(advance(trainer, 1)[0][0].loss)


def test_a_window_without_any_good_step_reselects_nothing(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(model, **RESELECTING)
    active = {name: bank.active.clone() for name, bank in trainer.banks.items()}
    poison(monkeypatch, lambda call: call in (1, 2), float("nan"), 1.0)
    results = advance(trainer, 6)
    assert [step.skipped for step, _ in results] == [False, True, True, False, False, False]
    assert [reselection is not None for _, reselection in results] == [False] * 5 + [True]
    assert not all(torch.equal(bank.active, active[name]) for name, bank in trainer.banks.items())


def test_an_overflow_that_no_active_weight_sees_is_found(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured gradients hold all experts' pairs; the norm only the active weights'."""
    trainer = make_trainer(model, router_lr=0.0, **RESELECTING)
    for bank in trainer.banks.values():  # one active expert a bank
        active = bank.active[: bank.part_starts[1]]
        bank.set_active(active, torch.zeros(len(active)))
    trainer.activate({name: bank.active for name, bank in trainer.banks.items()})
    lowest = trainer.trained[0].banks[0]  # nothing below it takes its gradients any further
    true = Capture.hand_over

    def spoil(capture: Capture, layer: ExpertLayer, *args: Any) -> None:
        true(capture, layer, *args)
        if layer.up is lowest and trainer.step == 1 and lowest.captured:
            lowest.captured[-1].grad_outputs[-1] = float("inf")

    monkeypatch.setattr(Capture, "hand_over", spoil)
    results = advance(trainer, 3)
    assert math.isfinite(results[1][0].loss)
    assert math.isfinite(results[1][0].grad_norm)
    assert [step.skipped for step, _ in results] == [False, True, False]


def test_five_in_a_row_end_the_run(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(model)
    poison(monkeypatch, lambda call: call != 4, float("nan"), 1.0)
    assert [step.skipped for step, _ in advance(trainer, 9)] == [True] * 4 + [False] + [True] * 4
    assert trainer.skipped_in_a_row == 4
    said = r"^LR_PEAK=0\.005: .*not finite in 5 steps in a row .*step 10.*lower LR_PEAK or ROUTER_LR .*new run"
    with pytest.raises(RunError, match=said):
        trainer.train_step()
    assert trainer.losses == {"first": [], "last": []}


# ---- state and resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    RESELECTING,
    {**RESELECTING, "capture_steps": 3, "accum": 2, "microbatch": 1, "grad_clip": 0.2, "router_lr": 0.0},
], ids=["routers", "accum, clipped, routers frozen"])  # fmt: skip
def test_resumed_at_any_step_equals_uninterrupted(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Through checkpoints on disk, into a model built anew; steps 2 and 5 lie inside a capture window."""
    whole = make_trainer(families.build(folder), **settings)
    run = RunFolder(tmp_path / "run")
    paths = [run.save(0, whole.state(), keep=99)]
    results, windows = [], []
    for step in range(12):
        results += advance(whole, 1)
        windows.append(whole.in_capture_window())
        paths.append(run.save(step + 1, whole.state(), keep=99))
    assert sum(reselection is not None for _, reselection in results) == 2
    assert windows[1]
    assert windows[4]
    expected = snapshot(whole)
    model = families.build(folder)
    for step, path in enumerate(paths):
        resumed = make_trainer(model, share=0.01, **settings)  # other active weights: all must come from the file
        resumed.restore(load_checkpoint(path))
        rest = advance(resumed, 12 - step)
        for (a, reselected), (b, expected_reselection) in zip(rest, results[step:], strict=True):
            assert (a.step, a.loss, a.grad_norm) == (b.step, b.loss, b.grad_norm)
            assert reselected == expected_reselection
        assert_same_state(resumed.state(), expected)
    run.close()


def test_random_states_are_restored(model: SparseModel) -> None:
    trainer = make_trainer(model)
    torch.manual_seed(5)
    saved = snapshot(trainer)
    expected = torch.rand(3)
    torch.manual_seed(6)
    trainer.restore(saved)
    assert torch.equal(torch.rand(3), expected)


def test_skips_and_losses_are_restored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call in (1, 2), float("nan"), 1.0)
    trainer = make_trainer(families.build(folder), steps=30)
    advance(trainer, 3)
    run = RunFolder(tmp_path / "run")
    resumed = make_trainer(families.build(folder), steps=30)
    resumed.restore(load_checkpoint(run.save(3, trainer.state(), keep=1)))
    run.close()
    assert (resumed.step, resumed.skipped, resumed.skipped_in_a_row) == (3, 2, 2)
    assert resumed.losses == trainer.losses
    assert len(resumed.losses["first"]) == 1  # of steps 1 to 3, two were skipped
