"""The table of supported models says what the records say, and the README's names exactly the families tested."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from adapted_families import FAMILIES as ADAPTED
from all_families import CONFIGS, WRAPPERS

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "scripts" / "supported_models.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("supported_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(family: str, checked: list[str], notes: list[str] | None = None) -> str:
    return json.dumps({"family": family, "saved_class": family.title(), "built_class": family.title(),
                       "checked": checked, "notes": notes or [], "transformers": "5.0.0"})  # fmt: skip


def test_a_row_says_what_was_checked(script: Any) -> None:
    lines = [record("mixtral", ["load", "logits", "run"]), record("zaya", ["load"], ["one document a row"]), ""]
    made = script.table(script.read_records(lines))
    assert made.splitlines()[0] == "| model_type | models | class | load | logits | run | notes |"
    assert "| `mixtral` | Mixtral 8x7B, 8x22B | `Mixtral` | yes | yes | yes |  |" in made
    assert "| `zaya` |  | `Zaya` | yes | - | - | one document a row |" in made
    assert "not checked for any: gradients, split, packing, reload, export, real weights, GPU" in made
    assert script.families_of(made) == ["mixtral", "zaya"]


def test_records_of_a_family_add_up(script: Any) -> None:
    records = script.read_records([record("zaya", ["load", "run"], ["a"]), record("zaya", ["load", "export"], ["a"])])
    assert records["zaya"]["checked"] == ["load", "run", "export"]
    assert records["zaya"]["notes"] == ["a"]


def test_the_readme_gets_the_table_between_its_marks(script: Any, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(record("zaya", ["load"]) + "\n", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n{}\nold\n{}\n\nafter\n".format(*script.MARKS), encoding="utf-8")
    for _ in range(2):  # the second time replaces what the first put there
        assert script.main([str(tmp_path / "results.jsonl"), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n\n" + script.MARKS[0])
    assert text.endswith(script.MARKS[1] + "\n\nafter\n")
    assert "old" not in text
    assert script.families_of(text) == ["zaya"]


def test_every_named_model_is_a_family(script: Any) -> None:
    assert set(script.MODELS) <= {*CONFIGS, *WRAPPERS, *ADAPTED}


def test_the_readme_names_the_families_that_are_tested(script: Any) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in script.MARKS)
    named = script.families_of(text[begin:end])
    assert named == sorted({*CONFIGS, *WRAPPERS, *(family for family in ADAPTED if "," not in family)})
