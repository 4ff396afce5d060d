"""The layout of the page: its tabs, theme, style and script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from fastdit.apps.web import api, tab_compare, tab_create, tab_gallery, tab_inspect
from fastdit.apps.web.page import Page

HERE = Path(__file__).parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]


def build(page: Page) -> gr.Blocks:
    """Put the tabs and the interface for programs on the page."""
    with page.blocks:
        gr.HTML("<header><h1>fastdit</h1><p>Text to video, dense and fast side by side</p></header>", elem_id="head")
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
    theme = gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="teal", neutral_hue="slate")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {"theme": theme, "css_paths": [HERE / "page.css"], "head": f"<script>{script}</script>"}
