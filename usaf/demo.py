"""The bundled demo: its model, and its texts made of Python and C++ that every machine with Python and torch has.

Pretraining (`scripts/pretrain_demo.py`) saw the standard library less `PYTHON_HELDOUT`. Fine-tuning is on C++: the
hand-written headers that the torch wheel ships, so nothing is downloaded. Whole libraries are held out, the analogue of
held-out repositories, and the held-out Python modules measure what fine-tuning makes the model forget.

Two things would let a model look as if it had learnt C++ when it had learnt boilerplate: licence headers, and the guard
that the wheel wraps around every header. Both are cut. Generated headers are left out for the same reason.

What is in the wheel changes with torch, and the standard library with Python, so the texts are made again when either
version changes, and perplexities compare only within one pair of versions. torch is looked up, not imported: the demo's
settings are needed by `--help`, which must not wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from usaf.errors import UserError

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
DEMO_MODEL = DATA_FOLDER / "demo-moe"
DEMO_TEXT = DATA_FOLDER / "demo-text"  # ignored by git, made on first use
DEMO_SETTINGS: dict[str, object] = {
    "train_from": 2,  # four of six layers: the default, one in six, is meant for 48
    "frac": 0.02,  # at 0.5% a model this small forgets more for what it learns
    "router_lr": 2e-4,  # at 1e-3 an expert starved
    "seq_len": 256,
    "microbatch": 4,
    "eval_every": 60,
    "eval_samples": 32,
}
"""What the bundled demo brings in place of the defaults (source `demo` in the table); docs/decisions.md has why."""

# Modules the demo model never saw: its own held-out set, and later the measure of forgetting.
PYTHON_HELDOUT = {
    "argparse.py", "bdb.py", "cgi.py", "csv.py", "dataclasses.py", "fractions.py", "ftplib.py", "gzip.py",
    "heapq.py", "imaplib.py", "optparse.py", "sched.py", "shelve.py", "statistics.py", "tarfile.py", "textwrap.py",
    "wave.py", "json", "wsgiref",
}  # fmt: skip
# Tests are most of a library, tables (encodings, pydoc_data) are not language, and the last two are not source of
# this Python.
PYTHON_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data",
                  "lib2to3", "ensurepip", "__pycache__"}  # fmt: skip

# Folders below torch/include. torch/headeronly is in neither: much of it moved there from c10.
HELDOUT_LIBRARIES = ("c10", "pybind11", "fmt")
TRAIN_FOLDERS = ("ATen", "caffe2", "fbgemm", "kineto", "tensorpipe", "torch/csrc")
HEADER_SUFFIXES = {".h", ".hpp"}

TRAIN_CHARACTERS = 3_000_000
HELDOUT_CHARACTERS = 200_000
# An evaluation reads some 40,000 characters of each held-out set; excerpts spread it over ten files or more.
EXCERPT_CHARACTERS = 4_000
MIN_CHARACTERS = 200  # less is an empty module, or a header that only includes another
# torch's hand-written headers end below this; above it stand tables and expanded templates, most without a mark.
MAX_HEADER_CHARACTERS = 100_000

TEXT_FORMAT = 1  # raise it when the same versions would give other texts
MANIFEST = "manifest.json"

_GENERATED = re.compile(r"@generated|auto[- ]?generated|automatically generated|generated (by|from) |do not edit", re.I)
_LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.I)
_COMMENT = re.compile(r"/\*.*?\*/[ \t]*\n?|(?:[ \t]*//[^\n]*(?:\n|\Z))+", re.S)
_BETWEEN_COMMENTS = re.compile(r"(?:\s|#pragma once\b)*")
_WHEEL_GUARD = re.compile(r"\s*#if [^\n]*TORCH_STABLE_ONLY[^\n]*\n(.*)\n#else\n#error[^\n]*\n#endif[^\n]*\s*", re.S)


@dataclass(frozen=True)
class DemoText:
    """JSONL files of `{"text": ...}` lines."""

    train: Path
    heldout: list[Path]  # one a held-out library
    forgetting: Path  # Python modules that pretraining did not see either


def build_demo_text(folder: Path = DEMO_TEXT) -> DemoText:
    """The demo's texts, written to `folder` unless they are there already, from the same versions of torch and Python.

    Raises UserError where torch came without its headers, or Python without its standard library's source.
    """
    versions = {"format": TEXT_FORMAT, "torch": metadata.version("torch"), "python": platform.python_version()}
    written = _written_files(folder, versions)
    if written is None:
        from usaf.files import write_json  # imports torch

        texts = _collect_texts()
        # Without its manifest a folder counts as not built, so a crash between two files leaves no mixture behind.
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, documents in texts.items():
            _write_jsonl(folder / name, documents)
        files = {n: {"documents": len(d), "characters": sum(map(len, d))} for n, d in texts.items()}
        write_json(folder / MANIFEST, {**versions, "files": files})
        written = list(texts)
    heldout = [folder / f"{library}.jsonl" for library in HELDOUT_LIBRARIES if f"{library}.jsonl" in written]
    return DemoText(folder / "train.jsonl", heldout, folder / "forgetting_python.jsonl")


def python_sources(*, held_out: bool) -> list[str]:
    """The texts of the standard library's modules, in the order of their paths: the held-out ones, or the others."""
    return list(_python_files(held_out=held_out).values())


def clean_header(text: str) -> str:
    """`text` without the guard that torch's wheel puts around every header, and without leading licence comments."""
    if guarded := _WHEEL_GUARD.fullmatch(text):
        text = guarded[1]
    position = 0
    while comment := _COMMENT.match(text, _end_of_match(_BETWEEN_COMMENTS, text, position)):
        if _LICENCE.search(comment[0]):
            text = text[: comment.start()] + text[comment.end() :]
            position = comment.start()
        else:
            position = comment.end()
    return text.strip() + "\n"


def is_generated(path: str, text: str) -> bool:
    """Whether a header was written by a program; `path` is relative to torch/include, with forward slashes."""
    return (
        path.startswith("ATen/ops/")
        or "generated" in path.lower()
        or len(text) > MAX_HEADER_CHARACTERS
        or _GENERATED.search(text, 0, 2_000) is not None
    )


def _collect_texts() -> dict[str, list[str]]:
    """File name -> documents. A text that occurs twice is kept once, in a held-out set rather than in training."""
    include = _header_folder()
    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for library in HELDOUT_LIBRARIES:
        headers = _without_repeats(_headers(include, [library]), seen)
        if headers:  # torch did not always ship every one of them
            texts[f"{library}.jsonl"] = _excerpts(headers)
    headers = _without_repeats(_headers(include, TRAIN_FOLDERS), seen)
    if not texts or not headers:
        raise UserError(
            "DATASET_PATH is unset, and the demo's text cannot be made: this torch came without its C++ headers "
            f"({include}); set DATASET_PATH to a JSONL file, or install torch from its own wheel"
        )
    chosen = _within_budget(_shuffled(headers), headers, TRAIN_CHARACTERS)
    texts["train.jsonl"] = [headers[path] for path in sorted(chosen)]

    modules = _python_files(held_out=True)
    if not modules:
        raise UserError(
            "DATASET_PATH is unset, and the demo's text cannot be made: this Python came without the source of its "
            f"standard library ({sysconfig.get_paths()['stdlib']}); set DATASET_PATH to a JSONL file"
        )
    texts["forgetting_python.jsonl"] = _excerpts(modules)
    return texts


def _header_folder() -> Path:
    torch = importlib.util.find_spec("torch")
    assert torch is not None, "torch is a dependency of this package"
    assert torch.origin is not None
    return Path(torch.origin).parent / "include"


def _headers(include: Path, folders: Iterable[str]) -> dict[str, str]:
    """Path below `include` -> cleaned text, of the hand-written headers in `folders`, in the order of their paths."""
    headers = {}
    for folder in folders:
        paths = [path for path in (include / folder).rglob("*") if path.suffix in HEADER_SUFFIXES]
        for path in sorted(paths, key=lambda path: path.as_posix()):
            relative = path.relative_to(include).as_posix()
            text = path.read_text(encoding="utf-8", errors="ignore")
            if not is_generated(relative, text) and len(cleaned := clean_header(text)) > MIN_CHARACTERS:
                headers[relative] = cleaned
    return headers


def _python_files(*, held_out: bool) -> dict[str, str]:
    """Path below the standard library -> text, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for top in sorted(root.iterdir()):
        if (top.name in PYTHON_HELDOUT) != held_out or top.name in PYTHON_SKIPPED:
            continue
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            parts = path.relative_to(root).parts
            if path.suffix != ".py" or PYTHON_SKIPPED.intersection(parts):
                continue
            if any(part.startswith("config-") for part in parts):
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > MIN_CHARACTERS:
                files["/".join(parts)] = text
    return files


def _without_repeats(files: Mapping[str, str], seen: set[str]) -> dict[str, str]:
    """`files` less those whose text is in `seen`, to which the others are added."""
    kept = {}
    for path, text in files.items():
        if text not in seen:
            seen.add(text)
            kept[path] = text
    return kept


def _excerpts(files: Mapping[str, str]) -> list[str]:
    """A held-out set: an excerpt of every file, in an order that mixes the folders, up to `HELDOUT_CHARACTERS`."""
    excerpts = {path: _excerpt(text) for path, text in files.items()}
    return [excerpts[path] for path in _within_budget(_shuffled(excerpts), excerpts, HELDOUT_CHARACTERS)]


def _excerpt(text: str) -> str:
    """Whole lines from the middle of `text`, at most `EXCERPT_CHARACTERS`: its beginning is mostly includes."""
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    start = text.rfind("\n", 0, (len(text) - EXCERPT_CHARACTERS) // 2) + 1
    end = start + EXCERPT_CHARACTERS
    return text[start : text.rfind("\n", start, end) + 1 or end]


def _shuffled(paths: Iterable[str]) -> list[str]:
    """By a hash of the path: the same order on every machine, and a new file moves no other."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())


def _within_budget(paths: Iterable[str], files: Mapping[str, str], characters: int) -> Iterator[str]:
    """The paths whose texts fit into `characters` together, taken in order; one too long is passed over."""
    for path in paths:
        if len(files[path]) <= characters:
            characters -= len(files[path])
            yield path


def _end_of_match(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _written_files(folder: Path, versions: Mapping[str, object]) -> list[str] | None:
    """The names of the text files in `folder`, or None unless all of them were made from `versions`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # never built, or cut short by a power loss
        return None
    if any(manifest.get(key) != value for key, value in versions.items()):
        return None
    names = list(manifest["files"])
    return names if all((folder / name).is_file() for name in names) else None


def _write_jsonl(path: Path, documents: Iterable[str]) -> None:
    from usaf.files import replacing  # imports torch

    with replacing(path) as file:
        file.writelines(json.dumps({"text": text}).encode("utf-8") + b"\n" for text in documents)
