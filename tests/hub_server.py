"""A server on this machine that speaks as much of the Hub's API as huggingface_hub and dynrun use, and errs on demand.

Models have large files, which the Hub redirects to a storage server of another origin, where ranges are served; data
sets are small and come at once. Every fault of a network that a test wants is a :class:`Fault`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import file_digest, sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

Content = bytes | Path
SIGNATURE = "Signature=secret-of-the-storage"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer: a ``status`` (with ``headers``), or after ``after`` bytes of the body one of

    ``stall`` (nothing more comes until the other side hangs up), ``reset``, ``truncate`` (the connection ends early),
    ``wrong`` (that byte is another one), ``late`` (the answer begins only when the test says so).
    """

    kind: str
    after: int = 0
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def status(self) -> int | None:
        return int(self.kind) if self.kind.isdigit() else None


@dataclass(frozen=True)
class Served:
    """``sent`` bytes of the file, from ``start``; ``fault`` is what went wrong with them."""

    path: str
    start: int
    sent: int
    fault: Fault | None


@dataclass
class Hub:
    """``repositories``: the files of each data set; ``models`` of each model. ``refused``: status and X-Error-Code of
    those that are closed, ``gated`` those whose files are. ``xet``: files that are in Xet, with their hashes there;
    ``xet_token`` leads to the Xet server, which is not here.

    ``fault``: what happens to the request for bytes (path in the repository, start, end) of a model's file;
    ``metadata_faults``: what happens to the next HEADs. ``ranges``: whether the storage knows them. ``requests``
    collects method and path of every request, ``tokens`` the Authorization headers, ``storage_tokens`` those that the
    storage got, ``served`` what it sent.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    models: dict[str, dict[str, Content]] = field(default_factory=dict)
    xet: dict[str, str] = field(default_factory=dict)
    xet_token: dict[str, object] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    fault: Callable[[str, int, int], Fault | None] = lambda path, start, end: None
    metadata_faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    release: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    storage_tokens: set[str] = field(default_factory=set)
    served: list[Served] = field(default_factory=list)
    url: str = ""
    storage: str = ""

    def files(self, kind: str, repository: str) -> dict[str, Content]:
        return dict(self.models[repository] if kind == "models" else self.repositories[repository])

    def known(self, kind: str, repository: str) -> bool:
        return repository in (self.models if kind == "models" else self.repositories)

    def commit(self, repository: str, kind: str = "datasets") -> str:
        """The hash of all files: another one after every change."""
        files = {path: digest(data) for path, data in self.files(kind, repository).items()}
        return sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:40]

    def info(self, kind: str, repository: str) -> dict[str, object]:
        siblings = [{"rfilename": path} for path in self.files(kind, repository)]
        return {"id": repository, "sha": self.commit(repository, kind), "siblings": siblings, "tags": []}

    def tree(self, kind: str, repository: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for path, data in self.files(kind, repository).items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": size_of(data), "oid": git_hash(data)}
            if is_large(kind, path):
                entry["lfs"] = {"oid": digest(data), "size": size_of(data), "pointerSize": 135}
                if path in self.xet:
                    entry["xetHash"] = self.xet[path]
            found.append(entry)
        return found

    def search(self, query: dict[str, list[str]]) -> list[dict[str, object]]:
        words, owner = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
        return [
            {"id": name, "modelId": name, "tags": ["gguf"]}
            for name, files in self.models.items()
            if words in name.lower() and name.startswith(owner) and any(path.endswith(".gguf") for path in files)
        ]


def is_large(kind: str, path: str) -> bool:
    return kind == "models" and path.endswith((".gguf", ".safetensors", ".bin"))


def size_of(data: Content) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def digest(data: Content) -> str:
    if isinstance(data, bytes):
        return _sha256(data)
    stat = data.stat()
    return _sha256_of_path(data, stat.st_size, stat.st_mtime_ns)


# Every request asks, and models are large.
@lru_cache(maxsize=100)
def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()


@lru_cache(maxsize=100)
def _sha256_of_path(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def git_hash(data: Content) -> str:
    """What git calls a file; of a large one it would be the pointer's, which nobody looks at."""
    content = data if isinstance(data, bytes) else digest(data).encode()
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


FAULTS = ("401", "403", "404", "429", "500", "503", "stall", "reset", "truncate", "wrong", "late")


def let_all_go_wrong(hub: Hub, generator: random.Random) -> tuple[list[str], set[str]]:
    """Each fault once, in random order, at random requests and bytes; two more for HEADs.

    The lists fill and empty as it happens: the faults that are still to come, and the files that got wrong bytes.
    """
    faults = generator.sample(FAULTS, len(FAULTS))
    lock, spoiled = threading.Lock(), set[str]()

    def fault(path: str, start: int, end: int) -> Fault | None:
        with lock:
            if not faults or generator.random() < 0.3:
                return None
            if (kind := faults.pop()) == "wrong":
                spoiled.add(path)
            elif kind == "late":
                threading.Timer(0.1, hub.release.set).start()
            return Fault(kind, after=generator.randrange(end - start), headers=(("Retry-After", "0"),))

    hub.fault = fault
    hub.metadata_faults = [Fault(kind) for kind in generator.sample(["500", "503", "429"], 2)]
    return faults, spoiled


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` at ``hub.url``, and its storage at another port, until the end of the block."""
    servers = []
    for base in (_HubHandler, _StorageHandler):
        handler = type(base.__name__, (base,), {"hub": hub})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
    threads = [threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}) for s in servers]
    for thread in threads:
        thread.start()
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.release.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let huggingface_hub, which read its environment when it was imported, believe in ``url``."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def serving_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Serve an empty hub to this process, with its cache in ``folder``."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "harnesses.json"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(Hub()) as hub:
        set_endpoint(monkeypatch, hub.url)
        yield hub
        close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self._answer(body=True)

    def do_HEAD(self) -> None:
        with suppress(ConnectionError):
            self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def _send(self, status: int, headers: dict[str, str], data: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _err(self, fault: Fault) -> None:
        """An answer that is nothing but the fault."""
        if fault.kind == "stall":
            self._hang()
        elif fault.status is not None:
            self._send(fault.status, {"Content-Length": "0", **dict(fault.headers)})

    def _hang(self) -> None:
        """Say nothing until the other side goes."""
        self.wfile.flush()
        with suppress(OSError):
            self.connection.recv(1)
        self.close_connection = True

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class _HubHandler(_Handler):
    def _answer(self, *, body: bool) -> None:
        split = urlsplit(self.path)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} /{'/'.join(parts)}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if parts == ["api", "models"]:
            self._json(self.hub.search(parse_qs(split.query)), body=body)
            return
        is_api = parts[0] == "api"
        kind = parts[1] if is_api else "datasets" if parts[0] == "datasets" else "models"
        at = 2 if is_api else 1 if kind == "datasets" else 0
        repository, rest = "/".join(parts[at : at + 2]), parts[at + 2 :]
        if refused := self.hub.refused.get(repository):
            self._send(refused[0], {"X-Error-Code": refused[1]})
        elif not self.hub.known(kind, repository):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif is_api and rest[:1] == ["xet-read-token"]:
            self._json(self.hub.xet_token, body=body) if self.hub.xet_token else self._send(404, {})
        elif is_api:
            tree = rest[:1] == ["tree"]
            self._json(self.hub.tree(kind, repository) if tree else self.hub.info(kind, repository), body=body)
        else:
            self._resolve(kind, repository, "/".join(rest[2:]), body=body)

    def _json(self, value: object, *, body: bool) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), body=body)

    def _resolve(self, kind: str, repository: str, path: str, *, body: bool) -> None:
        headers = {"X-Repo-Commit": self.hub.commit(repository, kind)}
        data = self.hub.files(kind, repository).get(path)
        if data is None:
            self._send(404, {**headers, "X-Error-Code": "EntryNotFound"})
        elif repository in self.hub.gated:
            self._send(403, {**headers, "X-Error-Code": "GatedRepo"})
        elif not body and self.hub.metadata_faults:
            self._err(self.hub.metadata_faults.pop(0))
        elif is_large(kind, path):
            headers |= {"X-Linked-Etag": f'"{digest(data)}"', "X-Linked-Size": str(size_of(data))}
            if path in self.hub.xet:
                headers |= {
                    "X-Xet-Hash": self.hub.xet[path],
                    "X-Xet-Refresh-Route": f"{self.hub.url}/api/models/{repository}/xet-read-token/x",
                }
            location = f"{self.hub.storage}/{repository}/{quote(path)}?{SIGNATURE}"
            self._send(302, {**headers, "Location": location}, body=body)
        else:
            assert isinstance(data, bytes)
            self._send(200, {**headers, "ETag": f'"{git_hash(data)}"'}, data, body=body)


class _StorageHandler(_Handler):
    """Bytes of large files, in ranges; its ETag means nothing to anybody, as that of a storage is."""

    def _answer(self, *, body: bool) -> None:
        split = urlsplit(self.path)
        self.hub.storage_tokens.add(self.headers.get("Authorization", ""))
        owner, name, *rest = unquote(split.path).strip("/").split("/")
        path = "/".join(rest)
        data = self.hub.models[f"{owner}/{name}"][path]
        size = size_of(data)
        start, end = 0, size
        if self.hub.ranges and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size) if last else size
        fault = self.hub.fault(path, start, end)
        if fault and fault.status:
            self._err(fault)
            self.hub.served.append(Served(path, start, 0, fault))
            return
        if fault and fault.kind == "late":
            self.hub.release.wait()
        partial = self.hub.ranges and "Range" in self.headers
        headers = {"Content-Length": str(end - start), "ETag": '"0123456789abcdef0123456789abcdef-7"'}
        if partial:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(206 if partial else 200, headers)
        if body:
            self._body(path, data, start, end, fault)

    def _body(self, path: str, data: Content, start: int, end: int, fault: Fault | None) -> None:
        stop = end
        if fault and fault.kind in ("stall", "reset", "truncate"):
            stop = min(end, start + fault.after)
        if isinstance(data, Path):
            self.wfile.flush()
            with data.open("rb") as stream:
                at = start
                while at < stop:
                    at += os.sendfile(self.connection.fileno(), stream.fileno(), at, min(stop - at, 1 << 24))
        else:
            piece = bytearray(data[start:stop])
            if fault and fault.kind == "wrong":
                piece[fault.after % len(piece)] ^= 0xFF
            self.wfile.write(piece)
        self.hub.served.append(Served(path, start, stop - start, fault))
        if fault and fault.kind == "stall":
            self._hang()
        elif fault and fault.kind == "reset":
            self._reset()
        elif fault and fault.kind == "truncate":
            self.close_connection = True
