"""The tab that looks inside: the tiles that a policy keeps, what its heads lose, and what the last run did."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr
import torch

from fastdit.apps.cli import show
from fastdit.apps.errors import UserError
from fastdit.apps.render.settings import Settings
from fastdit.apps.tiny.attention import add_noise, clean_latents, recorded_attention
from fastdit.apps.web import compare_options, html
from fastdit.apps.web.page import Page
from fastdit.config import TILE
from fastdit.core.layout import Grid, Layout
from fastdit.pipelines import embedded
from fastdit.policies import POLICIES
from fastdit.reporting.head_profile import retained, tile_mass
from fastdit.reporting.heatmap import colour

POLICY = [*compare_options.POLICY, "union", "intersect"]
MOST = 10_000
"""Most tokens for which the embedded model's attention is computed: its masses cost O(N²)."""
MOST_TILES = 2048
"""Most tiles for which a map is drawn, with a point for each pair: about two seconds and 300 MB."""
WHAT = {"Density": "density", "Error": "error", "Time": "seconds"}


def build(page: Page) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML("<h2>What a policy keeps</h2>" + html.note("On the grid of the clip set up under Create."))
            policy = gr.Dropdown(POLICY, value="window", label="Policy", elem_id="policy")
            density = gr.Slider(0.03, 1, 0.125, step=0.005, label="Density (where the policy has one)")
            sigma = gr.Slider(0.05, 1, 0.6, step=0.05, label="Noise level of the attention that is looked at")
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            kept = gr.HTML(elem_id="kept")
        with gr.Column(min_width=300):
            gr.HTML("<h2>What the last run did</h2>" + html.note("By step and layer, of the last clip drawn in this tab."))
            what = gr.Radio(list(WHAT), value="Density", label="Show")
            look = gr.Button("Show the last run", elem_id="look")
            ran = gr.HTML(elem_id="ran")
    sizes = [page.inputs[name] for name in ("model", "frames", "height", "width")]

    async def picture(
        request: gr.Request, model: str, frames: int, height: int, width: int, name: str, share: float, level: float
    ) -> AsyncGenerator[str, None]:
        known = page.studio.facts.get(page.studio.models.get(model))
        if known is None:
            yield html.error("Draw a clip with this model first: its grid is not known yet.")
            return
        try:
            asked = Settings(prompt="x", frames=int(frames), height=int(height), width=int(width))
            page.studio.limits.check(asked)
            grid = known.grid(asked.frames, asked.height, asked.width)
            if name not in POLICY or min(grid) < 1:
                raise UserError(f"unknown policy, or an empty grid: {name}, {grid}")
            found, ahead = page.studio.call(page.key(request), lambda: tile_map(name, share, grid, level))
            if ahead:
                yield html.note(f"Waiting for its turn: {ahead} come first.")
            yield await asyncio.wrap_future(found)
        except (UserError, ValueError, TypeError) as problem:
            yield html.error(str(problem))

    def heat(request: gr.Request, choice: str) -> str:
        ticket = page.latest.get(str(request.session_hash))
        if ticket is None:
            return html.error("Nothing was drawn yet in this tab of the browser: press Generate or Compare first.")
        return last_run(ticket.report, choice)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # without Gradio's limit: the studio's queue has one thread, and refuses with a sentence when it is full
    draw.click(picture, [*sizes, policy, density, sigma], kept, concurrency_limit=None, trigger_mode="once", **quiet)
    gr.on([look.click, what.change], heat, what, ran, queue=False, **quiet)


def tile_map(name: str, density: float, grid: Grid, sigma: float) -> str:
    """Picture and legend of the kept tiles, and the attention mass that each head of the embedded model retains in them."""
    t, h, w = (min(side, most) for side, most in zip(TILE, grid, strict=True))
    layout = Layout(grid, (t, h, w))
    if layout.video_tiles > MOST_TILES:
        raise ValueError(
            f"a map of {layout.video_tiles:,}² pairs of tiles is too large: choose a clip of at most {MOST_TILES:,} tiles"
        )
    fields = getattr(POLICIES[name], "__dataclass_fields__", {})
    policy = show.make(name, [f"density={density}"] if "density" in fields else [])
    if layout.video_len > MOST and not policy.static:
        raise ValueError(f"{name} looks at attention itself: choose a clip of at most {MOST:,} tokens under Create")
    image, found = show.draw(policy, layout, sigma)
    picture = (
        f'<figure><img class="map" alt="Tiles kept by {html.text(policy)}" src="{html.data_url(image, "PNG")}">'
        f"<figcaption>{html.text(policy)}: {found:.1%} of {layout.video_tiles:,}² pairs of tiles of "
        f"{' × '.join(map(str, layout.tile))} tokens. Query tiles run down and key tiles to the right, both in order of time. "
        f"{legend('no head', 'all heads')}</figcaption></figure>"
    )
    if layout.video_len > MOST:
        return picture + html.note(f"Retained mass is shown for clips of at most {MOST:,} tokens.")
    return picture + heads(policy, layout, sigma)


def heads(policy: Any, layout: Layout, sigma: float) -> str:
    """A table, layer by head, of the share of the embedded model's attention that lies in the kept tiles."""
    t, h, w = layout.grid
    rows = ""
    with torch.no_grad():
        pipe = embedded.load()
        inputs = add_noise(*clean_latents(pipe, 1, ((t - 1) * 4 + 1, h * 8, w * 8)), sigma, 0)
        calls = recorded_attention(pipe, inputs, layout.tile)
        for layer, (q, k, v) in enumerate(calls):
            kept = policy.select(layout, *(() if policy.static else (q, k, v)[: len(policy.reads)]))
            shares = retained(tile_mass(q, k, layout), kept.float(), layout)[0].tolist()
            rows += f'<tr><th scope="row">Layer {layer}</th>{"".join(map(_cell, shares))}</tr>'
    top = "".join(f'<th scope="col">Head {head}</th>' for head in range(calls[0][0].shape[1]))
    return (
        '<table class="heads"><caption>Mass of attention in the kept tiles, embedded model, one clip at noise level '
        f"{sigma:g} {legend('0', '1')}</caption><tr><td></td>{top}</tr>{rows}</table>"
    )


def _cell(share: float) -> str:
    red, green, blue = colour(share)
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "#fff"
    return f'<td style="background:rgb({red},{green},{blue});color:{ink}">{share:.2f}</td>'


def legend(low: str, high: str) -> str:
    """The colour scale (viridis) of these pictures, from dark to light."""
    stops = ",".join("rgb({},{},{})".format(*colour(i / 8)) for i in range(9))
    return f'<span class="scale">{low} <i style="background:linear-gradient(to right,{stops})"></i> {high}</span>'


def last_run(report: Any, choice: str) -> str:
    """The heat map of a run, or an error that says why there is none."""
    if choice not in WHAT:
        return html.error("Choose density, error or time.")
    what = WHAT[choice]
    values = [value for _, call in report.calls if (value := getattr(call, what)) is not None]
    if not values:
        return html.error("No error was measured in that run: tick “Measure each layer's error” under Compare, and run it.")
    unit = " s" if what == "seconds" else ""
    mean = math.fsum(values) / len(values)
    return (
        f'<figure><img class="map" alt="{choice} by step and layer" src="{html.data_url(report.heatmap(what), "PNG")}">'
        f"<figcaption>{choice} of {len(values):,} calls: mean {mean:.3g}{unit}, largest {max(values):.3g}{unit}. "
        f"Over all calls the density was {report.density:.3f}.</figcaption></figure>"
    )
