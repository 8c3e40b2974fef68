"""The app in a browser: who is let in, and what it shows."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.commands import ARGV
from tests.tui.browser import browser

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
    with httpx2.Client() as client:
        assert client.get(base).status_code == 403
        assert client.get(f"{base}static/css/xterm.css").status_code == 403
        page = client.get(address)
        assert page.status_code == 200
        assert "httponly" in page.headers["Set-Cookie"].lower()
        # The cookie is enough afterwards, but not for another page, nor under another name.
        assert client.get(base).status_code == 200
        assert client.get(f"{base}ws", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get(base, headers={"Host": "evil.example"}).status_code == 403


async def test_the_app_is_drawn_in_a_browser_takes_keys_and_follows_its_size(address: str, tmp_path: Path) -> None:
    async with browser(tmp_path) as page:
        await page.call("Page.navigate", url=address)
        await page.until(lambda page: "demo-moe" in page.drawn, "the home screen")
        assert await page.evaluate("document.querySelector('.xterm-screen').clientWidth") > 600
        await page.click(600, 500)
        await page.key("F3", 114)
        await page.until(lambda page: "Press o and name a model" in page.drawn, "the Plan room")
        before = len(page.drawn)
        await page.call("Emulation.setDeviceMetricsOverride", width=700, height=500, deviceScaleFactor=1, mobile=False)
        await page.until(lambda page: "Press o and name a model" in page.drawn[before:], "the room in another size")
