"""Prior noise injection of Faster Diffusion (arXiv 2312.09608, section 3.4): z_t ← z_t + α·z_T in the second half of the steps.

Propagated features smooth pictures slightly; a little of the initial latents restores texture. α = 0.003 in the paper.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


class Injection:
    """Adds α·z_T to the output of the scheduler's `step`, the latents of the next step.

    z_T: the input of the run's first step, scaled to unit variance. Variance-exploding schedulers (Euler) have latents of
    variance σ² + 1, so α·z_T is scaled up accordingly.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._scheduler: Any = None
        self._levels: list[float] = []
        self._prior: Tensor | None = None

    def begin(self, scheduler: Any, levels: list[float]) -> None:
        """Begin a run of a scheduler. levels: its timesteps, falling. Raises ValueError for solvers of higher order."""
        if getattr(scheduler, "order", 1) != 1:
            raise ValueError(f"{type(scheduler).__name__} calls the denoiser between steps: noise must be 0 with it")
        self._levels, self._prior = levels, None
        if scheduler is not self._scheduler:
            self.restore()
            self._scheduler = scheduler
            scheduler.step = self._wrapped(scheduler.step)

    def restore(self) -> None:
        """Restore the scheduler's own `step`."""
        if self._scheduler is not None and hasattr(vars(self._scheduler).get("step"), "fastdit_injects"):
            del self._scheduler.step
        self._scheduler = self._prior = None

    def _wrapped(self, step: Any) -> Any:
        @functools.wraps(step)  # pipelines read its signature
        def injecting(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._prior is None:
                self._prior = sample / float(self._scheduler.init_noise_sigma)
            found = step(model_output, timestep, sample, *args, **kwargs)
            following = sum(level >= float(timestep) for level in self._levels)
            if not len(self._levels) / 2 <= following < len(self._levels):
                return found
            added = self.alpha * self._size(following) * self._prior
            if isinstance(found, tuple):
                return (found[0] + added, *found[1:])
            found.prev_sample = found.prev_sample + added
            return found

        injecting.fastdit_injects = True  # type: ignore[attr-defined]
        return injecting

    def _size(self, step: int) -> float:
        """Standard deviation of the latents of a step, in units of the data's noise."""
        if float(self._scheduler.init_noise_sigma) == 1:
            return 1.0
        return float(self._scheduler.sigmas[step] ** 2 + 1) ** 0.5
