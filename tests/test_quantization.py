"""Quantisation: the store's arithmetic against numpy, HQQ against plain rounding and the public package, old files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from operators import OperatorRecorder, directml_fallbacks, directml_types
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from usaf import quantization
from usaf.errors import UserError
from usaf.quantization import (
    QuantizedTensor,
    dequantize,
    dequantize_4bit,
    pack_nibbles,
    quantize,
    quantize_4bit,
    quantize_minmax,
    read_entry,
    unpack_nibbles,
)

NORM = 0.7


def heavy_tailed(name: str, seed: int, shape: tuple[int, ...] = (2, 64, 512)) -> Tensor:
    torch.manual_seed(seed)
    if name == "normal":
        return torch.randn(shape) * 0.02
    if name == "unit_normal":
        return torch.randn(shape)
    if name == "outliers":
        weights = torch.randn(shape) * 0.02
        weights[torch.rand(shape) < 0.002] *= 10
        return weights
    if name == "laplace":
        return torch.distributions.Laplace(0.0, 0.02).sample(shape)
    degrees = float(name.removeprefix("student"))
    return torch.distributions.StudentT(degrees).sample(shape) * 0.02


def errors(weights: Tensor, decoded: Tensor) -> tuple[float, float, float]:
    """Mean absolute error, mean 0.7-power of the error, relative squared error."""
    error = (weights.double() - decoded.double()).abs()
    return (
        float(error.mean()),
        float(error.pow(NORM).mean()),
        float(error.square().mean() / weights.double().square().mean()),
    )


def decode_with_numpy(stored: QuantizedTensor) -> np.ndarray:
    """The definition of a weight, element by element: round_fp16(code * scale + offset)."""
    experts, rows, columns = stored.shape
    packed, scale, offset = (np.asarray(part) for part in (stored.packed, stored.scale, stored.offset))
    decoded = np.empty(stored.shape, dtype=np.float16)
    for column in range(columns):
        if stored.bits == 8:
            code = packed[:, :, column]
        else:
            byte = packed[:, :, column // 2]
            code = byte >> 4 if column % 2 else byte & 15
        group = column // stored.group_size
        exact = code.astype(np.float64) * scale[:, :, group] + offset[:, :, group]
        decoded[:, :, column] = exact.astype(np.float32).astype(np.float16)
    return decoded


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 127, 128, 129])
def test_nibbles_round_trip(n: int) -> None:
    codes = torch.randint(0, 16, (3, 5, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = pack_nibbles(codes)
    assert packed.shape == (3, 5, (n + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, n), codes)
    assert torch.equal(packed[..., 0] & 15, codes[..., 0])
    if n % 2:
        assert not (packed[..., -1] >> 4).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((2, 3, 128), 128), ((1, 4, 90), 32), ((3, 2, 7), 128), ((2, 5, 33), 16), ((1, 1, 1), 8), ((2, 3, 200), 64)],
)
def test_store_has_its_shapes_and_decodes_by_its_definition(
    shape: tuple[int, int, int], group_size: int, dtype: torch.dtype, bits: int
) -> None:
    weights = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    stored = quantize(weights, group_size, bits)
    experts, rows, columns = shape
    groups = -(-columns // group_size)
    assert stored.packed.shape == (experts, rows, columns if bits == 8 else (columns + 1) // 2)
    assert stored.scale.shape == stored.offset.shape == (experts, rows, groups)
    assert stored.scale.dtype == stored.offset.dtype == torch.float16
    assert stored.shape == shape
    decoded = dequantize(stored, torch.float16)
    assert np.array_equal(decoded.numpy(), decode_with_numpy(stored))
    for wider in (torch.float32, torch.float64):
        assert torch.equal(dequantize(stored, wider), decoded.to(wider))
    step = stored.scale.double().repeat_interleave(group_size, -1)[..., :columns]
    # HQQ may move a group's offset and so give up an end of its range: by a step at most here
    fp16_rounding = weights.double().abs() * 2.0**-10
    assert ((weights.double() - decoded.double()).abs() <= 1.6 * step + fp16_rounding).all()


def test_an_expert_is_a_view_with_the_same_weights() -> None:
    stored = quantize(heavy_tailed("normal", 0, (3, 8, 70)), 32)
    one = stored.expert(2)
    assert one.shape == (1, 8, 70)
    assert one.packed.data_ptr() == stored.packed[2].data_ptr()
    assert torch.equal(dequantize(one)[0], dequantize(stored)[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_do_not_change_a_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = heavy_tailed("student4", 3, (2, 9, 100))
    whole = quantize(weights, 32, bits)
    decoded = dequantize(whole)
    monkeypatch.setattr(quantization, "CHUNK_ELEMENTS", 250)
    monkeypatch.setattr(quantization, "DECODE_ELEMENTS", 350)
    in_chunks = quantize(weights, 32, bits)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], in_chunks[:3], strict=True))
    assert torch.equal(dequantize(in_chunks), decoded)


def test_transposed_and_trainable_input_gives_the_same_store() -> None:
    weights = heavy_tailed("normal", 4, (2, 16, 64))
    turned = torch.nn.Parameter(weights.transpose(1, 2).contiguous().transpose(1, 2))
    for a, b in zip(quantize(weights, 32)[:3], quantize(turned, 32)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["student3", "student4", "student5", "outliers", "normal"])
def test_hqq_beats_plain_rounding(name: str, seed: int, record_property: Callable) -> None:
    weights = heavy_tailed(name, seed)
    absolute, power, squared = errors(weights, dequantize(quantize(weights)))
    plain_absolute, plain_power, plain_squared = errors(weights, dequantize(quantize_minmax(weights)))
    record_property("squared_error_hqq_and_plain", (squared, plain_squared))
    assert absolute < 0.97 * plain_absolute
    assert power < 0.98 * plain_power


def test_one_iteration_is_the_splitting_of_the_paper() -> None:
    weights = heavy_tailed("student4", 13, (40, 64))
    scale = ((weights.amax(1, keepdim=True) - weights.amin(1, keepdim=True)) / 15).half().float()
    offset = (weights.amin(1, keepdim=True) + 0.3 * scale).half().float()
    shift, total = quantization._measure(weights, scale, 1 / scale, offset, 15, beta=10.0, norm=NORM)
    w, s, o = weights.double().numpy(), scale.double().numpy(), offset.double().numpy()
    codes = np.clip(np.rint((w - o) / s), 0, 15)
    error = (w - (codes * s + o).astype(np.float16)) / s
    kept = np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** (NORM - 1) / 10, 0)
    # the paper's mean(w - s e* - c s) is the new offset, up to the decoded weight's own rounding to fp16
    new_offset = (w - s * kept - codes * s).mean(1, keepdims=True)
    assert np.allclose(shift.numpy() + o, new_offset, rtol=0, atol=1e-3 * s.max())
    assert np.abs(shift.numpy() / s).max() > 0.01, "the case must move an offset"
    assert np.allclose(total.numpy(), (np.abs(error) ** NORM).sum(1, keepdims=True), rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["student3", "outliers"])
def test_no_group_is_worse_than_plain_rounding(name: str, bits: int) -> None:
    weights = heavy_tailed(name, 2)

    def per_group(stored: QuantizedTensor) -> Tensor:
        error = (weights - dequantize(stored)).double().abs().pow(NORM)
        return error.reshape(-1, 128).sum(1)

    assert (per_group(quantize(weights, bits=bits)) <= per_group(quantize_minmax(weights, bits=bits)) * 1.00001).all()


@pytest.mark.parametrize("round_zero", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["normal", "unit_normal", "student3", "student5", "outliers", "laplace"])
def test_hqq_equals_or_beats_the_public_package(name: str, seed: int, round_zero: bool) -> None:
    public = pytest.importorskip("hqq.core.quantize")
    weights = heavy_tailed(name, seed)
    codes, meta = public.Quantizer.quantize(
        weights.flatten(0, 1),
        nbits=4,
        group_size=128,
        axis=1,
        optimize=True,
        round_zero=round_zero,
        device="cpu",
        compute_dtype=torch.float16,
    )
    theirs = public.Quantizer.dequantize(codes, meta).reshape(weights.shape)
    absolute, power, _ = errors(weights, dequantize(quantize(weights, 128)))
    their_absolute, their_power, _ = errors(weights, theirs)
    assert absolute <= their_absolute
    assert power <= their_power


@pytest.mark.parametrize("quantise", [quantize, quantize_minmax])
@pytest.mark.parametrize("value", [0.0, 0.5, -0.0371, 1000.0, 1e-7])
def test_constant_weights_come_back_as_their_fp16_value(quantise, value: float) -> None:
    weights = torch.full((2, 3, 200), value)
    stored = quantise(weights, 64)
    assert not stored.scale.any()
    assert torch.equal(dequantize(stored), weights.half().float())


def test_all_zero_expert_among_others() -> None:
    weights = heavy_tailed("normal", 5, (3, 4, 128))
    weights[1] = 0
    decoded = dequantize(quantize(weights))
    assert not decoded[1].any()
    assert torch.equal(decoded[2], dequantize(quantize(weights[2:]))[0])


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 1.0, -30.0])
def test_rounding_error_is_bounded_at_every_size(size: float, shift: float) -> None:
    weights = (torch.rand((1, 8, 256), generator=torch.Generator().manual_seed(6)) * 2 - 1 + shift) * size
    stored = quantize_minmax(weights)
    step = float(stored.scale.max())
    fp16_step = max(2.0**-24, float(weights.abs().max()) * 2.0**-10)
    assert float((weights - dequantize(stored)).abs().max()) <= 0.51 * step + fp16_step
    assert step <= 2.01 * size / 15 + 2.0**-24


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weights = torch.zeros(2, 4, 64)
    weights[1, 3, 5] = value
    with pytest.raises(UserError, match=r"weights\[1, 0:4\].*finite"):
        quantize(weights)


@pytest.mark.parametrize("quantise", [quantize, quantize_minmax])
@pytest.mark.parametrize("value", [7e4, -7e4, 1e30])
def test_weights_beyond_fp16_are_refused(quantise, value: float) -> None:
    weights = torch.zeros(1, 2, 64)
    weights[0, 1, 1] = value
    with pytest.raises(UserError, match="65504"):
        quantise(weights)
    weights[0, 1, 1] = 6e4
    assert torch.isfinite(dequantize(quantise(weights))).all()


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        (torch.zeros(4, 64), {}, "num_experts, out, in"),
        (torch.zeros(1, 0, 64), {}, "none of them 0"),
        (torch.zeros(1, 2, 64, dtype=torch.int32), {}, "floating point"),
        (torch.zeros(1, 2, 64), {"group_size": 0}, "group_size=0"),
        (torch.zeros(1, 2, 64), {"bits": 3}, "bits=3"),
    ],
)
def test_unusable_requests_are_one_line(weights: Tensor, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(weights, **settings)


class LiveBytes(TorchDispatchMode):
    """The largest sum of storages that were alive at once among those made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_flatten(args)[0] if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def test_transient_memory_does_not_grow_with_the_tensor() -> None:
    weights = (torch.randn((4, 512, 2048), generator=torch.Generator().manual_seed(7)) * 0.02).bfloat16()
    chunk_bytes = 4 * quantization.CHUNK_ELEMENTS
    with LiveBytes() as live:
        stored = quantize(weights)
    result_bytes = sum(part.numel() * part.element_size() for part in stored[:3])
    assert result_bytes + chunk_bytes < live.peak_bytes < result_bytes + 14 * chunk_bytes < 4 * weights.numel()
    with LiveBytes() as live:
        decoded = dequantize(stored, torch.bfloat16)
    result_bytes = decoded.numel() * decoded.element_size()
    assert live.peak_bytes < result_bytes + 16 * quantization.DECODE_ELEMENTS


def test_entry_survives_a_safe_file(tmp_path) -> None:
    weights = heavy_tailed("student4", 8, (2, 6, 200)).bfloat16()
    entries = {"model.layers.0.mlp.experts.down_proj": quantize_4bit(weights, group_size=64)}
    torch.save(entries, tmp_path / "experts_q4.pt")
    loaded = torch.load(tmp_path / "experts_q4.pt", weights_only=True)
    entry = loaded["model.layers.0.mlp.experts.down_proj"]
    assert set(entry) == {"packed", "scale", "offset", "shape", "group_size", "bits"}
    decoded = dequantize_4bit(entry)
    assert decoded.dtype == torch.float16
    assert torch.equal(decoded, dequantize(quantize(weights, 64), torch.float16))


def legacy_entry(shape: tuple[int, int, int], group_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """int8 q, scale, zero as the earlier tool wrote them, and the weights they mean, worked out by numpy."""
    draw = np.random.default_rng(seed)
    count = int(np.prod(shape)) // group_size
    codes = draw.integers(0, 16, (count, group_size)).astype(np.uint8)
    scale = draw.uniform(0.001, 0.01, (count, 1)).astype(np.float16)
    zero = draw.uniform(-0.1, 0.0, (count, 1)).astype(np.float16)
    q = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(np.int8)
    weights = (codes.astype(np.float32) * scale.astype(np.float32) + zero.astype(np.float32)).astype(np.float16)
    return torch.from_numpy(q), torch.from_numpy(scale), torch.from_numpy(zero), weights.reshape(shape)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "dict without group size"])
def test_entries_of_the_earlier_tool_are_read(form: str, column: bool, tmp_path) -> None:
    shape = (2, 6, 256)
    q, scale, zero, weights = legacy_entry(shape, 128, seed=9)
    assert (q < 0).any(), "high nibbles above 7 must be among the cases"
    if not column:
        scale, zero = scale.flatten(), zero.flatten()
    entry = {
        "tuple": (q, scale, zero, shape),
        "list": [q, scale, zero, torch.Size(shape)],
        "dict": {"q": q, "s": scale, "z": zero, "shape": shape, "group_size": 128},
        "dict without group size": {"q": q, "s": scale, "z": zero, "shape": list(shape)},
    }[form]
    torch.save(entry, tmp_path / "entry.pt")
    loaded = torch.load(tmp_path / "entry.pt", weights_only=True)
    decoded = dequantize_4bit(loaded)
    assert decoded.dtype == torch.float16
    assert np.array_equal(decoded.numpy(), weights)
    assert torch.equal(dequantize(read_entry(loaded), torch.float16), decoded)
    # two roundings of pure fp16 arithmetic, product and sum, stay within one step of the product
    codes = unpack_nibbles(q.view(torch.uint8), 128).half()
    in_fp16 = (codes * scale.reshape(-1, 1) + zero.reshape(-1, 1)).reshape(shape)
    assert float((in_fp16.float() - decoded.float()).abs().max()) <= 2.0**-13


def test_legacy_dict_with_its_own_group_size() -> None:
    q, scale, zero, weights = legacy_entry((1, 4, 96), 32, seed=10)
    entry = {"q": q, "s": scale, "z": zero, "shape": (1, 4, 96), "group_size": 32}
    assert np.array_equal(dequantize_4bit(entry).numpy(), weights)


def unreadable_entries() -> list[tuple[object, str]]:
    q, scale, zero, _ = legacy_entry((2, 6, 128), 128, seed=11)
    own = quantize_4bit(torch.zeros(1, 2, 64))
    return [
        ((q, scale, zero, (2, 12, 64)), "multiple"),
        ((q, scale, zero, (12, 128)), "num_experts"),
        ((q, scale, zero, (3, 6, 128)), "torch.int8"),
        ((q.to(torch.int32), scale, zero, (2, 6, 128)), "torch.int8"),
        ((q, scale[:3], zero, (2, 6, 128)), "scale"),
        ((q, scale, zero.float() * 1e9, (2, 6, 128)), "zero not finite"),
        ((q, scale, zero), "must be a dict or"),
        ({"q": q, "s": scale, "shape": (2, 6, 128)}, "'z' is missing"),
        ({key: value for key, value in own.items() if key != "bits"}, "'bits' is missing"),
        ({**own, "packed": own["packed"][:, :1]}, "packed"),
        ({**own, "scale": own["scale"].float()}, "scale"),
        ({**own, "bits": 5}, "bits=5"),
        ("experts", "must be a dict or"),
    ]


@pytest.mark.parametrize(("entry", "message"), unreadable_entries())
def test_unreadable_entries_are_one_line(entry, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dequantize_4bit(entry)


@pytest.mark.parametrize("name", ["hqq", "int4", "int4 fp32", "zero points", "e2m1"])
def test_decoding_stays_on_directml(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "BF16_DEVICES", ())
    stored = quantize(heavy_tailed("normal", 12, (2, 4, 75)), 32) if name == "hqq" else table_entry(name, 32, 75, 1)
    stored = stored.to(torch.device("cpu"))
    dequantize(stored)  # the table of powers is made once
    with OperatorRecorder() as recorder:
        dequantize(stored, stored.resident_dtype())
    assert directml_fallbacks(recorder) == []
    assert directml_types(recorder) == []


def table_entry(name: str, group_size: int, columns: int, seed: int) -> QuantizedTensor:
    """Random codes with what each filling of the store has beside them."""
    draw = torch.Generator().manual_seed(seed)
    shape = (2, 6, columns)
    groups = -(-columns // group_size)
    packed = pack_nibbles(torch.randint(0, 16, shape, dtype=torch.uint8, generator=draw))
    bf16_scale = (torch.rand((2, 6, groups), generator=draw) * 0.02 + 1e-4).bfloat16()
    exponents = torch.randint(100, 140, (2, 6, groups), dtype=torch.uint8, generator=draw)
    int4, e2m1 = torch.tensor(quantization.INT4_VALUES), torch.tensor(quantization.E2M1_VALUES)
    zero_points = torch.randint(0, 16, (2, 6, groups), generator=draw)
    kinds = {
        "int4": (bf16_scale, None, int4, torch.bfloat16),
        "int4 fp16": (bf16_scale.half(), None, int4, torch.float16),
        "int4 fp32": (bf16_scale.float() * 1.2345, None, int4, torch.bfloat16),
        "zero points": (bf16_scale, -(bf16_scale.float() * zero_points), None, torch.bfloat16),
        "e2m1": (exponents, None, e2m1, torch.bfloat16),
    }
    scale, offset, table, dtype = kinds[name]
    return QuantizedTensor(packed, scale, offset, shape, group_size, 4, table, dtype)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "device without bf16"])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (32, 75), (7, 21), (128, 50)])
@pytest.mark.parametrize("name", ["int4", "int4 fp16", "int4 fp32", "zero points", "e2m1"])
def test_native_formats_decode_by_their_definition(
    name: str, group_size: int, columns: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = table_entry(name, group_size, columns, seed=5)
    codes = unpack_nibbles(stored.packed, columns).long()
    scale = stored.scale.double() if stored.scale.dtype != torch.uint8 else 2.0 ** (stored.scale.double() - 127)
    scale = scale.repeat_interleave(group_size, -1)[..., :columns]
    if stored.offset is None:
        assert stored.table is not None
        exact = stored.table.double()[codes] * scale
    else:
        exact = codes.double() * scale + stored.offset.double().repeat_interleave(group_size, -1)[..., :columns]
        whole = torch.round(exact / scale)  # the code less its zero point
        assert torch.equal(whole * scale, exact), "an offset in fp32 must be exact"
    expected = exact.float().to(stored.dtype)
    if not bf16:
        monkeypatch.setattr(quantization, "BF16_DEVICES", ())
        stored = stored.to(torch.device("cpu"))
        assert stored.scale.dtype != torch.bfloat16
    assert torch.equal(dequantize(stored), expected.float())
    assert stored.resident_dtype() == (stored.dtype if bf16 or stored.dtype == torch.float16 else torch.float32)
    assert torch.equal(dequantize(stored, stored.resident_dtype()).float(), expected.float())
    assert torch.equal(dequantize(stored.expert(1))[0], expected[1].float())
    if bf16:
        assert torch.equal(torch.signbit(dequantize(stored)), torch.signbit(expected)), "minus zero is kept"


def test_rounding_without_bf16_is_that_of_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=draw).to(torch.int32)
    ties = (bits & -65536) | 32768  # halfway between two bfloat16
    values = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    values = values[values.isfinite() & (values.abs() < 2.0**110)]
    powers = 2.0 ** torch.arange(-126, 110)
    edges = torch.cat(
        [powers, torch.nextafter(powers, torch.zeros(())), torch.nextafter(powers, torch.tensor(torch.inf))]
    )
    values = torch.cat([values, edges, -edges, torch.zeros(2)])
    expected = values.bfloat16().float()
    monkeypatch.setattr(quantization, "BF16_DEVICES", ())
    assert torch.equal(quantization.round_to(values, torch.bfloat16), expected)


def test_every_exponent_of_mxfp4_equals_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    for first in range(0, 256, 16):
        codes = torch.arange(first, first + 16, dtype=torch.uint8)
        blocks = codes.reshape(1, 1, 1, 16).expand(1, 255, 1, 16).contiguous()
        scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1)
        expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [1, 32, 255]
        stored = QuantizedTensor(
            blocks.reshape(1, 255, 16), scales, None, (1, 255, 32), 32, 4, torch.tensor(quantization.E2M1_VALUES),
            torch.bfloat16,
        )  # fmt: skip
        decoded = dequantize(stored, torch.bfloat16)
        assert torch.equal(decoded.view(torch.int16), expected.transpose(1, 2).contiguous().view(torch.int16))
