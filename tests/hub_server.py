"""A server on this machine that speaks as much of the Hub's API as huggingface_hub uses to download data sets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """``repositories``: the files of each data set. ``refused``: status and X-Error-Code of those that are closed.

    ``requests`` collects method and path of every request, ``tokens`` the Authorization headers.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def commit(self, repository: str) -> str:
        """The hash of all files: another one after every change."""
        files = {path: sha256(data).hexdigest() for path, data in self.repositories[repository].items()}
        return sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:40]

    def info(self, repository: str) -> dict[str, object]:
        siblings = [{"rfilename": path} for path in self.repositories[repository]]
        return {"id": repository, "sha": self.commit(repository), "siblings": siblings, "tags": []}

    def tree(self, repository: str) -> list[dict[str, object]]:
        files = self.repositories[repository].items()
        return [{"type": "file", "path": p, "size": len(d), "oid": sha256(d).hexdigest()[:40]} for p, d in files]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` at ``hub.url`` until the end of the block."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} /{'/'.join(parts)}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        is_api = parts[:2] == ["api", "datasets"]
        repository = "/".join(parts[2:4] if is_api else parts[1:3])
        rest = parts[4:] if is_api else parts[3:]
        if refused := self.hub.refused.get(repository):
            self._send(refused[0], {"X-Error-Code": refused[1]})
        elif repository not in self.hub.repositories:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            found = self.hub.tree(repository) if rest[:1] == ["tree"] else self.hub.info(repository)
            self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode(), body=body)
        else:
            self._file(repository, "/".join(rest[2:]), body=body)

    def _file(self, repository: str, path: str, *, body: bool) -> None:
        headers = {"X-Repo-Commit": self.hub.commit(repository)}
        data = self.hub.repositories[repository].get(path)
        if data is None:
            self._send(404, {**headers, "X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, {**headers, "ETag": f'"{sha256(data).hexdigest()}"'}, data, body=body)

    def _send(self, status: int, headers: dict[str, str], data: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
