"""A llama-server that says what a test has written down: as slowly, as much, and as badly as the test wants.

It is found by the app as one of `dynrun serve` is (runtime/served.py); the wire is that of llama-server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dynrun.paths import cache_dir
from dynrun.runtime.served import announced

# Instead of a piece of text: these bytes as they are; the connection ends; wait until the test opens the gate.
RAW, DIE, GATE = "raw", "die", "gate"
Piece = str | tuple[str, Any]


@dataclass
class Scripted:
    """``answers`` in the order in which they are asked for; the last one again and again. ``requests``: what came."""

    answers: list[Iterable[Piece]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    # Called before each piece, from the server's thread.
    before: Callable[[], None] = lambda: None

    def next_answer(self) -> Iterable[Piece]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Scripted

    def log_message(self, *_: Any) -> None:
        """Nothing: tests look at ``requests``."""

    def do_GET(self) -> None:
        data = json.dumps({"data": [{"id": "scripted"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.script.requests.append(json.loads(body))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        # The user may stop the answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._stream(self.script.next_answer())

    def _stream(self, pieces: Iterable[Piece]) -> None:
        n = 0
        for piece in pieces:
            self.script.before()
            kind, value = piece if isinstance(piece, tuple) else ("content", piece)
            if kind == DIE:
                return
            if kind == GATE:
                self.script.gate.wait(30)
            elif kind == RAW:
                self.wfile.write(value)
            else:
                n += 1
                self._event({"choices": [{"delta": {kind: value}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": _timings(n)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextmanager
def scripted_server(model: Path, script: Scripted, n_ctx: int = 4096) -> Iterator[Scripted]:
    """Serve ``model`` by ``script`` on a port of its own."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    key = cache_dir() / "scripted.key"
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text("secret\n")
    try:
        with announced(f"http://127.0.0.1:{server.server_port}", key, {"scripted": (model, n_ctx)}):
            yield script
    finally:
        script.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _timings(n: int) -> dict[str, float]:
    spent = {"prompt_n": 10, "prompt_ms": 10.0, "prompt_per_second": 1000.0, "cache_n": 0}
    return {**spent, "predicted_n": n, "predicted_ms": n * 10.0, "predicted_per_second": 100.0}
