"""What the tabs of the page share: the studio, whose clips are whose, and which files may be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from fastdit.apps.web import html
from fastdit.apps.web.queue import Studio, Ticket
from fastdit.apps.web.same_origin import browser

SERVED = ".served"
"""Folder inside the output folder for copies of shown files, under names that cannot be guessed."""
HOUR, DAY = 3600, 24 * 3600


class Copies(set[str]):
    """Paths of copies. Iteration is safe: Gradio iterates once an hour in one thread while other threads add paths."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))


class Page:
    """Connects the widgets with the studio. users: whether people log in, and so have folders of their own."""

    def __init__(self, studio: Studio, users: bool) -> None:
        self.studio, self.users = studio, users
        self.latest: dict[str, Ticket] = {}
        self.watched: dict[tuple[str, str], Ticket] = {}  # by session and place on the page
        self.inputs: dict[str, Any] = {}
        self.knobs: list[Any] = []
        self.blocks = gr.Blocks(title="fastdit", analytics_enabled=False, delete_cache=(HOUR, DAY), fill_width=True)
        # includes copies that a killed server left: they are deleted with this server's
        self.copies = Copies(str(path) for path in (studio.out / SERVED).rglob("*") if path.is_file())
        self.blocks.temp_file_sets.append(self.copies)

    def key(self, request: gr.Request) -> str:
        """Whose clips are whose: the name somebody logged in with, the browser, or a program's session."""
        return request.username or browser(getattr(request, "cookies", None) or {}) or str(request.session_hash)

    def folder(self, request: gr.Request) -> Path:
        return self.studio.out / request.username if self.users and request.username else self.studio.out

    def gone(self, request: gr.Request) -> None:
        """A tab was closed, or a program has ended; a program's clips end with it."""
        tab = str(request.session_hash)
        self.latest.pop(tab, None)
        self.watched = {key: ticket for key, ticket in self.watched.items() if key[0] != tab}
        if self.key(request) == tab:
            self.studio.stop(tab)

    def ticket(self, request: gr.Request, key: str) -> Ticket | None:
        """One of this user's clips."""
        return next((ticket for ticket in self.studio.tickets_of(self.key(request)) if ticket.key == key), None)

    def stop(self, request: gr.Request, place: str) -> None:
        """Stop the clip that is watched in one place of a tab."""
        if (ticket := self.watched.get((str(request.session_hash), place))) is not None:
            self.studio.halt(ticket)

    def remember(self, request: gr.Request, ticket: Ticket) -> None:
        """Keep the latest ticket of a browser tab for the tab that looks inside."""
        if ticket.report is not None:
            self.latest[str(request.session_hash)] = ticket

    def copy(self, folder: Path, name: str) -> str:
        """Path of a copy that the page may read; it is deleted a day after the last request."""
        path = save_file_to_cache(str(folder / name), str(self.studio.out / SERVED))
        self.copies.add(path)  # otherwise Gradio would not know it
        return path

    def result(self, folder: Path, record: dict[str, Any], again: bool = False) -> str:
        """A clip or a comparison, as HTML."""
        names = [*reversed(record["files"]), f"{record['name']}.json"]
        urls = {name: html.address(self.copy(folder, name)) for name in names}
        return html.comparison(record, urls) if "ratio" in record else html.result(record, urls, again)
