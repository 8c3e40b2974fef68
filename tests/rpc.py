"""A ggml-rpc-server on this machine: a device with memory of its own, as far as llama.cpp can tell."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrun.llamacpp.build import installation


@contextmanager
def rpc_server(log: Path, *, memory_kb: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with the CPU behind it, and its name as a device; ``memory_kb``: its address space at most."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    limit = f"ulimit -v {memory_kb}; " if memory_kb else ""
    program = installation().program("ggml-rpc-server")
    argv = ["/bin/sh", "-c", f'{limit}exec "{program}" -H 127.0.0.1 -p {port} -t 1']
    with log.open("wb") as sink, subprocess.Popen(argv, stdout=sink, stderr=sink) as server:
        try:
            _wait_for(port, server)
            yield f"rpc:127.0.0.1:{port}", server
        finally:
            server.kill()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        assert server.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
