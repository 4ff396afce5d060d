"""One run of a pipeline, called as its user would call it: its frames, and how long each stage took."""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.load import denoisers
from fastdit.apps.render.paths import local
from fastdit.apps.render.settings import SETTINGS, Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Stopped(Exception):  # noqa: N818, as StopIteration
    """The run was stopped on request before the clip was finished."""


@dataclass
class Clip:
    """frames [F, H, W, 3] in [0, 1]; latents after the last step; seconds of each stage; seconds of each step."""

    frames: NDArray[np.float32]
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: list[float] = field(default_factory=list)


def generate(
    pipe: Any,
    settings: Settings,
    label: str = "denoising",
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> Clip:
    """Run the pipeline as it is. Raises UserError as soon as a step gives NaN or infinity.

    on_step: called after each step with its number, from 1, and its latents; an exception from it ends the run. The clip's
    seconds: "text" until the first call of the denoiser, "denoise" until the end of the last step (denoiser, guidance and
    scheduler), "decode" until the frames are there.
    """
    import torch
    from tqdm import tqdm

    call = arguments(pipe, settings)
    marks: list[float] = []
    kept: dict[str, Tensor] = {}

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def first_call(*_: Any) -> None:
        if not marks:
            mark()

    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mark()
        kept["latents"] = tensors["latents"]
        if not bool(kept["latents"].isfinite().all()):
            raise UserError(
                f"{label}: step {step + 1} of {settings.steps} gave NaN or infinity: check the model's weights, "
                "or try --dtype float32"
            )
        bar.update()
        on_step(step + 1, kept["latents"])
        if step + 1 == settings.steps:
            bar.close()  # otherwise decoding would count as a slow last step
        return tensors

    hooks = [model.register_forward_pre_hook(first_call, prepend=True) for model in denoisers(pipe)]
    hidden = None if show else True  # None: hidden where there is no terminal
    start = time.perf_counter()
    try:
        with tqdm(total=settings.steps, desc=label, unit="step", file=sys.stderr, disable=hidden, leave=None) as bar:
            made = pipe(**call, callback_on_step_end=step_end, output_type="np")
            frames = made.frames[0] if hasattr(made, "frames") else made.images[:1]
            end = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    seconds = {"text": marks[0] - start, "denoise": marks[-1] - marks[0], "decode": end - marks[-1]}
    return Clip(frames, kept["latents"], seconds, [b - a for a, b in itertools.pairwise(marks)])


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
