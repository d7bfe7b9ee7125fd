"""Sampled weight gradients: the entries of `grad_output.T @ inputs` at given places, without forming the product.

A linear map y = x W^T has dL/dW[r, c] = sum_t grad_output[t, r] * inputs[t, c]. Training needs 0.5% of these entries,
so the dense product, as dear as the forward itself, is never formed.

On the CPU both factors are turned feature-major first, which costs two small copies: every entry is then the product of
two contiguous vectors, and the one of row r stays in the cache for all places of the row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from usaf.kernels.compiled import compiled

# Elements of a gathered block in the reference: 16 MiB in fp32, whatever the number of tokens.
GATHER_BLOCK_ELEMENTS = 1 << 22


def sampled_gradient(grad_output: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    """Entries (rows[i], columns[i]) of grad_output.T @ inputs.

    Args:
        grad_output: [tokens, out], floating point.
        inputs: [tokens, in], same dtype and device.
        rows, columns: int32 or int64 [n], sorted by row, then column, without repeats.
        row_starts: [out + 1], the CSR form of `rows`, of the same type.

    Returns:
        [n], dtype of `inputs`, but fp32 for 16-bit inputs: their products are exact in it.
    """
    if inputs.device.type == "cpu" and inputs.dtype == torch.float32:
        return sampled_gradient_compiled(grad_output, inputs, columns, row_starts)
    return sampled_gradient_reference(grad_output, inputs, rows, columns)


def sampled_gradient_reference(grad_output: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Two gathers and a reduction, in blocks of bounded size; runs on every device (DirectML has no sparse tensors)."""
    block = max(1, GATHER_BLOCK_ELEMENTS // max(1, inputs.shape[0]))
    wide = torch.promote_types(inputs.dtype, torch.float32)
    outputs, features = grad_output.t().to(wide), inputs.t().to(wide)
    parts = [
        (outputs.index_select(0, r) * features.index_select(0, c)).sum(1)
        for r, c in zip(rows.split(block), columns.split(block), strict=True)
    ]
    return torch.cat(parts)


def sampled_gradient_compiled(grad_output: Tensor, inputs: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    """The same in fp32 on the CPU, on the calling thread. The sums are taken in lanes, so the last bits differ."""
    result = torch.empty(len(columns))
    if len(columns):
        outputs, features = grad_output.detach().t().contiguous(), inputs.detach().t().contiguous()
        _sampled(outputs.numpy(), features.numpy(), columns.numpy(), row_starts.numpy(), result.numpy())
    return result


def _sampled_products(outputs: Any, features: Any, columns: Any, row_starts: Any, result: Any) -> None:
    for r in range(len(outputs)):
        for i in range(row_starts[r], row_starts[r + 1]):
            column, total = columns[i], np.float32(0)
            for t in range(outputs.shape[1]):
                total += outputs[r, t] * features[column, t]
            result[i] = total


_sampled = compiled(_sampled_products, reassociate=True)
