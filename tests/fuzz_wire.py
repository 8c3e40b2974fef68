"""Answers of llama-server and of the Hub, byte by byte: what reads them must end in an error for people at worst.

A fuzzed file holds the answers of a server in turn, between lines of ``%%``. One that begins with ``HTTP/`` is sent as
it is, with ``{URL}`` replaced by the server's own address; of any other the head is good and the rest the file's.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import httpx2

from dynrun.calibration.generated import GenerationSettings, Prompt, _Asker
from dynrun.errors import DynrunError
from dynrun.hub.files import RemoteFile
from dynrun.hub.http import wait_asked_for
from dynrun.hub.pull import pull
from dynrun.hub.ranges import RangeReader
from dynrun.hub.resolve import HubName, find
from dynrun.hub.search import search
from dynrun.hub.source import ChangedError, HttpSource, PassingError
from dynrun.hub.transfer import TransferSettings
from dynrun.llamacpp.server import LlamaServer
from dynrun.llamacpp.server_log import cause_of_death, last_lines, memory_ran_out
from dynrun.runtime.events import Finished, Reading, Said, Thought
from dynrun.runtime.reply import Cancellation, reply
from dynrun.runtime.served import find_served, served_dir

SEPARATOR = b"\n%%\n"
# The file that the Hub of these targets has.
CONTENT = b"GGUF of sixty-four bytes, whose hash is known to the other side."
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
_AGENTS = "huggingface_hub.utils._detect_agent"
_SAVE_TIME = TransferSettings(connections=1, stall_s=2.0, backoff_s=0.0, attempts=2, refusals=2, restarts=0)


class Wire:
    """A server that gives each connection the next answer, and the last one again after that."""

    def __init__(self) -> None:
        self._answers, self._next = [b""], 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def say(self, data: bytes) -> None:
        """What is answered from now on."""
        self._answers, self._next = [self._whole(answer) for answer in data.split(SEPARATOR)], 0

    def _whole(self, answer: bytes) -> bytes:
        return answer.replace(b"{URL}", self.url.encode()) if answer.startswith(b"HTTP/") else _HEAD + answer

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with suppress(OSError), connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        with connection.makefile("rb") as stream:
            # What is not read makes the system reset the connection before the answer is read.
            length, line = 0, b"-"
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            stream.read(length)
        answer = self._answers[min(self._next, len(self._answers) - 1)]
        self._next += 1
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@cache
def wire() -> Wire:
    """The one of this process."""
    return Wire()


@contextmanager
def answering(path: Path) -> Iterator[Wire]:
    """A server with the answers in ``path``, a cache of one's own, no waiting, and no way to any other machine."""
    server, connect = wire(), socket.create_connection
    server.say(path.read_bytes())

    def connected(address: tuple[str, int], *rest: object, **more: object) -> socket.socket:
        if address != server.address:
            raise ConnectionRefusedError(f"nobody is at {address}")
        return connect(address, *rest, **more)  # type: ignore[arg-type]

    with TemporaryDirectory() as folder, ExitStack() as open_:
        open_.enter_context(mock.patch.dict(os.environ, {"DYNRUN_CACHE": folder}))
        open_.enter_context(mock.patch("socket.create_connection", connected))
        open_.enter_context(mock.patch("time.sleep"))
        # No address here begins with https, and certificates take a tenth of a second to read.
        open_.enter_context(mock.patch("httpx2._transports.default.create_ssl_context", return_value=_tls()))
        open_.enter_context(mock.patch("dynrun.hub.http._LONGEST_WAIT_S", 0.0))
        yield server


# -- llama-server ------------------------------------------------------------------------------------------------------


def reply_stream(path: Path) -> object:
    """The events of an answer are of the types that they promise, and can be printed."""
    with answering(path) as server:
        events = list(reply(server.url, "key", "/v1/chat/completions", {}, Cancellation()))
    for event in events:
        if isinstance(event, Said | Thought):
            event.text.encode()
        assert isinstance(event, Said | Thought | Reading | Finished)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.answer.text == "".join(event.text for event in events if isinstance(event, Said))
    return last


def generated_answer(path: Path) -> object:
    """A record for the transcript: JSON, with a number of tokens."""
    prompt = Prompt("id", "chat", "en", "How are you?")
    with answering(path) as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        try:
            record = _Asker(client, GenerationSettings(), True, Path("log")).ask(prompt, 0)
        except httpx2.TransportError:  # its callers ask why the server died
            return None
    assert isinstance(record["n_tokens"], int)
    return json.dumps(record)


def health(path: Path) -> object:
    """Yes or no."""
    with answering(path) as server:
        child = LlamaServer([], name="fuzzed")
        child.port = server.address[1]
        healthy = child._healthy()
        key_file = served_dir().parent / "key"
        key_file.write_text("key\n")
        record = {"started_s": 0.0, "url": server.url, "key_file": str(key_file)}
        return healthy, _found_served({**record, "models": {"fuzzed": {"path": "/model.gguf", "n_ctx": 512}}})


def served_record(path: Path) -> object:
    """What another `dynrun serve` left in the cache."""
    with answering(Path(os.devnull)):
        return _found_served(path.read_bytes())


def _found_served(record: object) -> object:
    served_dir().mkdir(parents=True, exist_ok=True)
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    (served_dir() / f"{os.getpid()}.json").write_bytes(data)
    with mock.patch("dynrun.runtime.served._started_s", return_value=0.0):
        return find_served(Path("/model.gguf"))


def server_log(path: Path) -> object:
    """One line of a cause for every log and every end."""
    text = path.read_bytes().decode("utf-8", "replace")
    deaths = [cause_of_death(text, code) for code in (0, 1, -6, -9, -11)]
    assert all(0 < len(death.cause) < 1000 and death.fix and "\n" not in death.cause for death in deaths)
    return deaths, memory_ran_out(text), last_lines(text)


# -- the Hub -----------------------------------------------------------------------------------------------------------


@contextmanager
def _hub(path: Path) -> Iterator[Path]:
    """The Hub with the answers in ``path``; the folder of its cache."""
    from huggingface_hub import constants

    with answering(path) as server, TemporaryDirectory() as folder:
        changed = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": f"{folder}/hub",
            "HF_TOKEN_PATH": f"{folder}/token",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        # Else the library would first ask for a list of agents, once a process.
        with mock.patch.multiple(constants, **changed), mock.patch(f"{_AGENTS}._registry", {}):
            yield Path(folder)


def _file() -> RemoteFile:
    digest = sha256(CONTENT).hexdigest()
    return RemoteFile("owner/name", "0" * 40, "model.gguf", len(CONTENT), digest, digest)


def hub_repository(path: Path) -> object:
    """Info and tree, of a repository or what stands for it."""
    with _hub(path):
        found = find(HubName("owner/name"), lambda _, names: names[0])
    assert all(isinstance(file.size, int) and file.size >= 0 for file in found.repository.files)
    return found


def hub_search(path: Path) -> object:
    with _hub(path):
        hits = search("llama")
    for hit in hits:
        assert hit.name.isprintable()
        assert (type(hit.downloads), type(hit.likes), type(hit.gated)) == (int, int, bool)
    return hits


def hub_range(path: Path) -> object:
    """Ranges by both of their readers: never more than was asked for, never another file."""
    with _hub(path), RangeReader(_file(), backoff_s=0.0) as read:
        data = read(0, 16)
    assert len(data) <= 16
    with _hub(path):
        source = HttpSource(connections=1)
        try:
            with source.open(_file(), 0, len(CONTENT)) as incoming:
                return data, list(incoming.chunks)
        except (PassingError, ChangedError) as error:  # tried again, or begun anew, by the transfer
            raise DynrunError(str(error) or "changed") from error
        finally:
            source.close()


def hub_pull(path: Path) -> object:
    """A whole pull: the right bytes under the final name, or none."""
    with _hub(path) as folder:
        try:
            pull([_file()], "main", settings=_SAVE_TIME)
        finally:
            blobs = [blob for blob in (folder / "hub").rglob("blobs/*") if len(blob.name) == 64]
            assert all(blob.read_bytes() == CONTENT for blob in blobs), "wrong bytes under a final name"
            assert {one.name for one in folder.iterdir()} <= {"hub"}
        return blobs


def hub_waits(path: Path) -> object:
    """The headers that ask for patience."""
    lines = path.read_bytes().decode("latin-1").split("\n")
    headers = dict(zip(("Retry-After", "RateLimit"), lines, strict=False))
    seconds = wait_asked_for(headers)
    assert seconds is None or 0 <= seconds <= 300
    return seconds


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "reply": (reply_stream, "answers"),
    "generated": (generated_answer, "answers"),
    "health": (health, "answers"),
    "served": (served_record, "record.json"),
    "server-log": (server_log, "server.log"),
    "hub-repository": (hub_repository, "answers"),
    "hub-search": (hub_search, "answers"),
    "hub-range": (hub_range, "answers"),
    "hub-pull": (hub_pull, "answers"),
    "hub-waits": (hub_waits, "headers"),
}
