"""A clip of the server as it is seen in one place of a browser tab."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from fastdit.apps.web import html
from fastdit.apps.web.page import Page
from fastdit.apps.web.preview import preview
from fastdit.apps.web.queue import Ticket

EVERY = 3  # steps between two previews


async def watch(page: Page, ticket: Ticket, request: gr.Request, place: str) -> AsyncGenerator[Any, None]:
    """Yield HTML of a clip, until it is over or another one is watched in this place of the tab."""
    here = (str(request.session_hash), place)
    page.watched[here] = ticket
    picture, last = "", ""
    async with contextlib.aclosing(page.studio.watch(ticket)) as tickets:
        async for _ in tickets:
            if page.watched.get(here) is not ticket:
                yield gr.skip()  # Gradio sends the last value again when an event ends: over the other clip's
                return
            latents = ticket.latents
            if ticket.state == "denoising" and ticket.step % EVERY == 1 and latents is not None:
                picture = await asyncio.to_thread(preview, latents) or picture
            if ticket.state == "failed":
                now = html.error(ticket.error)
            elif ticket.state == "done" and ticket.record is not None:
                page.remember(request, ticket)
                # in a thread: it hashes and copies files, and others wait for their progress
                now = await asyncio.to_thread(page.result, ticket.folder, ticket.record, again=not ticket.marks)
            else:
                now = html.progress(ticket, page.studio.ahead(ticket), picture)
            if now != last:
                yield now
            else:
                yield gr.skip()
            last = now
