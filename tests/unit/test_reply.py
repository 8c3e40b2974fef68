"""A streamed answer: a server of the test's own speaks as llama-server does, or breaks off."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dynrun.errors import UsageError
from dynrun.runtime.events import Event, Finished, Reading, Said, Thought
from dynrun.runtime.reply import BrokenReplyError, Cancellation, RefusedError, reply

TIMINGS = {"cache_n": 2, "prompt_n": 5, "prompt_ms": 10.0, "prompt_per_second": 500.0}
TIMINGS |= {"predicted_n": 3, "predicted_ms": 30.0, "predicted_per_second": 100.0}
Script = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script
    body: dict[str, Any]

    def do_POST(self) -> None:
        type(self).body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).script(self)

    def log_message(self, *_: Any) -> None:
        pass

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, text: str) -> None:
        data = f"{text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, delta: dict[str, Any], **more: Any) -> None:
        self.send("data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}], **more}))

    def over(self) -> None:
        last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": TIMINGS}
        self.send("data: " + json.dumps(last))
        self.send("data: [DONE]")
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def serve() -> Iterator[Callable[[Script], str]]:
    """Starts a server that answers as the script says."""
    servers = []

    def start(script: Script) -> str:
        handler = type("Scripted", (Handler,), {"script": staticmethod(script)})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def events(url: str, cancellation: Cancellation | None = None) -> Iterator[Event]:
    return reply(url, "key", "/v1/chat/completions", {"messages": []}, cancellation or Cancellation())


def full(handler: Handler) -> None:
    handler.begin()
    handler.event({"role": "assistant", "content": None}, prompt_progress={"total": 7, "processed": 4, "cache": 2})
    handler.send(": ping")
    handler.event({"reasoning_content": "Hm."})
    handler.event({"content": "Hel"})
    handler.event({"content": "lo"}, timings=TIMINGS)
    handler.over()


def test_pieces_come_in_order_and_the_answer_last(serve: Callable[[Script], str]) -> None:
    *pieces, last = events(serve(full))
    assert pieces == [Reading(4, 7), Thought("Hm."), Said("Hel"), Said("lo")]
    assert isinstance(last, Finished)
    answer = last.answer
    assert (answer.text, answer.reasoning, answer.stop) == ("Hello", "Hm.", "end")
    assert (answer.timings.predicted_n, answer.timings.cache_n) == (3, 2)
    assert answer.first_token_s is not None


def test_a_cancelled_reply_ends_while_it_waits_and_keeps_what_had_come(serve: Callable[[Script], str]) -> None:
    gate = threading.Event()

    def hangs(handler: Handler) -> None:
        handler.begin()
        handler.event({"content": "Hel"}, timings=TIMINGS)
        gate.wait(30)

    cancellation = Cancellation()
    stream = events(serve(hangs), cancellation)
    assert next(stream) == Said("Hel")
    threading.Timer(0.2, cancellation.cancel).start()
    last = next(stream)
    gate.set()
    assert isinstance(last, Finished)
    assert (last.answer.text, last.answer.stop, last.answer.timings.predicted_n) == ("Hel", "cancelled", 3)


def test_a_reply_is_cancelled_before_its_first_byte(serve: Callable[[Script], str]) -> None:
    gate, cancellation = threading.Event(), Cancellation()

    def silent(_: Handler) -> None:
        threading.Timer(0.1, cancellation.cancel).start()
        gate.wait(30)

    (last,) = events(serve(silent), cancellation)
    gate.set()
    assert isinstance(last, Finished)
    assert (last.answer.text, last.answer.stop, last.answer.first_token_s) == ("", "cancelled", None)


def breaks_off(handler: Handler) -> None:
    handler.begin()
    handler.event({"content": "Hel"})
    handler.wfile.write(b"40\r\ndata: {")
    handler.close_connection = True


def ends_early(handler: Handler) -> None:
    handler.begin()
    handler.event({"content": "Hel"})
    handler.wfile.write(b"0\r\n\r\n")


def test_a_stream_that_breaks_off_is_no_answer(serve: Callable[[Script], str]) -> None:
    for script, words in ((breaks_off, "stopped answering"), (ends_early, "too early")):
        stream = events(serve(script))
        assert next(stream) == Said("Hel")
        with pytest.raises(BrokenReplyError, match=words):
            list(stream)


def test_nobody_there_is_a_broken_reply() -> None:
    with pytest.raises(BrokenReplyError, match="refused"):
        list(events("http://127.0.0.1:9"))


def refusal(status: int, error: dict[str, Any]) -> Script:
    def script(handler: Handler) -> None:
        data = json.dumps({"error": error}).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return script


def test_a_prompt_that_does_not_fit_is_the_users_affair(serve: Callable[[Script], str]) -> None:
    url = serve(refusal(400, {"type": "exceed_context_size_error", "message": "request (600 tokens) exceeds"}))
    with pytest.raises(UsageError, match="does not fit the context: request"):
        list(events(url))


def test_other_refusals_carry_their_kind_also_in_the_stream(serve: Callable[[Script], str]) -> None:
    error = {"type": "server_error", "message": "Compute error."}

    def late(handler: Handler) -> None:
        handler.begin()
        handler.send("data: " + json.dumps({"error": error}))

    for script in (refusal(500, error), late):
        with pytest.raises(RefusedError, match="Compute error") as caught:
            list(events(serve(script)))
        assert caught.value.kind == "server_error"
