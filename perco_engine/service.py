"""One warm engine for many short processes, over a Unix socket in a private folder.

A process that wants one picture decoded would spend seconds on importing torch.  It asks here instead:

    client   decode(data)  -> connect -> request  -> reply -> picture        (no torch)
    service  python -m perco_engine.service -> accept -> Engine.decode -> reply; ends when nobody has asked for a while

Messages, both ways: 4 bytes length of a JSON object, 4 bytes length of a payload (big-endian), the object, the
payload.  A request is {"do": "decode", "options": {...}} with a file, {"do": "status"} or {"do": "stop"}.  A reply is
{"ok": true, ...}, for a picture with "mode", "size" and its pixels, or {"ok": false, "error": class, "text": message}.

Both ends look at whose process the other one is (SO_PEERCRED, getpeereid) and hang up unless it is this user's own;
root is no exception.  Sizes are looked at before anything is read.
"""

import contextlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import errors, files
from .version import __version__

if TYPE_CHECKING:
    from PIL import Image

MAX_OBJECT_BYTES = 64 << 10
MAX_FILE_BYTES = 16 << 20
"""Of a .perco file that is sent; larger ones are decoded by whoever has them."""

MAX_PICTURE_BYTES = 256 << 20
"""Of the pixels of a reply; larger pictures are refused."""

MAX_DECODES, MAX_CONNECTIONS = 8, 16
"""At once; others are refused.  Who asks for the service's status, or stops it, is answered while it decodes."""

TRANSFER_SECONDS = 10.0
IDLE_SECONDS = 300.0
START_SECONDS = 60.0

_LENGTHS = struct.Struct(">II")
_CREDENTIALS = struct.Struct("3i")
_LONGEST_ADDRESS = 100
"""Bytes that the path of a Unix socket may have, with some to spare."""


def runtime_folder() -> Path:
    """The folder of the socket, for this user alone; made if it is not there.

    In XDG_RUNTIME_DIR, if that is this user's, or in the system's folder for temporary files.
    Raises OSError where it is another user's, or others may look into it, and on Windows.
    """
    if sys.platform == "win32":
        raise OSError("there is no warm engine on Windows, which does not tell whose process asks")
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(named) / "pillow-perco"
    short = len(os.fsencode(folder / "engine.socket")) <= _LONGEST_ADDRESS
    # Another user's, as root may have it from su, is not to hold what its owner could not use any more.
    if not (Path(named).is_absolute() and short and os.access(named, os.W_OK) and _is_own(Path(named))):
        folder = Path(tempfile.gettempdir()) / f"pillow-perco-{os.geteuid()}"
    files.make_private(folder)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone: remove it, or set XDG_RUNTIME_DIR")
    return folder


def _is_own(folder: Path) -> bool:
    return folder.stat().st_uid == os.geteuid()


def decode(data: bytes, *, start_it: bool = False, model: str | None = None, **options: Any) -> "Image.Image | None":
    """The picture in the bytes of a .perco file, by the warm engine; None where there is none that could do it.

    start_it: start one where none runs, and wait for it; else only ask one that runs.
    model: the folder of the file's model, if it is not a registered one.
    options: steps, guidance_scale, seed, max_size_px, as `Engine.decode_batch` takes them; those that are None are left
        out.
    Raises BitstreamError for a file that no engine decodes.  Every other trouble, a model that the service does not
    find included, gives None: then the caller decodes by itself.
    """
    if len(data) > MAX_FILE_BYTES:
        return None
    told = {name: value for name, value in options.items() if value is not None}
    request = {"do": "decode", "options": told, "model": str(Path(model).absolute()) if model else None}
    try:
        if start_it:
            start()
        reply, pixels = _ask(request, data)
    except (OSError, ValueError):
        return None
    if not reply.get("ok"):
        kind = getattr(errors, str(reply.get("error")), None)
        if isinstance(kind, type) and issubclass(kind, errors.BitstreamError):
            raise kind(str(reply.get("text")))
        return None
    from PIL import Image

    try:
        return Image.frombytes(str(reply["mode"]), tuple(reply["size"]), pixels)
    except (KeyError, TypeError, ValueError):
        return None


def status() -> dict[str, Any] | None:
    """What a running service says of itself (pid, version, idle seconds, pictures decoded); None if none runs."""
    try:
        return _ask({"do": "status"})[0]
    except (OSError, ValueError):
        return None


def stop() -> bool:
    """Stops the service.  Returns whether one was running; when this returns it is gone."""
    try:
        _ask({"do": "stop"})
    except (OSError, ValueError):
        return False
    deadline = time.monotonic() + TRANSFER_SECONDS
    while status() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    return True


def start(idle_seconds: float = IDLE_SECONDS) -> dict[str, Any]:
    """Starts the service unless it runs, and waits until it answers.  Returns its status.

    Raises OSError if it does not answer within START_SECONDS, or has no folder (`runtime_folder`).
    """
    runtime_folder()
    found = status()
    if found is not None and found.get("version") == __version__:
        return found
    if found is not None:
        stop()
    command = [sys.executable, "-m", "perco_engine.service", str(idle_seconds)]
    # A process of its own that outlives this one and holds nothing of it: no terminal, no pipe, no folder.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = status()
        if found is not None:
            process.returncode = 0  # It is not waited for: it belongs to nobody from here on.
            return found
        if process.poll() not in (None, 0):
            break
        time.sleep(0.05)
    raise OSError("the engine's service did not start: run python -m perco_engine.service to see why")


def _ask(request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """A reply to a request, and its payload.  Raises OSError, ValueError where none comes, or none that holds."""
    address = runtime_folder() / "engine.socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TRANSFER_SECONDS)
        connection.connect(str(address))
        if peer_uid(connection) != os.geteuid():
            raise PermissionError("the service is another user's")
        _send(connection, request, payload)
        connection.settimeout(None if request["do"] == "decode" else TRANSFER_SECONDS)
        return _receive(connection, MAX_PICTURE_BYTES)


def peer_uid(connection: socket.socket) -> int:
    """The user whose process is at the other end.  Raises OSError where the system does not tell."""
    if sys.platform == "linux":
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(told)[1])
    import ctypes

    uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
    if ctypes.CDLL(None, use_errno=True).getpeereid(connection.fileno(), ctypes.byref(uid), ctypes.byref(gid)):
        raise OSError(ctypes.get_errno(), "getpeereid")
    return uid.value


def _send(connection: socket.socket, told: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(told).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(payload)) + text + payload)


def _receive(connection: socket.socket, most_bytes: int) -> tuple[dict[str, Any], bytes]:
    """A message of at most so many bytes of payload.  Raises ValueError for anything else, OSError if it ends early."""
    text_bytes, payload_bytes = _LENGTHS.unpack(_read(connection, _LENGTHS.size))
    if text_bytes > MAX_OBJECT_BYTES or payload_bytes > most_bytes:
        raise ValueError("the message is too long")
    told = json.loads(_read(connection, text_bytes))
    if not isinstance(told, dict):
        raise ValueError("the message is no JSON object")
    return told, _read(connection, payload_bytes)


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the message ended early")
        data += part
    return bytes(data)


class _Service:
    """The serving side."""

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._last = time.monotonic()
        self._decoded = 0
        self._busy = self._decoding = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._importing = threading.Thread(target=_import_engine, daemon=True)

    def serve(self) -> None:
        """Answers until it is told to stop or nobody has asked for long enough.  Returns at once if another does."""
        folder = runtime_folder()
        import fcntl  # which Windows lacks

        with (folder / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            address = folder / "engine.socket"
            address.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
                listening.bind(str(address))
                address.chmod(0o600)
                listening.listen(MAX_CONNECTIONS)
                listening.settimeout(0.2)
                # Warm when the first request comes, and answering from the start.
                self._importing.start()
                try:
                    self._accept_all(listening)
                finally:
                    address.unlink(missing_ok=True)

    def _accept_all(self, listening: socket.socket) -> None:
        while not self._stopping.is_set():
            if not self._busy and time.monotonic() - self._last > self._idle_seconds:
                return
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            if peer_uid(connection) != os.geteuid() or self._busy >= MAX_CONNECTIONS:
                connection.close()
                continue
            with self._lock:
                self._busy += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            # A client that sends nonsense, or goes away, is its own trouble.
            with contextlib.suppress(OSError, ValueError, RecursionError, MemoryError), connection:
                connection.settimeout(TRANSFER_SECONDS)
                request, payload = _receive(connection, MAX_FILE_BYTES)
                _send(connection, *self._reply(request, payload))
        finally:
            with self._lock:
                self._busy -= 1

    def _reply(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        do = request.get("do")
        if do == "stop":
            self._stopping.set()
            return {"ok": True}, b""
        if do == "status":
            idle = time.monotonic() - self._last
            return {
                "ok": True, "pid": os.getpid(), "version": __version__, "idle_seconds": round(idle, 1),
                "idle_limit_seconds": self._idle_seconds, "decoded": self._decoded,
            }, b""  # fmt: skip
        if do != "decode":
            return {"ok": False, "error": "ValueError", "text": f"no service does {do!r}"}, b""
        with self._lock:
            if self._decoding == MAX_DECODES:
                return {"ok": False, "error": "OSError", "text": "the service is busy"}, b""
            self._decoding += 1
        try:
            picture = self._decode(payload, request.get("model"), request.get("options") or {})
        except Exception as error:
            return {"ok": False, "error": type(error).__name__, "text": str(error)}, b""
        finally:
            self._last = time.monotonic()
            with self._lock:
                self._decoding -= 1
        self._decoded += 1
        return {"ok": True, "mode": picture.mode, "size": picture.size}, picture.tobytes()

    def _decode(self, data: bytes, model: str | None, options: dict[str, Any]) -> "Image.Image":
        # Two threads that import the same packages at once can wait for each other for ever.
        self._importing.join()
        from .bitstream import read_header
        from .engine import engine_of_file

        header = read_header(data)
        if header.width_px * header.height_px * 4 > MAX_PICTURE_BYTES:
            raise errors.NotEnoughMemory("the picture is too large for the service")
        return engine_of_file(data, model).decode(data, **options)


def main(idle_seconds: float = IDLE_SECONDS) -> None:
    """Serves until it is told to stop, or until nobody has asked for so many seconds."""
    _Service(idle_seconds).serve()
    # Not waiting for a picture that nobody will get.
    os._exit(0)


def _import_engine() -> None:
    from . import engine

    engine.get_engine()


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
