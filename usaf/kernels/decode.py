"""Fused decoding: the dense fp32 weights of one expert, base + delta, from its 4- or 8-bit codes in one pass.

    w[r, c] = round16(code * scale + offset)   or   round16(table[code] * scale),   then + delta where one is active

`quantization.dequantize` defines the bits, and takes one torch operator after another, each over the whole tensor. Here
codes become weights in registers. `round16` rounds fp32 to the 16-bit type that the weights are defined in and widens
back. Processors have instructions for fp16; where this one has not, and for bf16, it is done on the bits:

    bits + (half - 1) + (the last bit kept), the bits below cut off: rounding half to even, for bf16 and normal fp16
    (w + 0.75) - 0.75: multiples of 2^-24, which subnormal fp16 numbers (below 2^-14) are
    65520 and above: inf in fp16

Left out: odd group sizes, whose groups begin in the middle of a byte (the reference takes them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from usaf.kernels.compiled import compiled
from usaf.quantization import QuantizedTensor, decode_scale, dequantize

HALF_BEYOND = np.float32(65520.0)  # half way between the largest fp16 number and the next one, were there one
HALF_NORMAL = np.float32(2.0**-14)
HALF_SHIFT = np.float32(0.75)  # 1.5 * 2^-1: its last bit in fp32 counts 2^-24


@intrinsic
def _through_half(_context: Any, value: Any) -> Any:
    """fp32 -> fp16 -> fp32 by the processor's own conversion."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fpext(builder.fptrunc(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.float32), generate


def converts_half() -> bool:
    """Whether the processor converts fp16 by itself; else the compiler would call a function that is not there."""
    triple = llvm.get_default_triple()
    if triple.startswith(("x86_64", "i686", "AMD64")):
        return bool(llvm.get_host_cpu_features().get("f16c", False))
    return triple.startswith(("aarch64", "arm64"))


HALF_BY_HARDWARE, HALF_BY_BITS, BFLOAT = range(3)


def _rounding(dtype: torch.dtype) -> int:
    if dtype == torch.bfloat16:
        return BFLOAT
    return HALF_BY_HARDWARE if converts_half() else HALF_BY_BITS


@numba.njit(inline="always")
def _round16(w: Any, rounding: Any) -> Any:
    if rounding == HALF_BY_HARDWARE:
        return _through_half(np.float32(w))  # type: ignore[call-arg]
    bits = np.float32(w).view(np.int32)
    if rounding == BFLOAT:
        last = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
        rounded = np.int32(np.int32(np.int32(bits + np.int32(0x7FFF)) + last) & np.int32(-0x10000)).view(np.float32)
        return w if w != w else rounded
    last = np.int32(np.int32(bits >> np.int32(13)) & np.int32(1))
    rounded = np.int32(np.int32(np.int32(bits + np.int32(0xFFF)) + last) & np.int32(-0x2000)).view(np.float32)
    subnormal = np.float32((w + HALF_SHIFT) - HALF_SHIFT).view(np.int32)
    signed = np.int32(subnormal | np.int32(bits & np.int32(-0x80000000))).view(np.float32)  # of -0.0 too
    rounded = signed if abs(w) < HALF_NORMAL else rounded
    return np.float32(w * np.float32(np.inf)) if abs(w) >= HALF_BEYOND else rounded


@numba.njit(inline="always")
def _add_row(out: Any, r: Any, columns: Any, row_starts: Any, delta: Any) -> Any:
    if len(delta):
        for i in range(row_starts[r], row_starts[r + 1]):
            out[r, columns[i]] += delta[i]


# The group size and the type are constants of the compiled code: with a group size that is only known when it runs, the
# compiler can neither unroll the loop over a group nor prove its indices positive, and it stays ten times slower.


@functools.cache
def _nibble_decoder(group: int, rounding: int) -> Callable[..., None]:
    half = group // 2

    def decode(packed: Any, scale: Any, offset: Any, columns: Any, row_starts: Any, delta: Any, out: Any) -> None:
        rows, width = out.shape
        whole = width // group
        for r in range(rows):
            for g in range(whole):
                s, o = scale[r, g], offset[r, g]
                for j in range(half):
                    byte = np.int32(packed[r, g * half + j])
                    low, high = np.int32(byte & np.int32(15)), np.int32(byte >> np.int32(4))
                    out[r, g * group + 2 * j] = _round16(np.float32(low) * s + o, rounding)
                    out[r, g * group + 2 * j + 1] = _round16(np.float32(high) * s + o, rounding)
            for c in range(whole * group, width):
                code = np.int32((packed[r, c // 2] >> (4 * (c % 2))) & 15)
                out[r, c] = _round16(np.float32(code) * scale[r, whole] + offset[r, whole], rounding)
            _add_row(out, r, columns, row_starts, delta)

    return compiled(decode)


@functools.cache
def _byte_decoder(group: int, rounding: int) -> Callable[..., None]:
    def decode(packed: Any, scale: Any, offset: Any, columns: Any, row_starts: Any, delta: Any, out: Any) -> None:
        rows, width = out.shape
        whole = width // group
        for r in range(rows):
            for g in range(whole):
                s, o = scale[r, g], offset[r, g]
                for j in range(group):
                    code = np.int32(packed[r, g * group + j])
                    out[r, g * group + j] = _round16(np.float32(code) * s + o, rounding)
            for c in range(whole * group, width):
                code = np.int32(packed[r, c])
                out[r, c] = _round16(np.float32(code) * scale[r, whole] + offset[r, whole], rounding)
            _add_row(out, r, columns, row_starts, delta)

    return compiled(decode)


@functools.cache
def _table_decoder(group: int, rounding: int) -> Callable[..., None]:
    half = group // 2

    def decode(packed: Any, scale: Any, table: Any, columns: Any, row_starts: Any, delta: Any, out: Any) -> None:
        rows, width = out.shape
        whole = width // group
        values = np.empty(16, np.float32)
        for r in range(rows):
            for g in range(whole):
                for code in range(16):
                    values[code] = _round16(table[code] * scale[r, g], rounding)
                for j in range(half):
                    byte = packed[r, g * half + j]
                    out[r, g * group + 2 * j] = values[byte & 15]
                    out[r, g * group + 2 * j + 1] = values[byte >> 4]
            for c in range(whole * group, width):
                code = (packed[r, c // 2] >> (4 * (c % 2))) & 15
                out[r, c] = _round16(table[code] * scale[r, whole], rounding)
            _add_row(out, r, columns, row_starts, delta)

    return compiled(decode)


def _add(columns: Any, row_starts: Any, delta: Any, out: Any) -> None:
    for r in range(len(out)):
        _add_row(out, r, columns, row_starts, delta)


_add_compiled = compiled(_add)
_NOTHING = (torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))


def can_decode(base: QuantizedTensor) -> bool:
    """Whether the fused kernel knows this store; it is for the CPU."""
    even = base.group_size % 2 == 0 or base.bits == 8 or base.group_size >= base.shape[2]
    return base.packed.device.type == "cpu" and even and base.dtype in (torch.float16, torch.bfloat16)


def decode_expert(
    base: QuantizedTensor, e: int, out: Tensor, columns: Tensor | None = None, row_starts: Tensor | None = None,
    delta: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the weights of expert e into `out`, fp32 [out, in], contiguous, on the CPU; with deltas added where given.

    columns: int32 [n], row_starts: int32 [out + 1], delta: fp32 [n]: the active weights of this expert in CSR form.
    Equals `dequantize` and an addition in fp32, to the bit. Runs on the calling thread and releases the GIL.
    """
    assert out.dtype == torch.float32, out.dtype
    assert out.is_contiguous(), out.stride()
    active = _NOTHING if delta is None or columns is None or row_starts is None else (columns, row_starts, delta)
    arrays = [tensor.numpy() for tensor in active]
    if not can_decode(base):
        out.copy_(dequantize(base.expert(e))[0])
        _add_compiled(*arrays, out.numpy())
        return
    values = base.table if base.offset is None else base.offset[e].float()
    assert values is not None
    make = _table_decoder if base.offset is None else _byte_decoder if base.bits == 8 else _nibble_decoder
    decode = make(base.group_size, _rounding(base.dtype))
    decode(base.packed[e].numpy(), decode_scale(base.scale[e]).numpy(), values.numpy(), *arrays, out.numpy())


def add_deltas(out: Tensor, columns: Tensor, row_starts: Tensor, delta: Tensor) -> None:
    """out[r, columns[i]] += delta[i] for the i of row r; fp32 on the CPU, arguments as in `decode_expert`."""
    _add_compiled(columns.numpy(), row_starts.numpy(), delta.numpy(), out.numpy())
