"""Known before the run: what each preset will do for a clip, without loading weights again and without a forward.

    tokens        the autoencoder's scale and the denoiser's patch: exact
    density       the scheduler's own noise levels, the tile maps of static policies: as `report` counts it
    statistics    by `approx.placement`'s arithmetic, in the order of a run
    ratio         of denoising, dense over accelerated, by `cost.py`; "measured" rates or "estimated" ones (`cards.py`)

What depends on the data is None, which is shown as "unknown": the density of policies that read q and k, and noise levels that
a scheduler does not tell. An error budget is not in it.
"""

from __future__ import annotations

from typing import Any

from fastdit.api import config_of, unwrapped_denoisers
from fastdit.config import Config
from fastdit.prediction.forecast import Prediction
from fastdit.prediction.walk import Walk
from fastdit.presets import PRESETS


def predict(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int | None = None,
    steps: int = 50,
    preset_or_config: str | Config | None = None,
    gpu: str | None = None,
    *,
    guidance: float | None = None,
    text_tokens: int | None = None,
    memory: float | None = None,
) -> Prediction:
    """What a run of a pipeline will take, for one configuration or every preset. Calls nothing of the pipeline and allocates
    nothing of its size; its weights may be on the meta device.

    height, width: pixels; num_frames: None for a picture. gpu: "H100", "RTX 4090", …, or "cpu"; None: where the pipeline is, or
    this machine's GPU for one on the meta device. guidance: the scale; None: the pipeline's default. text_tokens: of the
    prompt; None: the longest that the pipeline reads. memory: GB of the GPU that the process may use; None: all of a named one,
    or what is free now.

    Raises ValueError for sizes that the model does not take, steps below 1, an unknown GPU or preset, and a denoiser whose
    tokens are not known without a call (UNets, models described by `install`).

    Example:
        >>> print(fastdit.predict(pipe, 720, 1280, 81, steps=50, gpu="RTX 4090"))  # doctest: +SKIP
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 up, got {steps!r}")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be above 0 GB, got {memory}")
    named = dict(PRESETS) if preset_or_config is None else {
        preset_or_config if isinstance(preset_or_config, str) else "config": config_of(preset_or_config)
    }  # fmt: skip
    models = [model for _, model in unwrapped_denoisers(pipe)]
    models = models if getattr(getattr(pipe, "config", None), "boundary_ratio", None) else models[:1]
    run = Walk(pipe, models, height, width, num_frames, steps, gpu, guidance, text_tokens, memory)
    forecasts = tuple(run.forecast(name, config) for name, config in named.items())
    levels = None if run.levels is None else tuple(run.levels)
    return Prediction(
        type(pipe).__name__, run.grid, run.text, run.exact, steps, levels, run.branches, run.name, run.weights,
        run.free[run.device], run.dense_step if run.card is not None and run.card.measured else None, forecasts,
    )  # fmt: skip
