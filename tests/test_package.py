"""What importing the package does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHOW = "import sys, os, json, usaf; print(json.dumps([os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules]))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "60000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing said", "said", "said otherwise"],
)
def test_idle_threads_soon_sleep_unless_the_user_says_otherwise(given: dict[str, str], expected: str | None) -> None:
    """torch reads it when it is imported, so it has to be set before."""
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", SHOW], env={**own, **given}, capture_output=True, check=True).stdout
    assert json.loads(shown) == [expected, False]
