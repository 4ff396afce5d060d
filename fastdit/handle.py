"""What fastdit knows about one accelerated pipeline: its denoisers, their attention sites, and what ran in them.

Everything lives on the pipeline's own `Handle`, reached from the processors bound into its modules; nothing is global but a
weak index, through which the opaque attention op finds the handle from the integer it was given.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastdit.clock import Clock
from fastdit.config import Config
from fastdit.facts import Adapter
from fastdit.layout import Grid
from fastdit.memory import Memory

MOST_CALLS = 64
"""Calls of one site at one noise level, more than guidance, solvers and a batch taken one by one make: beyond it a new run."""
_numbers = itertools.count()
_handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()


class Ran(NamedTuple):
    """What one call of a site did.

    phase: as in `Plan`. density: of all query-key pairs. how: "dense", "sparse" (or quantized), "refresh" (dense, statistics
    taken), "reuse" (sparse, completed by statistics). reason: why it was dense. step, sigma: of the run. quant: number format.
    trimmed: padded keys cut. error: relative L2 on a few rows, None if not measured. rung: of the guard. seconds: of the
    attention call, or a pair of CUDA events that will tell.
    """

    phase: int | None
    density: float
    how: str
    reason: str | None = None
    step: int = 0
    sigma: float = 0.0
    quant: str = "none"
    trimmed: int = 0
    error: float | None = None
    rung: int = 0
    seconds: Any = 0.0


@dataclass(eq=False)
class Site:
    """One attention module: its name in the denoiser, its index among all sites of the handle and of its denoiser.

    ran: its calls in the latest run; memories: what it remembers by branch, phase, shape; rung: of `guard.RUNGS`.
    """

    name: str
    index: int
    layer: int
    denoiser: Denoiser
    ran: list[Ran] = field(default_factory=list)
    refusal: str | None = None
    """Why the last call went straight to the pipeline's own attention, seen when the call was traced."""
    memories: dict[tuple[Any, ...], Memory] = field(default_factory=dict)
    most: int = 0
    """Bytes of statistics, when they were most."""
    rung: int = 0
    guarded: str | None = None
    """Why the guard last raised the rung."""

    def memory(self, phase: int | None, *key: Hashable) -> Memory:
        """What is remembered for a phase and branch, shape, …: new at first. What another phase left goes: the noise level
        only falls, and a phase begins with statistics of its own."""
        for other in [other for other in self.memories if other[0] != phase]:
            del self.memories[other]
        return self.memories.setdefault((phase, *key), Memory())

    def bytes(self, device: torch.device | None = None) -> int:
        """Of statistics, on a device; None: on all."""
        return sum(memory.bytes(device) for memory in self.memories.values())

    def climb(self, why: str, rung: int) -> None:
        self.guarded, self.rung = f"guard: {why} at noise level {self.denoiser.sigma.item():.3f}", rung
        self.memories.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """A copy remembers nothing."""
        twin = memo[id(self)] = copy.copy(self)
        twin.forget()
        twin.denoiser = copy.deepcopy(self.denoiser, memo)
        return twin

    def forget(self) -> None:
        """Start anew: nothing of an earlier run must reach the next."""
        self.ran, self.memories, self.most, self.rung, self.guarded = [], {}, 0, 0, None


@dataclass(eq=False)
class Denoiser:
    """One model: its sites, and the facts of the call that it is in."""

    name: str
    adapter: Adapter
    handle: Handle
    sites: list[Site] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    """Attention modules that are no sites, counted by the reason why."""
    grid: Grid = (0, 0, 0)
    coarser: tuple[Grid, ...] = ()
    before: int = 0
    after: int = 0
    ragged: bool = False
    unread: bool = False
    where: Tensor | None = None
    """The grid, on the CPU, where it is only known when the call runs."""
    sigma: Tensor = field(default_factory=lambda: torch.zeros(()))
    """On the CPU: the op reads it at every site, and only one transfer a call may wait for the GPU."""
    branch: Hashable = 0
    """Which of several calls at one noise level this is (conditional, unconditional, …; some processors call once a sample)."""
    contexts: Callable[[], str | None] = field(default=lambda: None)
    """The name that the pipeline gives to the branch (diffusers' `cache_context`), where a step cache keeps one."""
    splits_text: Callable[[], bool] = field(default=lambda: False)
    """Whether text is split over processes beside the picture (`hooked.splits_text`)."""
    _at: tuple[float, int, int] = (-1.0, 0, 0)
    _name: str | None = None
    _seen: Counter[tuple[str | None, int]] = field(default_factory=Counter)
    """Calls at this noise level, by the pipeline's name for the branch and by layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        twin = memo[id(self)] = copy.copy(self)
        twin.handle, twin.sites = copy.deepcopy((self.handle, self.sites), memo)
        twin._seen = Counter()
        twin.contexts, twin.splits_text = lambda: None, lambda: False  # its own are those of the model it was copied from
        return twin

    def count(self, sigma: float, layer: int, begins: bool) -> None:
        """Tell calls of one noise level apart: layers run in order, so one that does not come later begins another call.

        Where the pipeline names them, a step cache may skip a whole call of one branch: there only the calls of this layer
        under this name are counted.
        """
        before, last, call = self._at
        if begins or sigma != before:
            self._seen.clear()
            call, new = 0, True
        else:
            new = layer <= last
            call += new
        self._at = (sigma, layer, call)
        if new:
            self._name = self.contexts()
        self.branch = call if self._name is None else (self._name, self._seen[self._name, layer])
        self._seen[self._name, layer] += 1

    def overrun(self, sigma: float, layer: int) -> bool:
        """Whether there were so many calls at this noise level that they must be those of several runs."""
        return sigma == self._at[0] and self._seen[self._name, layer] >= MOST_CALLS


class Handle:
    """One accelerated pipeline (or model). Also a context manager: leaving it restores the pipeline."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = Clock()
        self.denoisers: list[Denoiser] = []
        self.restore: Any = None
        self.pipeline: weakref.ref[Any] | None = None
        self._timesteps: Any = None
        self._levels = 0
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _handles[self.number] = self

    @property
    def sites(self) -> list[Site]:
        return [site for denoiser in self.denoisers for site in denoiser.sites]

    @staticmethod
    def find(number: int) -> Handle:
        handle = _handles.get(number)
        if handle is None:
            raise RuntimeError("this attention belongs to a pipeline that fastdit no longer accelerates: compile it again")
        return handle

    def begin_call(self, sigma: float, site: Site) -> None:
        """Note where the run is. Whatever was remembered goes when a new run begins, also after one that was interrupted."""
        timesteps = self.timesteps()
        if timesteps is not self._timesteps or site.denoiser.overrun(sigma, site.layer):
            self.clock.restart()
        begins = self.clock.observe(sigma)
        if begins:
            self._timesteps = timesteps
            self._levels = 0 if timesteps is None else len(set(torch.as_tensor(timesteps).tolist()))
            for each in self.sites:
                each.forget()
        site.denoiser.count(sigma, site.layer, begins)

    def reset(self) -> None:
        """Forget what ran and what was remembered. It happens by itself when a pipeline runs anew, and when the noise level
        rises; a model on its own that is called again and again at one noise level (one-step models) needs it between runs."""
        self.clock.restart()
        for site in self.sites:
            site.forget()

    @property
    def last(self) -> bool:
        """Whether this is the last step of a run of the whole schedule: what is remembered serves nobody any more."""
        return 0 < self._levels <= self.clock.step + 1

    def timesteps(self) -> Any:
        """The scheduler's list of timesteps, a new object in each run; None for a model without a pipeline."""
        pipe = None if self.pipeline is None else self.pipeline()
        return getattr(getattr(pipe, "scheduler", None), "timesteps", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """A copied pipeline has a handle, a clock and counts of its own."""
        twin = Handle.__new__(Handle)
        memo[id(self)] = twin
        twin.config, twin.clock, twin.restore = self.config, Clock(), None
        twin.pipeline, twin._timesteps, twin._levels = None, None, 0
        twin.denoisers = copy.deepcopy(self.denoisers, memo)
        twin._register()
        return twin

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.restore is not None:
            self.restore()
