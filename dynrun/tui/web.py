"""The app in a browser on this machine: textual-serve, closed to all but the user who started it.

The page's address carries a secret, which becomes a cookie; other users of the machine do not have it. Requests that
name another host (DNS rebinding) or come from another page (its origin) are refused.
"""

from __future__ import annotations

import secrets
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dynrun.errors import DynrunError

if TYPE_CHECKING:
    from aiohttp.web import Application, Request, StreamResponse

HOST = "127.0.0.1"
_COOKIE = "dynrun"


def serve(port: int, arguments: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Serve until Ctrl+C; ``port`` 0: any free one. Each page that is opened is an app of its own.

    Raises DynrunError where the port is taken.
    """
    from textual_serve.server import Server

    port = _free_port(port)
    secret = secrets.token_urlsafe(24)

    class Closed(Server):
        async def _make_app(self) -> Application:
            app: Application = await super()._make_app()
            app.middlewares.append(guard(secret, port))
            return app

        async def on_startup(self, app: Application) -> None:
            say(f"open http://{HOST}:{port}/?secret={secret}\nCtrl+C ends it")

        def initialize_logging(self) -> None:
            """Its own would print every request, and with it the secret."""

    command = shlex.join([sys.executable, "-m", "dynrun.cli.app", "tui", *arguments])
    Closed(command, host=HOST, port=port, title="dynrun").serve()


def guard(secret: str, port: int) -> Callable[..., Awaitable[StreamResponse]]:
    """An aiohttp middleware that lets in who knows ``secret``."""
    from aiohttp import web

    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def closed(request: Request, handler: Callable[[Request], Awaitable[Any]]) -> StreamResponse:
        origin = request.headers.get("Origin")
        if request.headers.get("Host") not in hosts or (origin and origin.partition("://")[2] not in hosts):
            raise web.HTTPForbidden(text="dynrun: from this machine only")
        given = request.query.get("secret") or request.cookies.get(_COOKIE, "")
        if not secrets.compare_digest(given.encode(), secret.encode()):
            raise web.HTTPForbidden(text="dynrun: open the address that `dynrun tui --web` printed")
        response: StreamResponse = await handler(request)
        if not response.prepared:
            response.set_cookie(_COOKIE, secret, httponly=True, samesite="Strict")
        return response

    return web.middleware(closed)


def _free_port(port: int) -> int:
    """``port`` if nobody has it; any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DynrunError(f"port {port} cannot be used: {error.strerror}", fix="choose another --port") from error
        found: int = probe.getsockname()[1]
        return found
