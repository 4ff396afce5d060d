"""One run of a pipeline, as the settings of a clip say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.draw import Clip, draw
from fastdit.apps.render.paths import local
from fastdit.apps.render.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from torch import Tensor


class Stopped(Exception):  # noqa: N818, as StopIteration
    """The run was stopped on request before the clip was finished."""


def generate(
    pipe: Any,
    settings: Settings,
    label: str = "denoising",
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> Clip:
    """Run the pipeline as it is, as its settings say. See `draw`."""
    return draw(pipe, arguments(pipe, settings), label, show, on_step)


def arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises UserError for a setting that the pipeline does not take."""
    import torch

    takes = inspect.signature(pipe.__call__).parameters
    call = {about.alias or name: getattr(settings, name) for name, about in SETTINGS.items() if about.argument}
    # on the CPU, so that a seed means the same on every device
    call["generator"] = torch.Generator().manual_seed(settings.seed)
    for name, said in (("negative_prompt", settings.negative), ("image", settings.image)):
        if said and name not in takes:
            raise UserError(f"{type(pipe).__name__} takes no {name}: leave it out")
    if settings.image:
        from diffusers.utils import load_image

        try:
            call["image"] = load_image(str(local(settings.image))).resize((settings.width, settings.height))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {settings.image} ({error})") from None
    return {name: value for name, value in call.items() if name in takes}
