"""safetensors files written and read in pieces, against the library's own reading and writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from usaf.errors import UserError
from usaf.files import replacing
from usaf.tensor_file import TORCH_DTYPES, TensorFile, TensorFileWriter, item_bits


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Of every dtype, with odd sizes, so that a wrong order would misalign."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, dtype in enumerate(list(TORCH_DTYPES.values()) * 2):
        shape = tuple(int(n) for n in rng.integers(1, 6, size=int(rng.integers(0, 4))))
        tensors[f"t{i}"] = torch.from_numpy(rng.integers(0, 100, size=shape)).to(dtype)
    tensors["empty"] = torch.zeros(0, 3)
    return tensors


@pytest.mark.parametrize("seed", range(4))
def test_writer_files_are_read_by_safetensors_and_aligned(tmp_path: Path, seed: int) -> None:
    tensors, path = random_tensors(seed), tmp_path / "x.safetensors"
    with replacing(path) as file:
        writer = TensorFileWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"made by": "us"})
        pieces = [(n, at, piece) for n, t in tensors.items() for at, piece in enumerate(t.reshape(-1).split(1))]
        for i in np.random.default_rng(seed).permutation(len(pieces)):  # in any order
            writer.write(*pieces[i])
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"made by": "us"}
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            # by their bits: torch 2.4 cannot compare 8-bit floats
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 64 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_writer_takes_parts_and_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    with replacing(tmp_path / "x") as file:
        writer = TensorFileWriter(file, {"t": (torch.float32, (6, 4))}, {})
        writer.write("t", 8, tensor.t()[2:])
        writer.write("t", 0, tensor.t()[:2])
    with safe_open(tmp_path / "x", "pt") as opened:
        assert torch.equal(opened.get_tensor("t"), tensor.t())


def test_writer_never_writes_beyond_a_tensor(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        writer = TensorFileWriter(file, {"a": (torch.float32, (3,)), "b": (torch.float32, (3,))}, {})
        with pytest.raises(AssertionError):
            writer.write("a", 1, torch.zeros(3))


@pytest.mark.parametrize("seed", range(4))
def test_reader_gives_what_the_library_wrote(tmp_path: Path, seed: int) -> None:
    tensors, path = random_tensors(seed), tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == file.entries[name].shape
        bits = read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(*bits)
        assert b"".join(file.raw(name)) == bits[1].numpy().tobytes()


def test_reader_takes_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(60.0).reshape(5, 4, 3)
    save_file({"before": torch.ones(7), "t": tensor}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert torch.equal(file.read_rows("t", 1, 3), tensor[1:3])
    assert file.read_rows("t", 2, 2).shape == (0, 4, 3)


def test_bytes_of_types_that_torch_lacks_are_copied(tmp_path: Path) -> None:
    """As a sub-byte type is: one line where it is to be read, and its bytes where it is to be copied."""
    with open(tmp_path / "a", "wb") as out:
        writer = TensorFileWriter(out, {"w": ("F4", (2, 6)), "s": (torch.float16, (3,))}, {})
        writer.write("w", 0, torch.arange(6, dtype=torch.uint8))
        writer.write("s", 0, torch.ones(3, dtype=torch.float16))
    source = TensorFile(tmp_path / "a")
    with pytest.raises(UserError, match="w has dtype F4, which cannot be read"):
        source.read("w")
    with open(tmp_path / "b", "wb") as out:
        TensorFileWriter(out, {"v": ("F4", (2, 6))}, {}).copy("v", source, "w")
    assert b"".join(TensorFile(tmp_path / "b").raw("v")) == bytes(range(6))


def test_sizes_of_the_formats_types() -> None:
    assert [item_bits(c) for c in ("F4", "F6_E2M3", "F8_E8M0", "U16", "BF16", "C64", "BOOL")] == [
        4,
        6,
        8,
        16,
        16,
        64,
        8,
    ]


def test_a_file_cut_short_while_in_use_is_one_line(tmp_path: Path) -> None:
    save_file({"t": torch.ones(100)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as opened:
        opened.truncate(200)
    with pytest.raises(UserError, match="cut short while it was in use"):
        file.read("t")
    with pytest.raises(UserError, match="cut short while it was in use"):
        list(file.raw("t"))
