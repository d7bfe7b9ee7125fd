"""The script users start: `python train.py`, driven by environment variables or flags. All of it is in `usaf.train`."""

from __future__ import annotations

import sys

from usaf.train import main

if __name__ == "__main__":
    sys.exit(main())
