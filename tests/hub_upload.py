"""The part of the Hub's API that takes files: what huggingface_hub's create_repo and create_commit call.

Large files go through LFS as the Hub offers it without Xet: a batch request, a PUT for each file or each part of one, a
completion, a verification. Everything sent is kept; a file is visible only once it is in a commit.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.hub_server import Hub, _HubHandler

PART_BYTES = 1 << 22


@dataclass
class Uploads:
    """``objects``: what the storage has, by hash; ``parts``: of files that are not complete; ``commits``: each as the
    paths in it; ``puts``: hash and bytes of each PUT. ``token``: the only one that may write. ``on_put`` is called
    before a PUT is answered, and may wait; ``refuse_card``: what is wrong with every card."""

    hub: Hub
    token: str = "hf_writer"
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    puts: list[tuple[str, int]] = field(default_factory=list)
    multipart: bool = False
    refuse_card: str = ""
    on_put: Callable[[int], None] = lambda n: None
    url: str = ""


@contextmanager
def accepting(hub: Hub) -> Iterator[Uploads]:
    """A server at ``uploads.url`` that serves what ``hub`` has, and takes more."""
    uploads = Uploads(hub)
    handler = type("Handler", (_UploadHandler,), {"hub": hub, "uploads": uploads})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    uploads.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield uploads
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _UploadHandler(_HubHandler):
    uploads: Uploads

    def do_POST(self) -> None:  # noqa: N802
        body = self._body_bytes()
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        if path.startswith("/lfs/"):
            self._complete(path.removeprefix("/lfs/complete/"), body)
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif self.headers.get("Authorization") != f"Bearer {self.uploads.token}":
            self._send(401, {"X-Error-Code": "", "X-Error-Message": "Invalid credentials"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._repository(path.split("/"), body)

    def do_PUT(self) -> None:  # noqa: N802
        split = urlsplit(self.path)
        data, oid = self._body_bytes(), split.path.rpartition("/")[2]
        self.uploads.on_put(len(self.uploads.puts))
        self.uploads.puts.append((oid, len(data)))
        if "part" in (query := parse_qs(split.query)):
            self.uploads.parts.setdefault(oid, {})[int(query["part"][0])] = data
        else:
            self.uploads.objects[oid] = data
        self._send(200, {"ETag": f'"{sha256(data).hexdigest()[:32]}"'})

    def _body_bytes(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while n := int(self.rfile.readline(), 16):
            data += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _create(self, asked: dict[str, object]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.uploads.url}/{name}", "name": name, "id": "1"}
        status = 409 if name in self.hub.models else 200
        if status == 200:
            self.uploads.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.models[name] = {}
        self._send(status, {"Content-Type": "application/json"}, json.dumps(url).encode())

    def _validate(self, asked: dict[str, str]) -> None:
        assert asked["content"].startswith("---\n")
        wrong = [{"message": self.uploads.refuse_card}] if self.uploads.refuse_card else []
        answer = json.dumps({"errors": wrong, "warnings": []}).encode()
        self._send(400 if wrong else 200, {"Content-Type": "application/json"}, answer)

    def _batch(self, asked: dict[str, object]) -> None:
        answers = [self._instructions(one["oid"], one["size"]) for one in asked["objects"]]  # type: ignore[attr-defined]
        transfer = "multipart" if self.uploads.multipart else "basic"
        self._json({"transfer": transfer, "objects": answers}, body=True)

    def _instructions(self, oid: str, size: int) -> dict[str, object]:
        if oid in self.uploads.objects:
            return {"oid": oid, "size": size}
        href, header = f"{self.uploads.url}/lfs/{oid}", {}
        if self.uploads.multipart:
            count = -(-size // PART_BYTES)
            header = {str(i + 1): f"{href}?part={i + 1}" for i in range(count)} | {"chunk_size": str(PART_BYTES)}
            href = f"{self.uploads.url}/lfs/complete/{oid}"
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}}}

    def _complete(self, oid: str, body: bytes) -> None:
        parts = self.uploads.parts.pop(oid)
        told = [part["partNumber"] for part in json.loads(body)["parts"]]
        assert sorted(told) == sorted(parts)
        data = b"".join(parts[number] for number in sorted(parts))
        assert sha256(data).hexdigest() == oid
        self.uploads.objects[oid] = data
        self._json({}, body=True)

    def _repository(self, parts: list[str], body: bytes) -> None:
        name, verb = "/".join(parts[3:5]), parts[5]
        if name not in self.hub.models:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif verb == "preupload":
            files = [self._mode(name, one) for one in json.loads(body)["files"]]
            self._json({"files": files}, body=True)
        else:
            assert verb == "commit"
            self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _mode(self, name: str, one: dict[str, object]) -> dict[str, object]:
        path = str(one["path"])
        large = path.endswith((".gguf", ".png")) or int(str(one["size"])) > 10_000_000
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _commit(self, name: str, lines: list[dict[str, dict[str, str]]]) -> None:
        paths = []
        for line in lines:
            value = line["value"]
            if str(line["key"]) == "header":
                self.uploads.messages.append(value["summary"])
                continue
            is_large = str(line["key"]) == "lfsFile"
            data = self.uploads.objects[value["oid"]] if is_large else base64.b64decode(value["content"])
            self.hub.models[name][value["path"]] = data
            paths.append(value["path"])
        self.uploads.commits.append(paths)
        commit = self.hub.commit(name, "models")
        self._json({"commitUrl": f"{self.uploads.url}/{name}/commit/{commit}", "commitOid": commit}, body=True)
