"""The README's table of supported models, made of what the tests really checked.

    USAF_FAMILY_RESULTS=results.jsonl pytest tests/test_families.py tests/test_adapters.py -m "slow or not slow"
    python scripts/supported_models.py results.jsonl --readme README.md

A line of the results says what tests have shown of one family; lines of the same family are added up. Without
`--readme` the table is printed. A check that did not hold, or was not made, is a dash.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKS = ("load", "logits", "gradients", "split", "packing", "run", "reload", "export")
NOT_MADE = ("real weights", "GPU")  # by no test: only tiny random models on a CPU
MARKS = "<!-- supported models -->", "<!-- end supported models -->"
MODELS = {
    "deepseek_v2": "DeepSeek-V2", "deepseek_v3": "DeepSeek-V3, Kimi K2", "deepseek_v4": "DeepSeek-V4",
    "ernie4_5_moe": "ERNIE-4.5", "gemma4": "Gemma 4 MoE", "gemma4_text": "Gemma 4 MoE", "glm4_moe": "GLM-4.5",
    "glm4v_moe": "GLM-4.5V", "gpt_oss": "gpt-oss", "granitemoe": "Granite-MoE", "hunyuan_v1_moe": "Hunyuan",
    "kimi_k25": "Kimi K2.5", "llama4_text": "Llama 4", "longcat_flash": "LongCat-Flash", "step3p7": "Step 3.7",
    "dbrx": "DBRX", "jetmoe": "JetMoE", "minimax_m2": "MiniMax-M2", "mistral3": "Mistral 3 with an MoE text part",
    "mixtral": "Mixtral 8x7B, 8x22B", "nemotron_h": "Nemotron-H", "olmoe": "OLMoE", "phimoe": "Phi-MoE",
    "qwen2_moe": "Qwen2-MoE", "qwen3_5_moe": "Qwen3.5-MoE", "qwen3_moe": "Qwen3-MoE, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next", "qwen3_vl_moe": "Qwen3-VL-MoE",
}  # fmt: skip
"""What users call a family, where its model_type does not say it."""


def read_records(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records of each family in one: what any of them says."""
    records: dict[str, dict[str, Any]] = {}
    for record in (json.loads(line) for line in lines if line.strip()):
        known = records.setdefault(record["family"], record)
        for name in ("checked", "notes"):
            known[name] = list(dict.fromkeys([*known[name], *record[name]]))
    return records


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, a family a row; below it what was not checked at all."""
    used = [check for check in CHECKS if any(check in r["checked"] for r in records.values())]
    columns = ["model_type", "models", "class", *used, "notes"]
    rows = [columns, ["---"] * len(columns)]
    for family in sorted(records):
        record = records[family]
        marks = ["yes" if check in record["checked"] else "-" for check in used]
        notes = "; ".join(record["notes"])
        rows.append([f"`{family}`", MODELS.get(family, ""), f"`{record['saved_class']}`", *marks, notes])
    versions = ", ".join(sorted({record["transformers"] for record in records.values()}))
    absent = [*(check for check in CHECKS if check not in used), *NOT_MADE]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"(transformers {versions}; not checked for any: {', '.join(absent)}.)"])


def families_of(text: str) -> list[str]:
    """The families that a table names, in its order."""
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def replaced(readme: str, made: str) -> str:
    """The README with this table between its marks."""
    begin, end = (readme.index(mark) for mark in MARKS)
    return f"{readme[:begin]}{MARKS[0]}\n{made}\n{readme[end:]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the README's table of supported models.")
    parser.add_argument("results", type=Path, help="what USAF_FAMILY_RESULTS named")
    parser.add_argument("--readme", type=Path, help="put the table between this file's marks")
    arguments = parser.parse_args(argv)
    made = table(read_records(arguments.results.read_text(encoding="utf-8").splitlines()))
    if arguments.readme is None:
        print(made)
    else:
        readme = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(replaced(readme, made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
