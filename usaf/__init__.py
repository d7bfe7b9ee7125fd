"""USAF, Ultra Sparse Adaptive Fine-Tuning: trains about 0.5% of an MoE model's own weights, and its routers."""

import os

__version__ = "0.1.0"

# Before torch is imported, whose threads read it then (libgomp, on Linux): how often one that has nothing to do looks
# for work before it sleeps. By default 300,000 times, milliseconds, which it takes from whoever has work to do where
# other programs run too: there training was 2.5 times as slow, and on idle cores no faster (docs/decisions.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "60000")
