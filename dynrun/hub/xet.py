"""Ranges out of Xet, the Hub's storage of deduplicated chunks, where a repository has it; over HTTP where that fails.

The transfer stays ours: what hf_xet writes itself is lost when it is interrupted, and nobody checks its SHA-256. It
could not be tried against a real Xet server; a file that it fails at, stalls at or gives wrong bytes of is fetched over
HTTP from there on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dynrun.hub.errors import reason
from dynrun.hub.files import RemoteFile
from dynrun.hub.http import hub_headers
from dynrun.hub.source import HttpSource, Incoming, PassingError

_CHUNKS_AHEAD = 16
_POLL_S = 0.2


class XetSource:
    """As :class:`dynrun.hub.source.HttpSource`, which ``http`` is and which has whatever Xet has not."""

    def __init__(self, http: HttpSource, stall_s: float) -> None:
        self._http = http
        self._stall_s = stall_s
        self._lock = threading.Lock()
        # Held while hf_xet connects, which may take forever: readers never wait for it.
        self._group_lock = threading.Lock()
        self._groups: dict[tuple[str, str], Any] = {}
        self._distrusted: set[str] = set()
        self._open: set[_Pump] = set()

    def close(self) -> None:
        """Give the connections back; nobody may be reading."""
        self._http.close()

    def cut(self) -> None:
        """Let nobody wait for bytes any longer."""
        self._http.cut()
        with self._lock:
            for pump in self._open:
                pump.end()

    def distrust(self, file: RemoteFile) -> None:
        """Fetch ``file`` over HTTP from now on."""
        self._distrusted.add(file.etag)

    @contextmanager
    def open(self, file: RemoteFile, start: int, end: int) -> Iterator[Incoming]:
        """Bytes [start, end) of ``file``. Raises what :meth:`HttpSource.open` raises."""
        if not (file.xet_hash and file.sha256 and _is_wanted()) or file.etag in self._distrusted:
            with self._http.open(file, start, end) as incoming:
                yield incoming
            return
        pump = _Pump(lambda: self._stream(file, start, end), self._stall_s)
        with self._lock:
            self._open.add(pump)
        try:
            yield Incoming(start, whole=False, chunks=iter(pump))
        except PassingError:
            self.distrust(file)
            raise
        finally:
            pump.end()
            with self._lock:
                self._open.discard(pump)

    def _stream(self, file: RemoteFile, start: int, end: int) -> Iterable[bytes]:
        from hf_xet import XetFileInfo  # type: ignore[import-untyped]

        chunks: Iterable[bytes] = self._group(file).download_stream(
            XetFileInfo(file.xet_hash, file.size), start=start, end=end
        )
        return chunks

    def _group(self, file: RemoteFile) -> Any:
        """hf_xet's connections for a repository at a commit: the Hub gives tokens for that."""
        from hf_xet import XetSession
        from huggingface_hub import constants

        key = (file.repository, file.commit)
        with self._group_lock:
            if key not in self._groups:
                url = f"{constants.ENDPOINT}/api/models/{file.repository}/xet-read-token/{file.commit}"
                self._groups[key] = XetSession().new_download_stream_group(
                    token_refresh_url=url, token_refresh_headers=hub_headers()
                )
            return self._groups[key]


class _Pump:
    """Reads a stream in a thread, so that the reader can stop waiting: hf_xet itself waits as long as it likes."""

    def __init__(self, open_stream: Any, stall_s: float) -> None:
        self._stall_s = stall_s
        self._queue: queue.Queue[bytes | Exception | None] = queue.Queue(_CHUNKS_AHEAD)
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(open_stream,), daemon=True).start()

    def end(self) -> None:
        """No more is wanted."""
        self._ended.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._queue.get(timeout=self._stall_s)
            except queue.Empty:
                raise PassingError("no bytes came any more from Xet") from None
            if chunk is None:
                return
            if isinstance(chunk, Exception):
                raise PassingError(f"Xet fails: {reason(chunk)}") from chunk
            yield chunk

    def _run(self, open_stream: Any) -> None:
        try:
            for chunk in open_stream():
                if not self._put(chunk):
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, chunk: bytes | Exception | None) -> bool:
        while not self._ended.is_set():
            with suppress(queue.Full):
                self._queue.put(chunk, timeout=_POLL_S)
                return True
        return False


def _is_wanted() -> bool:
    from importlib.util import find_spec

    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
