"""How functions are compiled: once for a processor, and kept on the disk, so that later processes only load them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

REASSOCIATED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in several lanes. Nothing here assumes away NaN or inf: a skipped step is told by them."""


def compiled(function: Callable[..., Any], reassociate: bool = False) -> Callable[..., Any]:
    """`function` in machine code that runs without the GIL."""
    options: dict[str, Any] = {"nogil": True, "fastmath": REASSOCIATED if reassociate else False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder where it could be kept, as in a read-only container: compiled in each process
        return numba.njit(**options)(function)
