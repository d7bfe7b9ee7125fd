"""Adam against torch.optim; ages, seeding and schedules against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usaf.optimizer import Adam, gradient_norm, learning_rate_at


def gradients(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape, generator=generator) * 3
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


@pytest.mark.parametrize("shape", [(257,), (6, 11), (2, 3, 5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_all_weights_together_follow_torch(
    shape: tuple[int, ...], weight_decay: float, betas: tuple[float, float], size: float
) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    ours, theirs = start.clone(), torch.nn.Parameter(start.double())
    optimizer = Adam(ours, betas=betas)
    # foreach=False and double: a judge that is more exact than what it judges
    judge = torch.optim.AdamW([theirs], betas=betas, weight_decay=weight_decay, foreach=False)
    for step, gradient in enumerate(gradients(200, shape, seed=1)):
        rate = learning_rate_at(step, 200, 1e-2, 0.05, 0.1)
        judge.param_groups[0]["lr"] = rate
        theirs.grad = gradient.double()
        judge.step()
        optimizer.step(ours, gradient, rate, weight_decay)
    assert float((theirs.detach() - start.double()).abs().min()) > 0
    assert float((ours.double() - theirs.detach()).norm()) <= 1e-6 * float(theirs.detach().norm())


def test_adam_in_fp32_equals_torch_adam_to_rounding() -> None:
    start = torch.randn(300, generator=torch.Generator().manual_seed(2))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    optimizer, judge = Adam(ours), torch.optim.Adam([theirs], lr=1e-3, foreach=False)
    for gradient in gradients(200, (300,), seed=3):
        theirs.grad = gradient.clone()
        judge.step()
        optimizer.step(ours, gradient, 1e-3)
    assert float((ours - theirs.detach()).norm() / theirs.detach().norm()) <= 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_weight_born_later_follows_a_fresh_adam(weight_decay: float) -> None:
    n, born = 64, 40
    steps = gradients(100, (n,), seed=4)
    delta, reference = torch.zeros(n), torch.zeros(n)
    optimizer, old_only = Adam(delta), Adam(reference)
    for gradient in steps[:born]:
        optimizer.step(delta, gradient, 1e-3, weight_decay)
        old_only.step(reference, gradient, 1e-3, weight_decay)
    grown = torch.zeros(n, dtype=torch.bool)
    grown[::3] = True
    count = int(grown.sum())
    from_old = torch.where(grown, -1, torch.arange(n))
    optimizer.regrow(from_old, torch.zeros(count), torch.zeros(count), seen=0)
    delta[grown] = 0.0
    fresh_delta = torch.zeros(count)
    fresh = Adam(fresh_delta)
    for gradient in steps[born:]:
        optimizer.step(delta, gradient, 1e-3, weight_decay)
        old_only.step(reference, gradient, 1e-3, weight_decay)
        fresh.step(fresh_delta, gradient[grown], 1e-3, weight_decay)
        assert torch.equal(delta[grown], fresh_delta)
        assert torch.equal(delta[~grown], reference[~grown])


def test_kept_weights_move_untouched_and_grown_ones_are_seeded() -> None:
    n = 10
    delta = torch.zeros(n)
    optimizer = Adam(delta)
    for gradient in gradients(7, (n,), seed=5):
        optimizer.step(delta, gradient, 1e-2)
    old_mean, old_square = optimizer.exp_avg.clone(), optimizer.exp_avg_sq.clone()
    from_old = torch.tensor([-1, 2, 3, -1, 4, 6, 7, 8, 9, -1])
    kept = from_old >= 0
    mean, square = torch.tensor([0.5, -0.25, 1e-4]), torch.tensor([0.5, 0.125, 1e-7])
    optimizer.regrow(from_old, mean, square, seen=4)
    assert torch.equal(optimizer.exp_avg[kept], old_mean[from_old[kept]])
    assert torch.equal(optimizer.exp_avg_sq[kept], old_square[from_old[kept]])
    assert torch.allclose(optimizer.exp_avg[~kept] / (1 - 0.9**4), mean, rtol=2e-7, atol=0)
    assert torch.allclose(optimizer.exp_avg_sq[~kept] / (1 - 0.999**4), square, rtol=2e-7, atol=0)
    births = torch.tensor(optimizer.births)[optimizer.generation.long()]
    assert (optimizer.updates - births).tolist() == [4, 7, 7, 4, 7, 7, 7, 7, 7, 4]


def test_seeding_equals_having_seen_a_constant_gradient() -> None:
    mean = torch.tensor([0.3, -2.0, 1e-3])
    seen = Adam(torch.zeros(3))
    delta = torch.zeros(3)
    for _ in range(5):
        seen.step(torch.zeros(3), mean, 1e-3)
    seeded = Adam(torch.zeros(3))
    seeded.regrow(torch.full((3,), -1), mean, mean.square(), seen=5)
    expected, actual = delta.clone(), delta.clone()
    seen.step(expected, torch.ones(3), 1e-2)
    seeded.step(actual, torch.ones(3), 1e-2)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=0)


def test_several_generations_keep_their_own_ages() -> None:
    n = 30
    steps = gradients(60, (n,), seed=6)
    delta = torch.zeros(n)
    optimizer = Adam(delta)
    begun = {0: 0, 15: 15, 40: 40}
    members = {0: slice(20, 30), 15: slice(0, 10), 40: slice(10, 20)}
    fresh: dict[int, tuple[Adam, Tensor]] = {}
    for step, gradient in enumerate(steps):
        if step in begun and step > 0:
            from_old = torch.arange(n)
            from_old[members[step]] = -1
            optimizer.regrow(from_old, torch.zeros(10), torch.zeros(10), seen=0)
            delta[members[step]] = 0
        if step in begun:
            fresh[step] = (Adam(torch.zeros(10)), torch.zeros(10))
        optimizer.step(delta, gradient, 1e-3)
        for birth, (reference, value) in fresh.items():
            reference.step(value, gradient[members[birth]], 1e-3)
    for birth, (_, value) in fresh.items():
        assert torch.equal(delta[members[birth]], value)


def test_nothing_grown_changes_nothing() -> None:
    delta = torch.zeros(4)
    optimizer = Adam(delta)
    optimizer.step(delta, torch.ones(4), 1e-3)
    before = optimizer.exp_avg.clone()
    optimizer.regrow(torch.arange(4), torch.zeros(0), torch.zeros(0), seen=3)
    assert torch.equal(optimizer.exp_avg, before)
    assert optimizer.births == [0]


def test_state_round_trip_is_exact(tmp_path) -> None:
    n = 50
    steps = gradients(30, (n,), seed=7)
    delta = torch.zeros(n)
    optimizer = Adam(delta)
    for gradient in steps[:10]:
        optimizer.step(delta, gradient, 1e-3)
    from_old = torch.where(torch.arange(n) % 4 == 0, -1, torch.arange(n))
    grown = int((from_old < 0).sum())
    optimizer.regrow(from_old, torch.full((grown,), 0.1), torch.full((grown,), 0.2), seen=4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed, resumed_delta = Adam(torch.zeros(n)), delta.clone()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in steps[10:]:
        optimizer.step(delta, gradient, 1e-3, 0.01)
        resumed.step(resumed_delta, gradient, 1e-3, 0.01)
    assert torch.equal(delta, resumed_delta)
    assert resumed.births == optimizer.births
    assert resumed.updates == optimizer.updates


@pytest.mark.parametrize("generations", [1, 2])
def test_step_calls_only_operators_that_directml_has(generations: int) -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    delta = torch.zeros(8)
    optimizer = Adam(delta)
    optimizer.step(delta, torch.ones(8), 1e-3)
    if generations == 2:
        optimizer.regrow(torch.tensor([0, 1, -1, 3, 4, -1, 6, 7]), torch.ones(2), torch.ones(2), seen=1)
        optimizer.step(delta, torch.ones(8), 1e-3)
        optimizer.births[1] += 1  # another age for the second generation
    gradient, parts = torch.ones(8), [torch.ones(3), torch.ones(2, 2)]
    with Names() as names:
        optimizer.step(delta, gradient, 1e-3, 0.1)
        gradient_norm(parts)
    arithmetic = {"mul_", "mul", "add_", "addcmul_", "addcdiv_", "sqrt", "sum", "stack"}
    gathers = {"index_select", "view", "_to_copy", "lift_fresh", "detach", "detach_"} if generations == 2 else set()
    assert names.seen <= arithmetic | gathers
    assert ("index_select" in names.seen) == (generations == 2)


def test_schedule_has_its_ends() -> None:
    rates = [learning_rate_at(step, 180, 2e-4, 0.05, 0.1) for step in range(180)]
    assert rates[0] == pytest.approx(2e-4 / 9)
    assert rates[8] == pytest.approx(2e-4)
    assert max(rates) == rates[8]
    assert rates[-1] == pytest.approx(2e-5)
    assert rates[:9] == sorted(rates[:9])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    middle = 2e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * 87 / 171)) / 2)
    assert rates[95] == pytest.approx(middle)


@pytest.mark.parametrize(("steps", "expected"), [(1, [1.0]), (2, [1.0, 0.1]), (3, [1.0, 0.55, 0.1])])
def test_schedule_of_a_short_run(steps: int, expected: list[float]) -> None:
    assert [learning_rate_at(step, steps, 1.0, 0.0, 0.1) for step in range(steps)] == pytest.approx(expected)


def test_gradient_norm_is_that_of_all_together() -> None:
    parts = gradients(3, (5, 7), seed=8)
    norm = gradient_norm(part for part in parts)
    assert norm.dim() == 0
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.cat([part.double().flatten() for part in parts]).norm()), rel=1e-6)
    assert not torch.isfinite(gradient_norm([torch.ones(2), torch.tensor([float("nan")])]))
    assert not torch.isfinite(gradient_norm([torch.tensor([float("inf")])]))
    assert gradient_norm([torch.full((4,), 2.0, dtype=torch.bfloat16)]).item() == 4.0
