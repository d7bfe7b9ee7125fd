"""scripts/comparison, the report: on made-up runs whose choice, differences, shares and verdicts are known."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from comparison import plots, report, tables
from comparison.choice import (
    ArmResult,
    Spread,
    by_numbers,
    choose,
    difference,
    figure_at_gain,
    forgetting_of,
    gain_share,
    results,
)
from comparison.report import Ablation, Question, report_text, write_report
from comparison.run_files import Run, file_name, load_runs, read_run
from comparison.runs_csv import restore
from comparison.verdicts import NOT_REACHED, REACHED, TARGETS, UNDECIDED, overall, verdicts

from usaf.errors import UserError

BEFORE = {"validation": 3.7, "test": 3.6, "heldout_a": 4.0, "heldout_b": 5.0, "forgetting": 2.0}
MACHINE = {
    "processor": "Some CPU", "threads": 2, "cpu_capability": "AVX2", "memory_bytes": 8_000_000_000, "torch": "2.13.0",
}  # fmt: skip


def content(arm: str, rate: float | None, seed: int = 0, config: str = "demo-2%", **given: Any) -> dict[str, Any]:
    """A run file. Of the figures, those given: validation, test, held_out, forgetting (against before)."""
    held_out = given.pop("held_out", 4.5)
    nll = {
        "validation": given.pop("validation", 3.0), "test": given.pop("test", 2.9),
        "heldout_a": held_out - 0.5, "heldout_b": held_out + 0.5, "forgetting": 2.0 + given.pop("forgetting", 0.25),
    }  # fmt: skip
    return {
        "arm": arm, "family": "peft" if "lora" in arm else "lab", "config": config, "rate": rate, "seed": seed,
        "options": {"train_from": 0, "frac": 0.02, "steps": 20, "model": "data/demo-moe"}, "machine": MACHINE,
        "command": "python scripts/compare_methods.py --out runs", "commit": "abc1234", "trainable_parameters": 160000,
        "artifact_bytes": 320000, "step_seconds": 0.2, "jobs": 2, "seconds": 50.1, "peak_private_bytes": 900_000_000,
        "tokens": {"validation": 8000, "test": 8000}, "before": BEFORE, "start": BEFORE, "nll": nll, "reloaded": nll,
        "routing": {"entropy_before": 0.97, "entropy": 0.96, "starved_experts": 0, "load_moved": 0.03},
        "experts_moved": 90, "experts": 96, "losses": [3.7 - 0.04 * i for i in range(20)], "diverged": False,
        "note": "rank 2 on the experts", **given,
    }  # fmt: skip


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / data["config"] / data["arm"] / file_name(data["rate"], data["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Runs as they are read from files."""

    def made(*args: Any, **given: Any) -> Run:
        return read_run(write(tmp_path, content(*args, **given)))

    return made


def arm_of(make: Any, arm: str, **figures: Sequence[float]) -> ArmResult:
    """One rate, whose neighbours diverged; the i-th value of each figure is that of seed i."""
    n = len(next(iter(figures.values())))
    runs = [make(arm, rate, diverged=True, nll=None) for rate in (5e-4, 2e-3)]
    runs += [make(arm, 1e-3, seed, **{name: values[seed] for name, values in figures.items()}) for seed in range(n)]
    return choose(runs)


def held_out(run: Run) -> float | None:
    return run.held_out


# ---- run files ------------------------------------------------------------------------------------------------------


def test_figures_of_a_run(make: Any) -> None:
    run = make("ours", 1e-3, test=2.9, held_out=4.25, forgetting=0.125)
    assert run.gain == pytest.approx(0.7)
    assert run.held_out == pytest.approx(4.25)
    assert run.forgetting == pytest.approx(0.125)
    assert run.reload_difference == 0
    assert run.untrained is not None
    assert (run.untrained.gain, run.untrained.forgetting) == (0, 0)
    assert make("ours", 1e-3, reloaded=None).reload_difference is None
    assert make("ours", 1e-3, reloaded={"test": 2.9, "forgetting": 2.5}).reload_difference == pytest.approx(0.25)
    assert math.isnan(make("ours", 1e-3, reloaded={"test": None}).reload_difference)


def test_partial_and_other_files_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, content("ours", 1e-3))
    for name in ("rate-0.1_seed-0.json.tmp", ".rate-0.1_seed-0.json.12-ab.partial", "plan.json"):
        (path.parent / name).write_text("{", encoding="utf-8")
    assert [run.path for run in load_runs(tmp_path)] == [path]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": None}, "seed is missing"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"rate": -1.0}, "rate: -1.0 is not above 0"),
        ({"nll": None}, "nll is missing"),
        ({"nll": {"test": 1.0}}, "of different texts"),
        ({"before": {**BEFORE, "test": None}}, "before: None is not a number"),
        ({"before": {"test": 1.0}}, "before: lacks 'validation'"),
        ({"diverged": "no"}, "diverged: 'no' is neither true nor false"),
        ({"losses": 3}, "losses: is not a list"),
        ({"options": []}, "options: [] is not an object"),
        ({"scaled": {"0": {"test": 1.0}}}, "scaled: 0.0 is not above 0"),
        ({"step_seconds": "fast"}, "step_seconds: 'fast' is not a number"),
    ],
)
def test_broken_run_is_told_in_a_line(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, {**content("ours", 1e-3), **{k: v for k, v in change.items() if k not in ("rate", "seed")}})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_runs(tmp_path)
    assert str(path) in str(error.value)
    assert what in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_file_that_is_no_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rate-1_seed-0.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is not a run file"):
        load_runs(tmp_path)


def test_no_run_and_one_run_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        load_runs(tmp_path)
    write(tmp_path, content("ours", 1e-3))
    (tmp_path / "rate-1e-3_seed-0.json").write_text(json.dumps(content("ours", 1e-3)), encoding="utf-8")
    with pytest.raises(UserError, match="is the same run as"):
        load_runs(tmp_path)


def test_diverged_run_may_lack_figures(make: Any) -> None:
    run = make("ours", 1e-3, diverged=True, nll=None, reloaded=None, losses=[3.0, None])
    assert run.failed
    assert math.isnan(run.test)


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_validation_alone_chooses(make: Any) -> None:
    best = make("ours", 2e-3, validation=2.9, test=3.3, held_out=4.9, forgetting=0.9)
    others = [make("ours", 1e-3, validation=3.0, test=2.0, held_out=4.0, forgetting=0.0), make("ours", 4e-3)]
    assert choose([*others, best]).best is best
    assert choose([*others, best]).rate_mark == ""


def test_the_mean_over_seeds_chooses_between_rates_that_ran_them(make: Any) -> None:
    by_rate = {1e-3: [3.00, 3.2, 3.2], 2e-3: [3.01, 3.0, 3.0], 4e-3: [3.02, 2.0], 8e-3: [3.3]}
    runs = [make("ours", rate, seed, validation=v) for rate, nll in by_rate.items() for seed, v in enumerate(nll)]
    assert choose(runs).rate == 2e-3  # 4e-3 lacks a seed that 1e-3 ran
    assert [run.seed for run in choose(runs).seeds] == [0, 1, 2]
    assert choose([run for run in runs if run.seed == 0]).rate == 1e-3
    failed = [make("ours", 2e-3, seed, diverged=True) if run.rate == 2e-3 and seed == 2 else run
              for run in runs for seed in [run.seed]]  # fmt: skip
    assert choose(failed).rate == 1e-3


def test_edge_of_the_sweep(make: Any) -> None:
    def marks(*validation: float, **last: Any) -> str:
        runs = [make("ours", 10.0 ** (i - 4), validation=value) for i, value in enumerate(validation)]
        return choose([*runs, *([make("ours", 1.0, **last)] if last else [])]).rate_mark

    assert marks(3.0, 2.9, 2.8) == marks(2.8, 2.9, 3.0) == "edge"
    assert marks(3.0, 2.8, 2.9) == ""
    assert marks(3.0) == "only rate"
    assert marks(3.0, 2.9, diverged=True) == ""  # the next higher rate was tried


def test_failed_runs_never_win(make: Any) -> None:
    fine = make("ours", 1e-3, validation=3.5)
    not_finite = make("ours", 2e-3, validation=None)
    diverged = make("ours", 4e-3, validation=1.0, diverged=True)
    without_test = make("ours", 8e-3, validation=1.0, test=None)
    assert choose([not_finite, diverged, without_test, fine]).best is fine
    none = choose([not_finite, diverged])
    assert none.best is None
    assert none.seeds == ()
    assert none.spread(held_out) is None


def test_seed_with_most_rates_is_the_sweeps(make: Any) -> None:
    runs = [make("ours", 1e-3, 0, validation=2.0)]  # seed 0 ran one rate only
    runs += [make("ours", rate, seed, validation=3.0 - 100 * rate) for rate in (1e-3, 2e-3) for seed in (1, 2)]
    found = choose(runs)
    assert [run.seed for run in found.sweep] == [1, 1]
    assert found.rate == 2e-3
    assert [run.seed for run in found.seeds] == [1, 2]


def test_spread_is_over_seeds_that_finished(make: Any) -> None:
    runs = [make("ours", 1e-3, seed, test=test) for seed, test in enumerate([2.0, 2.5, 3.0])]
    runs.append(make("ours", 1e-3, 3, diverged=True, nll=None))
    runs.append(make("ours", 2e-3, 0, validation=3.5, test=9.0))  # another rate has no part in it
    found = choose(runs)
    assert found.spread(lambda run: run.test) == pytest.approx(Spread(2.5, 0.5, 3))
    assert found.failed == 1
    assert tables.seeds_text(found) == "4 (1 diverged)"
    assert choose(runs[:1]).spread(lambda run: run.test) == (2.0, None, 1)
    assert tables.with_spread(choose(runs[:1]).spread(lambda run: run.test)) == "2.000"


def test_order_of_configs_and_arms(make: Any) -> None:
    runs = [make(arm, 1e-3, config=config) for config in ("demo-10%", "demo-2%", "demo-0.5%") for arm in "abc"]
    found = results(runs, ["c", "missing", "b"])
    assert list(found) == ["demo-0.5%", "demo-2%", "demo-10%"]
    assert list(found["demo-2%"]) == ["c", "b", "a"]
    assert sorted(["b-2%", "a", "b"], key=by_numbers) == ["a", "b", "b-2%"]


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed(make: Any) -> None:
    one, other = arm_of(make, "a", held_out=[4.0, 5.0, 6.0]), arm_of(make, "b", held_out=[4.1, 5.2, 6.3])
    found = difference(one, other, held_out)
    assert found is not None
    assert (found.n, found.paired, found.lower) == (3, True, 3)
    assert found.mean == pytest.approx(-0.2)
    assert found.sd == pytest.approx(0.1)  # the seeds' own spread is ten times that
    assert found.interval == pytest.approx((-0.2 - 4.303 * 0.1 / 3**0.5, -0.2 + 4.303 * 0.1 / 3**0.5))


def test_pairs_are_matched_by_seed_not_by_place(make: Any) -> None:
    one = choose([make("a", 1e-3, seed, held_out=4.0 + seed) for seed in (1, 2, 3)])
    other = choose([make("b", 1e-3, seed, held_out=4.5 + seed) for seed in (0, 2, 3)])
    assert difference(one, other, held_out) == pytest.approx((-0.5, 0.0, 2, True, 2))


def test_differences_without_common_seeds(make: Any) -> None:
    one = choose([make("a", 1e-3, seed, held_out=value) for seed, value in enumerate([4.0, 4.6, 4.3])])
    other = choose([make("b", 1e-3, seed, held_out=value) for seed, value in ((7, 5.0), (8, 5.8), (9, 5.4))])
    found = difference(one, other, held_out)
    assert found is not None
    assert found.mean == pytest.approx(-1.1)
    assert found.sd == pytest.approx(0.5)  # sqrt(0.3^2 + 0.4^2)
    assert (found.paired, found.lower, found.interval) == (False, None, None)
    single = choose([make("b", 1e-3, 1, held_out=5.0)])
    assert difference(one, single, held_out) == pytest.approx((-0.4, None, 1, True, None))  # seed 1 against seed 1


def test_share_of_fulls_gain(make: Any) -> None:
    full = arm_of(make, "full", test=[2.6, 2.4])  # gains 1.0, 1.2
    assert gain_share(arm_of(make, "ours", test=[2.7, 2.4]), full) == pytest.approx((0.95, math.sqrt(0.005), 2))
    one = gain_share(arm_of(make, "ours", test=[2.5]), full)  # 1.1 of the same seed's 1.0
    assert one is not None
    assert (one.mean, one.sd) == (pytest.approx(1.1), None)
    other = gain_share(choose([make("ours", 1e-3, 7, test=2.5)]), full)  # 1.1 of 1.1, the mean
    assert other is not None
    assert (other.mean, other.sd) == (pytest.approx(1.0), None)
    assert gain_share(full, arm_of(make, "worse", test=[3.7, 3.8])) is None


def test_forgetting_at_equal_gain(make: Any) -> None:
    gains = [(1e-4, 3.2, 0.1), (1e-3, 2.8, 0.5), (1e-2, 3.0, 2.0)]  # gains 0.4, 0.8, 0.6
    sweep = choose([make("lora", rate, test=test, forgetting=lost) for rate, test, lost in gains]).sweep

    def at(gain: float) -> float | None:
        found = figure_at_gain(sweep, gain, forgetting_of)
        assert found is not None
        assert found.top == pytest.approx((0.8, 0.5))
        return found.figure

    assert at(0.6) == pytest.approx(0.3)  # of the rising branch, which forgets less than the falling one
    assert at(0.2) == pytest.approx(0.05)  # between where it starts and its lowest rate
    assert at(0.9) is None
    assert at(-0.1) is None


def test_forgetting_starts_where_the_arm_starts(make: Any) -> None:
    start = {**BEFORE, "test": 3.8, "forgetting": 2.1}  # a 4-bit base: gain -0.2, forgetting 0.1
    sweep = [make("qlora", 1e-3, test=3.2, forgetting=0.4, start=start)]
    found = figure_at_gain(sweep, 0.1, forgetting_of)
    assert found is not None
    assert found.figure == pytest.approx(0.25)
    unknown = figure_at_gain([make("qlora", 1e-3, test=3.2, start=None)], 0.1, forgetting_of)
    assert unknown is not None
    assert unknown.figure is None
    assert figure_at_gain([make("qlora", 1e-3, diverged=True)], 0.1, forgetting_of) is None


# ---- verdicts -------------------------------------------------------------------------------------------------------


def judge(*arms: ArmResult) -> dict[str, str]:
    """Target -> status, of ours against lora."""
    found = verdicts({arm.arm: arm for arm in arms}, "ours", "full", ["lora"])
    return {target: overall(found, target) for target in TARGETS}


def three(make: Any, ours: dict[str, Any], lora: dict[str, Any]) -> dict[str, str]:
    return judge(
        arm_of(make, "full", test=[2.6, 2.6]), arm_of(make, "ours", **ours), arm_of(make, "lora", **lora)
    )  # fmt: skip


def test_every_target_reached(make: Any) -> None:
    ours = {"test": [2.62, 2.64], "held_out": [4.0, 4.1], "forgetting": [0.1, 0.1]}
    lora = {"test": [2.6, 2.6], "held_out": [4.2, 4.31], "forgetting": [0.2, 0.2]}
    assert three(make, ours, lora) == dict.fromkeys(TARGETS, REACHED)


def test_every_target_missed(make: Any) -> None:
    other = dict(BEFORE)
    ours = {"test": [2.7, 2.8], "held_out": [4.0, 4.2], "forgetting": [0.3, 0.3], "reloaded": [other, other]}
    lora = {"test": [2.6, 2.6], "held_out": [4.3, 4.21], "forgetting": [0.2, 0.2]}  # -0.3, -0.01: within their spread
    assert three(make, ours, lora) == dict.fromkeys(TARGETS, NOT_REACHED)


def test_one_seed_decides_no_held_out(make: Any) -> None:
    assert three(make, {"held_out": [4.0]}, {"held_out": [4.5]})["held-out"] == UNDECIDED
    assert three(make, {"held_out": [4.6]}, {"held_out": [4.5]})["held-out"] == NOT_REACHED


def test_seed_that_diverged_reaches_nothing(make: Any) -> None:
    ours = choose([*arm_of(make, "ours", test=[2.6, 2.6]).seeds, make("ours", 1e-3, 2, diverged=True, nll=None)])
    assert set(judge(arm_of(make, "full", test=[2.6, 2.6]), ours).values()) == {NOT_REACHED}
    lost = choose([make("ours", 1e-3, diverged=True)])
    assert set(judge(lost).values()) == {NOT_REACHED}


def test_gain_beyond_the_peers_sweep(make: Any) -> None:
    lora = {"test": [2.9], "forgetting": [0.2]}
    # Ours gains 0.9; on the line from (0, 0) it forgets 7/9 of its forgetting at the peer's 0.7.
    assert three(make, {"test": [2.7], "forgetting": [0.25]}, lora)["forgetting"] == REACHED
    assert three(make, {"test": [2.7], "forgetting": [0.26]}, lora)["forgetting"] == NOT_REACHED
    one_rate = {"test": [2.7], "start": [None]}  # no line, so nothing at 0.7
    assert three(make, {**one_rate, "forgetting": [0.21]}, lora)["forgetting"] == UNDECIDED
    assert (
        three(make, {**one_rate, "forgetting": [0.2]}, lora)["forgetting"] == REACHED
    )  # more gain, no more forgetting
    swept = {"lora": arm_of(make, "lora", **lora), "ours": arm_of(make, "ours", test=[2.7], forgetting=[0.25])}
    ours = choose([make("fixed", None, test=2.7, forgetting=0.25, start=None)])
    for sweep, status in (((), UNDECIDED), (("not run", "ours"), REACHED)):  # of an arm with one rate, another's sweep
        found = verdicts({**swept, "fixed": ours}, "fixed", "full", ["lora"], sweep)
        assert overall(found, "forgetting") == status
    assert three(make, {"test": [3.7], "forgetting": [0.0]}, lora)["forgetting"] == UNDECIDED  # below where it starts


def test_full_fine_tuning_is_read_at_our_gain_too(make: Any) -> None:
    full = choose([make("full", 1e-3, test=2.8, forgetting=0.1, held_out=4.2),
                   make("full", 2e-3, test=2.4, forgetting=0.5, held_out=4.4, validation=2.9)])  # fmt: skip
    ours = choose([make("ours", 1e-3, test=2.6, forgetting=0.4, held_out=4.1), make("ours", 1e-3, 1, test=2.0)])
    text = next(one.text for one in verdicts({"full": full, "ours": ours}, "ours", "full", []) if one.target == "gain")
    assert "forgetting +0.3000 (ours +0.4000), held-out 4.3000 (ours 4.1000), seed 0." in text
    beyond = choose([make("ours", 1e-3, test=2.0)])
    assert "gains as much" not in verdicts({"full": full, "ours": beyond}, "ours", "full", [])[0].text


def test_intervals_that_hold_0_are_counted(make: Any) -> None:
    lora = choose([make("lora", rate, s, validation=3 + abs(rate - 2e-3), held_out=4.5) for rate in (1e-3, 2e-3, 4e-3)
                   for s in range(3)])  # fmt: skip
    for held_out, told in (([4.2, 4.3, 4.4], "reached; 1 of 1 intervals hold 0"), ([4.29, 4.3, 4.31], REACHED)):
        ours = arm_of(make, "ours", held_out=held_out)
        assert judge(ours, lora)["held-out"] == told


def test_what_was_not_run_is_undecided(make: Any) -> None:
    assert judge(arm_of(make, "ours", test=[2.7], reloaded=[None])) == dict.fromkeys(TARGETS, UNDECIDED)
    assert verdicts({"lora": arm_of(make, "lora", test=[2.7])}, "ours", "full", ["lora"]) == []
    lost = choose([make("lora", 1e-3, diverged=True)])
    found = judge(arm_of(make, "ours", test=[2.7, 2.7]), lost)
    assert (found["held-out"], found["forgetting"]) == (UNDECIDED, UNDECIDED)


def test_rate_at_the_edge_leaves_it_undecided(make: Any) -> None:
    full, ours = arm_of(make, "full", test=[2.6, 2.6]), arm_of(make, "ours", test=[2.6, 2.6], held_out=[4.0, 4.0])
    lora = [make("lora", 1e-3, seed, held_out=4.2) for seed in (0, 1)]
    beyond = make("lora", 2e-3, diverged=True)
    below = make("lora", 5e-4, validation=3.5)
    assert judge(full, ours, choose([below, *lora, beyond]))["held-out"] == REACHED
    assert judge(full, ours, choose([below, *lora]))["held-out"] == UNDECIDED
    assert judge(full, ours, choose(lora))["held-out"] == UNDECIDED
    assert judge(choose([make("full", 1e-3, test=2.6)]), ours)["gain"] == UNDECIDED
    assert judge(choose([make("full", 1e-3, test=2.0)]), ours)["gain"] == NOT_REACHED  # a better rate changes nothing


def test_unequal_parameters_are_named(make: Any) -> None:
    ours = choose([make("ours", 1e-3, held_out=4.0)])
    lora = choose([make("lora", 1e-3, trainable_parameters=80000)])
    text = " ".join(one.text for one in verdicts({"ours": ours, "lora": lora}, "ours", "full", ["lora"]))
    assert "(160,000 against 80,000 parameters)" in text


# ---- tables and the report ------------------------------------------------------------------------------------------


def test_quality_row(make: Any) -> None:
    full = arm_of(make, "full", test=[2.6, 2.6])
    arm = choose([make("ours", r, s, validation=3 - r, test=2.6 + s / 10) for r in (1e-3, 5e-3) for s in (0, 1)])
    assert tables.quality_row(arm, full) == [
        "ours", "160,000", "0.32", "0.005 (edge)", "2", "2.650 ± 0.071", "14.15", "95.0% ± 7.1", "4.500 ± 0.000",
        "90.02", "+0.250 ± 0.000", "9.49",
    ]  # fmt: skip
    assert tables.quality_row(arm, None)[7] == "-"


def test_absent_figures_are_dashes(make: Any) -> None:
    optional = ("artifact_bytes", "trainable_parameters", "step_seconds", "jobs", "seconds", "peak_private_bytes")
    absent = dict.fromkeys((*optional, "routing", "experts_moved", "experts", "reloaded", "note"), None)
    before = {"validation": 3.7, "test": 3.6}
    arm = choose([make("none", None, **absent, before=before, nll=before, start=None)])
    assert tables.quality_row(arm, arm) == ["none", "-", "-", "-", "1", "3.600", "36.60", *["-"] * 5]
    assert tables.cost_row(arm) == ["none", *["-"] * 11, ""]
    assert tables.sweep_row(arm.sweep[0], False) == ["none", "-", "0", "3.700", "-", "-", ""]


def test_bytes_table_has_ours_first_and_those_that_ran(make: Any) -> None:
    arms = {a: arm_of(make, a, test=[2.6, 2.7], held_out=[h, h]) for a, h in (("small", 4.25), ("ours", 4.0))}
    lines = tables.bytes_table(arms, "full", "ours", ["not run", "small"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ours", "| small"]
    assert lines[2].endswith("| - |")
    assert lines[3].endswith("| +0.2500 ± 0.0000 |")
    assert lines[3].startswith("| small | 160,000 | 0.32 | 0.001 | 2 | 2.650 ± 0.071 | 14.15 | - | 4.250 ± 0.000 |")


def test_scale_table_has_each_scale_that_all_seeds_have(make: Any) -> None:
    def nll(validation: float, test: float) -> dict[str, float]:
        return {**BEFORE, "validation": validation, "test": test, "forgetting": 2.1}

    half, most = {"0.5": nll(3.2, 3.1)}, {"0.9": nll(2.9, 2.95)}
    full = choose([make("full", 1e-3, test=2.6)])
    parts = [half | most, half, {}]  # the third seed counts nowhere
    ours = choose([make("ours", 1e-3, seed, scaled=part, test=2.9 + seed // 2) for seed, part in enumerate(parts)])
    one = choose([make("one", 1e-3, scaled=half | most)])
    lines = tables.scale_table({"full": full, "ours": ours, "one": one}, "full").splitlines()
    assert [line.split(" | ")[3] for line in lines[2:]] == ["0.5", "1", "0.5", "0.9", "1"]
    best = "| one | 0.001 (only rate) | 1 | 0.9 | 2.900 (best) | 2.950 | 65.0% | 4.500 | +0.100 |"
    assert lines[5] == best
    assert lines[3].split(" | ")[4:6] == ["3.000 ± 0.000 (best)", "2.900 ± 0.000"]


def test_export_table_has_the_seeds_that_were_evaluated_so(make: Any) -> None:
    def exported(less: float) -> dict[str, float]:
        return {name: value - less for name, value in make("ours", 1e-3).nll.items()}

    ours = choose([make("ours", 1e-3, seed, exported=exported(0.1 * seed) if seed else {}) for seed in range(3)])
    lines = tables.export_table({"full": choose([make("full", 1e-3)]), "ours": ours}).splitlines()
    assert len(lines) == 3
    nll = make("ours", 1e-3).nll
    forgotten = nll["forgetting"] - BEFORE["forgetting"]
    assert lines[2].split(" | ")[2:5] == ["2", f"{nll['test']:.3f} ± 0.000", f"{nll['test'] - 0.15:.3f} ± 0.071"]
    assert lines[2].endswith(f"| {forgotten:+.3f} ± 0.000 | {forgotten - 0.15:+.3f} ± 0.071 |")


def test_load_table_is_of_1000_tokens_a_layer(make: Any) -> None:
    run = make("ours", 1e-3, loads={"model.layers.1.mlp.experts": [[3, 5], [4, 4]], "b": [[1], [2]]})
    assert tables.load_table(run).splitlines()[2:] == [
        "| model.layers.1 | 375 → 500 | 625 → 500 |", "| b | 1000 → 1000 |  |",
    ]  # fmt: skip


def test_ablation_rows(make: Any) -> None:
    base = arm_of(make, "ours", test=[2.6, 2.7], held_out=[4.0, 4.0], forgetting=[0.1, 0.1])
    arm = arm_of(make, "frozen", test=[2.7, 2.82], held_out=[3.9, 3.9], forgetting=[0.1, 0.1])
    row = tables.ablation_row(arm, base)
    assert row[2:] == ["+0.1100 ± 0.0141", "-0.1000 ± 0.0000", "+0.0000 ± 0.0000", "2 paired"]
    shown = tables.ablation_table({"ours": base, "frozen": arm}, "ours", ["ours", "frozen", "not run"])
    assert len(shown.splitlines()) == 3


def test_ablation_of_one_rate_is_beside_the_baseline_at_that_rate(make: Any) -> None:
    sweep = {1e-3: (3.0, 2.9), 2e-3: (2.9, 2.6), 4e-3: (3.1, 3.0)}
    base = choose([make("ours", rate, validation=v, test=t) for rate, (v, t) in sweep.items()])
    assert base.at(1e-3).seeds == (base.sweep[0],)
    assert base.at(2e-3) is base
    assert base.at(8e-3) is base  # not in the sweep
    only, swept, elsewhere = (
        choose([make(arm, rate, test=2.8) for rate in rates])
        for arm, rates in (("only", [1e-3]), ("swept", [1e-3, 2e-3]), ("elsewhere", [8e-3]))
    )
    assert [tables.ablation_row(arm, base)[2] for arm in (only, swept, elsewhere)] == ["-0.1000", "+0.2000", "+0.2000"]
    diverged = choose([make("bad", 1e-3, diverged=True, nll=None), make("bad", 2e-3)])
    assert diverged.at(1e-3) is diverged


def test_markdown_escapes_bars() -> None:
    assert tables.markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_loss_curve_is_a_running_mean() -> None:
    steps, means = plots.loss_curve([float(i) for i in range(30)])  # of three each
    assert list(steps) == list(range(3, 31))
    assert list(means) == pytest.approx([i - 2.0 for i in range(3, 31)])
    assert plots.loss_curve([2.0]) == ([1], [2.0])
    assert len(plots.loss_curve([1.0] * 1000)[0]) <= plots.POINTS


def test_differing_runs_are_warned_of(make: Any) -> None:
    other = {"options": {"steps": 60}, "before": {**BEFORE, "test": 3.7}, "tokens": {"test": 1}}
    runs = [make("ours", 1e-3), make("lora", 1e-3, **other), make("lora", 2e-3, trainable_parameters=7)]
    found = " ".join(report.warnings(runs))
    assert "differ in steps: 20, 60" in found
    assert "different NLL in different runs (test)" in found
    assert "number of tokens" in found
    assert "the runs of lora train 7, 160,000 weights" in found
    assert report.warnings([runs[0], make("lora", 1e-3, tokens={})]) == []  # not known is no difference


def fill(folder: Path) -> None:
    """Two configurations, one of them without full fine-tuning, one arm that diverged at its highest rate."""
    for config, arms in {"demo-2%": ("none", "full", "lora", "ours"), "demo-10%": ("lora", "ours")}.items():
        for arm in arms:
            rates = [None] if arm == "none" else [1e-3, 2e-3, 4e-3]
            for i, rate in enumerate(rates):
                write(folder, content(arm, rate, config=config, validation=2.9 + 0.1 * abs(i - 1), test=2.8 + i / 10))
            write(folder, content(arm, rates[len(rates) // 2], 1, config=config))
    write(folder, content("lora", 8e-3, nll=None, reloaded=None, diverged=True, losses=[3.0, None, None]))


def test_written_report(tmp_path: Path) -> None:
    fill(tmp_path / "runs")
    question = Question(arms=["none", "full", "lora", "ours"], ablations=[Ablation("peers", "ours", ["lora"])])
    paths = write_report(tmp_path / "runs", tmp_path / "out", question)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.count("python scripts/compare_methods.py --out runs") == 1
    assert "Some CPU, 2 threads" in text
    assert "`abc1234`" in text
    assert text.index("## demo-2%") < text.index("## demo-10%")
    assert text.count("Ablation, peers") == 2
    assert "| lora | 0.008 | 0 | - | - | - | diverged |" in text
    assert "full was not run" in text.split("## demo-10%")[1]
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.parse(path)
            assert f"]({path.name})" in text
            assert path.stat().st_size < 100_000


def test_plots_have_the_arm_without_a_rate_and_no_ablation(tmp_path: Path) -> None:
    for arm, rate in (("ours", None), ("none", None), ("lora", 1e-3), ("ours-frozen", 1e-3)):
        nll = BEFORE if arm == "none" else None
        write(tmp_path / "runs", content(arm, rate, **({"nll": nll} if nll else {})))
    question = Question(ablations=[Ablation("one thing", "ours", ["ours", "ours-frozen"])])
    write_report(tmp_path / "runs", tmp_path / "out", question)
    for name, shown in (("forgetting.svg", {"ours", "lora"}), ("losses.svg", {"ours", "lora"})):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert {arm for arm in ("ours", "none", "lora", "ours-frozen") if f">{arm}<" in text} >= shown
        assert ">ours-frozen<" not in text


def test_report_comes_out_the_same_again(tmp_path: Path) -> None:
    fill(tmp_path / "runs")
    first, second = (write_report(tmp_path / "runs", tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_csv_has_every_run(tmp_path: Path) -> None:
    fill(tmp_path / "runs")
    write_report(tmp_path / "runs", tmp_path / "out", Question(arms=["none", "full", "lora", "ours"]))
    with open(tmp_path / "out" / "runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(load_runs(tmp_path / "runs"))
    assert [row["arm"] for row in rows[:3]] == ["none", "none", "full"]
    assert {row["rate"] for row in rows if row["chosen_rate"] == "1" and row["arm"] == "ours"} == {"0.002"}
    lost = next(row for row in rows if row["diverged"] == "1")
    assert (lost["arm"], lost["nll_test"], lost["gain_test"]) == ("lora", "", "")
    fine = next(row for row in rows if row["arm"] == "full" and row["rate"] == "0.001")
    assert (float(fine["nll_test"]), float(fine["nll_heldout"])) == (2.8, 4.5)
    assert float(fine["option_frac"]) == 0.02


def test_restored_runs_give_the_same_report(tmp_path: Path) -> None:
    """What is committed of a comparison is enough to go on from: its table gives the run files again."""
    fill(tmp_path / "runs")
    options = {
        **content("none", None)["options"],
        "texts": "632000000012",
        "dataset": "1e5",
        "further": ["a", 1],
        "no": None,
    }
    loads = {"layers.0.mlp.experts": [[3, 5], [4, 4]]}
    for arm in ("odd", "odd-2"):
        write(
            tmp_path / "runs", content(arm, 1e-3, options=options, note="", machine=MACHINE | {"system": "Linux 6.1"},
                                       loads=loads, setup_seconds=1.5, scaled={"0.9": {**BEFORE, "test": 2.95}},
                                       exported={**BEFORE, "test": 2.85})
        )  # fmt: skip
    first = write_report(tmp_path / "runs", tmp_path / "one")
    made = load_runs(tmp_path / "runs")
    assert restore(tmp_path / "one" / "runs.csv", tmp_path / "again") == len(made)
    second = write_report(tmp_path / "again", tmp_path / "two")
    assert [path.name for path in first] == [path.name for path in second]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    again = {(run.config, run.arm, run.rate, run.seed): run for run in load_runs(tmp_path / "again")}
    for run in made:
        other = again[run.config, run.arm, run.rate, run.seed]
        assert other.path.relative_to(tmp_path / "again") == run.path.relative_to(tmp_path / "runs")
        lost = {"path": run.path, "losses": run.losses} | ({"nll": run.nll} if run.failed else {})
        assert dataclasses.replace(other, **lost) == run
    assert restore(tmp_path / "one" / "runs.csv", tmp_path / "again") == 0


def test_restore_leaves_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path / "runs")
    write_report(tmp_path / "runs", tmp_path / "out")
    one = sorted((tmp_path / "runs").rglob("rate-*.json"))[0]
    one.write_text("{}", encoding="utf-8")
    assert restore(tmp_path / "out" / "runs.csv", tmp_path / "runs") == 0
    assert one.read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize("written", [None, "", "a,b\n1,2\n", "config,arm,seed,diverged\nc,a,zero,0\n"])
def test_no_table_to_restore_from(tmp_path: Path, written: str | None) -> None:
    if written is not None:
        (tmp_path / "runs.csv").write_text(written, encoding="utf-8")
    with pytest.raises(UserError, match=r"runs.csv: is no table of runs \(.*\); give the folder of a report"):
        restore(tmp_path / "runs.csv", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_report_of_a_single_run(tmp_path: Path) -> None:
    """One arm, one seed, one rate, nothing optional: as it is early in a comparison."""
    bare = {name: content("lora", 1e-3)[name] for name in ("arm", "config", "seed", "rate", "before", "nll")}
    write(tmp_path / "runs", bare)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "0.001 (only rate)" in text
    assert "## Targets" not in text
    assert "Commands not known." in text


def test_peers_are_the_family_unless_named(make: Any) -> None:
    arms = {name: choose([make(name, 1e-3)]) for name in ("full", "lora", "dora-lora", "ours")}
    assert Question().rivals(arms) == ["lora", "dora-lora"]
    assert Question(peers=["lora"]).rivals(arms) == ["lora"]
    found = {"demo-2%": arms}
    runs = [run for arm in arms.values() for run in arm.sweep]
    assert "against dora-lora" in report_text(runs, found, Question())
    assert "against dora-lora" not in report_text(runs, found, Question(peers=["lora"]))
