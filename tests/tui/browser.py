"""A headless Chromium, spoken to by its DevTools protocol: a page, keys to it, and what its websockets were sent."""

from __future__ import annotations

import asyncio
import base64
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_LONGEST_S = 120.0


@dataclass
class Page:
    """``received``: text of all frames that its websockets got, in order."""

    socket: aiohttp.ClientWebSocketResponse
    received: list[str] = field(default_factory=list)
    _answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def drawn(self) -> str:
        """All of it."""
        return "".join(self.received)

    async def call(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol; its result."""
        number = len(self._answers) + 1
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(self._answers[number], _LONGEST_S)

    async def listen(self) -> None:
        """Take what the browser says, until it says no more."""
        async for message in self.socket:
            told = message.json()
            if "id" in told:
                self._answers[told["id"]].set_result(told.get("result", told.get("error")))
            elif told["method"] == "Network.webSocketFrameReceived":
                frame = told["params"]["response"]
                data = frame["payloadData"]
                # Opcode 2 is binary: what the terminal is to draw.
                self.received.append(base64.b64decode(data).decode(errors="replace") if frame["opcode"] == 2 else data)
            self._news.set()

    async def until(self, condition: Callable[[Page], bool], what: str) -> None:
        """Until ``condition`` holds of what was received."""
        deadline = time.monotonic() + _LONGEST_S
        while not condition(self):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())
            except TimeoutError as error:
                raise AssertionError(f"waited for {what}; drawn was:\n{self.drawn[-2000:]}") from error

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        return (await self.call("Runtime.evaluate", expression=script))["result"].get("value")

    async def click(self, x: int, y: int) -> None:
        """With the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def key(self, key: str, code: int) -> None:
        """Press and release a key that is no letter."""
        for kind in ("rawKeyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@asynccontextmanager
async def browser(folder: Path, size: tuple[int, int] = (1200, 800)) -> AsyncIterator[Page]:
    """A page of a browser of its own, with a profile in ``folder``; skips the test where there is no Chromium."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("Chromium is not installed")
    window = f"--window-size={size[0]},{size[1]}"
    # No sandbox: tests may run as root, and the only page is ours.
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", window)
    child = await asyncio.create_subprocess_exec(
        *(program, *flags, f"--user-data-dir={folder}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as session:
            address = await _page_address(session, folder / "DevToolsActivePort")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                await page.call("Network.enable")
                yield page
                listening.cancel()
    finally:
        child.terminate()
        await child.wait()


async def _page_address(session: aiohttp.ClientSession, port_file: Path) -> str:
    """Of the one page's debugger, once the browser has written down its port."""
    deadline = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline:
        if port_file.is_file() and (port := port_file.read_text(encoding="utf-8").partition("\n")[0]):
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium opened no page")
