"""`fastdit render`: a prompt in; an H.264 clip, a JSON sidecar and a contact sheet out.

A clip is made in three steps that the other commands use too: `Settings.check`, `load`, `generate`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdit.apps.media import Outputs, Problem, contact_sheet, digest, ffmpeg, slug, write_json, write_mp4, write_png

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fastdit import Config


@dataclass(frozen=True)
class Settings:
    """All that decides a clip. height, width: pixels; fps: frames a second; model: a folder or Hub id, None the embedded one."""

    prompt: str
    negative: str = ""
    seed: int = 0
    model: str | None = None
    preset: str = "balanced"
    frames: int = 33
    height: int = 128
    width: int = 128
    steps: int = 20
    guidance: float = 3.0
    fps: int = 8
    device: str = "auto"
    dtype: str = "auto"

    def config(self) -> Config:
        """The preset's configuration. Raises Problem listing the presets."""
        from fastdit import preset

        try:
            return preset(self.preset)
        except ValueError as error:
            raise Problem(str(error), 2) from None

    def check(self) -> None:
        """Everything that can be told without the model. Raises Problem."""
        import math

        self.config()
        if not self.prompt.strip():
            raise Problem('the prompt is empty: say what to draw, such as "a red circle moving right"', 2)
        if self.steps < 1:
            raise Problem(f"--steps must be at least 1, got {self.steps}", 2)
        if not 0 <= self.seed < 2**63:
            raise Problem(f"--seed must be from 0 to 2^63 - 1, got {self.seed}", 2)
        if not 1 <= self.fps <= 240:
            raise Problem(f"--fps must be from 1 to 240, got {self.fps}", 2)
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise Problem(f"--guidance must be a number of at least 0 (1 and below: off), got {self.guidance}", 2)

    def to_dict(self) -> dict[str, Any]:
        """As recorded beside the clip, the preset spelled out."""
        return asdict(self) | {"config": self.config().to_dict()}


@dataclass
class Clip:
    """frames [F, H, W, 3] in [0, 1]; latents as the last step left them; seconds per stage, and of every step."""

    frames: NDArray[np.float32]
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: list[float] = field(default_factory=list)


def resolve(settings: Settings) -> tuple[str, Any]:
    """(device, torch dtype) that "auto" means here. Raises Problem for a device that is not there."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    device, cuda = settings.device, torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device not in ("cpu", "cuda") or settings.dtype not in ("auto", *dtypes):
        raise Problem("--device must be auto, cpu or cuda, and --dtype auto, float32, bfloat16 or float16", 2)
    if device == "cuda" and not cuda:
        raise Problem("--device cuda: PyTorch sees no CUDA GPU here: use --device cpu, or install PyTorch's CUDA build")
    if settings.dtype != "auto":
        return device, dtypes[settings.dtype]
    # The embedded model is so small that half precision saves nothing.
    return device, torch.bfloat16 if device == "cuda" and settings.model else torch.float32


def load(settings: Settings) -> Any:
    """The diffusers pipeline of the settings, on its device, quiet. Raises Problem."""
    from fastdit.apps.models import load as load_pipeline

    device, dtype = resolve(settings)
    return load_pipeline(settings.model, device, dtype)


def generate(pipe: Any, settings: Settings, label: str = "denoising", show: bool = True) -> Clip:
    """Run the pipeline as it is. Raises Problem as soon as a step leaves something that is not finite.

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
            raise Problem(
                f"{label}: step {step + 1} of {settings.steps} gave NaN or infinity: check the model's weights, "
                "or try --dtype float32"
            )
        bar.update()
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
    return Clip(frames, kept["latents"], seconds, [b - a for a, b in zip(marks, marks[1:], strict=False)])


def denoisers(pipe: Any) -> Iterator[nn.Module]:
    """The models that fastdit accelerates in a pipeline."""
    from torch import nn

    from fastdit.api import DENOISERS

    for name in DENOISERS:
        if isinstance(model := getattr(pipe, name, None), nn.Module):
            yield model


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
    """Files `stem` + suffix, none of which replaces another unasked. Raises Problem naming the one in the way."""
    names = [stem + suffix for suffix in suffixes]
    if not overwrite and (there := [folder / name for name in names if (folder / name).exists()]):
        if len(there) == len(names):
            raise Problem(
                f"{there[-1]} exists already, made with these settings: nothing to do (--overwrite makes it again)", 0
            )
        raise Problem(f"{there[0]} is in the way: move it, choose another --out, or say --overwrite")
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
    preset: Annotated[
        str, typer.Option(help="How attention is accelerated; `fastdit presets` lists them.")
    ] = "balanced",
    frames: Annotated[int, typer.Option(help="Number of frames, 4k + 1.")] = 33,
    height: Annotated[int, typer.Option(help="Pixels.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels.")] = 128,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: off.")] = 3.0,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    fps: Annotated[int, typer.Option(help="Frames a second.")] = 8,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also render densely from the same seed, and compare.")
    ] = False,
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
        from fastdit.apps.models import check_shape, dropped_tokens

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
