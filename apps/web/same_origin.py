"""Keep other sites' pages, open in the same browser, away from this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HEADERS = [
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]


class SameOrigin:
    """ASGI middleware: refuses what another site's page asks for, and lets no page frame this one.

    A browser sends a form, also one with files, to any address without asking the server first, so the server must look where
    it comes from. A link to the page itself may be followed from anywhere. Programs send neither header and are let in.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if foreign(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain"), *HEADERS]})
            await send({"type": "http.response.body", "body": b"refused: asked for by another site's page"})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)


def foreign(scope: Message) -> bool:
    """Whether a browser says that another origin's page makes this request."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        link = scope.get("method") == "GET" and scope["path"] == "/" and headers.get(b"sec-fetch-dest") == "document"
        return site not in ("same-origin", "none") and not link
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")
