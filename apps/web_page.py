"""The page as a whole: its tabs, its looks, who is who, and which files may be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from fastdit.apps import web_create, web_html
from fastdit.apps.web_studio import Studio, Ticket

HERE = Path(__file__).parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
SERVED = ".served"
"""Folder of the output folder with copies of the files that somebody was shown, under names that cannot be guessed."""
DAY = 24 * 3600


class Page:
    """Widgets on one side, the studio on the other. users: whether people have names, and so folders of their own."""

    def __init__(self, studio: Studio, users: bool) -> None:
        self.studio, self.users = studio, users
        self.latest: dict[str, Any] = {}
        self.blocks = gr.Blocks(title="fastdit", analytics_enabled=False, delete_cache=(3600, DAY), fill_width=True)

    def build(self) -> gr.Blocks:
        with self.blocks:
            gr.HTML("<header><h1>fastdit</h1><p>Text to video, dense and fast side by side</p></header>", elem_id="head")
            with gr.Tabs(elem_id="tabs"), gr.Tab("Create", id="create"):
                self.inputs = web_create.build(self)
            self.blocks.unload(self.gone)
        return self.blocks

    def key(self, request: gr.Request) -> str:
        """Whose clips are whose: the name somebody logged in with, or the browser tab."""
        return request.username or str(request.session_hash)

    def folder(self, request: gr.Request) -> Path:
        return self.studio.out / request.username if self.users and request.username else self.studio.out

    def stop(self, request: gr.Request) -> None:
        self.studio.stop(self.key(request))

    def gone(self, request: gr.Request) -> None:
        """A tab was closed."""
        self.latest.pop(str(request.session_hash), None)
        if not request.username:
            self.studio.stop(self.key(request))

    def remember(self, request: gr.Request, ticket: Ticket) -> None:
        """For a closer look at what ran."""
        if ticket.report is not None:
            self.latest[str(request.session_hash)] = ticket

    def serve(self, folder: Path, names: list[str]) -> dict[str, str]:
        """{name: address} of files of a folder, copied to where the page may read them."""
        served = str(self.studio.out / SERVED)
        return {name: web_html.address(save_file_to_cache(str(folder / name), served)) for name in names}

    def result(self, folder: Path, record: dict[str, Any], again: bool = False) -> str:
        names = [*reversed(record["files"]), f"{record['name']}.json"]
        return web_html.result(record, self.serve(folder, names), again)


def looks() -> dict[str, Any]:
    """Theme, style and script, none of which asks another host for anything."""
    theme = gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="teal", neutral_hue="slate")
    return {"theme": theme, "css_paths": [HERE / "web.css"]}
