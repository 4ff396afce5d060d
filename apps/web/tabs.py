"""The layout of the page: its tabs, theme, style and script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from fastdit.apps.web import api, look, tab_compare, tab_create, tab_gallery, tab_inspect
from fastdit.apps.web.page import Page

HERE = Path(__file__).parent


def build(page: Page) -> gr.Blocks:
    """Put the tabs and the interface for programs on the page."""
    with page.blocks:
        logo = (HERE / "favicon.svg").read_text(encoding="utf-8").replace("<svg ", '<svg aria-hidden="true" ')
        gr.HTML(f"<header>{logo}<h1>fastdit</h1><p>Faster video from the model that you have</p></header>", elem_id="head")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                page.inputs = tab_create.build(page)
            with gr.Tab("Compare", id="compare"):
                page.knobs = tab_compare.build(page)
            with gr.Tab("Look inside", id="inside"):
                tab_inspect.build(page)
            with gr.Tab("Gallery", id="gallery") as tab:
                tab_gallery.build(page, tabs, tab)
        api.build(page)
        page.blocks.unload(page.gone)
    return page.blocks


def looks() -> dict[str, Any]:
    """Theme, style and script; none of them loads anything from another host."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {
        "theme": look.theme(),
        "css_paths": [HERE / "page.css"],
        "head": f"<script>{script}</script>",
        "favicon_path": HERE / "favicon.svg",
        "footer_links": [],
    }
