"""The noise level of a timestep, whose meaning depends on the scheduler.

Most schedulers count a thousand training steps down. EDM's (arXiv 2206.00364 table 1: c_noise = ln σ / 4; Playground v2.5, SVD)
use the logarithm of a σ relative to a picture of size 1, consistency models a thousand times that. IPNDM, cosine DPM and score
SDEs use a number from 1 to 0, SCM an angle from π/2. The noise level is σ / (1 + σ) for EDM's timesteps and consistency
models', and the timestep's share of its range for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

TRAIN_TIMESTEPS = 1000
EDM_MOST = 1.5
"""ln σ / 4 at σ = 400; published models stop at 80."""
FEW = 100
"""A list of timesteps that starts below this counts the run's own steps (Karras-VE), not training steps."""


@dataclass(frozen=True)
class Scale:
    """Timestep -> noise level in [0, 1]. kind: "share" of `full`, or "log" (ln σ / 4, times `full`)."""

    kind: str = "share"
    full: float = TRAIN_TIMESTEPS

    def __call__(self, timestep: float) -> float:
        if self.kind == "share":
            return min(max(timestep / self.full, 0.0), 1.0)
        x = 4 * timestep / self.full
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    @classmethod
    def of(cls, scheduler: Any, first: int | float) -> Scale:
        """The scale of a scheduler (None: unknown) whose timesteps are set.

        first: the run's first timestep, used if the scheduler lists none; it is the largest, except in an inversion from 0. An
        int then counts training steps.
        """
        listed = getattr(scheduler, "timesteps", None)
        if listed is None or len(listed) == 0:
            if isinstance(first, int):
                return cls()
            listed = [first or TRAIN_TIMESTEPS]
        times = torch.as_tensor(listed).cpu().double().flatten().tolist()
        most, least = max(times), min(times)
        if least < 0 or most > 1.001 * TRAIN_TIMESTEPS or 1 < most <= EDM_MOST:
            return cls("log", 1.0 if most <= EDM_MOST else TRAIN_TIMESTEPS)
        if most < 2:
            return cls("share", max(1.0, most))
        if most < FEW and not hasattr(getattr(scheduler, "config", None), "num_train_timesteps"):
            return cls("share", most)
        return cls()
