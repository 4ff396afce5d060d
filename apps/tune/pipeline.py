"""`fastdit.tune`: the fastest configuration for a pipeline, its sizes and this machine, within an error."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastdit
from fastdit.api import adapters_of, attach
from fastdit.apps.compare.measure import seeded, warm_up
from fastdit.apps.compare.pipeline import Call, calls_of, described, fresh, installed_config
from fastdit.apps.compare.recorded import Call as Recorded
from fastdit.apps.compare.recorded import FirstCalls, velocity_of
from fastdit.apps.errors import UserError
from fastdit.apps.render.draw import draw
from fastdit.apps.render.load import denoisers
from fastdit.apps.render.outputs import write_json
from fastdit.apps.render.renderer import machine
from fastdit.apps.tune.search import Trial, better, drift_of, formats_for, search, with_drift
from fastdit.config import Config
from fastdit.core.reference import relative_error

log = logging.getLogger(__name__)

TOLERANCE = 1.1
"""Of the budget, on clips that nothing was chosen on."""
CORRECTIONS = 3
ROUNDS = 2
"""Of dense and the found configuration in turn, for the ratio."""


@dataclass
class Tuned:
    """What a search found. config: the fastest configuration within the budget, the dense one if none was faster than dense.

    error, held_out: mean relative L2 of the velocity, at the inputs of the dense runs that were searched on, and of one that
    was not; None until it was measured. ratio: dense seconds by seconds, of the denoiser's calls in whole runs, interleaved.
    trials: everything that was tried. about: pipeline, versions, device, calls. why: how the search ended.
    """

    budget: float
    about: dict[str, Any]
    config: Config = field(default_factory=Config)
    error: float = 0.0
    held_out: float | None = None
    ratio: float = 1.0
    trials: list[Trial] = field(default_factory=list)
    dense_seconds: float = math.nan
    why: str = "not finished"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a profile: `config` is what `accelerate` takes."""
        return {
            "config": self.config.to_dict(),
            "budget": self.budget,
            "velocity_error": self.error,
            "held_out_velocity_error": self.held_out,
            "ratio": self.ratio,
            "dense_s": None if math.isnan(self.dense_seconds) else self.dense_seconds,
            "why": self.why,
            "about": self.about,
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def __str__(self) -> str:
        if not self.config.phases:
            least = min((trial.error for trial in self.trials), default=None)
            near = "" if least is None else f"; the least error tried was {least:.3f}"
            return f"nothing faster than dense within velocity error {self.budget:g}{near} ({self.why})"
        (phase,) = self.config.phases
        held = "" if self.held_out is None else f", {self.held_out:.3f} on a run that nothing was chosen on"
        return (
            f"{self.ratio:.2f} × faster than dense in the denoiser at velocity error {self.error:.3f}{held} "
            f"(budget {self.budget:g}): {phase.policy}, {phase.reuse}, remainder {phase.remainder}, "
            f"quant {phase.quant} ({self.why})"
        )


def tune(
    pipe: Any,
    call: Call | Sequence[Call],
    budget: float = 0.05,
    minutes: float = 10.0,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    show: Callable[[str], None] = log.info,
) -> Tuned:
    """Search the fastest configuration whose velocity error stays within a budget, for this pipeline, call and machine.

    pipe: any pipeline that `accelerate` takes. call: the arguments of its call, with the size and the number of steps that it
    will be used with; or a list of such: the last is held out, and only measures what was found. With a single call, the call
    with the next seed is held out. budget: the largest mean relative L2 error of the velocity, in (0, 1). minutes: after which
    no more is tried; dense runs, which come first, and the measurement at the end are not counted.

    Each call is drawn densely once, and its denoiser's inputs are kept in main memory, of the first branch of each step.
    Configurations are judged on these: window densities, number formats that pay on this GPU, the pooled remainder; for each
    the largest drift (`Reuse.drift`) that keeps the error. What was found is measured on the held-out run, and made more exact
    while it is above 1.1 × the budget there. seed: of the noise.

    out: a JSON file with the configuration and all measurements, which `fastdit.accelerate(pipe, "file.json")` and
    `render --config file.json` take. It is written after every trial, so that Ctrl-C, which is raised, leaves the best so far;
    called again with the same file, pipeline, calls and machine, nothing is tried twice. show: gets a line after each trial.

    Raises ValueError for bad arguments, before anything is drawn. Example::

        found = fastdit.tune(pipe, {"prompt": "a red ball", "num_frames": 33, "num_inference_steps": 8}, .05, out="mine.json")
        print(found)      # 1.7 × faster than dense in the denoiser at velocity error .048, .049 on a run …
        fastdit.accelerate(pipe, "mine.json")
    """
    calls = calls_of(call)
    if not 0 < budget < 1:
        raise ValueError(f"budget must be a relative error in (0, 1), got {budget!r}")
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes!r}")
    try:
        before, parts = installed_config(pipe), adapters_of(pipe)
        makers = [fresh(pipe, each, seed) for each in calls]
        held = makers.pop() if len(makers) > 1 else fresh(pipe, calls[0], seed + 1)
        found = begin(pipe, [described(each) | {"seed": seed} for each in calls], budget, out)
        try:
            run(pipe, found, makers, held, seed, minutes, out, show)
        finally:
            fastdit.restore(pipe)
            if before is not None:
                attach(pipe, before, parts)
        return found
    except UserError as problem:
        raise (ValueError if problem.code == 2 else RuntimeError)(str(problem)) from None


def begin(pipe: Any, calls: Sequence[Mapping[str, Any]], budget: float, out: str | os.PathLike[str] | None) -> Tuned:
    """A search's beginning, with the trials of an earlier one in the file. Raises UserError for a file of something else."""
    found = Tuned(budget, {"calls": list(calls)} | machine(pipe))
    if out is None or not (path := Path(out)).exists():
        return found
    try:
        held = json.loads(path.read_bytes())
        trials = [Trial.from_dict(each) for each in held["trials"]]
        best = Config.from_dict(held["config"]), float(held["velocity_error"]), float(held["ratio"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} exists and is no profile: choose another file, or remove it", 2) from None
    if held.get("about") != json.loads(json.dumps(found.about)):
        raise UserError(f"{path} was tuned for another pipeline, call or machine: choose another file, or remove it", 2)
    found.trials = trials
    if held.get("budget") == budget:
        found.config, found.error, found.ratio = best
    return found


def run(
    pipe: Any, found: Tuned, makers: Sequence[Callable[[], dict[str, Any]]], held: Callable[[], dict[str, Any]], seed: int,
    minutes: float, out: str | os.PathLike[str] | None, show: Callable[[str], None],
) -> None:  # fmt: skip
    """Record, search, and measure what was found; `found` is filled in on the way. The pipeline is left accelerated or not."""
    save = (lambda: None) if out is None else partial(lambda path: write_json(path, found.to_dict()), Path(out))
    save()  # better now than after ten minutes
    parts = adapters_of(pipe)
    fastdit.restore(pipe)
    clips = []
    for number, make in enumerate((*makers, held), 1):
        clips.append(record(pipe, make, seed, f"dense {number}/{len(makers) + 1}", parts))
        show(f"dense run {number} of {len(makers) + 1}: {len(clips[-1])} steps kept")
    unseen = clips.pop()
    known = {key(trial.config): trial for trial in found.trials}

    def judged(config: Config, runs: Sequence[Sequence[Recorded]]) -> Trial:
        errors, seconds = [], 0.0
        with attach(pipe, config, parts) as handle:
            for calls in runs:
                handle.reset()
                for call in calls:
                    velocity, took = timed(call)
                    errors.append(relative_error(velocity, call.velocity))
                    seconds += took
        return Trial(config, sum(errors) / len(errors), seconds)

    def measure(config: Config) -> Trial:
        if (trial := known.get(key(config))) is None:
            trial = known[key(config)] = judged(config, clips)
            found.trials.append(trial)
        return trial

    dense = sum(timed(call)[1] for calls in clips for call in calls)
    model: Any = next(denoisers(pipe))
    formats = formats_for(model.device.type)
    # Whether sparse attention pays at this length is measured here.
    tokens = min(call.tokens or 0 for calls in clips for call in calls)
    least = min(tokens, Config().least_tokens(model.device.type))
    best, start = None, time.monotonic()
    for trial in search(measure, found.budget, formats, dense, least):
        best = better(best, trial, found.budget)
        if best is not None and best.seconds < dense:
            found.config, found.error, found.ratio = best.config, best.error, dense / best.seconds
        phase = trial.config.phases[0]
        show(
            f"{phase.policy}, drift {drift_of(trial.config):g}, remainder {phase.remainder}, quant {phase.quant}: "
            f"error {trial.error:.4f}, {dense / trial.seconds:.2f} ×"
        )
        save()
        if time.monotonic() - start > 60 * minutes:
            found.why = f"stopped after {minutes:g} minutes"
            break
    else:
        found.why = "the search was finished"
    if not found.config.phases:
        save()
        return
    for left in reversed(range(CORRECTIONS + 1)):
        found.held_out = judged(found.config, [unseen]).error
        show(f"held-out run: error {found.held_out:.4f}")
        if found.held_out <= TOLERANCE * found.budget or not left:
            break
        found.config = with_drift(found.config, drift_of(found.config) * found.budget / found.held_out)
        found.error = measure(found.config).error
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        fastdit.restore(pipe)
        times[True].append(sum(timed(call)[1] for calls in clips for call in calls))
        times[False].append(judged(found.config, clips).seconds)
    found.dense_seconds, found.ratio = min(times[True]), min(times[True]) / min(times[False])
    if found.ratio <= 1:  # more exact, it is no faster than dense
        found.config, found.error, found.held_out, found.ratio = Config(), 0.0, None, 1.0
    save()


def key(config: Config) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def record(pipe: Any, make: Callable[[], dict[str, Any]], seed: int, label: str, parts: Any) -> list[Recorded]:
    """The denoiser's first call of each step of a dense run."""
    calls: list[Recorded] = []
    with seeded(seed):
        warm_up(pipe, make())
    with seeded(seed), FirstCalls(pipe, calls, parts):
        draw(pipe, make(), label, False, latents=True)
    if not calls:
        raise UserError(f"{type(pipe).__name__} did not call its denoiser")
    return calls


def timed(call: Recorded) -> tuple[torch.Tensor, float]:
    """The velocity of a recorded call in main memory, and the seconds that the denoiser took."""
    args, kwargs = call.inputs()
    cuda = any(device is not None and device.type == "cuda" for device, _ in call.leaves)
    with torch.no_grad():
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = call.model(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return velocity_of(out).cpu(), seconds
