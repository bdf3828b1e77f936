"""A hub on this machine: as much of its HTTP interface as huggingface_hub needs to download from it.

Large files (.safetensors, .bin) are named by their SHA-256, as files in Git LFS are, others by their git blob id.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """Repositories on a port of the loopback interface.

    repositories: a commit and a folder by name; every branch and tag is that commit.
    most: how many bytes of large files are sent in all before all connections break; None: no limit.
    forged: bytes that are sent instead of a file's own, by its path; sizes must agree.
    requests: what was asked for, as "GET /path bytes=10-".
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, tuple[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.most: int | None = None
        self.forged: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is none of the tests' concern."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {path} {wanted}".rstrip())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, what, revision = found.groups()
            if (place := self.place(repository, revision or "main")) is not None:
                self.tell(repository, *place, tree=what == "tree", with_body=with_body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (place := self.place(found[1], found[2])) is not None:
                self.give(*place, found[3], wanted, with_body)
        else:
            self.fail(404, "")

    def place(self, repository: str, revision: str) -> tuple[str, Path] | None:
        place = self.server.repositories.get(repository)
        if place is None:
            self.fail(401, "RepoNotFound")
        elif revision not in ("main", place[0]):
            self.fail(404, "RevisionNotFound")
            place = None
        return place

    def tell(self, repository: str, commit: str, folder: Path, *, tree: bool, with_body: bool) -> None:
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                }
                entry["oid"] = _git_blob_id(path.read_bytes())
                if path.suffix in LARGE:
                    entry["lfs"] = {"oid": _sha256(path.read_bytes()), "size": entry["size"], "pointerSize": 134}
                files.append(entry)
        about = {"id": repository, "sha": commit, "siblings": [sibling(file) for file in files]}
        self.send(200, json.dumps(files if tree else about).encode(), {"Content-Type": "application/json"}, with_body)

    def give(self, commit: str, folder: Path, name: str, wanted: str, with_body: bool) -> None:
        path = folder / name
        if not path.is_file():
            self.fail(404, "EntryNotFound")
            return
        data = path.read_bytes()
        large = path.suffix in LARGE
        digest = _sha256(data) if large else _git_blob_id(data)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        data = self.server.forged.get(name, data)
        status, size, start = 200, len(data), 0
        if part := re.fullmatch(r"bytes=(\d+)-", wanted):
            status, start = 206, int(part[1])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send(status, data[start:], headers, with_body, limited=large)

    def fail(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, with_body=False)

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool, *, limited: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            sent = body[: self.server.most] if limited else body
            self.wfile.write(sent)
            if limited and self.server.most is not None:
                self.server.most -= len(sent)
            self.close_connection = len(sent) < len(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def sibling(file: dict[str, Any]) -> dict[str, Any]:
    """A file as the hub tells it along with a model, from how it tells it in a tree."""
    lfs = file.get("lfs") and {**file["lfs"], "sha256": file["lfs"]["oid"]}
    return {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"], "lfs": lfs}


@contextmanager
def hub(repositories: Mapping[str, tuple[str, Path]]) -> Iterator[Hub]:
    """A running hub."""
    with Hub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
