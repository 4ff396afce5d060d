"""`fastdit render`: a prompt in; an H.264 clip, a JSON sidecar and a contact sheet out.

A clip is made by `Settings.check` and `load` of models.py and `generate`; the other commands use these too.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdit.apps.media import Outputs, UserError, contact_sheet, digest, ffmpeg, slug, write_json, write_mp4, write_png
from fastdit.apps.models import Settings, check_shape, denoisers, dropped_tokens, load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass
class Clip:
    """frames [F, H, W, 3] in [0, 1]; latents as the last step left them; seconds per stage, and of every step."""

    frames: NDArray[np.float32]
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: list[float] = field(default_factory=list)


def generate(pipe: Any, settings: Settings, label: str = "denoising", show: bool = True) -> Clip:
    """Run the pipeline as it is. Raises UserError as soon as a step leaves something that is not finite.

    seconds: "text" up to the first call of the denoiser, "denoise" from there to the end of the last step (denoiser,
    guidance and scheduler), "decode" from there to the frames.
    """
    import torch
    from tqdm import tqdm

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
        if step + 1 == settings.steps:
            bar.close()  # or decoding would count as a slow last step
        return tensors

    hooks = [model.register_forward_pre_hook(first_call, prepend=True) for model in denoisers(pipe)]
    start = time.perf_counter()
    try:
        with tqdm(total=settings.steps, desc=label, unit="step", file=sys.stderr, disable=not show) as bar:
            frames = pipe(
                prompt=settings.prompt,
                negative_prompt=settings.negative,
                num_frames=settings.frames,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=torch.Generator().manual_seed(settings.seed),
                callback_on_step_end=step_end,
                output_type="np",
            ).frames[0]
            end = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    seconds = {"text": marks[0] - start, "denoise": marks[-1] - marks[0], "decode": end - marks[-1]}
    return Clip(frames, kept["latents"], seconds, [b - a for a, b in itertools.pairwise(marks)])


def record(settings: Settings, pipe: Any) -> dict[str, Any]:
    """What every sidecar begins with: settings, what ran them."""
    import platform

    import diffusers
    import torch
    import transformers

    import fastdit

    device = str(next(denoisers(pipe)).device)
    versions = {m.__name__: m.__version__ for m in (fastdit, torch, diffusers, transformers)}
    return {
        "settings": settings.to_dict(),
        "versions": versions | {"python": platform.python_version()},
        "pipeline": type(pipe).__name__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": str(next(denoisers(pipe)).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def outputs(folder: Path, stem: str, suffixes: tuple[str, ...], overwrite: bool) -> Iterator[Outputs]:
    """Files `stem` + suffix, none of which replaces another unasked. Raises UserError naming the one in the way."""
    names = [stem + suffix for suffix in suffixes]
    if not overwrite and (there := [folder / name for name in names if (folder / name).exists()]):
        if len(there) == len(names):
            raise UserError(
                f"{there[-1]} exists already, made with these settings: nothing to do (--overwrite makes it again)", 0
            )
        raise UserError(f"{there[0]} is in the way: move it, choose another --out, or say --overwrite")
    with Outputs(folder, *names) as out:
        yield out


def stem_of(settings: Settings, **more: Any) -> str:
    """File name without suffix: the prompt in short, the seed, and a hash of all settings."""
    return f"{slug(settings.prompt)}-s{settings.seed}-{digest(settings.to_dict() | more)}"


def render(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files; made if missing.")] = Path("."),
    seed: Annotated[int, typer.Option(help="Of the noise the clip starts from.")] = 0,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or Hub id of a diffusers pipeline. None: the embedded one."),
    ] = None,
    preset: Annotated[str, typer.Option(help="How attention is accelerated; `fastdit presets` lists them.")] = "balanced",
    frames: Annotated[int, typer.Option(help="Number of frames, 4k + 1.")] = 33,
    height: Annotated[int, typer.Option(help="Pixels.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels.")] = 128,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: off.")] = 3.0,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    fps: Annotated[int, typer.Option(help="Frames a second.")] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="Also render densely from the same seed, and compare.")] = False,
    repeats: Annotated[int, typer.Option(help="With --compare: runs of each, interleaved; the best counts.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Render a clip from a prompt: mp4, JSON sidecar and contact sheet."""
    settings = Settings(
        prompt, negative, seed, model, preset, frames, height, width, steps, guidance, fps, device, dtype
    )  # fmt: skip
    settings.check()
    if compare:
        from fastdit.apps.compare import render_both

        render_both(settings, out, repeats, overwrite)
    else:
        render_one(settings, out, overwrite)


def render_one(settings: Settings, folder: Path, overwrite: bool = False) -> Path:
    """One clip, by the preset. Returns the path of the mp4."""
    stem = stem_of(settings)
    with outputs(folder, stem, (".json", ".png", ".mp4"), overwrite) as out:
        import fastdit

        ffmpeg()
        start = time.perf_counter()
        pipe = load(settings)
        seconds = {"load": time.perf_counter() - start}
        check_shape(pipe, settings.frames, settings.height, settings.width)
        dropped_tokens(pipe, settings.prompt)
        with fastdit.accelerate(pipe, settings.config()):
            clip = generate(pipe, settings)
            report = fastdit.report(pipe)
        start = time.perf_counter()
        facts = record(settings, pipe)
        write_mp4(out[f"{stem}.mp4"], clip.frames, settings.fps, facts["settings"])
        seconds |= clip.seconds | {"encode": time.perf_counter() - start}
        write_png(out[f"{stem}.png"], contact_sheet([(settings.prompt[:80], clip.frames)], 8, 2), facts["settings"])
        facts |= {"seconds": seconds, "step_seconds": clip.step_seconds, "report": report.to_dict()}
        write_json(out[f"{stem}.json"], facts)
        out.publish()
    typer.echo(report)
    typer.echo("  ".join(f"{stage} {taken:.2f} s" for stage, taken in seconds.items()))
    typer.echo(folder / f"{stem}.mp4")
    return folder / f"{stem}.mp4"
