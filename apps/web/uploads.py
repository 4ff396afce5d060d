"""Uploads bounded in all: one request, all that are kept, and how long one may take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fastdit.apps.web.same_origin import App, Message, Receive, Send, refuse

SLACK = 64 << 10
"""Bytes that a multipart request may have besides its file."""
KEPT = 3600.0
"""Seconds for which an upload is kept in any case; older ones are deleted when a new one needs their room."""
PATIENCE = 120.0
"""Seconds in which the whole of an upload must have come."""
MEMORY = 1 << 20
PATHS = ("/gradio_api/upload", "/gradio_api/upload/")


class Uploads:
    """ASGI middleware for uploads. each, most: bytes of one request, and of all uploads that are kept.

    A request's body is read into a temporary file without a name before the application sees it: Gradio leaves the file of an
    upload that breaks off in its folder for ever. Gradio itself deletes uploads a day later, and when the server ends.
    """

    def __init__(self, app: App, each: int, most: int) -> None:
        self.app, self.each, self.most = app, each + SLACK, most
        self.kept: dict[Path, float] = {}
        self.coming = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        size = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not size.isdecimal():
            await refuse(send, 411, "an upload must say how long it is")
        elif int(size) > self.each:
            await _refuse_read(receive, send, 413, f"an upload may have {self.each >> 20} MB at most")
        elif not self._room(int(size)):
            await _refuse_read(receive, send, 507, "too much was uploaded lately: try again in an hour")
        else:
            self.coming += int(size)
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self.coming -= int(size)

    def _room(self, size: int) -> bool:
        """Whether there is room for so many bytes, made by deleting old uploads if need be."""
        sizes = {path: path.stat().st_size for path in list(self.kept) if path.exists()}
        self.kept = {path: at for path, at in self.kept.items() if path in sizes}
        free = self.most - self.coming - sum(sizes.values())
        for path, at in sorted(self.kept.items(), key=lambda item: item[1]):
            if free >= size or time.monotonic() - at < KEPT:
                break
            path.unlink(missing_ok=True)
            del self.kept[path]
            free += sizes[path]
        return free >= size

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        with tempfile.SpooledTemporaryFile(max_size=MEMORY) as body:
            try:
                whole = await _read(receive, body.write)
            except TimeoutError:
                await refuse(send, 408, "the upload took too long")
                return
            if not whole:
                return
            length, status, answer = body.tell(), 0, b""
            body.seek(0)

            async def replay() -> Message:
                if body.tell() == length and length:
                    return await receive()  # which waits for the end of the connection
                part = body.read(MEMORY)
                return {"type": "http.request", "body": part, "more_body": body.tell() < length}

            async def watched(message: Message) -> None:
                nonlocal status, answer
                status = message.get("status", status)
                answer += message.get("body", b"")
                await send(message)

            await self.app(scope, replay, watched)
        if status == 200:  # the paths of what was saved
            self.kept |= {Path(path): time.monotonic() for path in json.loads(answer)}


async def _read(receive: Receive, take: Callable[[bytes], object]) -> bool:
    """Read a request's body; whether it came whole. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE):
        while (message := await receive())["type"] == "http.request":
            take(message.get("body", b""))
            if not message.get("more_body", False):
                return True
    return False


async def _refuse_read(receive: Receive, send: Send, status: int, sentence: str) -> None:
    """Refuse behind the body: a browser that is still sending does not read the answer."""
    with contextlib.suppress(TimeoutError):
        await _read(receive, len)
    await refuse(send, status, sentence)
