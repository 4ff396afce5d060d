"""Keep other sites' pages, open in the same browser, away from this server, and serve only what the page needs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import Morsel, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
HEADERS = [
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]
SERVED = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|login|logout)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info|user|token|app_id|login_check|theme\.css|startup-events|upload|upload_progress|cancel|reset)/?"
    r"|/gradio_api/(run/predict|queue/(join|data)|heartbeat/\w+|call/\w+(/\w+)?|file=.*)"
)
"""What the page, its scripts and `gradio_client` ask for. The rest of Gradio (a proxy to other hosts, an OpenAPI schema, run
history, monitoring, deep links, streams, editing by a model) is not served."""


COOKIE = b"fastdit_browser=%b; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
"""A random name of the browser, by which it finds its clips again. It is sent to no script and to no other site."""


class SameOrigin:
    """ASGI middleware: refuses what another site's page asks for, and lets no page frame this one.

    A browser sends a form, also one with files, to any address without asking the server first, so the server must look where
    it comes from. A link to the page itself may be followed from anywhere. Programs send neither header and are let in.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        outside, unknown = foreign(scope), SERVED.fullmatch(scope["path"]) is None
        if scope["type"] == "websocket":  # the page opens none
            await send({"type": "websocket.close", "code": 1008})
            return
        if outside or unknown:
            await (
                refuse(send, 403, "refused: asked for by another site's page") if outside else refuse(send, 404, "not found")
            )
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
                sent = SimpleCookie(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
                if scope["path"] == "/" and browser(sent) is None:
                    message["headers"].append((b"set-cookie", COOKIE % secrets.token_hex(16).encode()))
            await send(message)

        await self.app(scope, receive, guarded)


def browser(cookies: Mapping[str, Any]) -> str | None:
    """The name that the browser was given; None for a program, or a name that was made up."""
    given = cookies.get("fastdit_browser")
    name = given.value if isinstance(given, Morsel) else given
    return name if name is not None and re.fullmatch("[0-9a-f]{32}", name) else None


async def refuse(send: Send, status: int, sentence: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain"), *HEADERS]})
    await send({"type": "http.response.body", "body": sentence.encode()})


def foreign(scope: Message) -> bool:
    """Whether a browser says that another origin's page makes this request."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        link = scope.get("method") == "GET" and scope["path"] == "/" and headers.get(b"sec-fetch-dest") == "document"
        return site not in ("same-origin", "none") and not link
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")
