"""The main job, `python train.py`, or `python -m usaf.train` with flags: load, prefix, importance, train, save.

Settings come from the environment and from flags (`settings`); `--help` lists them. Heavy imports wait until the
settings are known to be right. With RESUME a run goes on in its own folder, by its own settings (`choose_folder`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from usaf.demo import DEMO_SETTINGS
from usaf.errors import UserError
from usaf.settings import FIELDS, ResolvedSettings, changed_settings, load_settings

EXPLICIT = ("environment", "flag")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the main job; returns its exit status (see `console`)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        settings = load_settings(arguments, os.environ if environ is None else environ, DEMO_SETTINGS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from usaf.console import run_command

    return run_command(lambda: start(settings))


def start(settings: ResolvedSettings) -> int:
    from usaf.job import run_job

    resume_from, settings = choose_folder(settings)
    return run_job(settings, resume_from)


def choose_folder(settings: ResolvedSettings) -> tuple[Path | None, ResolvedSettings]:
    """(the folder to resume or None, the settings of the run).

    A resumed run keeps its own settings; those given now must not change its result.

    Raises:
        UserError: RESUME names no run, or a setting that shapes the result was given another value.
    """
    from usaf.run import find_resumable, list_checkpoints, read_settings

    values = settings.values
    if values.resume is None:
        return None, settings
    if values.resume == "auto":
        folder = find_resumable(Path(values.output_dir).expanduser(), values.run_tag)
        if folder is None:
            return None, settings
    else:
        folder = Path(values.resume).expanduser()
        if not (folder / "settings.json").is_file():
            raise UserError(
                f"RESUME={values.resume}: is not the folder of a run (it has no settings.json); give one such as "
                "runs/<tag>, or RESUME=auto"
            )
    old = ResolvedSettings.from_json(read_settings(folder)["settings"])
    merged = merge_settings(old, settings)
    changed = changed_settings(old, merged)
    if changed and list_checkpoints(folder):  # without a checkpoint there is no result yet to shape
        raise UserError(
            f"RESUME={folder}: {'; '.join(changed)}; a resumed run keeps what shapes its result: leave it out, or "
            "start a new run"
        )
    return folder, merged


def merge_settings(old: ResolvedSettings, new: ResolvedSettings) -> ResolvedSettings:
    """The old run's settings, but for those given explicitly now."""
    merged = old
    for name in FIELDS:
        if new.sources[name] in EXPLICIT and name != "run_tag":
            merged = merged.replace(new.sources[name], **{name: getattr(new.values, name)})
    return merged


if __name__ == "__main__":
    sys.exit(main())
