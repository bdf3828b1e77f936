"""The warm engine: its folder, its manners with others, and what clients do where there is none."""

import contextlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import reachable
from PIL import Image

import pillow_perco
from perco_engine import get_engine, service
from perco_engine.errors import ChecksumMismatch, NotAPercoFile
from pillow_perco.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # The path of a socket is short, and pytest's are long.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    if len(str(tmp_path)) > 70:
        pytest.skip("the folder's name is too long for a socket")
    yield tmp_path / "pillow-perco"
    service.stop()


@pytest.fixture
def data(photo: Image.Image) -> bytes:
    return get_engine().encode(photo, bpp=0.002)


def test_a_warm_engine_decodes_what_a_cold_one_does(runtime: Path, data: bytes) -> None:
    assert service.decode(data) is None and service.status() is None and not service.stop()
    started = service.start(idle_seconds=60)
    assert started["pid"] != os.getpid() and service.start()["pid"] == started["pid"]
    for options in ({}, {"steps": 0, "seed": 3, "max_size_px": 90}):
        picture = service.decode(data, **options)  # type: ignore[arg-type]
        assert picture is not None
        assert picture.tobytes() == get_engine().decode(data, **options).tobytes()  # type: ignore[arg-type]
    with pytest.raises(NotAPercoFile):
        service.decode(b"no file")
    with pytest.raises(ChecksumMismatch):
        service.decode(data[:-1] + bytes([data[-1] ^ 1]))
    assert service.decode(data, steps=-1) is None
    assert service.decode(data, model="/nowhere") is None
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert stat.S_IMODE((runtime / "engine.socket").stat().st_mode) == 0o600
    told = CliRunner().invoke(main, ["service", "status"])
    assert told.exit_code == 0 and str(started["pid"]) in told.output
    hostile(runtime)
    assert service.status() is not None
    assert service.stop() and service.status() is None and not (runtime / "engine.socket").exists()
    assert CliRunner().invoke(main, ["service", "status"]).exit_code == 1


def hostile(runtime: Path) -> None:
    """Messages that announce too much, end early, or are no JSON: each only costs its own connection."""
    too_much = struct.pack(">II", 1 << 31, 0), struct.pack(">II", 2, 1 << 31) + b"{}"
    for message in (
        *too_much, struct.pack(">II", 9, 0) + b"{",
        struct.pack(">II", 4, 0) + b"nope", struct.pack(">II", 2, 0) + b"[]",
        *[struct.pack(">II", 60_000, 0) + b"[" * 60_000] * 17,  # more than there may be connections at once
    ):  # fmt: skip
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(runtime / "engine.socket"))
            connection.sendall(message)
            if message not in too_much:  # the rest of which would be waited for longer than this test waits
                connection.shutdown(socket.SHUT_WR)
            # What was not read may make it a reset.
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""


def test_it_ends_when_nobody_asks(runtime: Path) -> None:
    process = subprocess.run([sys.executable, "-m", "perco_engine.service", "0.1"], timeout=60, check=False)
    assert process.returncode == 0 and not (runtime / "engine.socket").exists()


def started(one: service._Service) -> threading.Thread:
    """The thread of a service that answers."""
    thread = threading.Thread(target=one.serve)
    thread.start()
    end = time.monotonic() + 60
    while service.status() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return thread


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may become another user")
def test_another_user_is_not_answered(runtime: Path) -> None:
    one = service._Service(60)
    thread = started(one)
    (runtime / "engine.socket").chmod(0o777)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.chdir(sys.argv[1]); os.setgid(65534); "
        "os.setuid(65534); s.connect('engine.socket'); s.settimeout(5)\n"
        "try: s.sendall(b'\\0\\0\\0\\x10\\0\\0\\0\\0' + b'{\"do\": \"status\"}'); print(s.recv(99))\n"
        "except OSError: print(b'')"
    )
    with reachable(runtime):
        run = subprocess.run([sys.executable, "-c", code, str(runtime)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "b''"
    assert service.stop()
    thread.join()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may use what is another's")
def test_another_user_s_folder_is_not_used(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(runtime.parent, 65534, 65534)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(runtime.parent / "temporary"))
    assert service.runtime_folder().parent.name == "temporary" and not runtime.exists()


def test_a_busy_service_can_be_stopped(runtime: Path, data: bytes) -> None:
    one = service._Service(60)
    one._decoding = service.MAX_DECODES
    thread = started(one)
    assert service.decode(data) is None
    assert service.stop()
    thread.join()


def test_a_folder_that_others_see_is_not_used(runtime: Path, data: bytes) -> None:
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    with pytest.raises(PermissionError, match="this user alone"):
        service.runtime_folder()
    assert service.decode(data) is None and service.status() is None


def test_the_client_leaves_torch_alone(runtime: Path, photo: Image.Image, tmp_path: Path) -> None:
    pillow_perco.save(photo, tmp_path / "x.perco", bpp=0.002)
    code = (
        "import sys, json; from perco_engine import service\n"
        "picture = service.decode(open(sys.argv[1], 'rb').read(), start_it=True)\n"
        "print(json.dumps([picture.size, 'torch' in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.perco")], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [[192, 128], False]


def test_on_windows_there_is_none(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.sys, "platform", "win32")
    assert service.decode(data, start_it=True) is None and service.status() is None and not service.stop()
    with pytest.raises(OSError, match="no warm engine on Windows"):
        service.start()
