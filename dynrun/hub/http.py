"""The connection to the Hub for what huggingface_hub does not do: ranges of files.

Addresses, token and offline switch are the library's; proxies and certificates come from the environment as httpx2
reads it. A redirect to another host is followed without the token (httpx2 drops it).
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynrun import __version__
from dynrun.errors import NetworkError

if TYPE_CHECKING:
    import httpx2

CONNECT_S = 10.0
STALL_S = 30.0
# Answers that may be another one in a moment.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 300.0
# Most that one read takes from a connection. httpcore2 has 64 KiB: at gigabytes a second each read costs; what is more
# than the caches of a core hold is copied slower.
READ_BYTES = 256 << 10


def hub_client(*, stall_s: float = STALL_S, connections: int = 8) -> httpx2.Client:
    """A client that sends the user's token to the Hub and gives a connection up after ``stall_s`` without a byte.

    Raises NetworkError where HF_HUB_OFFLINE is set.
    """
    import httpcore2
    import httpx2
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NetworkError("HF_HUB_OFFLINE is set, and this needs the network", fix="unset it")
    httpcore2.HTTP11Connection.READ_NUM_BYTES = READ_BYTES
    return httpx2.Client(
        headers={**hub_headers(), "Accept-Encoding": "identity"},
        follow_redirects=True,
        timeout=httpx2.Timeout(stall_s, connect=min(CONNECT_S, stall_s)),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


def hub_headers() -> dict[str, str]:
    """Who we are, and the user's token where there is one: for the Hub alone."""
    from huggingface_hub import constants, get_token

    headers = {"User-Agent": f"dynrun/{__version__}"}
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"
    return headers


def wait_asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: ``Retry-After`` in seconds or as a date, or the Hub's ``RateLimit``."""
    value = headers.get("Retry-After", "").strip()
    seconds: float | None = None
    if value.isdecimal():
        seconds = float(value)
    elif value:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            seconds = None
    elif match := re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", "")):
        seconds = float(match[1])
    return None if seconds is None else min(max(seconds, 0.0), _LONGEST_WAIT_S)
