"""Weights of fewer than 16 bits as checkpoints store them: which tensors make up one weight, and what it is.

Above this module a checkpoint looks as if it had been saved in 16 bits: one *logical* tensor per weight, with the name,
the shape and the values that transformers' own loading with `dequantize=True` (or the `compressed-tensors` package)
gives it, so that the plan of parameters and transformers' conversion mapping stay as they are.

    plain     X                                                 float tensors
    fp8       X (F8_E4M3) x X_scale_inv | X_scale | .scale      DeepSeek's blocks of 128 x 128, rows, channels, tensors
    int4      weight_packed, weight_scale, weight_shape         compressed-tensors' pack-quantized (Kimi K2)
    fp4       X (two E2M1 a byte) x X.scale (E8M0)              DeepSeek-V4; compressed-tensors' mxfp4-pack-quantized
    mxfp4     X_blocks, X_scales                                gpt-oss

Every weight is *defined* as round(value * scale), the product in fp32, the rounding to bfloat16 (float16 where the
checkpoint's configuration or its scales say so). Four-bit weights are also given as they are, codes and scales, which
is how experts are stored; a name with `scale_inv` is a factor all the same. The tensors tell the format, the
configuration only what they leave open (block and group sizes) and what is refused.

Left out: quantised activations (their scales are ignored), formats of other libraries (GPTQ, AWQ, bitsandbytes, NVFP4),
integers of 8 bits, groups that are not in the order of the columns (g_idx).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usaf.errors import UserError
from usaf.quantization import (
    E2M1_VALUES,
    INT4_VALUES,
    Encoding,
    QuantizedTensor,
    decode_scale,
    dequantize,
    unpack_nibbles,
)
from usaf.tensor_file import Shards

FLOAT_CODES = ("F32", "F16", "BF16", "F64")
WHOLE_CODES = ("I8", "I16", "I32", "I64", "U8", "BOOL")
FP8_CODES = ("F8_E4M3", "F8_E5M2")
FP4_CODES = ("F4", "I8", "U8")  # two codes a byte
EXPONENT_CODES = ("F8_E8M0", "U8")
DEQUANTIZE_ELEMENTS = 1 << 22  # weights at a time, so that the fp32 products stay small beside the result
# Names of what stands beside a weight `<stem>.weight` (or beside a fused parameter, joined to its name).
SCALE_SUFFIXES = ("_scale_inv", "_scale")
SCALE_NAMES = ("scale", "qscale_weight")
IGNORED_NAMES = ("activation_scale", "input_scale", "input_scale_ub", "qscale_act", "input_zero_point")
# What else a `quantization_config` may say, for the line that refuses it.
OTHER_METHODS = {
    "awq": "AWQ, int4", "gptq": "GPTQ, int4", "bitsandbytes": "8 or 4 bits", "hqq": "HQQ of transformers",
    "eetq": "EETQ, int8", "aqlm": "additive codes", "vptq": "vector codes", "auto-round": "AutoRound, int4",
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says about reading. method: as there; block: (rows, columns) of a scale, if given;
    group_sizes: all that occur; dtype: the type that dequantised weights are rounded to."""

    method: str
    block: tuple[int, int] | None = None
    group_sizes: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16


def read_quantization(config: Any, path: Path) -> Quantization | None:
    """The quantisation of a checkpoint by its configuration (of the whole model or of its text part); None if 16-bit.

    Raises:
        UserError: it is one that cannot be read.
    """
    found = None
    for part in (config, config.get_text_config()):
        found = found or getattr(part, "quantization_config", None)
    if found is None:
        return None
    said: dict[str, Any] = dict(found if isinstance(found, dict) else found.to_dict())
    method = str(said.get("quant_method", said.get("quant_algo", "unknown"))).lower().replace("_", "-")
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    sizes: tuple[int, ...] = ()
    if method == "compressed-tensors":
        sizes = check_compressed(said, path)
    elif method == "modelopt":
        if str(said.get("quant_algo")).upper() != "FP8":
            raise unsupported(path, f"modelopt {said.get('quant_algo')}")
    elif method not in ("fp8", "fbgemm-fp8", "mxfp4"):
        raise unsupported(path, f"{method} ({OTHER_METHODS[method]})" if method in OTHER_METHODS else method)
    block = said.get("weight_block_size")
    return Quantization(
        method,
        tuple(block) if block else None,
        sizes,
        torch.float16 if dtype in (torch.float16, "float16") else torch.bfloat16,
    )


def check_compressed(said: dict[str, Any], path: Path) -> tuple[int, ...]:
    """The group sizes of a compressed-tensors configuration, all of whose groups can be read."""
    sizes = []
    sparsity = (said.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise unsupported(path, f"compressed-tensors with sparsity {sparsity}")
    groups = said.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise unsupported(path, "compressed-tensors with config_groups that are no groups by name")
    for group in groups.values():
        weights = group.get("weights")
        if weights is None:
            continue
        form = group.get("format") or said.get("format") or "unknown"
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        named = f"compressed-tensors {form}, {kind} of {bits} bits"
        if (bits, kind) not in ((4, "int"), (8, "float"), (4, "float")) or "nvfp4" in form or "marlin" in form:
            raise unsupported(path, named)
        if weights.get("actorder") in (True, "group"):
            raise unsupported(path, f"{named} with actorder={weights['actorder']}")
        if weights.get("group_size", -1) not in (None, -1):
            sizes.append(int(weights["group_size"]))
        if weights.get("block_structure"):
            said.setdefault("weight_block_size", weights["block_structure"])
    return tuple(sizes)


def unsupported(path: Path, what: str) -> UserError:
    return UserError(f"{path}: quantization_config says {what}, which cannot be read; use this model in 16 bits, FP8, "
                     "MXFP4, or int4 of compressed-tensors")  # fmt: skip


@dataclass
class Stored:
    """One logical tensor of a checkpoint, here one that is stored as itself."""

    raw: Shards
    key: str
    """its logical name"""
    parts: tuple[str, ...]
    """the checkpoint's tensors that make it up, those included that are ignored"""

    format = "plain"

    def shape(self) -> tuple[int, ...]:
        return self.raw.entry(self.key).shape

    def dtype(self) -> torch.dtype:
        code = self.raw.entry(self.key).code
        if code not in FLOAT_CODES + WHOLE_CODES:
            raise self.fault(f"has dtype {code} and no scale beside it, so it cannot be read; use a checkpoint in "
                             f"{', '.join(FLOAT_CODES)}")  # fmt: skip
        return self.raw.of(self.key).dtype(self.key)

    def read(self) -> Tensor:
        return self.raw.of(self.key).read(self.key)

    def read_rows(self, first: int, end: int) -> Tensor:
        """Entries [first, end) of the first dimension; nothing else of it is read."""
        return self.raw.of(self.key).read_rows(self.key, first, end)

    def fault(self, rule: str) -> UserError:
        return UserError(f"{self.raw.path(self.parts[0])}: {self.key} {rule}")


@dataclass
class Fp8(Stored):
    """Eight-bit floats with a grid of scales."""

    scale: str
    quantization: Quantization

    format = "fp8"

    def dtype(self) -> torch.dtype:
        self.steps()
        return self.quantization.dtype

    def grid(self) -> tuple[int, ...]:
        """The scales' shape with as many dimensions as the weight (at least 2): [..., row steps, column steps]."""
        scale = self.raw.entry(self.scale).shape
        dimensions = max(2, len(self.shape()))
        if math.prod(scale) == 1:
            return (1,) * dimensions
        if len(scale) < dimensions:  # a scale for each row, or for each expert
            scale = scale + (1,) * (dimensions - len(scale))
        return scale

    def steps(self) -> tuple[int, int]:
        """(rows, columns) of the weight that share a scale; the last of each may be fewer."""
        grid = self.grid()
        shape = (1,) * (len(grid) - len(self.shape())) + self.shape()
        block = self.quantization.block or (None, None)
        leading = all(n in (1, size) for n, size in zip(grid[:-2], shape[:-2], strict=True))
        steps = [step_of(size, n, b) for size, n, b in zip(shape[-2:], grid[-2:], block, strict=True)]
        if not leading or 0 in steps:
            scale = self.raw.entry(self.scale).shape
            raise self.fault(f"has shape {self.shape()} and scales of shape {scale}, which do not fit each other; the "
                             "checkpoint is damaged, download it again")  # fmt: skip
        return steps[0], steps[1]

    def read(self) -> Tensor:
        return self._dequantized(self.raw.of(self.key).read(self.key), read_scale(self.raw, self.scale))

    def read_rows(self, first: int, end: int) -> Tensor:
        values = self.raw.of(self.key).read_rows(self.key, first, end)
        assert values.ndim > 2, "only fused experts are read in parts"
        shared = self.grid()[0] == 1
        return self._dequantized(values, read_scale(self.raw, self.scale, None if shared else (first, end)))

    def _dequantized(self, values: Tensor, scale: Tensor) -> Tensor:
        grid = (1 if self.grid()[0] == 1 else len(values), *self.grid()[1:]) if values.ndim > 2 else self.grid()
        return dequantize_blocks(values, decode_scale(scale).reshape(grid), self.steps(), self.quantization.dtype)


@dataclass
class FourBit(Stored):
    """Four-bit codes with a scale a group. `values`: the tensor of codes; `scale`: of scales."""

    values: str
    scale: str
    quantization: Quantization
    format: str = "fp4"
    transposed: bool = False
    """whether the logical tensor is [..., in, out]; codes are [..., out, in] always"""
    weight_shape: str | None = None
    zero_point: str | None = None
    widths: dict[tuple[int, ...], int] = field(default_factory=dict)

    def rows_shape(self) -> tuple[int, ...]:
        """[..., out, in] as the codes lie."""
        shape = self.raw.entry(self.values).shape
        if self.format == "mxfp4":
            return (*shape[:-2], 2 * shape[-2] * shape[-1])
        if self.format == "int4":
            return (*shape[:-1], self.width())
        return (*shape[:-1], shape[-1] if self.raw.entry(self.values).code == "F4" else 2 * shape[-1])

    def width(self) -> int:
        """Columns of an int4 weight. Eight codes share a word, so the exact number stands in a tensor of its own: read
        once for all weights of the same shape, and compared again whenever one is read."""
        packed = self.raw.entry(self.values).shape
        if packed not in self.widths:
            columns = 8 * packed[-1] if self.weight_shape is None else self.said_shape()[-1]
            if -(-columns // 8) != packed[-1]:
                raise self.fault(f"packs {columns} weights a row in {packed[-1]} words, which is not int4; use this "
                                 "model in 16 bits, FP8, MXFP4, or int4 of compressed-tensors")  # fmt: skip
            self.widths[packed] = columns
        return self.widths[packed]

    def said_shape(self) -> tuple[int, ...]:
        assert self.weight_shape is not None
        return tuple(self.raw.of(self.weight_shape).read(self.weight_shape).tolist())

    def shape(self) -> tuple[int, ...]:
        *leading, rows, columns = self.rows_shape()
        return (*leading, columns, rows) if self.transposed else (*leading, rows, columns)

    def dtype(self) -> torch.dtype:
        self.group_size()
        code = self.raw.entry(self.scale).code
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(code, self.quantization.dtype)

    def groups(self) -> int:
        return self.raw.entry(self.scale).shape[-1] if len(self.raw.entry(self.scale).shape) > 1 else 1

    def group_size(self) -> int:
        *leading, columns = self.rows_shape()
        groups, scale = self.groups(), self.raw.entry(self.scale).shape
        known = [size for size in self.quantization.group_sizes if -(-columns // size) == groups]
        size = columns // groups if groups and columns % groups == 0 else 0
        size = known[0] if known else size
        if size < 1 or math.prod(scale) != math.prod(leading) * groups:
            raise self.fault(f"has {columns} weights a row and scales of shape {scale}, which do not fit each other; "
                             "the checkpoint is damaged, download it again")  # fmt: skip
        return size

    def encoding(self) -> Encoding:
        code = self.raw.entry(self.scale).code
        scale = torch.uint8 if code in EXPONENT_CODES else self.raw.of(self.scale).dtype(self.scale)
        if self.zero_point is not None:
            if scale.itemsize != 2:
                raise self.fault(f"has zero points beside scales in {code}, which cannot be decoded to the bit; use "
                                 "this model in 16 bits")  # fmt: skip
            return Encoding(self.format, self.group_size(), 4, scale, torch.float32, None, self.dtype())
        table = INT4_VALUES if self.format == "int4" else E2M1_VALUES
        return Encoding(self.format, self.group_size(), 4, scale, None, table, self.dtype())

    def quantized(self, first: int = 0, end: int | None = None) -> QuantizedTensor:
        """The weight as it is stored: [1, out, in], or experts [first, end) of a fused one [E, out, in]."""
        *leading, rows, columns = self.rows_shape()
        fused = bool(leading)
        end = (leading[0] if fused else 1) if end is None else end
        span = (first, end) if fused else None
        experts = end - first if fused else 1
        if self.weight_shape is not None and not fused and self.said_shape() != (rows, columns):
            raise self.fault(f"has a weight_shape of {self.said_shape()} where {(rows, columns)} was expected; the "
                             "checkpoint is damaged, download it again")  # fmt: skip
        packed = self.raw.of(self.values).read_bytes(self.values, *(span or ())).reshape(experts, rows, -1)
        packed = packed[:, :, : (columns + 1) // 2].contiguous()
        scale = read_scale(self.raw, self.scale, span).reshape(experts, rows, self.groups())
        tensors = {"packed": packed, "scale": scale}
        if self.zero_point is not None:
            tensors["offset"] = -scale.float() * (self._zero_points(rows) + 8.0).reshape(scale.shape)
        return self.encoding().of(tensors, (experts, rows, columns))

    def _zero_points(self, rows: int) -> Tensor:
        """[out, groups], -8 to 7: eight rows share a word, lowest nibble first."""
        assert self.zero_point is not None
        words = self.raw.of(self.zero_point).read(self.zero_point)  # int32 [ceil(out / 8), groups]
        if words.dtype != torch.int32 or words.shape != (-(-rows // 8), self.groups()):
            raise self.fault(f"has zero points of shape {tuple(words.shape)} in {words.dtype}, which do not fit; the "
                             "checkpoint is damaged, download it again")  # fmt: skip
        packed = words.t().contiguous().view(torch.uint8)  # [groups, 4 bytes for 8 rows]
        return unpack_nibbles(packed, 2 * packed.shape[1])[:, :rows].t().float() - 8.0

    def read(self) -> Tensor:
        return self._decoded(self.quantized()).reshape(self.shape())

    def read_rows(self, first: int, end: int) -> Tensor:
        return self._decoded(self.quantized(first, end))

    def _decoded(self, quantized: QuantizedTensor) -> Tensor:
        weight = dequantize(quantized, self.dtype())
        return weight.transpose(1, 2).contiguous() if self.transposed else weight


def step_of(size: int, steps: int, block: int | None) -> int:
    """How many of `size` rows (or columns) share one of `steps` scales; 0 where that cannot be."""
    if steps == 1:
        return size
    if block is not None and -(-size // block) == steps:
        return block
    return size // steps if steps and size % steps == 0 else 0


def dequantize_blocks(values: Tensor, scale: Tensor, steps: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """round(values * scale): [..., rows, columns] with scales [..., row steps, column steps], some rows at a time."""
    if values.ndim < 2:
        return (values.float() * scale.reshape(-1)).to(dtype)
    if values.ndim > 2:
        scale = scale.expand(len(values), *scale.shape[1:])
        return torch.stack([dequantize_blocks(v, s, steps, dtype) for v, s in zip(values, scale, strict=True)])
    rows, columns = values.shape
    by_row = torch.arange(rows) // steps[0]
    by_column = torch.arange(columns) // steps[1]
    weight = torch.empty(rows, columns, dtype=dtype)
    count = max(1, DEQUANTIZE_ELEMENTS // columns)
    for first in range(0, rows, count):
        part = slice(first, first + count)
        factors = scale.index_select(0, by_row[part])
        if scale.shape[1] > 1:
            factors = factors.index_select(1, by_column)
        weight[part] = values[part].float() * factors
    return weight


def read_scale(raw: Shards, key: str, span: tuple[int, int] | None = None) -> Tensor:
    """Scales as stored, E8M0 as uint8; of the first dimension's [first, end) where `span` is given."""
    file = raw.of(key)
    if raw.entry(key).code in EXPONENT_CODES:
        return file.read_bytes(key, *(span or ()))
    return file.read(key) if span is None else file.read_rows(key, *span)


def logical_tensors(raw: Shards, quantization: Quantization | None) -> dict[str, Stored]:
    """The logical tensors of a checkpoint by name, told by names and types; nothing of their data is read or judged."""
    quantization = quantization or Quantization("none")
    found: dict[str, Stored] = {}
    used: set[str] = set()
    widths: dict[tuple[int, ...], int] = {}
    for key in raw.keys():  # noqa: SIM118
        stored = quantized_tensor(raw, key, quantization, widths)
        if stored is not None:
            found[stored.key] = stored
            used.update(stored.parts)
    for key in raw.keys():  # noqa: SIM118
        if key not in used:
            found[key] = Stored(raw, key, (key,))
    return found


def quantized_tensor(raw: Shards, key: str, q: Quantization, widths: dict[tuple[int, ...], int]) -> Stored | None:
    """The logical tensor whose values are in `key`, or None where they are stored as themselves."""
    code = raw.entry(key).code
    stem, _, name = key.rpartition(".")
    if name.endswith("_blocks") and code == "U8":
        logical = key.removesuffix("_blocks")
        scale = f"{logical}_scales"
        if scale in raw:
            return FourBit(raw, logical, (key, scale), key, scale, q, "mxfp4", transposed=True)
    elif name == "weight_packed":
        scale, shape, zero = (f"{stem}.weight_{part}" for part in ("scale", "shape", "zero_point"))
        reordered = f"{stem}.weight_g_idx" in raw
        double = f"{stem}.weight_global_scale" in raw  # NVFP4
        if scale in raw and not reordered and not double:
            parts = (key, scale, *present(raw, [shape, zero]), *ignored(raw, stem))
            return FourBit(
                raw, f"{stem}.weight", parts, key, scale, q, "int4" if code == "I32" else "fp4",
                weight_shape=shape if shape in raw else None, zero_point=zero if zero in raw else None, widths=widths,
            )  # fmt: skip
    elif code in FP8_CODES or code in FP4_CODES:
        beside = scale_of(raw, key)
        if beside is None:
            return None
        parts = (key, beside, *(ignored(raw, stem) if name == "weight" else ()))
        if code in FP8_CODES:
            return Fp8(raw, key, parts, beside, q)
        if raw.entry(beside).code in EXPONENT_CODES:
            return FourBit(raw, key, parts, key, beside, q, "fp4")
    return None


def scale_of(raw: Shards, key: str) -> str | None:
    """The tensor of scales that belongs to the values in `key`."""
    names = [key + suffix for suffix in SCALE_SUFFIXES]
    stem, _, name = key.rpartition(".")
    if name == "weight":
        names += [f"{stem}.{other}" for other in SCALE_NAMES]
    return next(iter(present(raw, names)), None)


def ignored(raw: Shards, stem: str) -> list[str]:
    """Tensors beside a quantised weight that its value does not depend on."""
    return present(raw, [f"{stem}.{name}" for name in IGNORED_NAMES])


def present(raw: Shards, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key in raw]
