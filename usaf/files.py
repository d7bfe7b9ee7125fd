"""Files that are complete or absent: atomic writes, folder locks, hashes.

Everything is written to a temporary name in the same folder, flushed to the disk, then renamed; a process killed at any
moment leaves the old file or the new one. Nothing here replaces a file that is mapped: Windows forbids that.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from usaf.errors import RunError, UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO} if os.name != "nt" else {errno.ENOSPC}
HELD = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK}  # by another process, said of a lock


def flush(file: IO[Any]) -> None:
    """Down to the disk, so that a rename that follows never uncovers an empty file after a power loss."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows has no such call and needs none; some network disks refuse it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    What a killed process left of an earlier attempt is removed first.

    Args:
        overwrite: False keeps a `path` that another process made meanwhile, and drops this one's work.

    Raises:
        UserError: no rights, not a folder.
        RunError: full disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with open_locked(partial) as file:
            yield file
            flush(file)
            if os.name != "nt" and (overwrite or not path.exists()):
                os.replace(partial, path)  # while the lock still keeps others from removing it
        if os.name == "nt" and (overwrite or not path.exists()):  # Windows renames closed files only
            os.replace(partial, path)
    except OSError as error:
        kind = RunError if error.errno in FULL_DISK else UserError
        raise kind(f"{path}: could not be written ({error.strerror or error}); free space or check the rights of "
                   f"{path.parent}") from error  # fmt: skip
    finally:
        with suppress(OSError):  # it is there only where something went wrong, and that is what is to be told
            partial.unlink()
    flush_folder(path.parent)


def open_locked(path: Path) -> IO[bytes]:
    """Open a new file for writing. While it is open, `remove_abandoned` of other processes leaves it alone."""
    while True:
        file = open(path, "xb")  # noqa: SIM115  (the caller closes it)
        if os.name == "nt":
            return file  # Windows removes no file that is open
        with suppress(OSError):  # a disk without locks: then nobody can lock the file to remove it either
            lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # another process took it for abandoned before the lock was there


def remove_abandoned(path: Path) -> None:
    """Delete the partial files for `path` whose process is gone: those that can be locked, on Windows deleted."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            if os.name != "nt":
                with open(partial, "rb") as file:
                    lock(file)
                    partial.unlink()
            else:
                partial.unlink()


def require_writable(path: Path, what: str) -> None:
    """Refuse a file that could not be written at the end, before the work that it is to hold. Leaves nothing behind.

    what: the flag or setting that names it.

    Raises:
        UserError: a folder is there in its place, or its folder can be neither used nor made.
    """
    if path.is_dir():
        raise UserError(f"{what} {path}: is a folder; give the name of a file")
    require_writable_folder(path.absolute().parent, f"{what} {path}")


def require_writable_folder(folder: Path, what: str) -> None:
    """Refuse a folder that takes no files, or cannot be made. Leaves nothing behind.

    what: the flag or setting and its value, whose place this is.
    """
    existing = existing_parent(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{what}: could not be written ({existing}: {error.strerror or error}); give one in a "
                        "folder that can") from None  # fmt: skip


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.exists():
            return parent
    raise UserError(f"{folder}: no such drive; give a folder on a disk that is there")


def json_numbers(value: Any) -> Any:
    """`value` with None for every number that JSON does not have (nan, inf), however deep it lies."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, data: object) -> None:
    with replacing(path) as file:
        file.write((json.dumps(json_numbers(data), indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def hash_file(path: Path) -> str:
    """sha256 of a file's content, remembered beside it by size and time of change (17 GB take some ten seconds)."""
    stat = path.stat()
    stamp = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memo = path.with_name(path.name + ".sha256.json")
    known = read_memo(memo)
    if known is not None and {name: known.get(name) for name in stamp} == stamp:
        return known["sha256"]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    with suppress(UserError):  # beside a file on a read-only or full disk it is worked out again next time
        write_json(memo, {**stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def read_memo(path: Path) -> dict[str, Any] | None:
    """What an earlier `hash_file` left, if that can be used."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and isinstance(known.get("sha256"), str) else None


def fingerprint(parts: object) -> str:
    """sha256 of anything that JSON can hold, keys sorted."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def require_space(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Refuse before anything is written. `folder` need not exist yet."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed_bytes > free:
        raise UserError(f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
                        f"free; {remedy}")  # fmt: skip


def lock(file: IO[Any], wait: bool = False) -> None:
    """Take the operating system's lock on an open file, or raise OSError; closing the file gives it back.

    wait: not on Windows.
    """
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def locked(path: Path, busy: UserError) -> Iterator[IO[bytes]]:
    """The file `path`, made if need be, open for appending and under the system's lock for as long as the block.

    Its holder may remove it. On a disk without locks nothing keeps a second process out.

    Raises:
        UserError: `busy`, where another process holds it.
    """
    while True:
        with open(path, "a+b") as file:
            try:
                lock(file)
            except OSError as error:
                if error.errno in HELD:
                    raise busy from None
            if os.name == "nt" or os.fstat(file.fileno()).st_nlink > 0:
                yield file
                return
            # else it was removed by a process that finished between the opening and the lock


class FolderLock:
    """One process at a time in a folder. The lock is the operating system's: a killed process leaves none behind."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = open(self.path, "a+b")  # noqa: SIM115  (held open for as long as the lock)
        try:
            lock(self.file)
        except OSError as error:
            self.file.close()
            raise UserError(f"{folder}: another run is using this folder; wait for it, or choose another RUN_TAG"
                            ) from error  # fmt: skip

    def release(self) -> None:
        self.file.close()  # closing the file gives the lock back on every system
