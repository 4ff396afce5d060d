"""The tab that draws one seed twice, densely and fast, and shows what the difference is and what it saved."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import gradio as gr

from fastdit.apps.web import compare_options, html, tab_create

if TYPE_CHECKING:
    from fastdit.apps.web.page import Page

REPEATS = 2  # runs of each: two dense ones must agree
STAGES = (("text", "Text", "#0072b2"), ("denoise", "Denoising", "#009e73"), ("decode", "Decoding", "#e69f00"))
"""Okabe and Ito's colours, which the colour-blind tell apart."""


def build(page: Page) -> list[Any]:
    """Lay out the tab and return its knobs, in the order of `Knobs`."""
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
    stop.click(page.stop, None, None, queue=False, api_visibility="private")
    return knobs


def result(record: dict[str, Any], urls: dict[str, str]) -> str:
    """Two players in step with each other, the difference, and the numbers. urls: of the record's files, by name."""
    settings = record["settings"]
    dense = next((url for name, url in urls.items() if "-dense." in name), urls[record["file"]])
    fps, frames = settings["fps"], settings["frames"]
    moving = frames > 1 and record["file"].endswith(".mp4")
    controls = (
        '<button type="button" class="play" data-act="play">Pause</button>'
        f'<label>Frame <input type="range" data-act="scrub" min="0" max="{frames - 1}" value="0" step="1"></label>'
        if moving
        else ""
    )
    return (
        f'<div class="pair" data-fps="{fps}" data-frames="{frames}"><div class="sides">'
        f"<figure>{_side(dense, 'dense', moving)}<figcaption>Dense</figcaption></figure>"
        f"<figure>{_side(urls[record['file']], 'fast', moving)}<figcaption>Fast</figcaption></figure>"
        f'<figure><canvas class="clip" data-side="difference" role="img" aria-label="Difference of the two"></canvas>'
        "<figcaption>Difference, brightened</figcaption></figure></div>"
        f'<div class="controls">{controls}<label>Brighten difference '
        '<input type="range" data-act="gain" min="1" max="20" value="4" step="1"></label></div>'
        f"{bars(record)}{html.table(numbers(record))}{html.downloads(urls)}</div>"
    )


def _side(url: str, side: str, moving: bool) -> str:
    return html.clip(url, side, side).replace(" controls", "") if moving else html.clip(url, side, side)


def numbers(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Closeness, density, error and speed, in words."""
    said = [("Speed", f"{record['ratio']:.2f} × ({record['dense_s']:.2f} s and {record['fast_s']:.2f} s of denoising)")]
    if (why := record.get("stayed_dense")) is not None:
        said.append(("No sparse attention", why))
    psnr, flicker = record["psnr_db"], record.get("flicker_db")
    said += [
        ("PSNR", "identical" if psnr is None else f"{psnr:.1f} dB"),
        ("SSIM", f"{record['ssim']:.4f}"),
        ("Flicker", "same changes from frame to frame" if flicker is None else f"{flicker:.1f} dB between changes of frames"),
        ("Density", f"{record['density']:.3f} of all pairs, all steps and layers"),
    ]
    if (worst := max((row["error"] for row in record["velocity_error"]), default=None)) is not None:
        said.append(("Error", f"{worst:.1%} of the velocity, worst phase"))
    if record.get("error") is not None:
        said.append(("Worst layer", f"{record['error']:.1%} of attention's output"))
    return [*said, ("Seed", str(record["seed"])), ("Tokens", f"{record['tokens']:,}")]


def bars(record: dict[str, Any]) -> str:
    """Seconds of each stage, one bar for dense and one for fast, on one scale; denoising: the best of the runs."""
    stages = {
        "Dense": record.get("dense_stages", {}) | {"denoise": record["dense_s"]},
        "Fast": record["seconds"] | {"denoise": record["fast_s"]},
    }
    most = max(sum(spent.get(key, 0.0) for key, _, _ in STAGES) for spent in stages.values()) or 1.0
    rows = ""
    for name, spent in stages.items():
        total = sum(spent.get(key, 0.0) for key, _, _ in STAGES)
        parts = "".join(
            f'<span style="width:{100 * spent.get(key, 0.0) / most:.2f}%;background:{colour}" '
            f'title="{label} {spent.get(key, 0.0):.2f} s"></span>'
            for key, label, colour in STAGES
        )
        rows += f'<div class="stage"><span class="name">{name}</span><span class="track">{parts}</span>{total:.2f} s</div>'
    legend = "".join(f'<span><i style="background:{colour}"></i>{label}</span>' for _, label, colour in STAGES)
    return f'<div class="stages" role="img" aria-label="Seconds of each stage">{rows}<div class="legend">{legend}</div></div>'
