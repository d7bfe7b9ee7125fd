"""scripts/bench_fullsize.py on a tiny model: every phase is measured, counted and said for what it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config
from runs import read_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_fullsize
import benchmark
import make_fullsize

from usaf.data import Rows
from usaf.importance import trained_counts
from usaf.learning_rate import Line

SCRIPT = Path(bench_fullsize.__file__)
QUICK = ["--seq-len", "16", "--steps", "2", "--prefix-tokens", "64", "--importance-samples", "4",
         "--evaluation-samples", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_fullsize.make(tiny_config("qwen3_moe"), folder, 0, 4)
    return folder


@pytest.fixture(autouse=True)
def _one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SHORTEST_SECONDS", 1e-4)


def bench(folder: Path, figures: Path, *flags: str) -> dict[str, Any]:
    assert bench_fullsize.main(["--folder", str(folder), "--json", str(figures), *QUICK, *flags]) == 0
    return read_json(figures)


def count_points(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each line's loss is taken, its beginning included."""
    points = {"loss_with_experts": 0, "loss_with_head": 0}
    for name in points:
        monkeypatch.setattr(Line, name, counted(getattr(Line, name), points))
    return points


def counted(loss: Callable[[Line, float], float], points: dict[str, int]) -> Callable[[Line, float], float]:
    def take(line: Line, t: float) -> float:
        points[loss.__name__] += 1
        return loss(line, t)

    return take


def test_every_phase_with_its_count(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Rows] = []
    count = Rows.different_targets
    monkeypatch.setattr(Rows, "different_targets", lambda rows: seen.append(rows) or count(rows))
    points = count_points(monkeypatch)
    found = bench(folder, tmp_path / "figures.json", "--train-from", "2", "--scratch", str(tmp_path))
    phases = {figure["phase"]: figure for figure in found["phases"]}
    assert list(phases) == ["prefix", "importance", "rates", "step", "capture", "reselection", "evaluation"]
    assert [phases[name]["runs"] for name in phases] == [1, 1, 1, 2, 4, 1, 3]
    through = 8 * (points["loss_with_experts"] + 1)  # sequences; once more for the head's line
    assert [phases[name]["tokens"] for name in phases] == [64, 64, 16 * through, 32, 32, 128, 48]
    text = seen[0]
    assert 10 < count(text) < 128
    work = benchmark.model_work(tiny_config("qwen3_moe"))
    two, frac = [16, 16], found["settings"]["FRAC"]["value"]
    layer, of_model = (8 * 96 * 64, 8 * 64 * 48), 128 * 64
    counts, of_head = trained_counts(64 * min(2 * count(text), 128), [layer, layer], frac, "down")
    densities = sum(map(sum, counts)) / (2 * sum(layer)), of_head / of_model
    heads = [16] * 8 * sum(points.values())
    expected = {
        "prefix": work.forward([16] * 4, (0, 2)), "importance": work.importance([16] * 4, 2, "down"),
        "rates": work.forward([16] * through, (2, 4)) + work.forward(heads, (0, 0), head=True),
        "step": work.step(two, 2, *densities), "capture": work.step(two, 2, *densities),
        "reselection": work.dense_gradients([16] * 8, 2, "down"),
        "evaluation": work.forward([16] * 3, (2, 4), head=True),
    }  # fmt: skip
    rate = sum(found["product_gflop_per_second"][when]["512"] for when in ("before", "after")) / 2
    for name, figure in phases.items():
        assert figure["total_gflop"] * 1e9 == pytest.approx(expected[name].total)
        assert figure["tokens_per_second"] == pytest.approx(figure["tokens"] / figure["seconds"])
        assert figure["share_of_product_rate"] == pytest.approx(figure["total_gflop"] / figure["seconds"] / rate)
        assert figure["peak_resident_bytes"] >= figure["peak_private_bytes"] > 1e6
        assert figure["scaled_to"] is None
    assert "2 of 2 frozen layers" in phases["prefix"]["measured_on"]
    assert phases["step"]["measured_on"] == "layers 2-3, 2 x 16"
    assert found["importance_seconds_per_sequence"] == pytest.approx(phases["importance"]["seconds"] / 4)
    assert found["importance_share_of_training_time"] == pytest.approx(
        phases["importance"]["seconds"] / 64 / (phases["step"]["seconds"] / 32)
    )
    assert found["reselection_share_of_a_step"] == pytest.approx(
        phases["reselection"]["seconds"] / phases["step"]["seconds"]
    )
    assert found["machine"]["torch"] in (printed := capsys.readouterr().out)
    assert "median of 3" in printed
    assert "product with [96, 64]" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_fewer_frozen_layers_are_said_to_be_fewer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train-from", "3", "--prefix-layers", "1", "--phases", "prefix,step", "--microbatch", "1"]
    found = bench(folder, tmp_path / "figures.json", *flags, "USE_RESIDENT=0")
    measured, scaled, step = found["phases"]
    assert (measured["scaled_to"], scaled["scaled_to"]) == (None, "3 frozen layers, in proportion")
    assert measured["measured_on"] == scaled["measured_on"] == "1 of 3 frozen layers, 64 tokens"
    assert scaled["seconds"] == pytest.approx(3 * measured["seconds"])
    assert scaled["total_gflop"] == pytest.approx(3 * measured["total_gflop"])
    assert step["phase"] == "step"
    assert step["measured_on"] == "layers 3-3, 1 x 16, active weights spread evenly"
    assert "importance_seconds_per_sequence" not in found
    assert found["decisions"]["resident"] is False
    assert "3 frozen layers, in proportion" in capsys.readouterr().out


def test_one_layer_runs_where_one_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usaf.model import SparseModel

    run_layers, ran = SparseModel.run_layers, []

    def counted(self: SparseModel, batch: Any, start: int, stop: int, *args: Any, **kwargs: Any) -> Any:
        ran.append((start, stop))
        return run_layers(self, batch, start, stop, *args, **kwargs)

    monkeypatch.setattr(SparseModel, "run_layers", counted)
    bench(folder, tmp_path / "figures.json", "--train-from", "3", "--prefix-layers", "1", "--phases", "prefix")
    assert ran == [(0, 1)]


def test_without_frozen_layers(folder: Path, tmp_path: Path) -> None:
    found = bench(folder, tmp_path / "figures.json", "--train-from", "0", "--phases", "prefix,evaluation")
    assert [figure["phase"] for figure in found["phases"]] == ["evaluation"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--phases", "prefix,train"], "--phases train: is none of prefix, importance"),
        (["--phases", "rates,step"], "--phases rates: moves the weights that importance has chosen; add importance"),
        (["--train-from", "3", "--prefix-layers", "4"], "--prefix-layers 4: layers from 3 train; choose at most 3"),
        (["--train-from", "0", "--phases", "prefix"], "--train-from 0: there are no frozen layers"),
        (["--train-from", "9"], "TRAIN_FROM=9: the model has 4 layers"),
        (["FRAC"], "FRAC: settings are given as NAME=VALUE"),
        (["FRACK=1"], "FRACK"),
        (["--folder", "nowhere"], "--folder nowhere: no config.json there; make a model with"),
    ],
)
def test_bad_flags_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str
) -> None:
    assert bench_fullsize.main(["--folder", str(folder), *QUICK, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert problem in error
    assert "\n" not in error


def test_help_answers_without_torch() -> None:
    code = f"""
import runpy, sys
sys.argv = ["bench_fullsize.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
