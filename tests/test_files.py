"""Files complete or absent, whatever fails on the way; the streaming safetensors writer; hashes; locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from usaf import files
from usaf.errors import UserError
from usaf.files import (
    FolderLock,
    fingerprint,
    flush_folder,
    hash_file,
    replacing,
    require_space,
    require_writable,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_replacing_makes_folders_and_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"a long first version", b"second"):
        with replacing(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"a long first version"
        assert path.read_bytes() == content
    assert listing(path.parent) == {"file"}


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), UserError("x")], ids=lambda e: type(e).__name__
)
def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == {"file"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_replacing_tells_a_full_disk_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, no_space)
    with (
        pytest.raises(UserError, match=r"file: could not be written \(No space left on device\)"),
        replacing(path) as file,
    ):
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == {"file"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_replacing_tells_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "open_locked", lambda partial: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(UserError, match="No space left"), replacing(tmp_path / "file") as file:
        file.write(bytes(1 << 20))
    assert listing(tmp_path) == set()


def test_replacing_tells_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="could not be written"), replacing(tmp_path / "file" / "x"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not be written"), replacing(tmp_path / "folder"):
        pass
    assert listing(tmp_path) == {"file", "folder"}


def test_replacing_keeps_what_another_process_made_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, overwrite=False) as file:
        file.write(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    path.unlink()
    with replacing(path, overwrite=False) as file:
        file.write(b"mine")
    assert path.read_bytes() == b"mine"
    assert listing(tmp_path) == {"file"}


def test_two_writers_of_one_file_leave_each_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert listing(tmp_path) == {"file"}


CHILD = """
import sys, time
from pathlib import Path
from usaf.files import FolderLock, replacing
folder = Path(sys.argv[1])
lock = FolderLock(folder)
with replacing(folder / "[file]") as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_process_leaves_no_lock_and_what_it_began_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "[file]"  # brackets: a name is no pattern
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another run is using this folder"):
            FolderLock(tmp_path)
        write_json(path, 1)
        assert len(listing(tmp_path)) == 3, "the living process's partial file must stay"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    assert len(listing(tmp_path)) == 3
    FolderLock(tmp_path).release()
    write_json(path, 2)
    assert listing(tmp_path) == {"[file]", ".lock"}
    assert json.loads(path.read_text(encoding="utf-8")) == 2


def test_folder_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "new" / "run")
    with pytest.raises(UserError, match="another run is using this folder; .* RUN_TAG"):
        FolderLock(tmp_path / "new" / "run")
    FolderLock(tmp_path / "other").release()
    lock.release()
    FolderLock(tmp_path / "new" / "run").release()


def test_a_disk_that_cannot_flush_a_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    flush_folder(tmp_path)


def test_write_json_keeps_characters_of_every_language(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"é": "中", "n": 1})
    assert "中" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"é": "中", "n": 1}


SHA256_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hash_file_is_sha256_and_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert hash_file(path) == SHA256_ABC
    monkeypatch.setattr(files, "open", lambda *_: pytest.fail("was read again"), raising=False)
    assert hash_file(path) == SHA256_ABC


@pytest.mark.parametrize("change", ["time", "size"])
def test_hash_file_is_worked_out_again_when_the_file_changed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"xyz" if change == "time" else b"abcd")
    before = path.stat()
    assert hash_file(path) != SHA256_ABC
    path.write_bytes(b"abc")
    later = 1_000_000_000 if change == "time" else 0
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert hash_file(path) == SHA256_ABC


@pytest.mark.parametrize("memo", ["", "[]", "{}", '{"size_bytes": 3}', "\xff", '{"sha256": 5}'])
def test_hash_file_survives_a_damaged_memo(tmp_path: Path, memo: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    stamp = {"size_bytes": 3, "mtime_ns": path.stat().st_mtime_ns}
    text = json.dumps({**stamp, "sha256": 5}) if "sha256" in memo else memo
    (tmp_path / "x.sha256.json").write_bytes(text.encode("latin-1"))
    assert hash_file(path) == SHA256_ABC


def test_hash_file_works_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    monkeypatch.setattr(os, "replace", no_space)
    assert hash_file(path) == SHA256_ABC
    assert listing(tmp_path) == {"x"}


def test_fingerprint_ignores_the_order_of_keys_alone() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


def test_require_space_for_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(folder: Path) -> Any:
        asked.append(Path(folder))
        return shutil._ntuple_diskusage(100, 1, int(1.5e9))  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "a" / "b", int(1.5e9), "it", "free some")
    with pytest.raises(UserError, match=r"b: it needs 2\.50 GB and the disk has 1\.50 GB free; free some"):
        require_space(tmp_path / "a" / "b", int(2.5e9), "it", "free some")
    assert asked == [tmp_path, tmp_path]
    assert listing(tmp_path) == set()


def test_require_space_on_no_disk_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)  # a drive letter of Windows that is not there
    with pytest.raises(UserError, match="no such drive"):
        require_space(Path("q/x"), 1, "it", "free some")


@pytest.mark.parametrize(
    ("name", "prepare", "reason"),
    [
        ("folder", lambda path: path.mkdir(), "is a folder"),
        ("file/x.json", lambda path: path.parent.write_bytes(b""), "could not be written"),
    ],
    ids=["folder", "below a file"],
)
def test_require_writable_refuses(tmp_path: Path, name: str, prepare: Callable[[Path], Any], reason: str) -> None:
    prepare(tmp_path / name)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"--json .*{reason}"):
        require_writable(tmp_path / name, "--json")
    assert listing(tmp_path) == before


def test_require_writable_asks_the_disk_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "new" / "x.json", "--json")
    assert listing(tmp_path) == set()

    def denied(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(UserError, match=r"--json .*Permission denied.*; give one in a folder that can"):
        require_writable(tmp_path / "x.json", "--json")
