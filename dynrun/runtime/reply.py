"""One request to llama-server, its answer piece by piece.

Takes a URL, a key and a request; gives events, :class:`Finished` last. The stream is that of tools/server/README.md of
llama.cpp (server-sent events). Knows nothing of processes: a broken connection is a :class:`BrokenReplyError`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from dynrun.errors import MALFORMED, DynrunError, UsageError
from dynrun.runtime.events import Answer, Event, Finished, Reading, Said, Stop, Thought, Timings

# Nothing is sent while a long prompt is read, except a ping every half minute (--sse-ping-interval).
_SILENCE_S = 600.0
# Bytes of an event, or of a refusal: the largest hold a token with its logprobs.
_LONGEST = 1 << 22


class BrokenReplyError(DynrunError):
    """The connection ended before the answer did."""


class RefusedError(DynrunError):
    """llama-server would not answer; ``kind`` as it says (tools/server/server-common.cpp)."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Cancellation:
    """Ends a reply that is being read, from another thread or a signal handler: at once, whatever it waits for."""

    def __init__(self) -> None:
        self.wanted = False
        self._socket: socket.socket | None = None

    def cancel(self) -> None:
        """End the reply, or the next one."""
        self.wanted = True
        if (connection := self._socket) is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def attach(self, connection: socket.socket | None) -> None:
        """The connection that a reply is read from."""
        self._socket = connection
        if self.wanted:
            self.cancel()


def reply(url: str, api_key: str, endpoint: str, body: dict[str, Any], cancellation: Cancellation) -> Iterator[Event]:
    """Ask, and yield what comes. Cancelled, the answer is what had come, ``stop`` says so.

    Raises UsageError where the prompt does not fit the context, RefusedError for other refusals, BrokenReplyError.
    """
    parts = _Parts(time.monotonic())
    extras = {"stream": True, "return_progress": True, "timings_per_token": True}
    try:
        for event in _stream(url, api_key, endpoint, {**body, **extras}, cancellation):
            yield from parts.take(event)
    # A line may be cut where the connection breaks: no JSON, a ValueError.
    except (OSError, HTTPException, *MALFORMED) as error:
        if not cancellation.wanted:
            raise BrokenReplyError(f"llama-server stopped answering: {str(error)[:300]}") from error
    if parts.stop is None and not cancellation.wanted:
        raise BrokenReplyError("llama-server ended its answer too early")
    yield Finished(parts.answer())


def _stream(
    url: str, api_key: str, endpoint: str, body: dict[str, Any], cancellation: Cancellation
) -> Iterator[dict[str, Any]]:
    address = urlsplit(url)
    # Not httpx2: its connection cannot be ended from outside while it waits for the first byte.
    with closing(HTTPConnection(str(address.hostname), address.port, timeout=_SILENCE_S)) as connection:
        connection.connect()
        cancellation.attach(connection.sock)
        try:
            headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
            connection.request("POST", endpoint, json.dumps(body), headers)
            with connection.getresponse() as response:
                yield from _events(response)
        finally:
            cancellation.attach(None)


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    if response.status != 200:
        raise _refused(response.read(_LONGEST))
    while line := response.readline(_LONGEST):
        kind, _, data = line.decode("utf-8", "replace").strip().partition(": ")
        if kind not in ("data", "error") or data == "[DONE]":
            continue
        event = json.loads(data)
        if kind == "error" or "error" in event:
            raise _refused(data.encode())
        yield event


def _refused(body: bytes) -> DynrunError:
    try:
        error = json.loads(body)["error"]
        kind, message = str(error.get("type")), str(error["message"])
    except MALFORMED:
        kind, message = "", body.decode("utf-8", "replace")
    if kind == "exceed_context_size_error":
        fix = "shorten it, or give a larger context (--ctx) if the model has one"
        return UsageError(f"the prompt does not fit the context: {message[:300]}", fix=fix)
    return RefusedError(f"llama-server refused the request: {message[:300]}", kind)


@dataclass
class _Parts:
    asked: float
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    first_token_s: float | None = None
    stop: Stop | None = None

    def take(self, event: dict[str, Any]) -> Iterator[Event]:
        if progress := event.get("prompt_progress"):
            yield Reading(int(progress["processed"]), int(progress["total"]))
        if timings := event.get("timings"):
            self.timings = _timings(timings)
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice
            if thought := _text(delta, "reasoning_content"):
                self._began()
                self.reasoning.append(thought)
                yield Thought(thought)
            if text := _text(delta, "content") or _text(delta, "text"):
                self._began()
                self.text.append(text)
                yield Said(text)
            if reason := choice.get("finish_reason"):
                self.stop = "length" if reason == "length" else "end"

    def _began(self) -> None:
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.asked

    def answer(self) -> Answer:
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        return Answer(text, reasoning, self.timings, self.stop or "cancelled", self.first_token_s)


def _text(delta: dict[str, Any], name: str) -> str:
    text = delta.get(name) or ""
    if not isinstance(text, str):
        raise TypeError(f"{name} is no text")
    # JSON can hold halves of characters, which no terminal and no file takes.
    return text.encode("utf-8", "replace").decode()


def _timings(data: dict[str, Any]) -> Timings:
    # A rate over no time at all is null.
    def number(name: str) -> float:
        return float(data.get(name) or 0.0)

    return Timings(
        prompt_n=int(number("prompt_n")),
        prompt_ms=number("prompt_ms"),
        prompt_per_second=number("prompt_per_second"),
        predicted_n=int(number("predicted_n")),
        predicted_ms=number("predicted_ms"),
        predicted_per_second=number("predicted_per_second"),
        cache_n=int(number("cache_n")),
    )
