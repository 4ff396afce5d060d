"""The list of a browser's clips: queued, running and over, each with buttons to see it, and to stop or remove it.

The clips are the server's: after a reload, or a lost connection, the page finds the newest one and goes on with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from fastdit.apps.web import html
from fastdit.apps.web.page import Page
from fastdit.apps.web.queue import Ticket
from fastdit.apps.web.watching import watch

EVERY_SECONDS = 2.0
WORDS = {"waiting": "queued", "starting": "running", "denoising": "running", "finishing": "running"}
PRESSED = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-ticket]");
    if (button) trigger("select", { index: 0, value: [button.dataset.act, button.dataset.ticket] });
})"""


def build(page: Page, shown: Any, restored: dict[str, Any]) -> None:
    """Lay out the list. shown: where a clip is seen; restored: the widgets that a reload fills with the newest settings."""
    listed = gr.HTML(elem_id="jobs", js_on_load=PRESSED)
    timer = gr.Timer(EVERY_SECONDS)

    def rows(request: gr.Request) -> str:
        return table(page, page.studio.tickets_of(page.key(request)))

    def newest(request: gr.Request) -> Ticket | None:
        return next(iter(page.studio.tickets_of(page.key(request))), None)

    async def pressed(request: gr.Request, event: gr.SelectData) -> AsyncGenerator[Any, None]:
        act, key = map(str, event.value)
        ticket = page.ticket(request, key)
        if ticket is None:
            yield gr.skip(), rows(request)
        elif act == "show":
            async with contextlib.aclosing(watch(page, ticket, request, "result")) as states:
                async for state in states:
                    yield state, gr.skip()
        else:
            page.studio.halt(ticket) if act == "stop" else page.studio.remove(ticket)
            yield gr.skip(), rows(request)

    async def resume(request: gr.Request) -> AsyncGenerator[Any, None]:
        yield gr.skip()
        if (ticket := newest(request)) is not None:
            async with contextlib.aclosing(watch(page, ticket, request, "result")) as states:
                async for state in states:
                    yield state

    def settings(request: gr.Request) -> list[Any]:
        said = {} if (ticket := newest(request)) is None else ticket.said
        return [said.get(name, gr.skip()) if name != "image" else gr.skip() for name in restored]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([page.blocks.load, timer.tick], rows, None, listed, queue=False, **quiet)
    page.blocks.load(resume, None, shown, concurrency_limit=None, **quiet)
    page.blocks.load(settings, None, list(restored.values()), queue=False, **quiet)
    listed.select(pressed, None, [shown, listed], concurrency_limit=None, trigger_mode="multiple", **quiet)


def table(page: Page, tickets: list[Ticket]) -> str:
    if not tickets:
        return ""
    return f'<h2>Your clips</h2><ul class="jobs">{"".join(_row(page, ticket) for ticket in tickets)}</ul>'


def _row(page: Page, ticket: Ticket) -> str:
    settings = ticket.job.settings()
    state = WORDS.get(ticket.state, ticket.state)
    if ticket.state == "denoising":
        state += f", step {ticket.step} of {ticket.steps}"
    prompt = settings.prompt if len(settings.prompt) <= 80 else settings.prompt[:79] + "…"
    size = f"{settings.width} × {settings.height}, {settings.frames} frames"
    acts = [("show", "Show"), ("remove", "Remove from list") if ticket.over else ("stop", "Stop")]
    buttons = "".join(
        f'<button type="button" data-act="{act}" data-ticket="{ticket.key}" '
        f'aria-label="{said}: {html.text(prompt)}">{said}</button>'
        for act, said in acts
    )
    how = "compared" if ticket.job.repeats else settings.preset
    return (
        f'<li data-state="{ticket.state}"><span class="state">{html.text(state)}</span><span class="what">{html.text(prompt)}'
        f"<small>{html.text(how)}, {size}</small></span>{buttons}</li>"
    )
