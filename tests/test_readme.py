"""The README's generated parts are current, and its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

from usaf.settings import markdown_table

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def generated(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end {mark} -->", README, re.S)
    assert found is not None, f"README.md lost its {mark} marks"
    return found.group(1).strip()


def test_settings_table_is_current() -> None:
    """Regenerate with: python -c "from usaf.settings import markdown_table; print(markdown_table())" """
    assert generated("settings") == markdown_table().strip()


def test_commands_are_there() -> None:
    assert re.search(r"<!-- test-command -->\n+```bash\n", README)
    assert "python train.py" in README
