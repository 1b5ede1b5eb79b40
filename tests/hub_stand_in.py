"""A server that stands in for the Hugging Face Hub: it answers huggingface_hub and keeps the files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

OWNER = "someone"


class StandIn:
    """``repositories``: each one's files, by name; ``created`` and ``requests`` (method, path), as sent."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.created.append(wanted)
            name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            return {"url": f"https://huggingface.co/{name}", "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        _, _, _, owner, name, what, _ = path.split("/")
        if what == "preupload":
            return {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]}  # fmt: skip
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = line["value"]["content"]
                self.repositories[f"{owner}/{name}"][line["value"]["path"]] = base64.b64decode(content)
        commit = hashlib.sha1(body).hexdigest()
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"https://huggingface.co/{owner}/{name}/commit/{commit}",
        }


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, which huggingface_hub's requests go to inside the block."""
    from huggingface_hub import constants, file_download

    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            hub.tokens.add(self.headers.get("authorization"))
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.command == "POST":
                return self.send(200, json.dumps(hub.post(path, body)).encode())
            if path == "/api/whoami-v2":
                return self.send(200, json.dumps({"type": "user", "name": OWNER}).encode())
            name, _, file = path[1:].partition("/resolve/")
            files, (revision, _, file) = hub.repositories.get(name), file.partition("/")
            if files is None or file not in files:
                code = "RepoNotFound" if files is None else "EntryNotFound"
                return self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": "0" * 40})
            etag = hashlib.sha1(files[file]).hexdigest()
            commit = revision if len(revision) == 40 else hashlib.sha1(revision.encode()).hexdigest()
            self.send(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            return None

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, file_download):  # before version 1.0 a module has a copy
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
