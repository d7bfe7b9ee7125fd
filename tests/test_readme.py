"""The README's generated parts are current, and its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import usaf
from usaf.settings import markdown_table

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def generated(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end {mark} -->", README, re.S)
    assert found is not None, f"README.md lost its {mark} marks"
    return found.group(1).strip()


def test_settings_table_is_current() -> None:
    """Regenerate with: python -c "import usaf
    from usaf.settings import markdown_table; print(markdown_table())" """
    assert generated("settings") == markdown_table().strip()


def test_every_event_of_a_run_is_listed() -> None:
    job = (Path(usaf.__file__).parent / "job.py").read_text(encoding="utf-8")
    logged = set(re.findall(r'run\.log\(\s*"([^"]*)"', job))
    listed = re.search(r"`metrics\.jsonl` \| one event a line: ([a-z_, ]*) \|", README)
    assert listed is not None
    assert set(listed.group(1).split(", ")) == logged
    assert all(re.fullmatch(r"[a-z_]+", name) for name in logged)


def test_commands_are_there() -> None:
    assert re.search(r"<!-- test-command -->\n+```bash\n", README)
    assert "python train.py" in README
