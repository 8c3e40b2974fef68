"""The app in a browser: who is let in."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.commands import ARGV

pytestmark = pytest.mark.tui


@pytest.fixture
def address() -> Iterator[str]:
    """What `dynrun tui --web` prints."""
    argv = [*ARGV, "tui", "--web"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        assert child.stderr is not None
        line = next(line for line in child.stderr if "http://" in line)
        yield re.sub(r"^open ", "", line.strip())
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)


def test_only_who_knows_the_secret_and_comes_from_this_machine_is_let_in(address: str) -> None:
    base, _, _ = address.partition("?")
    assert base.startswith("http://127.0.0.1:")
    with httpx.Client() as client:
        assert client.get(base).status_code == 403
        assert client.get(f"{base}static/css/xterm.css").status_code == 403
        page = client.get(address)
        assert page.status_code == 200
        assert "httponly" in page.headers["Set-Cookie"].lower()
        # The cookie is enough afterwards, but not for another page, nor under another name.
        assert client.get(base).status_code == 200
        assert client.get(f"{base}ws", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get(base, headers={"Host": "evil.example"}).status_code == 403
