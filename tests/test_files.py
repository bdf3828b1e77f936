"""Files are there whole or not at all, and stay what they were besides."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import reachable

from perco_engine.files import make_place, write_beside


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to("real")
    write_beside(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o640
    (tmp_path / "later").symlink_to(tmp_path / "not-yet")
    write_beside(tmp_path / "later", b"new")
    assert (tmp_path / "not-yet").read_bytes() == b"new"


def test_paths_of_any_kind_and_of_full_length(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 255), str(tmp_path / "text"), os.fsencode(tmp_path / "bytes")):
        write_beside(path, b"new")
    assert sorted(len(path.name) for path in tmp_path.iterdir()) == [4, 5, 255]


def test_errors_name_the_file_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        write_beside(tmp_path / "no" / "x.perco", b"new")
    assert missing.value.filename == str(tmp_path / "no" / "x.perco")
    with pytest.raises(IsADirectoryError) as folder:
        write_beside(tmp_path, b"new")
    assert folder.value.errno == errno.EISDIR and folder.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """As a user whom permissions bind, where the tests are root's."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users with numbers")
def test_what_is_write_protected_is_not_replaced(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(0o444)
    with reachable(tmp_path), as_nobody(), pytest.raises(PermissionError, match="x"):
        write_beside(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users with numbers")
def test_a_place_that_cannot_be_written_to_is_told_before(tmp_path: Path) -> None:
    make_place(tmp_path / "new" / "folders" / "x")
    make_place(tmp_path / ("n" * 255))
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folders"]
    tmp_path.chmod(0o777)
    (tmp_path / "loop").symlink_to("loop")
    for name, mode in (("file", 0o444), ("shut", 0o666), ("shut/file", 0o666)):
        (tmp_path / name).mkdir() if name == "shut" else (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "shut").chmod(0o555)
    (tmp_path / "link").symlink_to("shut/new")
    for name, told in (
        ("file", "file cannot be written to: Permission denied"),
        ("shut/x", "shut cannot be written to: Permission denied"),
        ("shut/file", "shut cannot be written to: Permission denied"),
        ("shut/a/b", "shut/a/b cannot be written to: Permission denied"),
        ("link", "shut cannot be written to: Permission denied"),
        ("file/x", "file/x cannot be written to: Not a directory"),
        ("file/a/b", "file/a/b cannot be written to: Not a directory"),
        ("new", "new cannot be written to: Is a directory"),
        ("loop", "loop cannot be written to: Too many levels of symbolic links"),
        ("n" * 256, "nn cannot be written to: File name too long"),
    ):
        with reachable(tmp_path), as_nobody(), pytest.raises(OSError, match=told):
            make_place(tmp_path / name)
    make_place(Path(os.devnull))


def test_new_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_beside(tmp_path / "new", b"new")
        write_beside(tmp_path / "private", b"new", mode=0o666)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "private")] == [0o640, 0o666]


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_a_new_file_takes_no_place_that_is_taken_at_the_last_moment(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    write_beside(tmp_path / "new", b"new", new=True)
    other = tmp_path / "other"
    monkeypatch.setattr(os, "fsync", lambda _: other.write_bytes(b"precious"))
    with pytest.raises(FileExistsError):
        write_beside(other, b"new", new=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        write_beside(tmp_path / "link", b"new", new=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.exists()} == {
        "new": b"new", "other": b"precious",
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_beside(pipe, b"new")
    reader.join(10)
    assert read == [b"new"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout")
def test_a_nameless_pipe_is_written_to() -> None:
    code = "from perco_engine.files import write_beside; write_beside('/dev/stdout', b'new')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"new"


def test_links_that_lead_nowhere_are_os_errors(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_beside(tmp_path / "a", b"new")
