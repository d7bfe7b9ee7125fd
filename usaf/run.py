"""A run's folder: settings, metrics, resumable checkpoints, summary. Each file is whole or absent.

    runs/<tag>/settings.json  metrics.jsonl  summary.json  delta.safetensors  checkpoints/step-000060/

A checkpoint is written into a temporary folder, flushed, and renamed; the oldest go, by a rename first, only after the
new one is whole. A process killed at any moment therefore resumes from the newest complete one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usaf.errors import RunError, UserError, one_line
from usaf.files import FULL_DISK, FolderLock, flush, flush_folder, json_numbers, write_json
from usaf.settings import ResolvedSettings
from usaf.tensor_file import TensorFile, TensorFileWriter

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds: tensors by name, and a JSON object (step, schedules, settings, fingerprints ...)."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


class RunFolder:
    """The folder of one run, locked for as long as the process lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.lock = FolderLock(folder)
            self.checkpoints = folder / "checkpoints"
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in self.checkpoints.glob(".partial-*"):  # of a killed process
                shutil.rmtree(leftover)
        except OSError as error:
            kind = RunError if error.errno in FULL_DISK else UserError
            raise kind(
                f"OUTPUT_DIR: {folder} cannot be made or written ({error.strerror}); choose a folder that can be"
            ) from error
        self.metrics_path = folder / "metrics.jsonl"

    @property
    def delta_path(self) -> Path:
        return self.folder / "delta.safetensors"

    def write_settings(self, settings: ResolvedSettings, about: dict[str, Any]) -> None:
        write_json(self.folder / "settings.json", {"settings": settings.to_json(), **about})

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / "summary.json", summary)

    def remove_summary(self) -> None:
        """A run that goes has none: one that is finished again, and interrupted then, is found by `find_resumable`."""
        path = self.folder / "summary.json"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{path}: could not be removed ({error.strerror or error}); close what holds it open and go "
                           "on with RESUME") from error  # fmt: skip

    def log(self, event: str, **values: Any) -> None:
        """One line of metrics.jsonl. Numbers that JSON cannot hold (nan, inf) are written as null."""
        data = {"event": event, "time": round(time.time(), 3), **json_numbers(values)}
        try:
            with open(self.metrics_path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(data, ensure_ascii=False) + "\n")
        except OSError as error:
            raise could_not_be_saved(self.metrics_path, error) from error

    def metrics_bytes(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.is_file() else 0

    def truncate_metrics(self, size: int) -> None:
        """Back to what a checkpoint saw: a resumed run writes the later lines again."""
        if self.metrics_path.is_file() and self.metrics_path.stat().st_size > size:
            with open(self.metrics_path, "r+b") as file:
                file.truncate(size)

    def save(self, step: int, state: SavedState, keep: int) -> Path:
        """Write `checkpoints/step-<step>`, then remove all but the newest `keep`.

        A step that is there already is left as it is: the same run saves it again when it ends or is interrupted right
        after a save, and nothing but times would differ.

        Raises:
            RunError: it could not be written; the earlier checkpoints are whole.
        """
        final = self.checkpoints / f"step-{step:06d}"
        partial = self.checkpoints / f".partial-{step:06d}"
        try:
            if not final.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                self._write_state(partial, state)
                self._flush_metrics()
                os.replace(partial, final)
                flush_folder(self.checkpoints)
            for old in list_checkpoints(self.folder)[:-keep]:
                self._remove(old)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise could_not_be_saved(final, error) from error
        return final

    def _write_state(self, folder: Path, state: SavedState) -> None:
        with open(folder / "state.safetensors", "wb") as file:
            writer = TensorFileWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in state.tensors.items()}, {})
            for name, tensor in state.tensors.items():
                writer.write(name, 0, tensor)
            flush(file)
        with open(folder / "state.json", "w", encoding="utf-8") as text:
            json.dump(state.about, text)
            flush(text)
        flush_folder(folder)

    def _flush_metrics(self) -> None:
        """A checkpoint counts the lines before it, so they must outlive a power loss as it does."""
        if self.metrics_path.is_file():
            with open(self.metrics_path, "ab") as file:
                flush(file)

    def _remove(self, checkpoint: Path) -> None:
        """Out of sight at once, then file by file: a process killed meanwhile leaves no damaged checkpoint."""
        doomed = checkpoint.with_name(f".partial-{checkpoint.name}")
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)

    def close(self) -> None:
        self.lock.release()


def could_not_be_saved(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: could not be saved ({error.strerror or error}); earlier checkpoints are whole: free some space and "
        "go on with RESUME=auto"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def load_checkpoint(path: Path) -> SavedState:
    """Raises UserError where a file of it is damaged (not by this program: its checkpoints are whole or absent)."""
    remedy = f"delete {path}, and RESUME goes on from the checkpoint before it, or begins anew where there is none"
    try:
        about = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'state.json'}: is damaged ({one_line(error)}); {remedy}") from None
    file = TensorFile(path / "state.safetensors", remedy)
    return SavedState({name: file.read(name) for name in file.entries}, about)


def read_settings(folder: Path) -> dict[str, Any]:
    """settings.json of a run."""
    path = folder / "settings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; the file was changed after the run, restore it") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise UserError(f"{path}: has no settings in it; the file was changed after the run, restore it")
    return found


def find_resumable(output_dir: Path, run_tag: str | None) -> Path | None:
    """The folder RESUME=auto goes on with: that of RUN_TAG, or the newest run without a summary. None: start anew."""
    if run_tag is not None:
        folder = output_dir / run_tag
        return folder if (folder / "settings.json").is_file() else None
    if not output_dir.is_dir():
        return None
    runs = [p.parent for p in output_dir.glob("*/settings.json") if not p.parent.name.startswith(".")]
    unfinished = [folder for folder in runs if not (folder / "summary.json").is_file()]
    return max(unfinished, key=lambda p: (p / "settings.json").stat().st_mtime, default=None)


def random_states() -> dict[str, Tensor]:
    """Everything random: torch's global generator. Data order and selection have seeded generators of their own."""
    return {"random.torch": torch.get_rng_state()}


def restore_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.torch"])
