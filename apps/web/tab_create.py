"""The first tab: what to draw, the progress, and the clip."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from fastdit import PRESETS, preset
from fastdit.apps.errors import UserError
from fastdit.apps.render.settings import Settings
from fastdit.apps.web import estimate, html, job_list
from fastdit.apps.web.page import Page
from fastdit.apps.web.watching import watch

EXAMPLES = [
    ["a red ball moving right on a checkered floor"], ["a blue cube spinning on a striped floor before a wall"],
    ["a red cube and a blue ball both moving right on a checkered floor"],
]  # fmt: skip
DESCRIPTIONS = {
    "exact": "exact: dense, the model's own result", "balanced": "balanced: faster, close to dense",
    "fast": "fast: faster still, less close", "fps": "fps: for models trained with it",
}  # fmt: skip


def build(page: Page) -> dict[str, Any]:
    """Lay out the tab; returns its settings by name."""
    limits, usual = page.studio.limits, Settings(prompt="x")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=2, placeholder=EXAMPLES[0][0], elem_id="prompt")
            gr.Examples(EXAMPLES, prompt, label="Examples")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            speed = gr.Radio([(DESCRIPTIONS.get(name, name), name) for name in PRESETS], value=usual.preset, label="Preset")
            with gr.Row():
                width = gr.Slider(32, 2048, usual.width, step=16, label="Width", min_width=140, elem_id="width")
                height = gr.Slider(32, 2048, usual.height, step=16, label="Height", min_width=140, elem_id="height")
            frames = gr.Slider(1, limits.frames, usual.frames, step=4, label="Frames", elem_id="frames")
            told = gr.HTML(elem_id="told")
            with gr.Row():
                steps = gr.Slider(1, limits.steps, usual.steps, step=1, label="Steps", min_width=140, elem_id="steps")
                guidance = gr.Slider(0, 20, usual.guidance, step=0.5, label="Guidance", min_width=140)
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, elem_id="seed", min_width=140)
                die = gr.Button("⚄ New seed", elem_id="die", min_width=140)
            with gr.Accordion("More", open=False):
                negative = gr.Textbox(label="Negative prompt", lines=1)
                model = gr.Dropdown(list(page.studio.models), value=next(iter(page.studio.models)), label="Model")
                image = gr.File(
                    label=f"Start picture, for image-to-video models (up to {limits.upload_mb} MB)",
                    file_types=[".png", ".jpg", ".jpeg", ".webp"], type="filepath", height=120,
                )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(html.note("Say what to draw and press Generate."), elem_id="result")
            jobs = gr.Column()
    inputs = {
        "prompt": prompt, "negative": negative, "model": model, "preset": speed, "frames": frames, "height": height,
        "width": width, "steps": steps, "guidance": guidance, "seed": seed, "image": image,
    }  # fmt: skip

    async def clicked(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(draw(page, dict(zip(inputs, values, strict=True)), request)) as states:
            async for state in states:
                yield state

    event = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    gr.on([go.click, prompt.submit], clicked, list(inputs.values()), shown, trigger_mode="multiple", **event)

    def stopped(request: gr.Request) -> None:
        page.stop(request, "result")

    stop.click(stopped, None, None, queue=False, api_visibility="private")
    with jobs:
        job_list.build(page, shown, inputs)
    die.click(lambda: random.randrange(2**31), None, seed, queue=False, api_visibility="private")

    def tell(*values: Any) -> str:
        return estimate_line(page, *values)

    sizes: list[Any] = [prompt, model, speed, frames, height, width, steps]
    gr.on(
        [page.blocks.load, *(each.change for each in sizes)], tell, sizes, told, queue=False, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last",
    )  # fmt: skip
    return inputs


async def draw(
    page: Page, said: dict[str, Any], request: gr.Request, custom: Any = None, repeats: int = 0
) -> AsyncGenerator[Any, None]:
    """Draw a clip and yield HTML: the progress, then the clip, or an error. The clip goes on if nobody reads this."""
    try:
        job = page.studio.job(said, custom, repeats)
        ticket = page.studio.submit(page.key(request), job, page.folder(request), said)
    except UserError as problem:
        yield html.error(str(problem))
        return
    async with contextlib.aclosing(watch(page, ticket, request, "compared" if repeats else "result")) as states:
        async for state in states:
            yield state


def estimate_line(page: Page, prompt: str, model: str, name: str, frames: int, height: int, width: int, steps: int) -> str:
    """Words of the prompt that the model does not know, the number of tokens, and about how much faster the preset is."""
    unknown = page.studio.unknown_words(model, prompt or "")
    told = html.error(f"not understood: {', '.join(unknown)}") if unknown else ""
    return told + _size_line(page, page.studio.models.get(model), name, frames, height, width, steps)


def _size_line(page: Page, source: str | None, name: str, frames: int, height: int, width: int, steps: int) -> str:
    known = page.studio.facts.get(source)
    if known is None:
        return html.note("How many tokens that is will be told when the model is loaded.")
    try:
        asked = Settings(prompt="x", frames=int(frames), height=int(height), width=int(width), steps=int(steps))
        page.studio.limits.check(asked)
        found = estimate.predict(known, preset(name), asked.frames, asked.height, asked.width, asked.steps)
    except UserError as problem:
        return html.error(str(problem))
    except (ValueError, TypeError):
        return html.note("That is no clip: it needs a frame, a pixel and a step.")
    line = f"{found.tokens:,} tokens ({' × '.join(map(str, found.grid))})"
    if found.why is not None:
        return html.note(f"{line}. Drawn densely: {found.why}." if found.density == 1 else f"{line}: {found.why}.")
    return html.note(f"{line}. Density {found.density:.2f}: about {found.ratio:.1f} × as fast as dense (predicted).")
