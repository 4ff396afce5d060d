"""`fastdit render --compare`: both clips, one sheet with dense above, one sidecar, and in words what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer

from fastdit.apps.measure import Comparison, measure
from fastdit.apps.media import Outputs, UserError, contact_sheet, ffmpeg, write_json, write_mp4, write_png
from fastdit.apps.models import Settings, check_shape, dropped_tokens, load
from fastdit.apps.render import outputs, record, stem_of


def describe(settings: Settings, found: Comparison, name: str, repeats: int) -> str:
    """What is printed: time, closeness, and the error of each phase, in plain sentences."""
    variant = found.variants[name]
    ratio = found.dense_seconds / variant.seconds
    shape = f"{settings.frames}x{settings.height}x{settings.width}, {found.tokens} tokens, {settings.steps} steps"
    lines = [
        f"denoising loop ({shape}; best of {repeats} interleaved runs; without text encoding, decoding and writing):",
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


def render_both(settings: Settings, folder: Path, repeats: int = 2, overwrite: bool = False) -> None:
    """Render densely and by the preset, write both clips, one sheet and one sidecar, and print the comparison."""
    if repeats < 2:
        raise UserError(f"--repeats must be at least 2 (two dense runs must agree), got {repeats}", 2)
    name = settings.preset
    stem = stem_of(settings, compare=True, repeats=repeats)
    with outputs(folder, stem, ("-compare.json", "-compare.png", "-dense.mp4", f"-{name}.mp4"), overwrite) as out:
        ffmpeg()
        pipe = load(settings)
        check_shape(pipe, settings.frames, settings.height, settings.width)
        dropped_tokens(pipe, settings.prompt)
        found = measure(pipe, settings, {name: settings.config()}, repeats)
        _write(out, stem, settings, found, repeats, record(settings, pipe))
        out.publish()
    typer.echo(describe(settings, found, name, repeats))
    for written in out.names:
        typer.echo(folder / written)


def _write(out: Outputs, stem: str, settings: Settings, found: Comparison, repeats: int, facts: dict[str, Any]) -> None:
    name = settings.preset
    variant = found.variants[name]
    said = facts["settings"]
    write_mp4(out[f"{stem}-dense.mp4"], found.dense.frames, settings.fps, said | {"preset": "dense", "config": None})
    write_mp4(out[f"{stem}-{name}.mp4"], variant.clip.frames, settings.fps, said)
    rows = [("dense", found.dense.frames), (name, variant.clip.frames)]
    write_png(out[f"{stem}-compare.png"], contact_sheet(rows), said)
    facts |= {"kernel": found.kernel, "tokens": found.tokens, "repeats": repeats, "dense_s": found.dense_seconds}
    facts |= variant.to_dict(found.dense_seconds) | {"report": variant.report.to_dict()}
    write_json(out[f"{stem}-compare.json"], facts)
