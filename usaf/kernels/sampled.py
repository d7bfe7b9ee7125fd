"""Sampled weight gradients: the entries of `grad_output.T @ inputs` at given places, without forming the product.

A linear map y = x W^T has dL/dW[r, c] = sum_t grad_output[t, r] * inputs[t, c]. Training needs 0.5% of these entries,
so the dense product, as dear as the forward itself, is never formed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

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
    if inputs.device.type == "cpu" and inputs.dtype in (torch.float32, torch.float64):
        return sampled_gradient_csr(grad_output, inputs, columns, row_starts)
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


def sampled_gradient_csr(grad_output: Tensor, inputs: Tensor, columns: Tensor, row_starts: Tensor) -> Tensor:
    """torch's sampled product (SDDMM) over a CSR pattern: about four times the speed of a dense product at 0.5%."""
    shape = (grad_output.shape[1], inputs.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            row_starts, columns, torch.zeros_like(columns, dtype=inputs.dtype), shape, check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, grad_output.t(), inputs, beta=0).values()
