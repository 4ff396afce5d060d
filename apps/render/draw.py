"""One timed run of any pipeline, with the arguments of its own call."""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.load import denoisers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

RESULTS = ("frames", "images", "videos", "image")
"""Names under which pipelines return what they drew."""


@dataclass
class Clip:
    """clips [B, F, H, W, 3] in [0, 1], None if latents were asked for (a picture has one frame); latents after the last step,
    None of a pipeline that does not show them; seconds of each stage; seconds of each step."""

    clips: NDArray[np.float32] | None
    latents: Tensor | None
    seconds: dict[str, float]
    step_seconds: list[float] = field(default_factory=list)

    @property
    def frames(self) -> NDArray[np.float32]:
        """[F, H, W, 3] of the first clip."""
        assert self.clips is not None
        return self.clips[0]

    @property
    def all_frames(self) -> NDArray[np.float32]:
        """[B·F, H, W, 3]: of all clips, one after another."""
        assert self.clips is not None
        return self.clips.reshape(-1, *self.clips.shape[2:])


def parameters(pipe: Any) -> dict[str, Any]:
    """{name: default} of the arguments that a pipeline's call takes, with those that a subclass hands on as `**kwargs`; of a
    modular pipeline, its blocks' inputs."""
    if (blocks := getattr(pipe, "blocks", None)) is not None and hasattr(blocks, "inputs"):
        return {each.name: each.default for each in blocks.inputs if each.name is not None}
    found: dict[str, Any] = {}
    for call in (vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)):
        named = list(inspect.signature(call).parameters.values())[1:]
        found = {each.name: each.default for each in named if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)} | found
        if all(each.kind is not each.VAR_KEYWORD for each in named):
            break
    return found


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    label: str = "denoising",
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
    latents: bool = False,
) -> Clip:
    """Call the pipeline as it is. Raises UserError as soon as a step gives NaN or infinity.

    on_step: called after each step with its number, from 1, and its latents; an exception from it ends the run. latents: do not
    decode. The clip's seconds: "text" until the first call of the denoiser, "denoise" until the end of the last step (denoiser,
    guidance and scheduler), "decode" until the frames are there. A pipeline without `callback_on_step_end` shows no steps: its
    "denoise" ends with the denoiser's last call, and `on_step` is not called.
    """
    import torch
    from tqdm import tqdm

    takes = parameters(pipe)
    steps = call.get("num_inference_steps", takes.get("num_inference_steps"))
    steps = steps if isinstance(steps, int) else None
    marks: list[float] = []
    kept: dict[str, Tensor] = {}
    own = call.get("callback_on_step_end")

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def first_call(*_: Any) -> None:
        if not marks:
            mark()

    def call_end(*_: Any) -> None:
        mark()
        bar.update()

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mark()
        if own is not None:
            tensors = own(pipe, step, timestep, tensors) or tensors
        kept["latents"] = tensors["latents"]
        if not bool(kept["latents"].isfinite().all()):
            of = "" if steps is None else f" of {steps}"
            raise UserError(
                f"{label}: step {step + 1}{of} gave NaN or infinity: check the model's weights, or try --dtype float32"
            )
        bar.update()
        on_step(step + 1, kept["latents"])
        if step + 1 == steps:
            bar.close()  # otherwise decoding would count as a slow last step
        return tensors

    more: dict[str, Any] = {"output_type": "latent" if latents else "np"} if "output_type" in takes else {}
    hooks = [model.register_forward_pre_hook(first_call, prepend=True) for model in denoisers(pipe)]
    if told := "callback_on_step_end" in takes:
        more["callback_on_step_end"] = step_end
        if "latents" not in (asked := call.get("callback_on_step_end_tensor_inputs", ["latents"])):
            more["callback_on_step_end_tensor_inputs"] = ["latents", *asked]
    else:
        hooks += [model.register_forward_hook(call_end) for model in denoisers(pipe)]
    hidden = None if show else True  # None: hidden where there is no terminal
    start = time.perf_counter()
    try:
        with tqdm(total=steps if told else None, desc=label, unit="step", file=sys.stderr, disable=hidden, leave=None) as bar:
            made = _drawn(pipe(**{**call, **more}))
            if isinstance(made, torch.Tensor):  # not decoded
                kept.setdefault("latents", made)
            clips = None if latents else clips_of(made)
            end = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    if len(marks) < 2:
        raise UserError(f"{type(pipe).__name__} was called with these arguments, and did not call its denoiser")
    seconds = {"text": marks[0] - start, "denoise": marks[-1] - marks[0], "decode": end - marks[-1]}
    return Clip(clips, kept.get("latents"), seconds, [b - a for a, b in itertools.pairwise(marks)] if told else [])


def _drawn(made: Any) -> Any:
    """What a pipeline drew, out of whatever it returns. Raises UserError for an output without a picture."""
    get = made.get if hasattr(made, "get") else lambda name: getattr(made, name, None)
    found = next((value for name in RESULTS if (value := get(name)) is not None), None)
    if found is None:
        raise UserError(f"the pipeline returned a {type(made).__name__} without {', '.join(RESULTS)}: nothing to compare")
    return found


def clips_of(made: Any) -> NDArray[np.float32]:
    """Pictures [B, H, W, C] or videos [B, F, H, W, C] of a pipeline, arrays or nested lists of pictures -> [B, F, H, W, 3]."""
    import numpy as np

    found = np.asarray(made) if not isinstance(made, list) else np.stack([np.asarray(each) for each in made])
    if not np.issubdtype(found.dtype, np.floating):
        found = found / np.float32(np.iinfo(found.dtype).max)
    if found.ndim == 4:
        found = found[:, None]
    if found.ndim != 5:
        raise UserError(f"the pipeline drew something of shape {found.shape}, which is neither pictures nor videos")
    found = found.astype(np.float32, copy=False)
    return np.repeat(found, 3, -1) if found.shape[-1] == 1 else found[..., :3]
