"""The noise level of a timestep, which means something else to each kind of scheduler.

Most count a thousand training steps down. EDM's (arXiv 2206.00364 table 1: c_noise = ln σ / 4; Playground v2.5, SVD) give the
logarithm of a σ that compares the noise with a picture of size 1, consistency models a thousand times that, IPNDM, cosine DPM
and score SDEs a number from 1 to 0, SCM an angle from π/2. The noise
level is the share σ / (1 + σ) for EDM's, and the timestep's share of its range for the others.
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
"""A list that starts below this counts the run's own steps (Karras-VE), not those of the training."""


@dataclass(frozen=True)
class Scale:
    """From a timestep to the noise level in [0, 1]. kind: "share" of `full`, or "log" (ln σ / 4, times `full`)."""

    kind: str = "share"
    full: float = TRAIN_TIMESTEPS

    def __call__(self, timestep: float) -> float:
        if self.kind == "share":
            return min(max(timestep / self.full, 0.0), 1.0)
        x = 4 * timestep / self.full
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    @classmethod
    def of(cls, scheduler: Any, first: int | float) -> Scale:
        """Of a scheduler (None: unknown) with its timesteps set, for a run whose first timestep is `first`: the largest, but
        for an inversion from 0. Whole numbers count the training's steps, unless the scheduler says otherwise."""
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
