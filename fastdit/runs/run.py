"""The state of one run of a pipeline: its position, its branches, and the records and statistics of its sites.

A run is one denoising loop (`loops.Loop`) on one accelerated pipeline. A model called by hand, without a loop, is in a run of
the calling thread, and only the noise level shows where that run ends. All state belongs to the run and none to the model, so
that pipelines, threads and runs that share a model do not interfere.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch

from fastdit.approx.step_cache import Memory
from fastdit.runs.branches import Branch, Branches, Call
from fastdit.runs.clock import RISE, Clock
from fastdit.runs.noise_level import Scale
from fastdit.runs.site_state import SiteState
from fastdit.runs.verdict import Verdict, settle

STALE = 2
"""A branch loses its statistics after this many noise levels without a call. Moving windows return every second step."""
MOST_CALLS = 4096
"""More calls of a model by hand at one noise level mean a new run. One picture has fewer tiles or views."""


class Run:
    """One run. sites: state by index of the site. pipeline: its scheduler defines the steps; held by a weak reference."""

    def __init__(self, sites: int, pipeline: Any = None, by_hand: bool = False) -> None:
        self.clock = Clock()
        self.sites = [SiteState() for _ in range(sites)]
        self.by_hand = by_hand
        self.first_step = 0
        """The report's number for step 0 of this run."""
        self.branches = Branches()
        self.pending: list[Verdict] = []
        """Verdicts on calls on a GPU that were not read yet."""
        self.scale: Scale | None = None
        self.finished = False
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps = self.timesteps()
        self._steps: int | None = None
        self._rises = True  # so far; a single noise level may begin an inversion
        self._calls: Counter[int] = Counter()  # per model, at this noise level

    @property
    def pipeline(self) -> Any:
        return None if self._pipeline is None else self._pipeline()

    def timesteps(self) -> Any:
        """The scheduler's list of timesteps, or None."""
        return getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)

    def level(self, sigma: float, timestep: float | None) -> float:
        """The noise level of a call: `sigma`, or if a timestep is given, its value on the scheduler's scale."""
        if timestep is None:
            return sigma
        if self.scale is None:
            self.scale = Scale.of(getattr(self.pipeline, "scheduler", None), timestep)
        return self.scale(timestep)

    def is_over(self, sigma: float, call: Call, unserved: Collection[int] = ()) -> bool:
        """Whether a call belongs to another run. In a run the noise falls, except in an inversion, where it rises from the
        first step and each step continues the latents of the one before. unserved: sites whose processor was exchanged."""
        if self.clock.step < 0:
            return False
        if any(self.sites[index].calls for index in unserved):
            return True
        if sigma > self.clock.sigma + RISE:
            return not (self._rises and self.branches.goes_on(sigma, call))
        if not self.by_hand:
            return False
        anew = self.timesteps() is not self._timesteps  # several schedulers may take turns
        if sigma < self.clock.sigma - RISE:
            turns = self._rises and self.clock.step > 0
            return (anew or turns) and not self.branches.goes_on(sigma, call)
        return (anew and self.branches.seen(call)) or (self.clock.step == 0 and self._calls[call.model] >= MOST_CALLS)

    def knows(self, sigma: float, call: Call) -> bool:
        """Whether a call continues one of this run's branches."""
        return sigma <= self.clock.sigma + RISE and self.branches.goes_on(sigma, call)

    def follow(self, before: Run) -> None:
        """Take over the records of `before`, the part of this loop before its noise rose, for the report."""
        self.first_step = before.first_step + before.clock.step + 1
        for site, old in zip(self.sites, before.sites, strict=True):
            site.calls, site.peak_bytes = old.calls, old.peak_bytes

    @property
    def step(self) -> int:
        """The current step, as numbered in the report."""
        return self.first_step + self.clock.step

    def enter(self, sigma: float, call: Call) -> Branch:
        """Record one call of a denoiser; return its branch."""
        if moves := self.clock.step < 0 or abs(sigma - self.clock.sigma) > RISE:
            self.branches.move()
            self._calls.clear()
            self._rises = self.clock.step < 0 or sigma > self.clock.sigma
        self.clock.move(sigma)
        if moves:
            self.forget(STALE)
        if (timesteps := self.timesteps()) is not self._timesteps:
            self._timesteps, self._steps = timesteps, None
        self._calls[call.model] += 1
        branch, ended = self.branches.find(sigma, self.clock.step, call)
        if ended is not None:
            self._drop([ended])
        if self.last:
            self.forget(1)  # branches of guidance that has ended
        return branch

    @property
    def last(self) -> bool:
        """Whether this is the scheduler's last noise level, after which statistics are useless. Only for models called by hand:
        a loop signals its own end."""
        if not self.by_hand or self._timesteps is None:
            return False
        if self._steps is None:
            listed = torch.as_tensor(self._timesteps).cpu().double().flatten()
            moved = listed.diff().abs() > RISE * max(1.0, float(listed.abs().amax())) if len(listed) else listed
            self._steps = int(moved.sum()) + (len(listed) > 0)  # as the clock counts them
        return 0 < self._steps <= self.clock.step + 1

    def memories(self) -> list[Memory]:
        return [memory for site in self.sites for memory in list(site.memories.values())]

    def settle(self) -> None:
        """Read the pending verdicts."""
        pending, self.pending = self.pending, []
        settle(pending)

    def forget(self, steps: int) -> bool:
        """Drop branches that were not called in the last `steps` steps. Returns whether statistics were freed."""
        return self._drop([branch for branch in self.branches.known if branch.step < self.clock.step - steps])

    def _drop(self, gone: list[Branch]) -> bool:
        self.branches.drop(gone)
        freed = 0
        for site in self.sites:
            for key in [key for key in site.memories if key[1] in gone]:
                freed += site.memories.pop(key).bytes()
        return freed > 0

    def finish(self) -> None:
        """Free all statistics: decoding comes next and needs the memory. Records stay, for the report."""
        self.finished = True
        for site in self.sites:
            site.memories.clear()
        self.branches = Branches()
