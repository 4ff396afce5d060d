"""The state of one accelerated pipeline: its denoisers, their attention sites, and its runs.

Everything is held by the pipeline's own `Handle`, which the processors bound into its modules refer to. The only global is a
weak index from a number to its handle, for the opaque ops. State of one run, which may differ between threads, is in
`runs/run.py`.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import nn

from fastdit.approx.step_cache import Memory
from fastdit.config import Config
from fastdit.core.byte_cache import ByteCache
from fastdit.planning.adapter import Adapter
from fastdit.planning.forward_plan import MASK_BYTES, plan_forward
from fastdit.planning.sequence import SequenceSpec
from fastdit.planning.trainable import always_dense
from fastdit.runs import loops
from fastdit.runs.branches import Call
from fastdit.runs.clock import Clock
from fastdit.runs.forward import Forward
from fastdit.runs.run import Run
from fastdit.runs.site_state import CallRecord, SiteState

PENDING = 64
"""Forwards of a training that may still be waiting for their backward: branches and accumulation need a few."""
_numbers = itertools.count()
_handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()


@dataclass(eq=False)
class Site:
    """One attention module. name: in the denoiser. index: among the handle's sites. layer: among its denoiser's sites.

    refusal: why a call went straight to the pipeline's own attention; in a compiled model set when the call is traced.
    """

    name: str
    index: int
    layer: int
    denoiser: Denoiser
    refusal: str | None = None

    @property
    def state(self) -> SiteState:
        """The state in the latest run."""
        return self.denoiser.handle.latest.sites[self.index]

    @property
    def calls(self) -> list[CallRecord]:
        return self.state.calls

    @property
    def memories(self) -> dict[tuple[Any, ...], Memory]:
        return self.state.memories

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        twin = memo[id(self)] = copy.copy(self)
        twin.denoiser = copy.deepcopy(self.denoiser, memo)
        return twin


@dataclass(eq=False)
class Denoiser:
    """One model and its sites. number: its index in the handle. names: of its forward's parameters. skipped_modules: attention
    modules that are not sites, counted by reason. call: this thread's running call, with `.token` (int64 [1] on the CPU: the
    number of its `Forward`), `.forward` (keeps it alive) and `.facts` (from the adapter)."""

    name: str
    adapter: Adapter
    handle: Handle
    model: weakref.ref[nn.Module]
    number: int = 0
    names: tuple[str, ...] = ()
    sites: list[Site] = field(default_factory=list)
    skipped_modules: Counter[str] = field(default_factory=Counter)
    call: threading.local = field(default_factory=threading.local)
    attentions: list[weakref.ref[nn.Module]] = field(default_factory=list)
    """The sites' modules; empty in a copy."""
    text_split: tuple[Any, bool] | None = None
    """A parallel configuration of diffusers, and whether it splits text as well as the picture."""
    checkpointing: list[weakref.ref[nn.Module]] | None = None
    """Modules that can recompute their blocks in a backward; None before the first forward that may have one."""
    deleted: Any = None
    """The `weakref.finalize` that runs when the model is deleted."""

    def modules(self) -> list[nn.Module | None]:
        """The sites' attention modules."""
        if not self.attentions and (model := self.model()) is not None:  # this is a copy
            self.attentions = [weakref.ref(module) for _, module in self.adapter.sites(model)]
        return [reference() for reference in self.attentions]

    def unserved(self) -> list[tuple[Site, str]]:
        """(site, reason) for sites whose processor was set directly on the module, which fastdit is not notified of."""
        return [
            (site, f"its processor was exchanged for {type(processor).__name__} since")
            for site, module in zip(self.sites, self.modules(), strict=True)
            if getattr(processor := getattr(module, "processor", None), "site", None) is not site
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        twin = memo[id(self)] = copy.copy(self)
        model = self.model()
        # The model's own copy, if the model is being copied too.
        twin.model = weakref.ref(memo.get(id(model), model)) if model is not None else self.model
        twin.call, twin.attentions, twin.checkpointing, twin.deleted = threading.local(), [], None, None
        twin.handle, twin.sites = copy.deepcopy((self.handle, self.sites), memo)
        return twin


class Handle:
    """One accelerated pipeline (or model). As a context manager it restores the pipeline on exit. train: attention has
    gradients, and each forward is planned by itself: nothing is remembered or measured."""

    def __init__(self, config: Config, train: bool = False) -> None:
        self.config, self.train = config, train
        self.denoisers: list[Denoiser] = []
        self.restore: Any = None
        self.describe: Any = None
        """What makes the text of a handle: reports stand on handles, so that a handle cannot know them."""
        self.pipeline: weakref.ref[Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self.masks = ByteCache(MASK_BYTES)
        self.runs = 0
        self.latest = Run(0)
        self._live: WeakSet[Run] = WeakSet()
        self._by_loop: WeakKeyDictionary[loops.Loop, Run] = WeakKeyDictionary()
        self._by_pipeline: list[Run] = []
        self._by_hand = threading.local()
        self._pending: deque[Forward] = deque(maxlen=PENDING)
        self._lock = threading.Lock()
        self.number = next(_numbers)
        _handles[self.number] = self

    @property
    def sites(self) -> list[Site]:
        return [site for denoiser in self.denoisers for site in denoiser.sites]

    @property
    def trains(self) -> bool:
        """Whether gradients pass: in training, and wherever every call is the model's own attention."""
        return self.train or always_dense(self.config)

    @property
    def clock(self) -> Clock:
        """The latest run's clock."""
        return self.latest.clock

    @staticmethod
    def find(number: int) -> Handle:
        handle = _handles.get(number)
        if handle is None:
            raise RuntimeError("this attention belongs to a pipeline that fastdit no longer accelerates: compile it again")
        return handle

    def enter(self, sigma: float, timestep: float | None, call: Call, sequence: SequenceSpec) -> Forward:
        """Begin one call of a denoiser, in the run of this thread that it belongs to or in a new one. A new run frees the
        statistics of the one before, also if that was interrupted. Raises RuntimeError if the configuration is strict and a
        site's processor was exchanged."""
        unserved = {site.index: why for site, why in self.denoisers[call.model].unserved()}
        loop, run = (None, None) if self.train else self._running(sigma, timestep, call)
        if run is None or run.finished or run.is_over(run.level(sigma, timestep), call, unserved):
            before, run = run, self._start(loop)
            if before is not None:
                before.finish()
                if loop is not None and not unserved:
                    run.follow(before)
        run.settle()
        for index, why in unserved.items():
            run.sites[index].lost = self.config.accept(self.sites[index].name, why)
        branch = run.enter(run.level(sigma, timestep), call)
        self.latest = run
        sites = self.denoisers[call.model].sites
        levels = tuple(run.sites[site.index].level for site in sites)
        plan = plan_forward(self.config, run.clock.sigma, sequence, levels)
        names = tuple(site.name for site in sites)
        first = sites[0].index if sites else 0
        forward = Forward(
            run, branch, plan, self.config, first, names, self.masks, self.bytes, due=branch.due(), train=self.train
        )
        if self.train:
            self._pending.append(forward)
        return forward

    def bytes(self, device: torch.device | None = None) -> int:
        """Bytes of statistics in all runs, on a device; None: on all."""
        return sum(state.bytes(device) for run in self.live() for state in run.sites)

    def _running(self, sigma: float, timestep: float | None, call: Call) -> tuple[loops.Loop | None, Run | None]:
        """The loop and the run that a call of this thread may belong to. If several loops alternate (generators), the one whose
        branch the call continues, otherwise the innermost."""
        found = loops.loops()
        if not found:
            return None, getattr(self._by_hand, "run", None)
        innermost = self._by_loop.get(found[0])
        if innermost is not None and len(found) > 1 and not innermost.knows(innermost.level(sigma, timestep), call):
            for loop in found[1:]:
                if (run := self._by_loop.get(loop)) is not None and run.knows(run.level(sigma, timestep), call):
                    return loop, run
        return found[0], innermost

    def _start(self, loop: loops.Loop | None) -> Run:
        pipeline = None if loop is None else loop.pipeline
        if not hasattr(pipeline, "scheduler"):  # a modular pipeline's block, or a model called by hand
            pipeline = None if self.pipeline is None else self.pipeline()
        run = Run(len(self.sites), pipeline, by_hand=loop is None)
        with self._lock:
            self.runs += 1
            self._live.add(run)
            self._by_pipeline = [
                other for other in self._by_pipeline if other.pipeline is not None and other.pipeline is not pipeline
            ] + [run]
            if loop is not None:
                self._by_loop[loop] = run
        if loop is None:
            self._by_hand.run = run
        else:
            loop.at_end(run.finish)
        for site in self.sites:
            site.refusal = None
        return run

    def live(self) -> list[Run]:
        """Runs that may hold statistics."""
        with self._lock:
            return [run for run in self._live if not run.finished]

    def run_of(self, pipeline: Any) -> Run:
        """The latest run of a pipeline that shares a model with others; if it has none, the latest run of all."""
        return next((run for run in reversed(self._by_pipeline) if run.pipeline is pipeline), self.latest)

    def reset(self) -> None:
        """Forget records and statistics. This happens by itself when a pipeline runs again and when the noise level rises. A
        model without a pipeline that is always called at one noise level (one-step models) needs it between runs."""
        for run in self.live():
            run.finish()
        self._by_pipeline = []
        self._pending.clear()
        self.latest = Run(len(self.sites))

    def release(self) -> None:
        """Free everything on a GPU."""
        self.reset()
        self.masks.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """A copied pipeline has its own handle and runs."""
        twin = Handle.__new__(Handle)
        memo[id(self)] = twin
        twin.config, twin.train, twin.restore, twin.pipeline, twin.describe = self.config, self.train, None, None, self.describe
        twin._begin()
        twin.denoisers = copy.deepcopy(self.denoisers, memo)
        twin.latest = Run(len(twin.sites))
        return twin

    def __str__(self) -> str:
        """The report of the latest run, whose first line says what ran."""
        return repr(self) if self.describe is None else str(self.describe(self))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.restore is not None:
            self.restore()
