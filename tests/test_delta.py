"""The trained result as a file: every bit comes back, and nothing that is not whole is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import usaf.delta
from usaf.delta import Delta, decode_skips, encode_skips, experts_moved, load_delta, save_delta, scaled
from usaf.errors import UserError

UP, DOWN = "model.layers.1.mlp.sparse.gate_up_proj", "model.layers.1.mlp.sparse.down_proj"
OTHER = "model.layers.2.mlp.sparse.gate_up_proj"


def example(last: int = 79) -> Delta:
    generator = torch.Generator().manual_seed(0)
    indices = torch.tensor([0, 3, 17, 40, last])
    values = torch.randn(5, generator=generator)
    values[1] = 0.0
    return Delta(
        {UP: (indices, values), DOWN: (torch.tensor([7]), torch.tensor([float.fromhex("0x1.fffffep-127")])),
         OTHER: (torch.zeros(0, dtype=torch.int64), torch.zeros(0))},
        {"model.layers.1.mlp.gate.weight": torch.randn(4, 6, generator=generator)},
        "f" * 64,
        {"step": 12, "decisions": {"threads": 2, "resident": None}, "name": "Gruß"},
    )  # fmt: skip


@pytest.mark.parametrize("last", [79, 2**31 - 1, 2**31, 7_500_000_000])
def test_round_trip_to_the_bit(tmp_path: Path, last: int) -> None:
    delta, path = example(last), tmp_path / "delta.safetensors"
    assert save_delta(path, delta) == path.stat().st_size
    found = load_delta(path)
    assert found.sparse.keys() == delta.sparse.keys()
    for name, (indices, values) in delta.sparse.items():
        assert found.sparse[name][0].dtype == torch.int64
        assert torch.equal(found.sparse[name][0], indices)
        assert torch.equal(found.sparse[name][1].view(torch.int32), values.view(torch.int32))
    assert found.whole.keys() == delta.whole.keys()
    assert all(torch.equal(found.whole[name], weight) for name, weight in delta.whole.items())
    assert (found.base_fingerprint, found.about) == (delta.base_fingerprint, delta.about)
    stored = load_file(path)
    if last == 79:
        assert stored[f"{UP}.skips"].tolist() == [0, 2, 13, 22, 38]
    else:  # far apart, an index is shorter
        assert stored[f"{UP}.indices"].dtype == (torch.int32 if last < 2**31 else torch.int64)


@pytest.mark.parametrize("scale", [0.25, 0.8, 1.5])
def test_a_scaled_delta_lies_on_the_line_from_the_base(scale: float) -> None:
    delta, name = example(), "model.layers.1.mlp.gate.weight"
    own = {name: torch.ones(4, 6).to(torch.bfloat16), "model.layers.0.mlp.gate.weight": torch.ones(4, 6)}
    found = scaled(delta, scale, own)
    for key, (indices, values) in delta.sparse.items():
        assert torch.equal(found.sparse[key][0], indices)
        torch.testing.assert_close(found.sparse[key][1], values * scale, rtol=1e-6, atol=0)
    assert found.whole.keys() == {name}
    torch.testing.assert_close(found.whole[name], (1 - scale) * torch.ones(4, 6) + scale * delta.whole[name])
    assert (found.base_fingerprint, found.about) == (delta.base_fingerprint, delta.about)
    assert scaled(delta, 1.0, {}) is delta


@pytest.mark.parametrize("between", [0, 1, 60, 254, 255, 256, 1000])
def test_places_come_back_across_blocks(monkeypatch: pytest.MonkeyPatch, between: int) -> None:
    generator = torch.Generator().manual_seed(between)
    skips = torch.randint(0, 2 * between + 1, (1000,), generator=generator)
    indices = torch.cumsum(skips + 1, 0) - 1
    whole = encode_skips(indices)
    assert len(whole) == 1000 + int((skips // 255).sum())
    assert torch.equal(decode_skips(whole), indices)
    monkeypatch.setattr(usaf.delta, "BLOCK", 7)
    assert torch.equal(encode_skips(indices), whole)
    assert torch.equal(decode_skips(whole), indices)


@pytest.mark.parametrize(("between", "kind"), [(1, "skips"), (300, "skips"), (2000, "indices")])
def test_places_are_stored_in_the_shorter_way(tmp_path: Path, between: int, kind: str) -> None:
    indices = torch.arange(1, 500) * between
    save_delta(tmp_path / "delta", Delta({UP: (indices, torch.ones(499))}, {}, "", {}))
    stored = load_file(tmp_path / "delta")[f"{UP}.{kind}"]
    assert stored.nbytes <= 4 * 499
    assert torch.equal(load_delta(tmp_path / "delta").sparse[UP][0], indices)


def test_values_of_fp16_take_two_bytes_and_others_keep_every_bit(tmp_path: Path) -> None:
    """Among the first the smallest number of fp16, the largest, a zero below zero; others need one bit more."""
    short = torch.tensor([2**-24, 65504.0, -0.0, 1 + 2**-10, -6e-8]).to(torch.float16).to(torch.float32)
    indices = torch.arange(5)
    for value, dtype in ((short[0], torch.float16), (2**-25, torch.float32), (65520.0, torch.float32),
                         (1 + 2**-11, torch.float32)):  # fmt: skip
        values = torch.cat([short, torch.tensor([value])])
        path = tmp_path / "delta"
        save_delta(path, Delta({UP: (torch.arange(6), values), DOWN: (indices, short)}, {}, "", {}))
        stored = load_file(path)
        assert (stored[f"{UP}.values"].dtype, stored[f"{DOWN}.values"].dtype) == (dtype, torch.float16)
        found = load_delta(path).sparse
        assert torch.equal(found[UP][1].view(torch.int32), values.view(torch.int32))
        assert torch.equal(found[DOWN][1].view(torch.int32), short.view(torch.int32))


@pytest.mark.parametrize("version", [1, 2])
def test_deltas_of_earlier_formats_are_read(tmp_path: Path, version: int) -> None:
    """The first had indices alone, both had values in fp32 alone."""
    delta = example()
    tensors = {}
    for name, (indices, values) in delta.sparse.items():
        tensors[f"{name}.indices" if version == 1 else f"{name}.skips"] = (
            indices if version == 1 else torch.diff(indices, prepend=torch.tensor([-1])).sub(1).to(torch.uint8)
        )
        tensors[f"{name}.values"] = values
    metadata = {
        "format": f"usaf-delta-{version}",
        "base_fingerprint": delta.base_fingerprint,
        "about": json.dumps(delta.about),
    }
    save_file({**tensors, **delta.whole}, tmp_path / "delta", metadata)
    found = load_delta(tmp_path / "delta")
    assert found.sparse.keys() == delta.sparse.keys()
    for name, both in delta.sparse.items():
        assert all(torch.equal(a, b) for a, b in zip(found.sparse[name], both, strict=True))


def test_a_loaded_delta_does_not_hold_the_file(tmp_path: Path) -> None:
    """Windows could not replace a file that is still mapped; elsewhere its values would change under our hands."""
    path = tmp_path / "delta.safetensors"
    save_delta(path, example())
    found = load_delta(path)
    kept = found.sparse[UP][1].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(found.sparse[UP][1], kept)


def test_experts_moved() -> None:
    """Up has 20 weights an expert, down 10: up moves experts 0 (17), 2 (40) and 3 (79), not by its zero; down 0 (7)."""
    delta = example()
    indices, values = delta.sparse[UP]
    delta.sparse[UP] = (indices, values.where(indices != 0, torch.zeros(())))
    delta.sparse[DOWN] = (torch.tensor([7, 10]), torch.tensor([1.0, 1.0]))
    moved = experts_moved(delta, {UP: 20, DOWN: 10, OTHER: 20})
    assert moved == {UP.rpartition(".")[0]: 4, OTHER.rpartition(".")[0]: 0}


def test_experts_moved_agrees_with_a_count_from_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = {UP: 35, DOWN: 21}
    experts = {}
    for name, size in sizes.items():
        indices = torch.randperm(16 * size, generator=generator)[:12].sort().values
        experts[name] = (indices, torch.randn(12, generator=generator) * (torch.rand(12, generator=generator) > 0.4))
    path = tmp_path / "delta.safetensors"
    save_delta(path, Delta(experts, {}, "", {}))
    tensors = load_file(path)
    dense = torch.zeros(16, 35 + 21)
    for name, columns in ((UP, slice(0, 35)), (DOWN, slice(35, 56))):
        weights = torch.zeros(16 * sizes[name])
        places = torch.cumsum(tensors[f"{name}.skips"].long() + 1, 0) - 1  # none of 255 and more
        weights[places] = tensors[f"{name}.values"]
        dense[:, columns] = weights.view(16, -1)
    expected = sum(1 for row in dense.tolist() if any(row))
    assert 0 < expected < 16
    assert experts_moved(load_delta(path), sizes) == {UP.rpartition(".")[0]: expected}


def test_what_is_not_a_whole_delta_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_delta(path)
    with pytest.raises(UserError, match="no such file"):
        load_delta(tmp_path)
    save_delta(path, example())
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"delta\.safetensors: not a whole safetensors file .*; copy it again"):
            load_delta(path)
    path.write_text(json.dumps({"delta": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_delta(path)
    for metadata in (None, {"format": "pt"}, {"format": "usaf-delta-99"}):
        save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(UserError, match="is not a delta of this program"):
            load_delta(path)


GATE = "model.layers.1.mlp.gate.weight"
FAR = "model.layers.1.mlp.sparse.far"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no values": (lambda t: t.pop(f"{UP}.values"), "one value for each index"),
    "no places": (lambda t: t.pop(f"{UP}.skips"), "have no indices, or twice"),
    "two sorts of places": (
        lambda t: t.update({f"{UP}.indices": torch.arange(5)}), "have no indices, or twice",
    ),
    "fewer values": (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"][:-1]}), "one value for each index"),
    "fewer skips": (lambda t: t.update({f"{UP}.skips": t[f"{UP}.skips"][:-1]}), "one value for each index"),
    "a skip that goes on": (lambda t: t[f"{UP}.skips"].__setitem__(-1, 255), "break off"),
    "two dimensions": (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"][None]}), "one value for each index"),
    "indices in two dimensions": (lambda t: t.update({f"{FAR}.indices": t[f"{FAR}.indices"][None]}), "whole numbers"),
    "not in order": (lambda t: t.update({f"{FAR}.indices": t[f"{FAR}.indices"].flip(0)}), "rising order"),
    "twice": (lambda t: t[f"{FAR}.indices"].__setitem__(1, 7), "rising order"),
    "fractions": (lambda t: t.update({f"{FAR}.indices": t[f"{FAR}.indices"].float()}), "whole numbers"),
    "skips of 16 bits": (lambda t: t.update({f"{UP}.skips": t[f"{UP}.skips"].short()}), "are not bytes"),
    "values of another type": (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"].bfloat16()}), "another type"),
    "a router in 16 bits": (lambda t: t.update({GATE: t[GATE].half()}), "another type"),
    "not a number": (lambda t: t[f"{UP}.values"].__setitem__(2, float("nan")), "finite"),
    "an infinite router": (lambda t: t[GATE].__setitem__((0, 0), float("inf")), "finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_delta_is_refused(tmp_path: Path, name: str) -> None:
    path, delta = tmp_path / "delta.safetensors", example()
    delta.sparse[FAR] = (torch.tensor([7, 90_000]), torch.ones(2))
    save_delta(path, delta)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage, words = DAMAGE[name]
    damage(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    with pytest.raises(UserError, match=words):
        load_delta(path)


@pytest.mark.parametrize("change", [{"about": "{"}, {"about": "[]"}, {"about": None}, {"base_fingerprint": None}])
def test_damaged_metadata_are_refused(tmp_path: Path, change: dict[str, str | None]) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta(path, example())
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **change}
    save_file(load_file(path), path, {name: value for name, value in metadata.items() if value is not None})
    with pytest.raises(UserError, match="metadata"):
        load_delta(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta(path, example())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left on device"):
        save_delta(path, example(60))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["delta.safetensors"]
