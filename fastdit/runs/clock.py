"""Where a run is: noise levels as the denoiser is given them, never a count of calls.

Guidance calls a denoiser twice a step in one pipeline and once in another, step caches skip calls, Heun makes two, and Wan
2.2 changes denoisers midway. The noise level σ tells steps and runs apart in all of them: within a run it only falls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RISE = 1e-4
"""σ must rise by this much to mean a new run; solvers that call twice at one σ repeat it to within rounding."""


@dataclass
class Clock:
    """run: how many runs have begun; step: noise levels seen in this one, counted from 0; sigma: the last one seen."""

    run: int = 0
    step: int = -1
    sigma: float = 0.0

    def observe(self, sigma: float) -> bool:
        """Take in the noise level of a call; True if it begins a new run."""
        begins = self.step < 0 or sigma > self.sigma + RISE
        if begins:
            self.run, self.step = self.run + 1, 0
        elif sigma < self.sigma - RISE:
            self.step += 1
        self.sigma = sigma
        return begins

    def move(self, sigma: float) -> None:
        """Take in the noise level of a call that is known to be of this run, whether the noise falls or rises in it."""
        if self.step < 0 or abs(sigma - self.sigma) > RISE:
            self.step += 1
        self.sigma = sigma


class Stopwatch:
    """Seconds from its making to `stop`; on a GPU the two events between which they passed, so that nobody waits for them."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device if like.is_cuda else None
        self.start = self._now()

    def _now(self) -> Any:
        if self.device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # left out, it is the current device's
        return event

    def stop(self) -> Any:
        return (self.start, self._now()) if self.device is not None else self._now() - self.start
