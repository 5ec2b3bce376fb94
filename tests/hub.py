"""A hub on this machine: the routes that its client takes to make, fill and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token-for-tests"


@dataclass
class Hub:
    """What is in it. Repositories of ``me`` may be written to, by :data:`TOKEN`."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by name, by branch, by repository."""
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    """Of all commits."""
    as_large: bool = False
    """Whether adapter files go the way of large files."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    problem: str = ""
    """What is wrong with every card."""
    status: int = 0
    """What everything that is read is answered with, if not 0."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens, until the context ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="hub")
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.hub.status:
            self._answer(self.hub.status, {"error": "not now"})
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, branch = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if (files := self._files(repo, branch)) is not None:
                self._answer(200, _info(repo, files))
            return
        repo, branch, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if (files := self._files(repo, branch)) is not None:
            self._answer(200, files[name], {"ETag": f'"{_sha(files[name])}"', **_commit(files)})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.objects[_sha(data)] = data
        self._answer(200, b"")

    def do_POST(self) -> None:
        data = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            errors = [{"message": self.hub.problem}] if self.hub.problem else []
            self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(data))
        elif path.endswith("/objects/batch"):
            self._answer(200, self._batch(json.loads(data)))
        elif "/branch/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self.hub.repos[repo].setdefault(branch, dict(self.hub.repos[repo]["main"]))
            self._answer(200, b"")
        elif "/preupload/" in path:
            self._answer(200, {"files": [self._mode(each) for each in json.loads(data)["files"]]})
        else:
            repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            self._commit_to(repo, branch, [json.loads(line) for line in data.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        owner, name = asked.get("organization") or "me", asked["name"]
        repo = f"{owner}/{name}"
        if owner != "me":
            self._answer(403, {"error": "You don't have the rights to create a model there."})
            return
        status = 409 if repo in self.hub.repos else 200
        if status == 200 and (asked.get("private") or asked.get("visibility") == "private"):
            self.hub.private.add(repo)
        self.hub.repos.setdefault(repo, {"main": {}})
        self._answer(status, {"url": f"{self.hub.url}/{repo}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = self.hub.as_large and file["path"].endswith(".safetensors")
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.url}/objects", "header": {}}}
        return {
            "transfer": "basic",
            "objects": [{**each, "actions": upload} for each in asked["objects"]],
        }

    def _commit_to(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repos[repo][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = _commit(files)["X-Repo-Commit"]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _files(self, repo: str, branch: str) -> dict[str, bytes] | None:
        """Those of a branch; None once it was answered that there is no such thing."""
        branches = self.hub.repos.get(repo, {})
        found = next((f for b, f in branches.items() if branch in (b, _oid(f))), None)
        if found is None:
            code = "RevisionNotFound" if branches else "RepoNotFound"
            self._answer(404, {"error": "not found"}, {"X-Error-Code": code})
        return found

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(
        self, status: int, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _info(repo: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
    return {"_id": "0", "id": repo, "sha": _oid(files), "siblings": siblings}


def _commit(files: dict[str, bytes]) -> dict[str, str]:
    return {"X-Repo-Commit": _oid(files)}


def _oid(files: dict[str, bytes]) -> str:
    """40 hexadecimal digits that stand for these files."""
    return _sha(repr(sorted(files.items())).encode())[:40]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
