"""The command `fastdit tune`: the fastest configuration for a model, its sizes and this machine, within an error."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.cli.options import with_settings
from fastdit.apps.errors import UserError
from fastdit.apps.render import jobs
from fastdit.apps.render.generate import arguments
from fastdit.apps.render.renderer import Renderer

FIXED = ("preset", "fps", "format", "crf", "ulysses", "ring")
"""Settings of a clip that tuning does not take."""


@functools.partial(with_settings, without=FIXED)
def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile, a JSON file; one that is there is continued.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; given again, the last is held out.", show_default=False)
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts, as of render.")] = None,
    *,
    budget: Annotated[float, typer.Option(help="The largest mean relative error of the velocity.")] = 0.05,
    minutes: Annotated[float, typer.Option(help="After which no more is tried.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile, and nothing else.")] = False,
    **settings: Any,
) -> int:
    """Search the fastest configuration whose velocity error stays within --budget, for a model, size and number of steps.

    Draws densely first, then tries configurations on what the denoiser was given. Ctrl-C keeps the best so far in --out, and
    the same command goes on from there. Use it by `render --config FILE` or `fastdit.accelerate(pipe, "FILE")`.
    """
    if bool(prompt) == (prompts is not None):
        raise UserError(f"say what to draw: --prompt TEXT, or --prompts FILE{', not both' if prompt else ''}", 2)
    if out.suffix != ".json":
        raise UserError(f"--out must be a .json file, got {out}", 2)
    if not 0 < budget < 1:
        raise UserError(f"--budget must be a relative error between 0 and 1, got {budget:g}", 2)
    if not minutes > 0:
        raise UserError(f"--minutes must be above 0, got {minutes:g}", 2)
    base = {key: value for key, value in settings.items() if value is not None} | {"format": "png"}
    lines = [("the command line", each) for each in prompt or ()] if prompts is None else jobs.read(prompts, sys.stdin)
    batch = jobs.make(lines, base)
    if batch.errors:
        raise UserError("{}: {}".format(*batch.errors[0]), 2)
    return _search(batch.jobs, budget, minutes, out, as_json)


def _search(todo: list[jobs.Job], budget: float, minutes: float, out: Path, as_json: bool) -> int:
    from fastdit.apps.compare.pipeline import call_of
    from fastdit.apps.tune.pipeline import begin, run

    renderer = Renderer(show=not as_json)
    try:
        made = [renderer.prepare(job)[0] for job in todo]
        if len({one.pipeline for one in made}) > 1:
            raise UserError("the prompts ask for several pipelines: give each a profile of its own", 2)
        pipe = renderer.pipe
        makers = [partial(arguments, pipe, one) for one in made]
        held = makers.pop() if len(makers) > 1 else partial(arguments, pipe, replace(made[0], seed=made[0].seed + 1))
        found = begin(pipe, [call_of(one) for one in made], budget, out)
        show = (lambda line: None) if as_json else partial(typer.echo, err=True)
        try:
            run(pipe, found, makers, held, made[0].seed, minutes, out, show)
        finally:  # also after Ctrl-C
            if found.trials:
                typer.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else f"{found}\n{out}")
    finally:
        renderer.close()
    return 0
