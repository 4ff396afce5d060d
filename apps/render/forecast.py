"""What a clip will take, said before it is drawn: `fastdit.predict` with the settings of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastdit
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.load import defaults, makes_video
from fastdit.apps.render.paths import local
from fastdit.apps.render.settings import Settings
from fastdit.pipelines import embedded


def of_clip(pipe: Any, settings: Settings, every: bool = False) -> fastdit.Prediction:
    """The prediction for the settings' configuration; every: for all presets. Raises ValueError where nothing is known."""
    chosen = settings.custom or (None if every else settings.preset)
    frames = settings.frames if makes_video(pipe) else None
    return fastdit.predict(pipe, settings.height, settings.width, frames, settings.steps, chosen, guidance=settings.guidance)


def line(pipe: Any, settings: Settings) -> str:
    """One line on a clip that is about to be drawn. A pipeline that predicts badly draws all the same: the line says why."""
    try:
        return f"fastdit: {of_clip(pipe, settings).line()}"
    except Exception as error:  # of a pipeline's own kind of configuration; it must not cost the clip
        return f"fastdit: nothing predicted: {why(error)}"


def why(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def tables(jobs: list[Job]) -> list[str]:
    """For every model and size of some jobs the table of all presets, or why there is none. Loads no weights."""
    from fastdit.prediction.skeleton import skeleton

    pipes: dict[str | None, Any] = {}
    found: dict[str, None] = {}
    for job in jobs:
        settings = job.settings()
        model = settings.model
        folder = embedded.PATH if model is None else Path(local(model))
        try:
            if not folder.is_dir():
                raise ValueError("it is not a folder here")
            if model not in pipes:
                pipes[model] = skeleton(folder)
            if model is not None:
                settings = job.settings(**defaults(pipes[model]))
            found[str(of_clip(pipes[model], settings, every=True))] = None
        except Exception as error:  # one model's, which must not hide the others'
            found[f"nothing predicted for {model or 'the embedded model'}: {why(error)}"] = None
    return list(found)
