"""A hub on this machine: an HTTP server that answers as huggingface.co does, from folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class FakeHub(ThreadingHTTPServer):
    """Serves `models/OWNER/NAME/...` and `datasets/OWNER/NAME/...` of a folder, each with the one revision `main`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Run a hub while the block runs."""
    with FakeHub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: dict | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {self.path}")
        match path.strip("/").split("/"):
            case ["api", ("models" | "datasets") as kind, owner, name, *what]:
                self._tell(self.server.folder / kind / owner / name, what, body)
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._send_file(self.server.folder / "datasets" / owner / name, revision, file)
            case [owner, name, "resolve", revision, *file]:
                self._send_file(self.server.folder / "models" / owner / name, revision, file)
            case _:
                self._send(404, b"")

    def _tell(self, folder: Path, what: list[str], body: dict | None) -> None:
        """Answer questions about a repository."""
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        match what:
            case ["paths-info", _]:
                wanted = set((body or {})["paths"])
                found = [_entry(path, folder) for path in files if str(path.relative_to(folder)) in wanted]
            case ["tree", _, *below]:
                inside = folder.joinpath(*below)
                found = [_entry(path, folder) for path in files if path.is_relative_to(inside)]
            case [] | ["revision", "main" | "0000000000000000000000000000000000000001"]:
                siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
                name = "/".join(folder.parts[-2:])
                found = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            case _:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _send_file(self, folder: Path, revision: str, file: list[str]) -> None:
        path = folder.joinpath(*file)
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            headers = {"ETag": f'"{_entry(path, folder)["oid"]}"', "X-Repo-Commit": COMMIT}
            self._send(200, path.read_bytes(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: Path, folder: Path) -> dict[str, object]:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": oid}
