"""The command `fastdit compare`: a pipeline, dense against presets; or clips that are there, two by two."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.cli.options import with_settings
from fastdit.apps.compare.files import compare_files
from fastdit.apps.errors import UserError
from fastdit.apps.render import jobs

DRAWN_ONCE = ("preset", "fps", "format", "crf", "ulysses", "ring")
"""Settings of a clip that a comparison does not take, or takes several times."""
COMPARED = ("balanced", "fast")
RESULT = "compare.json"


@functools.partial(with_settings, without=DRAWN_ONCE)
def compare(
    first: Annotated[
        Path | None, typer.Argument(help="A clip, or a folder of clips: the reference.", show_default=False)
    ] = None,
    second: Annotated[
        Path | None, typer.Argument(help="A clip, or a folder with clips of the same names.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the numbers and pictures: JSON, a sheet, a plot; of files also a video."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given again.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts, as of render.")] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="What to compare with dense; may be given again.", show_default=" ".join(COMPARED))
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="The same, from a file of a fastdit.Config or a profile.", show_default=False)
    ] = None,
    *,
    repeats: Annotated[int, typer.Option(help="Timed runs of each, interleaved.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, and nothing else: of files a line for each pair.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name in --out.")] = False,
    **settings: Any,
) -> int:
    """Compare presets with dense attention on a pipeline; or two clips, or two folders of clips.

    With --prompt or --prompts: draws densely and by each --preset and --config from equal noise, and says what each wins and
    loses: a verdict, then a table. Ctrl-C keeps what was measured.

    With FIRST and SECOND: PSNR, SSIM, MS-SSIM, flicker and pictures of their difference.
    """
    if first is not None:
        if second is None:
            raise UserError(f"{first} alone: give two clips or two folders, or say what to draw with --prompt", 2)
        if prompt or prompts or preset or config:
            raise UserError(
                "FIRST and SECOND are compared as they are: leave out --prompt, --prompts, --preset and --config", 2
            )
        return compare_files(first, second, out, as_json, overwrite)
    if bool(prompt) == (prompts is not None):
        both = ", not both" if prompt else ", or give two clips"
        raise UserError(f"say what to draw: --prompt TEXT, or --prompts FILE{both}", 2)
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}", 2)
    base = {key: value for key, value in settings.items() if value is not None} | {"format": "png"}
    lines = [("the command line", each) for each in prompt or ()] if prompts is None else jobs.read(prompts, sys.stdin)
    batch = jobs.make(lines, base)
    errors = batch.errors + [
        (job.where, "compare takes presets from --preset alone") for job in batch.jobs if "preset" in job.given
    ]
    if errors:
        raise UserError(f"{errors[0][0]}: {errors[0][1]}", 2)
    if out is not None and not overwrite and (out / RESULT).exists():
        raise UserError(f"{out / RESULT} exists already: choose another --out, or say --overwrite", 2)
    asked: list[Any] = [*(preset or ()), *(config or ())] or list(COMPARED)
    return _pipeline(batch.jobs, asked, repeats, out, as_json)


def _pipeline(todo: list[jobs.Job], presets: list[Any], repeats: int, out: Path | None, as_json: bool) -> int:
    from fastdit.apps.compare.pipeline import ComparisonResult, draw_all, named, writable

    try:
        configs = named(presets)
    except ValueError as error:
        raise UserError(str(error), 2) from None
    if out is not None:
        writable(out)
    result = ComparisonResult(configs, repeats, {})
    try:
        for _ in draw_all(result, todo, show=not as_json):
            if out is not None:
                result.save(out)
    finally:  # also after Ctrl-C
        if result.rows[1:]:
            typer.echo(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else str(result))
            for path in [] if as_json else result.files.values():
                typer.echo(path)
    return 0
