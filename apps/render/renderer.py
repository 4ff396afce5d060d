"""Render one clip with a pipeline that stays loaded. The command line, batches and the web page all end here."""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fastdit
from fastdit.apps.errors import UserError
from fastdit.apps.render import forecast
from fastdit.apps.render.draw import Clip
from fastdit.apps.render.generate import generate
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.load import check_shape, defaults, denoisers, dropped_tokens, load, tokens, unknown_words
from fastdit.apps.render.media import contact_sheet, encode, ffmpeg, png, to_uint8
from fastdit.apps.render.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit import Report


@dataclass
class Result:
    """record: what the manifest keeps, as JSON; report: of the run; text: what is printed.

    files: {suffix: content}, the clip itself last: if it was written, all files were.
    """

    record: dict[str, Any]
    report: Report
    files: dict[str, bytes]
    text: str


def machine(pipe: Any) -> dict[str, Any]:
    """Versions, and what the pipeline runs on."""
    import diffusers
    import torch
    import transformers

    device = str(next(denoisers(pipe)).device)
    versions = {m.__name__: m.__version__ for m in (fastdit, torch, diffusers, transformers)}
    return {
        "versions": versions | {"python": platform.python_version()},
        "pipeline": type(pipe).__name__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": str(next(denoisers(pipe)).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


class Renderer:
    """Renders jobs one after another; the pipeline stays loaded as long as the next job needs the same one."""

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.pipe: Any = None
        self._loaded: tuple[Any, ...] | None = None
        self._seconds = 0.0
        self._handle: Any = None
        self._said = ""

    def load(self, settings: Settings) -> Any:
        """The pipeline of the settings."""
        if self._loaded != settings.pipeline:
            self.close()
            start = time.perf_counter()
            self.pipe = load(settings)
            self._loaded, self._seconds = settings.pipeline, time.perf_counter() - start
        return self.pipe

    def accelerate(self, settings: Settings) -> None:
        """Install the settings' configuration, unless the job before had the same: a compiled denoiser then stays compiled."""
        if self._handle is None or self._handle.config != settings.config():
            self._handle = fastdit.accelerate(self.pipe, settings.config())

    def close(self) -> None:
        """Restore the pipeline and release it."""
        self.restore()
        self._loaded = self.pipe = None

    def restore(self) -> None:
        if self._handle is not None:
            self._handle.restore()
        self._handle = None

    def prepare(self, job: Job) -> tuple[Settings, dict[str, Any]]:
        """Load the job's pipeline; returns the complete settings and the beginning of the record. Raises UserError."""
        before = job.settings()
        before.check()
        if before.format == "mp4":
            ffmpeg()
        loaded = self._loaded == before.pipeline
        pipe = self.load(before)
        settings = job.settings(**defaults(pipe)) if before.model else before
        check_shape(pipe, settings.frames, settings.height, settings.width)
        facts = {"job": job.hash, "state": "done", "index": job.index, "where": job.where, "seed": settings.seed}
        facts |= {"settings": settings.to_dict()} | machine(pipe) | {"dropped_tokens": dropped_tokens(pipe, settings.prompt)}
        facts["not_understood"] = unknown_words(pipe, settings.prompt)
        facts["tokens"] = count = tokens(pipe, settings.frames, settings.height, settings.width)
        if count % (parts := settings.ulysses * settings.ring):
            raise UserError(f"{count} tokens cannot be shared by {parts} processes: change the height or width", 2)
        if self.show and (said := forecast.line(pipe, settings)) != self._said:
            self._said = said
            print(said, file=sys.stderr)
        return settings, facts | {"seconds": {"load": 0.0 if loaded else self._seconds}}

    def render(self, job: Job, on_step: Callable[[int, Tensor], None] = lambda step, latents: None) -> Result:
        """Render one job by its configuration. Raises UserError for a mistake of the user, and Stopped if `on_step` does."""
        settings, facts = self.prepare(job)
        self.accelerate(settings)
        clip = generate(self.pipe, settings, show=self.show, on_step=on_step)
        return self._result(clip, settings, fastdit.report(self.pipe), facts)

    def _result(self, clip: Clip, settings: Settings, report: Report, facts: dict[str, Any]) -> Result:
        start = time.perf_counter()
        clip_files = encode(clip.frames, settings.format, settings.fps, settings.crf, facts["settings"])
        sheet = {"-sheet.png": png(contact_sheet([(settings.prompt[:80], clip.frames)], 8, 2), facts["settings"])}
        seconds = clip.seconds | {"encode": time.perf_counter() - start}
        facts |= {
            "seconds": facts["seconds"] | seconds,
            "step_seconds": clip.step_seconds,
            "phases": phases(clip, report),
            "density": report.density,
            "error": max((site.error for site in report.sites if site.error is not None), default=None),
            "frames_sha256": sha256(clip),
        }
        text = f"{report}\n" + "  ".join(f"{stage} {taken:.2f} s" for stage, taken in seconds.items())
        return Result(facts, report, ({} if len(clip.frames) == 1 else sheet) | clip_files, text)


def sha256(clip: Clip) -> str:
    """Hash of the frames with 8 bits a channel, as they are encoded."""
    return hashlib.sha256(to_uint8(clip.frames).tobytes()).hexdigest()


def phases(clip: Clip, report: Report) -> list[dict[str, Any]]:
    """Each phase that the run passed: noise levels, policy, density, error, and seconds of its denoising steps."""
    ran: dict[int, int | None] = {}
    for _, call in report.calls:
        ran.setdefault(call.step, call.phase)
    spent: dict[int | None, float] = {}
    for phase, seconds in zip(ran.values(), clip.step_seconds, strict=False):
        spent[phase] = spent.get(phase, 0.0) + seconds
    names = [i if i < len(report.config.phases) else None for i in range(len(report.phases))]
    return [
        {"sigma": list(p.sigma), "policy": p.policy, "quant": p.quant, "density": p.density, "error": p.error,
         "seconds": spent.get(name, 0.0)}
        for name, p in zip(names, report.phases, strict=True) if p.calls
    ]  # fmt: skip
