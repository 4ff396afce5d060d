"""`render --compare`: render one seed densely and fast, put both on one sheet, and say in words what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastdit.apps.compare.measure import measure
from fastdit.apps.compare.metrics import flicker
from fastdit.apps.compare.timed import Comparison
from fastdit.apps.render.draw import Clip
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.media import contact_sheet, encode, png
from fastdit.apps.render.renderer import Renderer, Result, phases, sha256
from fastdit.apps.render.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


def describe(settings: Settings, found: Comparison, name: str, repeats: int) -> str:
    """The text that is printed: time, closeness, and the error of each phase."""
    variant = found.variants[name]
    ratio = found.dense_seconds / variant.seconds
    runs = "one run of each" if repeats == 1 else f"best of {repeats} interleaved runs"
    shape = f"{settings.frames}x{settings.height}x{settings.width}, {found.tokens} tokens, {settings.steps} steps"
    lines = [
        f"denoising loop ({shape}; {runs}; without text encoding, decoding and writing):",
        f"  dense {found.dense_seconds:.2f} s, by stock diffusers with {found.kernel}",
        f"  {name} {variant.seconds:.2f} s: {ratio:.2f} x",
        f"density {variant.report.density:.3f}   decoded frames against dense: "
        + ("identical" if math.isinf(variant.psnr) else f"PSNR {variant.psnr:.1f} dB, SSIM {variant.ssim:.4f}"),
        "teacher-forced velocity error (relative L2):",
    ]
    for row in variant.velocity:
        lines.append(
            f"  noise level {row['sigma'][0]:g} … {row['sigma'][1]:g}, {row['policy']}: "
            f"{row['error']:.2e} ({row['steps']} steps)"
        )
    if (why := variant.dense_because) is not None:
        lines.append(f"no sparse attention ran: {why}")
    elif ratio < 1:
        lines.append(f"{name} was slower than dense here: use --preset exact, or render something larger")
    return "\n".join(lines)


def _flicker(fast: Clip, dense: Clip) -> float | None:
    """In dB; None for equal clips and for a single frame."""
    found = flicker(torch.from_numpy(fast.frames), torch.from_numpy(dense.frames))
    return found if found is not None and math.isfinite(found) else None


def both(renderer: Renderer, job: Job, on_step: Callable[[int, Tensor], None] = lambda step, latents: None) -> Result:
    """Render a job densely and by its configuration, and compare. on_step: as in `measure`. Raises as `Renderer.render`."""
    settings, facts = renderer.prepare(job)
    renderer.restore()
    name = "custom" if settings.custom else settings.preset
    found = measure(renderer.pipe, settings, {name: settings.config()}, job.repeats, renderer.show, on_step)
    variant = found.variants[name]
    start = time.perf_counter()
    said = facts["settings"]
    plain = said | {"preset": "dense", "config": None}
    dense = encode(found.dense.clip.frames, settings.format, settings.fps, settings.crf, plain)
    fast = encode(variant.clip.frames, settings.format, settings.fps, settings.crf, said)
    sheet = png(contact_sheet([("dense", found.dense.clip.frames), (name, variant.clip.frames)]), said)
    facts |= {
        "kernel": found.kernel,
        "tokens": found.tokens,
        "repeats": job.repeats,
        "seconds": facts["seconds"] | variant.clip.seconds | {"encode": time.perf_counter() - start},
        "phases": phases(variant.clip, variant.report),
        "dense_s": found.dense_seconds,
        "dense_stages": found.dense.clip.seconds,
        "flicker_db": _flicker(variant.clip, found.dense.clip),
        "error": max((site.error for site in variant.report.sites if site.error is not None), default=None),
        "frames_sha256": sha256(variant.clip),
        "dense_sha256": sha256(found.dense.clip),
    }
    facts |= variant.to_dict(found.dense_seconds)
    files = {"-sheet.png": sheet} | {f"-dense{suffix}": content for suffix, content in dense.items()} | fast
    return Result(facts, variant.report, files, describe(settings, found, name, job.repeats))
