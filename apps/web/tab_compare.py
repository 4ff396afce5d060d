"""The tab that draws one seed twice, densely and fast, and shows the difference and the time saved."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from fastdit.apps.web import compare_options, html, tab_create
from fastdit.apps.web.page import Page

REPEATS = 2  # runs of each: two dense ones must agree


def build(page: Page) -> list[Any]:
    """Lay out the tab; returns its widgets, in the order of `Knobs`."""
    usual = compare_options.Knobs()
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML(html.note("The clip set up under Create, drawn twice from one seed: densely, and as chosen here."))
            knobs: list[Any] = [
                gr.Dropdown(list(compare_options.POLICY), value=usual.policy, label="Where attention is exact (policy)"),
                gr.Slider(
                    0.03, 1, usual.density, step=0.005, label="Density asked for: share of tile pairs", elem_id="density"
                ),
                gr.Radio(list(compare_options.PRECISIONS), value=usual.precision, label="Precision"),
                gr.Radio(
                    list(compare_options.REMAINDER), value=usual.remainder, label="What stands in for the rest (remainder)"
                ),
                gr.Checkbox(usual.errors, label="Measure each layer's error (costs about 1 % of the time)"),
            ]
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                stop = gr.Button("Stop", variant="stop")
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(html.note("Press Compare: it takes about four times as long as one clip."), elem_id="compared")
    inputs = list(page.inputs.values())

    async def compare(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
        said = dict(zip(page.inputs, values[: len(inputs)], strict=True))
        try:
            custom = compare_options.config(compare_options.Knobs(*values[len(inputs) :]))
        except (ValueError, TypeError) as problem:
            yield html.error(str(problem))
            return
        async with contextlib.aclosing(tab_create.draw(page, said, request, custom, REPEATS)) as states:
            async for state in states:
                yield state

    go.click(
        compare, [*inputs, *knobs], shown, trigger_mode="once", show_progress="hidden", concurrency_limit=None,
        api_visibility="private",
    )  # fmt: skip

    def stopped(request: gr.Request) -> None:
        page.stop(request, "compared")

    stop.click(stopped, None, None, queue=False, api_visibility="private")
    return knobs
