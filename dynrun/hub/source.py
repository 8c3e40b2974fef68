"""One range of one file, as it comes in: over HTTP, where it can break at any byte."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynrun.errors import DynrunError
from dynrun.hub.errors import reason, refusal
from dynrun.hub.files import RemoteFile
from dynrun.hub.http import PASSING, READ_BYTES, STALL_S, hub_client, wait_asked_for

if TYPE_CHECKING:
    import httpx2

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
# After so much, at such a rate, a connection is of a network on which the next one costs less than h11's copies do.
_TRIED_BYTES = 4 << 20
_FAST_BYTES_S = 100e6
_SHA256 = re.compile(r"[0-9a-f]{64}")


class PassingError(Exception):
    """It may work in a moment; ``wait_s`` is what the server asks for. ``refused`` is what to say where it does not."""

    def __init__(self, why: str, *, wait_s: float | None = None, refused: DynrunError | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.refused = refused


class ChangedError(Exception):
    """The server has another file under this name than it said before."""


@dataclass(frozen=True)
class Incoming:
    """``chunks`` begin at byte ``start`` of the file; more than was asked for where the server knows no ranges.

    A chunk is good until the next one.
    """

    start: int
    whole: bool
    chunks: Iterator[bytes | memoryview]


class HttpSource:
    """Opens ranges over one pool of connections; :meth:`cut` ends all that are open, from any thread."""

    def __init__(self, *, stall_s: float = STALL_S, connections: int = 8) -> None:
        self._client = hub_client(stall_s=stall_s, connections=connections)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def close(self) -> None:
        """Give the connections back; nobody may be reading."""
        self._client.close()

    @contextmanager
    def open(self, file: RemoteFile, start: int, end: int) -> Iterator[Incoming]:
        """Bytes [start, end) of ``file``.

        Raises PassingError for whatever may be otherwise next time, also while chunks come in; ChangedError;
        DynrunError where the file has no end.
        """
        import httpx2

        headers = {"Range": f"bytes={start}-{end - 1}"}
        try:
            with self._client.stream("GET", file.url, headers=headers, extensions={"trace": self._trace}) as response:
                first = _first_byte(file, response, start)
                yield Incoming(first, response.status_code == 200, _chunks(response))
        except (httpx2.TransportError, httpx2.TooManyRedirects) as error:
            raise PassingError(_said(error)) from error

    def cut(self) -> None:
        """Shut every connection, so that who waits for bytes waits no longer."""
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError, ValueError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember each connection of the pool: the only way to it before its first answer."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if isinstance(connection, socket.socket):
                with self._lock:
                    self._sockets = [known for known in self._sockets if known.fileno() != -1]
                    self._sockets.append(connection)


def _chunks(response: httpx2.Response) -> Iterator[bytes | memoryview]:
    """The body; on a fast network by the socket itself, after which the connection is closed."""
    length = response.headers.get("Content-Length", "")
    plain = length.isdecimal() and "Transfer-Encoding" not in response.headers
    connection = _socket_of(response) if plain else None
    started, got = time.monotonic(), 0
    # It lives to the end: it closes the connection when it goes.
    by_h11 = response.iter_raw()
    for chunk in by_h11:
        got += len(chunk)
        yield chunk
        if connection is not None and got >= _TRIED_BYTES and got > _FAST_BYTES_S * (time.monotonic() - started):
            yield from _received(connection, int(length) - got)
            return


def _socket_of(response: httpx2.Response) -> socket.socket | None:
    """What the body comes from; none where httpcore2 does the encryption itself, to a proxy that has its own."""
    stream = response.extensions["network_stream"]
    connection = stream.get_extra_info("socket")
    inner = isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject)
    return connection if isinstance(connection, socket.socket) and not inner else None


def _received(connection: socket.socket, n: int) -> Iterator[memoryview]:
    """The next ``n`` bytes, or fewer where the server ends before. Raises PassingError."""
    buffer = memoryview(bytearray(READ_BYTES))
    while n > 0:
        try:
            got = connection.recv_into(buffer[: min(n, READ_BYTES)])
        except TimeoutError as error:
            raise PassingError("no bytes came any more") from error
        except OSError as error:
            raise PassingError(reason(error)) from error
        if not got:
            return
        n -= got
        yield buffer[:got]


def _first_byte(file: RemoteFile, response: httpx2.Response, start: int) -> int:
    """Where the answer begins in the file, once it is sure that it is the file."""
    status = response.status_code
    if status in PASSING:
        raise PassingError(f"the server answers {status}", wait_s=wait_asked_for(response.headers))
    if status == 416:
        raise ChangedError
    if status not in (200, 206):
        # Also what is refused is asked for again: addresses of the storage expire, and mirrors hiccup.
        refused = refusal(file.repository, status, response.headers.get("X-Error-Code", ""))
        raise PassingError(f"the server answers {status}", refused=refused)
    for answer in (*response.history, response):
        linked = answer.headers.get("X-Linked-Etag", "").strip('W/"')
        if _SHA256.fullmatch(linked) and file.sha256 and linked != file.sha256:
            raise ChangedError
    if status == 200:
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise PassingError("the server answers with another range than it was asked for")
    if match[3] != "*" and int(match[3]) != file.size:
        raise ChangedError
    return start


def _said(error: httpx2.TransportError | httpx2.TooManyRedirects) -> str:
    import httpx2

    if isinstance(error, httpx2.ConnectTimeout):
        return "no connection"
    if isinstance(error, httpx2.TimeoutException):
        return "no bytes came any more"
    return reason(error)
