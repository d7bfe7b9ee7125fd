"""scripts/bench_scaling.py on tiny models: a point trains the weights it should, and factors change one thing."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_scaling
from bench_model import Sizes
from bench_scaling import FACTORS, Plan, Point, growths, main, make_point, measure_point, parse_values, points_of

from usaf.errors import UserError

SIZES = Sizes(hidden=64, layers=2, heads=4, kv_heads=1, head_dim=16, experts=8, top_k=4, intermediate=32, vocab=256)
BASE = Point(SIZES, density=0.005, sequence_tokens=16, microbatch=2, samples=4)


def described(point: Point) -> dict[str, Any]:
    return bench_scaling.described(point)


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        ("experts", 16, {"experts": 16}),
        ("experts", 2, {"experts": 2, "top_k": 2}),
        ("hidden", 128, {"hidden": 128, "heads": 8, "kv_heads": 2, "intermediate": 64}),
        ("hidden", 32, {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 16}),
        ("density", 0.02, {"density": 0.02}),
        ("seq-len", 32, {"sequence_tokens": 32}),
        ("layers", 4, {"layers": 4}),
        ("microbatch", 1, {"microbatch": 1}),
        ("samples", 8, {"samples": 8}),
    ],
)
def test_a_factor_changes_one_thing(name: str, value: float, changed: dict[str, float]) -> None:
    point = dict(points_of(name, BASE, (value,)))[value]
    assert described(point) == described(BASE) | changed
    assert FACTORS[name].of(point) == value


def test_the_base_is_a_point_of_every_factor() -> None:
    for name, factor in FACTORS.items():
        points = points_of(name, BASE, factor.values)
        values = [value for value, _ in points]
        assert values == sorted(set(values))
        assert BASE in [point for _, point in points]
    assert (min(FACTORS["density"].values), max(FACTORS["density"].values)) == (0.001, 0.02)


def test_a_point_is_measured_in_its_phases(tmp_path: Path) -> None:
    point = dataclasses.replace(BASE, samples=6, density=0.01)
    plan = Plan(tmp_path, torch.get_num_threads(), 1, {"USE_RESIDENT": "0"})
    make_point(plan, point)
    found = measure_point(plan, point)
    up, down = 8 * 2 * 32 * 64, 8 * 64 * 32
    assert found["active_parameters"] == int(0.01 * up) + int(0.01 * down)  # of the upper of two layers
    assert found["whole_parameters"] == 8 * 64 + 2 * (64 + 16) + 64  # router and norms of that layer; the last norm
    # Importance chose them for their gradients on other sequences too, so a step's own may miss a few.
    assert 0.9 < found["parameters_with_gradient"] / found["trainable_parameters"] <= 1
    assert found["prefix_layers"] == 1
    assert found["prefix_tokens"] == 6 * 16
    assert found["importance_sequences"] == 6
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_seconds"])
    assert all(math.isfinite(loss) for loss in found["losses"])
    for phase in ("prefix", "importance", "steps"):
        assert found[f"{phase}_peak_private_bytes"] > 0
    assert found["prefix_seconds"] > 0
    assert found["importance_seconds"] > 0


def test_growth_is_the_last_over_the_first() -> None:
    points = [
        {"factor": "density", "value": 0.001, "step_seconds": 2.0},
        {"factor": "density", "value": 0.005, "error": "killed"},
        {"factor": "density", "value": 0.02, "step_seconds": 2.2},
        {"factor": "experts", "value": 8, "step_seconds": 1.0},
    ]
    assert growths(points) == {"density": {"from": 0.001, "to": 0.02, "ratio": 1.1}}


def test_values_are_read_or_refused() -> None:
    assert parse_values("experts=8,16") == ("experts", (8, 16))
    assert parse_values("density=0.001,0.02") == ("density", (0.001, 0.02))
    for wrong in ("experts=8,0.5", "experts", "density=0", "density=2", "width=4", "seq-len=4", "samples=1"):
        with pytest.raises(UserError, match="--values"):
            parse_values(wrong)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--factors", "experts,width"], "--factors width: must be among experts"),
        (["--density", "0"], "--density 0: must be above 0"),
        (["--samples", "1"], "--samples 1: must be at least 2"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_measures_every_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Point] = []
    real = bench_scaling.measured

    def counted(plan: Plan, point: Point, label: str) -> dict[str, Any]:
        made.append(point)
        return real(plan, point, label)

    monkeypatch.setattr(bench_scaling, "measured", counted)
    path = tmp_path / "figures.json"
    sizes = ["--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "1", "--head-dim", "16", "--top-k", "4"]
    more = ["--experts", "8", "--intermediate", "32", "--vocab", "256", "--seq-len", "16", "--samples", "4"]
    chosen = ["--factors", "density,layers", "--values", "density=0.005,0.02", "--values", "layers=1"]
    assert main([*sizes, *more, *chosen, "--steps", "1", "--threads", "1", "--json", str(path), "USE_RESIDENT=0"]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [(p["factor"], p["value"]) for p in found["points"]] == [
        ("density", 0.005), ("density", 0.02), ("layers", 1), ("layers", 2)]  # fmt: skip
    assert len(made) == len(set(made)) == 3
    assert found["step_time_growth_ratio"].keys() == {"density", "layers"}
    assert found["matmul_512_rows_flop_per_second"] > 0
    for point in found["points"]:
        assert all(math.isfinite(loss) for loss in point["losses"])
        assert point["peak_private_bytes"] >= point["importance_peak_private_bytes"] > 0
    alone = next(p for p in found["points"] if p["factor"] == "layers" and p["value"] == 1)
    assert alone["prefix_tokens"] == 0  # one layer, and it trains
