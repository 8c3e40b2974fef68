"""Bytes of a file on the Hub without the file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dynrun.errors import NetworkError
from dynrun.hub.errors import reason, refusal
from dynrun.hub.files import RemoteFile
from dynrun.hub.http import PASSING, hub_client, wait_asked_for

if TYPE_CHECKING:
    import httpx2

_ATTEMPTS = 5


class RangeReader:
    """Reads ranges of ``file`` over one connection that stays open; close it, or use it in a ``with`` block."""

    def __init__(self, file: RemoteFile, *, backoff_s: float = 1.0, stall_s: float = 30.0) -> None:
        self.file = file
        self.fetched_bytes = 0
        self._backoff_s = backoff_s
        self._client = hub_client(stall_s=stall_s, connections=1)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __call__(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the file, fewer at its end.

        Raises NetworkError after a few tries, RefusedError or NotFoundError at once.
        """
        length = min(length, self.file.size - offset)
        if length <= 0:
            return b""
        for attempt in range(_ATTEMPTS):
            found = self._try(offset, length, last=attempt == _ATTEMPTS - 1)
            if isinstance(found, bytes):
                self.fetched_bytes += len(found)
                return found
            time.sleep(found if found is not None else self._backoff_s * 2**attempt)
        raise AssertionError("the last try raises")

    def _try(self, offset: int, length: int, *, last: bool) -> bytes | float | None:
        """The bytes, or the seconds to wait before the next try (None: as usual)."""
        import httpx2

        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            with self._client.stream("GET", self.file.url, headers=headers) as response:
                if response.status_code in PASSING and not last:
                    return wait_asked_for(response.headers)
                if response.status_code not in (200, 206):
                    code = response.headers.get("X-Error-Code", "")
                    raise refusal(self.file.repository, response.status_code, code)
                return _body(response, offset, length)
        except httpx2.HTTPError as error:
            if last:
                raise NetworkError(
                    f"{self.file.path} of {self.file.repository} could not be read: {reason(error)}",
                    fix="check the network and HF_ENDPOINT, and try again",
                ) from error
            return None


def _body(response: httpx2.Response, offset: int, length: int) -> bytes:
    """The wanted bytes; of a server without ranges, which sends all from the start, no more than up to their end."""
    skip = offset if response.status_code == 200 else 0
    found = bytearray()
    for chunk in response.iter_raw():
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        found += chunk[skip:]
        skip = 0
        if len(found) >= length:
            break
    return bytes(found[:length])
