"""Dependencies flow one way: a module of usaf/ imports only from modules of earlier rows of `ROWS`, the levels."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "usaf"
# Lowest first; a folder such as devices/ counts as one module. A new module fails here until it has its row.
ROWS = [
    {"__init__", "errors"},  # imported by anything
    # level 0
    {"settings", "quantization", "optimizer", "files", "tensor_file", "memory", "console", "workers", "read_ahead"},
    {"devices", "kernels", "source_formats", "source_folder", "partial", "workspace"},  # level 1
    {"sparse_weights", "selection", "linear", "samples", "demo"},  # level 2, in some rows: samples below data,
    {"expert_bank", "sparse_head"},  # what trains sparsely
    {"fused_experts", "head_loss"},  # fast paths of experts and head
    {"experts"},
    {"adapters"},  # rewrite families into what experts.py serves,
    {"skeleton", "architecture", "weight_plan"},  # what a family's code says of itself,
    {"checkpoint", "data", "prompts"},  # and the checkpoint's reader knows what an experts module is,
    {"expert_store", "delta"},  # and the store of quantised experts is filled from a checkpoint
    {"model", "merge"},  # level 3
    {
        "loss",
        "packing",
        "prefix",
        "generation",
        "trained_parts",
    },  # level 4, in two rows: both serve importance and evaluation
    {"importance", "evaluation", "run", "model_shape", "probe"},
    {"learning_rate", "delta_scale"},  # level 5: before and after the steps,
    {"trainer"},  # and these
    {"budget"},
    {"memory_limit"},
    {"session"},  # level 6: what every command needs before it works
    {"summary", "plan_time"},
    {"job"},  # one run, phase by phase
    {"merged_folder"},
    {"evaluate", "export"},  # level 7, the commands
    {"train", "quantize", "generate", "plan"},
]
ROW = {module: row for row, modules in enumerate(ROWS) for module in modules}
WITHOUT_TORCH = ["errors", "settings", "demo"]  # what `--help` imports


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names that `path` imports, those inside functions included unless told otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(REPOSITORY).parts[: -node.level] if node.level else ()
            base = ".".join([*folder, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imported_modules(path: Path) -> set[str]:
    """Modules of usaf/ that `path` imports; `from usaf import __version__` is an import of `__init__`."""
    parts = [name.split(".") for name in imports_of(path) if name.split(".")[0] == "usaf"]
    return {p[1] if len(p) > 1 and (p[1] in ROW or (PACKAGE / f"{p[1]}.py").exists()) else "__init__" for p in parts}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_from_lower_rows(path: Path) -> None:
    module = module_of(path)
    assert module in ROW, f"give usaf/{module} a row in {Path(__file__).name}"
    for imported in imported_modules(path) - {module}:
        assert imported in ROW, f"give usaf/{imported} a row in {Path(__file__).name}"
        assert ROW[imported] < ROW[module], (
            f"usaf/{module} (row {ROW[module]}) imports {imported} (row {ROW[imported]})"
        )


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_neither_torch_nor_transformers(module: str) -> None:
    # demo.py may import it where it builds the texts.
    imported = imports_of(PACKAGE / f"{module}.py", top_level_only=module == "demo")
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers"}
    assert {name.split(".")[1] for name in imported if name.startswith("usaf.")} <= {"errors"}


@pytest.mark.skipif(not (PACKAGE / "train.py").exists(), reason="usaf/train.py is not written yet")
def test_help_answers_without_loading_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "usaf.train", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--train-from" in done.stdout
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)
