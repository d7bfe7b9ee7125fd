"""Which entries of a dense gradient are large enough to matter: one pass, where operators would take five.

After the first experts of a tensor all but some half per cent of the entries lie below the threshold of the k best so
far. A block of entries is compared as a whole, and looked at one by one only where it holds a larger one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from usaf.kernels.compiled import compiled

BLOCK = 64


def at_least(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(positions int64 [n], ascending, of the entries with |value| >= threshold; their |values|, fp32 [n]).

    values: fp32, flat. A NaN is never below: it is found, for the caller to see.
    """
    if values.device.type == "cpu":
        return at_least_compiled(values, threshold)
    return at_least_reference(values, threshold)


def at_least_reference(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    sizes = values.abs()
    positions = (~(sizes < threshold)).nonzero().flatten()
    return positions, sizes[positions]


def at_least_compiled(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    flat = values.detach().contiguous().numpy()
    count = _count(flat, np.float32(threshold))
    positions, sizes = torch.empty(count, dtype=torch.int64), torch.empty(count)
    _collect(flat, np.float32(threshold), positions.numpy(), sizes.numpy())
    return positions, sizes


def _count_large(values: Any, threshold: Any) -> Any:
    count = 0
    for block in range(len(values) // BLOCK):
        some = np.float32(0)  # a lane of the width of the values
        for i in range(BLOCK):
            some += np.float32(0) if abs(values[block * BLOCK + i]) < threshold else np.float32(1)
        count += int(some)
    for i in range(len(values) // BLOCK * BLOCK, len(values)):
        count += 0 if abs(values[i]) < threshold else 1
    return count


def _collect_large(values: Any, threshold: Any, positions: Any, sizes: Any) -> None:
    found = 0
    for block in range(len(values) // BLOCK):
        some = np.float32(0)  # a lane of the width of the values
        for i in range(BLOCK):
            some += np.float32(0) if abs(values[block * BLOCK + i]) < threshold else np.float32(1)
        if some:
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                if not (abs(values[i]) < threshold):
                    positions[found], sizes[found] = i, abs(values[i])
                    found += 1
    for i in range(len(values) // BLOCK * BLOCK, len(values)):
        if not (abs(values[i]) < threshold):
            positions[found], sizes[found] = i, abs(values[i])
            found += 1


_count = compiled(_count_large, reassociate=True)
_collect = compiled(_collect_large, reassociate=True)
