"""What every test module shares: quiet libraries, and one thread a worker where tests run side by side."""

from __future__ import annotations

import os

# Two workers of two threads on two cores wait for each other more than they work. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
