"""The interface for programs: `gradio_client`'s `predict(..., api_name="/generate")` and `/models`.

Its checks and its queue are those of the page.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from fastdit.apps.errors import UserError
from fastdit.apps.render.settings import DEFAULTS
from fastdit.apps.web.page import Page


def build(page: Page) -> None:
    first = next(iter(page.studio.models))

    async def generate(
        request: gr.Request,
        prompt: str,
        negative: str = "",
        model: str = first,
        preset: str = "balanced",
        frames: int = DEFAULTS["frames"],
        height: int = DEFAULTS["height"],
        width: int = DEFAULTS["width"],
        steps: int = DEFAULTS["steps"],
        guidance: float = DEFAULTS["guidance"],
        seed: int = 0,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Draw a clip. state, step, steps and ahead (clips that come first) give the progress; clip and record come last.

        not_understood: words of the prompt that the model does not know.
        """
        said = {
            "prompt": prompt, "negative": negative, "model": model, "preset": preset, "frames": frames, "height": height,
            "width": width, "steps": steps, "guidance": guidance, "seed": seed,
        }  # fmt: skip
        try:
            job = page.studio.job(said)
            unknown = page.studio.unknown_words(model, prompt)
            folder = page.folder(request)
            async with contextlib.aclosing(page.studio.follow(page.key(request), job, folder)) as tickets:
                async for ticket in tickets:
                    if ticket.state == "failed":
                        raise UserError(ticket.error)
                    now = {
                        "not_understood": unknown,
                        "state": ticket.state,
                        "step": ticket.step,
                        "steps": ticket.steps,
                        "ahead": page.studio.ahead(ticket),
                    }
                    made = ticket.record if ticket.over else None
                    clip = None if made is None else _file(await asyncio.to_thread(page.copy, folder, made["file"]))
                    yield now | {"clip": clip, "record": made}
        except UserError as problem:
            raise gr.Error(str(problem), print_exception=False) from None

    def models() -> list[str]:
        """The names that `model` may have."""
        return list(page.studio.models)

    gr.api(generate, api_name="generate", concurrency_limit=None)
    gr.api(models, api_name="models", queue=False)


def _file(path: str) -> dict[str, Any]:
    """The form in which gradio_client expects a file to download."""
    return {"path": path, "orig_name": path.rpartition("/")[2], "meta": {"_type": "gradio.FileData"}}
