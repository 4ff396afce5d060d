"""`fastdit.compare`: the user's own pipeline and call, dense against presets, configurations and profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastdit
from fastdit.api import adapters_of, attach, config_of
from fastdit.apps.compare.measure import measure_call
from fastdit.apps.compare.result import ComparisonResult
from fastdit.apps.errors import UserError
from fastdit.apps.render.config_file import KINDS, read_config
from fastdit.apps.render.draw import parameters
from fastdit.apps.render.generate import arguments
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.paths import here, local
from fastdit.apps.render.renderer import Renderer, machine
from fastdit.apps.render.settings import Settings
from fastdit.attach.processor import installed
from fastdit.config import Config
from fastdit.encoder_reuse.propagate import propagation_of

Preset = str | Config | os.PathLike[str]
Call = Mapping[str, Any]
OURS = ("output_type", "return_dict", "output")
"""Arguments that say in which form a pipeline returns its picture."""


def compare(
    pipe: Any,
    call: Call | Sequence[Call],
    presets: Preset | Iterable[Preset] | Mapping[str, Preset] = ("balanced", "fast"),
    *,
    repeats: int = 2,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> ComparisonResult:
    """What do I win and lose on my pipeline? Draw its call densely and by each preset from equal noise, and compare.

    pipe: any pipeline that `accelerate` takes, of pictures or videos, also a modular one. call: the arguments of its call, or a
    list of such. presets: names of presets, `Config`s and paths of files with one, in any mix; a dictionary names each.

    repeats: timed runs of each, in turn. Dense is drawn once for quality; more dense runs are timings, made only beside a
    configuration that is sparse. What stays dense runs once. seed: of a new CPU generator for every run, and of PyTorch's own
    noise; a generator in `call` is copied with its state for every run, and left as it is. out: folder for compare.json,
    compare-sheet.png and compare-plot.png; files of these names are replaced. They are written after every run, so that Ctrl-C,
    which is raised, leaves what was done.

    Whatever `output_type` asks for, frames are drawn to compare them; with "latent" nothing is decoded, and PSNR, SSIM, flicker
    and sheet are missing. A pipeline that is accelerated is measured without, and accelerated as before at the end.

    Returns the times (best, median, spread; denoising and whole), peak memory, density, teacher-forced velocity error by phase,
    PSNR, SSIM and flicker: `ComparisonResult.rows`. Velocity errors are relative L2 of the first branch of each step.

    Raises ValueError for what cannot be compared, before anything is drawn, and RuntimeError for an output that is not finite
    or dense runs that differ. Example::

        found = fastdit.compare(pipe, {"prompt": "a red ball", "num_frames": 33}, ["fast", "profile.json"], out="compared")
        print(found)          # `fast`: 1.6 × faster at velocity error .05, SSIM .99; `profile`: …
        found.rows[1]["velocity_error"]
    """
    try:
        configs = named(presets)
        calls = calls_of(call)
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise UserError(f"repeats must be a whole number from 1 up, got {repeats!r}", 2)
        before = installed_config(pipe)
        makers = [fresh(pipe, each, seed) for each in calls]
        folder = None if out is None else writable(Path(out))
        result = ComparisonResult(configs, repeats, machine(pipe), [described(each) | {"seed": seed} for each in calls])
        parts = adapters_of(pipe)
        try:
            for each, make in zip(calls, makers, strict=True):
                latents = each.get("output_type") == "latent"
                for _ in add(result, measure_call(pipe, make, configs, repeats, seed, False, latents=latents, parts=parts)):
                    if folder is not None:
                        result.save(folder)
        finally:
            if before is not None:
                attach(pipe, before, parts)
        return result
    except UserError as problem:
        raise (ValueError if problem.code == 2 else RuntimeError)(str(problem)) from None


def draw_all(result: ComparisonResult, jobs: Sequence[Job], show: bool) -> Iterator[None]:
    """Compare the clips of jobs, each with the pipeline that its settings load; one step for each run. Raises UserError."""
    renderer = Renderer(show)
    try:
        for job in jobs:
            settings, _ = renderer.prepare(job)
            result.machine = machine(renderer.pipe)
            result.calls.append(call_of(settings))
            make = partial(arguments, renderer.pipe, settings)
            yield from add(result, measure_call(renderer.pipe, make, result.configs, result.repeats, settings.seed, show))
    finally:
        renderer.close()


def add(result: ComparisonResult, comparisons: Iterator[Any]) -> Iterator[None]:
    """Put a comparison into the result as soon as its first configuration was measured; one step for each run."""
    for number, found in enumerate(comparisons):
        if number == 0:
            result.comparisons.append(found)
        yield


def calls_of(call: Call | Sequence[Call]) -> list[Call]:
    """One or several calls as a list. Raises ValueError for something else."""
    calls = [call] if isinstance(call, Mapping) else list(call) if isinstance(call, list | tuple) else []
    if not calls or not all(isinstance(each, Mapping) for each in calls):
        raise ValueError(f"call must be a dictionary of the pipeline's arguments, or a list of such, got {call!r:.80}")
    return calls


def call_of(settings: Settings) -> dict[str, Any]:
    """The settings of a clip but for how attention is accelerated, for JSON."""
    return {name: value for name, value in vars(settings).items() if name not in ("preset", "custom")}


def installed_config(pipe: Any) -> Config | None:
    """The configuration by which a pipeline is accelerated, if it is. Raises ValueError for what cannot be compared."""
    if isinstance(pipe, nn.Module):
        raise ValueError(f"this needs the pipeline that draws, got a {type(pipe).__name__}")
    models = [model for _, model, _ in adapters_of(pipe)]
    if any(propagation_of(model) is not None for model in models):
        raise ValueError("the pipeline's encoder is propagated: fastdit.restore(pipe) first, only attention is measured")
    return next((found.handle.config for model in models if (found := installed(model)) is not None), None)


def named(presets: Preset | Iterable[Preset] | Mapping[str, Preset]) -> dict[str, Config]:
    """{name: configuration}. A file's name is its stem, a `Config`'s "custom". Raises ValueError or UserError."""
    if isinstance(presets, Mapping):
        found = {str(name): _config(said) for name, said in presets.items()}
    else:
        many = isinstance(presets, Iterable) and not isinstance(presets, str)
        found = {}
        for said in list(presets) if many else [presets]:  # type: ignore[arg-type]
            name = "custom" if isinstance(said, Config) else Path(str(said)).stem if _is_file(said) else str(said)
            count = 2
            while isinstance(said, Config) and name in found:
                name, count = f"custom {count}", count + 1
            if name in found:
                raise UserError(f"{name!r} is named twice: name each in a dictionary {{name: preset}}", 2)
            found[name] = _config(said)
    if not found or "dense" in found:
        raise UserError("presets: at least one to compare with dense, and none of that name", 2)
    return found


def _is_file(said: Any) -> bool:
    if said in fastdit.PRESETS:
        return False
    return isinstance(said, os.PathLike) or str(said).endswith(KINDS) or here(str(said))


def _config(said: Any) -> Config:
    if isinstance(said, str | os.PathLike) and _is_file(said):
        return read_config(local(os.fspath(said)), "")
    return config_of(said)


def fresh(pipe: Any, call: Call, seed: int) -> Callable[[], dict[str, Any]]:
    """Makes the arguments of one run, with generators of their own. Raises UserError for arguments that the pipeline lacks."""
    takes = parameters(pipe)
    if unknown := set(call) - takes.keys() - set(OURS):
        raise UserError(f"{type(pipe).__name__} takes no {', '.join(sorted(unknown))}: it takes {', '.join(takes)}", 2)
    plain = {name: value for name, value in call.items() if name not in OURS}
    given = plain.pop("generator", None)
    if given is None:

        def generator() -> Any:
            return torch.Generator().manual_seed(seed)
    else:
        many = [given] if isinstance(given, torch.Generator) else list(given)
        states = [(each.device, each.get_state()) for each in many]

        def generator() -> Any:
            copies = [torch.Generator(device).set_state(state) for device, state in states]
            return copies[0] if isinstance(given, torch.Generator) else copies

    return lambda: plain | ({"generator": generator()} if "generator" in takes else {})


def described(call: Call) -> dict[str, Any]:
    """A call's arguments for JSON: text and numbers as they are, of anything else its type."""
    return {name: _plain(value) for name, value in call.items()}


def _plain(value: Any) -> Any:
    if (
        value is None
        or isinstance(value, str | int)
        or (isinstance(value, float) and value == value and abs(value) != float("inf"))
    ):
        return value
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else type(value).__name__


def writable(folder: Path) -> Path:
    """The folder, which may be missing. Raises UserError if it cannot be made or written: better before than after an hour."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write into {folder}: choose another folder with --out", 2)
    return folder
