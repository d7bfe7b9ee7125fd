"""Four- and eight-bit expert weights: half-quadratic quantisation (HQQ), and one store for all such formats.

A weight row is cut into groups of `group_size` (the last one shorter where the row is not a multiple). Each group
keeps integer codes and one scale, and either an offset or, for the whole tensor, a table of 16 code values. Its weights
are *defined* as numbers of a 16-bit type (`dtype`), computed in fp32 and rounded once:

    weight = round(code * scale + offset)       HQQ and the earlier tool (fp16); int4 with zero points
    weight = round(table[code] * scale)         symmetric int4 (table -8 to 7); MXFP4 (table E2M1, scale 2^(byte - 127))

With 16-bit scales `code * scale` has at most 8 + 11 significant bits, so it is exact in fp32: a kernel that fuses the
multiplication with the addition and one that does not give the same bits, and a resident 16-bit copy equals decoding
again. HQQ's zero point z, counted in codes, is stored as offset = -z * scale; a whole zero point of an int4 checkpoint
gives an offset that fp32 holds exactly, so that the sum is exact too.

Quantising a group w (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023): the
scale comes from minimum and maximum; the offset o minimises the p-norm (p = 0.7) of the error by half-quadratic
splitting

    c   <- clamp(round((w - o) / s), 0, 2^bits - 1)
    e   <- (w - (c s + o)) / s                                    error, in codes
    e*  <- sign(e) max(|e| - |e|^(p-1) / beta, 0)                  generalised soft threshold
    o   <- mean(w - s e* - c s) = o + s mean(e - e*),   beta <- kappa beta

Three things differ from the published code. Errors are thresholded in units of the scale, not of the weights: at the
size of language-model weights (0.02) beta = 10 shrinks every error to zero there and the update degenerates to the
plain mean. The error has many local minima in o, about a code's width apart, so the iterations (20 in all) are shared
by five starts instead of following one: on normal weights the mean |error| falls to 0.952 of min-max rounding's instead
of 0.966. And the best offset is kept *per group*, judged by the p-norm of the error of the weights as they will be
decoded (scale, offset and result rounded to fp16), so no group is ever worse than plain min-max rounding in that norm.

Left out: optimising the scale, fewer than 4 bits. Fused decoding is in `usaf.kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usaf.errors import UserError

CHUNK_ELEMENTS = 2**17
"""Weights quantised at a time: some ten fp32 temporaries of 0.5 MB, which stay in cache."""

STARTS = (0.0, 0.25, -0.25, 0.5, -0.5)
"""Offsets, in units of the scale from the minimum, that share the iterations of the splitting between them."""

DECODE_ELEMENTS = 2**22
"""Weights decoded at a time: bounds the fp32 temporaries of `dequantize` to some 50 MB beside its result."""

INT4_VALUES = tuple(float(code - 8) for code in range(16))
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What codes stand for: sign and magnitude with two exponent bits and one fraction bit (OCP Microscaling, 2023)."""

BF16_DEVICES = ("cpu", "cuda")
"""Devices with the type bfloat16. Elsewhere (DirectML) its roundings are done in fp32, to the same bits."""

LEGACY_GROUP_SIZE = 128
ENTRY_KEYS = ("packed", "scale", "offset", "shape", "group_size", "bits")
_FP16_MAX = 65504.0
_FP16_SMALLEST_NORMAL = 2.0**-14
_FP16_SUBNORMAL_STEP = 2.0**-24


@dataclass(frozen=True)
class Encoding:
    """How weights are written in few bits: all that `QuantizedTensor` says beside shape and tensors, and their types.

    name: where it comes from, "hqq" or what the checkpoint has; table: the values of the 16 codes, where there is one.
    """

    name: str
    group_size: int
    bits: int
    scale: torch.dtype
    offset: torch.dtype | None
    table: tuple[float, ...] | None
    dtype: torch.dtype

    def tensors(self, shape: tuple[int, int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of the tensors that hold weights [E, out, in], by the names of `QuantizedTensor.tensors`."""
        experts, rows, columns = shape
        groups = (experts, rows, -(-columns // self.group_size))
        named: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.uint8, (experts, rows, columns if self.bits == 8 else (columns + 1) // 2)),
            "scale": (self.scale, groups),
        }
        return named if self.offset is None else {**named, "offset": (self.offset, groups)}

    def of(self, tensors: Mapping[str, Tensor], shape: tuple[int, int, int]) -> QuantizedTensor:
        table = None if self.table is None else torch.tensor(self.table)
        offset = tensors.get("offset")
        return QuantizedTensor(
            tensors["packed"], tensors["scale"], offset, shape, self.group_size, self.bits, table, self.dtype
        )  # fmt: skip


def hqq_encoding(group_size: int, bits: int) -> Encoding:
    """What `quantize` gives."""
    return Encoding("hqq", group_size, bits, torch.float16, torch.float16, None, torch.float16)


class QuantizedTensor(NamedTuple):
    """Fused expert weights `[E, out, in]` as codes, scales, and offsets or a table; see the module."""

    packed: Tensor
    """uint8 `[E, out, ceil(in / 2)]` for 4 bits (element 2j in the low nibble, 2j + 1 in the high one, a pad nibble is
    0), `[E, out, in]` for 8."""
    scale: Tensor
    """`[E, out, groups]`: float16, bfloat16 or float32, or uint8 exponents (E8M0: 2^(byte - 127))"""
    offset: Tensor | None
    """`[E, out, groups]`, float16 or float32; None where there is a table"""
    shape: tuple[int, int, int]
    """(E, out, in)"""
    group_size: int
    bits: int
    table: Tensor | None = None
    """float32 `[16]`: the value of each 4-bit code"""
    dtype: torch.dtype = torch.float16
    """the 16-bit type that the weights are defined in"""

    def expert(self, index: int) -> QuantizedTensor:
        """The weights of one expert as a tensor with E = 1; shares memory with this one."""
        chosen = {name: tensor[index : index + 1] for name, tensor in self.tensors().items()}
        return self.replace(chosen, (1, self.shape[1], self.shape[2]))

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same weights on a device; bfloat16 scales become fp32 where that device lacks their type."""
        scale = self.scale.float() if self.scale.dtype == torch.bfloat16 and not has_bf16(device) else self.scale
        return self._replace(
            packed=self.packed.to(device), scale=scale.to(device),
            offset=None if self.offset is None else self.offset.to(device),
            table=None if self.table is None else self.table.to(device),
        )  # fmt: skip

    def resident_dtype(self) -> torch.dtype:
        """The narrowest type that holds decoded weights exactly on the device they are on."""
        return self.dtype if self.dtype != torch.bfloat16 or has_bf16(self.packed.device) else torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have an entry for each expert, by name."""
        named = {"packed": self.packed, "scale": self.scale, "offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replace(self, tensors: Mapping[str, Tensor], shape: tuple[int, int, int]) -> QuantizedTensor:
        """Other tensors in the same format, by the names of `tensors()`."""
        return self._replace(
            packed=tensors["packed"], scale=tensors["scale"], offset=tensors.get("offset"), shape=shape
        )  # fmt: skip


def has_bf16(device: torch.device) -> bool:
    return device.type in BF16_DEVICES


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16, `[..., n]` -> uint8 `[..., ceil(n / 2)]`, the first of each pair in the low nibble."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] + codes[..., 1::2] * 16


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 `[..., ceil(n / 2)]` -> uint8 `[..., n]`.

    Without bit shifts, which DirectML does not have.
    """
    assert packed.shape[-1] == (n + 1) // 2, (packed.shape, n)
    pairs = torch.stack((torch.remainder(packed, 16), torch.floor_divide(packed, 16)), dim=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :n]


def quantize(
    weights: Tensor,
    group_size: int = 128,
    bits: int = 4,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedTensor:
    """HQQ of fused expert weights `[E, out, in]` (any float dtype), a bounded number of rows at a time.

    Raises UserError for weights that are not finite or that fp16 scales and offsets cannot hold.
    Source: Badri and Shaji 2023, with the changes that the module describes.
    """
    return _quantize_rows(weights, group_size, bits, _Splitting(norm, beta, kappa, iterations))


def quantize_minmax(weights: Tensor, group_size: int = 128, bits: int = 4) -> QuantizedTensor:
    """Plain rounding between each group's minimum and maximum: the baseline that HQQ must beat. As `quantize`."""
    return _quantize_rows(weights, group_size, bits, _Splitting(iterations=0))


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights `[E, out, in]`: rounded to the type they are defined in, then widened (or cast) to `dtype`.

    Runs on any device: no bit shifts, no scatter, no search.
    """
    experts, rows, columns = quantized.shape
    flat = quantized.replace(
        {name: t.reshape(experts * rows, -1) for name, t in quantized.tensors().items()}, quantized.shape
    )  # fmt: skip
    step = max(1, DECODE_ELEMENTS // columns)
    if experts * rows <= step:
        return _decode_rows(flat, slice(None)).to(dtype).reshape(quantized.shape)
    weights = torch.empty(experts * rows, columns, dtype=dtype, device=quantized.packed.device)
    for start in range(0, experts * rows, step):
        weights[start : start + step].copy_(_decode_rows(flat, slice(start, start + step)))
    return weights.reshape(quantized.shape)


def quantize_4bit(weights: Tensor, group_size: int = 128) -> dict[str, Any]:
    """HQQ of fused expert weights `[num_experts, out, in]` as a plain dict, fit for `torch.save`.

    Keys `packed, scale, offset` (tensors), `shape, group_size, bits`: only what `torch.load(weights_only=True)` reads.
    Raises UserError as `quantize` does.
    """
    entry = quantize(weights, group_size)._asdict()
    return {name: entry[name] for name in ENTRY_KEYS}


def dequantize_4bit(entry: Mapping[str, Any] | Sequence[Any], dtype: torch.dtype = torch.float16) -> Tensor:
    """The weights of an entry that `read_entry` knows, in `dtype` (the fp16 value, widened or cast)."""
    return dequantize(read_entry(entry), dtype)


def read_entry(entry: Mapping[str, Any] | Sequence[Any]) -> QuantizedTensor:
    """An entry of an `experts_q4` file as our store: ours (`quantize_4bit`), or one of the earlier tool.

    Those are `(q, scale, zero, shape)` or `{q, s, z, shape, group_size}`: int8 q `[groups, group_size / 2]`, first
    element in the low nibble, scale and zero `[groups]` or `[groups, 1]`, groups cut from the flattened tensor,
    weight = q * scale + zero. Raises UserError for anything else, and where groups would cross the ends of rows.
    """
    if isinstance(entry, Mapping):
        if "packed" in entry:
            return _read_own(entry)
        missing = [key for key in ("q", "s", "z", "shape") if key not in entry]
        if missing:
            raise UserError(
                f"4-bit entry with keys {sorted(map(str, entry))}: {missing[0]!r} is missing; "
                "make the file again with quantize_4bit"
            )
        group_size = entry.get("group_size", LEGACY_GROUP_SIZE)
        return _read_legacy(entry["q"], entry["s"], entry["z"], entry["shape"], group_size)
    if not isinstance(entry, (tuple, list)) or len(entry) != 4:
        raise UserError(
            f"4-bit entry of type {type(entry).__name__}: must be a dict or (q, scale, zero, shape); "
            "make the file again with quantize_4bit"
        )
    q, scale, zero, shape = entry
    return _read_legacy(q, scale, zero, shape, LEGACY_GROUP_SIZE)


class _Splitting(NamedTuple):
    """Constants of the half-quadratic splitting, named as in the paper; 0 iterations is plain rounding."""

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20


def _quantize_rows(weights: Tensor, group_size: int, bits: int, splitting: _Splitting) -> QuantizedTensor:
    _check_request(weights, group_size, bits)
    weights = weights.detach()
    experts, rows, columns = weights.shape
    groups = -(-columns // group_size)
    packed_columns = columns if bits == 8 else (columns + 1) // 2
    device = weights.device
    packed = torch.empty(experts, rows, packed_columns, dtype=torch.uint8, device=device)
    scale = torch.empty(experts, rows, groups, dtype=torch.float16, device=device)
    offset = torch.empty_like(scale)
    step = max(1, CHUNK_ELEMENTS // columns)
    for expert in range(experts):
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            values = weights[expert, chunk].to(torch.float32)
            codes, scale[expert, chunk], offset[expert, chunk] = _quantize_chunk(
                values, group_size, bits, splitting, where=f"weights[{expert}, {chunk.start}:{chunk.stop}]"
            )
            packed[expert, chunk] = codes if bits == 8 else pack_nibbles(codes)
    return QuantizedTensor(packed, scale, offset, (experts, rows, columns), group_size, bits)


def _check_request(weights: Tensor, group_size: int, bits: int) -> None:
    if weights.dim() != 3 or weights.numel() == 0:
        raise UserError(
            f"weights of shape {tuple(weights.shape)}: must be [num_experts, out, in], none of them 0; "
            "add the missing dimension"
        )
    if not weights.dtype.is_floating_point:
        raise UserError(f"weights of dtype {weights.dtype}: must be floating point; convert them with .float() first")
    if group_size < 1:
        raise UserError(f"group_size={group_size}: must be at least 1; 128 is the default")
    if bits not in (4, 8):
        raise UserError(f"bits={bits}: must be 4 or 8; 4 is the default")


def _quantize_chunk(
    values: Tensor, group_size: int, bits: int, splitting: _Splitting, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `[rows, in]` -> codes uint8 `[rows, in]`, scale and offset float16 `[rows, groups]`."""
    if not torch.isfinite(values).all():
        raise UserError(f"{where}: holds NaN or inf; weights must be finite; check the file they come from")
    rows, columns = values.shape
    whole = columns - columns % group_size
    parts = []
    for piece, width in ((values[:, :whole], group_size), (values[:, whole:], columns - whole)):
        if piece.shape[1] == 0:
            continue
        codes, scale, offset = _quantize_groups(piece.reshape(-1, width), bits, splitting, where)
        parts.append((codes.reshape(rows, -1), scale.reshape(rows, -1), offset.reshape(rows, -1)))
    codes, scale, offset = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return codes, scale, offset


def _quantize_groups(values: Tensor, bits: int, splitting: _Splitting, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `[groups, width]` -> codes uint8 of that shape, scale and offset float16 `[groups, 1]`."""
    levels = 2**bits - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    offset = low.to(torch.float16).float()
    step = (high - offset).clamp_(min=0) / levels
    # A subnormal fp16 scale rounded to nearest could lose a large part of the range, or all of it: round it up.
    raised = torch.ceil(step / _FP16_SUBNORMAL_STEP) * _FP16_SUBNORMAL_STEP
    scale = torch.where(step < _FP16_SMALLEST_NORMAL, raised, step).to(torch.float16).float()
    scale = torch.where(low == high, torch.zeros_like(scale), scale)
    if not torch.isfinite((levels * scale + offset).to(torch.float16)).all() or not torch.isfinite(offset).all():
        largest = float(values.abs().max())
        raise UserError(
            f"{where}: holds {largest:.6g}; fp16 scales and offsets reach {_FP16_MAX:.0f}; scale the weights down"
        )
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    if splitting.iterations:
        offset = _optimize_offset(values, scale, inverse, offset, levels, splitting)
    codes = _codes(values, inverse, offset, levels).to(torch.uint8)
    return codes, scale.to(torch.float16), offset.to(torch.float16)


def _codes(values: Tensor, inverse_scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    return (values - offset).mul_(inverse_scale).round_().clamp_(0, levels)


def _optimize_offset(
    values: Tensor, scale: Tensor, inverse: Tensor, offset: Tensor, levels: int, splitting: _Splitting
) -> Tensor:
    """HQQ's zero-point update for each group from several starting offsets; the best offset met, `[groups, 1]`.

    Scale and offset come in, and go out, as fp32 numbers that fp16 holds exactly. The first offset judged is
    the one given, so the result is never worse than plain rounding. There is no early stop: in a chunk of a thousand
    groups one always improves, and without it a group's result does not depend on its companions.
    """
    best, best_error = offset, torch.full_like(offset, torch.inf)
    rounds = -(-splitting.iterations // len(STARTS))
    for start in STARTS:
        candidate = (offset + start * scale).to(torch.float16).float()
        beta = splitting.beta
        for _ in range(rounds):
            shift, error = _measure(values, scale, inverse, candidate, levels, beta, splitting.norm)
            better = error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
            candidate = (candidate + shift).to(torch.float16).float()
            beta *= splitting.kappa
    return best


def _measure(
    values: Tensor, scale: Tensor, inverse: Tensor, offset: Tensor, levels: int, beta: float, norm: float
) -> tuple[Tensor, Tensor]:
    """Each group's next shift of its offset, and the sum of |error|^norm (in codes) as decoded now: `[groups, 1]`."""
    decoded = _codes(values, inverse, offset, levels).mul_(scale).add_(offset).to(torch.float16).to(torch.float32)
    error = torch.sub(values, decoded, out=decoded).mul_(inverse)
    magnitude = error.abs()
    # |e|^(p-1) by logarithm and exponential, which vectorise: four times the speed of pow
    power = magnitude.clamp(min=1e-12).log_().mul_(norm - 1).exp_()
    total = (magnitude * power).sum(1, keepdim=True)
    # e - e* of the splitting: the part of each error that the soft threshold takes away
    removed = torch.minimum(magnitude, power.mul_(1.0 / beta)).copysign_(error)
    return removed.mean(1, keepdim=True).mul_(scale), total


def _decode_rows(flat: QuantizedTensor, rows: slice) -> Tensor:
    """`[rows, in]` of a store whose tensors were flattened to `[E * out, ...]`, rounded to its type."""
    columns, group_size = flat.shape[2], flat.group_size
    packed = flat.packed[rows]
    codes = packed if flat.bits == 8 else unpack_nibbles(packed, columns)
    if flat.table is None:
        values = codes.to(torch.float32)
    else:
        values = flat.table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    scale = decode_scale(flat.scale[rows])
    offset = None if flat.offset is None else flat.offset[rows].to(torch.float32)
    whole = columns // group_size
    pieces = []
    if whole:
        grouped = values[:, : whole * group_size].reshape(-1, whole, group_size) * scale[:, :whole, None]
        if offset is not None:
            grouped = grouped + offset[:, :whole, None]
        pieces.append(grouped.reshape(-1, whole * group_size))
    if whole * group_size < columns:
        tail = values[:, whole * group_size :] * scale[:, whole:]
        pieces.append(tail if offset is None else tail + offset[:, whole:])
    pieces = [round_to(piece, flat.dtype) for piece in pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def decode_scale(scale: Tensor) -> Tensor:
    """Scales in fp32; uint8 ones are E8M0 exponents, 2^(byte - 127), and 255 stands for nan."""
    if scale.dtype != torch.uint8:
        return scale.to(torch.float32)
    return powers_of_two(scale.device).index_select(0, scale.reshape(-1).to(torch.int32)).reshape(scale.shape)


@functools.cache
def powers_of_two(device: torch.device) -> Tensor:
    """fp32 `[256]`: 2^(i - 127), the last one nan. Exact on every device, as exp2 may not be."""
    with torch.inference_mode(False):  # kept for every later use
        return torch.tensor([2.0 ** (i - 127) for i in range(255)] + [float("nan")]).to(device)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values rounded to `dtype`, half to even. Where the device has no bfloat16, they stay in fp32: adding and
    taking away 1.5 * 2^16 times a value's power of two leaves the 8 digits of bfloat16 (below 2^110)."""
    if dtype != torch.bfloat16 or has_bf16(values.device):
        return values.to(dtype)
    # log2 may be off by a little: beside a power of two, where that matters, both steps round to that power.
    exponent = torch.log2(values.abs()).floor().clamp(-126, 110)
    place = (exponent + float(127 + 16)).to(torch.int32).reshape(-1)
    shift = powers_of_two(values.device).index_select(0, place).reshape(values.shape) * 1.5
    return (values + shift) - shift


def _read_own(entry: Mapping[str, Any]) -> QuantizedTensor:
    missing = [key for key in ENTRY_KEYS if key not in entry]
    if missing:
        raise UserError(f"4-bit entry: {missing[0]!r} is missing; make the file again with quantize_4bit")
    experts, rows, columns = shape = _entry_shape(entry["shape"])
    group_size, bits = int(entry["group_size"]), int(entry["bits"])
    if bits not in (4, 8) or group_size < 1:
        raise UserError(
            f"4-bit entry with bits={bits}, group_size={group_size}: bits must be 4 or 8 and group_size positive; "
            "make the file again with quantize_4bit"
        )
    width = columns if bits == 8 else (columns + 1) // 2
    groups = -(-columns // group_size)
    _check_tensor("packed", entry["packed"], torch.uint8, (experts, rows, width))
    _check_tensor("scale", entry["scale"], torch.float16, (experts, rows, groups))
    _check_tensor("offset", entry["offset"], torch.float16, (experts, rows, groups))
    return QuantizedTensor(entry["packed"], entry["scale"], entry["offset"], shape, group_size, bits)


def _read_legacy(q: Any, scale: Any, zero: Any, shape: Any, group_size: int) -> QuantizedTensor:
    experts, rows, columns = shape = _entry_shape(shape)
    group_size = int(group_size)
    if group_size < 2 or group_size % 2 or columns % group_size:
        raise UserError(
            f"4-bit entry of shape {shape} in groups of {group_size}: the last dimension must be a multiple of an even "
            "group size, or groups cross the ends of rows; make the file again with quantize_4bit"
        )
    count = experts * rows * columns // group_size
    _check_tensor("q", q, torch.int8, (count, group_size // 2))
    stored = {}
    for name, tensor in (("scale", scale), ("zero", zero)):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in ((count,), (count, 1)):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"4-bit entry with {name} {found}: must be a tensor of {count} groups; make the file again")
        stored[name] = tensor.to(torch.float16).reshape(experts, rows, columns // group_size)
        if not torch.isfinite(stored[name]).all():
            raise UserError(f"4-bit entry with {name} not finite in fp16: must be finite; make the file again")
    packed = q.contiguous().view(torch.uint8).reshape(experts, rows, columns // 2)
    return QuantizedTensor(packed, stored["scale"], stored["zero"], shape, group_size, 4)


def _entry_shape(shape: Any) -> tuple[int, int, int]:
    sizes = tuple(int(size) for size in shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise UserError(
            f"4-bit entry of shape {sizes}: must be (num_experts, out, in); make it again with quantize_4bit"
        )
    return sizes


def _check_tensor(name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(
            f"4-bit entry with {name} of {found}: must be {dtype} {shape}; make the file again with quantize_4bit"
        )
