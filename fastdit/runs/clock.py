"""The position of a run, measured by the noise levels that the denoiser is given, never by counting calls.

Guidance calls a denoiser twice a step in one pipeline and once in another, step caches skip calls, Heun makes two, and Wan
2.2 changes denoisers midway. The noise level σ separates steps and runs in all of them: within a run it only falls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RISE = 1e-4
"""A larger rise of σ means a new run. Solvers that call twice at one σ repeat it to within rounding."""


@dataclass
class Clock:
    """run: runs begun. step: index of the noise level in this run, from 0; −1 before the first. sigma: the last one."""

    run: int = 0
    step: int = -1
    sigma: float = 0.0

    def observe(self, sigma: float) -> bool:
        """Record the noise level of a call; True if it begins a new run."""
        begins = self.step < 0 or sigma > self.sigma + RISE
        if begins:
            self.run, self.step = self.run + 1, 0
        elif sigma < self.sigma - RISE:
            self.step += 1
        self.sigma = sigma
        return begins

    def move(self, sigma: float) -> None:
        """Record the noise level of a call that is known to belong to this run, in which the noise may fall or rise."""
        if self.step < 0 or abs(sigma - self.sigma) > RISE:
            self.step += 1
        self.sigma = sigma


class Stopwatch:
    """Time since its creation. `stop` returns seconds, or on a GPU a pair of CUDA events, so as not to block."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device if like.is_cuda else None
        self.start = self._now()

    def _now(self) -> Any:
        if self.device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # the default is the current device's stream
        return event

    def stop(self) -> Any:
        return (self.start, self._now()) if self.device is not None else self._now() - self.start
